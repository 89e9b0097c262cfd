# SPDX-License-Identifier: Apache-2.0
"""hw.linear_attention: linear attention with the Taylor and other feature maps (BASED)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _native
from .._native import ACCUMULATION, as_written, autocasts, backend_for, empties, fixed_arity, route, run, widen
from ..reference import linear_attention as reference
from ._linear_attention_checks import (
    check_cu_seqlens,
    check_cu_seqlens_values,
    check_options,
    check_state,
    heads_match,
    num_features,
    reject_inputs,
)

_OP = "linear_attention"


class LinearState(NamedTuple):
    """Everything that linear attention keeps of the tokens it has seen.

    kv  [N, H, F, Dv]   sum_j m(k_j) v_j^T
    z   [N, H, F]       sum_j m(k_j)

    N sequences, H key heads; float32, or float64 for float64 inputs. m are the F unscaled
    monomials of the mapped keys: for taylor2 first 1, then x_0 .. x_{D-1}, then x_a x_b for
    a <= b row by row (F = 1 + D + D (D + 1) / 2, 153 at D = 16); for other maps x_0 .. x_{D-1}.
    The order is stable. The scale is on the query side: a state does not depend on it.
    """

    kv: Tensor
    z: Tensor

    @classmethod
    def initial(
        cls,
        batch: int,
        heads: int,
        dim: int,
        value_dim: int,
        *,
        feature_map: str = "taylor2",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> LinearState:
        """The state before any token."""
        rows = num_features(feature_map, dim)
        kv = torch.zeros(batch, heads, rows, value_dim, dtype=dtype, device=device)
        return cls(kv, torch.zeros(batch, heads, rows, dtype=dtype, device=device))


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str | Callable[[Tensor], Tensor] = "taylor2",
    is_causal: bool = True,
    scale: float | None = None,
    normalize: bool = True,
    eps: float = 0.0,
    initial_state: LinearState | tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LinearState]:
    r"""Linear attention, in time and memory linear in the length of the sequence.

    .. math::
        o_i = \frac{\sum_j w_{ij} v_j}{z_i}, \qquad z_i = \sum_j w_{ij} + \mathrm{eps}, \qquad
        s_{ij} = \mathrm{scale} \cdot \langle f(q_i), f(k_j) \rangle

    over j <= i (causal) or all j of the same sequence, with ``w = 1 + s + s**2 / 2`` for
    ``feature_map="taylor2"`` (f the identity) and ``w = s`` for ``"identity"``, ``"elu1"``
    (f = 1 + elu) and ``"relu"``. A row whose z_i is exactly 0 gives 0, with zero gradients.

    Args:
        q: [B, S, Hq, D]. float64, float32, bfloat16 or float16; any strides.
        k: [B, S, H, D], with Hq a multiple of H (grouped and multi-query attention).
        v: [B, S, H, Dv], any Dv.
        feature_map: "taylor2" (D up to 32), "identity", "elu1", "relu", or a callable that is
            applied to q and k first, after which they are taken as "identity" takes them.
        is_causal: whether token i sees only tokens j <= i.
        scale: of the scores; ``D ** -0.5`` by default (D after a callable map).
        normalize: whether to divide by z.
        eps: added to z. It needs none with taylor2, where w >= 1/2.
        initial_state: the state over earlier tokens, which every token sees. Differentiable.
        output_final_state: also return the state after the last token. Differentiable.
        cu_seqlens: [N + 1] int32 or int64: q, k, v are N sequences packed into [1, total, H, D],
            sequence n being rows cu_seqlens[n] to cu_seqlens[n + 1]. Its values are checked only
            where it lives on the CPU.
        backend: "auto", "reference", "cpu", "simt", "sm80" or "emulate:<one of the last two>";
            see hw.explain.

    Returns:
        o [B, S, Hq, Dv] in the dtype of the inputs, or (o, LinearState). Feeding a sequence in
        pieces through the state gives what feeding it whole gives.

    Under ``torch.autocast`` q, k and v are cast to the autocast dtype. Gradients flow to q, k, v
    and the initial state, once (the reference backend: any number of times).

    Raises:
        ValueError: shapes that do not fit, D > 32 with taylor2, a number out of range, a state of
            another map or size, cu_seqlens that do not run from 0 to the total.
        TypeError: unsupported or mixed dtypes.
        RuntimeError: tensors on different devices, or a backend of another device.
        NotImplementedError: a backend that cannot take the call, with its reason; forward-mode
            differentiation and functorch transforms on a compiled backend.

    Source: Arora et al., "Simple linear attention language models balance the recall-throughput
    tradeoff", 2024, arXiv 2402.18668.

    Example:
        >>> import torch, headworks as hw
        >>> q, k = torch.randn(2, 1, 100, 4, 16)
        >>> v = torch.randn(1, 100, 4, 64)
        >>> o, state = hw.linear_attention(q, k, v, output_final_state=True)
        >>> o.shape, state.kv.shape
        (torch.Size([1, 100, 4, 64]), torch.Size([1, 4, 153, 64]))
    """
    if callable(feature_map):
        q, k, feature_map = feature_map(q), feature_map(k), "identity"
    q, k, v, kv0, z0, cu_seqlens, number, scale = _checked(
        q, k, v, feature_map, scale, eps, initial_state, cu_seqlens
    )
    backend = backend_for(_OP, backend, q)
    if not v.shape[3]:
        v, kv0 = widen(v), widen(kv0)
        o, state = linear_attention(
            q, k, v, feature_map=feature_map, is_causal=is_causal, scale=scale,
            normalize=normalize, eps=eps, initial_state=None if kv0 is None else (kv0, z0),
            output_final_state=True, cu_seqlens=cu_seqlens, backend=backend,
        )
        o, state = o[..., :0], LinearState(state.kv[..., :0], state.z)
        return (o, state) if output_final_state else o
    if backend == "reference":
        if cu_seqlens is not None:
            check_cu_seqlens_values(_OP, cu_seqlens, q.shape[1])
        with as_written(q):
            o, state = reference.linear_attention(
                q, k, v, feature_map=feature_map, is_causal=is_causal, scale=scale,
                normalize=normalize, eps=eps, initial_state=initial_state, cu_seqlens=cu_seqlens,
            )
        return (o, LinearState(*state)) if output_final_state else o

    inputs = (q, k, v, kv0, z0, cu_seqlens)
    options = (number, bool(is_causal), bool(normalize), scale, float(eps))
    way = route(_OP, inputs)
    if way == "direct":
        o, _, kv1, z1 = _forward(*inputs, *options, output_final_state, False, backend)
    elif way == "operator":
        o, _, kv1, z1 = torch.ops.headworks.linear_attention_fwd(
            *inputs, *options, output_final_state, False, backend
        )
    else:
        o, kv1, z1 = _LinearAttention.apply(*inputs, *options, output_final_state, backend)
    return (o, LinearState(kv1, z1)) if output_final_state else o


def _checked(q, k, v, feature_map, scale, eps, initial_state, cu_seqlens):
    """The arguments cast and validated: q k v kv0 z0 cu_seqlens, the map's number, the scale."""
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        reject_inputs(_OP, "[B, S, H, D]", q, k, v)
    if autocasts(q):
        q, k, v = _native.autocast(q, k, v)
    if not (q.dim() == 4 and k.dim() == 4 and v.dim() == 4):
        reject_inputs(_OP, "[B, S, H, D]", q, k, v)
    batch, tokens, query_heads, d = q.shape
    k_batch, k_tokens, heads, k_d = k.shape
    v_batch, v_tokens, v_heads, value_dim = v.shape
    dtype, device = q.dtype, q.device
    if not (
        batch == k_batch == v_batch
        and tokens == k_tokens == v_tokens
        and d == k_d
        and d > 0
        and heads == v_heads
        and heads_match(query_heads, heads)
        and dtype == k.dtype
        and dtype == v.dtype
        and dtype in ACCUMULATION
        and device == k.device
        and device == v.device
    ):
        reject_inputs(_OP, "[B, S, H, D]", q, k, v)
    number, scale = check_options(_OP, feature_map, scale, eps, d)
    if cu_seqlens is not None:
        cu_seqlens = check_cu_seqlens(_OP, cu_seqlens, q)
        batch = cu_seqlens.shape[0] - 1
    kv0 = z0 = None
    if initial_state is not None:
        sizes = (batch, heads, num_features(feature_map, d), value_dim)
        kv0, z0 = check_state(_OP, "initial_state", initial_state, q, feature_map, sizes)
    return q, k, v, kv0, z0, cu_seqlens, number, scale


