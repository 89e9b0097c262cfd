# SPDX-License-Identifier: Apache-2.0
"""The backward pass of attention around the native call: what torch does before and after it.

    d_w_i = g_i (1 - u) d_o_i        D_i = <d_w_i, w_i>        delta_i = D_i - d_L_i
    (delta = 0 where weights need no statistic of their row)

go into attention.backward. Of the epilogue, with a_i = <d_o_i, w_i> and b_i = <d_o_i, v_i>:

    d_sink = -sum_i exp(sink - L_i) delta_i

    d_g_i = (1 - u) a_i + u b_i      d_u = sum_i g_i (b_i - a_i)      d_v_i += g_i u d_o_i
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._autograd import Saved, first_order
from ..._native import ACCUMULATION, Maybe, is_direct
from . import _operators as operators
from ._native import OP, Want, WantGrad
from ._operators import NUMBERS
from ._score import TENSORS, Score


def scaled(factor: Tensor, x: Tensor) -> Tensor:
    """factor_i x_i of x [B, S, H, D], the product in the wider dtype, in the dtype of x: in one
    pass over memory, where nobody records it (torch.compile makes one by itself)."""
    if not is_direct((factor, x)):
        return (factor[..., None] * x).to(x.dtype)
    made = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return torch.mul(factor[..., None], x, out=made)


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


# Of each field of WantGrad its place among a Score's tensors; v has none.
_PLACES = [Score._fields.index(x) if x in Score._fields else None for x in WantGrad._fields]


def score_gradients(needs: Sequence[bool], v: bool = False) -> Any:
    """What needs_input_grad of a function whose first arguments are a Score's tensors asks for."""
    return WantGrad(*[v if i is None else needs[i] for i in _PLACES])


def returned(
    own: Score, made: Any, needs: Sequence[bool], row: Maybe, delta: Maybe
) -> tuple[Maybe, ...]:
    """Gradients for the tensors of a Score, from those that attention.backward made of it, or of a
    copy with a key head for each query head or in another dtype, given `row` and `delta`."""
    d_k = per_key_head(made.d_k, own.k.shape[2])
    grads = [made.d_q.to(own.q.dtype), d_k.to(own.k.dtype), *_NO_OPTIONS]
    for i in range(2, TENSORS):
        x: Any = own[i]
        if x is None or not needs[i]:
            continue
        name = own._fields[i]
        d_x = _of_sink(x, row, delta) if name == "sink" else getattr(made, f"d_{name}")
        grads[i] = d_x.to(x.dtype)
    return tuple(grads)


_NO_OPTIONS = (None,) * (TENSORS - 2)


def _of_sink(sink: Tensor, row: Maybe, delta: Maybe) -> Tensor:
    """-sum_i p_i delta_i, where p_i = exp(sink - L_i) is the weight of the sink in row i."""
    assert row is not None and delta is not None
    distance = sink[..., None] - row if row.dim() == 3 else sink[..., None] - row[0] - row[1]
    taken = torch.where(sink[..., None] == -torch.inf, 0, distance.exp()) * delta
    # In pieces, whose sums have one order whatever the number of threads.
    padded = torch.nn.functional.pad(taken, (0, -taken.shape[2] % 128))
    return -padded.view(*taken.shape[:2], -1, 128).sum(3).sum(2)


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
        others = made[3:] if want_lse else (lse, *made[3:])
        ctx.mark_non_differentiable(*(x for x in others if x is not None))
        return made.o, lse, *made[3:]

    @staticmethod
    @first_order(OP)
    def backward(ctx: Any, saved: Saved, d_o: Maybe, d_lse: Maybe, *_: Maybe) -> tuple[Maybe, ...]:
        *tensors, v, gate, mix, w, row = saved
        score = Score(*tensors, *ctx.numbers)
        needs = ctx.needs_input_grad
        if d_o is None:
            d_o = zeros(w, *w.shape)
        epilogue = needs[TENSORS + 1 : TENSORS + 3]
        d_w, d_direct = _through_epilogue(d_o, gate, mix)
        a = b = None
        if d_w is not d_o and any(epilogue):
            a = operators.row_dot(w, d_o, ctx.backend)
        if mix is not None and any(epilogue):
            b = operators.row_dot(d_o, per_query_head(v, d_o.shape[2]), ctx.backend)
        if row is None:
            delta = zeros(w, *score.row_shape, dtype=ACCUMULATION[w.dtype])
        else:
            # Of d_w as rounded: then ds = 0 where a row sees one key.
            delta = operators.row_dot(w, d_w, ctx.backend).transpose(1, 2)
        if ctx.want_lse and d_lse is not None:
            delta = delta - d_lse
        want = score_gradients(needs, needs[TENSORS])
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
        return scaled(gate, d_o), None
    u = mix[:, None]
    g = u.new_ones(()) if gate is None else gate
    kept = g * (1 - u)
    return scaled(kept, d_o), (g * u)[..., None] * d_o


def _of_epilogue(
    a: Maybe, b: Maybe, gate: Maybe, mix: Maybe, needs: tuple[bool, ...]
) -> tuple[Maybe, Maybe]:
    """d_gate and d_mix."""
    d_gate = d_mix = None
    if a is not None and gate is not None and needs[0]:
        d_gate = a if mix is None or b is None else (1 - mix[:, None]) * a + mix[:, None] * b
    if a is not None and b is not None and needs[1]:
        d_mix = ((b - a) if gate is None else gate * (b - a)).sum(1)
    return d_gate, d_mix


differentiable: Callable[..., tuple[Tensor, ...]] = _Attention.apply
