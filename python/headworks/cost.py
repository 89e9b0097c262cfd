# SPDX-License-Identifier: Apache-2.0
"""What a call costs on paper: floating-point operations, least bytes moved, passes over the data.

The figures are lower bounds for *any* implementation of the algorithm in the docs, not counts of
what ours does; a benchmark divides them by measured time to tell how far a kernel is from the
machine's ceiling. Exponentials of a softmax are counted by themselves; divisions and the
elementwise maps are not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import _cost_windows as windows
from ._cost import Cost as Cost
from ._cost import check_sizes as _check_sizes
from ._cost import element_size as _element_size
from .ops.linear._linear_attention_checks import num_features

__all__ = ["Cost", "cost", "operators"]

CHUNK = 64  # tokens in a chunk of the scan: the square tile evaluated directly


def cost(op: str | Callable[..., Any], **shape: Any) -> Cost:
    """FLOPs, least bytes and passes of a call of `op` on inputs of the given shape.

    Symbols: B batch, S tokens, H query heads, Hkv key heads (default H), D head dim of q and k,
    Dv of v (default D), F features, C = 64 tokens in a chunk, e and a bytes of an element and of an
    accumulator (a = 4; 8 for fp64).

    ``"linear_attention"``, per token, sums over heads written as [query heads] + [key heads]::

        chunked  flops  [2 F Dv + 2 C (D + Dv)] + [2 F Dv]            = 4 F Dv + 2 C (D + Dv)
        direct   flops  [(D + Dv) (S + 1)]          causal;  2 (D + Dv) S  when not causal
                 bytes  e [D + Dv] + e [D + Dv]                        q, o; k, v       1 pass
    ``backward=True`` (of the same operator; z is saved, o and do are read)::

        chunked  flops  [4 F Dv + C (6 D + 4 Dv)] + [6 F Dv]
        direct   flops  [(3 D + 2 Dv) (S + 1)]      causal;  (6 D + 4 Dv) S  when not causal
                 bytes  e [2 D + 2 Dv] + a [1] + e [2 D + 2 Dv]        q dq o do; z; k dk v dv
                                                                                        2 passes
    The smaller of the two forms is taken; without causality the chunk term is absent. Initial and
    final states add B Hkv F (Dv + 1) a bytes each (and their gradients the same). The denominator
    adds 1/Dv to the state terms and is left out.

    ``"attention"``, over the P pairs (i, j) that its masks leave (Sq, Sk tokens; S stands for both;
    P = Sq Sk without a mask)::

        forward   flops  2 (D + Dv) P per query head      e [D + Dv] + e [D + Dv] bytes    1 pass
        backward  flops  2 (3 D + 2 Dv) P                 q o do dq; k v dk dv; lse      2 passes
        and P exponentials each

    ``"column_stats"`` and ``"attention_transpose"``, given lse: 2 D P and 2 (D + Dv) P, 1 pass;
    backward 2 (4 D + 3 Dv) P, 3 passes, with Dv = 1 of sums.

    ``"linear_attention_step"``, per sequence: flops [2 F Dv] + [2 F Dv]; bytes
    2 a [F (Dv + 1)] over key heads, plus q, k, v, o; 1 pass.

    ``"key_scan"``, per token and head: forward 3 Dv flops, e (1 + 2 Dv) bytes, 1 pass; backward
    7 Dv flops, e (2 + 4 Dv) + a bytes, 1 pass.

    ``"select_topk"``, k of the N scores of each of B rows: e N + 8 k bytes, 1 pass; comparisons are
    no FLOPs.

    ``"bilevel_route"``, R and Rk regions: D (Sq H + Sk Hkv + 2 R Rk H) flops; q, k, graph; 1 pass.

    ``"window_attention"``, windows of h x w tokens: attention over the pairs inside windows; its
    table of h w biases per head is read, and its gradient written.

    Routed attention has the flops of attention over the P pairs that routing leaves, and its bytes
    with those of the lists or of the gate: ``"bilevel_routing_attention"``, n tokens in a region of
    k: P = Sq topk n; ``"kmeans_routing_attention"``: K W Wk, or K W (W + 1) / 2 if causal;
    ``"moh_attention"``: the share `active` of the pairs of attention.
    ``"kmeans_route"``, K clusters of W members: 2 D K flops and e D bytes per token and head, a D K
    bytes of centroids per head, 8 W of indices per cluster; 1 pass. Similarities need not leave the
    chip; the prefix rule costs the same.

    ``"na2d_av"``, T = Ky Kx weights, per token and head: 2 T D flops, e (T + 2 D) bytes; backward
    4 T D, e (2 T + 3 D). ``"contmix"``, T = Sy Sx + Ky Kx weights made of A affinities, per token
    and group: 2 A T + 2 T D flops, T exponentials, e (A + 4 D) bytes, and the map and the tables
    once; backward 6 A T + 4 T D, T, e (2 A + 6 D) and twice those. 1 pass each.
    ``"cascaded_group_attention"``, per token of a window (filled ones too) of N, with M taps of its
    convolution per head: 2 H (d (2 K + d) + M K + N (K + d)) + 2 C^2 flops, H N exponentials; bytes
    of x, y and the weights; 1 pass.

    Args:
        op: the operator's name, or the public function itself.
        shape: ``B, S, H, D, Dv, Hkv, dtype, feature_map, is_causal, initial_state,
            output_final_state, backward``, of attention also ``Sk, window_size``, of routing the
            sizes of images, regions and clusters; which of them depends on the operator.

    Returns:
        A :class:`Cost`.

    Raises:
        ValueError: unknown operator, missing or negative size, unknown dtype.
        TypeError: an argument that the operator does not have.

    Sources: core formulas for 2nd-order Taylor linear attention (BASED, arXiv 2402.18668);
    passes after FuseMax (arXiv 2406.10491).

    Example:
        >>> import headworks as hw
        >>> hw.cost("linear_attention", B=1, S=4096, H=1, D=16, Dv=64, dtype="bf16").flops // 4096
        49408
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", str(op))
    if name not in _COSTS:
        raise ValueError(f"cost: op is {name!r}, expected one of {sorted(_COSTS)}")
    return _COSTS[name](**shape)