# The native calls. Tensor and scalar order: csrc/ops/linear_attention/linear_attention.h.


def _outputs(q, k, v, cu_seqlens, feature_map, final_state, save_z):
    """o, z, kv1, z1 unfilled; None for what is not asked for."""
    batch, tokens, query_heads, d = q.shape
    heads, value_dim = v.shape[2], v.shape[3]
    device = q.device
    o = torch.empty((batch, tokens, query_heads, value_dim), dtype=q.dtype, device=device)
    z = kv1 = z1 = None
    if save_z or final_state:
        dtype = ACCUMULATION[q.dtype]
        if save_z:
            z = torch.empty((batch, tokens, query_heads), dtype=dtype, device=device)
        if final_state:
            sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
            rows = num_features(feature_map, d)
            kv1 = torch.empty((sequences, heads, rows, value_dim), dtype=dtype, device=device)
            z1 = torch.empty((sequences, heads, rows), dtype=dtype, device=device)
    return o, z, kv1, z1


def _forward(
    q, k, v, kv0, z0, cu_seqlens, feature_map, causal, normalize, scale, eps, final_state, save_z,
    backend,
):
    if cu_seqlens is not None:
        check_cu_seqlens_values(_OP, cu_seqlens, q.shape[1])
    o, z, kv1, z1 = _outputs(q, k, v, cu_seqlens, feature_map, final_state, save_z)
    run(
        "linear_attention.forward",
        backend,
        [q, k, v, o, z, kv0, z0, kv1, z1, cu_seqlens],
        (feature_map, causal, normalize, scale, eps),
    )
    return o, z, kv1, z1


