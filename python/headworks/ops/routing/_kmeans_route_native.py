# SPDX-License-Identifier: Apache-2.0
"""The native calls of hw.kmeans_route: similarities, then a selection or the prefix rule."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..._functions import NativeFunction
from ..._native import ACCUMULATION, NativeCall, define, described, route, widen
from ..._repeated import Ready
from .._operands import check_operands, require
from ._select_topk_native import ready_rows, select_rows

SIMILARITY = NativeFunction("kmeans_route.similarity")
PREFIX = NativeFunction("kmeans_route.prefix")

# Numbers have 64 bits, and so have products with those of tokens: a longer sequence has the quotas
# of this one.
_LONGEST = 2**53


def kmeans_route(
    x: Tensor, centroids: Tensor, window: int, prefix_length: int | None, backend: str
) -> Tensor:
    """x [B, S, H, D], centroids [H, K, D] in the accumulation dtype -> int64 [B, H, K, W].

    prefix_length None: the W best of all tokens, W <= S. Otherwise the prefix rule for sequences
    of that length, S <= prefix_length; empty slots are -1 and come last. No gradient.
    """
    direct = route("kmeans_route", (x, centroids)) == "direct"
    call = _route if direct else torch.ops.headworks.kmeans_route.default
    return call(x, centroids, window, prefix_length, backend)


def route_prepared(
    x: Tensor, centroids: Tensor, window: int, prefix_length: int | None, backend: str
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """`kmeans_route` as a function of other x and centroids like these; None for empty ones."""
    d, shape = _similarity_fake(x, centroids), (*_similarity_shape(x, centroids)[:3], window)
    if not x.numel() or not d.numel():
        return None
    measure = Ready(SIMILARITY, backend, (x, centroids), (d,), (), (x, centroids))
    rows = d.flatten(0, 2)
    choose = ready_rows(rows, window, True, backend) if prefix_length is None else None
    if prefix_length is not None and window:
        length = min(prefix_length, _LONGEST)
        index = d.new_empty((rows.shape[0], window), dtype=torch.int64)
        choose = Ready(PREFIX, backend, (rows,), (index,), (length,), (rows,))
    if choose is None:
        return None
    sizes = rows.shape
    return lambda x, centroids: choose(measure(x, centroids).view(sizes)).view(shape)


def kmeans_route_call(x: Tensor, centroids: Tensor, backend: str) -> NativeCall:
    """The first call that `kmeans_route` makes, for hw.explain."""
    return described(SIMILARITY, backend, (x, centroids), (_similarity_fake(x, centroids),))


def similarity(x: Tensor, centroids: Tensor, backend: str) -> Tensor:
    """d [B, H, K, S] in the accumulation dtype: kmeans_route.similarity."""
    if x.shape[3] == 0:
        x, centroids = widen(x), widen(centroids)
    d = _similarity_fake(x, centroids)
    if d.numel():
        SIMILARITY.run(backend, (x, centroids), (d,))
    return d


def _similarity_fake(x: Tensor, centroids: Tensor) -> Tensor:
    return x.new_empty(_similarity_shape(x, centroids), dtype=ACCUMULATION[x.dtype])


def _similarity_shape(x: Tensor, centroids: Tensor) -> tuple[int, int, int, int]:
    """[B, H, K, S]"""
    return x.shape[0], x.shape[2], centroids.shape[1], x.shape[1]


def _prefix(d: Tensor, window: int, length: int, backend: str) -> Tensor:
    """d [R, S] -> int64 [R, W]: kmeans_route.prefix."""
    if d.shape[1] == 0:
        return d.new_full((d.shape[0], window), -1, dtype=torch.int64)
    index = d.new_empty((d.shape[0], window), dtype=torch.int64)
    if index.numel():
        PREFIX.run(backend, (d,), (index,), (min(length, _LONGEST),))
    return index


def _route(
    x: Tensor, centroids: Tensor, window: int, prefix_length: int | None, backend: str
) -> Tensor:
    shape = (x.shape[0], x.shape[2], centroids.shape[1], window)
    if 0 in shape:
        return x.new_empty(shape, dtype=torch.int64)
    d = similarity(x, centroids, backend).flatten(0, 2)
    if prefix_length is None:
        return select_rows(d, window, True, backend).view(shape)
    return _prefix(d, window, prefix_length, backend).view(shape)


def _route_operator(
    x: Tensor, centroids: Tensor, window: int, prefix_length: int | None, backend: str
) -> Tensor:
    op = "kmeans_route"
    tokens = check_operands(op, SIMILARITY.inputs, (x, centroids))["S"]
    most = tokens if prefix_length is None else prefix_length
    require(op, "prefix_length", most, most >= tokens, "at least S")
    require(op, "window", window, 0 <= window <= most, "from 0 to S, or to prefix_length")
    return _route(x, centroids, window, prefix_length, backend)


def _route_fake(
    x: Tensor, centroids: Tensor, window: int, prefix_length: int | None, backend: str
) -> Tensor:
    shape = (x.shape[0], x.shape[2], centroids.shape[1], window)
    return x.new_empty(shape, dtype=torch.int64)


define(
    "kmeans_route(Tensor x, Tensor centroids, SymInt window, SymInt? prefix_length, str backend) "
    "-> Tensor",
    _route_operator,
    _route_fake,
)
