# SPDX-License-Identifier: Apache-2.0
"""hw.linear_attention_step: one token of linear attention, the state updated in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from ..._errors import STRIDED, fail, require_flag, require_tensors
from ..._functions import NativeFunction
from ..._native import (
    ACCUMULATION,
    NATIVE_CALLS,
    NativeCall,
    as_written,
    autocast,
    autocasts,
    backend_for,
    define,
    described,
    route,
    widen,
)
from ..._repeated import Ready, Repeated
from ...reference import linear_attention as reference
from .._checks import heads_match
from .._operands import check_operands
from ._linear_attention_checks import (
    check_options,
    check_state,
    num_features,
    reject_inputs,
)
from ._linear_attention_native import known_sizes
from .linear_attention import LinearState

_OP = "linear_attention_step"


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: LinearState | tuple[Tensor, Tensor],
    *,
    feature_map: str | Callable[[Tensor], Tensor] = "taylor2",
    scale: float | None = None,
    normalize: bool = True,
    eps: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    r"""One more token of hw.linear_attention per sequence, in time independent of its length.

    .. math::
        S \leftarrow S + m(k) v^T, \qquad n \leftarrow n + m(k), \qquad
        o = \frac{(c \odot m(q))^T S}{(c \odot m(q))^T n + \mathrm{eps}}

    with (S, n) = ``state``, updated in place, the monomials m and the coefficients c of
    hw.LinearState and hw.linear_attention: the output equals the last row of a causal
    hw.linear_attention over all tokens.

    Args:
        q: [B, Hq, D]. float64, float32, bfloat16 or float16; any strides.
        k: [B, H, D], with Hq a multiple of H.
        v: [B, H, Dv].
        state: LinearState(kv [B, H, F, Dv], z [B, H, F]) as hw.linear_attention returns it, or
            hw.LinearState.initial(...). Written to.
        feature_map, scale, normalize, eps, backend: as in hw.linear_attention.

    Returns:
        o [B, Hq, Dv] in the dtype of the inputs. There is no gradient: call it under
        ``torch.no_grad()``, or use hw.linear_attention on a sequence of one token.

    Raises:
        As hw.linear_attention; RuntimeError also where a gradient would be wanted.

    Source: Arora et al., 2024, arXiv 2402.18668.

    Example:
        >>> import torch, headworks as hw
        >>> state = hw.LinearState.initial(2, 4, 16, 64)
        >>> q, k, v = torch.randn(2, 4, 16), torch.randn(2, 4, 16), torch.randn(2, 4, 64)
        >>> hw.linear_attention_step(q, k, v, state).shape
        torch.Size([2, 4, 64])
    """
    key = None
    if isinstance(state, tuple):
        key = _repeated.key((q, k, v, *state), feature_map, scale, normalize, eps, backend)
        if (ready := _repeated.get(key)) is not None:
            return _written(ready(q, k, v, *state), *state)
    if callable(feature_map):
        q, k, feature_map = feature_map(q), feature_map(k), "identity"
    q, k, v, kv, z, number, scale = _checked(q, k, v, state, feature_map, scale, eps)
    if type(normalize) is not bool:
        require_flag(_OP, "normalize", normalize)  # type: ignore[unreachable]
    backend = backend_for(_OP, backend, q)
    way = route(_OP, (q, k, v, kv, z))
    if way == "autograd":
        fail(
            RuntimeError,
            _OP,
            "an input",
            "a tensor that requires grad",
            "none (no gradient here)",
            "Call it under torch.no_grad(), or use linear_attention on a sequence of length 1.",
        )
    if not v.shape[2]:
        return linear_attention_step(
            q, k, widen(v), (widen(kv), z), feature_map=feature_map, scale=scale,
            normalize=normalize, eps=eps, backend=backend,
        )[..., :0]  # fmt: skip
    if backend == "reference":
        with as_written(q):
            o, new = reference.linear_attention_step(
                q,
                k,
                v,
                (kv, z),
                feature_map=feature_map,
                scale=scale,
                normalize=normalize,
                eps=eps,
            )
        kv.copy_(new.kv)
        z.copy_(new.z)
        return o
    if way == "direct":
        inputs, scalars = (q, k, v, kv, z), (number, normalize, scale, float(eps))
        _repeated.offer(key, _ready, inputs, scalars, backend)
        return _step(*inputs, *scalars, backend)
    o = torch.ops.headworks.linear_attention_step(
        q, k, v, kv, z, number, normalize, scale, float(eps), backend
    )
    return cast(Tensor, o)


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: object,
    feature_map: object,
    scale: object,
    eps: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, float]:
    """The arguments cast and validated: q k v kv z, the map's number, the scale."""
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        reject_inputs(_OP, "[B, H, D]", q, k, v)
    if autocasts(q):
        q, k, v = autocast(q, k, v)
    if not (
        q.layout is k.layout is v.layout is STRIDED
        and q.dim() == 3
        and k.dim() == 3
        and v.dim() == 3
    ):
        reject_inputs(_OP, "[B, H, D]", q, k, v)
    try:
        batch, query_heads, d = q.shape
        k_batch, heads, k_d = k.shape
        v_batch, v_heads, value_dim = v.shape
    except RuntimeError:  # a nested tensor has no shape
        require_tensors(_OP, q=q, k=k, v=v)
        raise
    dtype, device = q.dtype, q.device
    if not (
        batch == k_batch == v_batch
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
        reject_inputs(_OP, "[B, H, D]", q, k, v)
    number, scale = check_options(_OP, feature_map, scale, eps, d)
    sizes = (batch, heads, num_features(number, d), value_dim)
    kv, z = check_state(_OP, "state", state, q, feature_map, sizes)
    _check_memory(kv, z)
    return q, k, v, kv, z, number, scale


def _check_memory(kv: Tensor, z: Tensor) -> None:
    """Every element of a state has a place of its own."""
    for name, x in (("state.kv", kv), ("state.z", z)):
        if not x.is_contiguous() and _repeats_memory(x):
            fail(
                ValueError,
                _OP,
                name,
                f"a view of strides {list(x.stride())}",
                "memory of its own for every element, because it is updated in place",
                f"Pass {name}.contiguous().",
            )


def _repeats_memory(x: Tensor) -> bool:
    return any(size > 1 and step == 0 for size, step in zip(x.shape, x.stride(), strict=True))


STEP = NativeFunction("linear_attention.step")
STEP.begins_with(("q", "k", "v", "kv", "z"), ("feature_map", "normalize", "scale", "eps"))


def _ready(inputs: tuple[Tensor, ...], scalars: tuple[Any, ...], backend: str) -> Ready:
    """`_step` of other tensors like these."""
    q, _, v, *_ = inputs
    return Ready(STEP, backend, inputs, (_output(q, v),), scalars, inputs)


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: Tensor,
    z: Tensor,
    feature_map: int,
    normalize: bool,
    scale: float,
    eps: float,
    backend: str,
) -> Tensor:
    o = _output(q, v)
    STEP.run(backend, (q, k, v, kv, z), (o,), (feature_map, normalize, scale, eps))
    return _written(o, kv, z)