def _forward_op(q, *args):
    return fixed_arity(_forward(q, *args), q)


def _forward_fake(
    q, k, v, kv0, z0, cu_seqlens, feature_map, causal, normalize, scale, eps, final_state, save_z,
    backend,
):
    return fixed_arity(_outputs(q, k, v, cu_seqlens, feature_map, final_state, save_z), q)


def _gradients(q, k, v, kv0, z0, state_grad):
    """d_q, d_k, d_v, d_kv0, d_z0 unfilled; None for the last two where they are not wanted."""
    return empties(q, k, v, *((kv0, z0) if state_grad else (None, None)))


def _backward_op(
    d_o, d_kv1, d_z1, q, k, v, o, z, kv0, z0, cu_seqlens, feature_map, causal, normalize, scale,
    eps, state_grad, backend,
):
    if cu_seqlens is not None:
        check_cu_seqlens_values(_OP, cu_seqlens, q.shape[1])
    d_q, d_k, d_v, d_kv0, d_z0 = _gradients(q, k, v, kv0, z0, state_grad)
    run(
        "linear_attention.backward",
        backend,
        [q, k, v, o, z, kv0, z0, cu_seqlens, d_o, d_kv1, d_z1, d_q, d_k, d_v, d_kv0, d_z0],
        (feature_map, causal, normalize, scale, eps),
    )
    return fixed_arity((d_q, d_k, d_v, d_kv0, d_z0), q)


def _backward_fake(
    d_o, d_kv1, d_z1, q, k, v, o, z, kv0, z0, cu_seqlens, feature_map, causal, normalize, scale,
    eps, state_grad, backend,
):
    return fixed_arity(_gradients(q, k, v, kv0, z0, state_grad), q)


