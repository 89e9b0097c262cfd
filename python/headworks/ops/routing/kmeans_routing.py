# SPDX-License-Identifier: Apache-2.0
"""hw.kmeans_route, hw.kmeans_routing_attention and hw.kmeans_update: attention within clusters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from ..._errors import describe, fail, require_flag, require_number
from ..._native import ACCUMULATION, NATIVE_CALLS, Maybe, NativeCall, as_written, backend_for
from ..._repeated import Repeated, detached
from ...reference import kmeans_routing as reference
from ..attention._checks import cast, check_inputs, check_values
from . import _kmeans_route_native as route_native
from . import _native as native
from ._checks import (
    check_centroids,
    check_sequence,
    check_slot_values,
    check_slots,
    require_count,
)
from ._clusters import cluster_sums, moved

_ROUTE = "kmeans_route"
_ATTEND = "kmeans_routing_attention"
_UPDATE = "kmeans_update"


def kmeans_route(
    x: Tensor,
    centroids: Tensor,
    *,
    window: int,
    is_causal_prefix: bool = False,
    length: int | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Balanced clusters: to each centroid the ``window`` tokens of the largest similarity.

    .. math::
        d_{tc} = \langle x_t, \mu_c \rangle, \qquad
        I_c = \text{the first } W \text{ tokens by } (-d_{tc}, t)

    Every cluster has W members; a token may be in several clusters or in none. Give x and
    centroids equal norms each (L2 or layer normalisation), so that the largest similarity is the
    smallest distance.

    **Causality.** The W best of the whole sequence depend on later tokens: attention over them
    never reads a later value, but a later token may take an earlier one's place. With
    is_causal_prefix the membership of token t follows from tokens 0 .. t alone and is final: t
    joins cluster c if it is among the first

    .. math:: \lceil (t + 1) W / \mathrm{length} \rceil

    of tokens 0 .. t by (-d, position), that is in the best share W / length of what came so far,
    while c has fewer than W members. Slots that stay empty are -1 and come last. For one `length`
    the members of a prefix of the sequence are those of the sequence that lie in the prefix, so
    that feeding it token by token gives the same clusters.

    Args:
        x: [B, S, H, D]. float64, float32, bfloat16 or float16; any strides.
        centroids: [H, K, D], any floating dtype.
        window: W, from 0 to S (is_causal_prefix: to length).
        is_causal_prefix: decide on each token when it comes.
        length: of the whole sequence of which x is a prefix, S by default; needs
            is_causal_prefix.
        backend: "auto", "reference", or a compiled one by name.

    Returns:
        index, int64 [B, H, K, W], by increasing position. Routing has no gradient.

    Equal similarities rank by position, NaN counts as the smallest (hw.select_topk). Similarities
    are fp32 (fp64 for fp64).

    Raises:
        ValueError: shapes that do not fit, window or length out of range.
        TypeError: unsupported dtypes, numbers that are none.
        RuntimeError: tensors on different devices, or a backend of another device.
        NotImplementedError: a backend that cannot take the call.

    Source: Roy et al., "Efficient Content-Based Sparse Attention with Routing Transformers", TACL
    2021, arXiv 2003.05997. The prefix rule is ours.

    Example:
        >>> import torch, headworks as hw
        >>> x = torch.nn.functional.normalize(torch.randn(1, 64, 2, 16), dim=-1)
        >>> centroids = torch.nn.functional.normalize(torch.randn(2, 4, 16), dim=-1)
        >>> hw.kmeans_route(x, centroids, window=16).shape
        torch.Size([1, 2, 4, 16])
    """
    x, centroids = detached(x), detached(centroids)
    key = _routes.key((x, centroids), window, is_causal_prefix, length, backend)
    if (ready := _routes.get(key)) is not None:
        return ready(x, centroids)
    x, mu, window, prefix_length, backend = _checked_route(
        x, centroids, window, is_causal_prefix, length, backend
    )
    if backend == "reference":
        causal = prefix_length is not None
        with as_written(x):
            return reference.kmeans_route(
                x, mu, window=window, is_causal_prefix=causal, length=prefix_length
            )
    if mu.dtype == centroids.dtype:
        _routes.offer(key, route_native.route_prepared, x, mu, window, prefix_length, backend)
    return route_native.kmeans_route(x, mu, window, prefix_length, backend)


