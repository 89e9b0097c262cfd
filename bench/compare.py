# SPDX-License-Identifier: Apache-2.0
"""Two trees beside each other: every operator's middle-sized call, as ratios of CPU time.

    python -m bench.compare BEFORE AFTER --json FILE

BEFORE and AFTER are checkouts that are built; `TREE:LIBRARY` where the native libraries are not in
TREE/build/cpu/lib. Their packages may differ in all but the public functions, since the cases
(bench/compare_cases.py) come from the checkout that this is run in. Each tree has a process of its
own, which take turns call by call; where a process lies in memory makes some calls a few percent
faster or slower than others of the same code, so a few pairs of processes follow one another, and
the ratio of a case is the median of all pairs' medians. BEFORE twice tells how far ratios go
without a cause.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bench import peak

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_SECONDS = 20e-3  # a sample is one call, or as many as take this long
# The C library keeps what is freed: fresh pages from the system cost more than some calls do.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


class Tree(NamedTuple):
    """A checkout, and where its native libraries are."""

    path: Path
    library: Path

    @classmethod
    def of(cls, text: str) -> Tree:
        """From TREE or TREE:LIBRARY."""
        path, _, library = text.partition(":")
        tree = cls(Path(path).resolve(), Path(library or Path(path) / "build/cpu/lib").resolve())
        if not (tree.path / "python/headworks/__init__.py").is_file():
            raise ValueError(f"{path} is no checkout of headworks: it has no python/headworks")
        if not any(tree.library.glob("libheadworks.*")):
            raise ValueError(f"{tree.library} holds no libheadworks; build {path}, or TREE:LIBRARY")
        return tree


class Worker:
    """A process of a tree that times calls when it is told to."""

    def __init__(self, tree: Tree, threads: int) -> None:
        path = os.pathsep.join([str(tree.path / "python"), str(ROOT)])
        names = {"PYTHONPATH": path, "HEADWORKS_LIBRARY_DIR": str(tree.library)}
        names |= {"OMP_NUM_THREADS": str(threads), **KEEP_MEMORY}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.compare_cases", str(threads)],
            cwd=ROOT,
            env={**os.environ, **names},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        package, self.names = self._read()
        if tree.path not in Path(package).resolve().parents:
            self.close()
            raise ValueError(f"headworks was imported from {package}, not from {tree.path}")

    def start(self, name: str) -> None:
        """Makes the call of that name, and calls it once."""
        self._ask({"start": name})

    def seconds(self, count: int) -> float:
        """CPU seconds a call, as the mean of `count`."""
        return float(self._ask({"time": count}))

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process of bench.compare ended: {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["ok"]


@dataclass
class Samples:
    """What was measured of a case: medians of each pair of processes."""

    before: list[float] = field(default_factory=list)  # seconds
    after: list[float] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)  # after over before, of the same turn
    failed: str | None = None  # what a call raised, in either tree

    def row(self) -> dict[str, Any]:
        """Plain data: the medians of the pairs, and between which ratios they lie."""
        if self.failed is not None or not self.ratio:
            return {"failed": self.failed}
        median = statistics.median
        seconds = {"before": median(self.before), "after": median(self.after)}
        ratios = {"lowest": min(self.ratio), "highest": max(self.ratio)}
        return {"ratio": median(self.ratio), **ratios, **seconds, "pairs": len(self.ratio)}


def measure_pair(
    workers: Sequence[Any], name: str, rounds: int, budget: float, samples: Samples
) -> None:
    """Adds the medians of one case in one pair of processes: they take turns, and who is first
    alternates. At most `rounds` turns, and no more than `budget` seconds allow, but five."""
    for worker in workers:
        worker.start(name)
    once = max(1e-7, *(worker.seconds(1) for worker in workers))
    count = max(1, math.ceil(SAMPLE_SECONDS / once))
    turns = max(5, min(rounds, int(budget / (2 * count * once))))
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns):
        for i in (0, 1) if turn % 2 == 0 else (1, 0):
            seconds[i].append(workers[i].seconds(count))
    before, after = seconds
    samples.before.append(statistics.median(before))
    samples.after.append(statistics.median(after))
    samples.ratio.append(statistics.median(a / b for b, a in zip(before, after, strict=True)))


def compare(trees: Sequence[Tree], args: argparse.Namespace) -> dict[str, Samples]:
    """All pairs of processes, one after another."""
    found: dict[str, Samples] = {}
    for pair in range(args.pairs):
        with (
            closing(Worker(trees[0], args.threads)) as before,
            closing(Worker(trees[1], args.threads)) as after,
        ):
            for name in (name for name in before.names if re.search(args.filter, name)):
                samples = found.setdefault(name, Samples())
                if samples.failed is not None:
                    continue
                try:
                    measure_pair((before, after), name, args.rounds, args.budget, samples)
                except RuntimeError as error:
                    samples.failed = str(error)
        if not found:
            raise ValueError(f"--filter {args.filter!r} matches no case")
        print(f"pair {pair + 1} of {args.pairs}", file=sys.stderr)
    return found


def table(rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Lines to read, and the median of all ratios."""
    width = max(map(len, rows))
    yield f"{'':{width}}  after / before  lowest highest     before ms      after ms"
    for name, row in rows.items():
        if "ratio" not in row:
            yield f"{name:{width}}  {row['failed']}"
            continue
        ratios = f"{row['ratio']:14.3f}  {row['lowest']:6.3f}  {row['highest']:6.3f}"
        times = f"{1e3 * row['before']:12.3f}  {1e3 * row['after']:12.3f}"
        yield f"{name:{width}}  {ratios}  {times}"
    ratios_of_all = [row["ratio"] for row in rows.values() if "ratio" in row]
    if ratios_of_all:
        yield f"{'median of all':{width}}  {statistics.median(ratios_of_all):14.3f}"


def _commit(tree: Tree) -> str:
    """The commit of a checkout, with + where files differ from it; "" where git cannot tell."""
    command = ["git", "-C", str(tree.path), "describe", "--always", "--abbrev=12", "--dirty=+"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip()


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("before", metavar="BEFORE", help="TREE or TREE:LIBRARY")
    parser.add_argument("after", metavar="AFTER", help="TREE or TREE:LIBRARY")
    parser.add_argument("--filter", default="", metavar="REGEX", help="only matching cases")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table to FILE")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of processes")
    parser.add_argument("--rounds", type=int, default=15, help="turns in each pair, at most")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds a case in each pair")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 1 where a call raised, 2 for bad arguments."""
    args = _arguments(argv)
    try:
        trees = [Tree.of(args.before), Tree.of(args.after)]
        found = compare(trees, args)
    except (ValueError, re.error) as error:
        print(f"bench.compare: {error}", file=sys.stderr)
        return 2
    rows = {name: samples.row() for name, samples in found.items()}
    print("\n".join(table(rows)))
    if args.json:
        commits = {"before": _commit(trees[0]), "after": _commit(trees[1])}
        facts = {"machine": peak.processor(), "threads": args.threads}
        data = {"commits": commits, **facts, "cases": rows}
        args.json.write_text(json.dumps(data, indent=1) + "\n")
    return int(any("ratio" not in row for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
