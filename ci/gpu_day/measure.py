# SPDX-License-Identifier: Apache-2.0
"""The benchmark, one line of JSON per case as it is measured.

    python -m gpu_day.measure bench.jsonl LIBRARY     the cases that the file does not have yet
    python -m gpu_day.measure --compile-only          compiles the peers, measures nothing

A case announces itself by a line before it begins. A case that was announced and has no result took
the process with it, or was stopped: it gets a row that says so, and the rest goes on.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import gpu, machine
from bench.suite import Case, Result, run_case
from bench.timing import reason
from gpu_day.target import target

LIMIT = 45  # seconds of one case: then the process ends, and the next one goes on behind it
POISONED = 3  # exit status: the process can launch nothing any more


def _readable(text: str) -> Iterator[dict[str, Any]]:
    """The lines of a file; one that a process did not write to its end is left out."""
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


class Lines:
    """The file: what is in it of this library, and how lines are added."""

    def __init__(self, path: Path, library: str) -> None:
        self.path, self.library = path, library
        text = path.read_text() if path.is_file() else ""
        if text and not text.endswith("\n"):
            with path.open("a") as file:
                file.write("\n")
        lines = list(_readable(text))
        mine = [line for line in lines if line["library"] == library]
        self.begun = {(x["suite"], x["case"]) for x in mine if x["event"] == "start"}
        self.done = {(x["suite"], x["case"]) for x in mine if x["event"] == "result"}
        self.described = any(line["event"] == "machine" for line in mine)

    def add(self, event: str, **facts: Any) -> None:
        """One line."""
        with self.path.open("a") as file:
            file.write(json.dumps({"event": event, "library": self.library, **facts}) + "\n")


def measure(lines: Lines, device: str, dry: bool) -> int:
    """The cases that are left; the exit status."""
    if not lines.described:
        lines.add("machine", dry_run=dry, machine=machine.describe(device))
    for suite, case in gpu.cases(device, tiny=dry):
        if (suite, case.name) in lines.done:
            continue
        if (suite, case.name) in lines.begun:
            why = {"process": f"ended before the case did (limit {LIMIT} s)"}
            _add(lines, suite, Result(case.name, dict(case.shape), {}, failed=why), 0.0)
            continue
        lines.add("start", suite=suite, case=case.name)
        start = time.monotonic()
        signal.alarm(LIMIT)  # without a handler: also a process that hangs in the driver ends
        result = _result(case, device, dry, lines.library)
        signal.alarm(0)
        _add(lines, suite, result, time.monotonic() - start)
        if gpu.poisoned(device):
            return POISONED
    return 0


def _result(case: Case, device: str, dry: bool, library: str) -> Result:
    try:
        effort = gpu.DRY_EFFORT if dry else gpu.EFFORT
        only = None if library == "library" else "headworks"
        return run_case(case, device=device, effort=effort, only=only)
    except Exception as error:  # the inputs, for instance, do not fit
        return Result(case.name, dict(case.shape), {}, failed={"case": reason(error)})


def _add(lines: Lines, suite: str, result: Result, seconds: float) -> None:
    fractions = {roof: result.fraction(roof) for roof in result.least}
    facts = {"result": asdict(result), "fractions": fractions, "took": round(seconds, 2)}
    lines.add("result", suite=suite, case=result.case, **facts)
    failed = f", failed: {', '.join(result.failed)}" if result.failed else ""
    print(f"{suite}: {result.case}: {seconds:.1f} s{failed}", flush=True)


def main() -> int:
    """Measures or compiles; the exit status."""
    here = target()
    dry = here.device != "cuda"
    if sys.argv[1:] == ["--compile-only"]:
        gpu.compile_ahead(gpu.cases(here.device, tiny=dry))
        return 0
    return measure(Lines(Path(sys.argv[1]), sys.argv[2]), here.device, dry)


if __name__ == "__main__":
    sys.exit(main())
