# SPDX-License-Identifier: Apache-2.0
"""The whole day by the table in README.md: `ci/gpu.sh [--dry-run] OUTDIR`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

from gpu_day import steps
from gpu_day.day import STAGES, Day
from gpu_day.prepared import Prepared, emulated
from gpu_day.target import TARGETS


def main() -> int:
    """0 if every step was fine, 1 if not, 2 if there is nothing to run."""
    parser = argparse.ArgumentParser(prog="ci/gpu.sh", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUTDIR")
    parser.add_argument("--dry-run", action="store_true", help="the emulator in place of the GPU")
    parser.add_argument("--seconds", type=float, default=560.0, help="all of it, at most")
    parser.add_argument("--only", default="", metavar="STAGE,...", help="of those in the table")
    arguments = parser.parse_args()
    only = tuple(filter(None, arguments.only.split(",")))
    if unknown := set(only) - set(STAGES):
        parser.error(f"--only has {', '.join(sorted(unknown))}; the stages are {', '.join(STAGES)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    target = TARGETS["emulator" if arguments.dry_run else "cuda"]
    with tempfile.TemporaryDirectory(prefix="gpu_day_", ignore_cleanup_errors=True) as work:
        try:
            prepared = emulated(Path(work)) if arguments.dry_run else Prepared.found()
        except FileNotFoundError as error:
            print(f"gpu_day: {error}", file=sys.stderr)
            return 2
        # A machine that takes back its time says so by TERM: what there is comes home then too.
        signal.signal(signal.SIGTERM, lambda *_: steps.stop())
        day = Day(target, prepared, Path(work), arguments.out.resolve(), arguments.seconds)
        try:
            day.run(only or STAGES)
        finally:
            day.bring_home()
        print((arguments.out / "summary.txt").read_text(), end="")
        sys.stdout.flush()
    return 0 if day.fine else 1


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
