# SPDX-License-Identifier: Apache-2.0
"""Softmax-type attention in plain PyTorch: the whole matrix of scores and of weights.

    x_ij = scale tau_i <q_i, k_j>                  tau: row_temperature
    y_ij = cap tanh(x_ij / cap)                    softcap; without one y = x
    s_ij = y_ij + gamma_j |y_ij| + b_ij + beta_j   key_gain (rows of gain_rows), bias, key_bias

Row i sees some of the keys; s_ij = -inf for the others.

    softmax    p_ij = exp(s_ij - L_i)    L_i = log sum_j exp(s_ij)
    softmax1   p_ij = exp(s_ij - L_i)    L_i = log (1 + sum_j exp(s_ij))
    others     p_ij = a(s_ij) / n_i      n_i = 1, the number of keys seen, or sum_j a(s_ij)

    w_i = sum_j p_ij v_j        o_i = g_i ((1 - u) w_i + u v_i)        y_j = sum_i p_ij x_i

A row whose scores are all -inf has p = 0 and L = -inf (softmax1: 0); where n_i = 0, p = 0.
Scores, weights and statistics are fp32 (fp64 for fp64); p is rounded to the dtype of the values
that it multiplies. Packed sequences are blocks of one matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "relu2": lambda s: torch.relu(s) ** 2,
}


class Statistics(NamedTuple):
    """Read-outs of the rows, [B, Hq, Sq]. All but lse are without gradient."""

    lse: Tensor
    entropy: Tensor  # -sum_j p ln p
    p_max: Tensor
    sq_norm: Tensor  # sum_j p^2
    mass: Tensor | None  # sum_j p m_j


class Layout(NamedTuple):
    """Of every row: the keys [first, end) of its sequence, its diagonal, its number in it."""

    first: Tensor  # [Sq]
    end: Tensor
    diagonal: Tensor  # the last row of a sequence has its diagonal at the last key
    number: Tensor
    rows: Tensor  # how many rows the sequence has


def attention(
    q: Tensor,  # [B, Sq, Hq, D]
    k: Tensor,  # [B, Sk, H, D]
    v: Tensor,  # [B, Sk, H, Dv]
    *,
    head_gate: Tensor | None = None,  # [B, Sq, Hq]
    identity_mix: Tensor | None = None,  # [B, Hq] or [Hq]
    mass: Tensor | None = None,  # m, broadcastable to [B, Hq, Sk]
    **score: Any,
) -> tuple[Tensor, Statistics | None]:
    """The output [B, Sq, Hq, Dv] and, for the softmaxes, the statistics."""
    p, lse = weights(q, k, **score)
    v = _per_query_head(v, q)
    o = torch.einsum("bhij,bjhe->bihe", p.to(v.dtype), v)
    if identity_mix is not None:
        u = identity_mix.to(p.dtype).expand(q.shape[0], q.shape[2])[:, None, :, None]
        o = (1 - u) * o.to(p.dtype) + u * v.to(p.dtype)
    if head_gate is not None:
        o = head_gate.to(p.dtype)[..., None] * o.to(p.dtype)
    return o.to(v.dtype), None if lse is None else _statistics(p.detach(), lse, mass)


def attention_lse(q: Tensor, k: Tensor, **score: Any) -> Tensor:
    """L [B, Hq, Sq]."""
    lse = weights(q, k, **score)[1]
    assert lse is not None
    return lse


def attention_transpose(q: Tensor, k: Tensor, x: Tensor, **score: Any) -> Tensor:
    """y_j = sum_i p_ij x_i, [B, Sk, Hq, Dx] of x [B, Sq, Hq, Dx]."""
    p, _ = weights(q, k, **score)
    return torch.einsum("bhij,bihe->bjhe", p.to(x.dtype), x)


def column_stats(
    q: Tensor,
    k: Tensor,
    *,
    kind: str = "sum",
    row_weight: Tensor | None = None,  # r, broadcastable to [B, Hq, Sq]
    reduce_heads: bool = False,
    **score: Any,
) -> Tensor:
    """sum_i r_i p_ij, its mean over the rows that see key j, or max_i p_ij: [B, Hq, Sk].

    With reduce_heads the same over rows and heads, [B, Sk].
    """
    p, _ = weights(q, k, **score)
    if kind == "max":
        p = torch.nn.functional.pad(p.detach(), (0, 0, 0, 1, 0, 1))  # where there are no rows: 0
        return p.amax((1, 2)) if reduce_heads else p.amax(2)[:, :-1]
    r = 1 if row_weight is None else row_weight.to(p.dtype)[..., None]
    total = (r * p).sum((1, 2) if reduce_heads else 2)
    if kind == "sum":
        return total
    count = visible(q, k, **_mask_options(score)).sum(0).clamp(min=1)
    return total / (count * (max(q.shape[2], 1) if reduce_heads else 1))


def attention_probs(
    q: Tensor,
    k: Tensor,
    *,
    keys: Tensor | None = None,  # [B, n]
    rows: Tensor | None = None,  # [B, n]
    offsets: Tensor | None = None,  # [n]
    **score: Any,
) -> Tensor:
    """p_{i, keys[n]} [B, Hq, Sq, n], p_{rows[n], j} [B, Hq, n, Sk] or p_{i, diagonal + offsets[n]}.

    All count within a sequence; what is not in it has weight 0.
    """
    p, _ = weights(q, k, **score)
    p = p.detach()
    batch, heads, query_tokens, key_tokens = p.shape
    bounds = score.get("cu_seqlens_q"), score.get("cu_seqlens_k")
    if rows is not None:
        column = layout(k, q, *bounds[::-1])  # of every key: the rows of its sequence
        index = (rows[..., None] + column.first)[:, None]
        inside = (rows[:, None, :, None] >= 0) & (index < column.end)
        index = torch.where(inside, index, query_tokens).expand(batch, heads, -1, key_tokens)
        return torch.nn.functional.pad(p, (0, 0, 0, 1)).gather(2, index)
    row = layout(q, k, *bounds)
    if keys is not None:
        index = (keys[:, None] + row.first[:, None])[:, None]
    else:
        assert offsets is not None
        index = (row.diagonal[:, None] + offsets)[None, None]
    inside = (index >= row.first[:, None]) & (index < row.end[:, None])
    index = torch.where(inside, index, key_tokens).expand(batch, heads, query_tokens, -1)
    return torch.nn.functional.pad(p, (0, 1)).gather(3, index)


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """o = sum_n e^{L_n - L} o_n with L = log sum_n e^{L_n}: [B, S, H, D] and [B, H, S].

    A part without keys is not looked at: it may be NaN. Where all are, o = 0 and L = -inf.
    """
    parts, lse = torch.stack(list(outs)).to(lses[0].dtype), torch.stack(list(lses))
    seen = lse != -torch.inf  # [N, B, H, S]
    total = torch.where(seen.any(0), lse, 0).logsumexp(0)
    p = torch.where(seen, (lse - total).exp(), 0)
    parts = torch.where(seen.transpose(2, 3)[..., None], parts, 0)
    o = (p.transpose(2, 3)[..., None] * parts).sum(0)
    return o.to(outs[0].dtype), torch.where(seen.any(0), total, -torch.inf)


def weights(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,  # broadcastable to [B, Hq, Sq, Sk]
    key_bias: Tensor | None = None,  # broadcastable to [B, Hq, Sk]
    key_gain: Tensor | None = None,  # broadcastable to [B, Hq, Sk]
    gain_rows: tuple[int | None, int | None] | None = None,
    row_temperature: Tensor | None = None,  # broadcastable to [B, Sq, Hq]
    activation: str = "softmax",
    normalizer: str | None = None,
    lse: Tensor | None = None,  # [B, Hq, Sq], instead of the one of these scores
    **mask: Any,
) -> tuple[Tensor, Tensor | None]:
    """p [B, Hq, Sq, Sk], and L [B, Hq, Sq] of the softmaxes."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    x = torch.einsum("bihd,bjhd->bhij", q.to(dtype), _per_query_head(k, q).to(dtype))
    x = x * (q.shape[3] ** -0.5 if scale is None else scale)
    if row_temperature is not None:
        x = x * row_temperature.to(dtype).transpose(1, 2)[..., None]
    y = softcap * torch.tanh(x / softcap) if softcap else x
    s = y
    if key_gain is not None:
        gained = _gained_rows(q, k, gain_rows, **mask)[:, None]
        s = s + torch.where(gained, key_gain.to(dtype)[:, :, None] * y.abs(), 0)
    if bias is not None:
        s = s + bias.to(dtype)
    if key_bias is not None:
        s = s + key_bias.to(dtype)[:, :, None]
    seen = visible(q, k, **mask)
    s = torch.where(seen, s, -torch.inf)
    if activation in ACTIVATIONS:
        return _normalized(ACTIVATIONS[activation](s), normalizer, seen), None
    return _softmax(s, s.new_zeros(1, 1) if activation == "softmax1" else None, lse)


