# SPDX-License-Identifier: Apache-2.0
"""hw.column_stats: how much attention every key receives.

The gradient of the sums needs no kernel of its own. With gamma their cotangent:

    d_r = P gamma (forward, v := gamma)    d_q, d_k: backward with v := gamma, d_w := r, D = r d_r
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..._autograd import Saved, apart, first_order
from ..._errors import (
    describe,
    fail,
    require_dense,
    require_flag,
    require_same_device,
    require_sizes,
)
from ..._native import (
    ACCUMULATION,
    NATIVE_CALLS,
    Maybe,
    NativeCall,
    as_written,
    backend_for,
    route,
)
from ...reference import attention as reference
from . import _native as native
from . import _operators as operators
from ._autograd import per_query_head, returned, score_gradients, zeros
from ._checks import broadcast, cast, check_inputs
from ._native import Want
from ._operators import NUMBERS
from ._score import TENSORS, Score, ScoreOptions, check_lse, reference_options, score_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

_OP = "column_stats"
_KINDS = ("sum", "mean", "max")


def column_stats(
    q: Tensor,
    k: Tensor,
    *,
    lse: Tensor | None = None,
    kind: str = "sum",
    row_weight: Tensor | None = None,
    reduce_heads: bool = False,
    out: Tensor | None = None,
    backend: str = "auto",
    **options: Unpack[ScoreOptions],
) -> Tensor:
    r"""How much attention every key receives.

    .. math::
        \mathrm{sum}_j = \sum_i r_i p_{ij} \qquad
        \mathrm{mean}_j = \mathrm{sum}_j / n_j \qquad
        \mathrm{max}_j = \max_i p_{ij}

    with n_j the number of rows that see key j (for causal Sq = Sk, Sk - j).

    Args:
        q: [B, Sq, Hq, D].
        k: [B, Sk, H, D], with Hq a multiple of H.
        lse: [B, Hq, Sq] of the same q, k and options; computed here if None. See
            hw.attention_transpose.
        kind: "sum", "mean" or "max".
        row_weight: r [B|1, H|1, Sq], not with "max".
        reduce_heads: over the heads as well: their sum, mean or maximum.
        out: takes the result in: it is added to `out` ("max": the larger of both is kept), in
            place, and `out` is returned. A running score over calls, without another tensor.
        backend: as in hw.attention.
        options: the score options of hw.attention.

    Returns:
        [B, Hq, Sk], or [B, Sk] with reduce_heads; float32 (float64 for float64 inputs), also
        0 for a key that no row sees. "sum" and "mean" are differentiable once, in q, k,
        row_weight and the tensors among the options.

    Raises:
        as hw.attention_transpose; ValueError for an unknown kind, row_weight with "max", an `out`
        of another shape.

    Example:
        >>> import torch, headworks as hw
        >>> q, k = torch.randn(2, 1, 100, 4, 64)
        >>> received = hw.column_stats(q, k, is_causal=True, kind="mean")
        >>> received.shape, hw.column_stats(q, k).sum(-1).round()[0]
        (torch.Size([1, 4, 100]), tensor([100., 100., 100., 100.]))
    """
    score, lse, row_weight = _checked(q, k, lse, kind, row_weight, options)
    require_flag(_OP, "reduce_heads", reduce_heads)
    if out is not None:
        _check_out(out, score, reduce_heads)
    backend = backend_for(_OP, backend, score.q)
    if backend == "reference":
        with as_written(score.q):
            result = reference.column_stats(
                score.q, score.k, lse=lse, kind=kind, row_weight=row_weight,
                reduce_heads=reduce_heads, **reference_options(_OP, score),
            )  # fmt: skip
    else:
        result = _column_stats(score, lse, kind, row_weight, reduce_heads, backend)
    if out is None:
        return result
    return out.copy_(torch.maximum(out, result)) if kind == "max" else out.add_(result)


def _column_stats(
    score: Score, lse: Maybe, kind: str, row_weight: Maybe, reduce_heads: bool, backend: str
) -> Tensor:
    largest = kind == "max"
    way = route(_OP, (*score.tensors, row_weight, lse))
    if largest:
        score, way = score.detached(), "operator" if way == "autograd" else way
    result: Any
    if way == "autograd":
        result = _sum(*apart(*score.tensors, row_weight, lse, *score.numbers, backend))
    else:
        row = operators.row_statistic(score, backend) if lse is None else lse
        call = native.columns if way == "direct" else operators.columns
        made = call(score, None, row, row_weight, not largest, largest, backend)
        result = made.max if largest else made.sum
    if reduce_heads:
        # Weights are never negative: where there is no head, 0 is the maximum.
        result = torch.nn.functional.pad(result, (0, 0, 0, 1)).amax(1) if largest else result.sum(1)
    if kind != "mean":
        return result  # type: ignore[no-any-return]
    heads = max(score.q.shape[2], 1) if reduce_heads else 1
    return result / (rows_seeing(score) * heads)  # type: ignore[no-any-return]


def rows_seeing(score: Score) -> Tensor:
    """[Sk]: how many rows see each key, from the shapes; at least 1, to divide by."""
    q, k = score.q, score.k
    key = torch.arange(k.shape[1], device=q.device)
    rows: Any = q.shape[1]
    keys: Any = k.shape[1]
    if score.cu_seqlens_q is not None and score.cu_seqlens_k is not None:
        n = torch.searchsorted(score.cu_seqlens_k.contiguous(), key, right=True)  # sequence + 1
        first = score.cu_seqlens_k[n - 1]
        rows = score.cu_seqlens_q[n] - score.cu_seqlens_q[n - 1]
        keys, key = score.cu_seqlens_k[n] - first, key - first
    row = key - (keys - rows)  # the one whose diagonal is at the key
    right = 0 if score.causal else score.right
    begin = torch.zeros_like(key) if right < 0 else (row - right).clamp(min=0)
    last = row + score.left if score.left >= 0 else torch.zeros_like(key) + rows - 1
    end = torch.minimum(last + 1, torch.zeros_like(key) + rows)
    return (end - begin).clamp(min=1)


class _ColumnSum(torch.autograd.Function):
    """(Score's tensors, row_weight, lse or None, Score's numbers, backend) -> sums.

    The backward pass of 16-bit inputs runs on fp32 copies: gamma, r and the sums are fp32. Tensor
    cores do not take these; after sm80 the CUDA cores do it.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        tensors, (row_weight, lse) = arguments[:TENSORS], arguments[TENSORS:][:2]
        *numbers, backend = arguments[TENSORS + 2 :]
        score = Score(*tensors, *numbers)
        row = operators.row_statistic(score, backend) if lse is None else lse
        total: Tensor = operators.columns(score, None, row, row_weight, True, False, backend).sum
        ctx.save_for_backward(*tensors, row_weight, row)
        ctx.numbers, ctx.backend = numbers, backend
        return total

    @staticmethod
    @first_order(_OP)
    def backward(ctx: Any, saved: Saved, gamma: Tensor) -> tuple[Maybe, ...]:
        *tensors, row_weight, row = saved
        own = Score(*tensors, *ctx.numbers)
        dtype = gamma.dtype
        score = own._replace(
            q=own.q.to(dtype),
            k=per_query_head(own.k, own.q.shape[2]).to(dtype),
            bias=None if own.bias is None else own.bias.to(dtype),
        )
        v = gamma.transpose(1, 2)[..., None]  # [B, Sk, Hq, 1]
        backend = ctx.backend.replace("sm80", "simt")
        w = operators.forward(score, v, None, None, None, Want(skip_dead=False), backend).o
        assert w is not None
        d_weight = w[..., 0].transpose(1, 2)  # [B, Hq, Sq]
        grads: tuple[Maybe, ...] = (None,) * TENSORS
        if any(ctx.needs_input_grad[:TENSORS]):
            r = gamma.new_ones(()).expand(own.row_shape) if row_weight is None else row_weight
            d_w = r.transpose(1, 2)[..., None]
            delta = zeros(gamma, *own.row_shape) if row is None else r * d_weight
            want = score_gradients(ctx.needs_input_grad)
            made = operators.backward(score, v, d_w, row, delta, want, backend)
            grads = returned(own, made, ctx.needs_input_grad, row, delta)
        wanted = d_weight if ctx.needs_input_grad[TENSORS] else None
        return *grads, wanted, *(None,) * (NUMBERS + 2)


