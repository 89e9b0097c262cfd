# SPDX-License-Identifier: Apache-2.0
"""The native calls of the attention family as torch operators, with their fake kernels.

    attention_fwd  attention_bwd  attention_columns  attention_probs

each take the tensors of a Score, other tensors, the numbers of the Score, flags and a backend, and
give an empty tensor for what is not asked for. attention_row_dot takes two tensors and a backend.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..._functions import Maybe, NativeFunction
from ..._native import define, fixed_arity, is_direct
from .._operands import check_operands, require, require_given
from . import _native as native
from ._bounds import check_rows_have_values
from ._checks import ACTIVATIONS, NORMALIZERS
from ._native import BACKWARD, COLUMNS, FORWARD, PROBS, ROW_DOT, Want, WantGrad
from ._score import TENSORS, Score

NUMBERS = len(Score._fields) - TENSORS


def _of_score(inputs: tuple[Any, ...], numbers: tuple[Any, ...]) -> tuple[Score, Any]:
    """(score, the other inputs)."""
    return Score(*inputs[:TENSORS], *numbers[:NUMBERS]), inputs[TENSORS:]


def check_score(op: str, score: Score) -> None:
    """What the shapes of a Score's tensors do not say."""
    packed = score.cu_seqlens_q is not None
    require_given(op, cu_seqlens_k=(score.cu_seqlens_k, packed))
    require(op, "B with cu_seqlens", score.q.shape[0], not packed or score.q.shape[0] == 1, "1")
    require(op, "bias with cu_seqlens", "a tensor", not packed or score.bias is None, "None")
    for name, number, known in (
        ("activation", score.activation, ACTIVATIONS),
        ("normalizer", score.normalizer, NORMALIZERS),
    ):
        require(op, name, number, 0 <= number < len(known), f"0 to {len(known) - 1}")


