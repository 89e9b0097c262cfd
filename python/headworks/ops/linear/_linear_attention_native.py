# SPDX-License-Identifier: Apache-2.0
"""Linear attention as torch operators: the native calls, their fake kernels, the backward pass.

Order of tensors and scalars: csrc/ops/linear_attention/linear_attention.h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._autograd import Saved, first_order
from ..._native import ACCUMULATION, Maybe, define, empties, fixed_arity, run
from .._checks import check_cu_seqlens_values
from .._operands import check_operands, operands, require, require_given
from ._linear_attention_checks import FEATURE_MAPS, MAX_TAYLOR_DIM, OP, num_features

# feature map, causal, normalize, scale, eps
Scalars = tuple[int, bool, bool, float, float]


def outputs(
    q: Tensor, v: Tensor, bounds: Maybe, feature_map: int, final_state: bool, save_z: bool
) -> tuple[Tensor, Maybe, Maybe, Maybe]:
    """o, z, kv1, z1 unfilled; None for what is not asked for."""
    batch, tokens, query_heads, d = q.shape
    value_dim, device = v.shape[3], q.device
    o = torch.empty((batch, tokens, query_heads, value_dim), dtype=q.dtype, device=device)
    z = kv1 = z1 = None
    if save_z:
        shape: tuple[int, ...] = (batch, tokens, query_heads)
        z = torch.empty(shape, dtype=ACCUMULATION[q.dtype], device=device)
    if final_state:
        sequences = batch if bounds is None else bounds.shape[0] - 1
        shape = (sequences, v.shape[2], num_features(feature_map, d))
        kv1 = torch.empty((*shape, value_dim), dtype=ACCUMULATION[q.dtype], device=device)
        z1 = torch.empty(shape, dtype=ACCUMULATION[q.dtype], device=device)
    return o, z, kv1, z1


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv0: Maybe,
    z0: Maybe,
    bounds: Maybe,
    scalars: Scalars,
    final_state: bool,
    save_z: bool,
    backend: str,
) -> tuple[Tensor, Maybe, Maybe, Maybe]:
    """o, z, kv1, z1; None for what is not asked for. `bounds` is cu_seqlens as int64."""
    if bounds is not None:
        check_cu_seqlens_values(OP, "cu_seqlens", bounds, q.shape[1])
    o, z, kv1, z1 = outputs(q, v, bounds, scalars[0], final_state, save_z)
    tensors = [q, k, v, o, z, kv0, z0, kv1, z1, bounds]
    run("linear_attention.forward", backend, tensors, scalars)
    return o, z, kv1, z1


_QKV = operands(q="input B S Hq D", k="input B S H D", v="input B S H Dv")
_START = operands(kv0="statistic N H F Dv", z0="statistic N H F", cu_seqlens="index N+1")
_OF_FORWARD = _QKV + _START
_OF_BACKWARD = (
    operands(d_o="input B S Hq Dv", d_kv1="statistic N H F Dv", d_z1="statistic N H F")
    + _QKV
    + operands(o="input B S Hq Dv", z="statistic B S Hq")
    + _START
)


def known_sizes(op: str, q: Tensor, v: Tensor, bounds: Maybe, feature_map: int) -> dict[str, int]:
    """N and F, which follow from others; of arguments that can be asked for them."""
    d = q.shape[-1]
    require(op, "feature_map", feature_map, 0 <= feature_map < len(FEATURE_MAPS), "one there is")
    most = f"1 to {MAX_TAYLOR_DIM}" if feature_map == 0 else "at least 1"
    require(op, "D", d, 0 < d <= MAX_TAYLOR_DIM or (d > 0 and feature_map != 0), most)
    require(op, "v", "width 0", v.shape[-1] > 0, "a width of at least 1")
    if bounds is not None:
        shape = list(bounds.shape)
        require(op, "cu_seqlens", shape, len(shape) == 1 and shape[0] > 0, "[N + 1]")
        require(op, "B with cu_seqlens", q.shape[0], q.shape[0] == 1, "1")
    sequences = q.shape[0] if bounds is None else bounds.shape[0] - 1
    return {"N": sequences, "F": num_features(feature_map, d)}


def _forward(
    q: Tensor, k: Tensor, v: Tensor, kv0: Maybe, z0: Maybe, bounds: Maybe, *rest: Any
) -> tuple[Tensor, ...]:
    op = "linear_attention_fwd"
    *scalars, final_state, save_z, backend = rest
    known = known_sizes(op, q, v, bounds, scalars[0])
    check_operands(op, _OF_FORWARD, (q, k, v, kv0, z0, bounds), **known)
    require_given(op, z0=(z0, kv0 is not None))
    made = forward(q, k, v, kv0, z0, bounds, tuple(scalars), final_state, save_z, backend)
    return fixed_arity(made, q)


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, kv0: Maybe, z0: Maybe, bounds: Maybe, *rest: Any
) -> tuple[Tensor, ...]:
    feature_map, *_, final_state, save_z, _backend = rest
    return fixed_arity(outputs(q, v, bounds, feature_map, final_state, save_z), q)


def _backward(
    d_o: Tensor,
    d_kv1: Maybe,
    d_z1: Maybe,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    z: Maybe,
    kv0: Maybe,
    z0: Maybe,
    bounds: Maybe,
    *rest: Any,
) -> tuple[Tensor, ...]:
    op = "linear_attention_bwd"
    *scalars, state_grad, backend = rest
    known = known_sizes(op, q, v, bounds, scalars[0])
    given = (d_o, d_kv1, d_z1, q, k, v, o, z, kv0, z0, bounds)
    check_operands(op, _OF_BACKWARD, given, **known)
    require_given(op, z0=(z0, kv0 is not None), d_z1=(d_z1, d_kv1 is not None), z=(z, scalars[2]))
    require(op, "state_grad", state_grad, kv0 is not None or not state_grad, "False without kv0")
    if bounds is not None:
        check_cu_seqlens_values(OP, "cu_seqlens", bounds, q.shape[1])
    grads = empties(q, k, v, *((kv0, z0) if state_grad else (None, None)))
    tensors = [q, k, v, o, z, kv0, z0, bounds, d_o, d_kv1, d_z1, *grads]
    run("linear_attention.backward", backend, tensors, scalars)
    return fixed_arity(grads, q)


def _backward_fake(
    d_o: Tensor,
    d_kv1: Maybe,
    d_z1: Maybe,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    z: Maybe,
    kv0: Maybe,
    z0: Maybe,
    bounds: Maybe,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *_, state_grad, _backend = rest
    return fixed_arity(empties(q, k, v, *((kv0, z0) if state_grad else (None, None))), q)


define(
    "linear_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? kv0, Tensor? z0,"
    " Tensor? cu_seqlens, int feature_map, bool causal, bool normalize, float scale, float eps,"
    " bool final_state, bool save_z, str backend) -> (Tensor o, Tensor z, Tensor kv1, Tensor z1)",
    _forward,
    _forward_fake,
)
define(
    "linear_attention_bwd(Tensor d_o, Tensor? d_kv1, Tensor? d_z1, Tensor q, Tensor k, Tensor v,"
    " Tensor o, Tensor? z, Tensor? kv0, Tensor? z0, Tensor? cu_seqlens, int feature_map,"
    " bool causal, bool normalize, float scale, float eps, bool state_grad, str backend)"
    " -> (Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_kv0, Tensor d_z0)",
    _backward,
    _backward_fake,
)


class _LinearAttention(torch.autograd.Function):
    """(q, k, v, kv0, z0, bounds, *scalars, final_state, backend) -> o, kv1, z1.

    Saves the inputs, o and z; the backward pass recomputes the weights.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, kv0, z0, bounds, *scalars, final_state, backend = arguments
        normalize = scalars[2]
        o, z, kv1, z1 = torch.ops.headworks.linear_attention_fwd(
            q, k, v, kv0, z0, bounds, *scalars, final_state, normalize, backend
        )
        ctx.save_for_backward(q, k, v, o, z if normalize else None, kv0, z0, bounds)
        ctx.scalars, ctx.final_state, ctx.backend = scalars, final_state, backend
        ctx.set_materialize_grads(False)
        if not final_state:
            ctx.mark_non_differentiable(kv1, z1)
        return o, kv1, z1

    @staticmethod
    @first_order(OP)
    def backward(
        ctx: Any, saved: Saved, d_o: Maybe, d_kv1: Maybe, d_z1: Maybe
    ) -> tuple[Maybe, ...]:
        q, k, v, o, z, kv0, z0, bounds = saved
        state_grad = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        if d_o is None:
            d_o = o.new_zeros(()).expand(o.shape)
        if not ctx.final_state:
            d_kv1 = d_z1 = None
        elif d_kv1 is not None or d_z1 is not None:
            d_kv1, d_z1 = _state_cotangent(d_kv1, d_z1, k, v, bounds, ctx.scalars[0])
        grads = torch.ops.headworks.linear_attention_bwd(
            d_o, d_kv1, d_z1, q, k, v, o, z, kv0, z0, bounds, *ctx.scalars, state_grad, ctx.backend
        )
        d_q, d_k, d_v, d_kv0, d_z0 = grads
        if not state_grad:
            d_kv0 = d_z0 = None
        return d_q, d_k, d_v, d_kv0, d_z0, *(None,) * 8


differentiable: Callable[..., tuple[Tensor, Tensor, Tensor]] = _LinearAttention.apply


def _state_cotangent(
    d_kv1: Maybe, d_z1: Maybe, k: Tensor, v: Tensor, bounds: Maybe, feature_map: int
) -> tuple[Tensor, Tensor]:
    """Both cotangents of the final state; zeros (without memory) for one that is missing."""
    sequences = k.shape[0] if bounds is None else bounds.shape[0] - 1
    shape = (sequences, k.shape[2], num_features(feature_map, k.shape[3]))
    zero = k.new_zeros((), dtype=ACCUMULATION[k.dtype])
    return (
        zero.expand(*shape, v.shape[3]) if d_kv1 is None else d_kv1,
        zero.expand(shape) if d_z1 is None else d_z1,
    )
