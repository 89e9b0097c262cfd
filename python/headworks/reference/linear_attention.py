# SPDX-License-Identifier: Apache-2.0
"""Linear attention (BASED, arXiv 2402.18668) in plain PyTorch: the quadratic form.

    s_ij = scale * <pre(q_i), pre(k_j)>        w_ij = 1 + s + s^2 / 2  (taylor2),  s  (other maps)
    z_i  = sum_j w_ij + eps                    o_i  = sum_j w_ij v_j / z_i

The state over a set of keys is made of the features phi(k), the monomials of pre(k) up to the
second degree (taylor2) or pre(k) itself; the coefficients c of the inner product belong to the
query side, so that a state does not depend on the scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

PRE: dict[str, Callable[[Tensor], Tensor]] = {
    "taylor2": lambda x: x,
    "identity": lambda x: x,
    "elu1": lambda x: 1 + torch.nn.functional.elu(x),
    "relu": torch.relu,
}


class State(NamedTuple):
    """The sums over a set of keys."""

    kv: Tensor  # [N, H, F, Dv]  sum_j phi(k_j) v_j^T
    z: Tensor  # [N, H, F]       sum_j phi(k_j)


def features(x: Tensor, feature_map: str) -> Tensor:
    """phi(x), [..., D] -> [..., F]: for taylor2 1, x_a, then x_a x_b for a <= b row by row."""
    x = PRE[feature_map](x)
    if feature_map != "taylor2":
        return x
    a, b = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    return torch.cat([torch.ones_like(x[..., :1]), x, x[..., a] * x[..., b]], dim=-1)


def coefficients(d: int, feature_map: str, scale: float, like: Tensor) -> Tensor:
    """c [F] with w_ij = sum_f c_f phi_f(q_i) phi_f(k_j)."""
    if feature_map != "taylor2":
        return like.new_full((d,), scale)
    a, b = torch.triu_indices(d, d, device=like.device)
    quadratic = scale**2 * (1 - 0.5 * (a == b).to(like.dtype))
    return torch.cat([like.new_ones(1), like.new_full((d,), scale), quadratic])


def linear_attention(
    q: Tensor,  # [B, S, Hq, D]
    k: Tensor,  # [B, S, H, D]
    v: Tensor,  # [B, S, H, Dv]
    *,
    feature_map: str = "taylor2",
    is_causal: bool = True,
    scale: float | None = None,
    normalize: bool = True,
    eps: float = 0.0,
    initial_state: tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, State]:
    """The output [B, S, Hq, Dv] in the inputs' dtype and the final state in fp32 (or fp64)."""
    options: dict[str, Any] = {
        "feature_map": feature_map,
        "is_causal": is_causal,
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
        "normalize": normalize,
        "eps": eps,
    }
    if cu_seqlens is None:
        return _sequences(q, k, v, initial_state, **options)
    bounds = cu_seqlens.tolist()
    outputs = [_sequences(q[:, :0], k[:, :0], v[:, :0], None, **options)[0]]
    states = [_state(k[:0], v[:0], feature_map)]
    for n in range(len(bounds) - 1):
        rows = slice(bounds[n], bounds[n + 1])
        start = None if initial_state is None else [x[n : n + 1] for x in initial_state]
        o, state = _sequences(q[:, rows], k[:, rows], v[:, rows], start, **options)
        outputs.append(o)
        states.append(state)
    return torch.cat(outputs, 1), State(*(torch.cat(parts) for parts in zip(*states, strict=True)))


def linear_attention_step(
    q: Tensor,  # [B, Hq, D]
    k: Tensor,  # [B, H, D]
    v: Tensor,  # [B, H, Dv]
    state: tuple[Tensor, Tensor],
    **options: Any,
) -> tuple[Tensor, State]:
    """One token: the output [B, Hq, Dv] and the next state."""
    o, state = linear_attention(q[:, None], k[:, None], v[:, None], initial_state=state, **options)
    return o[:, 0], state


def _state(k: Tensor, v: Tensor, feature_map: str) -> State:
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    phi = features(k.to(dtype), feature_map)  # [B, S, H, F]
    return State(torch.einsum("bshf,bshe->bhfe", phi, v.to(dtype)), phi.sum(1))


def _sequences(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Sequence[Tensor] | None,
    *,
    feature_map: str,
    is_causal: bool,
    scale: float,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, State]:
    group = q.shape[2] // k.shape[2] if k.shape[2] else 1
    pre = PRE[feature_map]
    s = scale * torch.einsum("bihd,bjhd->bhij", pre(q), pre(k).repeat_interleave(group, 2))
    w = 1 + s + 0.5 * s * s if feature_map == "taylor2" else s
    if is_causal:
        w = w.tril()
    o = torch.einsum("bhij,bjhe->bihe", w, v.repeat_interleave(group, 2))
    z = w.sum(-1).transpose(1, 2)  # [B, S, Hq]

    state = _state(k, v, feature_map)
    if initial_state is not None:
        kv, sum_phi = initial_state
        state = State(state.kv + kv, state.z + sum_phi)
        phi = features(q.to(kv.dtype), feature_map)
        phi = phi * coefficients(q.shape[-1], feature_map, scale, phi)
        o = o + torch.einsum("bshf,bhfe->bshe", phi, kv.repeat_interleave(group, 1))
        z = z + torch.einsum("bshf,bhf->bsh", phi, sum_phi.repeat_interleave(group, 1))
    if normalize:
        z = (z + eps).unsqueeze(-1)
        o = torch.where(z == 0, 0, o / torch.where(z == 0, 1, z))
    return o.to(q.dtype), state
