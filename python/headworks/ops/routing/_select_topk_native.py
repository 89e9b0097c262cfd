# SPDX-License-Identifier: Apache-2.0
"""The native call of hw.select_topk."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._native import NativeCall, define, route, run
from .._operands import check_operands, operands, require


def select_topk(score: Tensor, k: int, keep_order: bool, backend: str) -> Tensor:
    """score [..., N] of any strides -> int64 [..., k], 0 <= k <= N. The order is that of
    headworks.reference.select_topk."""
    shape = (*score.shape[:-1], k)
    rows = _rows(score)
    call = select_rows if route("select_topk", (score,)) == "direct" else _select_operator
    return call(rows, k, keep_order, backend).reshape(shape)


def _rows(score: Tensor) -> Tensor:
    """[R, N]"""
    return score.reshape(math.prod(score.shape[:-1]), score.shape[-1])


def select_rows(score: Tensor, k: int, keep_order: bool, backend: str) -> Tensor:
    """score [R, N] -> int64 [R, k]: select_topk.forward."""
    index = _select_fake(score, k, keep_order, backend)
    if index.numel():
        run("select_topk.forward", backend, [score, index], (keep_order,))
    return index


def _select_fake(score: Tensor, k: int, keep_order: bool, backend: str) -> Tensor:
    return score.new_empty((score.shape[0], k), dtype=torch.int64)


_OPERANDS = operands(score="input R N")


def _select(score: Tensor, k: int, keep_order: bool, backend: str) -> Tensor:
    sizes = check_operands("select_topk", _OPERANDS, (score,))
    require("select_topk", "k", k, 0 <= k <= sizes["N"], "a number from 0 to N")
    return select_rows(score, k, keep_order, backend)


define(
    "select_topk(Tensor score, SymInt k, bool keep_order, str backend) -> Tensor",
    _select,
    _select_fake,
)
_select_operator = torch.ops.headworks.select_topk.default


def select_topk_call(score: Tensor, k: int, keep_order: bool, backend: str) -> NativeCall:
    """The call that `select_topk` makes, for hw.explain."""
    rows = _rows(score)
    index = _select_fake(rows, k, keep_order, backend)
    return "select_topk.forward", backend, [rows, index, None], (keep_order,)
