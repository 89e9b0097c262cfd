# SPDX-License-Identifier: Apache-2.0
"""The native calls of hw.bilevel_route: means of regions, their scores, a selection."""

from __future__ import annotations

import torch
from torch import Tensor

from .._native import ACCUMULATION, NativeCall, define, route, run
from ..reference.bilevel_routing import Grid
from ._routing_attention_native import image_cells
from ._select_topk_native import select_rows


def bilevel_route(
    q: Tensor, k: Tensor, own: Grid, other: Grid, topk: int, per_head: bool, backend: str
) -> Tensor:
    """q [B, Y, X, Hq, D], k [B, Yk, Xk, H, D] -> int64 [B, R, topk] or [B, Hq, R, topk].

    `own` cuts the image of q into R regions, `other` that of k into Rk; 1 <= topk <= Rk.
    """
    direct = route("bilevel_route", (q, k)) == "direct"
    call = _route if direct else torch.ops.headworks.bilevel_route.default
    graph: Tensor = call(q, k, list(own), list(other), topk, per_head, backend)
    return graph


def bilevel_route_call(q: Tensor, k: Tensor, own: Grid, backend: str) -> NativeCall:
    """The first call that `bilevel_route` makes, for hw.explain."""
    tensors = [q, _means_of(q, own), None]
    return "bilevel_route.means", backend, tensors, image_cells(own, (q.shape[1], q.shape[2]))


def _route(
    q: Tensor,
    k: Tensor,
    own: list[int],
    other: list[int],
    topk: int,
    per_head: bool,
    backend: str,
) -> Tensor:
    shape = _route_fake(q, k, own, other, topk, per_head, backend).shape
    scores = _scores(q, k, Grid(*own), Grid(*other), per_head, backend)
    return select_rows(scores.flatten(0, -2), topk, False, backend).view(shape)


def _route_fake(
    q: Tensor,
    k: Tensor,
    own: list[int],
    other: list[int],
    topk: int,
    per_head: bool,
    backend: str,
) -> Tensor:
    heads = (q.shape[3],) if per_head else ()
    return q.new_empty((q.shape[0], *heads, own[0] * own[1], topk), dtype=torch.int64)


def _scores(q: Tensor, k: Tensor, own: Grid, other: Grid, per_head: bool, backend: str) -> Tensor:
    """A [B, Hq | 1, R, Rk]"""
    shape = (q.shape[0], q.shape[3] if per_head else 1, own.regions, other.regions)
    if not (q.numel() and k.numel()):
        return q.new_zeros(shape, dtype=ACCUMULATION[q.dtype])
    a = q.new_empty(shape, dtype=ACCUMULATION[q.dtype])
    means = (_means(x, grid, backend) for x, grid in ((q, own), (k, other)))
    run("bilevel_route.scores", backend, [*means, a], ())
    return a


def _means(x: Tensor, grid: Grid, backend: str) -> Tensor:
    m = _means_of(x, grid)
    run("bilevel_route.means", backend, [x, m], image_cells(grid, (x.shape[1], x.shape[2])))
    return m


def _means_of(x: Tensor, grid: Grid) -> Tensor:
    """[B, R, H, D], unfilled."""
    size = (x.shape[0], grid.regions, *x.shape[3:])
    return x.new_empty(size, dtype=ACCUMULATION[x.dtype])


define(
    "bilevel_route(Tensor q, Tensor k, SymInt[] own, SymInt[] other, SymInt topk, bool per_head,"
    " str backend) -> Tensor",
    _route,
    _route_fake,
)