def operators() -> tuple[str, ...]:
    """The operators that have a formula."""
    return tuple(_COSTS)


def _linear_attention(
    *,
    S: int,
    H: int,
    D: int,
    B: int = 1,
    Dv: int | None = None,
    Hkv: int | None = None,
    dtype: Any = "float32",
    feature_map: str = "taylor2",
    is_causal: bool = True,
    initial_state: bool = False,
    output_final_state: bool = False,
    backward: bool = False,
) -> Cost:
    dv = D if Dv is None else Dv
    heads = H if Hkv is None else Hkv
    _check_sizes(B=B, S=S, H=H, D=D, Dv=dv, Hkv=heads)
    e = _element_size(dtype)
    a = max(e, 4)
    f = num_features(feature_map, D)
    visible = S + 1 if is_causal else 2 * S  # twice the average number of keys of a row
    chunk = CHUNK if is_causal else 0
    tokens = B * S
    state = B * heads * f * (dv + 1) * a
    states = (bool(initial_state) + bool(output_final_state)) * state
    if backward:
        chunked = H * (4 * f * dv + chunk * (6 * D + 4 * dv)) + heads * 6 * f * dv
        direct = H * (3 * D + 2 * dv) * visible
        moved = H * (e * (2 * D + 2 * dv) + a) + heads * e * (2 * D + 2 * dv)
        # the initial state is read again beside its gradient
        states += bool(initial_state) * state
        passes = 2
    else:
        chunked = H * (2 * f * dv + 2 * chunk * (D + dv)) + heads * 2 * f * dv
        direct = H * (D + dv) * visible
        moved = H * e * (D + dv) + heads * e * (D + dv)
        passes = 1
    # A state that comes in or goes out needs its own features whatever the form.
    flops = chunked if states else min(chunked, direct)
    return Cost(tokens * flops, tokens * moved + states, passes)


