#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Mutation run: do the tests notice when the C++ sources are wrong?

Changes that an author might make by mistake (a comparison, a constant, a sign, an index, a barrier
or a statement left out) are all compiled into one library, each behind a switch. The specs' small
comparisons run once without a change and note which switches they reach; then once for each change
that is reached, until one of them differs. A change that none notices, or none reaches, survives:
a hole in the tests, unless ci/mutants/explained.json says why it changes nothing.

    ci/mutants.py --sample 80 --seed 1       a sample, drawn by the seed
    ci/mutants.py --only ops/key_scan        all of some files
    ci/mutants.py --list                     what could be changed, without building

At most 5 % of the changes may survive unexplained.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import sys
import time
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "mutants"))

import builder as building
import judge as judging
from rewrite import Mutant

EXPLAINED = Path(__file__).parent / "mutants" / "explained.json"
ALLOWED = 0.05
# Of every sample at least this share are barriers: they are few, and nothing else finds them.
BARRIERS = 0.15
SURVIVING = ("survived", "not reached", "broken")


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", type=int, help="how many mutants; default: all")
    parser.add_argument("--seed", default="0", help="what draws the sample")
    parser.add_argument("--only", default="", metavar="PATH", help="files that begin with PATH")
    parser.add_argument("--kind", default="", help="only this kind, e.g. barrier")
    parser.add_argument(
        "--backend", action="append", choices=sorted(judging.BACKENDS), help="default: all"
    )
    parser.add_argument("--folder", type=Path, default=building.ROOT / "build" / "mutants")
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    parser.add_argument("--jobs", type=int, default=jobs, help="processes at a time")
    parser.add_argument(
        "--budget", type=float, default=20.0, help="seconds of comparisons that each may take"
    )
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--list", action="store_true", help="list the mutants and stop")
    return parser.parse_args()


class Clock:
    """As a text: seconds since the last text, and how many a processor worked in them."""

    def __init__(self):
        self.first = self.last = time.monotonic()
        self.used = self._processor()

    def seconds(self) -> float:
        return time.monotonic() - self.first

    def _processor(self) -> float:
        mine, other = (
            resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )
        return mine.ru_utime + mine.ru_stime + other.ru_utime + other.ru_stime

    def __str__(self) -> str:
        now, used = time.monotonic(), self._processor()
        text = f"{now - self.last:.0f} s, {used - self.used:.0f} s of a processor"
        self.last, self.used = now, used
        return text


def drawn(mutants: list[Mutant], count: int | None, seed: str) -> list[Mutant]:
    """A sample that depends on the seed and the changes, not on lines."""
    if count is None or count >= len(mutants):
        return mutants
    ordered = sorted(mutants, key=lambda m: hashlib.sha256((seed + m.key).encode()).digest())
    barriers = [m for m in ordered if m.kind.startswith("barrier")]
    first = barriers[: round(BARRIERS * count)]
    rest = [m for m in ordered if m not in first]
    return first + rest[: count - len(first)]


class Explanations:
    """Survivors that change nothing, by file and text of the line."""

    def __init__(self, file: Path = EXPLAINED):
        self.entries = json.loads(file.read_text()) if file.exists() else []

    def reason(self, m: Mutant) -> str:
        for entry in self.entries:
            if not fnmatch(m.file, entry["file"]) or entry["line"] not in m.text:
                continue
            if "kinds" in entry and m.kind not in entry["kinds"]:
                continue
            if "mutated" in entry and entry["mutated"] not in m.mutated:
                continue
            return entry["reason"]
        return ""


def outcome(status: int) -> str:
    if status < 0:
        return "hangs" if -status in judging.HANGING else "crashes"
    words = {
        judging.SURVIVED: "survived", judging.DIFFERENT: "different", judging.REFUSED: "refused",
    }  # fmt: skip
    return words.get(status, "broken")


def main() -> int:
    args = arguments()
    clock = Clock()
    mutants = building.find(building.sources(args.only))
    mutants = [m for m in mutants if m.kind.startswith(args.kind)]
    chosen = drawn(mutants, args.sample, args.seed)
    print(f"{len(chosen)} of {len(mutants)} mutants: {dict(Counter(m.kind for m in chosen))}")
    if args.list:
        print(*chosen, sep="\n")
        return 0
    numbered = dict(enumerate(chosen, 1))
    made = building.Build(args.folder.resolve(), numbered, args.jobs)
    made.make()
    print(f"built: {clock}; {len(made.dropped)} do not compile", flush=True)
    backends = tuple(args.backend or judging.BACKENDS)
    judge = judging.Judge(made.library, backends, made.part.specs, args.budget)
    print(f"references: {clock}", flush=True)
    baseline = judge.baseline(made.numbers, args.jobs)
    print(f"without a mutant: {len(baseline.seconds)} comparisons, {clock}", flush=True)
    if judging.run_programs(0, made.programs) != judging.SURVIVED:
        baseline.wrong.append("the C++ tests fail")
    if baseline.wrong or len(baseline.seconds) < 10:
        print(*baseline.wrong, "the sources as they are do not pass", sep="\n")
        return 2
    results = classify(judge, baseline, made, args.jobs)
    return report(results, numbered, args, clock)


def classify(judge, baseline, made, workers) -> dict[int, str]:
    results = dict.fromkeys(made.dropped, "not compiled")
    reached = {}
    for n, m in made.mutants.items():
        flag = baseline.flag(n)
        if flag & judging.REACHED:
            reached[n] = m.kind.startswith("barrier")
        else:
            results[n] = "not compiled" if flag & judging.DOES_NOT_APPLY else "not reached"

    def told(n, status, seconds):
        results[n] = outcome(status)
        print(f"{n:5} {results[n]:10} {seconds:6.1f} s  {made.mutants[n]}", flush=True)

    judge.try_all(reached, baseline, workers, told)
    left = [n for n in made.mutants if results[n] in SURVIVING] if made.programs else []
    for n in left:  # what the C++ tests are for
        status = judging.run_programs(n, made.programs)
        if status != judging.SURVIVED:
            told(n, status, 0.0)
    return results


def report(results, mutants, args, clock) -> int:
    explanations = Explanations()
    counted = [n for n, r in results.items() if r != "not compiled"]
    survivors = [n for n in counted if results[n] in SURVIVING]
    unexplained = [n for n in survivors if not explanations.reason(mutants[n])]
    print(f"\n{dict(Counter(results.values()))}; {clock}")
    for n in survivors:
        why = explanations.reason(mutants[n])
        print(f"{results[n]}{' (explained: ' + why + ')' if why else ''}: {mutants[n]}")
    share = len(unexplained) / max(1, len(counted))
    print(f"{len(unexplained)} of {len(counted)} survive unexplained: {100 * share:.1f} %")
    if args.json:
        rows = [
            {
                "file": m.file, "line": m.line, "kind": m.kind, "original": m.original,
                "mutated": m.mutated, "text": m.text, "result": results[n],
                "explained": explanations.reason(m),
            }
            for n, m in mutants.items()
        ]  # fmt: skip
        args.json.write_text(json.dumps({"seconds": clock.seconds(), "mutants": rows}, indent=1))
    return 0 if share <= ALLOWED else 1


if __name__ == "__main__":
    sys.exit(main())
