# SPDX-License-Identifier: Apache-2.0
"""Validation that the routing operators share. Nothing is allocated here."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from ... import _library
from ..._errors import (
    describe,
    fail,
    require_dense,
    require_one_dtype,
    require_rank,
    require_same_device,
    require_sizes,
    require_tensors,
)
from ..._native import ACCUMULATION, is_readable
from ._grid import Grid, grid_of


def require_count(op: str, name: str, n: object, low: int, high: int | None, remedy: str) -> int:
    """A Python integer from low to high."""
    if not isinstance(n, (int, torch.SymInt)) or isinstance(n, bool):
        got = describe(n) if isinstance(n, Tensor) else repr(n)
        fail(TypeError, op, name, got, _bounds(low, high), remedy)
    if n < low or (high is not None and n > high):
        fail(ValueError, op, name, n, _bounds(low, high), remedy)
    return n  # type: ignore[return-value]


def _bounds(low: int, high: int | None) -> str:
    """In words; only for a call that fails, as torch.compile cannot write a symbolic size."""
    return f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"


def check_grid(op: str, name: str, num_regions: object, x: Tensor, which: str) -> Grid:
    """The grid of an image."""
    if (
        not isinstance(num_regions, (tuple, list))
        or len(num_regions) != 2
        or not all(isinstance(n, int) and not isinstance(n, bool) for n in num_regions)
    ):
        fail(
            TypeError,
            op,
            name,
            repr(num_regions),
            "(rows, columns), two integers",
            "For S regions along each side pass (S, S).",
        )
    rows, columns = num_regions
    if not (1 <= rows <= x.shape[1] and 1 <= columns <= x.shape[2]):
        fail(
            ValueError,
            op,
            name,
            tuple(num_regions),
            f"from 1 to the size of the image of {which}, {tuple(x.shape[1:3])}",
            "A region has at least one token: take fewer regions or a larger image.",
        )
    return grid_of(x, (rows, columns))


def check_graph(op: str, graph: object, q: Tensor, own: Grid, other: Grid) -> Tensor:
    """The graph [B, Hq|1, R, topk]; its values are looked at on the CPU."""
    _check_int64(op, "graph", graph, "hw.bilevel_route makes one.")
    assert isinstance(graph, Tensor)
    first = (q.shape[0], q.shape[3]) if graph.dim() == 4 else (q.shape[0],)
    if graph.dim() not in (3, 4) or graph.shape[:-1] != (*first, own.regions):
        fail(
            ValueError,
            op,
            "graph",
            f"of shape {list(graph.shape)}",
            f"[B, R, topk] or [B, H, R, topk] with B = {q.shape[0]}, H = {q.shape[3]}, "
            f"R = {own.regions}",
            "The regions of q are counted row by row; heads are those of q.",
        )
    require_same_device(op, "q", q, graph=graph)
    check_graph_values(op, graph, other)
    return graph if graph.dim() == 4 else graph[:, None]


def check_graph_values(op: str, graph: Tensor, other: Grid) -> None:
    """Numbers of regions of k."""
    check_range(op, "graph", graph, 0, other.regions, "They count the regions of k row by row.")


def check_slots(op: str, name: str, index: object, q: Tensor, tokens: int) -> Tensor:
    """An index [B, Hq, K, W]; its values are looked at on the CPU."""
    _check_int64(op, name, index, "hw.kmeans_route makes one.")
    assert isinstance(index, Tensor)
    heads = q.shape[2]
    if index.dim() != 4 or index.shape[:2] != (q.shape[0], heads):
        fail(
            ValueError,
            op,
            name,
            f"of shape {list(index.shape)}",
            f"[B, H, K, W] with B = {q.shape[0]}, H = {heads}",
            "Of every head (those of q) and cluster the tokens; repeat it for grouped heads.",
        )
    require_same_device(op, "q", q, **{name: index})
    check_slot_values(op, name, index, tokens)
    return index


def check_slot_values(op: str, name: str, index: Tensor, tokens: int) -> None:
    """Numbers of tokens, or -1."""
    check_range(op, name, index, -1, tokens, "-1 marks an empty slot.")


def _check_int64(op: str, name: str, index: object, remedy: str) -> None:
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        fail(TypeError, op, name, describe(index), "an int64 tensor", remedy)
    require_dense(op, name, index)


_FEW = 4096  # numbers that one thread looks at sooner than torch starts to


def check_range(op: str, name: str, index: Tensor, low: int, end: int, remedy: str) -> None:
    """low <= index < end, of plain tensors on the CPU. A GPU would have to be waited for."""
    if not is_readable(index) or not index.is_cpu or not index.numel():
        return
    if index.numel() <= _FEW:
        least, most = _library.extremes(index)
    else:
        least, most = (int(x) for x in index.aminmax())
    if least < low or most >= end:
        fail(
            ValueError,
            op,
            name,
            f"from {least} to {most}",
            f"indices from {low} to {end - 1}",
            remedy,
        )


def check_sequence(op: str, name: str, x: Tensor) -> None:
    """x [B, S, H, D] of a supported dtype."""
    require_tensors(op, **{name: x})
    require_rank(op, 4, "[B, S, H, D]", **{name: x})
    require_one_dtype(op, ACCUMULATION, **{name: x})


def check_centroids(op: str, centroids: object, x: Tensor) -> Tensor:
    """centroids [H, K, D] that belong to x, of any floating dtype."""
    if not isinstance(centroids, Tensor) or not centroids.is_floating_point():
        _reject_centroids(op, describe(centroids))
    require_dense(op, "centroids", centroids)
    require_rank(op, 3, "[H, K, D]", centroids=centroids)
    heads, d = x.shape[2:]
    require_sizes(op, "[H, K, D]", "centroids", centroids, (heads, centroids.shape[1], d))
    require_same_device(op, "x", x, centroids=centroids)
    return centroids


def _reject_centroids(op: str, got: str) -> NoReturn:
    fail(
        TypeError,
        op,
        "centroids",
        got,
        "a tensor [H, K, D] of floating-point numbers",
        "They are kept in float32 beside half-precision inputs.",
    )
