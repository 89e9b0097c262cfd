# SPDX-License-Identifier: Apache-2.0
"""The native calls of the attention family as torch operators, with their fake kernels.

    attention_fwd  attention_bwd  attention_columns  attention_probs

each take the tensors of a Score, other tensors, the numbers of the Score, flags and a backend, and
give an empty tensor for what is not asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._native import Maybe, define, fixed_arity
from .._operands import check_operands, operands, require, require_given
from . import _native as native
from ._bounds import check_rows_have_values
from ._checks import ACTIVATIONS, NORMALIZERS
from ._native import Forward, Want, WantGrad
from ._score import TENSORS, Score

NUMBERS = len(Score._fields) - TENSORS


def _unpacked(arguments: tuple[Any, ...], others: int) -> tuple[Score, tuple[Any, ...]]:
    """(score, the other arguments)."""
    first = TENSORS + others
    score = Score(*arguments[:TENSORS], *arguments[first : first + NUMBERS])
    return score, arguments[TENSORS:first] + arguments[first + NUMBERS :]


_OF_SCORE = operands(
    q="input B Sq Hq D", k="input B Sk H D", bias="input B? Hq? Sq? Sk?",
    key_bias="statistic B Hq Sk", key_gain="statistic B Hq Sk",
    row_temperature="statistic B Sq Hq", cu_seqlens_q="index N+1", cu_seqlens_k="index N+1",
)  # fmt: skip
_OF_FORWARD = _OF_SCORE + operands(
    v="input B Sk H Dv", head_gate="statistic B Sq Hq", identity_mix="statistic B Hq",
    mass_keys="statistic B Hq Sk",
)  # fmt: skip
_OF_BACKWARD = _OF_SCORE + operands(
    v="input B Sk H Dv", d_w="input B Sq Hq Dv", row="statistic + B Hq Sq",
    delta="statistic B Hq Sq",
)  # fmt: skip
_OF_COLUMNS = _OF_SCORE + operands(
    x="input B Sq Hq Dx", row="statistic + B Hq Sq", row_weight="statistic B Hq Sq"
)
_OF_PROBS = _OF_SCORE + operands(
    row="statistic + B Hq Sq", keys="index B n", rows="index B n", offsets="index n"
)


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


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    op = "attention_fwd"
    check_operands(op, _OF_FORWARD, arguments[: TENSORS + 4])
    score, (v, gate, mix, mass_keys, *want, backend) = _unpacked(arguments, 4)
    check_score(op, score)
    require(
        op, "v", "None", v is not None or gate is mix is mass_keys is None,
        "a tensor for head_gate, identity_mix and mass",
    )  # fmt: skip
    require(op, "v", "width 0", v is None or v.shape[3] > 0, "a width of at least 1")
    tokens = score.q.shape[1], score.k.shape[1]
    require(op, "Sq and Sk with identity_mix", tokens, mix is None or tokens[0] == tokens[1], "one")
    if mix is not None:
        check_rows_have_values(op, score.cu_seqlens_q, score.cu_seqlens_k)
    made = native.forward(score, v, gate, mix, mass_keys, Want(*want), backend)
    return fixed_arity(made, score.q)


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    score, (v, _gate, _mix, mass_keys, *want, _backend) = _unpacked(arguments, 4)
    return fixed_arity(native.outputs(score, v, mass_keys, Want(*want)), score.q)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    op = "attention_bwd"
    check_operands(op, _OF_BACKWARD, arguments[: TENSORS + 4])
    score, (v, d_w, row, delta, *want, backend) = _unpacked(arguments, 4)
    check_score(op, score)
    require_given(op, row=(row, score.has_row_statistic))
    require(op, "v", "width 0", v.shape[3] > 0, "a width of at least 1")
    return fixed_arity(
        native.backward(score, v, d_w, row, delta, WantGrad(*want), backend), score.q
    )


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    score, (v, _d_w, _row, _delta, *want, _backend) = _unpacked(arguments, 4)
    return fixed_arity(native.gradients(score, v, WantGrad(*want)), score.q)


def _columns(*arguments: Any) -> tuple[Tensor, ...]:
    op = "attention_columns"
    check_operands(op, _OF_COLUMNS, arguments[: TENSORS + 3])
    score, (x, row, row_weight, total, largest, backend) = _unpacked(arguments, 3)
    check_score(op, score)
    require_given(op, row=(row, score.has_row_statistic))
    require(op, "x", "width 0", x is None or x.shape[3] > 0, "a width of at least 1")
    return fixed_arity(native.columns(score, x, row, row_weight, total, largest, backend), score.q)


def _columns_fake(*arguments: Any) -> tuple[Tensor, ...]:
    score, (x, _row, _row_weight, total, largest, _backend) = _unpacked(arguments, 3)
    return fixed_arity(native.column_outputs(score, x, total, largest), score.q)


def _probs(*arguments: Any) -> Tensor:
    op = "attention_probs"
    check_operands(op, _OF_PROBS, arguments[: TENSORS + 4])
    score, rest = _unpacked(arguments, 4)
    check_score(op, score)
    require_given(op, row=(rest[0], score.has_row_statistic))
    chosen = sum(x is not None for x in rest[1:4])
    require(op, "the number of keys, rows and offsets", chosen, chosen == 1, "1")
    return native.probs(score, *rest)


def _probs_fake(*arguments: Any) -> Tensor:
    score, (_row, keys, rows, offsets, _backend) = _unpacked(arguments, 4)
    return native.probs_output(score, keys, rows, offsets)


_TENSORS = (
    "Tensor q, Tensor k, Tensor? bias, Tensor? key_bias, Tensor? key_gain,"
    " Tensor? row_temperature, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k"
)
_NUMBERS = (
    "float scale, float softcap, bool causal, SymInt left, SymInt right, int activation,"
    " int normalizer, SymInt gain_begin, SymInt gain_end, SymInt max_q, SymInt max_k"
)

define(
    f"attention_fwd({_TENSORS}, Tensor? v, Tensor? head_gate, Tensor? identity_mix,"
    f" Tensor? mass_keys, {_NUMBERS}, bool want_w, bool want_row, bool want_entropy,"
    " bool want_p_max, bool want_sq_norm, bool skip_dead, str backend)"
    " -> (Tensor o, Tensor w, Tensor row, Tensor entropy, Tensor p_max, Tensor sq_norm,"
    " Tensor mass)",
    _forward,
    _forward_fake,
)
define(
    f"attention_bwd({_TENSORS}, Tensor v, Tensor d_w, Tensor? row, Tensor delta, {_NUMBERS},"
    " bool want_v, bool want_bias, bool want_key_bias, bool want_key_gain,"
    " bool want_row_temperature, str backend) -> (Tensor d_q, Tensor d_k, Tensor d_v,"
    " Tensor d_bias, Tensor d_key_bias, Tensor d_key_gain, Tensor d_row_temperature)",
    _backward,
    _backward_fake,
)
define(
    f"attention_columns({_TENSORS}, Tensor? x, Tensor? row, Tensor? row_weight, {_NUMBERS},"
    " bool want_sum, bool want_max, str backend) -> (Tensor y, Tensor sum, Tensor max)",
    _columns,
    _columns_fake,
)
define(
    f"attention_probs({_TENSORS}, Tensor? row, Tensor? keys, Tensor? rows, Tensor? offsets,"
    f" {_NUMBERS}, str backend) -> Tensor",
    _probs,
    _probs_fake,
)


def forward(score: Score, *others: Any) -> Forward:
    """native.forward through the dispatcher; empty tensors for what is not wanted."""
    v, gate, mix, mass_keys, want, backend = others
    made = torch.ops.headworks.attention_fwd(
        *score.tensors, v, gate, mix, mass_keys, *score.numbers, *want, backend
    )
    return Forward(*made)


def backward(score: Score, *others: Any) -> tuple[Tensor, ...]:
    """native.backward through the dispatcher."""
    v, d_w, row, delta, want, backend = others
    made: tuple[Tensor, ...] = torch.ops.headworks.attention_bwd(
        *score.tensors, v, d_w, row, delta, *score.numbers, *want, backend
    )
    return made


def row_statistic(score: Score, way: str, backend: str) -> Maybe:
    """What later passes need of every row, [2, B, Hq, Sq], from a pass over the scores."""
    if not score.has_row_statistic:
        return None
    call = native.forward if way == "direct" else forward
    return call(score, None, None, None, None, Want(row=True, skip_dead=False), backend).row


def columns(score: Score, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    """native.columns through the dispatcher."""
    x, row, row_weight, total, largest, backend = others
    y, sums, maxima = torch.ops.headworks.attention_columns(
        *score.tensors, x, row, row_weight, *score.numbers, total, largest, backend
    )
    return y, sums, maxima


def probs(score: Score, *others: Any) -> Tensor:
    """native.probs through the dispatcher."""
    *tensors, backend = others
    p: Tensor = torch.ops.headworks.attention_probs(
        *score.tensors, *tensors, *score.numbers, backend
    )
    return p
