# SPDX-License-Identifier: Apache-2.0
"""Validation that the operators over neighbourhoods share. Nothing is allocated here."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._errors import describe, fail

Pair = tuple[int, int]

_REMEDY = "Pass one odd number, or a pair of them: (1, K) is a neighbourhood along the rows."


def require_kernel(op: str, name: str, size: object) -> Pair:
    """(Ky, Kx): odd numbers, one for both or a pair."""
    pair = (size, size) if isinstance(size, (int, torch.SymInt)) else size
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        got = describe(size) if isinstance(size, Tensor) else repr(size)
        fail(TypeError, op, name, got, "an odd integer or a pair of them", _REMEDY)
    for k in pair:
        if not isinstance(k, (int, torch.SymInt)) or isinstance(k, bool):
            fail(TypeError, op, name, repr(size), "an odd integer or a pair of them", _REMEDY)
        if k < 1 or k % 2 == 0:
            fail(ValueError, op, name, size, "odd numbers of at least 1", _REMEDY)
    return pair[0], pair[1]


def as_option(size: object) -> object:
    """A kernel size as the key of a call that comes again takes it."""
    return tuple(size) if isinstance(size, list) else size


def require_window_fits(op: str, name: str, kernel: Pair, v: Tensor) -> None:
    """An image with tokens is at least as large as its windows, each way."""
    for axis, k, size in zip("YX", kernel, v.shape[1:3], strict=True):
        if size and size < k:
            fail(
                ValueError,
                op,
                name,
                f"{k} along {axis}, where v has {size} tokens",
                f"at most the image, {list(v.shape[1:3])}",
                "Use a smaller window, or enlarge the image and average its result back, as "
                "hw.nn.ContMix does.",
            )
