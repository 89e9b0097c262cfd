# SPDX-License-Identifier: Apache-2.0
"""Costs of the operators of windows; the formulas are told in headworks/cost.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ._cost_parts import Cost, check_sizes, element_size


def cascaded_group_attention(
    *,
    Y: int,
    X: int,
    H: int,
    d: int,
    K: int = 16,
    B: int = 1,
    window: int | None = None,
    kernels: Sequence[int] = (5,),
    dtype: Any = "float32",
) -> Cost:
    """`kernels` of the heads; the last one of all that follow."""
    check_sizes(B=B, Y=Y, X=X, H=H, d=d, K=K)
    height, width, side, of_window = Y, X, max(Y, X), Y * X
    if window is not None and (window < Y or window < X):
        height, width = -(-Y // window) * window, -(-X // window) * window
        side, of_window = window, window**2
    tokens = B * height * width
    channels = H * d
    taps = sum(kernels[min(i, len(kernels) - 1)] ** 2 for i in range(H))
    flops = 2 * (H * (d * (2 * K + d) + of_window * (K + d)) + taps * K + channels**2)
    weights = H * (d + 1) * (2 * K + d) + (taps + H) * K + H * side**2 + (channels + 1) * channels
    moved = element_size(dtype) * (2 * B * Y * X * channels + weights)
    return Cost(tokens * flops, moved, 1, tokens * H * of_window)
