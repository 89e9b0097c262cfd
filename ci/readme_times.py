#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What README's command took, step by step, from the trace that ci/readme.sh leaves.

    print TRACE     the seconds of every step
    record TRACE    the same into bench/results/install_cpu.json, and the sentence into README.md
    check           README's sentence is that of the file

Usage: readme_times.py print|record|check [TRACE]
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench" / "results" / "install_cpu.json"
README = ROOT / "README.md"
SENTENCE = re.compile(r"It took .*? for the demo\.", re.DOTALL)


def steps(trace: str) -> dict[str, float]:
    """Seconds by command, from lines "+<TAB>time<TAB>command"; the last of them ends the others."""
    rows = [line.split("\t") for line in trace.splitlines() if line.startswith("+\t")]
    times = [float(row[1]) for row in rows]
    return {
        row[2]: round(end - start, 1)
        for row, start, end in zip(rows, times, times[1:], strict=False)
    }


def machine() -> dict[str, object]:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*: (.*)$", text, re.M)
    return {
        "processor": model[1] if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def sentence(data: dict[str, Any]) -> str:
    """README's words on what was measured: whole seconds, which add up."""
    seconds = data["seconds"]
    install = sum(s for c, s in seconds.items() if re.match(r"pip install '?\.\[", c))
    demo = sum(s for c, s in seconds.items() if c.startswith("headworks demo"))
    torch = round(sum(seconds.values()) - install - demo)
    install, demo = round(install), round(demo)
    return (
        f"It took {torch + install + demo} seconds on {data['machine']['cores']} cores: "
        f"{torch} for torch, {install} to install, {demo} for the demo."
    )


def check() -> int:
    """1 unless README says what the file says; nothing was measured where both are silent."""
    said = SENTENCE.search(" ".join(README.read_text().split()))
    right = sentence(json.loads(RESULT.read_text())) if RESULT.exists() else None
    if (said[0] if said else None) == right:
        return 0
    print(f"readme_times: README says '{said and said[0]}', {RESULT.name} '{right}'")
    return 1


def record(seconds: dict[str, float]) -> None:
    data = {"machine": machine(), "seconds": seconds}
    RESULT.write_text(json.dumps(data, indent=1) + "\n")
    text = README.read_text()
    if not SENTENCE.search(text):
        sys.exit("readme_times: README.md has no sentence 'It took ... seconds ...' to renew")
    README.write_text(SENTENCE.sub(lambda _: sentence(data), text, count=1))


def main() -> int:
    if sys.argv[1:] == ["check"]:
        return check()
    if len(sys.argv) != 3 or sys.argv[1] not in ("print", "record"):
        sys.exit(__doc__)
    seconds = steps(Path(sys.argv[2]).read_text())
    for command, taken in seconds.items():
        print(f"{taken:>8.1f} s  {command}")
    if sys.argv[1] == "record":
        record(seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
