# SPDX-License-Identifier: Apache-2.0
"""The native calls of hw.window_attention, csrc/ops/window_attention/window_attention.h.

    forward     o, and the row statistic [2, B, Hq, S] where wanted
    backward    d_q, d_k, d_v and the gradient of the table, from d_o and the row statistic

and the torch operators window_attention_fwd and window_attention_bwd around them. Images are
[B, S, H, D] here, S = Y X tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._functions import Maybe, NativeFunction
from ..._native import ACCUMULATION, NativeCall, define, described, empties, fixed_arity, is_direct
from ..._repeated import Ready
from .._operands import check_operands, require

FORWARD = NativeFunction("window_attention.forward")
BACKWARD = NativeFunction("window_attention.backward")


class Geometry(NamedTuple):
    """The numbers of a native call: scale; windows side by side, height and width of one; Y, X."""

    scale: float
    columns: int
    height: int
    width: int
    image_height: int
    image_width: int


FORWARD.begins_with(("q", "k", "bias_table", "v"), Geometry._fields)
BACKWARD.begins_with(("q", "k", "bias_table", "v"), Geometry._fields)


def _outputs(q: Tensor, v: Tensor, want_row: bool) -> Any:
    """Of FORWARD, unfilled."""
    batch, tokens, heads, _ = q.shape
    row = None
    if want_row:
        row = q.new_empty((2, batch, heads, tokens), dtype=ACCUMULATION[q.dtype])
    return FORWARD.Outputs(o=q.new_empty((batch, tokens, heads, v.shape[3])), row=row)


def _gradients(q: Tensor, k: Tensor, table: Maybe, v: Tensor, want_table: bool) -> Any:
    """Of BACKWARD, unfilled."""
    d_q, d_k, d_v = empties(q, k, v)
    d_table = None
    if want_table and table is not None:
        d_table = table.new_empty(table.shape, dtype=ACCUMULATION[q.dtype])
    return BACKWARD.Outputs(d_q=d_q, d_k=d_k, d_v=d_v, d_bias_table=d_table)


def forward(
    q: Tensor, k: Tensor, table: Maybe, v: Tensor, geometry: Geometry, want_row: bool, backend: str
) -> Any:
    """o and row, as outputs of FORWARD."""
    made = _outputs(q, v, want_row)
    if q.numel():
        FORWARD.run(backend, (q, k, table, v), made, geometry)
    return made


def ready(
    q: Tensor, k: Tensor, table: Maybe, v: Tensor, geometry: Geometry, backend: str
) -> Ready | None:
    """`forward` for o alone, as a function of q, k, v and the table if there is one; None for an
    empty image."""
    if not q.numel():
        return None
    tensors = (q, k, v) if table is None else (q, k, v, table)
    made = _outputs(q, v, False)
    return Ready(FORWARD, backend, (q, k, table, v), made, geometry, tensors)


def forward_call(
    q: Tensor, k: Tensor, table: Maybe, v: Tensor, geometry: Geometry, backend: str
) -> NativeCall:
    """The call that `forward` makes, for hw.explain."""
    return described(FORWARD, backend, (q, k, table, v), _outputs(q, v, False), geometry)


def backward(inputs: tuple[Maybe, ...], geometry: Geometry, want_table: bool, backend: str) -> Any:
    """Gradients, as outputs of BACKWARD, from its inputs in order."""
    q, k, table, v, *_ = inputs
    assert q is not None and k is not None and v is not None
    made = _gradients(q, k, table, v, want_table)
    if q.numel():
        BACKWARD.run(backend, inputs, made, geometry)
    elif made.d_bias_table is not None:
        made.d_bias_table.zero_()
    return made


# ---- Operators ----------------------------------------------------------------------------------


def _checked(op: str, function: NativeFunction, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Inputs that belong together, the geometry, what follows."""
    inputs, numbers, rest = function.split(arguments)
    geometry = Geometry(*numbers)
    _, columns, height, width, rows, image_width = geometry
    sizes = check_operands(op, function.inputs, inputs)
    windows = f"{columns} windows of {height} x {width} side by side"
    fits = height > 0 and width > 0 and columns == max(-(-image_width // max(width, 1)), 1)
    require(op, "windows", windows, fits, f"as many as an image {image_width} wide has")
    image = f"an image of {rows} x {image_width}"
    require(op, "sizes", image, rows * image_width == sizes["S"], f"{sizes['S']} tokens")
    bins = sizes.get("M", height * width)
    require(op, "bias_table", f"{bins} columns", bins == height * width, f"{height * width}")
    require(op, "v", "width 0", sizes["Dv"] > 0, "a width of at least 1")
    return inputs, geometry, rest


def _forward_operator(*arguments: Any) -> tuple[Tensor, ...]:
    op = "window_attention_fwd"
    (q, k, table, v), geometry, (want_row, backend) = _checked(op, FORWARD, arguments)
    return fixed_arity(forward(q, k, table, v, geometry, want_row, backend), q)


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    (q, _, _, v), _, (want_row, _) = FORWARD.split(arguments)
    return fixed_arity(_outputs(q, v, want_row), q)


def _backward_operator(*arguments: Any) -> tuple[Tensor, ...]:
    op = "window_attention_bwd"
    inputs, geometry, (want_table, backend) = _checked(op, BACKWARD, arguments)
    has_table = inputs[2] is not None
    require(op, "want_table", want_table, has_table or not want_table, "False without a table")
    return fixed_arity(backward(inputs, geometry, want_table, backend), inputs[0])


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    (q, k, table, v, *_), _, (want_table, _) = BACKWARD.split(arguments)
    return fixed_arity(_gradients(q, k, table, v, want_table), q)


define(FORWARD.schema("window_attention_fwd", "bool want_row"), _forward_operator, _forward_fake)
define(
    BACKWARD.schema("window_attention_bwd", "bool want_table"), _backward_operator, _backward_fake
)


def forward_operator(
    q: Tensor, k: Tensor, table: Maybe, v: Tensor, geometry: Geometry, want_row: bool, backend: str
) -> Any:
    """`forward`, through the dispatcher where somebody records or replaces operations."""
    if is_direct((q, k, table, v)):
        return forward(q, k, table, v, geometry, want_row, backend)
    call = torch.ops.headworks.window_attention_fwd
    return FORWARD.Outputs(*call(q, k, table, v, *geometry, want_row, backend))


def backward_operator(geometry: Geometry, want_table: bool, backend: str, **inputs: Maybe) -> Any:
    """`backward`, likewise, of inputs by name."""
    given = BACKWARD.tensors(**inputs)
    if is_direct(given):
        return backward(given, geometry, want_table, backend)
    call = torch.ops.headworks.window_attention_bwd
    return BACKWARD.Outputs(*call(*given, *geometry, want_table, backend))
