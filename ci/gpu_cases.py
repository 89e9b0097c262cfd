#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The emulator's small cases on a real GPU, every CUDA backend: made for compute-sanitizer.

Usage: compute-sanitizer --tool memcheck ci/gpu_cases.py [OPERATOR...]
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch

from headworks.testing import Case, Spec, check_case, comparisons

ROOT = Path(__file__).resolve().parents[1]
BACKENDS = ("simt", "sm80", "sm90")
DTYPES = (torch.float32, torch.bfloat16)


def _run(spec: Spec, case: Case, backend: str, dtype: torch.dtype) -> bool:
    """Whether the backend can take the case; a wrong result raises."""
    try:
        check_case(spec, case, backend, dtype, device="cuda")
    except NotImplementedError:
        return False
    return True


def main() -> int:
    """Runs the cases; the exit status."""
    sys.path.insert(0, str(ROOT / "tests"))
    specs = importlib.import_module("specs").SPECS
    for spec in (s for s in specs if s.name in sys.argv[1:] or len(sys.argv) == 1):
        for backend in (b for b in BACKENDS if b in spec.backends):
            for dtype in DTYPES:
                done = sum(_run(spec, case, backend, dtype) for case in spec.emulator_cases)
                print(f"{spec} {backend} {dtype}: {done} of {len(spec.emulator_cases)} cases")
    if comparisons() == 0:
        print("gpu_cases: nothing was compared", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
