# SPDX-License-Identifier: Apache-2.0
"""The native calls of the routing operators: one function each, of validated arguments.

A function here gets what it says below and nothing else: tensors of one device, inputs of one
dtype, indices int64, numbers resolved; it returns what headworks.reference returns for the same
arguments, with gradients where the public function documents them. Where no build has a kernel yet,
the call is refused in the words of the dispatcher.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from .._native import NativeCall, as_written, define, route, run
from ..reference.attention import Statistics
from ..reference.bilevel_routing import Grid, region_scores
from ._attention_score import Score


def _refuse(op: str, backend: str) -> NoReturn:
    who = "no backend can" if backend == "auto" else f"backend '{backend}' cannot"
    what = "native" if backend == "auto" else backend
    raise NotImplementedError(
        f"{op}.forward: {who} take this call: this build has no {what} code for {op}. "
        'Use backend="reference".'
    )


def select_topk(score: Tensor, k: int, keep_order: bool, backend: str) -> Tensor:
    """score [..., N] of any strides -> int64 [..., k], 0 <= k <= N. The order is that of
    headworks.reference.select_topk."""
    shape = (*score.shape[:-1], k)
    rows = _rows(score)
    call = select_rows if route("select_topk", (score,)) == "direct" else _select_operator
    return call(rows, k, keep_order, backend).reshape(shape)


def _rows(score: Tensor) -> Tensor:
    """[R, N]"""
    return score.reshape(score.shape[:-1].numel(), score.shape[-1])


def select_rows(score: Tensor, k: int, keep_order: bool, backend: str) -> Tensor:
    """score [R, N] -> int64 [R, k]: select_topk.forward."""
    index = _select_fake(score, k, keep_order, backend)
    if index.numel():
        run("select_topk.forward", backend, [score, index], (keep_order,))
    return index


def _select_fake(score: Tensor, k: int, keep_order: bool, backend: str) -> Tensor:
    return score.new_empty((score.shape[0], k), dtype=torch.int64)


define(
    "select_topk(Tensor score, SymInt k, bool keep_order, str backend) -> Tensor",
    select_rows,
    _select_fake,
)
_select_operator = torch.ops.headworks.select_topk.default


def select_topk_call(score: Tensor, k: int, keep_order: bool, backend: str) -> NativeCall:
    """The call that `select_topk` makes, for hw.explain."""
    rows = _rows(score)
    index = _select_fake(rows, k, keep_order, backend)
    return "select_topk.forward", backend, [rows, index, None], (keep_order,)


def bilevel_route(
    q: Tensor, k: Tensor, own: Grid, other: Grid, topk: int, per_head: bool, backend: str
) -> Tensor:
    """q [B, Y, X, Hq, D], k [B, Yk, Xk, H, D] -> int64 [B, R, topk] or [B, Hq, R, topk].

    `own` cuts the image of q into R regions, `other` that of k into Rk; 1 <= topk <= Rk. Means and
    their products are torch's; the selection is ours.
    """
    with as_written(q):
        scores = region_scores(q, k, own, other, per_head)
    return select_topk(scores, topk, False, backend)


def bilevel_routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    graph: Tensor,
    own: Grid,
    other: Grid,
    scale: float,
    mask_padding: bool,
    statistics: bool,
    backend: str,
) -> tuple[Tensor, Statistics | None]:
    """q [B, Y, X, Hq, D], k [B, Yk, Xk, H, D], v [B, Yk, Xk, H, Dv], graph [B, Hq|1, R, topk].

    -> o [B, Y, X, Hq, Dv] and, if asked for, the statistics [B, Hq, Y, X] in the accumulation
    dtype. Gradients to q, k, v from o and from the lse. A region that a list names twice counts
    twice; a list may be empty (topk = 0: o = 0, lse = -inf). Out of range (unchecked on a GPU):
    nothing may be read outside the tensors; the result is unspecified.
    """
    _refuse("bilevel_routing_attention", backend)


def kmeans_routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    is_causal: bool,
    mask_self: bool,
    scale: float,
    mean_eps: float,
    backend: str,
) -> Tensor:
    """q [B, Sq, Hq, D], k [B, Sk, H, D], v [B, Sk, H, Dv], q_index [B, Hq, K, Wq], k_index
    [B, Hq, K, Wk] -> o [B, Sq, Hq, Dv]. Gradients to q, k, v.

    k_index is q_index itself where the caller gave none. Lists are in any order, tokens may repeat
    in a list; a slot outside [0, S) is empty, as a query and as a key.
    """
    _refuse("kmeans_routing_attention", backend)


def moh_attention(score: Score, v: Tensor, gate: Tensor, backend: str) -> Tensor:
    """A Score without packed sequences and with the softmax activation, v [B, Sk, H, Dv], gate
    [B, Sq, Hq] in the accumulation dtype -> o [B, Sq, Hq, Dv]. Gradients to the tensors of the
    score, v and gate; that of a gate of 0 is 0."""
    _refuse("moh_attention", backend)
