# SPDX-License-Identifier: Apache-2.0
"""What decides the scores: the options that attention and all its companions share."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypedDict

from torch import Tensor

from ..._errors import (
    describe,
    fail,
    require_dense,
    require_flag,
    require_number,
    require_same_device,
    require_sizes,
)
from ..._native import ACCUMULATION, Maybe, autocast, autocasts
from ._bounds import Bounds, check_bounds, check_same_number, check_values
from ._checks import (
    ACTIVATIONS,
    LAST_ROW,
    NORMALIZERS,
    SOFTMAXES,
    Rows,
    broadcast,
    check_activation,
    check_bias,
    check_gain_rows,
    check_softcap,
    check_window,
    reject_unknown,
    require_softmax,
)


class ScoreOptions(TypedDict, total=False):
    """The score options of hw.attention, which has their meaning and defaults."""

    is_causal: bool
    window_size: tuple[int | None, int | None] | None
    scale: float | None
    softcap: float
    cu_seqlens_q: Bounds | None
    cu_seqlens_k: Bounds | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    bias: Tensor | None
    key_bias: Tensor | None
    key_gain: Tensor | None
    gain_rows: Rows | None
    row_temperature: Tensor | None
    activation: str
    normalizer: str | None


class Score(NamedTuple):
    """q, k and the options, validated: first the tensors, then the numbers of a native call.

    The optional tensors have the full shapes of csrc/softmax/params.h, expanded; only
    bias keeps its own shape, with four dimensions. gain_begin, gain_end and the longest lengths
    are as given (-1: not given) until `native.resolved`, where lengths are known.
    """

    q: Tensor
    k: Tensor
    bias: Maybe = None
    key_bias: Maybe = None
    key_gain: Maybe = None
    row_temperature: Maybe = None
    cu_seqlens_q: Maybe = None
    cu_seqlens_k: Maybe = None
    scale: float = 1.0
    softcap: float = 0.0
    causal: bool = False
    left: int = -1
    right: int = -1
    activation: int = 0
    normalizer: int = 0
    gain_begin: int = 0
    gain_end: int = LAST_ROW
    max_q: int = -1
    max_k: int = -1

    @property
    def tensors(self) -> tuple[Maybe, ...]:
        return self[:TENSORS]  # type: ignore[return-value]

    @property
    def numbers(self) -> tuple[Any, ...]:
        return self[TENSORS:]

    @property
    def has_row_statistic(self) -> bool:
        """Whether later passes need a number per row: lse, or the sum that normalizes it."""
        return self.activation in SOFTMAXES or self.normalizer == NORMALIZERS["sum"]

    @property
    def row_shape(self) -> tuple[int, int, int]:
        """[B, Hq, Sq]"""
        return self.q.shape[0], self.q.shape[2], self.q.shape[1]

    @property
    def key_shape(self) -> tuple[int, int, int]:
        """[B, Hq, Sk]"""
        return self.q.shape[0], self.q.shape[2], self.k.shape[1]

    @property
    def lse_without_keys(self) -> float | Tensor:
        """L of rows that see no key, of the softmaxes; as far as it broadcasts to [B, Hq, Sq]."""
        return -math.inf if self.activation == ACTIVATIONS["softmax"] else 0.0

    def detached(self) -> Score:
        """The same score without gradient."""
        tensors: Any = (None if x is None else x.detach() for x in self.tensors)
        return Score(*tensors, *self.numbers)


TENSORS = 8


def score_of(
    op: str,
    q: Tensor,
    k: Tensor,
    *,
    is_causal: bool = False,
    window_size: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    cu_seqlens_q: Bounds | None = None,
    cu_seqlens_k: Bounds | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    key_gain: Tensor | None = None,
    gain_rows: Rows | None = None,
    row_temperature: Tensor | None = None,
    activation: str = "softmax",
    normalizer: str | None = None,
    **unknown: Any,
) -> Score:
    """The score of inputs that check_inputs has passed."""
    if unknown:
        reject_unknown(op, unknown)
    scale, softcap, causal, left, right = shape_of(op, q, is_causal, window_size, scale, softcap)
    a = n = 0
    if activation != "softmax" or normalizer is not None:
        a, n = check_activation(op, activation, normalizer)

    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    bounds_q = bounds_k = None
    max_q = max_k = -1
    if packed or max_seqlen_q is not None or max_seqlen_k is not None:
        bounds_q, max_q = check_bounds(op, "q", cu_seqlens_q, max_seqlen_q, q, packed)
        bounds_k, max_k = check_bounds(op, "k", cu_seqlens_k, max_seqlen_k, k, packed)
        if bounds_q is not None and bounds_k is not None:
            check_same_number(op, bounds_q, bounds_k)

    begin, end = 0, LAST_ROW
    if gain_rows is not None:
        begin, end = check_gain_rows(op, gain_rows, key_gain is not None, packed)
    per_key = (q.shape[0], q.shape[2], k.shape[1])
    if key_bias is not None:
        key_bias = broadcast(op, "key_bias", key_bias, "[B|1, H|1, Sk]", per_key, 0b011, q)
    if key_gain is not None:
        key_gain = broadcast(op, "key_gain", key_gain, "[B|1, H|1, Sk]", per_key, 0b011, q)
    if row_temperature is not None:
        per_row = (q.shape[0], q.shape[1], q.shape[2])
        row_temperature = broadcast(
            op, "row_temperature", row_temperature, "[B|1, Sq, H|1]", per_row, 0b101, q
        )
    if bias is not None:
        bias, key_bias = _check_bias(op, bias, key_bias, packed, q, k)
    return Score(
        q, k, bias, key_bias, key_gain, row_temperature, bounds_q, bounds_k,
        scale, softcap, causal, left, right, a, n, begin, end, max_q, max_k,
    )  # fmt: skip


def shape_of(
    op: str,
    q: Tensor,
    is_causal: bool,
    window_size: tuple[int | None, int | None] | None,
    scale: float | None,
    softcap: float,
) -> tuple[float, float, bool, int, int]:
    """scale, softcap, causal, left, right of a Score, validated."""
    if type(is_causal) is not bool:
        require_flag(op, "is_causal", is_causal)  # type: ignore[unreachable]
    left, right = check_window(op, is_causal, window_size)
    if scale is None:
        scale = float(q.shape[3] ** -0.5)
    elif type(scale) is not float or not -math.inf < scale < math.inf:
        scale = require_number(op, "scale", scale)
    if type(softcap) is not float or not 0.0 <= softcap < math.inf:
        softcap = check_softcap(op, softcap)
    return scale, softcap, is_causal, left, right


def _check_bias(
    op: str, bias: Tensor, key_bias: Maybe, packed: bool, q: Tensor, k: Tensor
) -> tuple[Maybe, Maybe]:
    """(bias, key_bias): a bias that is the same for all rows is one of the keys."""
    if packed:
        fail(
            ValueError,
            op,
            "bias with packed sequences",
            f"of shape {list(bias.shape)}" if isinstance(bias, Tensor) else "given",
            "None: a bias of all pairs has no packed form",
            "Use key_bias [1, H|1, total], or a padded batch.",
        )
    if autocasts(q) and isinstance(bias, Tensor):
        (bias,) = autocast(bias)
    bias = check_bias(op, bias, q, k)
    if bias.shape[2] != 1:
        return bias, key_bias
    sizes = (q.shape[0], q.shape[2], k.shape[1])
    same = broadcast(op, "bias", bias[:, :, 0], "[B|1, H|1, 1, Sk|1]", sizes, 0b111, q)
    return None, same if key_bias is None else same + key_bias


def check_lse(op: str, lse: object, score: Score) -> Maybe:
    """A given lse, without gradient."""
    if lse is None:
        return None
    require_softmax(op, "lse", "given", score.activation)
    dtype = ACCUMULATION[score.q.dtype]
    if not isinstance(lse, Tensor) or lse.dtype != dtype:
        fail(
            TypeError,
            op,
            "lse",
            describe(lse),
            f"a tensor of {dtype}",
            "Pass what hw.attention_lse or hw.attention gave for the same q, k and options.",
        )
    require_dense(op, "lse", lse)
    require_sizes(op, "[B, Hq, Sq]", "lse", lse, score.row_shape)
    require_same_device(op, "q", score.q, lse=lse)
    return lse.detach()


def check_values_of_bounds(op: str, score: Score) -> None:
    """What can be checked of cu_seqlens where they lie on the CPU."""
    check_values(op, "q", score.cu_seqlens_q, score.max_q, score.q.shape[1])
    check_values(op, "k", score.cu_seqlens_k, score.max_k, score.k.shape[1])


def reference_options(op: str, score: Score) -> dict[str, Any]:
    """The score as keyword arguments of headworks.reference.attention."""
    check_values_of_bounds(op, score)
    left, right = (None if n < 0 else n for n in (score.left, score.right))
    return {
        "is_causal": score.causal,
        "window_size": (left, right),
        "scale": score.scale,
        "softcap": score.softcap,
        "cu_seqlens_q": score.cu_seqlens_q,
        "cu_seqlens_k": score.cu_seqlens_k,
        "bias": score.bias,
        "key_bias": score.key_bias,
        "key_gain": score.key_gain,
        "gain_rows": (score.gain_begin, score.gain_end),
        "row_temperature": score.row_temperature,
        "activation": list(ACTIVATIONS)[score.activation],
        "normalizer": list(NORMALIZERS)[score.normalizer],
    }
