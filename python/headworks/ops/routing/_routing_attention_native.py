# SPDX-License-Identifier: Apache-2.0
"""The native calls of attention by lists, csrc/ops/routing_attention/routing_attention.h.

    forward     o, w, row statistic, read-outs of the rows
    backward    gradients, from d_w and the row statistic

and the torch operators routing_attention_fwd and routing_attention_bwd around them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._native import ACCUMULATION, Maybe, NativeCall, define, fixed_arity, run
from .._operands import Operand, check_operands, operands, require, require_given
from ..attention._native import Want, WantGrad, gradients
from ..attention._native import resolved as resolved_score
from ..attention._operators import check_score
from ..attention._score import TENSORS, Score
from ._grid import Grid

# columns, height, width, rows of the image, columns of the image
Cells = tuple[int, int, int, int, int]


class Routing(NamedTuple):
    """Who attends to whom. Lists [B, Hq, G, N] of blocks; cells say what a block is."""

    rows: Tensor
    keys: Maybe  # None: all keys
    row_cells: Cells
    key_cells: Cells
    by_slot: bool = False
    pad_keys: bool = False
    mask_self: bool = False
    mean_eps: float = 0.0
    covers: bool = True  # every row is in a list

    @property
    def numbers(self) -> tuple[Any, ...]:
        """In the order of the native call."""
        return (
            *self.row_cells,
            *self.key_cells,
            self.by_slot,
            self.pad_keys,
            self.mask_self,
            self.mean_eps,
        )

    @property
    def slots(self) -> int:
        """G Wq"""
        _, height, width, _, _ = self.row_cells
        return self.rows.shape[2] * self.rows.shape[3] * height * width


def sequence_cells(tokens: int) -> Cells:
    """Cells of one token: a block is a token."""
    return max(tokens, 1), 1, 1, 1, tokens


def image_cells(grid: Grid, image: tuple[int, int]) -> Cells:
    """The regions of an image [Y, X]."""
    return grid.columns, grid.height, grid.width, *image


class Forward(NamedTuple):
    """Results of a forward call; None for what is not wanted. row: as in _attention_native."""

    o: Tensor
    w: Maybe
    row: Maybe
    entropy: Maybe
    p_max: Maybe
    sq_norm: Maybe


def outputs(score: Score, v: Tensor, routing: Routing, want: Want) -> Forward:
    """Unfilled."""
    q, dtype = score.q, ACCUMULATION[score.q.dtype]
    batch, tokens, heads, _ = q.shape
    rows = routing.slots if routing.by_slot else tokens
    o = q.new_empty((batch, tokens, heads, v.shape[3]))
    w = q.new_empty((batch, rows, heads, v.shape[3])) if want.w else None
    asked = (want.entropy, want.p_max, want.sq_norm)
    row = q.new_empty((2, batch, heads, rows), dtype=dtype) if want.row else None
    return Forward(
        o, w, row, *(q.new_empty((batch, heads, rows), dtype=dtype) if x else None for x in asked)
    )


def forward(
    score: Score, v: Tensor, gate: Maybe, routing: Routing, want: Want, backend: str
) -> Forward:
    """routing_attention.forward. By slot, w and row are wanted."""
    made = outputs(score, v, routing, want)
    empty = _empty(score, routing)
    leaves = _leaves_rows(routing, backend)
    if empty or leaves:
        for x in made:
            if x is not None:
                x.zero_()
    if made.row is not None and (empty or leaves):  # of rows without weight
        made.row[0].fill_(-torch.inf if empty else torch.inf)
    if not empty:
        run("routing_attention.forward", backend, *_forward_call(score, v, gate, routing, made))
    return made


def _forward_call(
    score: Score, v: Tensor, gate: Maybe, routing: Routing, made: Forward
) -> tuple[list[Maybe], tuple[float, ...]]:
    tensors, numbers = resolved_score(score)
    lists = routing.rows, routing.keys
    return _forward_tensors(*lists, tensors, v, gate, made), (*routing.numbers, *numbers, False)


def _forward_tensors(
    rows: Tensor,
    keys: Maybe,
    of_score: Sequence[Maybe],
    v: Tensor,
    gate: Maybe,
    made: Sequence[Maybe],
) -> list[Maybe]:
    """In the order of the native call; `made` as in Forward."""
    return [
        rows,
        keys,
        *of_score,
        v,
        gate,
        None,
        None,
        *made,
        None,
    ]  # no mix, no mass_keys; no mass


def prepared(
    score: Score, v: Tensor, routing: Routing, backend: str
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """`forward` for o alone, as a function of other q, k, v and keys of the same shapes and dtype.

    All else is made ready now; for calls that are not empty and whose lists cover the rows.
    """
    assert routing.covers and not routing.by_slot and not _empty(score, routing)
    rows, size = routing.rows, (*score.q.shape[:3], v.shape[3])
    numbers = (*routing.numbers, *resolved_score(score)[1], False)
    none: tuple[Maybe, ...] = (None,) * (TENSORS - 2)  # of a score that is nothing but q and k
    no_others: tuple[Maybe, ...] = (None,) * (len(Forward._fields) - 1)

    def call(q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
        o = q.new_empty(size)
        tensors = _forward_tensors(rows, keys, (q, k, *none), v, None, (o, *no_others))
        run("routing_attention.forward", backend, tensors, numbers)
        return o

    return call


def forward_call(
    score: Score, v: Tensor, gate: Maybe, routing: Routing, want: Want, backend: str
) -> NativeCall:
    """The call that `forward` makes, for hw.explain."""
    made = outputs(score, v, routing, want)
    tensors, numbers = _forward_call(score, v, gate, routing, made)
    return "routing_attention.forward", backend, [*tensors, None], numbers


def backward(
    score: Score,
    v: Tensor,
    d_w: Tensor,
    row: Tensor,
    delta: Maybe,
    slots: Maybe,
    factor: Maybe,
    routing: Routing,
    want: WantGrad,
    backend: str,
) -> tuple[Maybe, ...]:
    """routing_attention.backward: d_q d_k d_v d_bias d_key_bias d_key_gain d_row_temperature.

    `factor` [B, Sq, Hq]: what d_w is to be multiplied by still, where takes_factor().
    """
    made = gradients(score, v, want)
    if _empty(score, routing):
        for x in made:
            if x is not None:
                x.zero_()
        return made
    d_q, _, _, d_bias, _, _, d_temperature = made
    for x in (d_q, d_temperature):
        if x is not None and _leaves_rows(routing, backend):
            x.zero_()
    if d_bias is not None:  # of bias's own shape: the kernel adds into it, whatever is broadcast
        d_bias = d_bias.zero_().expand(*score.row_shape, score.k.shape[1])
    tensors, numbers = resolved_score(score)
    tensors = [routing.rows, routing.keys, slots, factor, *tensors, v, d_w, row, delta]
    tensors += (*made[:3], d_bias, *made[4:])
    run("routing_attention.backward", backend, tensors, (*routing.numbers, *numbers))
    return made


def takes_factor(d_w: Tensor, backend: str) -> bool:
    """Whether `backward` multiplies d_w by a factor on its way."""
    return backend == "cpu" and d_w.dtype == ACCUMULATION[d_w.dtype]


def _leaves_rows(routing: Routing, backend: str) -> bool:
    """Rows in no list are not written by the native call."""
    clears = routing.by_slot or (routing.keys is None and backend == "cpu")
    return not (routing.covers or clears)


def _empty(score: Score, routing: Routing) -> bool:
    """No row sees a key."""
    lists = (routing.rows,) if routing.keys is None else (routing.rows, routing.keys)
    return not all(x.numel() for x in (score.q, score.k, *lists))


# ---- Operators ----------------------------------------------------------------------------------

NUMBERS = len(Score._fields) - TENSORS
CELLS = 5


def _cells(which: str) -> str:
    """One by one: torch.jit.trace records no lists of symbolic integers."""
    sizes = ("columns", "height", "width", "image_height", "image_width")
    return ", ".join(f"SymInt {which}_{size}" for size in sizes)


_LISTS = "Tensor rows, Tensor? keys"
_SCORE = (
    "Tensor q, Tensor k, Tensor? bias, Tensor? key_bias, Tensor? key_gain,"
    " Tensor? row_temperature, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k"
)
_NUMBERS = (
    "float scale, float softcap, bool causal, SymInt left, SymInt right, int activation,"
    " int normalizer, SymInt gain_begin, SymInt gain_end, SymInt max_q, SymInt max_k,"
    f" {_cells('row')}, {_cells('key')}, bool by_slot, bool pad_keys, bool mask_self,"
    " float mean_eps, bool covers"
)


def _unpacked(arguments: tuple[Any, ...], others: int) -> tuple[Score, Routing, tuple[Any, ...]]:
    """Score, routing, and the other arguments."""
    tensors, rest = arguments[:TENSORS], arguments[TENSORS:]
    (rows, keys), rest = rest[:2], rest[2:]
    middle, rest = rest[:others], rest[others:]
    score = Score(*tensors, *rest[:NUMBERS])
    rest = rest[NUMBERS:]
    cells, rest = (rest[:CELLS], rest[CELLS : 2 * CELLS]), rest[2 * CELLS :]
    flags = len(Routing._fields) - 4
    return score, Routing(rows, keys, *cells, *rest[:flags]), (*middle, *rest[flags:])


def packed(score: Score, routing: Routing, *others: Any) -> tuple[Any, ...]:
    """The first arguments of an operator."""
    cells = *routing.row_cells, *routing.key_cells
    return *score.tensors, routing.rows, routing.keys, *others, *score.numbers, *cells, *routing[4:]


_LISTED = operands(
    q="input B Sq Hq D", k="input B Sk H D", bias="input B? Hq? Sq? Sk?",
    key_bias="statistic B Hq Sk", key_gain="statistic B Hq Sk",
    row_temperature="statistic B Sq Hq", cu_seqlens_q="index N+1", cu_seqlens_k="index N+1",
    rows="index B Hq G Nq", keys="index B Hq G Nk", v="input B Sk H Dv",
)  # fmt: skip
_OF_FORWARD = _LISTED + operands(head_gate="statistic B Sq Hq")
_OF_BACKWARD = _LISTED + operands(
    d_w="input B Sq Hq Dv", row="statistic 2 B Hq Rows", delta="statistic B Hq Sq",
    slots="input B Rows Hq Dv", factor="statistic B Sq Hq",
)  # fmt: skip


def _check(
    op: str, given: Sequence[Operand], tensors: Sequence[Any], score: Score, routing: Routing
) -> None:
    """Tensors, numbers and cells belong together."""
    q, k, v = tensors[0], tensors[1], tensors[TENSORS + 2]
    slots, cells = None, (routing.row_cells, routing.key_cells)
    for name, x, (*cell, height, width) in zip("qk", (q, k), cells, strict=True):
        require(op, f"cells of {name}", cell, min(cell) > 0, "sizes of at least 1")
        image = f"an image of {height} x {width}"
        require(op, f"cells of {name}", image, height * width == x.shape[1], f"{x.shape[1]} tokens")
    if routing.rows.dim() == 4:
        slots = routing.slots
    known = {"Rows": slots if routing.by_slot and slots is not None else q.shape[1]}
    check_operands(op, given, tensors, **known)
    check_score(op, score)
    require(op, "cu_seqlens_q", "a tensor", score.cu_seqlens_q is None, "None")
    require(op, "keys", "None", routing.keys is not None or not routing.by_slot, "a tensor by slot")
    require(op, "v", "width 0", v.shape[3] > 0, "a width of at least 1")


def _want(w: bool, row: bool, entropy: bool, p_max: bool, sq_norm: bool) -> Want:
    return Want(w, row, entropy, p_max, sq_norm, skip_dead=False)


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    op = "routing_attention_fwd"
    score, routing, (v, gate, *want, backend) = _unpacked(arguments, 2)
    _check(op, _OF_FORWARD, arguments[: TENSORS + 4], score, routing)
    both = not routing.by_slot or (want[0] and want[1])
    require(op, "want_w, want_row", want[:2], both, "True by slot")
    return fixed_arity(forward(score, v, gate, routing, _want(*want), backend), score.q)


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    score, routing, (v, _gate, *want, _backend) = _unpacked(arguments, 2)
    return fixed_arity(outputs(score, v, routing, _want(*want)), score.q)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    score, routing, (v, d_w, row, delta, slots, factor, *want, backend) = _unpacked(arguments, 6)
    op = "routing_attention_bwd"
    _check(op, _OF_BACKWARD, arguments[: TENSORS + 8], score, routing)
    require_given(op, delta=(delta, not routing.by_slot), slots=(slots, routing.by_slot))
    taken = factor is None or takes_factor(d_w, backend)
    require(op, "factor", "a tensor", taken, "None with this backend")
    wanted = WantGrad(True, want[0], want[1], False, want[2])
    made = backward(score, v, d_w, row, delta, slots, factor, routing, wanted, backend)
    return fixed_arity(made, score.q)


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    score, _routing, (v, _d_w, _row, _delta, _slots, _factor, *want, _backend) = _unpacked(
        arguments, 6
    )
    made = gradients(score, v, WantGrad(True, want[0], want[1], False, want[2]))
    return fixed_arity(made, score.q)


define(
    f"routing_attention_fwd({_SCORE}, {_LISTS}, Tensor v, Tensor? head_gate, {_NUMBERS},"
    " bool want_w, bool want_row, bool want_entropy, bool want_p_max, bool want_sq_norm,"
    " str backend)"
    " -> (Tensor o, Tensor w, Tensor row, Tensor entropy, Tensor p_max, Tensor sq_norm)",
    _forward,
    _forward_fake,
)
define(
    f"routing_attention_bwd({_SCORE}, {_LISTS}, Tensor v, Tensor d_w, Tensor row, Tensor? delta,"
    f" Tensor? slots, Tensor? factor, {_NUMBERS}, bool want_bias, bool want_key_bias,"
    " bool want_row_temperature, str backend)"
    " -> (Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_bias, Tensor d_key_bias, Tensor d_key_gain,"
    " Tensor d_row_temperature)",
    _backward,
    _backward_fake,
)
