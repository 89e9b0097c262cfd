# SPDX-License-Identifier: Apache-2.0
"""The small cases of one specification on every backend, for compute-sanitizer.

    compute-sanitizer --tool memcheck python -m gpu_day.sanitize attention LINES.jsonl

The oracle is computed on the CPU, so that the sanitizer sees our kernels and little else. A case
that fails does not end the run.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from gpu_day.target import KERNELS, target
from headworks.testing import check_case


def cases(spec: Any) -> list[tuple[Any, str, torch.dtype]]:
    """(case, backend, dtype): the emulator's cases that a backend takes, in one dtype each; turn by
    turn, so that every backend has had its first ones when time runs out."""
    here, lists = target(), []
    for kernel in KERNELS:
        dtypes, backend = spec.dtypes.get(kernel, ()), here.backend(kernel)
        if not dtypes:
            continue
        dtype = torch.float32 if torch.float32 in dtypes else dtypes[0]
        able = [case for case in spec.emulator_cases if not spec.limit(backend, case)]
        lists.append([(case, backend, dtype) for case in able[: here.most]])
    longest = max(map(len, lists), default=0)
    return [one[i] for i in range(longest) for one in lists if i < len(one)]


def main() -> int:
    """Runs the cases; 1 if any failed or none was there."""
    name, lines = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    spec = next(s for s in importlib.import_module("specs").SPECS if s.name == name)
    failed, chosen = 0, cases(spec)
    with lines.open("a") as file:
        for case, backend, dtype in chosen:
            start, message = time.monotonic(), ""
            try:
                check_case(spec, case, backend, dtype, device=target().device, oracle_device="cpu")
            except Exception as error:
                message = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
                failed += 1
            line = {"spec": name, "backend": backend, "case": case.name, "message": message}
            line |= {"outcome": "failed" if message else "ok"}
            line |= {"seconds": round(time.monotonic() - start, 2)}
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(*line.values(), flush=True)
    return 1 if failed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
