#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What of the kernels the emulated comparisons never reach: reads the counts of a build of the
preset `coverage` that has run them (ci/coverage.sh does all of it).

    ci/check_coverage.py build/coverage       says what is never reached; 1 if that is unexplained

Over csrc/ops, csrc/softmax, csrc/neighborhood and csrc/core, kernels and the host code around them:

    line        never runs, in any instance of its template
    barrier     a line with a barrier or a wait that never runs, in an instance that otherwise does,
                or behind a condition that never turns out one way
    instance    a kernel that is compiled and never launched
    branch      host code only: a condition that never turns out one way

What cannot be reached stands in ci/coverage.json: file, a part of the line (of the kernel's name),
optionally the kinds, and the reason. An entry that explains nothing is an error too.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXPLAINED = ROOT / "ci" / "coverage.json"
KINDS = ("line", "barrier", "instance", "branch")
BARRIER = re.compile(r"\b(sync_block|sync_warp|sync_group|copy_async_wait|copy_async_commit)\b")


# What kernels are made of. The rest of core, and the CPU's code, has tests of its own.
CORE = (
    "math.h", "ref.h", "regions.h", "sort_key.h", "cpu/matmul.h", "cpu/panel.h",
    "gpu/async_copy.cuh", "gpu/block_rank.cuh", "gpu/csr.cuh", "gpu/csr.h", "gpu/device.cuh",
    "gpu/mma.cuh", "gpu/packed.cuh", "gpu/tile.cuh", "gpu/vector.h",
)  # fmt: skip


def counts(name: str) -> bool:
    folder, _, file = name.removeprefix("csrc/").partition("/")
    if folder == "core":
        return file in CORE
    of_cpu = "_cpu" in file or file.startswith("cpu/")
    return folder in ("ops", "softmax", "neighborhood") and not of_cpu


@dataclass(frozen=True, order=True)
class Finding:
    file: str
    line: int
    kind: str
    text: str

    def __str__(self):
        return f"{self.file}:{self.line}: {self.kind}: {self.text}"


@dataclass
class Lines:
    """Of one file, what one function has run, with what was inlined into it: counts by line, and of
    branches the counts of their outcomes."""

    counts: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    outcomes: dict[int, list[int]] = field(default_factory=dict)


class Counts:
    """All units together: the linker keeps one of several copies of a function."""

    def __init__(self):
        self.runs = defaultdict(int)  # by the function's full name
        self.first = {}  # the same: file and line
        self.files = defaultdict(lambda: defaultdict(Lines))  # by file, then by function

    def add(self, unit: dict):
        """What `gcov --json-format` says of one unit."""
        names = {}
        for source in unit["files"]:
            for f in source["functions"]:
                names[f["name"]] = f["demangled_name"]
                self.runs[f["demangled_name"]] += f["execution_count"]
                self.first[f["demangled_name"]] = relative(source["file"]), f["start_line"]
        for source in unit["files"]:
            if counts(relative(source["file"])):
                for line in source["lines"]:
                    # gcov does not say of what function a line is that several functions share.
                    full = names.get(line.get("function_name"), "")
                    self._add(self.files[relative(source["file"])][full], line)

    @staticmethod
    def _add(lines: Lines, line: dict):
        at = line["line_number"]
        lines.counts[at] += line["count"]
        # Exceptions that a call may throw are no branches of the source.
        outcomes = [b["count"] for b in line["branches"] if not b["throw"]]
        before = lines.outcomes.get(at, [])
        if len(before) == len(outcomes):
            outcomes = [a + b for a, b in zip(before, outcomes, strict=True)]
        if len(outcomes) > 1:
            lines.outcomes[at] = outcomes


def relative(path: str) -> str:
    at = path.rfind("/csrc/")
    return path[at + 1 :] if at >= 0 else path


class Source:
    """The text of a file; which of its lines are of device code, and which of check(...), whose
    conditions do not fail in calls that are valid."""

    def __init__(self, text: str):
        self.lines = text.splitlines()
        code = re.sub(r'"(\\.|[^"\\\n])*"|//[^\n]*', lambda m: " " * len(m[0]), text)
        self.device = self._spans(code, r"\bHW_(?:HOST_)?DEVICE\b", "{", "}")
        self.checks = self._spans(code, r"(?<![\w.:])check(?=\()", "(", ")")

    def text(self, line: int) -> str:
        return self.lines[line - 1].strip() if 0 < line <= len(self.lines) else ""

    @staticmethod
    def _spans(code: str, begin: str, opening: str, closing: str) -> set[int]:
        """Lines from what matches `begin` to the end of the brackets behind it; of a constructor to
        the end of the last of several."""
        found = set()
        for m in re.finditer(begin, code):
            depth, at = 0, m.end()
            while at < len(code):
                depth += (code[at] in "({[") - (code[at] in ")}]")
                if depth == 0 and code[at] == ";":
                    break
                at += 1
                closed = depth == 0 and code[at - 1] == closing
                if closed and not re.match(r"\s*[,{]", code[at:]):
                    break
            if opening in code[m.end() : at]:
                found.update(range(code.count("\n", 0, m.start()) + 1, code.count("\n", 0, at) + 2))
        return found


def findings(counted: Counts, read) -> list[Finding]:
    """What is never reached; `read` gives the text of a file."""
    found = {
        Finding(*counted.first[full], "instance", kernel)
        for full, runs in counted.runs.items()
        if not runs and (kernel := kernel_of(full)) and counts(counted.first[full][0])
    }
    for name, functions in counted.files.items():
        source = Source(read(name))
        totals, outcomes = defaultdict(int), defaultdict(lambda: defaultdict(list))
        for lines in functions.values():
            for line, count in lines.counts.items():
                totals[line] += count
            for line, some in lines.outcomes.items():
                outcomes[line][len(some)].append(some)
        for line, count in totals.items():
            text = source.text(line)
            barrier = BARRIER.search(text)
            if count == 0 and text != "}":
                found.add(Finding(name, line, "line", text))
            elif barrier or line not in source.device | source.checks:
                sums = [[sum(x) for x in zip(*y, strict=True)] for y in outcomes[line].values()]
                if any(any(x) and not all(x) for x in sums):
                    found.add(Finding(name, line, "barrier" if barrier else "branch", text))
            for full, lines in functions.items() if barrier and count else ():
                if lines.counts.get(line) == 0 and counted.runs[full]:
                    found.add(Finding(name, line, "barrier", f"{text} in {full}"))
    return sorted(found)


def kernel_of(full: str) -> str:
    """The kernel of which this is the main function."""
    kernel = re.search(r"([\w:]*\b\w*Kernel\b.*)::main\(", full)
    return kernel[1] if kernel and "{lambda" not in full else ""


def unexplained(found: list[Finding], entries: list[dict]):
    """The findings without a reason, and the entries that explain none."""
    used, left = set(), []
    for f in found:
        matching = [n for n, e in enumerate(entries) if _explains(e, f)]
        used.update(matching)
        if not matching:
            left.append(f)
    return left, [e for n, e in enumerate(entries) if n not in used]


def _explains(entry, f):
    return (
        f.file.startswith(entry["file"])
        and entry["line"] in f.text
        and f.kind in entry.get("kinds", KINDS)
    )


def read_build(build: Path) -> Counts:
    counted = Counts()
    units = sorted(build.rglob("*.gcda"))
    for unit in units:
        ran = subprocess.run(
            ["gcov", "--json-format", "--stdout", "--branch-probabilities", str(unit)],
            capture_output=True, text=True, check=True, cwd=build,
        )  # fmt: skip
        for line in ran.stdout.splitlines():
            if line.startswith("{"):
                counted.add(json.loads(line))
    if not any(counted.runs.values()):
        raise SystemExit(f"{build} has {len(units)} counted units, none of which has run")
    return counted


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("build", type=Path)
    args = parser.parse_args()
    counted = read_build(args.build.resolve())
    found = findings(counted, lambda name: (ROOT / name).read_text())
    left, stale = unexplained(found, json.loads(EXPLAINED.read_text()))
    for f in left:
        print(f)
    for e in stale:
        print(f"{EXPLAINED.name}: explains nothing: {e['file']}: {e['line']}")
    lines = sum(len(set().union(*(f.counts for f in x.values()))) for x in counted.files.values())
    print(
        f"{len(counted.files)} files, {lines} lines; "
        f"{len(found)} places never reached, {len(left)} unexplained; {len(stale)} entries stale"
    )
    return 1 if left or stale else 0


if __name__ == "__main__":
    sys.exit(main())
