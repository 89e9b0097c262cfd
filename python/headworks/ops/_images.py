# SPDX-License-Identifier: Apache-2.0
"""Validation of images [B, Y, X, H, D] that several operators share. Nothing is allocated here."""

from __future__ import annotations

from torch import Tensor

from .._errors import (
    fail,
    require_one_dtype,
    require_rank,
    require_same_device,
    require_sizes,
    require_tensors,
)
from .._native import ACCUMULATION
from ._checks import heads_match

IMAGE = "[B, Y, X, H, D]"


def check_images(op: str, q: Tensor, k: Tensor) -> None:
    """q [B, Y, X, Hq, D] and k [B, Yk, Xk, H, D] belong together."""
    require_tensors(op, q=q, k=k)
    require_rank(op, 5, IMAGE, q=q, k=k)
    require_one_dtype(op, ACCUMULATION, q=q, k=k)
    require_same_device(op, "q", q, k=k)
    batch, _, _, heads, d = q.shape
    if d == 0:
        fail(ValueError, op, "the head dimension D of q", 0, "at least 1", "Check the last axis.")
    require_sizes(op, "[B, Yk, Xk, Hkv, D]", "k", k, (batch, *k.shape[1:4], d))
    if not heads_match(heads, k.shape[3]):
        fail(
            ValueError,
            op,
            "the number of heads of q",
            heads,
            f"a positive multiple of k's {k.shape[3]}",
            "Each key head serves Hq / Hkv query heads.",
        )


def check_image_values(op: str, v: Tensor, k: Tensor) -> None:
    """v [B, Yk, Xk, H, any] belongs to k."""
    require_tensors(op, v=v)
    require_rank(op, 5, "[B, Yk, Xk, Hkv, Dv]", v=v)
    require_one_dtype(op, ACCUMULATION, k=k, v=v)
    require_same_device(op, "k", k, v=v)
    require_sizes(op, "[B, Yk, Xk, Hkv, Dv]", "v", v, (*k.shape[:4], v.shape[4]))
