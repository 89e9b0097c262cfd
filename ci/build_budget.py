#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What a build costs, in core-seconds: user and system time of every compiler process.

A compiler launcher writes one line per translation unit, so the figures do not depend on how many
jobs ran or on what else the machine did, as wall time does.

Usage: build_budget.py launch LOG COMMAND...        runs a compiler and logs what it cost
       build_budget.py report LOG [--total S] [--unit S] [--top N]
                                                    the costliest units; status 1 over a budget
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from pathlib import Path


def launch(log: str, command: list[str]) -> int:
    """Runs the compiler; appends "core-seconds<TAB>object"."""
    pid = os.posix_spawnp(command[0], command, os.environ)
    _, status, usage = os.wait4(pid, 0)
    if "-o" in command:
        line = f"{usage.ru_utime + usage.ru_stime:.3f}\t{command[command.index('-o') + 1]}\n"
        with Path(log).open("ab", buffering=0) as file:  # one write: units end at the same time
            file.write(line.encode())
    return os.waitstatus_to_exitcode(status)


def read(log: Path) -> dict[str, float]:
    """Core-seconds of every unit, by a readable name; of a unit built twice the last."""
    costs = {}
    for line in log.read_text().splitlines():
        seconds, name = line.split("\t")
        costs[Path(name).name.removesuffix(".o")] = float(seconds)
    return costs


def kind(unit: str) -> str:
    """The group of a unit: "cpu baseline", "cuda sm80", "host"."""
    words = unit.removesuffix(".cpp").removesuffix(".cu").split("_")
    if "cpu" in words:
        return f"cpu {words[-1]}"
    for backend in ("simt", "sm80", "sm90"):
        if backend in words:
            return f"{'cuda' if unit.endswith('.cu') else 'emulated'} {backend}"
    return "host"


def report(costs: dict[str, float], total: float, unit: float, top: int) -> int:
    """Prints the table and the groups; 1 if the sum or any unit is over its budget."""
    print(f"{'core-seconds':>12}  translation unit")
    dearest = sorted(costs.items(), key=lambda item: -item[1])
    for name, seconds in dearest[:top]:
        print(f"{seconds:>12.1f}  {name}")
    groups: defaultdict[str, list[float]] = defaultdict(list)
    for name, seconds in costs.items():
        groups[kind(name)].append(seconds)
    print(f"\n{'core-seconds':>12} {'units':>6}  kind")
    for name, values in sorted(groups.items(), key=lambda item: -sum(item[1])):
        print(f"{sum(values):>12.1f} {len(values):>6}  {name}")
    spent = sum(costs.values())
    print(f"{spent:>12.1f} {len(costs):>6}  all; budget {total:.0f}, of one unit {unit:.0f}")
    over = [f"{name} takes {s:.1f} core-seconds, budget {unit:.0f}" for name, s in dearest
            if s > unit]  # fmt: skip
    if spent > total:
        over.append(f"the build takes {spent:.1f} core-seconds, budget {total:.0f}")
    for fault in over:
        print(f"build_budget: {fault}", file=sys.stderr)
    return int(bool(over))


def main() -> int:
    if sys.argv[1:2] == ["launch"]:
        return launch(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["report"])
    parser.add_argument("log", type=Path)
    parser.add_argument("--total", type=float, default=float("inf"))
    parser.add_argument("--unit", type=float, default=float("inf"))
    parser.add_argument("--top", type=int, default=15)
    options = parser.parse_args()
    costs = read(options.log) if options.log.exists() else {}
    if not costs:
        parser.error(f"{options.log} has no line: was anything compiled?")
    return report(costs, options.total, options.unit, options.top)


if __name__ == "__main__":
    sys.exit(main())
