# SPDX-License-Identifier: Apache-2.0
"""Validation of window attention. Nothing is allocated here."""

from __future__ import annotations

from torch import Tensor

from ..._errors import describe, fail, require_dense, require_same_device
from .._checks import is_integer

Window = int | tuple[int, int]
MOST = 2**15 - 1  # tokens along a side; a window of them has fewer than 2**31


def check_window(op: str, window: object) -> tuple[int, int]:
    """(height, width)"""
    sides = (window, window) if is_integer(window) else window
    if (
        not isinstance(sides, (tuple, list))
        or len(sides) != 2
        or not all(is_integer(n) for n in sides)
    ):
        got = describe(window) if isinstance(window, Tensor) else repr(window)
        fail(
            TypeError,
            op,
            "window",
            got,
            "an integer, or (height, width)",
            "Windows of 7 x 7 tokens are window=7.",
        )
    height, width = sides
    if not (1 <= height <= MOST and 1 <= width <= MOST):
        fail(
            ValueError,
            op,
            "window",
            tuple(sides),
            f"sizes from 1 to {MOST}",
            "A window has tokens; it may be larger than the image.",
        )
    return height, width


def check_bias_table(op: str, table: object, window: tuple[int, int], q: Tensor) -> Tensor:
    """[Hq, height width] in the dtype of q."""
    height, width = window
    if not isinstance(table, Tensor) or not table.is_floating_point():
        fail(
            TypeError,
            op,
            "bias_table",
            describe(table),
            "a tensor [Hq, height * width] of floating-point numbers",
            "Its columns are the distances |dy| * width + |dx| inside a window.",
        )
    require_dense(op, "bias_table", table)
    expected = (q.shape[3], height * width)
    if table.shape != expected:
        fail(
            ValueError,
            op,
            "bias_table",
            f"of shape {list(table.shape)}",
            f"{list(expected)}: heads of q, distances in a window of {height} x {width}",
            "A table of another window belongs to other distances; interpolate or train it anew.",
        )
    require_same_device(op, "q", q, bias_table=table)
    return table if table.dtype is q.dtype else table.to(q.dtype)
