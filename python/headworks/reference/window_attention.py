# SPDX-License-Identifier: Apache-2.0
"""Attention inside the windows of an image (EfficientViT, arXiv 2305.07027) in plain PyTorch.

    o_i = sum_{j in W(i)} softmax_j(scale <q_i, k_j> + t[h, |dy| wx + |dx|]) v_j

Windows of wy x wx tokens from the upper left; those of the last row and column end with the image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import attention


def window_attention(
    q: Tensor,  # [B, Y, X, Hq, D]
    k: Tensor,  # [B, Y, X, H, D]
    v: Tensor,  # [B, Y, X, H, Dv]
    *,
    window: tuple[int, int],
    bias_table: Tensor | None,  # [Hq, wy wx]
    scale: float,
) -> Tensor:
    """o [B, Y, X, Hq, Dv]"""
    strips = []
    for strip in _cut(1, window[0], q, k, v):
        parts = [_one_window(*x, window[1], bias_table, scale) for x in _cut(2, window[1], *strip)]
        strips.append(torch.cat(parts, 2))
    return torch.cat(strips, 1)


def _cut(axis: int, size: int, *images: Tensor) -> list[tuple[Tensor, ...]]:
    """The images in pieces of up to `size` along an axis; an image without length is one piece."""
    return list(zip(*(x.split(size, axis) for x in images), strict=True))


def _one_window(
    q: Tensor, k: Tensor, v: Tensor, width: int, table: Tensor | None, scale: float
) -> Tensor:
    """Of images that are one window."""
    image, bias = q.shape[1:3], None
    if table is not None:
        bias = table[:, distances(*image, width, q.device).flatten(0, 1).flatten(1)]
    q, k, v = (x.flatten(1, 2) for x in (q, k, v))
    return attention(q, k, v, bias=bias, scale=scale)[0].unflatten(1, image)


def distances(height: int, width: int, columns: int, device: torch.device) -> Tensor:
    """|dy| columns + |dx| between the tokens of an image: [height, width, height, width]."""
    y, x = (torch.arange(n, device=device) for n in (height, width))
    dy, dx = (y[:, None] - y).abs(), (x[:, None] - x).abs()
    return dy[:, None, :, None] * columns + dx[None, :, None, :]