_routes: Repeated[Callable[[Tensor, Tensor], Tensor]] = Repeated(_ROUTE)


def _checked_route(
    x: Tensor,
    centroids: Tensor,
    window: int,
    is_causal_prefix: bool,
    length: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, int, int | None, str]:
    """x, the centroids in the accumulation dtype, W, the length of the prefix rule, the backend."""
    (x,) = cast(x)
    check_sequence(_ROUTE, "x", x)
    centroids = check_centroids(_ROUTE, centroids, x)
    is_causal_prefix = require_flag(_ROUTE, "is_causal_prefix", is_causal_prefix)
    most = tokens = x.shape[1]
    if length is not None:
        if not is_causal_prefix:
            fail(
                ValueError,
                _ROUTE,
                "length",
                length,
                "None without is_causal_prefix",
                "It is the length of the sequence that x is a prefix of.",
            )
        most = require_count(_ROUTE, "length", length, tokens, None, "x is a prefix of S tokens.")
    window = require_count(
        _ROUTE, "window", window, 0, most, "A cluster has at most as many members as tokens."
    )
    backend = backend_for(_ROUTE, backend, x)
    mu = centroids.detach().to(ACCUMULATION[x.dtype])
    return x, mu, window, most if is_causal_prefix else None, backend


def _native_call(
    x: Tensor,
    centroids: Tensor,
    *,
    window: int,
    is_causal_prefix: bool = False,
    length: int | None = None,
    backend: str = "auto",
) -> NativeCall:
    x, mu, _, _, backend = _checked_route(x, centroids, window, is_causal_prefix, length, backend)
    return route_native.kmeans_route_call(x, mu, backend)


NATIVE_CALLS[kmeans_route] = _native_call


def kmeans_routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_index: Tensor,
    k_index: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    mean_eps: float = 0.0,
    mask_self: bool = False,
    backend: str = "auto",
) -> Tensor:
    r"""Softmax attention inside each cluster; a token's output is the mean over its clusters.

    .. math::
        o_i = \frac{1}{n_i + \varepsilon} \sum_{c : i \in I_c} \sum_{j \in J_c}
              \mathrm{softmax}_j (s_{ij}) \, v_j, \qquad
        s_{ij} = \mathrm{scale} \langle q_i, k_j \rangle

    n_i is the number of slots of q_index that hold token i. A token in no cluster gives 0 and
    has zero gradients. A slot whose row sees no key contributes 0, and counts. A token that a
    list names twice counts twice, as a query and as a key.

    Args:
        q: [B, Sq, Hq, D]. float64, float32, bfloat16 or float16; any strides.
        k: [B, Sk, H, D], with Hq a multiple of H.
        v: [B, Sk, H, Dv], any Dv.
        q_index: I, int64 [B, Hq, K, Wq], in any order: of each head and cluster the tokens of q;
            -1 marks an empty slot. Checked only where it lies on the CPU.
        k_index: J, int64 [B, Hq, K, Wk], the tokens of k and v; q_index by default.
        is_causal: by original position, whatever the order of the lists: row i sees the keys up
            to i + Sk - Sq.
        scale: of the scores; ``D ** -0.5`` by default. The official code has no scale where it
            normalises q and k by layer: pass 1.0.
        mean_eps: epsilon; 1e-2 in the official code, 1e-5 in lucidrains'.
        mask_self: the score of a token with itself (key i + Sk - Sq) becomes the constant -5e4,
            for a q and k that are one tensor: a row that sees nothing else attends to itself,
            any other to the others.
        backend: "auto", "reference", or a compiled one by name.

    Returns:
        o [B, Sq, Hq, Dv] in the dtype of the inputs.

    Gradients flow to q, k and v. Under ``torch.autocast`` they are cast to the autocast dtype.

    Raises:
        ValueError: shapes that do not fit, an index out of range, a negative mean_eps.
        TypeError: unsupported or mixed dtypes, an index that is not int64.
        RuntimeError: tensors on different devices, or a backend of another device.
        NotImplementedError: a backend that cannot take the call.

    Source: Roy et al., "Efficient Content-Based Sparse Attention with Routing Transformers", TACL
    2021, arXiv 2003.05997.

    Example:
        >>> import torch, headworks as hw
        >>> q, k, v = torch.randn(3, 1, 64, 2, 16)
        >>> index = hw.kmeans_route(q, torch.randn(2, 4, 16), window=16)
        >>> o = hw.kmeans_routing_attention(q, k, v, q_index=index)
        >>> o.shape
        torch.Size([1, 64, 2, 16])
    """
    tensors = (q, k, v, q_index) if k_index is None else (q, k, v, q_index, k_index)
    key = _repeated.key(tensors, is_causal, scale, mean_eps, mask_self, backend)
    if (ready := _repeated.get(key)) is not None:
        return ready(q, k, v, q_index, k_index)
    given, backend = _checked(
        q, k, v, q_index=q_index, k_index=k_index, is_causal=is_causal, scale=scale,
        mean_eps=mean_eps, mask_self=mask_self, backend=backend,
    )  # fmt: skip
    if backend == "reference":
        q, k, v, q_index, k_index, is_causal, mask_self, scale, mean_eps = given
        with as_written(q):
            return reference.kmeans_routing_attention(
                q, k, v, q_index=q_index, k_index=k_index, is_causal=is_causal, scale=scale,
                mean_eps=mean_eps, mask_self=mask_self,
            )  # fmt: skip
    _repeated.offer(key, _ready, given, backend)
    return native.kmeans_routing_attention(*given, backend)