def _checked(op: str, function: NativeFunction, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Score, the other inputs, the other numbers, what follows them; tensors that fit."""
    inputs, numbers, rest = function.split(arguments)
    check_operands(op, function.inputs, inputs)
    score, others = _of_score(inputs, numbers)
    check_score(op, score)
    return score, others, numbers[NUMBERS:], rest


def _split(function: NativeFunction, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same, unchecked."""
    inputs, numbers, rest = function.split(arguments)
    score, others = _of_score(inputs, numbers)
    return score, others, numbers[NUMBERS:], rest


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    op = "attention_fwd"
    score, (v, gate, mix, mass_keys), (skip,), (*want, backend) = _checked(op, FORWARD, arguments)
    require(
        op, "v", "None", v is not None or gate is mix is mass_keys is None,
        "a tensor for head_gate, identity_mix and mass",
    )  # fmt: skip
    require(op, "v", "width 0", v is None or v.shape[3] > 0, "a width of at least 1")
    tokens = score.q.shape[1], score.k.shape[1]
    require(op, "Sq and Sk with identity_mix", tokens, mix is None or tokens[0] == tokens[1], "one")
    if mix is not None:
        check_rows_have_values(op, score.cu_seqlens_q, score.cu_seqlens_k)
    made = native.forward(
        score, v, gate, mix, mass_keys, Want(*want)._replace(skip_dead=skip), backend
    )
    return fixed_arity(made, score.q)


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    score, (v, *_, mass_keys), (skip,), (*want, _backend) = _split(FORWARD, arguments)
    return fixed_arity(
        native.outputs(score, v, mass_keys, Want(*want)._replace(skip_dead=skip)), score.q
    )


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    op = "attention_bwd"
    score, (v, d_w, row, delta), _, (*want, backend) = _checked(op, BACKWARD, arguments)
    require_given(op, row=(row, score.has_row_statistic), delta=(delta, True))
    require(op, "v", "width 0", v.shape[3] > 0, "a width of at least 1")
    made = native.backward(score, v, d_w, row, delta, WantGrad(*want), backend)
    return fixed_arity(made, score.q)


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    score, (v, *_), _, (*want, _backend) = _split(BACKWARD, arguments)
    return fixed_arity(native.gradients(score, v, WantGrad(*want)), score.q)


def _columns(*arguments: Any) -> tuple[Tensor, ...]:
    op = "attention_columns"
    score, others, _, (total, largest, backend) = _checked(op, COLUMNS, arguments)
    x, row, row_weight = others
    require_given(op, row=(row, score.has_row_statistic))
    require(op, "x", "width 0", x is None or x.shape[3] > 0, "a width of at least 1")
    return fixed_arity(native.columns(score, x, row, row_weight, total, largest, backend), score.q)


def _columns_fake(*arguments: Any) -> tuple[Tensor, ...]:
    score, (x, *_), _, (total, largest, _backend) = _split(COLUMNS, arguments)
    return fixed_arity(native.column_outputs(score, x, total, largest), score.q)


def _probs(*arguments: Any) -> Tensor:
    op = "attention_probs"
    score, (row, *chosen), _, (backend,) = _checked(op, PROBS, arguments)
    require_given(op, row=(row, score.has_row_statistic))
    given = sum(x is not None for x in chosen)
    require(op, "the number of keys, rows and offsets", given, given == 1, "1")
    keys, rows, offsets = chosen
    return native.probs(score, row, keys, rows, offsets, backend)


def _probs_fake(*arguments: Any) -> Tensor:
    score, (_row, *chosen), *_ = _split(PROBS, arguments)
    return native.probs_output(score, *chosen)


def _row_dot(x: Tensor, y: Tensor, backend: str) -> Tensor:
    check_operands("attention_row_dot", ROW_DOT.inputs, (x, y))
    return native.row_dot(x, y, backend)


def _row_dot_fake(x: Tensor, _y: Tensor, _backend: str) -> Tensor:
    return native.row_dot_output(x)


def _flags(names: Iterable[str]) -> str:
    return ", ".join(f"bool want_{name}" for name in names)


define(FORWARD.schema("attention_fwd", _flags(Want._fields[:-1])), _forward, _forward_fake)
define(BACKWARD.schema("attention_bwd", _flags(WantGrad._fields)), _backward, _backward_fake)
define(COLUMNS.schema("attention_columns", _flags(("sum", "max"))), _columns, _columns_fake)
define(PROBS.schema("attention_probs"), _probs, _probs_fake)
define(ROW_DOT.schema("attention_row_dot"), _row_dot, _row_dot_fake)


# The native calls, through the dispatcher where somebody records or replaces operations. It gives
# empty tensors for what is not wanted.


def forward(score: Score, *others: Any) -> Any:
    """native.forward"""
    v, gate, mix, mass_keys, want, backend = others
    if is_direct((*score.tensors, v, gate, mix, mass_keys)):
        return native.forward(score, *others)
    inputs = FORWARD.tensors(
        score.tensors, v=v, head_gate=gate, identity_mix=mix, mass_keys=mass_keys
    )
    numbers = FORWARD.numbers(score.numbers, skip_dead=want.skip_dead)
    made = torch.ops.headworks.attention_fwd(*inputs, *numbers, *want[:-1], backend)
    return FORWARD.Outputs(*made)


def backward(score: Score, *others: Any) -> Any:
    """native.backward"""
    v, d_w, row, delta, want, backend = others
    if is_direct((*score.tensors, v, d_w, row, delta)):
        return native.backward(score, *others)
    inputs = BACKWARD.tensors(score.tensors, v=v, d_w=d_w, row=row, delta=delta)
    made = torch.ops.headworks.attention_bwd(*inputs, *score.numbers, *want, backend)
    return BACKWARD.Outputs(*made)


def row_statistic(score: Score, backend: str) -> Maybe:
    """What later passes need of every row, [2, B, Hq, Sq], from a pass over the scores."""
    if not score.has_row_statistic:
        return None
    want = Want(row=True, skip_dead=False)
    row: Tensor = forward(score, None, None, None, None, want, backend).row
    return row


def columns(score: Score, *others: Any) -> Any:
    """native.columns"""
    x, row, row_weight, total, largest, backend = others
    if is_direct((*score.tensors, x, row, row_weight)):
        return native.columns(score, *others)
    inputs = COLUMNS.tensors(score.tensors, x=x, row=row, row_weight=row_weight)
    made = torch.ops.headworks.attention_columns(*inputs, *score.numbers, total, largest, backend)
    return COLUMNS.Outputs(*made)


def probs(score: Score, row: Maybe, keys: Maybe, rows: Maybe, offsets: Maybe, backend: str) -> Any:
    """native.probs"""
    if is_direct((*score.tensors, row, keys, rows, offsets)):
        return native.probs(score, row, keys, rows, offsets, backend)
    inputs = PROBS.tensors(score.tensors, row=row, keys=keys, rows=rows, offsets=offsets)
    return torch.ops.headworks.attention_probs(*inputs, *score.numbers, backend)


def row_dot(x: Tensor, y: Tensor, backend: str) -> Tensor:
    """native.row_dot as [B, S, H]: of what is saved and of cotangents."""
    if is_direct((x, y)):
        return native.row_dot(x, y, backend).transpose(1, 2)
    dot: Tensor = torch.ops.headworks.attention_row_dot(x, y, backend)
    return dot.transpose(1, 2)
