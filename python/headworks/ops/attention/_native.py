# SPDX-License-Identifier: Apache-2.0
"""The native calls of the attention family.

    forward     o, w, row statistic, read-outs of the rows
    backward    gradients, from d_w and the row statistic
    columns     P^T x, column sums and maxima
    probs       weights of chosen pairs

Order of tensors and numbers: csrc/softmax/params.h. Without a query, a key or a head
nothing native is called: the results are those of rows that see no key. Each has beside it the
call itself, for hw.explain, and its unfilled outputs, for the fake kernels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._native import ACCUMULATION, Maybe, NativeCall, run
from ._bounds import longest_of
from ._checks import ACTIVATIONS, LAST_ROW, check_index_values
from ._score import TENSORS, Score, check_values_of_bounds

OP = "attention"


class Forward(NamedTuple):
    """Results of a forward call; None for what is not wanted.

    row [2, B, Hq, Sq]: the row statistic, and what rounding took from it.
    """

    o: Maybe
    w: Maybe = None
    row: Maybe = None
    entropy: Maybe = None
    p_max: Maybe = None
    sq_norm: Maybe = None
    mass: Maybe = None


class Want(NamedTuple):
    """What a forward call is to make besides o and, with mass_keys, the mass.

    skip_dead: rows that nobody can see (gate 0 or mix 1) may be skipped, as long as neither w nor
    a statistic of the row is wanted.
    """

    w: bool = False
    row: bool = False
    entropy: bool = False
    p_max: bool = False
    sq_norm: bool = False
    skip_dead: bool = True


class WantGrad(NamedTuple):
    """Which gradients a backward call is to make besides d_q and d_k."""

    v: bool = True
    bias: bool = False
    key_bias: bool = False
    key_gain: bool = False
    row_temperature: bool = False


def resolved(score: Score) -> tuple[list[Maybe], list[Any]]:
    """The tensors and numbers of a native call: nothing is relative to a length any more."""
    tensors, numbers = list(score.tensors), list(score.numbers)
    rows, keys = score.q.shape[1], score.k.shape[1]
    if score.bias is not None:
        tensors[2] = score.bias.expand(*score.row_shape, keys)
    if score.cu_seqlens_q is None:
        numbers[9:] = rows, keys
    else:
        for i, bounds in ((9, score.cu_seqlens_q), (10, score.cu_seqlens_k)):
            if numbers[i] < 0:
                assert bounds is not None
                numbers[i] = longest_of(bounds)
    begin, end = score.gain_begin, score.gain_end
    if begin == 0 and end == LAST_ROW:
        numbers[8] = rows
    elif score.cu_seqlens_q is None:
        numbers[7:9] = slice(begin, end).indices(rows)[:2]
    else:
        numbers[8] = min(end, rows)
    return tensors, numbers


def _empty(score: Score) -> bool:
    return not (score.q.numel() and score.k.numel())


def _zero(tensors: tuple[Maybe, ...]) -> None:
    for x in tensors:
        if x is not None:
            x.zero_()


def outputs(score: Score, v: Maybe, mass_keys: Maybe, want: Want) -> Forward:
    """Unfilled."""
    q = score.q
    device = q.device
    o = w = row = entropy = p_max = sq_norm = mass = None
    if v is not None:
        wide = (*q.shape[:3], v.shape[3])
        o = torch.empty(wide, dtype=q.dtype, device=device)
        if want.w:
            w = torch.empty(wide, dtype=q.dtype, device=device)
    if mass_keys is None and not any(want[1:5]):
        return Forward(o, w)
    shape, dtype = score.row_shape, ACCUMULATION[q.dtype]
    if want.row:
        row = torch.empty((2, *shape), dtype=dtype, device=device)
    if want.entropy:
        entropy = torch.empty(shape, dtype=dtype, device=device)
    if want.p_max:
        p_max = torch.empty(shape, dtype=dtype, device=device)
    if want.sq_norm:
        sq_norm = torch.empty(shape, dtype=dtype, device=device)
    if mass_keys is not None:
        mass = torch.empty(shape, dtype=dtype, device=device)
    return Forward(o, w, row, entropy, p_max, sq_norm, mass)


def forward(
    score: Score,
    v: Maybe,
    head_gate: Maybe,
    identity_mix: Maybe,
    mass_keys: Maybe,
    want: Want,
    backend: str,
) -> Forward:
    """attention.forward; without v the row statistics only."""
    if score.cu_seqlens_q is not None:
        check_values_of_bounds(OP, score)
    made = outputs(score, v, mass_keys, want)
    if _empty(score):
        _zero(made)
        if made.row is not None and score.activation == ACTIVATIONS["softmax"]:
            made.row[0].fill_(-torch.inf)
        return made
    tensors, numbers = resolved(score)
    tensors += (v, head_gate, identity_mix, mass_keys, *made)
    run("attention.forward", backend, tensors, (*numbers, want.skip_dead))
    return made


def output(
    q: Tensor, k: Tensor, v: Tensor, shape: tuple[float, float, bool, int, int], backend: str
) -> Tensor:
    """o alone, of a call without options: what `forward` does, in half its time.

    shape: scale, softcap, causal, left, right. There is a query, a key, a head and a value column.
    """
    batch, rows, heads, _ = q.shape
    o = torch.empty((batch, rows, heads, v.shape[3]), dtype=q.dtype, device=q.device)
    tensors: list[Maybe] = [q, k, *_NO_SCORE, v, *_NO_REST, o, *_NO_READ_OUTS]
    run("attention.forward", backend, tensors, (*shape, 0, 0, 0, rows, rows, k.shape[1], 1))
    return o


_NO_SCORE = (None,) * (TENSORS - 2)
_NO_REST = (None,) * 3  # head_gate identity_mix mass_keys
_NO_READ_OUTS = (None,) * 6


def forward_call(
    score: Score,
    v: Maybe,
    head_gate: Maybe,
    identity_mix: Maybe,
    mass_keys: Maybe,
    want: Want,
    backend: str,
) -> NativeCall:
    """The call that `forward` makes, for hw.explain."""
    tensors, numbers = resolved(score)
    made = outputs(score, v, mass_keys, want)
    tensors += (v, head_gate, identity_mix, mass_keys, *made, None)
    return "attention.forward", backend, tensors, (*numbers, want.skip_dead)


def backward(
    score: Score, v: Tensor, d_w: Tensor, row: Maybe, delta: Tensor, want: WantGrad, backend: str
) -> tuple[Maybe, ...]:
    """attention.backward: d_q d_k d_v d_bias d_key_bias d_key_gain d_row_temperature."""
    if score.cu_seqlens_q is not None:
        check_values_of_bounds(OP, score)
    made = gradients(score, v, want)
    if _empty(score):
        _zero(made)
        return made
    tensors, numbers = resolved(score)
    d_bias = made[3]
    if d_bias is not None:  # of bias's own shape: the kernel adds into it, whatever is broadcast
        d_bias = d_bias.zero_().expand(*score.row_shape, score.k.shape[1])
    tensors += (v, d_w, row, delta, *made[:3], d_bias, *made[4:])
    run("attention.backward", backend, tensors, numbers)
    return made


def gradients(score: Score, v: Tensor, want: WantGrad) -> tuple[Maybe, ...]:
    """Unfilled: those of q, k and v in their dtype, the others in the accumulation dtype."""
    q, k = score.q, score.k
    dtype = ACCUMULATION[q.dtype]
    bias = score.bias
    per_key, per_row = score.key_shape, tuple(q.shape[:3])
    shapes = (
        bias.shape if want.bias and bias is not None else None,
        per_key if want.key_bias else None,
        per_key if want.key_gain else None,
        per_row if want.row_temperature else None,
    )
    return (
        torch.empty(q.shape, dtype=q.dtype, device=q.device),
        torch.empty(k.shape, dtype=k.dtype, device=q.device),
        torch.empty(v.shape, dtype=v.dtype, device=q.device) if want.v else None,
        *(None if s is None else torch.empty(s, dtype=dtype, device=q.device) for s in shapes),
    )


def columns(
    score: Score, x: Maybe, row: Maybe, row_weight: Maybe, total: bool, largest: bool, backend: str
) -> tuple[Maybe, Maybe, Maybe]:
    """attention.columns: y with x, sum, max."""
    if score.cu_seqlens_q is not None:
        check_values_of_bounds(OP, score)
    made = column_outputs(score, x, total, largest)
    if _empty(score):
        _zero(made)
        return made
    tensors, numbers = resolved(score)
    tensors += (x, row, row_weight, *made)
    run("attention.columns", backend, tensors, tuple(numbers))
    return made


def columns_call(
    score: Score, x: Maybe, row: Maybe, row_weight: Maybe, total: bool, largest: bool, backend: str
) -> NativeCall:
    """The call that `columns` makes, for hw.explain."""
    tensors, numbers = resolved(score)
    tensors += (x, row, row_weight, *column_outputs(score, x, total, largest), None)
    return "attention.columns", backend, tensors, tuple(numbers)


def column_outputs(
    score: Score, x: Maybe, total: bool, largest: bool
) -> tuple[Maybe, Maybe, Maybe]:
    batch, heads, keys = score.key_shape
    dtype, device = ACCUMULATION[score.q.dtype], score.q.device
    y = None
    if x is not None:
        y = torch.empty((batch, keys, heads, x.shape[3]), dtype=x.dtype, device=device)
    return (
        y,
        torch.empty((batch, heads, keys), dtype=dtype, device=device) if total else None,
        torch.empty((batch, heads, keys), dtype=dtype, device=device) if largest else None,
    )


def probs(
    score: Score, row: Maybe, keys: Maybe, rows: Maybe, offsets: Maybe, backend: str
) -> Tensor:
    """attention.probs."""
    if score.cu_seqlens_q is not None:
        check_values_of_bounds(OP, score)
    check_index_values("attention_probs", "keys", keys, score.k.shape[1])
    check_index_values("attention_probs", "rows", rows, score.q.shape[1])
    p = probs_output(score, keys, rows, offsets)
    if _empty(score):
        return p.zero_()
    if not p.numel():
        return p
    tensors, numbers = resolved(score)
    tensors += (row, keys, rows, offsets, p)
    run("attention.probs", backend, tensors, tuple(numbers))
    return p


def probs_call(
    score: Score, row: Maybe, keys: Maybe, rows: Maybe, offsets: Maybe, backend: str
) -> NativeCall:
    """The call that `probs` makes, for hw.explain."""
    tensors, numbers = resolved(score)
    tensors += (row, keys, rows, offsets, probs_output(score, keys, rows, offsets), None)
    return "attention.probs", backend, tensors, tuple(numbers)


def probs_output(score: Score, keys: Maybe, rows: Maybe, offsets: Maybe) -> Tensor:
    batch, heads, queries = score.row_shape
    if rows is not None:
        shape: tuple[int, ...] = (batch, heads, rows.shape[1], score.k.shape[1])
    elif keys is not None:
        shape = (batch, heads, queries, keys.shape[1])
    else:
        assert offsets is not None
        shape = (batch, heads, queries, offsets.shape[0])
    return torch.empty(shape, dtype=ACCUMULATION[score.q.dtype], device=score.q.device)


def row_placeholder(score: Score, lse: Maybe) -> Maybe:
    """For hw.explain: a row statistic, without its values."""
    if lse is not None or not score.has_row_statistic:
        return lse
    return score.q.new_empty((2, *score.row_shape), dtype=ACCUMULATION[score.q.dtype])