def _linear_attention_step(
    *,
    H: int,
    D: int,
    B: int = 1,
    Dv: int | None = None,
    Hkv: int | None = None,
    dtype: Any = "float32",
    feature_map: str = "taylor2",
) -> Cost:
    dv = D if Dv is None else Dv
    heads = H if Hkv is None else Hkv
    _check_sizes(B=B, H=H, D=D, Dv=dv, Hkv=heads)
    e = _element_size(dtype)
    a = max(e, 4)
    f = num_features(feature_map, D)
    flops = B * (H + heads) * 2 * f * dv
    moved = B * heads * 2 * a * f * (dv + 1) + B * (H + heads) * e * (D + dv)
    return Cost(flops, moved, 1)


def _key_scan(
    *,
    S: int,
    H: int,
    Dv: int,
    B: int = 1,
    dtype: Any = "float32",
    initial_state: bool = False,
    output_final_state: bool = False,
    backward: bool = False,
) -> Cost:
    _check_sizes(B=B, S=S, H=H, Dv=Dv)
    e = _element_size(dtype)
    a = max(e, 4)
    rows = B * S * H
    states = (bool(initial_state) + bool(output_final_state)) * B * H * (Dv + 1) * a
    if backward:
        states += bool(initial_state) * B * H * (Dv + 1) * a
        return Cost(rows * 7 * Dv, rows * (e * (2 + 4 * Dv) + a) + states, 1, rows)
    return Cost(rows * 3 * Dv, rows * e * (1 + 2 * Dv) + states, 1, rows)


def _visible_pairs(
    rows: int, keys: int, is_causal: bool, window_size: tuple[int | None, int | None] | None
) -> int:
    """Pairs (i, j) that a causal mask and a window, aligned at the lower right, leave."""
    left, right = window_size or (None, None)
    if is_causal:
        right = 0
    pairs = 0
    for i in range(rows):
        at = i + keys - rows
        first = 0 if left is None else max(at - left, 0)
        last = keys if right is None else min(at + right + 1, keys)
        pairs += max(last - first, 0)
    return pairs


def _attention(
    *,
    S: int,
    H: int,
    D: int,
    B: int = 1,
    Sk: int | None = None,
    Dv: int | None = None,
    Hkv: int | None = None,
    dtype: Any = "float32",
    is_causal: bool = False,
    window_size: tuple[int | None, int | None] | None = None,
    backward: bool = False,
) -> Cost:
    dv, keys = D if Dv is None else Dv, S if Sk is None else Sk
    heads = H if Hkv is None else Hkv
    _check_sizes(B=B, S=S, Sk=keys, H=H, D=D, Dv=dv, Hkv=heads)
    e = _element_size(dtype)
    pairs = B * H * _visible_pairs(S, keys, is_causal, window_size)
    moved = B * e * (S * H + keys * heads) * (D + dv)
    if backward:
        return Cost(2 * (3 * D + 2 * dv) * pairs, 2 * moved + B * S * H * max(e, 4), 2, pairs)
    return Cost(2 * (D + dv) * pairs, moved, 1, pairs)


def _columns(
    *,
    S: int,
    H: int,
    D: int,
    B: int = 1,
    Sk: int | None = None,
    Dv: int | None = None,
    Hkv: int | None = None,
    dtype: Any = "float32",
    is_causal: bool = False,
    window_size: tuple[int | None, int | None] | None = None,
    transpose: bool = False,
    backward: bool = False,
) -> Cost:
    """Given the row statistics: sums of columns, or with `transpose` P^T x."""
    dv, keys = (D if Dv is None else Dv) if transpose else 0, S if Sk is None else Sk
    heads = H if Hkv is None else Hkv
    _check_sizes(B=B, S=S, Sk=keys, H=H, D=D, Dv=dv, Hkv=heads)
    e = _element_size(dtype)
    a = max(e, 4)
    pairs = B * H * _visible_pairs(S, keys, is_causal, window_size)
    out = e * (S + keys) * H * dv if transpose else a * keys * H
    moved = B * (e * D * (S * H + keys * heads) + a * S * H + out)
    if backward:
        return Cost(2 * (4 * D + 3 * max(dv, 1)) * pairs, 2 * moved, 3, pairs)
    return Cost(2 * (D + dv) * pairs, moved, 1, pairs)


