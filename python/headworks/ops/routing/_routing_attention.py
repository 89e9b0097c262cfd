# SPDX-License-Identifier: Apache-2.0
"""Attention by lists: how a validated call is made, and what torch does around its backward pass.

by slot     d_w_i = d_o_i / (n_i + eps), n_i slots that hold token i
with gate   d_w_i = g_i d_o_i      D_i = <d_w_i, w_i>          d_g_i = <d_o_i, w_i>
otherwise   d_w_i = d_o_i          D_i = <d_o_i, w_i>
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._autograd import Saved, apart, first_order
from ..._functions import Maybe
from ..._native import ACCUMULATION, route
from ..attention._autograd import returned, scaled, score_gradients, zeros
from ..attention._native import Want
from ..attention._operators import row_dot
from ..attention._score import TENSORS, Score
from . import _routing_attention_native as native
from ._routing_attention_native import NUMBERS, Routing

NO_READ_OUTS = (False, False, False, False)


def attend(
    op: str,
    score: Score,
    v: Tensor,
    gate: Maybe,
    routing: Routing,
    read_outs: tuple[bool, bool, bool, bool],
    backend: str,
) -> tuple[Maybe, ...]:
    """o and the read-outs lse, entropy, p_max, sq_norm that are asked for."""
    way = route(op, (*score.tensors, v, gate, routing.rows, routing.keys))
    made: tuple[Maybe, ...]
    if way == "autograd":
        made = _differentiable(*apart(*_packed(score, routing, v, gate), *read_outs, backend, op))
    else:
        want = _wanted(routing, False, read_outs)
        call = native.forward if way == "direct" else native.forward_operator
        results = call(score, v, gate, routing, want, backend)
        lse = results.row[0] if want.row and results.row is not None else None
        made = results.o, lse, results.entropy, results.p_max, results.sq_norm
    asked = (True, *read_outs)
    return tuple(x if wanted else None for x, wanted in zip(made, asked, strict=True))


def _wanted(routing: Routing, w: bool, read_outs: tuple[bool, ...]) -> Want:
    """By slot, o is made from w, and the row statistic is left for the backward pass."""
    lse, entropy, p_max, sq_norm = read_outs
    by_slot = routing.by_slot
    return Want(w or by_slot, lse or by_slot, entropy, p_max, sq_norm, skip_dead=False)


_GRID = 5  # numbers of Routing.row_grid and of key_grid


def _packed(score: Score, routing: Routing, v: Tensor, gate: Maybe) -> tuple[Any, ...]:
    """One by one: what _RoutingAttention takes first."""
    tensors = *score.tensors, routing.rows, routing.keys, v, gate
    return *tensors, *score.numbers, *routing.row_grid, *routing.key_grid, *routing[4:]


def _unpacked(
    arguments: tuple[Any, ...],
) -> tuple[Score, Routing, Tensor, Maybe, tuple[Any, ...]]:
    """Score, routing, v, gate, and the arguments behind them."""
    (rows, keys, v, gate), rest = arguments[TENSORS:][:4], arguments[TENSORS + 4 :]
    score, rest = Score(*arguments[:TENSORS], *rest[:NUMBERS]), rest[NUMBERS:]
    grids, rest = (rest[:_GRID], rest[_GRID : 2 * _GRID]), rest[2 * _GRID :]
    flags = len(Routing._fields) - 4
    return score, Routing(rows, keys, *grids, *rest[:flags]), v, gate, rest[flags:]


class _RoutingAttention(torch.autograd.Function):
    """`packed` arguments with v and gate, four read-outs, backend, op -> o, row statistic, entropy,
    p_max, sq_norm; all but o and the lse without gradient."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        score, routing, v, gate, (*read_outs, backend, ctx.op) = _unpacked(arguments)
        want = _wanted(routing, gate is not None, (True, *read_outs[1:]))
        made = native.forward_operator(score, v, gate, routing, want, backend)
        o, row, others = made.o, made.row, (made.entropy, made.p_max, made.sq_norm)
        w = made.w if want.w else o
        ctx.save_for_backward(*score.tensors, routing.rows, routing.keys, v, gate, w, row)
        ctx.numbers, ctx.routing = score.numbers, routing[2:]
        ctx.want_lse, ctx.backend = read_outs[0] and not routing.by_slot, backend
        lse = row[0]
        ctx.set_materialize_grads(False)
        # Once: a second call replaces the first.
        unmoved = others if ctx.want_lse else (lse, *others)
        ctx.mark_non_differentiable(*(x for x in unmoved if x is not None))
        return o, lse, *others

    @staticmethod
    @first_order()
    def backward(ctx: Any, saved: Saved, d_o: Maybe, d_lse: Maybe, *_: Maybe) -> tuple[Maybe, ...]:
        *tensors, rows, keys, v, gate, w, row = saved
        score, routing = Score(*tensors, *ctx.numbers), Routing(rows, keys, *ctx.routing)
        needs = ctx.needs_input_grad
        if d_o is None:
            d_o = zeros(v, *score.q.shape[:3], v.shape[3])
        if gate is not None and needs[2] and _is_shared(score):
            score, d_o = _without_unchosen(score, d_o, gate)
        delta = slots = d_gate = None
        factor = _shares(routing, score) if routing.by_slot else gate
        d_w = d_o
        if factor is not None and not native.takes_factor(d_o, ctx.backend):
            d_w = scaled(factor, d_o)
        if routing.by_slot:
            slots = w
        else:
            if d_w is not d_o and needs[TENSORS + 3]:
                d_gate = row_dot(w, d_o, ctx.backend)
            # Of d_w as rounded: then ds = 0 where a row sees one key.
            a = row_dot(w, d_w, ctx.backend)
            if gate is not None and d_w is d_o:
                a, d_gate = gate * a, a
            delta = a.transpose(1, 2)
            if ctx.want_lse and d_lse is not None:
                delta = delta - d_lse
        want = score_gradients(needs, True)
        made = native.backward_operator(
            score, v, routing, want, ctx.backend, d_w=d_w, row=row, delta=delta, slots=slots,
            factor=factor if d_w is d_o else None,
        )  # fmt: skip
        d_gate = d_gate if gate is not None and needs[TENSORS + 3] else None
        grads = *returned(score, made, needs, row, delta), None, None, made.d_v, d_gate
        return *grads, *(None,) * (len(needs) - len(grads))


