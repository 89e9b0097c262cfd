# SPDX-License-Identifier: Apache-2.0
"""The native calls of the attention family.

    forward     o, w, row statistic, read-outs of the rows
    backward    gradients, from d_w and the row statistic
    columns     P^T x, column sums and maxima
    probs       weights of chosen pairs
    row_dot     inner products of rows with rows

Without a query, a key or a head nothing native is called: the results are those of rows that see
no key. Each has beside it the call itself, for hw.explain, and its unfilled outputs, for the fake
kernels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _library
from ..._functions import Maybe, NativeFunction, record
from ..._native import ACCUMULATION, NativeCall, described
from ..._repeated import Ready
from ._bounds import longest_of
from ._checks import SOFTMAXES, check_index_values
from ._score import TENSORS, Score, check_values_of_bounds

OP = "attention"

FORWARD = NativeFunction("attention.forward")
BACKWARD = NativeFunction("attention.backward")
COLUMNS = NativeFunction("attention.columns")
PROBS = NativeFunction("attention.probs")
ROW_DOT = NativeFunction("attention.row_dot")
for _function in (FORWARD, BACKWARD, COLUMNS, PROBS):
    _function.begins_with(Score._fields[:TENSORS], Score._fields[TENSORS:])

# Results of a forward call; None for what is not wanted. row [2, B, Hq, Sq]: the row statistic, and
# what rounding took from it.
Forward = FORWARD.Outputs


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


# Which gradients a backward call is to make besides d_q and d_k: v, and options of the score.
_GRADIENTS = [a.name.removeprefix("d_") for a in BACKWARD.outputs if a.optional]
WantGrad = record("WantGrad", _GRADIENTS, False)


def resolved(score: Score) -> Score:
    """The score of a native call: with bounds of the lengths of packed sequences."""
    if score.cu_seqlens_q is None or score.cu_seqlens_k is None:
        return score
    max_q = longest_of(score.cu_seqlens_q) if score.max_q < 0 else score.max_q
    max_k = longest_of(score.cu_seqlens_k) if score.max_k < 0 else score.max_k
    return score._replace(max_q=max_q, max_k=max_k)


def _empty(score: Score) -> bool:
    return not (score.q.numel() and score.k.numel())


def _zero(tensors: tuple[Maybe, ...]) -> None:
    for x in tensors:
        if x is not None:
            x.zero_()


def outputs(score: Score, v: Maybe, mass_keys: Maybe, want: Want) -> Any:
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
        return Forward(o=o, w=w)
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
    return Forward(o=o, w=w, row=row, entropy=entropy, p_max=p_max, sq_norm=sq_norm, mass=mass)


def forward(
    score: Score,
    v: Maybe,
    head_gate: Maybe,
    identity_mix: Maybe,
    mass_keys: Maybe,
    want: Want,
    backend: str,
) -> Any:
    """attention.forward, as Forward; without v the row statistics only."""
    if score.cu_seqlens_q is not None:
        check_values_of_bounds(OP, score)
    made = outputs(score, v, mass_keys, want)
    if _empty(score):
        _zero(made)
        if made.row is not None and score.activation in SOFTMAXES:
            made.row[0] = score.lse_without_keys
        return made
    FORWARD.run(backend, *_forward_inputs(score, v, head_gate, identity_mix, mass_keys, made, want))
    return made


def _forward_inputs(
    score: Score, v: Maybe, gate: Maybe, mix: Maybe, mass_keys: Maybe, made: Any, want: Want
) -> tuple[tuple[Maybe, ...], Any, tuple[Any, ...]]:
    score = resolved(score)
    inputs = FORWARD.tensors(
        score.tensors, v=v, head_gate=gate, identity_mix=mix, mass_keys=mass_keys
    )
    return inputs, made, FORWARD.numbers(score.numbers, skip_dead=want.skip_dead)


# scale, softcap, causal, left, right
Shape = tuple[float, float, bool, int, int]


def output(q: Tensor, k: Tensor, v: Tensor, shape: Shape, backend: str) -> Tensor:
    """o alone, of a call without options: what `forward` does, in half its time. There is a query,
    a key, a head and a value column."""
    o = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    tensors = (q, k, *_NO_OPTIONS, v, *_NO_REST, o, *_NO_READ_OUTS)
    _library.call(FORWARD.number, backend, tensors, (*shape, *_PLAIN))
    return o


def ready(q: Tensor, k: Tensor, v: Tensor, shape: Shape, backend: str) -> Ready:
    """`output` of other tensors like these."""
    inputs = (q, k, *_NO_OPTIONS, v, *_NO_REST)
    made = q.new_empty((*q.shape[:3], v.shape[3])), *_NO_READ_OUTS
    return Ready(FORWARD, backend, inputs, made, (*shape, *_PLAIN), (q, k, v))


def ready_row(score: Score, backend: str) -> Ready | None:
    """The row statistic of other queries and keys like these, where no other tensor has a say."""
    if _empty(score):
        return None
    want = Want(row=True, skip_dead=False)
    made = outputs(score, None, None, want)
    inputs, made, numbers = _forward_inputs(score, None, None, None, None, made, want)
    return Ready(FORWARD, backend, inputs, made, numbers, (score.q, score.k))


_NO_OPTIONS = (None,) * (TENSORS - 2)
_NO_REST = (None,) * (len(FORWARD.inputs) - TENSORS - 1)
_NO_READ_OUTS = (None,) * (len(FORWARD.outputs) - 1)
_PLAIN = (*list(Score._field_defaults.values())[len(_NO_OPTIONS) + 5 :], True)  # skip_dead


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
    made = outputs(score, v, mass_keys, want)
    given = _forward_inputs(score, v, head_gate, identity_mix, mass_keys, made, want)
    return described(FORWARD, backend, *given)


def backward(
    score: Score, v: Tensor, d_w: Tensor, row: Maybe, delta: Tensor, want: Any, backend: str
) -> Any:
    """attention.backward, as outputs of BACKWARD."""
    if score.cu_seqlens_q is not None:
        check_values_of_bounds(OP, score)
    made = gradients(score, v, want)
    if _empty(score):
        _zero(made)
        return made
    if made.d_bias is not None:  # of bias's own shape: the kernel adds into it
        made.d_bias.zero_()
    score = resolved(score)
    inputs = BACKWARD.tensors(score.tensors, v=v, d_w=d_w, row=row, delta=delta)
    BACKWARD.run(backend, inputs, made, BACKWARD.numbers(score.numbers))
    return made


def gradients(score: Score, v: Tensor, want: Any) -> Any:
    """Outputs of BACKWARD, unfilled: those of q, k and v in their dtype, the others, each as large
    as what it is the gradient of, in the accumulation dtype."""
    q, k = score.q, score.k
    made = {
        "d_q": torch.empty(q.shape, dtype=q.dtype, device=q.device),
        "d_k": torch.empty(k.shape, dtype=k.dtype, device=q.device),
    }
    if want.v:
        made["d_v"] = torch.empty(v.shape, dtype=v.dtype, device=q.device)
    if any(want):
        dtype = ACCUMULATION[q.dtype]
        for name, wanted in zip(_GRADIENTS, want, strict=True):
            x = getattr(score, name, None) if wanted else None
            if x is not None:
                made[f"d_{name}"] = torch.empty(x.shape, dtype=dtype, device=q.device)
    return BACKWARD.Outputs(**made)


def columns(
    score: Score, x: Maybe, row: Maybe, row_weight: Maybe, total: bool, largest: bool, backend: str
) -> Any:
    """attention.columns, as outputs of COLUMNS: y with x, sum, max."""
    if score.cu_seqlens_q is not None:
        check_values_of_bounds(OP, score)
    made = column_outputs(score, x, total, largest)
    if _empty(score):
        _zero(made)
        return made
    COLUMNS.run(backend, *_columns_inputs(score, x, row, row_weight, made))
    return made


def _columns_inputs(
    score: Score, x: Maybe, row: Maybe, row_weight: Maybe, made: Any
) -> tuple[tuple[Maybe, ...], Any, tuple[Any, ...]]:
    score = resolved(score)
    inputs = COLUMNS.tensors(score.tensors, x=x, row=row, row_weight=row_weight)
    return inputs, made, COLUMNS.numbers(score.numbers)


def columns_call(
    score: Score, x: Maybe, row: Maybe, row_weight: Maybe, total: bool, largest: bool, backend: str
) -> NativeCall:
    """The call that `columns` makes, for hw.explain."""
    made = column_outputs(score, x, total, largest)
    return described(COLUMNS, backend, *_columns_inputs(score, x, row, row_weight, made))


def column_outputs(score: Score, x: Maybe, total: bool, largest: bool) -> Any:
    """Outputs of COLUMNS, unfilled."""
    batch, heads, keys = score.key_shape
    dtype, device = ACCUMULATION[score.q.dtype], score.q.device
    made = {}
    if x is not None:
        made["y"] = torch.empty((batch, keys, heads, x.shape[3]), dtype=x.dtype, device=device)
    for name, wanted in (("sum", total), ("max", largest)):
        if wanted:
            made[name] = torch.empty((batch, heads, keys), dtype=dtype, device=device)
    return COLUMNS.Outputs(**made)


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
    PROBS.run(backend, *_probs_inputs(score, row, keys, rows, offsets, p))
    return p


def _probs_inputs(
    score: Score, row: Maybe, keys: Maybe, rows: Maybe, offsets: Maybe, p: Tensor
) -> tuple[tuple[Maybe, ...], tuple[Tensor], tuple[Any, ...]]:
    score = resolved(score)
    inputs = PROBS.tensors(score.tensors, row=row, keys=keys, rows=rows, offsets=offsets)
    return inputs, (p,), PROBS.numbers(score.numbers)


def probs_call(
    score: Score, row: Maybe, keys: Maybe, rows: Maybe, offsets: Maybe, backend: str
) -> NativeCall:
    """The call that `probs` makes, for hw.explain."""
    p = probs_output(score, keys, rows, offsets)
    return described(PROBS, backend, *_probs_inputs(score, row, keys, rows, offsets, p))


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


def row_dot(x: Tensor, y: Tensor, backend: str) -> Tensor:
    """attention.row_dot: <x_i, y_i> of rows [B, S, H, D] in the accumulation dtype, [B, H, S]."""
    dot = row_dot_output(x)
    if not x.numel():
        return dot.zero_()
    ROW_DOT.run(backend, (x, y), (dot,))
    return dot


def row_dot_output(x: Tensor) -> Tensor:
    batch, tokens, heads, _ = x.shape
    return torch.empty((batch, heads, tokens), dtype=ACCUMULATION[x.dtype], device=x.device)


def row_placeholder(score: Score, lse: Maybe) -> Maybe:
    """For hw.explain: a row statistic, without its values."""
    if lse is not None or not score.has_row_statistic:
        return lse
    return score.q.new_empty((2, *score.row_shape), dtype=ACCUMULATION[score.q.dtype])
