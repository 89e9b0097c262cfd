# SPDX-License-Identifier: Apache-2.0
"""Linear attention as torch operators: the native calls, their fake kernels, the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._autograd import Saved, first_order
from ..._functions import Maybe, NativeFunction
from ..._native import ACCUMULATION, define, empties, fixed_arity, is_direct
from ..._repeated import Ready
from .._checks import check_cu_seqlens_values
from .._operands import check_operands, require, require_given
from ._linear_attention_checks import FEATURE_MAPS, MAX_TAYLOR_DIM, OP, num_features

FORWARD = NativeFunction("linear_attention.forward")
BACKWARD = NativeFunction("linear_attention.backward")

Scalars = tuple[int, bool, bool, float, float]
for _function in (FORWARD, BACKWARD):
    _function.begins_with(
        ("q", "k", "v", "kv0", "z0", "cu_seqlens"),
        ("feature_map", "causal", "normalize", "scale", "eps"),
    )


def outputs(
    q: Tensor, v: Tensor, bounds: Maybe, feature_map: int, final_state: bool, save_z: bool
) -> Any:
    """Outputs of FORWARD, unfilled; None for what is not asked for."""
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
    return FORWARD.Outputs(o=o, z=z, kv1=kv1, z1=z1)


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
) -> Any:
    """Outputs of FORWARD; None for what is not asked for. `bounds` is cu_seqlens as int64."""
    if bounds is not None:
        check_cu_seqlens_values(OP, "cu_seqlens", bounds, q.shape[1])
    made = outputs(q, v, bounds, scalars[0], final_state, save_z)
    FORWARD.run(backend, (q, k, v, kv0, z0, bounds), made, scalars)
    return made


def ready(inputs: tuple[Any, ...], scalars: Scalars, backend: str) -> Ready:
    """`forward` for o alone, without states and bounds, as a function of q, k and v."""
    q, _, v, *_, bounds = inputs
    made = outputs(q, v, bounds, scalars[0], False, False)
    return Ready(FORWARD, backend, inputs, made, scalars, inputs[:3])


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


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    op = "linear_attention_fwd"
    inputs, scalars, (final_state, save_z, backend) = FORWARD.split(arguments)
    q, k, v, kv0, z0, bounds = inputs
    known = known_sizes(op, q, v, bounds, scalars[0])
    check_operands(op, FORWARD.inputs, inputs, **known)
    require_given(op, z0=(z0, kv0 is not None))
    feature_map, causal, normalize, scale, eps = scalars
    numbers = feature_map, causal, normalize, scale, eps
    made = forward(q, k, v, kv0, z0, bounds, numbers, final_state, save_z, backend)
    return fixed_arity(made, q)


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    (q, _, v, *_, bounds), scalars, (final_state, save_z, _) = FORWARD.split(arguments)
    return fixed_arity(outputs(q, v, bounds, scalars[0], final_state, save_z), q)


def _gradients(inputs: tuple[Maybe, ...], state_grad: bool) -> Any:
    """Outputs of BACKWARD, unfilled."""
    q, k, v, kv0, z0, *_ = inputs
    return BACKWARD.Outputs(*empties(q, k, v, *((kv0, z0) if state_grad else (None, None))))


def backward(*arguments: Any) -> Any:
    """Outputs of BACKWARD, from its inputs, the scalars, state_grad and a backend."""
    inputs, scalars, (state_grad, backend) = BACKWARD.split(arguments)
    q, bounds = inputs[0], inputs[5]
    if bounds is not None:
        check_cu_seqlens_values(OP, "cu_seqlens", bounds, q.shape[1])
    made = _gradients(inputs, state_grad)
    BACKWARD.run(backend, inputs, made, scalars)
    return made


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    op = "linear_attention_bwd"
    inputs, scalars, (state_grad, _backend) = BACKWARD.split(arguments)
    q, _, v, kv0, z0, bounds, _o, z, _d_o, d_kv1, d_z1 = inputs
    known = known_sizes(op, q, v, bounds, scalars[0])
    check_operands(op, BACKWARD.inputs, inputs, **known)
    require_given(op, z0=(z0, kv0 is not None), d_z1=(d_z1, d_kv1 is not None), z=(z, scalars[2]))
    require(op, "state_grad", state_grad, kv0 is not None or not state_grad, "False without kv0")
    return fixed_arity(backward(*arguments), q)


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, _, (state_grad, _backend) = BACKWARD.split(arguments)
    return fixed_arity(_gradients(inputs, state_grad), inputs[0])


define(
    FORWARD.schema("linear_attention_fwd", "bool final_state, bool save_z"),
    _forward,
    _forward_fake,
)
define(BACKWARD.schema("linear_attention_bwd", "bool state_grad"), _backward, _backward_fake)


class _LinearAttention(torch.autograd.Function):
    """(q, k, v, kv0, z0, bounds, *scalars, final_state, backend) -> o, kv1, z1.

    Saves the inputs, o and z; the backward pass recomputes the weights.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, kv0, z0, bounds, *scalars, final_state, backend = arguments
        normalize = scalars[2]
        inputs = q, k, v, kv0, z0, bounds
        if is_direct(inputs):
            made = forward(*inputs, tuple(scalars), final_state, normalize, backend)
        else:
            made = torch.ops.headworks.linear_attention_fwd(
                *inputs, *scalars, final_state, normalize, backend
            )
        o, z, kv1, z1 = made
        ctx.save_for_backward(q, k, v, o, z if normalize else None, kv0, z0, bounds)
        ctx.scalars, ctx.final_state, ctx.backend = scalars, final_state, backend
        ctx.set_materialize_grads(False)
        if not final_state and kv1 is not None:
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
        inputs = BACKWARD.tensors(
            (q, k, v, kv0, z0, bounds), o=o, z=z, d_o=d_o, d_kv1=d_kv1, d_z1=d_z1
        )
        call = backward if is_direct(inputs) else torch.ops.headworks.linear_attention_bwd
        d_q, d_k, d_v, d_kv0, d_z0 = call(*inputs, *ctx.scalars, state_grad, ctx.backend)
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