_Ready = Callable[[Tensor, Tensor, Tensor, Tensor, Maybe], Tensor]  # q, k, v, q_index, k_index -> o
_repeated: Repeated[_Ready] = Repeated(_ATTEND)


def _ready(given: Arguments, backend: str) -> _Ready | None:
    """A call that has passed its checks, for others like it; None where there is no shorter way."""
    attend = native.kmeans_prepared(*given, backend=backend)
    if attend is None:
        return None
    queries, keys = given[0].shape[1], given[1].shape[1]

    def ready(q: Tensor, k: Tensor, v: Tensor, q_index: Tensor, k_index: Maybe) -> Tensor:
        check_slot_values(_ATTEND, "q_index", q_index, queries)
        if k_index is None:
            k_index = q_index
            if keys != queries:
                check_slot_values(_ATTEND, _FOR_KEYS, k_index, keys)
        else:
            check_slot_values(_ATTEND, "k_index", k_index, keys)
        return attend(q, k, v, q_index, k_index)

    return ready


_FOR_KEYS = "q_index, for k too,"
Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, bool, bool, float, float]


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_index: Tensor,
    k_index: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    mean_eps: float = 0.0,
    mask_self: bool = False,
    backend: str = "auto",
) -> tuple[Arguments, str]:
    """q k v q_index k_index is_causal mask_self scale mean_eps; the backend."""
    q, k, v = cast(q, k, v)
    check_inputs(_ATTEND, q, k)
    check_values(_ATTEND, "v", v, "[B, Sk, Hkv, Dv]", k.shape[:3], q)
    q_index = check_slots(_ATTEND, "q_index", q_index, q, q.shape[1])
    if k_index is None:
        k_index = check_slots(_ATTEND, _FOR_KEYS, q_index, q, k.shape[1])
    else:
        k_index = check_slots(_ATTEND, "k_index", k_index, q, k.shape[1])
    if k_index.shape[2] != q_index.shape[2]:
        fail(
            ValueError,
            _ATTEND,
            "the number of clusters of k_index",
            k_index.shape[2],
            f"{q_index.shape[2]}, that of q_index",
            "Queries of a cluster attend to the keys of the same one.",
        )
    is_causal = require_flag(_ATTEND, "is_causal", is_causal)
    mask_self = require_flag(_ATTEND, "mask_self", mask_self)
    if scale is None:
        scale = float(q.shape[3] ** -0.5)
    else:
        scale = require_number(_ATTEND, "scale", scale)
    mean_eps = require_number(_ATTEND, "mean_eps", mean_eps)
    if mean_eps < 0:
        fail(ValueError, _ATTEND, "mean_eps", mean_eps, "a number >= 0", "Use 0.0 for a mean.")
    backend = backend_for(_ATTEND, backend, q)
    return (q, k, v, q_index, k_index, is_causal, mask_self, scale, mean_eps), backend


