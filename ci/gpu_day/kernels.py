# SPDX-License-Identifier: Apache-2.0
"""The kernels that matter most, one call of each between start and stop of the profiler.

ncu --profile-from-start off --kernel-name regex:... python -m gpu_day.kernels
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch

import headworks as hw
from gpu_day.target import target

Call = Callable[[], Any]


def calls(device: str) -> dict[str, Call]:
    """What is profiled; on a CPU the same with next to nothing to compute."""
    large = device == "cuda"
    dtype = torch.bfloat16

    def draw(*size: int, grad: bool = False) -> torch.Tensor:
        return torch.randn(size, device=device).to(dtype).requires_grad_(grad)

    s = 8192 if large else 40
    q, k, v = (draw(1, s, 16 if large else 1, 128, grad=True) for _ in range(3))
    lq, lk = (draw(16 if large else 1, s, 16 if large else 1, 16) for _ in range(2))
    lv = draw(16 if large else 1, s, 16 if large else 1, 64)
    side, batch = (28, 128) if large else (14, 1)
    image = [draw(batch, side, side, 4 if large else 1, 32) for _ in range(3)]
    backend = "auto" if large else "emulate:sm80"

    def train() -> None:
        o = hw.attention(q, k, v, is_causal=True, backend=backend)
        torch.autograd.grad(o, (q, k, v), torch.ones_like(o))

    return {
        "attention": train,
        "linear_attention": lambda: hw.linear_attention(lq, lk, lv, backend=backend),
        "bilevel_routing_attention": lambda: hw.bilevel_routing_attention(
            *image, num_regions=(7, 7), topk=4, backend=backend
        ),
    }


def main() -> int:
    """Makes each call twice, the second time for the profiler; 1 if one raised."""
    device = target().device
    start, stop = (
        (torch.cuda.profiler.start, torch.cuda.profiler.stop)
        if device == "cuda"
        else (lambda: None, lambda: None)
    )
    failed = 0
    for name, call in calls(device).items():
        try:
            call()
            start()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            stop()
            print(f"{name}: profiled", flush=True)
        except Exception:
            traceback.print_exc()
            failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
