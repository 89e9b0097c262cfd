# SPDX-License-Identifier: Apache-2.0
"""The backward pass of attention around the native call: what torch does before and after it.

    d_w_i = g_i (1 - u) d_o_i        D_i = <d_w_i, w_i>        delta_i = D_i - d_L_i
    (delta = 0 where weights need no statistic of their row)

go into attention.backward. Of the epilogue, with a_i = <d_o_i, w_i> and b_i = <d_o_i, v_i>:

    d_g_i = (1 - u) a_i + u b_i      d_u = sum_i g_i (b_i - a_i)      d_v_i += g_i u d_o_i
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._autograd import Saved, first_order
from ..._native import ACCUMULATION, Maybe
from . import _operators as operators
from ._native import OP, Want, WantGrad
from ._operators import NUMBERS
from ._score import TENSORS, Score


def row_dot(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_i> in the accumulation dtype, [B, S, H]."""
    dtype = ACCUMULATION[x.dtype]
    return (x.to(dtype) * y.to(dtype)).sum(-1)


def zeros(like: Tensor, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
    """Zeros without memory."""
    return like.new_zeros((), dtype=dtype).expand(sizes)


def per_query_head(x: Tensor, heads: int) -> Tensor:
    """x [B, S, H, D] with each head repeated for the query heads that share it."""
    own = x.shape[2]
    if own == heads:
        return x
    if own == 1:
        return x.expand(-1, -1, heads, -1)
    return x.repeat_interleave(heads // own, 2)


def per_key_head(x: Tensor, heads: int) -> Tensor:
    """The adjoint: sums over the query heads that share a key head."""
    if x.shape[2] == heads:
        return x
    batch, tokens, own, d = x.shape
    wide = x.reshape(batch, tokens, heads, own // heads, d)
    return wide.sum(3, dtype=ACCUMULATION[x.dtype]).to(x.dtype)


_OPTIONS = Score._fields[2:TENSORS]


def score_gradients(needs: Sequence[bool], **others: bool) -> Any:
    """What needs_input_grad of a function whose first arguments are a Score's tensors asks for."""
    asked = zip(_OPTIONS, needs[2:TENSORS], strict=True)
    return WantGrad(**{name: need for name, need in asked if name in WantGrad._fields}, **others)


def returned(
    own: Score, made: Any, needs: Sequence[bool], row: Maybe, delta: Maybe
) -> tuple[Maybe, ...]:
    """Gradients for the tensors of a Score, from those that attention.backward made of it, or of a
    copy with a key head for each query head or in another dtype, given `row` and `delta`."""
    grads: list[Maybe] = [made.d_q.to(own.q.dtype)]
    grads.append(per_key_head(made.d_k, own.k.shape[2]).to(own.k.dtype))
    for name, x, needed in zip(_OPTIONS, own.tensors[2:], needs[2:TENSORS], strict=True):
        d_x = getattr(made, f"d_{name}", None)
        grads.append(None if x is None or d_x is None or not needed else d_x.to(x.dtype))
    return tuple(grads)


class _Attention(torch.autograd.Function):
    """(Score's tensors, v, gate, mix, mass_keys, Score's numbers, want_lse, entropy, p_max,
    sq_norm, backend) -> o, lse, entropy, p_max, sq_norm, mass; all but o and lse without gradient.

    Saves w, the output before gate and mix; without either that is o.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        tensors, (v, gate, mix, mass_keys) = arguments[:TENSORS], arguments[TENSORS:][:4]
        numbers = arguments[TENSORS + 4 :][:NUMBERS]
        want_lse, *statistics, backend = arguments[TENSORS + 4 + NUMBERS :]
        score = Score(*tensors, *numbers)
        save_w = gate is not None or mix is not None
        entropy, p_max, sq_norm = statistics
        want = Want(save_w, score.has_row_statistic, entropy, p_max, sq_norm, skip_dead=False)
        made = operators.forward(score, v, gate, mix, mass_keys, want, backend)
        row = made.row if score.has_row_statistic else None
        ctx.save_for_backward(*tensors, v, gate, mix, made.w if save_w else made.o, row)
        ctx.numbers, ctx.want_lse, ctx.backend = numbers, want_lse, backend
        lse = made.row if row is None else row[0]
        ctx.set_materialize_grads(False)
        # Once: a second call replaces the first.
        ctx.mark_non_differentiable(*made[3:], *(() if want_lse else (lse,)))
        return made.o, lse, *made[3:]

    @staticmethod
    @first_order(OP)
    def backward(ctx: Any, saved: Saved, d_o: Maybe, d_lse: Maybe, *_: Maybe) -> tuple[Maybe, ...]:
        *tensors, v, gate, mix, w, row = saved
        score = Score(*tensors, *ctx.numbers)
        needs = ctx.needs_input_grad
        if d_o is None:
            d_o = zeros(w, *w.shape)
        a = row_dot(d_o, w)
        epilogue = needs[TENSORS + 1 : TENSORS + 3]
        b = None
        if mix is not None and any(epilogue):
            b = row_dot(d_o, per_query_head(v, d_o.shape[2]))
        d_w, d_direct = _through_epilogue(d_o, gate, mix)
        if row is None:
            delta = zeros(a, *score.row_shape)
        else:
            # Of d_w as rounded: then ds = 0 where a row sees one key.
            delta = (a if d_w is d_o else row_dot(d_w, w)).transpose(1, 2)
        if ctx.want_lse and d_lse is not None:
            delta = delta - d_lse
        want = score_gradients(needs, v=needs[TENSORS])
        grads = operators.backward(score, v, d_w, row, delta, want, ctx.backend)
        d_v = grads.d_v if want.v else None
        if d_v is not None and d_direct is not None:
            direct = per_key_head(d_direct, v.shape[2])
            d_v = (d_v.to(direct.dtype) + direct).to(v.dtype)
        d_gate, d_mix = _of_epilogue(a, b, gate, mix, epilogue)
        none = (None,) * (len(needs) - TENSORS - 3)
        return *returned(score, grads, needs, row, delta), d_v, d_gate, d_mix, *none


def _through_epilogue(d_o: Tensor, gate: Maybe, mix: Maybe) -> tuple[Tensor, Maybe]:
    """d_w, and what reaches d_v through the mix."""
    if mix is None:
        if gate is None:
            return d_o, None
        return (gate[..., None] * d_o).to(d_o.dtype), None
    u = mix[:, None]
    g = u.new_ones(()) if gate is None else gate
    kept = g * (1 - u)
    return (kept[..., None] * d_o).to(d_o.dtype), (g * u)[..., None] * d_o


def _of_epilogue(
    a: Tensor, b: Maybe, gate: Maybe, mix: Maybe, needs: tuple[bool, ...]
) -> tuple[Maybe, Maybe]:
    """d_gate and d_mix."""
    d_gate = d_mix = None
    if gate is not None and needs[0]:
        d_gate = a if mix is None or b is None else (1 - mix[:, None]) * a + mix[:, None] * b
    if b is not None and needs[1]:
        d_mix = ((b - a) if gate is None else gate * (b - a)).sum(1)
    return d_gate, d_mix


differentiable: Callable[..., tuple[Tensor, ...]] = _Attention.apply
