# SPDX-License-Identifier: Apache-2.0
"""What a user would run instead of the operators on windows: torch code as the papers' own is.

All take the tensors of ours, in their layout. Images must be whole numbers of windows, as those of
the benchmarks are, or smaller than one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.peers import compile_late

Peers = dict[str, Callable[..., Tensor]]


def window_peers(window: int, *, compiled: bool) -> Peers:
    """Of q, k, v [B, Y, X, H, D] and the table [H, window^2]: windows are cut by view and permute,
    the bias is gathered from the table by an index made before."""
    attend = {"eager": biased_attention, "sdpa": biased_sdpa}
    found = {name: functools.partial(windowed, f, window) for name, f in attend.items()}
    if compiled:
        found |= {f"compiled, {name}": compile_late(f) for name, f in list(found.items())}
    return found


def windowed(
    attend: Callable[..., Tensor], window: int, q: Tensor, k: Tensor, v: Tensor, table: Tensor
) -> Tensor:
    """o, with attend(q, k, v, bias) of sequences [B, S, H, D]."""
    height, width = (min(window, n) for n in q.shape[1:3])
    bias = table[:, distances(height, width, window, table.device)]
    o = attend(*(_cut(x, height, width) for x in (q, k, v)), bias)
    rows, columns = q.shape[1] // height, q.shape[2] // width
    o = o.reshape(q.shape[0], rows, columns, height, width, *o.shape[2:])
    return o.transpose(2, 3).reshape(*q.shape[:4], v.shape[4])


@functools.lru_cache
def distances(height: int, width: int, window: int, device: torch.device) -> Tensor:
    """The table's column for every pair of tokens of a window: [N, N]."""
    token = torch.arange(height * width, device=device)
    y, x = token // width, token % width
    return (y[:, None] - y).abs() * window + (x[:, None] - x).abs()


def _cut(x: Tensor, height: int, width: int) -> Tensor:
    """[B, Y, X, H, D] -> [B windows, N, H, D]"""
    batch, rows, columns, heads, d = x.shape
    x = x.view(batch, rows // height, height, columns // width, width, heads, d)
    return x.transpose(2, 3).reshape(-1, height * width, heads, d)


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """By two products and a softmax, as timm's EfficientViT does."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    p = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5 + bias).softmax(-1)
    return (p @ v).transpose(1, 2)


def biased_sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """By torch's attention, the bias as its mask."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=bias[None]).transpose(1, 2)