def _transpose(**shape: Any) -> Cost:
    return _columns(**shape, transpose=True)


def _select_topk(*, N: int, k: int, B: int = 1, dtype: Any = "float32") -> Cost:
    _check_sizes(B=B, N=N, k=k)
    return Cost(0, B * (_element_size(dtype) * N + 8 * k), 1)


def _regions(image: tuple[int, int], wanted: tuple[int, int]) -> tuple[int, int]:
    """The number of regions of hw.bilevel_route, and the tokens in a whole one."""
    for size, number in zip(image, wanted, strict=True):
        if not 1 <= number <= size:
            raise ValueError(f"cost: {wanted} regions of a {image[0]} x {image[1]} image")
    (height, width) = (size // number for size, number in zip(image, wanted, strict=True))
    return -(-image[0] // height) * -(-image[1] // width), height * width


def _bilevel_route(
    *,
    Y: int,
    X: int,
    H: int,
    D: int,
    topk: int,
    B: int = 1,
    Yk: int | None = None,
    Xk: int | None = None,
    Hkv: int | None = None,
    num_regions: tuple[int, int] = (7, 7),
    kv_num_regions: tuple[int, int] | None = None,
    per_head: bool = False,
    dtype: Any = "float32",
) -> Cost:
    """Means of regions, D per token; their products, 2 D per head and pair of regions."""
    other = (Y if Yk is None else Yk, X if Xk is None else Xk)
    heads = H if Hkv is None else Hkv
    _check_sizes(B=B, H=H, Hkv=heads, D=D, topk=topk)
    own_regions, _ = _regions((Y, X), num_regions)
    regions, _ = _regions(other, kv_num_regions or num_regions)
    values = B * D * (Y * X * H + other[0] * other[1] * heads)  # of q and k
    graph = B * (H if per_head else 1) * own_regions * topk
    products = 2 * B * H * D * own_regions * regions
    return Cost(values + products, _element_size(dtype) * values + 8 * graph, 1)


def _bilevel_attention(
    *,
    Y: int,
    X: int,
    H: int,
    D: int,
    topk: int,
    B: int = 1,
    Yk: int | None = None,
    Xk: int | None = None,
    Dv: int | None = None,
    Hkv: int | None = None,
    num_regions: tuple[int, int] = (7, 7),
    kv_num_regions: tuple[int, int] | None = None,
    per_head: bool = False,
    dtype: Any = "float32",
    backward: bool = False,
) -> Cost:
    """P = Y X topk n, with n tokens in a whole region of k: a region that the image does not fill
    counts as whole, all keys at most. The graph is read too."""
    rows, other = Y * X, (Y if Yk is None else Yk, X if Xk is None else Xk)
    dv, heads, keys = D if Dv is None else Dv, H if Hkv is None else Hkv, other[0] * other[1]
    _check_sizes(B=B, H=H, Hkv=heads, D=D, Dv=dv, topk=topk)
    own_regions, _ = _regions((Y, X), num_regions)
    _, tokens = _regions(other, kv_num_regions or num_regions)
    e = _element_size(dtype)
    pairs = B * H * rows * min(topk * tokens, keys)
    moved = B * e * (rows * H + keys * heads) * (D + dv)
    graph = 8 * B * (H if per_head else 1) * own_regions * topk
    if backward:
        lse = B * rows * H * max(e, 4)
        return Cost(2 * (3 * D + 2 * dv) * pairs, 2 * moved + lse + graph, 2, pairs)
    return Cost(2 * (D + dv) * pairs, moved + graph, 1, pairs)


def _kmeans_attention(
    *,
    S: int,
    K: int,
    W: int,
    H: int,
    D: int,
    B: int = 1,
    Sk: int | None = None,
    Wk: int | None = None,
    Dv: int | None = None,
    Hkv: int | None = None,
    is_causal: bool = False,
    dtype: Any = "float32",
    backward: bool = False,
) -> Cost:
    """P = K W Wk; causal, K W (W + 1) / 2, and where keys have lists of their own (Wk is given) the
    share of P that the mask leaves of all pairs. The backward pass reads the lse of every slot, not
    o: a mean over clusters tells nothing of a single one. The mean adds K W Dv and is left out.
    """
    dv, keys, heads = D if Dv is None else Dv, S if Sk is None else Sk, H if Hkv is None else Hkv
    _check_sizes(B=B, S=S, Sk=keys, K=K, W=W, Wk=Wk or 0, H=H, Hkv=heads, D=D, Dv=dv)
    e = _element_size(dtype)
    pairs = K * W * (W if Wk is None else Wk)
    if is_causal and Wk is None:
        pairs = K * W * (W + 1) // 2
    elif is_causal and pairs:
        pairs = pairs * _visible_pairs(S, keys, True, None) // (S * keys)
    lists = 8 * B * H * K * (W + (Wk or 0))
    if backward:
        moved = e * B * (S * H * (2 * D + dv) + keys * heads * 2 * (D + dv))
        lse = B * H * K * W * max(e, 4)
        return Cost(2 * (3 * D + 2 * dv) * B * H * pairs, moved + lse + lists, 2, B * H * pairs)
    moved = e * B * (S * H + keys * heads) * (D + dv)
    return Cost(2 * (D + dv) * B * H * pairs, moved + lists, 1, B * H * pairs)


def _moh_attention(
    *,
    S: int,
    H: int,
    D: int,
    active: float = 1.0,
    B: int = 1,
    Sk: int | None = None,
    Dv: int | None = None,
    Hkv: int | None = None,
    dtype: Any = "float32",
    is_causal: bool = False,
    window_size: tuple[int | None, int | None] | None = None,
    backward: bool = False,
) -> Cost:
    """The share `active` of gates is not 0: of rows so gated q, do, o and lse are read. The gate is
    read, and o, dq and its own gradient are written, everywhere."""
    dv, keys, heads = D if Dv is None else Dv, S if Sk is None else Sk, H if Hkv is None else Hkv
    _check_sizes(B=B, S=S, Sk=keys, H=H, D=D, Dv=dv, Hkv=heads)
    if not 0 <= active <= 1:
        raise ValueError(f"cost: active is {active}, expected a share from 0 to 1")
    e = _element_size(dtype)
    a = max(e, 4)
    rows = B * S * H
    chosen = round(active * rows)
    pairs = round(active * B * H * _visible_pairs(S, keys, is_causal, window_size))
    shared = B * keys * heads * (D + dv)
    if backward:
        moved = e * (chosen * (D + 2 * dv) + rows * D + 2 * shared) + a * (chosen + 2 * rows)
        return Cost(2 * (3 * D + 2 * dv) * pairs, moved, 2, pairs)
    moved = e * (chosen * D + rows * dv + shared) + a * rows
    return Cost(2 * (D + dv) * pairs, moved, 1, pairs)


def _kmeans_route(
    *, S: int, H: int, D: int, K: int, W: int, B: int = 1, dtype: Any = "float32"
) -> Cost:
    _check_sizes(B=B, S=S, H=H, D=D, K=K, W=W)
    e = _element_size(dtype)
    moved = e * B * S * H * D + max(e, 4) * H * K * D + 8 * B * H * K * W
    return Cost(2 * B * S * H * K * D, moved, 1)


_COSTS: dict[str, Callable[..., Cost]] = {
    "attention": _attention,
    "attention_transpose": _transpose,
    "bilevel_route": _bilevel_route,
    "bilevel_routing_attention": _bilevel_attention,
    "cascaded_group_attention": windows.cascaded_group_attention,
    "column_stats": _columns,
    "kmeans_route": _kmeans_route,
    "kmeans_routing_attention": _kmeans_attention,
    "linear_attention": _linear_attention,
    "linear_attention_step": _linear_attention_step,
    "key_scan": _key_scan,
    "moh_attention": _moh_attention,
    "na2d_av": windows.na2d_av,
    "contmix": windows.contmix,
    "window_attention": windows.window_attention,
    "select_topk": _select_topk,
}