def _softmax(s: Tensor, extra: Tensor | None, lse: Tensor | None) -> tuple[Tensor, Tensor]:
    """`extra` [B|1, Hq|1]: the score of one key more, which has no value."""
    keys = s.shape[-1]
    if extra is not None:
        s = torch.cat((s, extra[..., None, None].expand(*s.shape[:-1], 1)), -1)
    empty = (s == -torch.inf).all(-1, keepdim=True)
    s = torch.where(empty, 0, s)
    own = s.logsumexp(-1, keepdim=True)
    if lse is None:
        # L only brings exponents near 0: divided by their sum, what rounding took from it is no
        # matter.
        e = (s - own.detach()).exp()
        p = e / torch.where(own.isfinite(), e.sum(-1, keepdim=True), 1)
    else:
        # A given L has its own value and the gradient of the one of these scores; where that one is
        # infinite, their difference would be NaN.
        slope = torch.where(own.isfinite(), own - own.detach(), 0)
        p = (s - (lse.detach()[..., None] + slope)).exp()
    p = torch.where(empty, 0, p)
    return p[..., :keys], torch.where(empty, -torch.inf, own)[..., 0]


def _normalized(a: Tensor, normalizer: str | None, seen: Tensor) -> Tensor:
    if normalizer is None:
        return a
    n = seen.sum(-1, keepdim=True) if normalizer == "length" else a.sum(-1, keepdim=True)
    return torch.where(n == 0, 0, a / torch.where(n == 0, 1, n))


