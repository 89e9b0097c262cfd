# SPDX-License-Identifier: Apache-2.0
"""hw.linear_attention: linear attention with the Taylor and other feature maps (BASED)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._autograd import apart
from ..._errors import STRIDED, require_flags, require_tensors
from ..._functions import Maybe
from ..._native import (
    ACCUMULATION,
    NATIVE_CALLS,
    NativeCall,
    as_written,
    autocast,
    autocasts,
    backend_for,
    described,
    route,
    widen,
)
from ..._repeated import Ready, Repeated
from ..._trees import saved_by_name
from ...reference import linear_attention as reference
from .._checks import check_cu_seqlens, check_cu_seqlens_values, heads_match
from . import _linear_attention_native as native
from ._linear_attention_checks import (
    OP,
    check_options,
    check_state,
    num_features,
    reject_inputs,
)


@saved_by_name
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

    Causality is exact for finite numbers; a NaN or infinity in v may also reach earlier tokens of
    the tile it lies in. Under ``torch.autocast`` q, k and v are cast to the autocast dtype.
    Gradients flow to q, k, v and the initial state, once (the reference backend: any number of
    times).

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
    key = None
    if initial_state is None and cu_seqlens is None and output_final_state is False:
        key = _repeated.key((q, k, v), feature_map, is_causal, scale, normalize, eps, backend)
        if (ready := _repeated.get(key)) is not None:
            return ready(q, k, v)
    if callable(feature_map):
        q, k, feature_map = feature_map(q), feature_map(k), "identity"
    q, k, v, kv0, z0, bounds, number, scale = _checked(
        q, k, v, feature_map, scale, eps, initial_state, cu_seqlens
    )
    if not (type(is_causal) is type(normalize) is type(output_final_state) is bool):
        require_flags(  # type: ignore[unreachable]
            OP, is_causal=is_causal, normalize=normalize, output_final_state=output_final_state
        )
    backend = backend_for(OP, backend, q)
    if backend == "reference" or not v.shape[3]:
        return _other_ways(
            q, k, v, kv0, z0, bounds, output_final_state, backend,
            feature_map=feature_map, is_causal=is_causal, scale=scale, normalize=normalize, eps=eps,
        )  # fmt: skip

    inputs = (q, k, v, kv0, z0, bounds)
    scalars = (number, is_causal, normalize, scale, float(eps))
    way = route(OP, inputs)
    kv1: Any
    z1: Any
    if way == "direct":
        _repeated.offer(key, native.ready, inputs, scalars, backend)
        o, _, kv1, z1 = native.forward(*inputs, scalars, output_final_state, False, backend)
    elif way == "operator":
        o, _, kv1, z1 = torch.ops.headworks.linear_attention_fwd(
            *inputs, *scalars, output_final_state, False, backend
        )
    else:
        o, kv1, z1 = native.differentiable(*apart(*inputs, *scalars, output_final_state, backend))
    return (o, LinearState(kv1, z1)) if output_final_state else o


_repeated: Repeated[Ready] = Repeated(OP)


def _other_ways(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv0: Maybe,
    z0: Maybe,
    bounds: Maybe,
    output_final_state: bool,
    backend: str,
    **options: Any,
) -> Tensor | tuple[Tensor, LinearState]:
    """The reference, and values of width 0."""
    start = None if kv0 is None or z0 is None else LinearState(kv0, z0)
    if backend == "reference":
        if bounds is not None:
            check_cu_seqlens_values(OP, "cu_seqlens", bounds, q.shape[1])
        with as_written(q):
            o, state = reference.linear_attention(
                q, k, v, initial_state=start, cu_seqlens=bounds, **options
            )
        return (o, LinearState(*state)) if output_final_state else o
    if start is not None:
        start = LinearState(widen(start.kv), start.z)
    o, end = linear_attention(
        q, k, widen(v), initial_state=start, output_final_state=True, cu_seqlens=bounds,
        backend=backend, **options,
    )  # fmt: skip
    o, end = o[..., :0], LinearState(end.kv[..., :0], end.z)
    return (o, end) if output_final_state else o


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: object,
    scale: object,
    eps: object,
    initial_state: object,
    cu_seqlens: object,
) -> tuple[Tensor, Tensor, Tensor, Maybe, Maybe, Maybe, int, float]:
    """The arguments cast and validated: q k v kv0 z0 cu_seqlens, the map's number, the scale."""
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        reject_inputs(OP, "[B, S, H, D]", q, k, v)
    if autocasts(q):
        q, k, v = autocast(q, k, v)
    if not (
        q.layout is k.layout is v.layout is STRIDED
        and q.dim() == 4
        and k.dim() == 4
        and v.dim() == 4
    ):
        reject_inputs(OP, "[B, S, H, D]", q, k, v)
    try:
        batch, tokens, query_heads, d = q.shape
        k_batch, k_tokens, heads, k_d = k.shape
        v_batch, v_tokens, v_heads, value_dim = v.shape
    except RuntimeError:  # a nested tensor has no shape
        require_tensors(OP, q=q, k=k, v=v)
        raise
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
        reject_inputs(OP, "[B, S, H, D]", q, k, v)
    number, scale = check_options(OP, feature_map, scale, eps, d)
    bounds = None
    if cu_seqlens is not None:
        bounds = check_cu_seqlens(OP, "cu_seqlens", cu_seqlens, q)
        batch = bounds.shape[0] - 1
    kv0 = z0 = None
    if initial_state is not None:
        sizes = (batch, heads, num_features(number, d), value_dim)
        kv0, z0 = check_state(OP, "initial_state", initial_state, q, feature_map, sizes)
    return q, k, v, kv0, z0, bounds, number, scale


def _native_call(
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
) -> NativeCall:
    if callable(feature_map):
        q, k, feature_map = feature_map(q), feature_map(k), "identity"
    q, k, v, kv0, z0, bounds, number, scale = _checked(
        q, k, v, feature_map, scale, eps, initial_state, cu_seqlens
    )
    made = native.outputs(q, v, bounds, number, output_final_state, normalize)
    scalars = (number, is_causal, normalize, scale, float(eps))
    inputs = (q, k, v, kv0, z0, bounds)
    return described(native.FORWARD, backend_for(OP, backend, q), inputs, made, scalars)


NATIVE_CALLS[linear_attention] = _native_call
