# SPDX-License-Identifier: Apache-2.0
"""What a cost is, and what the formulas of headworks/cost.py share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_SIZES = {
    "float64": 8,
    "fp64": 8,
    "float32": 4,
    "fp32": 4,
    "bfloat16": 2,
    "bf16": 2,
    "float16": 2,
    "fp16": 2,
}


@dataclass(frozen=True)
class Cost:
    """Work and traffic of one call.

    Attributes:
        flops: multiplications and additions.
        bytes: every input read once, every output written once.
        passes: traversals of the sequence that the algorithm cannot avoid (FuseMax's count).
        exponentials: of a softmax, one per pair in each pass that needs the weights.
    """

    flops: int
    bytes: int
    passes: int
    exponentials: int = 0

    @property
    def intensity(self) -> float:
        """FLOPs per byte; compare with the machine's ratio to see which roof binds."""
        return self.flops / self.bytes if self.bytes else 0.0

    def seconds(self, flop_rate: float, bandwidth: float) -> float:
        """The roofline: no faster than arithmetic at `flop_rate` and memory at `bandwidth`."""
        return max(self.flops / flop_rate, self.bytes / bandwidth)

    def __add__(self, other: Cost) -> Cost:
        """Cost of one call after the other."""
        return Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.passes + other.passes,
            self.exponentials + other.exponentials,
        )


def element_size(dtype: Any) -> int:
    name = str(dtype).removeprefix("torch.")
    if name not in _SIZES:
        raise ValueError(f"cost: dtype is {dtype!r}, expected one of {sorted(_SIZES)}")
    return _SIZES[name]


def check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 0:
            raise ValueError(f"cost: {name} is {value}, expected a size >= 0")
