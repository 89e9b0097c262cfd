# SPDX-License-Identifier: Apache-2.0
"""headworks.cost of the operators over windows of an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ._cost import Cost, check_sizes, element_size

Kernel = int | tuple[int, int]


def na2d_av(
    *,
    Y: int,
    X: int,
    H: int,
    D: int,
    kernel_size: Kernel,
    B: int = 1,
    dtype: Any = "float32",
    backward: bool = False,
) -> Cost:
    """T weights of a token and head are read, or their gradients written."""
    taps = _taps(kernel_size)
    check_sizes(B=B, Y=Y, X=X, H=H, D=D, kernel_size=taps)
    e, rows = element_size(dtype), B * Y * X * H
    if backward:
        return Cost(4 * taps * D * rows, e * (2 * taps + 3 * D) * rows, 1)
    return Cost(2 * taps * D * rows, e * (taps + 2 * D) * rows, 1)


def contmix(
    *,
    Y: int,
    X: int,
    G: int,
    A: int,
    D: int,
    kernel_size: Kernel,
    small_kernel_size: Kernel,
    B: int = 1,
    dtype: Any = "float32",
    backward: bool = False,
) -> Cost:
    """The weights of a token and group are made of its A affinities, and never leave the chip."""
    taps = _taps(kernel_size) + _taps(small_kernel_size)
    check_sizes(B=B, Y=Y, X=X, G=G, A=A, D=D, kernel_size=taps)
    e, rows = element_size(dtype), B * Y * X * G
    once = taps * (A + 1) + G * (_offsets(kernel_size) + _offsets(small_kernel_size))
    if backward:
        flops = (6 * A + 4 * D) * taps * rows
        return Cost(flops, e * ((2 * A + 6 * D) * rows + 2 * once), 1, taps * rows)
    return Cost((2 * A + 2 * D) * taps * rows, e * ((A + 4 * D) * rows + once), 1, taps * rows)


def _pair(kernel_size: Kernel) -> tuple[int, int]:
    return (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size


def _taps(kernel_size: Kernel) -> int:
    height, width = _pair(kernel_size)
    return height * width


def _offsets(kernel_size: Kernel) -> int:
    height, width = _pair(kernel_size)
    return (2 * height - 1) * (2 * width - 1)


def window_attention(
    *,
    Y: int,
    X: int,
    H: int,
    D: int,
    window: int | tuple[int, int],
    B: int = 1,
    Dv: int | None = None,
    Hkv: int | None = None,
    bias_table: bool = True,
    dtype: Any = "float32",
    backward: bool = False,
) -> Cost:
    """A window that the image cuts has the tokens that there are: with n whole ones along a side
    and r tokens over, n w^2 + r^2 pairs of places along it."""
    height, width = (window, window) if isinstance(window, int) else window
    dv, heads = D if Dv is None else Dv, H if Hkv is None else Hkv
    check_sizes(B=B, Y=Y, X=X, H=H, Hkv=heads, D=D, Dv=dv)
    if height < 1 or width < 1:
        raise ValueError(f"cost: window is {window}, expected sizes >= 1")
    e = element_size(dtype)
    a = max(e, 4)
    along = [n // w * w * w + (n % w) ** 2 for n, w in ((Y, height), (X, width))]
    pairs = B * H * along[0] * along[1]
    moved = B * e * Y * X * (H + heads) * (D + dv)
    table = H * height * width if bias_table else 0
    if backward:
        lse = B * Y * X * H * a
        return Cost(2 * (3 * D + 2 * dv) * pairs, 2 * moved + lse + (e + a) * table, 2, pairs)
    return Cost(2 * (D + dv) * pairs, moved + e * table, 1, pairs)


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
