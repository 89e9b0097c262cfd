# SPDX-License-Identifier: Apache-2.0
"""hw.attention_lse: the log-sum-exp of attention's scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..._autograd import Saved, apart, first_order
from ..._native import (
    NATIVE_CALLS,
    Maybe,
    NativeCall,
    as_written,
    backend_for,
    route,
)
from ..._repeated import Ready, Repeated
from ...reference import attention as reference
from . import _native as native
from . import _operators as operators
from ._autograd import returned, score_gradients, zeros
from ._checks import cast, check_inputs, require_softmax
from ._native import Want
from ._operators import NUMBERS
from ._score import Score, ScoreOptions, reference_options, score_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

_OP = "attention_lse"


def attention_lse(
    q: Tensor, k: Tensor, *, backend: str = "auto", **options: Unpack[ScoreOptions]
) -> Tensor:
    r"""The log-sum-exp of the scores of every row, without values: half the work of attention.

    .. math::
        L_i = \log \sum_j e^{s_{ij}} \quad \text{(softmax1: } \log (1 + \sum_j e^{s_{ij}})
        \text{; a sink: } \log (e^{z} + \sum_j e^{s_{ij}}) \text{)}

    Args:
        q: [B, Sq, Hq, D].
        k: [B, Sk, H, D].
        backend: as in hw.attention.
        options: the score options of hw.attention.

    Returns:
        L [B, Hq, Sq], base e, float32 (float64 for float64 inputs); -inf (with a sink z) for a
        row that sees no key. Differentiable once.

    Raises:
        as hw.attention; ValueError for an activation that has no lse.

    Example:
        >>> import torch, headworks as hw
        >>> q, k = torch.randn(2, 1, 100, 4, 64)
        >>> hw.attention_lse(q, k, is_causal=True).shape
        torch.Size([1, 4, 100])
    """
    key = _repeated.key((q, k), tuple(options.items()), backend)
    if (ready := _repeated.get(key)) is not None:
        return ready(q, k)[0]
    score = _checked(q, k, options)
    backend = backend_for(_OP, backend, score.q)
    if backend == "reference":
        with as_written(q):
            return reference.attention_lse(score.q, score.k, **reference_options(_OP, score))
    way = route(_OP, score.tensors)
    if way == "autograd":
        return _differentiable(*apart(*score, backend))
    _repeated.offer(key, native.ready_row, score, backend)
    row = operators.row_statistic(score, backend)
    assert row is not None
    return row[0]


_repeated: Repeated[Ready] = Repeated(_OP)  # of q and k: the row statistic, [2, B, Hq, Sq]


def _checked(q: Tensor, k: Tensor, options: Any) -> Score:
    q, k = cast(q, k)
    check_inputs(_OP, q, k)
    score = score_of(_OP, q, k, **options)
    require_softmax(_OP, "the log-sum-exp", "asked for", score.activation)
    return score


class _LogSumExp(torch.autograd.Function):
    """(Score's tensors and numbers, backend) -> L. Its gradient is that of values 0."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *score_arguments, backend = arguments
        score = Score(*score_arguments)
        row = operators.row_statistic(score, backend)
        assert row is not None
        ctx.save_for_backward(*score.tensors, row)
        ctx.numbers, ctx.backend = score.numbers, backend
        return row[0]

    @staticmethod
    @first_order(_OP)
    def backward(ctx: Any, saved: Saved, d_lse: Tensor) -> tuple[Maybe, ...]:
        *tensors, row = saved
        score = Score(*tensors, *ctx.numbers)
        v = zeros(score.k, *score.k.shape[:3], 1)
        d_w = zeros(score.q, *score.q.shape[:3], 1)
        want = score_gradients(ctx.needs_input_grad)
        delta = -d_lse
        made = operators.backward(score, v, d_w, row, delta, want, ctx.backend)
        grads = returned(score, made, ctx.needs_input_grad, row, delta)
        return *grads, *(None,) * (NUMBERS + 1)


_differentiable: Callable[..., Tensor] = _LogSumExp.apply


def _native_call(q: Tensor, k: Tensor, *, backend: str = "auto", **options: Any) -> NativeCall:
    score = _checked(q, k, options)
    want = Want(row=True, skip_dead=False)
    backend = backend_for(_OP, backend, score.q)
    return native.forward_call(score, None, None, None, None, want, backend)


NATIVE_CALLS[attention_lse] = _native_call