def _is_shared(score: Score) -> bool:
    """Whether there is a bias, an element of which several scores read."""
    return score.bias is not None and score.bias.shape != (*score.row_shape, score.k.shape[1])


def _without_unchosen(score: Score, d_o: Tensor, gate: Tensor) -> tuple[Score, Tensor]:
    """Zeros in the rows that no list has. The gradient of a bias that heads share is summed over
    all rows, these with the weight 0, which what is not finite would survive."""
    unchosen = gate == 0
    q, temperature = score.q.masked_fill(unchosen[..., None], 0), score.row_temperature
    if temperature is not None:
        temperature = temperature.masked_fill(unchosen, 0)
    score = score._replace(q=q, row_temperature=temperature)
    return score, d_o.masked_fill(unchosen[..., None], 0)


def _shares(routing: Routing, score: Score) -> Tensor:
    """1 / (n_i + eps) [B, Sq, Hq]; 0 for tokens in no slot."""
    batch, tokens, heads, _ = score.q.shape
    rows = routing.rows.flatten(2).clamp(-1, tokens) + 1  # empty slots before and behind the rest
    dtype = ACCUMULATION[score.q.dtype]
    ones = torch.ones((), dtype=dtype, device=rows.device).expand(rows.shape)
    count = torch.zeros((batch, heads, tokens + 2), dtype=dtype, device=rows.device)
    count = count.scatter_add(2, rows, ones)[..., 1:-1].transpose(1, 2)  # whole numbers: exact
    return torch.where(count > 0, 1 / (count + routing.mean_eps), 0)


_differentiable: Callable[..., tuple[Tensor, ...]] = _RoutingAttention.apply
