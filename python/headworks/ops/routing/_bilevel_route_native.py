# SPDX-License-Identifier: Apache-2.0
"""The native calls of hw.bilevel_route: means of regions, their scores, a selection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._functions import NativeFunction
from ..._native import ACCUMULATION, NativeCall, define, described, route
from ..._repeated import Ready
from .._operands import check_operands, operands, require
from ._grid import Grid
from ._routing_attention_native import image_grid
from ._select_topk_native import ready_rows, select_rows

MEANS = NativeFunction("bilevel_route.means")
SCORES = NativeFunction("bilevel_route.scores")


def bilevel_route(
    q: Tensor, k: Tensor, own: Grid, other: Grid, topk: int, per_head: bool, backend: str
) -> Tensor:
    """q [B, Y, X, Hq, D], k [B, Yk, Xk, H, D] -> int64 [B, R, topk] or [B, Hq, R, topk].

    `own` cuts the image of q into R regions, `other` that of k into Rk; 1 <= topk <= Rk.
    """
    direct = route("bilevel_route", (q, k)) == "direct"
    call = _route if direct else torch.ops.headworks.bilevel_route.default
    graph: Tensor = call(q, k, *own, *other, topk, per_head, backend)
    return graph


def route_prepared(
    q: Tensor, k: Tensor, own: Grid, other: Grid, topk: int, per_head: bool, backend: str
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """`bilevel_route` as a function of other q and k like these; None for empty ones."""
    if not (q.numel() and k.numel()):
        return None
    shape = _shape(q, own, topk, per_head)
    of_q, of_k = _means_of(q, own), _means_of(k, other)
    a = q.new_empty(_scores_shape(q, own, other, per_head), dtype=of_q.dtype)
    rows = a.flatten(0, -2)
    grid_q, grid_k = (
        image_grid(grid, (x.shape[1], x.shape[2])) for x, grid in ((q, own), (k, other))
    )
    average_q = Ready(MEANS, backend, (q,), (of_q,), grid_q, (q,))
    average_k = Ready(MEANS, backend, (k,), (of_k,), grid_k, (k,))
    score = Ready(SCORES, backend, (of_q, of_k), (a,), (), (of_q, of_k))
    choose = ready_rows(rows, topk, False, backend)
    if choose is None:
        return None
    sizes = rows.shape
    return lambda q, k: choose(score(average_q(q), average_k(k)).view(sizes)).view(shape)


def bilevel_route_call(q: Tensor, k: Tensor, own: Grid, backend: str) -> NativeCall:
    """The first call that `bilevel_route` makes, for hw.explain."""
    numbers = image_grid(own, (q.shape[1], q.shape[2]))
    return described(MEANS, backend, (q,), (_means_of(q, own),), numbers)


def _route(q: Tensor, k: Tensor, *numbers: Any) -> Tensor:
    own, other, (topk, per_head, backend) = _unpacked(*numbers)
    shape = _shape(q, own, topk, per_head)
    scores = _scores(q, k, own, other, per_head, backend)
    return select_rows(scores.flatten(0, -2), topk, False, backend).view(shape)


def _grid(which: str) -> str:
    """One by one: torch.jit.trace records no lists of symbolic integers."""
    return ", ".join(f"SymInt {which}_{name}" for name in Grid._fields)


def _unpacked(*numbers: Any) -> tuple[Grid, Grid, tuple[Any, ...]]:
    """The grids of q and of k, and the other numbers."""
    return Grid(*numbers[:4]), Grid(*numbers[4:8]), numbers[8:]


_OPERANDS = operands(q="element B Y X Hq D", k="element B Yk Xk H D")


def _route_operator(q: Tensor, k: Tensor, *numbers: Any) -> Tensor:
    op = "bilevel_route"
    own, other, (topk, *_) = _unpacked(*numbers)
    sizes = check_operands(op, _OPERANDS, (q, k))
    for name, grid, image in (("own", own, ("Y", "X")), ("other", other, ("Yk", "Xk"))):
        cut = min(grid) > 0
        for number, size, axis in zip(grid[:2], grid[2:], image, strict=True):
            cut = cut and number == -(-sizes[axis] // size)
        require(op, name, tuple(grid), cut, "rows, columns, height, width: regions of the image")
    require(op, "topk", topk, 0 <= topk <= other.regions, f"0 to {other.regions}, the regions of k")
    return _route(q, k, *numbers)


def _route_fake(q: Tensor, k: Tensor, *numbers: Any) -> Tensor:
    own, _, (topk, per_head, _) = _unpacked(*numbers)
    return q.new_empty(_shape(q, own, topk, per_head), dtype=torch.int64)


def _shape(q: Tensor, own: Grid, topk: int, per_head: bool) -> tuple[int, ...]:
    return (q.shape[0], *((q.shape[3],) if per_head else ()), own.regions, topk)


def _scores(q: Tensor, k: Tensor, own: Grid, other: Grid, per_head: bool, backend: str) -> Tensor:
    """A [B, Hq | 1, R, Rk]"""
    shape = _scores_shape(q, own, other, per_head)
    if not (q.numel() and k.numel()):
        return q.new_zeros(shape, dtype=ACCUMULATION[q.dtype])
    a = q.new_empty(shape, dtype=ACCUMULATION[q.dtype])
    means = (_means(x, grid, backend) for x, grid in ((q, own), (k, other)))
    SCORES.run(backend, tuple(means), (a,))
    return a


def _scores_shape(q: Tensor, own: Grid, other: Grid, per_head: bool) -> tuple[int, int, int, int]:
    return q.shape[0], q.shape[3] if per_head else 1, own.regions, other.regions


def _means(x: Tensor, grid: Grid, backend: str) -> Tensor:
    m = _means_of(x, grid)
    MEANS.run(backend, (x,), (m,), image_grid(grid, (x.shape[1], x.shape[2])))
    return m


def _means_of(x: Tensor, grid: Grid) -> Tensor:
    """[B, R, H, D], unfilled."""
    size = (x.shape[0], grid.regions, *x.shape[3:])
    return x.new_empty(size, dtype=ACCUMULATION[x.dtype])


define(
    f"bilevel_route(Tensor q, Tensor k, {_grid('q')}, {_grid('k')}, SymInt topk, bool per_head,"
    " str backend) -> Tensor",
    _route_operator,
    _route_fake,
)
