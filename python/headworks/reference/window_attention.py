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

    def strip(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        windows = zip(*(torch.split(x, window[1], 2) for x in (q, k, v)), strict=True)
        parts = [_one_window(a, b, c, window[1], bias_table, scale) for a, b, c in windows]
        return torch.cat(parts, 2)

    strips = zip(*(torch.split(x, window[0], 1) for x in (q, k, v)), strict=True)
    return torch.cat([strip(*s) for s in strips], 1)


def _one_window(
    q: Tensor, k: Tensor, v: Tensor, width: int, table: Tensor | None, scale: float
) -> Tensor:
    """Of images that are one window."""
    bias = None
    if table is not None:
        bias = table[:, distances(q.shape[1], q.shape[2], width, q.device)]
    o, _ = attention(*(x.flatten(1, 2) for x in (q, k, v)), bias=bias, scale=scale)
    return o.view(*q.shape[:4], v.shape[4])


def distances(height: int, width: int, columns: int, device: torch.device) -> Tensor:
    """|dy| columns + |dx| between the S tokens of an image: [S, S]."""
    token = torch.arange(height * width, device=device)
    y, x = token // max(width, 1), token % max(width, 1)
    return (y[:, None] - y).abs() * columns + (x[:, None] - x).abs()
