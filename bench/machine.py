# SPDX-License-Identifier: Apache-2.0
"""What a result was measured on: the machine in words, and the yardsticks of its roofs."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from typing import Any

import torch

from bench import peak
from bench.timing import Call, interleave
from headworks._build_info import build_info

GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
COPY_BYTES = 1 << 30  # on a GPU

# What a result may be bounded by, and in which unit its rate is given.
ROOFS = {
    "peak": "multiplications and additions of the processor, from registers, in the case's dtype",
    "gemm": "multiplications and additions of torch's matrix product",
    "exp": "exponentials, from registers",
    "copy": "bytes read and written by a copy beyond the caches",
}


@dataclass(frozen=True)
class Yardstick:
    """A call that is timed with the contenders, and what it does: its rate is a roof."""

    call: Call
    work: float


def yardsticks(device: str, dtype: str) -> dict[str, Yardstick]:
    """The roofs of operators on a dtype ("float32"), to be timed in the rounds of a case.

    On the CPU the processor's own rates; without a compiler, and on a GPU (in bf16), torch's matrix
    product and copy take their place.
    """
    if device == "cpu" and peak.peak().missing is None:
        own = peak.peak()
        source = torch.zeros(peak.copy_bytes(), dtype=torch.uint8)
        arithmetic, exponentials = own.kinds_of(dtype)
        return {
            "peak": Yardstick(own.call(arithmetic), own.work(arithmetic)),
            "exp": Yardstick(own.call(exponentials), own.work(exponentials)),
            "copy": Yardstick(own.copy(torch.zeros_like(source), source), 2 * source.numel()),
        }
    n, size = GEMM_SIZE[device], COPY_BYTES if device == "cuda" else peak.copy_bytes()
    of_product = torch.float32 if device == "cpu" else torch.bfloat16
    a, b, c = (torch.randn(n, n, device=device).to(of_product) for _ in range(3))
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return {
        "gemm": Yardstick(lambda: torch.mm(a, b, out=c), 2 * n**3),
        "copy": Yardstick(lambda: target.copy_(source), 2 * size),
    }


def roofs(device: str) -> dict[str, Any]:
    """What the machine can do, measured by itself: the rates by roof and dtype, and how."""
    if device == "cpu" and peak.peak().missing is not None:
        return {"how": f"torch's matrix product, for lack of a compiler: {peak.peak().missing}"}
    if device != "cpu":
        return {"how": "torch's matrix product and copy in bf16"}
    rates: dict[str, Any] = {"how": f"bench/peak.cpp, {' '.join(peak.FLAGS[:3])}"}
    for dtype in ("float32", "float64", "bfloat16"):
        rulers = yardsticks(device, dtype)
        times = interleave({n: y.call for n, y in rulers.items()}, budget=0.3, rounds=(5, 20))
        rates[dtype] = {n: rulers[n].work / t.low for n, t in times.items()}
    return rates


def describe(device: str) -> dict[str, Any]:
    """Processor, memory, device, library versions and threads, for the head of a result file."""
    facts: dict[str, Any] = {
        "processor": peak.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "headworks": build_info(),
        "device": device,
        "roofs": roofs(device),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = properties.name
        facts["capability"] = f"{properties.major}.{properties.minor}"
        facts["cuda"] = torch.version.cuda
    return facts
