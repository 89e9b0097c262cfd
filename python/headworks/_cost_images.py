# SPDX-License-Identifier: Apache-2.0
"""What operators on images cost; the formulas are in the docstring of headworks.cost."""

from __future__ import annotations

from typing import Any

from ._cost_base import Cost, check_sizes, element_size


def _regions(image: tuple[int, int], wanted: tuple[int, int]) -> tuple[int, int]:
    """The number of regions of hw.bilevel_route, and the tokens in a whole one."""
    for size, number in zip(image, wanted, strict=True):
        if not 1 <= number <= size:
            raise ValueError(f"cost: {wanted} regions of a {image[0]} x {image[1]} image")
    (height, width) = (size // number for size, number in zip(image, wanted, strict=True))
    return -(-image[0] // height) * -(-image[1] // width), height * width


def bilevel_route(
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
    check_sizes(B=B, H=H, Hkv=heads, D=D, topk=topk)
    own_regions, _ = _regions((Y, X), num_regions)
    regions, _ = _regions(other, kv_num_regions or num_regions)
    values = B * D * (Y * X * H + other[0] * other[1] * heads)  # of q and k
    graph = B * (H if per_head else 1) * own_regions * topk
    products = 2 * B * H * D * own_regions * regions
    return Cost(values + products, element_size(dtype) * values + 8 * graph, 1)


def bilevel_attention(
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
    check_sizes(B=B, H=H, Hkv=heads, D=D, Dv=dv, topk=topk)
    own_regions, _ = _regions((Y, X), num_regions)
    _, tokens = _regions(other, kv_num_regions or num_regions)
    e = element_size(dtype)
    pairs = B * H * rows * min(topk * tokens, keys)
    moved = B * e * (rows * H + keys * heads) * (D + dv)
    graph = 8 * B * (H if per_head else 1) * own_regions * topk
    if backward:
        lse = B * rows * H * max(e, 4)
        return Cost(2 * (3 * D + 2 * dv) * pairs, 2 * moved + lse + graph, 2, pairs)
    return Cost(2 * (D + dv) * pairs, moved + graph, 1, pairs)


def window_attention(
    *,
    Y: int,
    X: int,
    H: int,
    D: int,
    window: int | tuple[int, int],
    B: int = 1,
    Dv: int | None = None,
    Hkv: int | None = None,
    bias_table: bool = True,
    dtype: Any = "float32",
    backward: bool = False,
) -> Cost:
    """A window that the image cuts has the tokens that there are: with n whole ones along a side
    and r tokens over, n w^2 + r^2 pairs of places along it."""
    height, width = (window, window) if isinstance(window, int) else window
    dv, heads = D if Dv is None else Dv, H if Hkv is None else Hkv
    check_sizes(B=B, Y=Y, X=X, H=H, Hkv=heads, D=D, Dv=dv, height=height - 1, width=width - 1)
    e = element_size(dtype)
    a = max(e, 4)
    along = [n // w * w * w + (n % w) ** 2 for n, w in ((Y, height), (X, width))]
    pairs = B * H * along[0] * along[1]
    moved = B * e * Y * X * (H + heads) * (D + dv)
    table = H * height * width if bias_table else 0
    if backward:
        lse = B * Y * X * H * a
        return Cost(2 * (3 * D + 2 * dv) * pairs, 2 * moved + lse + (e + a) * table, 2, pairs)
    return Cost(2 * (D + dv) * pairs, moved + e * table, 1, pairs)
