# SPDX-License-Identifier: Apache-2.0
"""Bi-level routing attention (BiFormer, arXiv 2303.08810) in plain PyTorch: gathered keys.

An image of Y x X tokens is cut into R regions of h x w tokens, n = h w, in row-major order. The
last row and the last column of regions may reach beyond the image, where nothing but padding is.

    q^r, k^r = means over the tokens of each region           A = sum_heads q^r (k^r)^T   [R, R]
    I_r      = the topk largest of row r of A                 one graph for all heads, or one each
    o_i      = sum_{j in I_r} softmax_j(scale <q_i, k_j>) v_j      i in region r

Padding beyond the image is no part of a mean. As a key it is hidden (mask_padding), or counts as
a key 0 with the value 0: its score is 0 and it takes a share of the softmax.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .attention import Statistics, _softmax, _statistics
from .select_topk import select_topk


class Grid(NamedTuple):
    """How an image is cut."""

    rows: int  # of regions
    columns: int
    height: int  # of a region, in tokens
    width: int

    @property
    def regions(self) -> int:
        """R"""
        return self.rows * self.columns


def grid_of(x: Tensor, num_regions: tuple[int, int]) -> Grid:
    """Regions of floor(Y / rows wanted) x floor(X / columns wanted) tokens, as many as it takes.

    Where the numbers do not divide, there are more regions than asked for.
    """
    height, width = (size // n for size, n in zip(x.shape[1:3], num_regions, strict=True))
    return Grid(-(-x.shape[1] // height), -(-x.shape[2] // width), height, width)


def bilevel_route(
    q: Tensor,  # [B, Y, X, Hq, D]
    k: Tensor,  # [B, Yk, Xk, H, D]
    *,
    num_regions: tuple[int, int],
    kv_num_regions: tuple[int, int] | None = None,
    topk: int,
    per_head: bool = False,
) -> Tensor:
    """The graph, int64 [B, R, topk] or [B, Hq, R, topk]: the best region first."""
    own, other = grid_of(q, num_regions), grid_of(k, kv_num_regions or num_regions)
    return select_topk(region_scores(q, k, own, other, per_head), topk, keep_order=False)


def region_scores(q: Tensor, k: Tensor, own: Grid, other: Grid, per_head: bool) -> Tensor:
    """A [B, R, Rk] or, of each head, [B, Hq, R, Rk]. No gradient."""
    q_mean = _means(q.detach(), own)  # [B, Hq, R, D]
    k_mean = _means(_heads_of(k.detach(), q), other)
    a = q_mean @ k_mean.transpose(-1, -2)
    return a if per_head else a.sum(1)


def bilevel_routing_attention(
    q: Tensor,  # [B, Y, X, Hq, D]
    k: Tensor,  # [B, Yk, Xk, H, D]
    v: Tensor,  # [B, Yk, Xk, H, Dv]
    graph: Tensor,  # [B, R, topk], [B, 1, R, topk] or [B, Hq, R, topk]
    *,
    num_regions: tuple[int, int],
    kv_num_regions: tuple[int, int] | None = None,
    scale: float | None = None,
    mask_padding: bool = True,
) -> tuple[Tensor, Statistics]:
    """The output [B, Y, X, Hq, Dv], and the statistics of its rows [B, Hq, Y, X]."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads = q.shape[0], q.shape[3]
    graph = (graph if graph.dim() == 4 else graph[:, None]).expand(-1, heads, -1, -1)
    scale = (heads * q.shape[-1]) ** -0.5 if scale is None else scale
    own, other = grid_of(q, num_regions), grid_of(k, kv_num_regions or num_regions)
    real = to_regions(k.new_ones(1, *k.shape[1:3], 1, 1), other)[0, 0, :, :, 0] > 0  # [Rk, n]

    # Of every query region the tokens of its key regions, one after the other: j = 1 .. topk n.
    b = torch.arange(batch, device=q.device)[:, None, None, None]
    h = torch.arange(heads, device=q.device)[:, None, None]
    k, v = (to_regions(_heads_of(x, q), other)[b, h, graph].flatten(3, 4) for x in (k, v))
    image, q = q, to_regions(q, own)  # [B, Hq, R, n, D]

    s = torch.einsum("bhrid,bhrjd->bhrij", q.to(dtype), k.to(dtype))
    s = s * scale
    if mask_padding:
        s = torch.where(real[graph].flatten(3)[..., None, :], s, -torch.inf)
    p, lse = _softmax(s, None, None)
    o = torch.einsum("bhrij,bhrje->bhrie", p.to(v.dtype), v)

    statistics = [
        None if x is None else to_image(x[..., None], own, image)[..., 0].permute(0, 3, 1, 2)
        for x in _statistics(p.detach(), lse, None)
    ]
    return to_image(o, own, image), Statistics(*statistics)  # type: ignore[arg-type]


def _cut(grid: Grid) -> tuple[int, int, int, int]:
    return grid.rows, grid.height, grid.columns, grid.width


def _means(x: Tensor, grid: Grid) -> Tensor:
    """[B, H, R, D]: over the tokens of the image, not over padding."""
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    count = to_regions(torch.ones_like(x[:1, :, :, :1, :1]), grid).sum(3)  # [1, 1, R, 1]
    return to_regions(x, grid).sum(3) / count


def _heads_of(x: Tensor, q: Tensor) -> Tensor:
    """The heads of k or v repeated for the query heads that share them."""
    return x.repeat_interleave(q.shape[3] // x.shape[3], 3) if x.shape[3] else x


def to_regions(x: Tensor, grid: Grid) -> Tensor:
    """[B, Y, X, H, D] as [B, H, R, n, D], with zeros beyond the image."""
    below, beyond = grid.rows * grid.height - x.shape[1], grid.columns * grid.width - x.shape[2]
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, beyond, 0, below))
    x = x.reshape(x.shape[0], *_cut(grid), *x.shape[3:])  # [B, rows, height, columns, width, H, D]
    return x.permute(0, 5, 1, 3, 2, 4, 6).flatten(4, 5).flatten(2, 3)


def to_image(x: Tensor, grid: Grid, like: Tensor) -> Tensor:
    """[B, H, R, n, D] as [B, Y, X, H, D], without what lies beyond the image of `like`."""
    rows, height, columns, width = _cut(grid)
    x = x.reshape(*x.shape[:2], rows, columns, height, width, x.shape[-1])
    x = x.permute(0, 2, 4, 3, 5, 1, 6).flatten(3, 4).flatten(1, 2)
    return x[:, : like.shape[1], : like.shape[2]]
