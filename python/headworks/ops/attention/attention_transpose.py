# SPDX-License-Identifier: Apache-2.0
"""hw.attention_transpose: y = P^T x.

Its gradient needs no kernel of its own. With G the cotangent of y:

    d_x = P G (forward, v := G)        d_q, d_k: backward with v := G, d_w := x, D = <x, d_x>
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..._autograd import Saved, apart, first_order
from ..._native import (
    ACCUMULATION,
    NATIVE_CALLS,
    Maybe,
    NativeCall,
    as_written,
    backend_for,
    route,
    widen,
)
from ...reference import attention as reference
from . import _native as native
from . import _operators as operators
from ._autograd import (
    per_query_head,
    returned,
    score_gradients,
    zeros,
)
from ._checks import cast, check_inputs, check_values
from ._native import Want
from ._operators import NUMBERS
from ._score import TENSORS, Score, ScoreOptions, check_lse, reference_options, score_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

_OP = "attention_transpose"


def attention_transpose(
    q: Tensor,
    k: Tensor,
    x: Tensor,
    *,
    lse: Tensor | None = None,
    backend: str = "auto",
    **options: Unpack[ScoreOptions],
) -> Tensor:
    r"""Attention in reverse: every row hands out x along its weights, and keys collect.

    .. math:: y_j = \sum_i p_{ij} x_i

    The weights are normalized over the keys, as always; what a key collects is not.

    Args:
        q: [B, Sq, Hq, D].
        k: [B, Sk, H, D], with Hq a multiple of H.
        x: [B, Sq, Hq, Dx], any Dx, of the same dtype.
        lse: [B, Hq, Sq], what hw.attention or hw.attention_lse gave for the same q, k and
            options; computed here if None. Of an lse from other inputs only the shape can be
            checked. No gradient flows to it: q and k get theirs in full, as if it were made here.
        backend: as in hw.attention.
        options: the score options of hw.attention.

    Returns:
        y [B, Sk, Hq, Dx] in the dtype of x. Differentiable once, in q, k, x and the tensors among
        the options.

    Raises:
        as hw.attention; ValueError for an lse of another shape or with an activation without lse.

    Source: Ding et al., "Visual Dependency Transformers", CVPR 2023, arXiv 2304.03282.

    Example:
        >>> import torch, headworks as hw
        >>> q, k, x = torch.randn(3, 1, 100, 4, 64)
        >>> y = hw.attention_transpose(q, k, x)
        >>> y.shape, torch.allclose(y.sum(1), x.sum(1), atol=1e-4)
        (torch.Size([1, 100, 4, 64]), True)
    """
    score, x, lse = _checked(q, k, x, lse, options)
    backend = backend_for(_OP, backend, score.q)
    if backend == "reference":
        with as_written(score.q):
            return reference.attention_transpose(
                score.q, score.k, x, lse=lse, **reference_options(_OP, score)
            )
    width = x.shape[3]
    if not width:
        x = widen(x)
    way = route(_OP, (*score.tensors, x, lse))
    if way == "autograd":
        y = _differentiable(*apart(*score.tensors, x, lse, *score.numbers, backend))
    else:
        row = operators.row_statistic(score, backend) if lse is None else lse
        call = native.columns if way == "direct" else operators.columns
        y = call(score, x, row, None, False, False, backend).y
    return y if width else y[..., :0]


class _Transpose(torch.autograd.Function):
    """(Score's tensors, x, lse or None, Score's numbers, backend) -> y."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        tensors, (x, lse) = arguments[:TENSORS], arguments[TENSORS:][:2]
        *numbers, backend = arguments[TENSORS + 2 :]
        score = Score(*tensors, *numbers)
        row = operators.row_statistic(score, backend) if lse is None else lse
        y: Tensor = operators.columns(score, x, row, None, False, False, backend).y
        ctx.save_for_backward(*tensors, x, row)
        ctx.numbers, ctx.backend = numbers, backend
        return y

    @staticmethod
    @first_order(_OP)
    def backward(ctx: Any, saved: Saved, g: Tensor) -> tuple[Maybe, ...]:
        *tensors, x, row = saved
        own = Score(*tensors, *ctx.numbers)
        score = own._replace(k=per_query_head(own.k, own.q.shape[2]))
        d_x = operators.forward(score, g, None, None, None, Want(skip_dead=False), ctx.backend).o
        assert d_x is not None
        grads: tuple[Maybe, ...] = (None,) * TENSORS
        if any(ctx.needs_input_grad[:TENSORS]):
            want = score_gradients(ctx.needs_input_grad)
            delta = zeros(x, *own.row_shape, dtype=ACCUMULATION[x.dtype])
            if row is not None:
                delta = operators.row_dot(x, d_x, ctx.backend).transpose(1, 2)
            made = operators.backward(score, g, x, row, delta, want, ctx.backend)
            grads = returned(own, made, ctx.needs_input_grad, row, delta)
        return *grads, d_x, *(None,) * (NUMBERS + 2)


_differentiable: Callable[..., Tensor] = _Transpose.apply


def _checked(
    q: Tensor, k: Tensor, x: Tensor, lse: Maybe, options: Any
) -> tuple[Score, Tensor, Maybe]:
    """The arguments cast and validated."""
    q, k, x = cast(q, k, x)
    check_inputs(_OP, q, k)
    check_values(_OP, "x", x, "[B, Sq, Hq, Dx]", q.shape[:3], q)
    score = score_of(_OP, q, k, **options)
    return score, x, check_lse(_OP, lse, score)


def _native_call(
    q: Tensor, k: Tensor, x: Tensor, *, lse: Maybe = None, backend: str = "auto", **options: Any
) -> NativeCall:
    score, x, lse = _checked(q, k, x, lse, options)
    backend = backend_for(_OP, backend, score.q)
    return native.columns_call(
        score, x, native.row_placeholder(score, lse), None, False, False, backend
    )


NATIVE_CALLS[attention_transpose] = _native_call
