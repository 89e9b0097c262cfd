# SPDX-License-Identifier: Apache-2.0
"""The native call of hw.select_topk."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..._functions import NativeFunction
from ..._native import NativeCall, define, described, route
from ..._repeated import Ready
from .._operands import check_operands, require

FORWARD = NativeFunction("select_topk.forward")


def select_topk(score: Tensor, k: int, keep_order: bool, backend: str) -> Tensor:
    """score [..., N] of any strides -> int64 [..., k], 0 <= k <= N. The order is that of
    headworks.reference.select_topk."""
    shape = (*score.shape[:-1], k)
    rows = _rows(score)
    if route("select_topk", (score,)) == "direct":
        return select_rows(rows, k, keep_order, backend).reshape(shape)
    index: Tensor = _select_operator(rows, keep_order, k, backend)
    return index.reshape(shape)


def _rows(score: Tensor) -> Tensor:
    """[R, N]"""
    return score.reshape(math.prod(score.shape[:-1]), score.shape[-1])


def select_rows(score: Tensor, k: int, keep_order: bool, backend: str) -> Tensor:
    """score [R, N] -> int64 [R, k]: select_topk.forward."""
    index = _unfilled(score, k)
    if index.numel():
        FORWARD.run(backend, (score,), (index,), (keep_order,))
    return index


def select_prepared(
    score: Tensor, k: int, keep_order: bool, backend: str
) -> Callable[[Tensor], Tensor] | None:
    """`select_topk` as a function of another score like this; None for one that is empty."""
    rows, shape = _rows(score), (*score.shape[:-1], k)
    call = ready_rows(rows, k, keep_order, backend)
    if call is None or score.dim() == 2:
        return call
    sizes = rows.shape
    return lambda score: call(score.reshape(sizes)).view(shape)


def ready_rows(score: Tensor, k: int, keep_order: bool, backend: str) -> Ready | None:
    """`select_rows` of other scores like these."""
    index = _unfilled(score, k)
    if not index.numel():
        return None
    return Ready(FORWARD, backend, (score,), (index,), (keep_order,), (score,))


def _unfilled(score: Tensor, k: int) -> Tensor:
    return score.new_empty((score.shape[0], k), dtype=torch.int64)


def _select(score: Tensor, keep_order: bool, k: int, backend: str) -> Tensor:
    sizes = check_operands("select_topk", FORWARD.inputs, (score,))
    require("select_topk", "k", k, 0 <= k <= sizes["N"], "a number from 0 to N")
    return select_rows(score, k, keep_order, backend)


def _select_fake(score: Tensor, keep_order: bool, k: int, backend: str) -> Tensor:
    return _unfilled(score, k)


define(FORWARD.schema("select_topk", "SymInt k"), _select, _select_fake)
_select_operator = torch.ops.headworks.select_topk.default


def select_topk_call(score: Tensor, k: int, keep_order: bool, backend: str) -> NativeCall:
    """The call that `select_topk` makes, for hw.explain."""
    rows = _rows(score)
    return described(FORWARD, backend, (rows,), (_unfilled(rows, k),), (keep_order,))
