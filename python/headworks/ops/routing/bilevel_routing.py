# SPDX-License-Identifier: Apache-2.0
"""hw.bilevel_route and hw.bilevel_routing_attention: attention to the regions chosen by regions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._errors import describe, fail, require_flag, require_number
from ..._native import (
    NATIVE_CALLS,
    Maybe,
    NativeCall,
    as_written,
    backend_for,
    without_products,
)
from ..._repeated import Repeated, detached
from ...reference import bilevel_routing as reference
from .._images import check_image_values, check_images
from ..attention._checks import cast
from ..attention.attention import Aux, AuxResult, check_flags
from . import _native as native
from ._bilevel_route_native import bilevel_route as native_route
from ._bilevel_route_native import bilevel_route_call, route_prepared
from ._checks import (
    check_graph,
    check_graph_values,
    check_grid,
    require_count,
)
from ._grid import Grid

_ROUTE = "bilevel_route"
_ATTEND = "bilevel_routing_attention"

Regions = tuple[int, int]


def bilevel_route(
    q: Tensor,
    k: Tensor,
    *,
    num_regions: Regions = (7, 7),
    topk: int,
    kv_num_regions: Regions | None = None,
    per_head: bool = False,
    backend: str = "auto",
) -> Tensor:
    r"""The graph of bi-level routing: to each region of q the topk regions of k that suit it best.

    .. math::
        A = \sum_h \bar q_h \bar k_h^T \in \mathbb{R}^{R \times R_k}, \qquad
        I_r = \text{the topk largest of } A_r \text{ by } (-A_{rs}, s)

    where the bar is the mean over the tokens of a region. The sum runs over all channels, heads
    concatenated, so that the heads share one graph; with per_head each has its own.

    An image of Y x X tokens is cut into regions of floor(Y / rows) x floor(X / columns) tokens for
    num_regions = (rows, columns), as many as it takes, row by row from the upper left. Where the
    numbers do not divide there are therefore more regions than asked for, R = ceil(Y / height)
    ceil(X / width), and the last ones reach beyond the image; a mean is over tokens of the image
    alone.

    Args:
        q: [B, Y, X, Hq, D]. float64, float32, bfloat16 or float16; any strides.
        k: [B, Yk, Xk, H, D], with Hq a multiple of H; its image may have another size.
        num_regions: (rows, columns), at most the size of the image.
        topk: from 1 to the number of regions of k.
        kv_num_regions: (rows, columns) of k; num_regions by default.
        per_head: a graph for each head of q.
        backend: "auto", "reference", or a compiled one by name.

    Returns:
        graph, int64 [B, R, topk], or [B, Hq, R, topk] with per_head; the best region first.
        Routing has no gradient.

    Equal scores rank by the number of the region, NaN counts as the smallest (hw.select_topk).
    Means and scores are fp32 (fp64 for fp64).

    Raises:
        ValueError: shapes that do not fit, an image smaller than its grid, topk out of range.
        TypeError: unsupported or mixed dtypes, numbers that are none.
        RuntimeError: tensors on different devices, or a backend of another device.
        NotImplementedError: a backend that cannot take the call.

    Source: Zhu et al., "BiFormer", CVPR 2023, arXiv 2303.08810.

    Example:
        >>> import torch, headworks as hw
        >>> q, k = torch.randn(2, 1, 28, 28, 4, 32)
        >>> hw.bilevel_route(q, k, topk=4).shape
        torch.Size([1, 49, 4])
    """
    q, k = detached(q), detached(k)
    key = _routes.key((q, k), num_regions, topk, kv_num_regions, per_head, backend)
    if (ready := _routes.get(key)) is not None:
        return ready(q, k)
    q, k, own, other, topk, per_head, backend = _checked_route(
        q, k, num_regions, topk, kv_num_regions, per_head, backend
    )
    if backend == "reference":
        with as_written(q):
            return reference.bilevel_route(
                q, k, num_regions=num_regions, kv_num_regions=kv_num_regions, topk=topk,
                per_head=per_head,
            )  # fmt: skip
    given = q, k, own, other, topk, per_head, backend
    _routes.offer(key, route_prepared, *given)
    return native_route(*given)


_routes: Repeated[Callable[[Tensor, Tensor], Tensor]] = Repeated(_ROUTE)


def _checked_route(
    q: Tensor,
    k: Tensor,
    num_regions: Regions,
    topk: int,
    kv_num_regions: Regions | None,
    per_head: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Grid, Grid, int, bool, str]:
    q, k = cast(q, k)
    check_images(_ROUTE, q, k)
    own, other, _ = _grids(_ROUTE, q, k, num_regions, kv_num_regions)
    topk = _check_topk(_ROUTE, topk, other)
    per_head = require_flag(_ROUTE, "per_head", per_head)
    return q, k, own, other, topk, per_head, backend_for(_ROUTE, backend, q)


def _route_call(
    q: Tensor,
    k: Tensor,
    *,
    num_regions: Regions = (7, 7),
    topk: int,
    kv_num_regions: Regions | None = None,
    per_head: bool = False,
    backend: str = "auto",
) -> NativeCall:
    q, k, own, _, _, _, backend = _checked_route(
        q, k, num_regions, topk, kv_num_regions, per_head, backend
    )
    return bilevel_route_call(q, k, own, backend)


NATIVE_CALLS[bilevel_route] = _route_call


def bilevel_routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_regions: Regions = (7, 7),
    topk: int = 4,
    graph: Tensor | None = None,
    kv_num_regions: Regions | None = None,
    scale: float | None = None,
    mask_padding: bool = True,
    return_aux: Aux | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, AuxResult]:
    r"""Softmax attention of each token to the tokens of the topk regions that its region chose.

    .. math::
        o_i = \sum_{j \in I_{r(i)}} p_{ij} v_j, \qquad
        p_{ij} = e^{s_{ij} - L_i}, \quad s_{ij} = \mathrm{scale} \langle q_i, k_j \rangle

    I_r is the graph of :func:`headworks.bilevel_route`, which says how images are cut into
    regions. With topk = all regions this is full attention. A region that a given graph lists
    twice counts twice.

    The official implementations treat an image that its grid does not divide in two ways:

    * NCHW: zeros are appended after the projection and not masked. ``mask_padding=False``: each
      place of a chosen region beyond the image is a key of score 0 and value 0.
    * legacy: the input is padded to a multiple of the grid before the projection, so that padding
      has keys and values of its own. Pad before the call, as hw.nn.BiLevelRoutingAttention does.

    Args:
        q: [B, Y, X, Hq, D]. float64, float32, bfloat16 or float16; any strides.
        k: [B, Yk, Xk, H, D], with Hq a multiple of H; its image may have another size.
        v: [B, Yk, Xk, H, Dv], any Dv.
        num_regions: (rows, columns), at most the size of the image.
        topk: from 1 to the number of regions of k; of no effect with a graph.
        graph: int64 [B, R, topk], or [B, Hq, R, topk] for a graph of each head, of numbers of the
            regions of k: routing from elsewhere. Checked only where it lies on the CPU.
        kv_num_regions: (rows, columns) of k; num_regions by default.
        scale: of the scores; ``(Hq * D) ** -0.5`` by default, all channels, as in BiFormer.
        mask_padding: hide what lies beyond the image of k.
        return_aux: read-outs of the rows, hw.Aux without mass.
        backend: "auto", "reference", or a compiled one by name. Routing runs without tensor cores
            whatever the name.

    Returns:
        o [B, Y, X, Hq, Dv] in the dtype of the inputs, or (o, AuxResult of [B, Hq, Y, X]).

    Gradients flow to q, k and v, from o and the lse; none to the routing. Regions that nobody
    chose get gradients of exactly 0. Under ``torch.autocast`` q, k and v are cast to its dtype.

    Raises:
        ValueError: shapes that do not fit, an image smaller than its grid, topk or the graph out
            of range.
        TypeError: unsupported or mixed dtypes, numbers that are none.
        RuntimeError: tensors on different devices, or a backend of another device.
        NotImplementedError: a backend that cannot take the call; return_aux with mass.

    Source: Zhu et al., "BiFormer", CVPR 2023, arXiv 2303.08810.

    Example:
        >>> import torch, headworks as hw
        >>> q, k, v = torch.randn(3, 1, 28, 28, 4, 32)
        >>> o = hw.bilevel_routing_attention(q, k, v, topk=4)
        >>> o.shape
        torch.Size([1, 28, 28, 4, 32])
    """
    key = None
    if return_aux is None:
        tensors = (q, k, v) if graph is None else (q, k, v, graph)
        options = num_regions, kv_num_regions, topk, scale, mask_padding, backend
        key = _repeated.key(tensors, *options)
        if (ready := _repeated.get(key)) is not None:
            return ready(q, k, v, graph)
    given, read_outs, name = _checked(
        q, k, v, num_regions=num_regions, topk=topk, graph=graph, kv_num_regions=kv_num_regions,
        scale=scale, mask_padding=mask_padding, return_aux=return_aux, backend=backend,
    )  # fmt: skip
    _repeated.offer(key, _ready, given, graph is None, name)
    return _attend(given, read_outs, name, return_aux is None, (num_regions, kv_num_regions))


def _attend(
    given: Arguments, read_outs: ReadOuts, backend: str, alone: bool,
    asked: tuple[Regions, Regions | None],
) -> Tensor | tuple[Tensor, AuxResult]:  # fmt: skip
    """o, `alone` or with the read-outs; the reference cuts images itself, as they were asked."""
    o: Any
    made: Any
    if backend == "reference":
        q, k, v, lists, _, _, scale, mask_padding = given
        with as_written(q):
            o, made = reference.bilevel_routing_attention(
                q, k, v, lists, num_regions=asked[0], kv_num_regions=asked[1], scale=scale,
                mask_padding=mask_padding,
            )  # fmt: skip
    else:
        o, *made = native.bilevel_routing_attention(*given, read_outs, backend)
    if alone:
        return o  # type: ignore[no-any-return]
    return o, AuxResult(*(x if y else None for y, x in zip(read_outs, made[:4], strict=True)))


Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Grid, Grid, float, bool]
ReadOuts = tuple[bool, bool, bool, bool]

_Ready = Callable[[Tensor, Tensor, Tensor, Maybe], Tensor]  # q, k, v, graph -> o
_repeated: Repeated[_Ready] = Repeated(_ATTEND)


def _ready(given: Arguments, routes: bool, backend: str) -> _Ready | None:
    """A call that has passed its checks, for others like it; None where there is no shorter way."""
    attend = None if backend == "reference" else native.bilevel_prepared(*given, backend=backend)
    if attend is None:
        return None
    q, k, _, graph, own, other, _, _ = given
    if routes:
        by = without_products(backend)
        choose = route_prepared(q, k, own, other, graph.shape[3], False, by)
        assert choose is not None  # there are elements, or `attend` would not be there
        return lambda q, k, v, _: attend(q, k, v, choose(q, k))

    def ready(q: Tensor, k: Tensor, v: Tensor, graph: Maybe) -> Tensor:
        assert graph is not None
        check_graph_values(_ATTEND, graph, other)
        return attend(q, k, v, graph)

    return ready


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_regions: Regions = (7, 7),
    topk: int = 4,
    graph: Tensor | None = None,
    kv_num_regions: Regions | None = None,
    scale: float | None = None,
    mask_padding: bool = True,
    return_aux: Aux | None = None,
    backend: str = "auto",
    routes: bool = True,
) -> tuple[Arguments, ReadOuts, str]:
    """q k v graph, the grids of q and of k, scale, mask_padding; read-outs; the backend. The graph
    is unfilled where there is none and the call is not to route."""
    q, k, v = cast(q, k, v)
    check_images(_ATTEND, q, k)
    check_image_values(_ATTEND, v, k)
    own, other, kv_num_regions = _grids(_ATTEND, q, k, num_regions, kv_num_regions)
    if graph is None:
        topk = _check_topk(_ATTEND, topk, other)
    else:
        graph = check_graph(_ATTEND, graph, q, own, other)
    if scale is None:
        scale = float(max(q.shape[3] * q.shape[4], 1) ** -0.5)
    else:
        scale = require_number(_ATTEND, "scale", scale)
    mask_padding = require_flag(_ATTEND, "mask_padding", mask_padding)
    aux = _check_aux(return_aux)
    backend = backend_for(_ATTEND, backend, q)
    if graph is None and not routes:
        graph = q.new_empty((q.shape[0], 1, own.regions, topk), dtype=torch.int64)
    elif graph is None:
        graph = bilevel_route(
            q, k, num_regions=num_regions, topk=topk, kv_num_regions=kv_num_regions,
            backend=without_products(backend),
        )[:, None]  # fmt: skip
    read_outs = aux.lse, aux.entropy, aux.p_max, aux.sq_norm
    return (q, k, v, graph, own, other, scale, mask_padding), read_outs, backend


def _attend_call(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> NativeCall:
    given, read_outs, backend = _checked(q, k, v, routes=False, **options)
    return native.bilevel_call(*given, read_outs=read_outs, backend=backend)


NATIVE_CALLS[bilevel_routing_attention] = _attend_call


def _grids(
    op: str, q: Tensor, k: Tensor, num_regions: Regions, kv_num_regions: Regions | None
) -> tuple[Grid, Grid, Regions]:
    """The grids of q and of k, and the numbers of the latter."""
    own = check_grid(op, "num_regions", num_regions, q, "q")
    if kv_num_regions is None:
        return own, check_grid(op, "num_regions", num_regions, k, "k"), num_regions
    return own, check_grid(op, "kv_num_regions", kv_num_regions, k, "k"), kv_num_regions


def _check_topk(op: str, topk: int, other: Grid) -> int:
    remedy = f"The image of k has {other.rows} x {other.columns} regions."
    return require_count(op, "topk", topk, 1, other.regions, remedy)


def _check_aux(return_aux: Aux | None) -> Aux:
    if return_aux is None:
        return Aux()
    if not isinstance(return_aux, Aux):
        fail(
            TypeError,
            _ATTEND,
            "return_aux",
            describe(return_aux),
            "headworks.Aux(...)",
            "Name the read-outs, for example return_aux=headworks.Aux(lse=True).",
        )
    check_flags(_ATTEND, return_aux)
    if return_aux.mass is not None:
        fail(
            NotImplementedError,
            _ATTEND,
            "return_aux.mass",
            "given",
            "None: the rows see different regions",
            "Append an indicator of the keys to v as one more channel; its output is the mass.",
        )
    return return_aux