_sum: Callable[..., Tensor] = _ColumnSum.apply


def _checked(
    q: Tensor, k: Tensor, lse: Maybe, kind: object, row_weight: Maybe, options: Any
) -> tuple[Score, Maybe, Maybe]:
    """The arguments cast and validated: score, lse, row_weight in full shape."""
    q, k = cast(q, k)
    check_inputs(_OP, q, k)
    if kind not in _KINDS:
        fail(ValueError, _OP, "kind", repr(kind), f"one of {', '.join(_KINDS)}", "Choose one.")
    score = score_of(_OP, q, k, **options)
    lse = check_lse(_OP, lse, score)
    if row_weight is None:
        return score, lse, None
    if kind == "max":
        fail(
            ValueError,
            _OP,
            'row_weight with kind="max"',
            describe(row_weight),
            "None",
            "Weights belong to sums and means.",
        )
    r = broadcast(_OP, "row_weight", row_weight, "[B|1, H|1, Sq]", score.row_shape, 0b011, q)
    return score, lse, r


def _check_out(out: object, score: Score, reduce_heads: bool) -> None:
    batch, _, keys = score.key_shape
    sizes, layout = ((batch, keys), "[B, Sk]") if reduce_heads else (score.key_shape, "[B, H, Sk]")
    dtype = ACCUMULATION[score.q.dtype]
    if not isinstance(out, Tensor) or out.dtype != dtype:
        fail(TypeError, _OP, "out", describe(out), f"a tensor of {dtype}", "Results are that.")
    require_dense(_OP, "out", out)
    require_sizes(_OP, layout, "out", out, sizes)
    require_same_device(_OP, "q", score.q, out=out)


def _native_call(
    q: Tensor,
    k: Tensor,
    *,
    lse: Maybe = None,
    kind: str = "sum",
    row_weight: Maybe = None,
    reduce_heads: bool = False,
    out: Maybe = None,
    backend: str = "auto",
    **options: Any,
) -> NativeCall:
    score, lse, r = _checked(q, k, lse, kind, row_weight, options)
    backend = backend_for(_OP, backend, score.q)
    largest = kind == "max"
    row = native.row_placeholder(score, lse)
    return native.columns_call(score, None, row, r, not largest, largest, backend)


NATIVE_CALLS[column_stats] = _native_call
