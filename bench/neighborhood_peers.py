# SPDX-License-Identifier: Apache-2.0
"""What a user would run instead of the operators over neighbourhoods: torch code.

`unfolded` is what OverLoCK's own code does without natten: windows that lie within the image are
unfolded, and those at its border are copies of the nearest. `gathered` reads them by indices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers import compile_late

Peers = dict[str, Callable[..., Tensor]]


def na2d_av_peers(k: int, *, compiled: bool) -> Peers:
    """Of w [B, Y, X, H, K K] and v [B, Y, X, H, D]."""
    functions: Peers = {
        "unfold": functools.partial(unfolded, k),
        "gather": functools.partial(gathered, k),
    }
    return _with_compiled(functions, compiled)


def contmix_peers(small: int, large: int, *, compiled: bool) -> Peers:
    """Of affinity, weight, bias, small_rpb, rpb and v, as hw.contmix has them."""
    functions: Peers = {
        name: functools.partial(contmix, mix, small, large)
        for name, mix in (("unfold", unfolded), ("gather", gathered))
    }
    return _with_compiled(functions, compiled)


def _with_compiled(functions: Peers, compiled: bool) -> Peers:
    compiled_too = {f"{name}, compiled": compile_late(f) for name, f in functions.items()}
    return functions | (compiled_too if compiled else {})


def unfolded(k: int, w: Tensor, v: Tensor) -> Tensor:
    """As the official code has it, in its layout."""
    b, y, x, h, d = v.shape
    image = v.permute(0, 3, 4, 1, 2).reshape(b, h * d, y, x)
    seen = F.unfold(image, k).reshape(b, h * d * k * k, y - k + 1, x - k + 1)
    seen = F.pad(seen, (k // 2,) * 4, mode="replicate").reshape(b, h, d, k * k, y, x)
    return torch.einsum("byxht,bhdtyx->byxhd", w, seen)


def gathered(k: int, w: Tensor, v: Tensor) -> Tensor:
    """All keys of all queries by index, then one product."""
    y, x = v.shape[1:3]
    rows, columns = _keys(y, k, v.device), _keys(x, k, v.device)
    seen = v[:, rows[:, None, :, None], columns[None, :, None, :]]  # [B, Y, X, K, K, H, D]
    return torch.einsum("byxht,byxthd->byxhd", w, seen.flatten(3, 4))


def _keys(size: int, k: int, device: torch.device) -> Tensor:
    first = (torch.arange(size, device=device) - k // 2).clamp(0, size - k)
    return first[:, None] + torch.arange(k, device=device)


def contmix(
    mix: Callable[..., Tensor],
    small: int,
    large: int,
    affinity: Tensor,
    weight: Tensor,
    bias: Tensor,
    small_rpb: Tensor,
    rpb: Tensor,
    v: Tensor,
) -> Tensor:
    """All weights are made first."""
    scores = (affinity @ weight.mT + bias).split([small * small, large * large], dim=-1)
    tables, halves = (small_rpb, rpb), v.chunk(2, dim=3)
    mixed = []
    for k, s, table, half in zip((small, large), scores, tables, halves, strict=True):
        p = (s + _at_offsets(table, k, *v.shape[1:3])).softmax(-1)
        mixed.append(mix(k, p, half))
    return torch.cat(mixed, dim=3)


def _at_offsets(table: Tensor, k: int, y: int, x: int) -> Tensor:
    """[Y, X, G, K K]"""
    rows, columns = (
        _keys(size, k, table.device) - torch.arange(size, device=table.device)[:, None] + k - 1
        for size in (y, x)
    )
    at = table[:, rows[:, None, :, None], columns[None, :, None, :]]  # [G, Y, X, K, K]
    return at.flatten(3, 4).permute(1, 2, 0, 3)