def _attend_call(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> NativeCall:
    given, backend = _checked(q, k, v, **options)
    return native.kmeans_call(*given, backend=backend)


NATIVE_CALLS[kmeans_routing_attention] = _attend_call


def kmeans_update(
    centroids: Tensor,
    x: Tensor,
    index: Tensor | None = None,
    *,
    decay: float = 0.999,
    group: Any = None,
) -> Tensor:
    r"""One step of online k-means: centroids after the tokens x.

    .. math::
        m_c = \sum_{t \in c} x_t \,/\, n_c, \qquad
        \mu_c \leftarrow \mathrm{decay} \, \mu_c + (1 - \mathrm{decay}) \, m_c / |m_c|

    A cluster without tokens keeps its centroid. The average is not normalised again. A token that
    is not finite counts for no cluster, and a cluster whose sum overflows keeps its centroid:
    centroids that are finite stay so.

    Args:
        centroids: [H, K, D], any floating dtype. Not modified.
        x: [B, S, H, D]. float64, float32, bfloat16 or float16; normalised as for the routing.
        index: the members of the clusters, int64 [B, H, K, W] as hw.kmeans_route gives them, -1
            for none. By default every token is in one: that of the largest similarity, the first
            where several are equal.
        decay: from 0 (the centroids of this batch) to 1 (no change).
        group: a process group of torch.distributed over which sums and numbers are added before
            anything is divided, so that all ranks have the centroids of the whole batch. None: no
            communication. All ranks of the group must call.

    Returns:
        The new centroids [H, K, D], in the dtype of centroids, without gradient.

    Made of torch operations (a product with the one-hot assignment: deterministic); there is no
    backend to choose. Sums are fp32 (fp64 for fp64).

    Raises:
        ValueError: shapes that do not fit, an index or the decay out of range.
        TypeError: unsupported dtypes.
        RuntimeError: tensors on different devices.

    Source: Roy et al., "Efficient Content-Based Sparse Attention with Routing Transformers", TACL
    2021, arXiv 2003.05997.

    Example:
        >>> import torch, headworks as hw
        >>> x = torch.tensor([[1.0, 0.1], [0.9, -0.1], [0.1, 2.0]])[None, :, None]
        >>> hw.kmeans_update(torch.eye(2)[None], x, decay=0.0)[0, 0]
        tensor([1., 0.])
    """
    check_sequence(_UPDATE, "x", x)
    centroids = check_centroids(_UPDATE, centroids, x)
    if index is not None:
        index = check_slots(_UPDATE, "index", index, x, x.shape[1])
        if index.shape[2] != centroids.shape[1]:
            fail(
                ValueError,
                _UPDATE,
                "the number of clusters of index",
                index.shape[2],
                f"{centroids.shape[1]}, that of centroids",
                "Pass what hw.kmeans_route gave for these centroids.",
            )
    decay = require_number(_UPDATE, "decay", decay)
    if not 0 <= decay <= 1:
        fail(ValueError, _UPDATE, "decay", decay, "a number from 0 to 1", "0.999 is usual.")
    with torch.no_grad(), as_written(x):
        total, number = cluster_sums(x, centroids, index)
        if group is not None:
            both = torch.cat([total, number], -1)  # one message instead of two
            _all_reduce(both, group)
            total, number = both[..., :-1], both[..., -1:]
        return moved(centroids, total, number, decay)


def _all_reduce(sums: Tensor, group: Any) -> None:
    """The sum over the ranks of the group, in place."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        fail(
            RuntimeError,
            _UPDATE,
            "group",
            describe(group),
            "None where torch.distributed is not initialised",
            "Call torch.distributed.init_process_group first.",
        )
    torch.distributed.all_reduce(sums, group=group)
