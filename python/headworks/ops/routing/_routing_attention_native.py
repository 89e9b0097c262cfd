# SPDX-License-Identifier: Apache-2.0
"""The native calls of attention by lists, csrc/ops/routing_attention/routing_attention.h.

    forward     o, w, row statistic, read-outs of the rows
    backward    gradients, from d_w and the row statistic

and the torch operators routing_attention_fwd and routing_attention_bwd around them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._functions import Maybe, NativeFunction
from ..._native import ACCUMULATION, NativeCall, define, described, fixed_arity, is_direct
from ..._repeated import Ready
from .._operands import check_operands, require, require_given
from ..attention._native import Want, WantGrad, gradients
from ..attention._operators import check_score
from ..attention._score import TENSORS, Score
from ._grid import Grid

FORWARD = NativeFunction("routing_attention.forward")
BACKWARD = NativeFunction("routing_attention.backward")

# Regions side by side, height and width of a region and of the image (csrc/core/regions.h).
RegionGrid = tuple[int, int, int, int, int]
_GRID = ("columns", "height", "width", "image_height", "image_width")
_FLAGS = ("by_slot", "pad_keys", "mask_self", "mean_eps")
_NUMBERS = (*(f"row_{name}" for name in _GRID), *(f"key_{name}" for name in _GRID), *_FLAGS)


class Routing(NamedTuple):
    """Who attends to whom. Lists [B, Hq, G, N] of regions; grids say what a region is."""

    rows: Tensor
    keys: Maybe  # None: all keys
    row_grid: RegionGrid
    key_grid: RegionGrid
    by_slot: bool = False
    pad_keys: bool = False
    mask_self: bool = False
    mean_eps: float = 0.0
    covers: bool = True  # every row is in a list

    @property
    def numbers(self) -> dict[str, Any]:
        """Those of the native call, by name."""
        _, _, rows, keys, *flags, _covers = self
        return dict(zip(_NUMBERS, (*rows, *keys, *flags), strict=True))

    @property
    def slots(self) -> int:
        """G Wq"""
        _, height, width, _, _ = self.row_grid
        return self.rows.shape[2] * self.rows.shape[3] * height * width


def sequence_grid(tokens: int) -> RegionGrid:
    """Regions of one token."""
    return max(tokens, 1), 1, 1, 1, tokens


def image_grid(grid: Grid, image: tuple[int, int]) -> RegionGrid:
    """The regions of an image [Y, X]."""
    return grid.columns, grid.height, grid.width, *image


for _function in (FORWARD, BACKWARD):
    _function.begins_with((*Score._fields[:TENSORS], "rows", "keys"), Score._fields[TENSORS:])

# Results of a forward call; None for what is not wanted. row: as in attention's.
Forward = FORWARD.Outputs


def outputs(score: Score, v: Tensor, routing: Routing, want: Want) -> Any:
    """Unfilled."""
    q, dtype = score.q, ACCUMULATION[score.q.dtype]
    batch, tokens, heads, _ = q.shape
    rows = routing.slots if routing.by_slot else tokens
    made = {"o": q.new_empty((batch, tokens, heads, v.shape[3]))}
    if want.w:
        made["w"] = q.new_empty((batch, rows, heads, v.shape[3]))
    if want.row:
        made["row"] = q.new_empty((2, batch, heads, rows), dtype=dtype)
    for name in ("entropy", "p_max", "sq_norm"):
        if getattr(want, name):
            made[name] = q.new_empty((batch, heads, rows), dtype=dtype)
    return Forward(**made)


def forward(
    score: Score, v: Tensor, gate: Maybe, routing: Routing, want: Want, backend: str
) -> Any:
    """routing_attention.forward, as Forward. By slot, w and row are wanted."""
    made = outputs(score, v, routing, want)
    empty = _empty(score, routing)
    leaves = _leaves_rows(routing, backend)
    if empty or leaves:
        for x in made:
            if x is not None:
                x.zero_()
    if made.row is not None and empty:
        made.row[0] = score.lse_without_keys
    elif made.row is not None and leaves:
        made.row.select(0, 0).fill_(torch.inf)  # of rows without weight
    if not empty:
        numbers = _forward_numbers(score, routing)
        FORWARD.run(backend, _forward_inputs(score, v, gate, routing), made, numbers)
    return made


def _forward_inputs(score: Score, v: Tensor, gate: Maybe, routing: Routing) -> tuple[Maybe, ...]:
    first = (*score.tensors, routing.rows, routing.keys)
    return FORWARD.tensors(first, v=v, head_gate=gate)


def _forward_numbers(score: Score, routing: Routing) -> tuple[Any, ...]:
    return FORWARD.numbers(score.numbers, skip_dead=False, **routing.numbers)


def ready(
    score: Score,
    v: Tensor,
    gate: Maybe,
    routing: Routing,
    lists: tuple[Tensor, ...],
    backend: str,
) -> Ready | None:
    """`forward` for o alone, as a function of q, k, v, the gate if there is one, and those of the
    routing's lists that are named. None for a call that is empty, or whose native call does not
    write all rows."""
    if _empty(score, routing) or _leaves_rows(routing, backend):
        return None
    by_slot = routing.by_slot
    made = outputs(score, v, routing, Want(by_slot, by_slot, skip_dead=False))
    given, numbers = _forward_inputs(score, v, gate, routing), _forward_numbers(score, routing)
    tensors = (score.q, score.k, v, *(() if gate is None else (gate,)), *lists)
    return Ready(FORWARD, backend, given, made, numbers, tensors)


def forward_call(
    score: Score, v: Tensor, gate: Maybe, routing: Routing, want: Want, backend: str
) -> NativeCall:
    """The call that `forward` makes, for hw.explain."""
    inputs, numbers = _forward_inputs(score, v, gate, routing), _forward_numbers(score, routing)
    return described(FORWARD, backend, inputs, outputs(score, v, routing, want), numbers)


def backward(
    score: Score, v: Tensor, routing: Routing, want: Any, backend: str, **others: Maybe
) -> Any:
    """routing_attention.backward, its outputs; `others` are d_w, row, delta, slots and factor.

    `factor` [B, Sq, Hq]: what d_w is to be multiplied by still, where takes_factor().
    """
    made = gradients(score, v, want)
    if _empty(score, routing):
        for x in made:
            if x is not None:
                x.zero_()
        return made
    for x in (made.d_q, made.d_row_temperature):
        if x is not None and _leaves_rows(routing, backend):
            x.zero_()
    if made.d_bias is not None:  # of bias's own shape: the kernel adds into it
        made.d_bias.zero_()
    inputs = BACKWARD.tensors((*score.tensors, routing.rows, routing.keys), v=v, **others)
    BACKWARD.run(backend, inputs, made, BACKWARD.numbers(score.numbers, **routing.numbers))
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


def _split(
    function: NativeFunction, arguments: tuple[Any, ...]
) -> tuple[Score, Routing, tuple[Any, ...], list[Any]]:
    """Score, routing, the other inputs, what follows the numbers."""
    inputs, numbers, (covers, *rest) = function.split(arguments)
    score = Score(*inputs[:TENSORS], *numbers[:NUMBERS])
    named = dict(zip((a.name for a in function.scalars), numbers, strict=True))
    row, key = (tuple(named[f"{side}_{name}"] for name in _GRID) for side in ("row", "key"))
    rows, keys, *others = inputs[TENSORS:]
    flags = {name: named[name] for name in _FLAGS}
    routing = Routing(rows, keys, row, key, covers=covers, **flags)
    return score, routing, tuple(others), rest


def _checked(
    op: str, function: NativeFunction, arguments: tuple[Any, ...]
) -> tuple[Score, Routing, tuple[Any, ...], list[Any]]:
    """The same, of tensors, numbers and grids that belong together."""
    score, routing, others, rest = _split(function, arguments)
    q, k, v = score.q, score.k, others[0]
    slots, grids = None, (routing.row_grid, routing.key_grid)
    for name, x, (*regions, height, width) in zip("qk", (q, k), grids, strict=True):
        require(op, f"regions of {name}", regions, min(regions) > 0, "sizes of at least 1")
        image = f"an image of {height} x {width}"
        fits = height * width == x.shape[1]
        require(op, f"regions of {name}", image, fits, f"{x.shape[1]} tokens")
    if routing.rows.dim() == 4:
        slots = routing.slots
    known = {"Results": slots if routing.by_slot and slots is not None else q.shape[1]}
    check_operands(op, function.inputs, arguments[: len(function.inputs)], **known)
    check_score(op, score)
    require(op, "cu_seqlens_q", "a tensor", score.cu_seqlens_q is None, "None")
    require(op, "keys", "None", routing.keys is not None or not routing.by_slot, "a tensor by slot")
    require(op, "v", "None", v is not None, "a tensor")
    require(op, "v", "width 0", v.shape[3] > 0, "a width of at least 1")
    return score, routing, others, rest


def _want(w: bool, row: bool, entropy: bool, p_max: bool, sq_norm: bool) -> Want:
    return Want(w, row, entropy, p_max, sq_norm, skip_dead=False)


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    op = "routing_attention_fwd"
    score, routing, (v, gate, *absent), (*want, backend) = _checked(op, FORWARD, arguments)
    require(op, "identity_mix, mass_keys", absent, not any(x is not None for x in absent), "None")
    both = not routing.by_slot or (want[0] and want[1])
    require(op, "want_w, want_row", want[:2], both, "True by slot")
    return fixed_arity(forward(score, v, gate, routing, _want(*want), backend), score.q)


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    score, routing, (v, *_), (*want, _backend) = _split(FORWARD, arguments)
    return fixed_arity(outputs(score, v, routing, _want(*want)), score.q)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    op = "routing_attention_bwd"
    score, routing, others, (*want, backend) = _checked(op, BACKWARD, arguments)
    v, d_w, row, delta, slots, factor = others
    by_slot = routing.by_slot
    require_given(op, row=(row, True), delta=(delta, not by_slot), slots=(slots, by_slot))
    taken = factor is None or takes_factor(d_w, backend)
    require(op, "factor", "a tensor", taken, "None with this backend")
    made = backward(
        score, v, routing, WantGrad(*want), backend, d_w=d_w, row=row, delta=delta, slots=slots,
        factor=factor,
    )  # fmt: skip
    return fixed_arity(made, score.q)


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    score, _routing, (v, *_), (*want, _backend) = _split(BACKWARD, arguments)
    return fixed_arity(gradients(score, v, WantGrad(*want)), score.q)


def _flags(names: Sequence[str]) -> str:
    return ", ".join(["bool covers", *(f"bool want_{name}" for name in names)])


define(FORWARD.schema("routing_attention_fwd", _flags(Want._fields[:-1])), _forward, _forward_fake)
define(
    BACKWARD.schema("routing_attention_bwd", _flags(WantGrad._fields)), _backward, _backward_fake
)


def forward_operator(
    score: Score, v: Tensor, gate: Maybe, routing: Routing, want: Want, backend: str
) -> Any:
    """`forward`, through the dispatcher where somebody records or replaces operations: it gives
    empty tensors for what is not wanted."""
    if is_direct((*score.tensors, v, gate, routing.rows, routing.keys)):
        return forward(score, v, gate, routing, want, backend)
    made = torch.ops.headworks.routing_attention_fwd(
        *_forward_inputs(score, v, gate, routing), *_forward_numbers(score, routing),
        routing.covers, *want[:-1], backend,
    )  # fmt: skip
    return Forward(*made)


def backward_operator(
    score: Score, v: Tensor, routing: Routing, want: Any, backend: str, **others: Maybe
) -> Any:
    """`backward`, likewise, with `others` by name."""
    if is_direct((*score.tensors, routing.rows, routing.keys, v, *others.values())):
        return backward(score, v, routing, want, backend, **others)
    inputs = BACKWARD.tensors((*score.tensors, routing.rows, routing.keys), v=v, **others)
    numbers = BACKWARD.numbers(score.numbers, **routing.numbers)
    made = torch.ops.headworks.routing_attention_bwd(
        *inputs, *numbers, routing.covers, *want, backend
    )
    return BACKWARD.Outputs(*made)
