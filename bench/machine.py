# SPDX-License-Identifier: Apache-2.0
"""What a result was measured on: the machine in words, and the yardsticks of its two ceilings."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.timing import Call, Times
from headworks._build_info import build_info

GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
COPY_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}


@dataclass(frozen=True)
class Ceiling:
    """The machine's roofs: FLOP/s of torch's matrix product, bytes/s of a copy (read + written)."""

    gemm: float
    copy: float


def yardsticks(device: str) -> dict[str, Call]:
    """A matrix product (sgemm on the CPU, bf16 on a GPU) and a copy, to be timed with the rest."""
    n = GEMM_SIZE[device]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    a, b, c = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))
    source = torch.zeros(COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return {"gemm": lambda: torch.mm(a, b, out=c), "copy": lambda: target.copy_(source)}


def ceiling(device: str, seconds: Mapping[str, Times]) -> Ceiling:
    """The rates that the times of the yardsticks mean."""
    return Ceiling(
        gemm=2 * GEMM_SIZE[device] ** 3 / seconds["gemm"].median,
        copy=2 * COPY_BYTES[device] / seconds["copy"].median,
    )


def describe(device: str) -> dict[str, Any]:
    """Processor, memory, device, library versions and threads, for the head of a result file."""
    facts: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "headworks": build_info(),
        "device": device,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = properties.name
        facts["capability"] = f"{properties.major}.{properties.minor}"
        facts["cuda"] = torch.version.cuda
    return facts


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