def _statistics(p: Tensor, lse: Tensor, mass: Tensor | None) -> Statistics:
    return Statistics(
        lse,
        torch.special.entr(p).sum(-1),
        torch.nn.functional.pad(p, (0, 1)).amax(-1),
        p.square().sum(-1),
        None if mass is None else (p * mass.to(p.dtype)[:, :, None]).sum(-1),
    )


def layout(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None
) -> Layout:
    """Where every row lies in its sequence."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        cu_seqlens_q, cu_seqlens_k = (
            torch.tensor([0, x.shape[1]], device=q.device) for x in (q, k)
        )
    row = torch.arange(q.shape[1], device=q.device)
    n = torch.searchsorted(cu_seqlens_q.contiguous(), row, right=True)  # its sequence + 1
    begin, stop = cu_seqlens_q[n - 1], cu_seqlens_q[n]
    first, end = cu_seqlens_k[n - 1], cu_seqlens_k[n]
    return Layout(first, end, row - stop + end, row - begin, stop - begin)


def visible(
    q: Tensor,
    k: Tensor,
    *,
    is_causal: bool = False,
    window_size: tuple[int | None, int | None] | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """[Sq, Sk]: whether row i sees key j. Around the diagonal, within the sequence."""
    left, right = window_size or (None, None)
    if is_causal:
        right = 0
    row = layout(q, k, cu_seqlens_q, cu_seqlens_k)
    first, end, diagonal = (x[:, None] for x in row[:3])
    j = torch.arange(k.shape[1], device=q.device)
    seen = (first <= j) & (j < end)
    if left is not None:
        seen = seen & (j >= diagonal - left)
    if right is not None:
        seen = seen & (j <= diagonal + right)
    return seen


def _gained_rows(
    q: Tensor, k: Tensor, gain_rows: tuple[int | None, int | None] | None, **mask: Any
) -> Tensor:
    """[Sq]: whether key_gain is for row i. Negative numbers count from the end of a sequence."""
    begin, stop = gain_rows or (None, None)
    row = layout(q, k, mask.get("cu_seqlens_q"), mask.get("cu_seqlens_k"))
    gained = row.number >= 0
    if begin is not None:
        gained = gained & (row.number >= (begin if begin >= 0 else begin + row.rows))
    if stop is not None:
        gained = gained & (row.number < (stop if stop >= 0 else stop + row.rows))
    return gained


def _mask_options(score: dict[str, Any]) -> dict[str, Any]:
    names = ("is_causal", "window_size", "cu_seqlens_q", "cu_seqlens_k")
    return {name: score[name] for name in names if name in score}


def _per_query_head(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[2] // x.shape[2], 2) if x.shape[2] else x
