# SPDX-License-Identifier: Apache-2.0
"""What a user would run instead of the routing operators: torch code as the papers' own is written.

All take the tensors of ours, in their layout, and rearrange them as the official code does. Images
must be whole numbers of regions, and clusters full: the cases of the benchmarks are.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bench.peers import compile_late, eager_attention, sdpa

Peers = dict[str, Callable[..., Tensor]]
Regions = tuple[int, int]

EPS = 1e-5  # of the mean over clusters, in lucidrains' code


def bilevel_peers(regions: Regions, *, compiled: bool) -> Peers:
    """Of q, k, v [B, Y, X, H, D] and graph [B, R, topk]."""
    functions = {"eager": bilevel_gathered, "eager, indexed": bilevel_indexed}
    return _with_compiled(
        {n: functools.partial(f, regions) for n, f in functions.items()}, compiled
    )


def bilevel_routed_peers(regions: Regions, topk: int, *, compiled: bool) -> Peers:
    """Of q, k, v: routing included."""

    def routed(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(regions, q, k, v, bilevel_graph(regions, topk, q, k))

    functions = {"eager": bilevel_gathered, "eager, indexed": bilevel_indexed}
    return _with_compiled({n: functools.partial(routed, f) for n, f in functions.items()}, compiled)


def bilevel_route_peers(regions: Regions, topk: int, *, compiled: bool) -> Peers:
    """Of q, k: the graph."""
    return _with_compiled({"eager": functools.partial(bilevel_graph, regions, topk)}, compiled)


def bilevel_graph(regions: Regions, topk: int, q: Tensor, k: Tensor) -> Tensor:
    """The graph [B, R, topk], from means of regions over all channels."""
    q_mean, k_mean = (_cut(x.detach(), regions).mean(3).transpose(1, 2).flatten(2) for x in (q, k))
    return (q_mean @ k_mean.transpose(-1, -2)).topk(topk, dim=-1).indices


def bilevel_gathered(regions: Regions, q: Tensor, k: Tensor, v: Tensor, graph: Tensor) -> Tensor:
    """As BiFormer's regional_routing_attention_torch: torch.gather from keys and values expanded to
    all regions of queries. Its backward pass fills a tensor of the expanded size."""
    image, topk = q.shape, graph.shape[-1]
    q, k, v = (_cut(x, regions) for x in (q, k, v))  # [B, H, R, n, D]
    batch, heads, count, tokens, _ = k.shape
    chosen = graph[:, None, :, :, None, None].expand(-1, heads, -1, -1, tokens, -1)

    def taken(x: Tensor) -> Tensor:
        x = x[:, :, None].expand(-1, -1, count, -1, -1, -1)
        index = chosen.expand(-1, -1, -1, -1, -1, x.shape[-1])
        return x.gather(3, index).reshape(batch, heads, count, topk * tokens, x.shape[-1])

    return _within_regions(q, taken(k), taken(v), regions, image)


def bilevel_indexed(regions: Regions, q: Tensor, k: Tensor, v: Tensor, graph: Tensor) -> Tensor:
    """The same with one index per region, which nothing is expanded for: the strongest torch form
    that we could write."""
    image = q.shape
    q, k, v = (_cut(x, regions) for x in (q, k, v))
    batch, heads, count = k.shape[:3]
    row = torch.arange(batch * heads, device=q.device).view(batch, heads, 1, 1) * count
    index = (row + graph[:, None]).flatten()  # [B H R topk]: regions of all heads in one list

    def taken(x: Tensor) -> Tensor:
        return x.flatten(0, 2).index_select(0, index).view(batch, heads, count, -1, x.shape[-1])

    return _within_regions(q, taken(k), taken(v), regions, image)


def _within_regions(
    q: Tensor, k: Tensor, v: Tensor, regions: Regions, image: tuple[int, ...]
) -> Tensor:
    """q [B, H, R, n, D] over k, v [B, H, R, topk n, D], as an image again."""
    scale = (image[3] * image[4]) ** -0.5
    p = ((q * scale) @ k.transpose(-1, -2)).softmax(-1)
    o = (p @ v).unflatten(2, regions)
    o = o.unflatten(4, (image[1] // regions[0], image[2] // regions[1]))
    return o.permute(0, 2, 4, 3, 5, 1, 6).reshape(*image[:4], -1)


def _cut(x: Tensor, regions: Regions) -> Tensor:
    """[B, Y, X, H, D] as [B, H, R, n, D]."""
    rows, columns = regions
    x = x.unflatten(2, (columns, -1)).unflatten(1, (rows, -1))
    return x.permute(0, 5, 1, 3, 2, 4, 6).flatten(4, 5).flatten(2, 3)


def kmeans_peers(*, causal: bool, compiled: bool) -> Peers:
    """Of q, k, v [B, S, H, D] and index [B, H, K, W]."""
    return _with_compiled({"eager": functools.partial(kmeans_eager, causal=causal)}, compiled)


def kmeans_routed_peers(mu: Tensor, window: int, *, causal: bool, compiled: bool) -> Peers:
    """Of q, v: queries and keys are shared, k = q / |q|; no token attends to itself unless it sees
    no other; routing included."""

    def routed(q: Tensor, v: Tensor) -> Tensor:
        x = normalize(q, dim=-1)
        return kmeans_eager(q, x, v, kmeans_clusters(x, mu, window), causal=causal, mask_self=True)

    functions = _with_compiled({"eager": routed}, compiled)
    theirs = lucidrains(mu, window, causal=causal)
    return functions if theirs is None else functions | {"routing-transformer": theirs}


def kmeans_route_peers(window: int, *, compiled: bool) -> Peers:
    """Of x, mu: the clusters."""
    return _with_compiled({"eager": functools.partial(kmeans_clusters, window=window)}, compiled)


def kmeans_clusters(x: Tensor, mu: Tensor, window: int) -> Tensor:
    """The members [B, H, K, W] of the clusters, the best first: x [B, S, H, D], mu [H, K, D]."""
    scores = torch.einsum("bthd,hcd->bhct", x.detach(), mu.to(x.dtype))
    return scores.topk(window, dim=-1).indices


def kmeans_eager(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, *, causal: bool, mask_self: bool = False
) -> Tensor:
    """As KmeansAttention of lucidrains' routing-transformer, for given clusters: three gathers, the
    scores of every cluster, and two scatters."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    slots = index.flatten(2)[..., None]

    def taken(x: Tensor) -> Tensor:
        return x.gather(2, slots.expand(-1, -1, -1, x.shape[-1])).unflatten(2, index.shape[2:])

    s = torch.einsum("bhcid,bhcjd->bhcij", taken(q), taken(k)) * q.shape[-1] ** -0.5
    if causal:
        s = s.masked_fill(index[..., :, None] < index[..., None, :], -torch.finfo(s.dtype).max)
    if mask_self:
        s = s.masked_fill(index[..., :, None] == index[..., None, :], -5e4)
    o = torch.einsum("bhcij,bhcjd->bhcid", s.softmax(-1), taken(v)).flatten(2, 3)
    zeros, slots = torch.zeros_like(v), slots.expand_as(o)
    count = zeros.scatter_add(2, slots, torch.ones_like(o))
    return (zeros.scatter_add(2, slots, o) / (count + EPS)).transpose(1, 2)


