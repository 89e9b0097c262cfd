# SPDX-License-Identifier: Apache-2.0
"""Routed attention as attention by lists: one function per operator, of validated arguments.

A function here gets what it says below and nothing else: tensors of one device, inputs of one
dtype, indices int64, numbers resolved; it returns what headworks.reference returns for the same
arguments, with gradients where the public function documents them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._native import Maybe, NativeCall, widen, without_products
from ..attention._native import Want
from ..attention._score import Score
from ._grid import Grid
from ._moh_route_native import chosen_rows, ready_rows, unfilled_rows
from ._routing_attention import NO_READ_OUTS, attend
from ._routing_attention_native import (
    Routing,
    forward_call,
    image_grid,
    ready,
    sequence_grid,
)


def bilevel_routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    graph: Tensor,
    own: Grid,
    other: Grid,
    scale: float,
    mask_padding: bool,
    read_outs: tuple[bool, bool, bool, bool],
    backend: str,
) -> tuple[Maybe, ...]:
    """q [B, Y, X, Hq, D], k [B, Yk, Xk, H, D], v [B, Yk, Xk, H, Dv], graph [B, Hq|1, R, topk].

    -> o [B, Y, X, Hq, Dv] and what is asked for of lse, entropy, p_max, sq_norm [B, Hq, Y, X] in
    the accumulation dtype. Gradients to q, k, v from o and from the lse. A region that a list names
    twice counts twice; a list may be empty (topk = 0: o = 0, lse = -inf). Out of range (unchecked
    on a GPU): nothing is read outside the tensors, such a region is not there.
    """
    arguments = _bilevel_arguments(q, k, v, graph, own, other, scale, mask_padding)
    o, *rest = attend("bilevel_routing_attention", *arguments, read_outs, backend)
    assert o is not None
    image = q.shape[1:3]
    made = [None if x is None else x.view(*x.shape[:2], *image) for x in rest]
    return o.view(o.shape[0], *image, *o.shape[2:])[..., : v.shape[4]], *made


def _bilevel_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    graph: Tensor,
    own: Grid,
    other: Grid,
    scale: float,
    mask_padding: bool,
) -> tuple[Score, Tensor, None, Routing]:
    """score, v, no gate, routing: groups are regions."""
    batch, heads = q.shape[0], q.shape[3]
    regions = torch.arange(own.regions, device=q.device)[:, None]
    routing = Routing(
        regions.expand(batch, heads, own.regions, 1),
        graph.expand(batch, heads, own.regions, graph.shape[3]),
        image_grid(own, (q.shape[1], q.shape[2])),
        image_grid(other, (k.shape[1], k.shape[2])),
        pad_keys=not mask_padding,
    )
    q, k, v = (x.flatten(1, 2) for x in (q, k, v))
    return Score(q, k, scale=scale), v if v.shape[3] else widen(v), None, routing


def bilevel_prepared(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    graph: Tensor,
    *rest: Any,
    backend: str,
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None:
    """`bilevel_routing_attention` for o alone, as a function of other tensors of the same shapes,
    strides and dtype that want no gradient; None where such calls copy their tensors or are empty,
    and while a CUDA graph is captured.

    Its graph is [B, R, topk] or [B, Hq, R, topk], as that of this call was when it was given.
    """
    score, values, _, routing = _bilevel_arguments(q, k, v, graph, *rest)
    assert routing.keys is not None
    # The list of regions that is kept has its values now, not at a replay.
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    pairs = (q, score.q), (k, score.k), (v, values), (graph, routing.keys)
    if not all(x.numel() and x.data_ptr() == y.data_ptr() for x, y in pairs):
        return None
    call = ready(score, values, None, routing, (routing.keys,), backend)
    assert call is not None
    of_q, of_k, of_v, of_graph = ((y.shape, y.stride()) for _, y in pairs)
    made = q.new_empty((*q.shape[:4], v.shape[4]))
    of_o = made.shape, made.stride()

    # One operator for all views: what a call needs for the first time since long is slow.
    def attend(q: Tensor, k: Tensor, v: Tensor, graph: Tensor) -> Tensor:
        o = call(
            q.as_strided(*of_q),
            k.as_strided(*of_k),
            v.as_strided(*of_v),
            graph.as_strided(*of_graph),
        )
        return o.as_strided(*of_o)

    return attend


def bilevel_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *rest: Any,
    read_outs: tuple[bool, bool, bool, bool],
    backend: str,
) -> NativeCall:
    """The call that `bilevel_routing_attention` makes, for hw.explain."""
    lse, entropy, p_max, sq_norm = read_outs
    want = Want(False, lse, entropy, p_max, sq_norm, skip_dead=False)
    return forward_call(*_bilevel_arguments(q, k, v, *rest), want, backend)


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
    arguments = _kmeans_arguments(q, k, v, q_index, k_index, is_causal, mask_self, scale, mean_eps)
    o, *_ = attend("kmeans_routing_attention", *arguments, NO_READ_OUTS, backend)
    assert o is not None
    return o[..., : v.shape[3]]


def _kmeans_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    is_causal: bool,
    mask_self: bool,
    scale: float,
    mean_eps: float,
) -> tuple[Score, Tensor, None, Routing]:
    """score, v, no gate, routing: groups are clusters."""
    routing = Routing(
        q_index,
        k_index,
        sequence_grid(q.shape[1]),
        sequence_grid(k.shape[1]),
        by_slot=True,
        mask_self=mask_self,
        mean_eps=mean_eps,
        covers=False,
    )
    score = Score(q, k, scale=scale, causal=is_causal)
    return score, v if v.shape[3] else widen(v), None, routing


def kmeans_prepared(
    *arguments: Any, backend: str
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None:
    """`kmeans_routing_attention` as a function of q, k, v, q_index and k_index like these that want
    no gradient; None where there is no shorter way."""
    score, v, _, routing = _kmeans_arguments(*arguments)
    assert routing.keys is not None
    if not arguments[2].shape[3]:
        return None
    return ready(score, v, None, routing, (routing.rows, routing.keys), backend)


def kmeans_call(*arguments: Any, backend: str) -> NativeCall:
    """The call that `kmeans_routing_attention` makes, for hw.explain."""
    want = Want(True, True, skip_dead=False)
    return forward_call(*_kmeans_arguments(*arguments), want, backend)


def moh_attention(score: Score, v: Tensor, gate: Tensor, backend: str) -> Tensor:
    """A Score without packed sequences and with the softmax activation, v [B, Sk, H, Dv], gate
    [B, Sq, Hq] in the accumulation dtype -> o [B, Sq, Hq, Dv]. Gradients to the tensors of the
    score, v and gate; that of a gate of 0 is 0."""
    rows = chosen_rows(gate.detach(), without_products(backend))
    arguments = _moh_arguments(score, v, gate, rows)
    o, *_ = attend("moh_attention", *arguments, NO_READ_OUTS, backend)
    assert o is not None
    return o[..., : v.shape[3]]


def _moh_arguments(
    score: Score, v: Tensor, gate: Tensor, rows: Tensor
) -> tuple[Score, Tensor, Tensor, Routing]:
    """score, v, gate, routing: of each head one group, the rows with a gate."""
    routing = Routing(
        rows[:, :, None],
        None,
        sequence_grid(score.q.shape[1]),
        sequence_grid(score.k.shape[1]),
        covers=False,
    )
    return score, v if v.shape[3] else widen(v), gate, routing


def moh_prepared(
    score: Score, v: Tensor, gate: Tensor, given: Tensor, backend: str
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None:
    """`moh_attention` of a score without other tensors, as a function of q, k, v and gate like
    these that want no gradient; None where there is no shorter way, or the gate as it was given is
    cast."""
    if not v.shape[3] or gate.dtype != given.dtype:
        return None
    arguments = _moh_arguments(score, v, gate, unfilled_rows(gate))
    call = ready(*arguments, (arguments[3].rows,), backend)
    if call is None:
        return None
    choose = ready_rows(gate, without_products(backend))

    def attend(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return call(q, k, v, gate, choose(gate).unsqueeze(2))

    return attend


def moh_call(score: Score, v: Tensor, gate: Tensor, backend: str) -> NativeCall:
    """The call that `moh_attention` makes, for hw.explain."""
    arguments = _moh_arguments(score, v, gate, unfilled_rows(gate))
    return forward_call(*arguments, Want(skip_dead=False), backend)
