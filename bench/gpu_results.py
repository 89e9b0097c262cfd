# SPDX-License-Identifier: Apache-2.0
"""The files that the GPU day brought home (ci/gpu_day) as one plain result, which is committed."""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bench import predictions
from bench.report import FORMAT
from bench.suite import Result
from bench.timing import Times

Lines = list[dict[str, Any]]


def read(folder: Path) -> dict[str, Any]:
    """Everything of a day; ValueError where the folder is none of a day's."""
    bench = _bench_lines(folder)
    libraries = {line["library"]: line for line in bench if line["event"] == "machine"}
    if "library" not in libraries:
        raise ValueError(f"fill_gpu: {folder / 'bench.jsonl'} does not say what it was measured on")
    head = libraries["library"]
    tests, samples = _tests(folder)
    return {
        "format": FORMAT,
        "dry_run": head["dry_run"],
        "machine": head["machine"],
        "suites": _suites(bench, "library"),
        "baseline": _suites(bench, "baseline"),
        "day": {
            "tests": tests,
            "samples": samples,
            "sanitizers": _sanitizers(folder),
            "profiled": (folder / "kernels.ncu-rep").is_file(),
            "steps": _steps(folder),
        },
    }


def slug(machine: Mapping[str, Any]) -> str:
    """The name of the result file: that of the GPU."""
    words = re.findall(r"[a-z0-9]+", str(machine.get("gpu", "no gpu")).lower())
    return "_".join(words)


def result_of(row: Mapping[str, Any]) -> Result:
    """A result as the suites have it, from its plain form."""
    times = {name: Times(**value) for name, value in row["seconds"].items()}
    return Result(**{**row, "seconds": times})


def _bench_lines(folder: Path) -> Lines:
    path = folder / "bench.jsonl"
    try:
        return list(_json_lines(path.read_text()))
    except OSError as error:
        raise ValueError(f"fill_gpu: {folder} has no bench.jsonl of a GPU day") from error


def _json_lines(text: str) -> Iterator[dict[str, Any]]:
    """Whole lines only: what is killed while it writes leaves half a line."""
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def _suites(bench: Lines, library: str) -> dict[str, Any]:
    """By suite: its rows, and its predictions judged on them."""
    suites: dict[str, Any] = {}
    for line in bench:
        if line["event"] == "result" and line["library"] == library:
            suite = suites.setdefault(line["suite"], {"results": [], "targets": []})
            suite["results"].append(line["result"])
    for name, suite in suites.items():
        results = {row["case"]: result_of(row) for row in suite["results"]}
        suite["targets"] = [t.as_dict() for t in predictions.targets(name, results)]
    return suites


def _members(archive: Path) -> Iterator[tuple[str, str]]:
    """Names and texts of the files of a .tgz; none where it is missing or broken."""
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None:
                    yield member.name, file.read().decode(errors="replace")
    except (OSError, tarfile.TarError):
        return


def _tests(folder: Path) -> tuple[Lines, Lines]:
    """Of the tests counts by specification, kind and backend, with what failed; the samples."""
    rows, samples = [], []
    for name, text in _members(folder / "junit.tgz"):
        if name == "samples.jsonl":
            samples = _samples(list(_json_lines(text)))
        elif name.endswith(".jsonl"):
            kind, _, spec = name.removesuffix(".jsonl").partition("-")
            rows += [{"kind": kind, "spec": spec, **row} for row in _counted(_json_lines(text))]
    order = sorted(rows, key=lambda row: (row["kind"], row["spec"], row["backend"]))
    return order, samples


def _samples(lines: Lines) -> Lines:
    """The samples that ended; and one row for all that the file announced and does not have."""
    ended = [line for line in lines if "outcome" in line]
    missing = sum(line.get("count", 0) for line in lines) - len(ended)
    if missing > 0:
        facts = {"spec": f"{missing} samples", "backend": "", "dtype": ""}
        ended.append({**facts, "outcome": "not run", "message": "not run, or did not end"})
    return ended


def _counted(lines: Iterable[dict[str, Any]]) -> Lines:
    """Passed, failed and skipped by backend; a test without an end took the process with it."""
    ended: dict[str, dict[str, Any]] = {}
    for line in lines:
        if line["event"] == "start":
            ended.setdefault(line["test"], {"outcome": "failed", "message": "did not end"})
        else:
            ended[line["test"]] = line
    rows: dict[str, dict[str, Any]] = {}
    for test, line in ended.items():
        found = re.search(r"-((?:emulate:)?(?:simt|sm80|sm90))-", test)
        backend = found[1] if found else "?"
        row = rows.setdefault(backend, {"backend": backend, "counts": Counter(), "failed": []})
        row["counts"][line["outcome"]] += 1
        if line["outcome"] == "failed":
            row["failed"].append([test, line["message"]])
    return [{**row, "counts": dict(row["counts"])} for row in rows.values()]


def _sanitizers(folder: Path) -> Lines:
    """By tool and specification: cases that ran, that failed, and the sanitizer's own count."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for name, text in _members(folder / "sanitizer.tgz"):
        stem, _, kind = name.rpartition(".")
        tool, _, spec = stem.partition("-")
        row = rows.setdefault((tool, spec), {"tool": tool, "spec": spec, "cases": 0, "failed": 0})
        if kind == "jsonl":
            lines = list(_json_lines(text))
            row["cases"] = len(lines)
            row["failed"] = sum(line["outcome"] != "ok" for line in lines)
        else:
            found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
            row["errors"] = int(found[-1]) if found else None
    return [rows[key] for key in sorted(rows)]


def _steps(folder: Path) -> list[str]:
    """The lines of the summary that close a stage."""
    try:
        text = (folder / "summary.txt").read_text()
    except OSError:
        return []
    return [line.removeprefix("==== ") for line in text.splitlines() if line.startswith("==== ")]