def lucidrains(mu: Tensor, window: int, *, causal: bool) -> Callable[..., Tensor] | None:
    """KmeansAttention of PyPI's routing-transformer with shared queries and keys, of q, v; None
    where it is not installed."""
    package = _routing_transformer()
    if package is None:
        return None
    heads, clusters, width = mu.shape
    made = package.KmeansAttention(clusters, window, heads, width, causal=causal, shared_qk=True)
    made = made.to(mu.device, mu.dtype).eval()  # no update of the centroids
    made.kmeans.means.copy_(mu)
    made.kmeans.initted.fill_(True)

    def call(q: Tensor, v: Tensor) -> Tensor:
        q, v = q.transpose(1, 2), v.transpose(1, 2)
        o: Tensor = made(q, q, v)[0]
        return o.transpose(1, 2)

    return call


@functools.lru_cache
def _routing_transformer() -> Any:
    """The module, without the packages whose layers it offers beside its own."""
    if importlib.util.find_spec("routing_transformer") is None:
        return None
    others = {
        "local_attention": "LocalAttention",
        "product_key_memory": "PKM",
        "mixture_of_experts": "MoE",
    }
    stubs = {name: types.ModuleType(name) for name in others}
    for name, layer in others.items():
        setattr(stubs[name], layer, None)
    with mock.patch.dict(sys.modules, stubs):
        return importlib.import_module("routing_transformer.routing_transformer")


def moh_peers(*, causal: bool, compiled: bool) -> Peers:
    """Of q, k, v [B, S, H, D] and gate [B, S, H]: all heads, then the gate, as the official code
    does."""

    def through_sdpa(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return sdpa(q, k, v, causal=causal) * gate[..., None]

    def eager(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return eager_attention(q, k, v, causal=causal) * gate[..., None]

    return _with_compiled({"eager": eager, "sdpa times gate": through_sdpa}, compiled)


def _with_compiled(functions: Peers, compiled: bool) -> Peers:
    """Each also under torch.compile: "eager, x" becomes "compiled, x"."""
    if not compiled:
        return functions
    both = dict(functions)
    for name, function in functions.items():
        short = name.removeprefix("eager").removeprefix(", ")
        both["compiled" + (f", {short}" if short else "")] = compile_late(function)
    return both
