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
CUDA_BACKENDS = ("simt", "sm80", "sm90")


def small_cases(spec: Spec, backend: str) -> tuple[torch.dtype, list[Case]]:
    """One dtype and the emulator's cases that the backend takes."""
    dtypes = spec.dtypes[backend]
    dtype = torch.float32 if torch.float32 in dtypes else dtypes[0]
    return dtype, [case for case in spec.emulator_cases if not spec.limit(backend, case)]


def main() -> int:
    """Runs the cases; the exit status."""
    sys.path.insert(0, str(ROOT / "tests"))
    specs = importlib.import_module("specs").SPECS
    for spec in (s for s in specs if s.name in sys.argv[1:] or len(sys.argv) == 1):
        for backend in (b for b in CUDA_BACKENDS if b in spec.dtypes):
            dtype, cases = small_cases(spec, backend)
            for case in cases:
                check_case(spec, case, backend, dtype, device="cuda")
            print(f"{spec} {backend} {dtype}: {len(cases)} cases", flush=True)
    if comparisons() == 0:
        print("gpu_cases: nothing was compared", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
