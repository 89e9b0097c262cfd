# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin: the tests of one specification on the target's backends, told as they run.

    GPU_DAY_SPEC=attention GPU_DAY_LINES=lines.jsonl pytest -p gpu_day.one_spec tests/test_ops.py

A line is written at the start of a test and at its end, so that a test which takes the process with
it is known by name.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gpu_day.target import target


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Keeps what has the specification and a backend under test."""
    kept, left, seen = [], [], Counter()
    here, name = target(), os.environ["GPU_DAY_SPEC"]
    for item in items:
        params = getattr(item, "callspec", None) and item.callspec.params
        wanted = params and str(params.get("spec")) == name and here.runs(params.get("backend"))
        if wanted:
            key = (item.originalname, params["backend"], params["dtype"])
            seen[key] += 1
            wanted = here.most is None or seen[key] <= here.most
        (kept if wanted else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


def pytest_sessionfinish(session: Any, exitstatus: int) -> None:
    """A dry run has no test that captures a graph: none to run is no failure there."""
    if target().device != "cuda" and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK


def pytest_runtest_logstart(nodeid: str, location: Any) -> None:
    """The line before a test."""
    _write({"test": nodeid, "event": "start"})


def pytest_runtest_logreport(report: Any) -> None:
    """The line behind a test: the outcome of its call, or of a set-up that did not pass."""
    if report.when == "call" or report.outcome != "passed":
        message = "" if report.outcome != "failed" else _last_line(report)
        line = {"test": report.nodeid, "event": "end", "outcome": report.outcome}
        _write(line | {"seconds": round(report.duration, 4), "message": message})


def _last_line(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr)
    return " ".join(text.split())[:400]


def _write(line: dict[str, Any]) -> None:
    with Path(os.environ["GPU_DAY_LINES"]).open("a") as file:
        file.write(json.dumps(line) + "\n")