_native.define(
    "linear_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? kv0, Tensor? z0,"
    " Tensor? cu_seqlens, int feature_map, bool causal, bool normalize, float scale, float eps,"
    " bool final_state, bool save_z, str backend) -> (Tensor o, Tensor z, Tensor kv1, Tensor z1)",
    _forward_op,
    _forward_fake,
)
_native.define(
    "linear_attention_bwd(Tensor d_o, Tensor? d_kv1, Tensor? d_z1, Tensor q, Tensor k, Tensor v,"
    " Tensor o, Tensor? z, Tensor? kv0, Tensor? z0, Tensor? cu_seqlens, int feature_map,"
    " bool causal, bool normalize, float scale, float eps, bool state_grad, str backend)"
    " -> (Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_kv0, Tensor d_z0)",
    _backward_op,
    _backward_fake,
)


class _LinearAttention(torch.autograd.Function):
    """Saves the inputs, o and z; the backward recomputes the weights."""

    @staticmethod
    def forward(
        ctx, q, k, v, kv0, z0, cu_seqlens, feature_map, causal, normalize, scale, eps,
        final_state, backend,
    ):
        options = (feature_map, causal, normalize, scale, eps)
        o, z, kv1, z1 = torch.ops.headworks.linear_attention_fwd(
            q, k, v, kv0, z0, cu_seqlens, *options, final_state, normalize, backend
        )
        ctx.save_for_backward(q, k, v, o, z if normalize else None, kv0, z0, cu_seqlens)
        ctx.options, ctx.final_state, ctx.backend = options, final_state, backend
        ctx.set_materialize_grads(False)
        if not final_state:
            ctx.mark_non_differentiable(kv1, z1)
        return o, kv1, z1

    @staticmethod
    @once_differentiable
    def backward(ctx, d_o, d_kv1, d_z1):
        q, k, v, o, z, kv0, z0, cu_seqlens = ctx.saved_tensors
        state_grad = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        if d_o is None:
            d_o = o.new_zeros(()).expand(o.shape)
        if not ctx.final_state:
            d_kv1 = d_z1 = None
        elif d_kv1 is not None or d_z1 is not None:
            d_kv1, d_z1 = _state_cotangent(d_kv1, d_z1, k, v, cu_seqlens, ctx.options[0])
        d_q, d_k, d_v, d_kv0, d_z0 = torch.ops.headworks.linear_attention_bwd(
            d_o, d_kv1, d_z1, q, k, v, o, z, kv0, z0, cu_seqlens, *ctx.options, state_grad,
            ctx.backend,
        )
        if not state_grad:
            d_kv0 = d_z0 = None
        return d_q, d_k, d_v, d_kv0, d_z0, *(None,) * 8


def _state_cotangent(d_kv1, d_z1, k, v, cu_seqlens, feature_map):
    """Both cotangents of the final state; zeros (without memory) for one that is missing."""
    sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    rows = num_features(feature_map, k.shape[3])
    zero = k.new_zeros((), dtype=ACCUMULATION[k.dtype])
    if d_kv1 is None:
        d_kv1 = zero.expand(sequences, k.shape[2], rows, v.shape[3])
    if d_z1 is None:
        d_z1 = zero.expand(sequences, k.shape[2], rows)
    return d_kv1, d_z1


def _native_call(q, k, v, *, feature_map="taylor2", is_causal=True, scale=None, normalize=True,
                  eps=0.0, initial_state=None, output_final_state=False, cu_seqlens=None,
                  backend="auto"):
    """For hw.explain: function, backend, tensors and scalars of the call that would be made."""
    if callable(feature_map):
        q, k, feature_map = feature_map(q), feature_map(k), "identity"
    q, k, v, kv0, z0, cu_seqlens, number, scale = _checked(
        q, k, v, feature_map, scale, eps, initial_state, cu_seqlens
    )
    o, z, kv1, z1 = _outputs(q, k, v, cu_seqlens, number, output_final_state, normalize)
    tensors = [q, k, v, o, z, kv0, z0, kv1, z1, cu_seqlens, None]
    scalars = (number, bool(is_causal), bool(normalize), scale, float(eps))
    return "linear_attention.forward", backend_for(_OP, backend, q), tensors, scalars


linear_attention.native_call = _native_call
