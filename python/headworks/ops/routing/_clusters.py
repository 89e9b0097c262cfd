# SPDX-License-Identifier: Apache-2.0
"""What online k-means computes, made of torch operations in fp32 (fp64 for fp64)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._native import ACCUMULATION

_SHORTEST = 1e-12  # a shorter sum has no direction worth its name: it is divided by this


def similarity(x: Tensor, centroids: Tensor) -> Tensor:
    """<x_t, mu_c> of x [B, S, H, D] and centroids [H, K, D]: [B, H, K, S]. No gradient."""
    dtype = ACCUMULATION[x.dtype]
    columns = x.detach().to(dtype).permute(0, 2, 3, 1)  # [B, H, D, S]
    return centroids.detach().to(dtype) @ columns


def cluster_sums(x: Tensor, centroids: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of every cluster the sum of its tokens [H, K, D] and their number [H, K, 1].

    The tokens of a cluster are those of index [B, H, K, W]; without it, those to which no other
    centroid is more similar, the first of several. Tokens that are not finite are left out.
    """
    heads, clusters, d = centroids.shape
    x = x.detach().to(ACCUMULATION[x.dtype]).transpose(1, 2)  # [B, H, S, D]
    if x.shape[2] == 0 or clusters == 0:
        return x.new_zeros(heads, clusters, d), x.new_zeros(heads, clusters, 1)
    counts = x.isfinite().all(-1)  # [B, H, S]
    x = x.masked_fill(~counts[..., None], 0)
    if index is None:
        return _sums_of_nearest(x, counts, centroids)
    return _sums_of_members(x, counts, index)


def _sums_of_nearest(x: Tensor, counts: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    # A product with the one-hot assignment: the order of additions does not vary.
    s = similarity(x.transpose(1, 2), centroids)  # [B, H, K, S]
    nearest = s.masked_fill(s.isnan(), -torch.inf).argmax(2, keepdim=True)
    clusters = torch.arange(s.shape[2], device=x.device)[:, None]
    own = (nearest == clusters) & counts[:, :, None]  # [B, H, K, S]
    own = own.to(x.dtype)
    return (own @ x).sum(0), own.sum((0, 3))[..., None]


def _sums_of_members(x: Tensor, counts: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, _ = x.shape
    filled = (index >= 0) & (index < tokens)
    b = torch.arange(batch, device=x.device)[:, None, None, None]
    h = torch.arange(heads, device=x.device)[:, None, None]
    where = index.clamp(0, tokens - 1)
    members = x[b, h, where].masked_fill(~filled[..., None], 0)  # [B, H, K, W, D]
    number = (filled & counts[b, h, where]).to(x.dtype)
    return members.sum((0, 3)), number.sum((0, 3))[..., None]


def moved(centroids: Tensor, total: Tensor, number: Tensor, decay: float) -> Tensor:
    """The centroids [H, K, D] after clusters of these sums [H, K, D] and numbers [H, K, 1].

    A cluster without tokens, or whose sum overflows, keeps its centroid.
    """
    length = torch.linalg.vector_norm(total, dim=-1, keepdim=True)
    target = total / length.clamp(min=_SHORTEST)
    mu = centroids.detach().to(total.dtype)
    after = decay * mu + (1 - decay) * target
    stays = (number == 0) | ~length.isfinite()
    return torch.where(stays, mu, after).to(centroids.dtype)
