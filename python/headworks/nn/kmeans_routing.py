# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-any-return, no-untyped-call"
"""Routing attention as a layer (Routing Transformer, Roy et al. 2021, arXiv 2003.05997)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._errors import require_flags
from .._native import without_products
from ..ops.attention.attention import attention
from ..ops.routing._clusters import similarity
from ..ops.routing.kmeans_routing import kmeans_route, kmeans_routing_attention
from ._centroids import Centroids
from ._checks import check_batch, check_sequence, check_token
from ._recompute import may_repeat, recomputing
from ._side_loss import joined
from ._types import Device, DType
from .rotary import apply_rotary, rotary_tables

_LAYER_NORM_EPS = 1e-6


@dataclass
class Members:
    """Which tokens are in the clusters, and what the decision on the next one needs."""

    seen: Tensor  # [B, H, K, n] similarities of the tokens so far
    index: Tensor  # [B, H, K, W] positions, -1 in empty slots

    def append(self, d: Tensor, length: int) -> Tensor:
        """Decides on one more token of similarities d [B, H, K]; whether it joined, [B, H, K]."""
        t, window = self.seen.shape[-1], self.index.shape[-1]
        held = (self.index >= 0).sum(-1)
        ahead = (self.seen >= d[..., None]).sum(-1)
        joins = (ahead < -(-(t + 1) * window // length)) & (held < window)
        here = torch.arange(window, device=d.device) == held[..., None]
        self.index = torch.where(here & joins[..., None], t, self.index)
        self.seen = torch.cat([self.seen, d[..., None]], -1)
        return joins


@dataclass
class RoutingState:
    """All tokens so far of the routing heads, the latest ones of the local heads."""

    local_k: Tensor  # [B, at most local_window, Hl, D]
    local_v: Tensor
    k: Tensor  # [B, n, Hr, D]
    v: Tensor
    queries: Members
    keys: Members  # the same object where q and k are one tensor

    @property
    def position(self) -> int:
        """How many tokens have been seen."""
        return self.k.shape[1]

    def tensors(self) -> list[Tensor]:
        both = [self.queries] if self.keys is self.queries else [self.queries, self.keys]
        held = [t for m in both for t in (m.seen, m.index)]
        return [self.local_k, self.local_v, self.k, self.v, *held]


class KMeansRoutingAttention(Centroids):
    r"""Multi-head attention with local heads, which see a window, and routing heads, in which a
    token attends to the tokens of its clusters.

    Routing heads cluster the tokens by online k-means (:func:`headworks.kmeans_route`): each of
    ``num_clusters`` centroids takes the ``window`` tokens of the largest similarity, attention
    runs inside the clusters (:func:`headworks.kmeans_routing_attention`), and a token's output is
    the mean over its clusters, 0 where it is in none. With K = W = sqrt(S) the time grows as
    S^1.5.

    **Centroids** are a buffer, no parameter. The first forward in training sets them from its
    data: random tokens, then ten rounds of k-means. Every forward in training moves them by
    ``(1 - decay)`` of the way to its clusters' means after they were used. The commitment loss,
    ``commitment`` times the mean squared difference of the routing vectors from their nearest
    centroids, is kept until :meth:`pop_loss` takes it. Keep the buffer in float32. Tokens that are
    not finite move nothing.

    Under torch.utils.checkpoint, in any mode, the repetition inside the backward pass routes by
    the centroids of the first run and does not move them. They are kept for it, of at most 64
    forwards that wait for their backward pass, and found again by the input.

    **Causality.** The default routing, the paper's, chooses members from the whole sequence:
    earlier outputs do not depend on later values, but on later tokens through the membership. Such
    a layer can not decode. With ``is_causal_prefix`` members follow from the tokens before alone,
    and the recurrent form equals the parallel one (:func:`headworks.kmeans_route`), for sequences
    of at most ``length`` tokens. Where similarities differ by rounding alone, as those of equal
    tokens without position embedding do, both forms may rank them differently.

    The conventions of the published implementations, by option; the defaults are those of the first
    but for mean_eps, 0:

    =============  ==========================  ===========================
    option         lucidrains                  Google
    =============  ==========================  ===========================
    norm           "l2": k = q / |q|, scaled   "layer": q and k layer-normalised, no scale
                   by ``D ** -0.5``
    mask_self      True                        False
    mean_eps       1e-5                        1e-2
    =============  ==========================  ===========================

    Names: ``local_qkv`` [3 Hl D, d], ``to_q``, ``to_k`` (unless shared_qk), ``to_v`` [Hr D, d],
    ``out_proj`` [d, H D] (local heads first), buffers ``centroids`` [Hr, K, D], ``initialized``.

    Args:
        d_model: width of the input and the output, a multiple of num_heads.
        num_heads: H; D = d_model / H.
        local_heads: Hl, from 0 to H - 1.
        num_clusters: K.
        window: W, members of a cluster; the length of the sequence where that is shorter.
        local_window: earlier tokens (not causal: also later ones) that local heads see.
        is_causal: tokens see earlier tokens and themselves only.
        is_causal_prefix: see above; needs is_causal.
        length: of the longest sequence with is_causal_prefix; num_clusters * window by default.
        shared_qk: routing heads have no keys of their own: k is q, normalised.
        norm: "l2" or "layer", of the routing vectors.
        mask_self: by default as shared_qk with "l2", else False.
        mean_eps: added to the number of clusters of a token.
        rotary_dim: leading channels of a head that get rotary position embedding; 0 for none.
        decay, commitment: see above.
        group: process group over which centroids are kept equal; all ranks must call in step.
        bias: give the projections a bias.
        backend: as in :func:`headworks.kmeans_routing_attention`.

    Example:
        >>> layer = KMeansRoutingAttention(
        ...     64, 4, local_heads=2, num_clusters=4, window=16
        ... )
        >>> y = layer(torch.randn(2, 64, 64))
        >>> loss = layer.pop_loss()
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int = 8,
        *,
        local_heads: int,
        num_clusters: int,
        window: int,
        local_window: int = 128,
        is_causal: bool = True,
        is_causal_prefix: bool = False,
        length: int | None = None,
        shared_qk: bool = True,
        norm: str = "l2",
        mask_self: bool | None = None,
        mean_eps: float = 0.0,
        rotary_dim: int = 0,
        decay: float = 0.999,
        commitment: float = 1e-4,
        group: Any = None,
        bias: bool = False,
        backend: str = "auto",
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__(decay, group)
        flags = {"is_causal": is_causal, "is_causal_prefix": is_causal_prefix}
        require_flags(type(self).__name__, **flags, shared_qk=shared_qk)
        _check_options(
            d_model, num_heads, local_heads, num_clusters, window, local_window, is_causal,
            is_causal_prefix, norm, rotary_dim,
        )  # fmt: skip
        self.d_model, self.num_heads, self.local_heads = d_model, num_heads, local_heads
        self.head_dim, self.routing_heads = d_model // num_heads, num_heads - local_heads
        self.num_clusters, self.window, self.local_window = num_clusters, window, local_window
        self.is_causal, self.is_causal_prefix = is_causal, is_causal_prefix
        self.length = num_clusters * window if length is None else length
        self.shared_qk, self.norm, self.mean_eps = shared_qk, norm, mean_eps
        self.mask_self = shared_qk and norm == "l2" if mask_self is None else mask_self
        self.rotary_dim, self.commitment, self.backend = rotary_dim, commitment, backend
        self.scale = self.head_dim**-0.5 if norm == "l2" else 1.0

        like: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        width = self.routing_heads * self.head_dim
        if local_heads:
            self.local_qkv = nn.Linear(d_model, 3 * local_heads * self.head_dim, **like)
        self.to_q = nn.Linear(d_model, width, **like)
        if not shared_qk:
            self.to_k = nn.Linear(d_model, width, **like)
        self.to_v = nn.Linear(d_model, width, **like)
        self.out_proj = nn.Linear(d_model, d_model, **like)
        self._add_buffers(self.routing_heads, num_clusters, self.head_dim, device)

    def init_state(self, batch_size: int) -> RoutingState:
        """The state before any token."""
        if not self.is_causal_prefix:
            raise NotImplementedError(
                "KMeansRoutingAttention: a state without is_causal_prefix=True: later tokens would "
                "change which earlier ones are in the clusters"
            )
        like, b, d = self.out_proj.weight, batch_size, self.head_dim
        local = like.new_zeros(b, 0, self.local_heads, d)
        kv = like.new_zeros(b, 0, self.routing_heads, d)
        members = [self._no_members(b, like) for _ in range(1 if self.shared_qk else 2)]
        return RoutingState(local, local, kv, kv, members[0], members[-1])

    def forward(
        self,
        x: Tensor,
        state: RoutingState | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, RoutingState]:
        """Parallel form. x [B, S, d_model] -> y of the same shape, and the state after x if asked.

        Clusters are those of one whole sequence: a state that holds tokens can be continued by
        ``step`` only, and packed sequences are refused.
        """
        check_sequence(self, x)
        if cu_seqlens is not None or (state is not None and state.position):
            raise NotImplementedError(
                "KMeansRoutingAttention: packed sequences and continuing a state by several "
                "tokens; pass one whole sequence, then single steps"
            )
        after = self.init_state(x.shape[0]) if return_state else None
        position = torch.arange(x.shape[1], device=x.device)
        o = [self._routing_heads(x, position, after)]
        if self.local_heads:
            o.insert(0, self._local_heads(x, position, after))
        y = self.out_proj(torch.cat(o, 2).flatten(-2))
        return y if after is None else (y, after)

    @torch.no_grad()
    def step(self, x_t: Tensor, state: RoutingState) -> Tensor:
        """Recurrent form, one token: x_t [B, d_model] -> y_t; the state is updated in place."""
        check_token(self, x_t)
        check_batch(self, x_t, state.k.shape[0])
        t = state.position
        if t >= self.length:
            raise ValueError(
                f"KMeansRoutingAttention.step: the state holds {t} tokens, expected fewer than "
                f"length = {self.length}; make the layer with a larger length"
            )
        x = x_t[:, None]
        position = torch.full((1,), t, device=x.device)
        q, k, v, routed = self._heads(x, position)
        state.k, state.v = torch.cat([state.k, k], 1), torch.cat([state.v, v], 1)
        d = [similarity(r, self.centroids)[..., 0] for r in routed]
        joined = state.queries.append(d[0], self.length)
        if state.keys is not state.queries:
            state.keys.append(d[-1], self.length)
        slot = joined.long()[..., None] - 1  # the one query, or none
        o = [self._within(q, state.k, state.v, slot, state.keys.index)]
        if self.local_heads:
            o.insert(0, self._local_heads(x, position, state))
        return self.out_proj(torch.cat(o, 2).flatten(1))

    def _routing_heads(self, x: Tensor, position: Tensor, after: RoutingState | None) -> Tensor:
        # x [B, S, d_model] -> o [B, S, Hr, D]
        q, k, v, routed = self._heads(x, position)
        if self.training:
            return self._trained(q, k, v, routed, after)
        self._loss = None
        return self._routed(q, k, v, routed, self.centroids, after)

    def _trained(
        self, q: Tensor, k: Tensor, v: Tensor, routed: list[Tensor], after: RoutingState | None
    ) -> Tensor:
        # As _routed, with the loss, and with the step of the centroids unless this is repeated.
        every = torch.cat(routed, 1)
        past = self._begin(every.detach())
        loss = self._commitment(every, past.centroids)
        o = self._routed(q, k, v, routed, past.centroids, after)
        if recomputing():
            return joined(o, loss, past.stand_in)
        past.stand_in = self._keep(loss)
        if may_repeat():
            self._memory.note(every, past)
        self._move(every)
        return o

    def _routed(
        self, q: Tensor, k: Tensor, v: Tensor, routed: list[Tensor], centroids: Tensor,
        after: RoutingState | None,
    ) -> Tensor:  # fmt: skip
        # q, k, v [B, S, Hr, D] -> o [B, S, Hr, D]
        index = [self._route(r, centroids) for r in routed]
        if after is not None:
            after.k, after.v = k.detach(), v.detach()
            for members, r, i in zip((after.queries, after.keys), routed, index, strict=False):
                members.seen, members.index = similarity(r, centroids), i
        return self._within(q, k, v, index[0], index[-1])

    def _local_heads(self, x: Tensor, position: Tensor, state: RoutingState | None) -> Tensor:
        # x [B, S, d_model] -> o [B, S, Hl, D]; the state's keys stand before those of x.
        q, k, v = self.local_qkv(x).unflatten(-1, (3, self.local_heads, self.head_dim)).unbind(2)
        q, k = self._rotated(q, position), self._rotated(k, position)
        if state is not None:
            k, v = torch.cat([state.local_k, k], 1), torch.cat([state.local_v, v], 1)
            first = max(k.shape[1] - self.local_window, 0)
            state.local_k, state.local_v = k[:, first:].detach(), v[:, first:].detach()
        right = 0 if self.is_causal else self.local_window
        window = (self.local_window, right)
        o: Any = attention(
            q, k, v, is_causal=self.is_causal, window_size=window, backend=self.backend
        )
        return o

    def _heads(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        # x [B, S, d_model] -> q, k, v [B, S, Hr, D] and the routing vectors, of q (and of k)
        sizes = (self.routing_heads, self.head_dim)
        q, v = self.to_q(x).unflatten(-1, sizes), self.to_v(x).unflatten(-1, sizes)
        q = self._rotated(q, position)
        if self.shared_qk:
            k = self._normalized(q)
            return (q if self.norm == "l2" else k), k, v, [k]
        k = self._rotated(self.to_k(x).unflatten(-1, sizes), position)
        routed = [self._normalized(q), self._normalized(k)]
        return (q, k, v, routed) if self.norm == "l2" else (*routed, v, routed)

    def _rotated(self, x: Tensor, position: Tensor) -> Tensor:
        if not self.rotary_dim:
            return x
        return apply_rotary(x, *rotary_tables(position, self.rotary_dim))

    def _normalized(self, x: Tensor) -> Tensor:
        if self.norm == "l2":
            return F.normalize(x, dim=-1)
        return F.layer_norm(x, x.shape[-1:], eps=_LAYER_NORM_EPS)

    def _route(self, routed: Tensor, centroids: Tensor) -> Tensor:
        if self.is_causal_prefix:
            return kmeans_route(
                routed, centroids, window=self.window, is_causal_prefix=True,
                length=self.length, backend=without_products(self.backend),
            )  # fmt: skip
        window = min(self.window, routed.shape[1])
        return kmeans_route(
            routed, centroids, window=window, backend=without_products(self.backend)
        )

    def _within(self, q: Tensor, k: Tensor, v: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        return kmeans_routing_attention(
            q, k, v,
            q_index=q_index,
            k_index=k_index,
            is_causal=self.is_causal,
            scale=self.scale,
            mean_eps=self.mean_eps,
            mask_self=self.mask_self,
            backend=self.backend,
        )  # fmt: skip

    def _commitment(self, routed: Tensor, centroids: Tensor) -> Tensor:
        nearest = similarity(routed, centroids).argmax(2)  # [B, H, S]
        head = torch.arange(self.routing_heads, device=routed.device)[:, None]
        target = centroids[head, nearest].transpose(1, 2)  # [B, S, H, D]
        squares = F.mse_loss(routed, target.to(routed.dtype), reduction="sum")
        return self.commitment * squares / max(routed.numel(), 1)

    def _no_members(self, batch_size: int, like: Tensor) -> Members:
        shape = (batch_size, self.routing_heads, self.num_clusters)
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        seen = like.new_zeros(*shape, 0, dtype=dtype)
        return Members(seen, like.new_full((*shape, self.window), -1, dtype=torch.int64))

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, num_heads={self.num_heads}, local_heads={self.local_heads}, "
            f"num_clusters={self.num_clusters}, window={self.window}"
        )


def _check_options(
    d_model: int, num_heads: int, local_heads: int, num_clusters: int, window: int,
    local_window: int, is_causal: bool, is_causal_prefix: bool, norm: str, rotary_dim: int,
) -> None:  # fmt: skip
    name = "KMeansRoutingAttention"
    if num_heads < 1 or d_model % num_heads:
        raise ValueError(f"{name}: d_model {d_model} is not a multiple of num_heads {num_heads}")
    if not 0 <= local_heads < num_heads:
        raise ValueError(
            f"{name}: local_heads is {local_heads}, expected 0 to {num_heads - 1}: without routing "
            "heads use SlidingWindowAttention"
        )
    for what, n, least in (
        ("num_clusters", num_clusters, 1),
        ("window", window, 1),
        ("local_window", local_window, 0),
    ):
        if n < least:
            raise ValueError(f"{name}: {what} is {n}, expected at least {least}")
    if is_causal_prefix and not is_causal:
        raise ValueError(f"{name}: is_causal_prefix is True, expected False without is_causal")
    if norm not in ("l2", "layer"):
        raise ValueError(f'{name}: norm is {norm!r}, expected "l2" or "layer"')
    if rotary_dim % 2 or not 0 <= rotary_dim <= d_model // num_heads:
        raise ValueError(
            f"{name}: rotary_dim is {rotary_dim}, expected an even number between 0 and the head "
            f"dim {d_model // num_heads}"
        )