def _written(o: Tensor, kv: Tensor, z: Tensor) -> Tensor:
    """`o`; autograd is told that the state has changed."""
    for x in (kv, z):
        if not x.is_inference():
            torch._C._increment_version((x,))
    return o


_repeated: Repeated[Ready] = Repeated(_OP)


def _step_operator(q: Tensor, k: Tensor, v: Tensor, kv: Tensor, z: Tensor, *rest: Any) -> Tensor:
    known = known_sizes(_OP, q, v, None, rest[0])
    check_operands(_OP, STEP.inputs, (q, k, v, kv, z), **known)
    _check_memory(kv, z)
    return _step(q, k, v, kv, z, *rest)


def _output(q: Tensor, v: Tensor) -> Tensor:
    return torch.empty((q.shape[0], q.shape[1], v.shape[2]), dtype=q.dtype, device=q.device)


def _step_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return _output(q, v)


define(STEP.schema(_OP), _step_operator, _step_fake)


def _native_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: LinearState | tuple[Tensor, Tensor],
    *,
    feature_map: str | Callable[[Tensor], Tensor] = "taylor2",
    scale: float | None = None,
    normalize: bool = True,
    eps: float = 0.0,
    backend: str = "auto",
) -> NativeCall:
    if callable(feature_map):
        q, k, feature_map = feature_map(q), feature_map(k), "identity"
    q, k, v, kv, z, number, scale = _checked(q, k, v, state, feature_map, scale, eps)
    scalars = (number, normalize, scale, float(eps))
    backend = backend_for(_OP, backend, q)
    return described(STEP, backend, (q, k, v, kv, z), (_output(q, v),), scalars)


NATIVE_CALLS[linear_attention_step] = _native_call
