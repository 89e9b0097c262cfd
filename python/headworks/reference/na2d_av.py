# SPDX-License-Identifier: Apache-2.0
"""Values of a neighbourhood, mixed with given weights (NATTEN's na2d_av) in plain PyTorch.

    o_yx = sum_{a < Ky, b < Kx} w_yx[a Kx + b] v[start(y; Y, Ky) + a, start(x; X, Kx) + b]
    start(i; L, K) = min(max(i - floor(K / 2), 0), L - K)

Windows at a border are shifted, not cut: every query has Ky Kx keys.
"""

from __future__ import annotations

import torch
from torch import Tensor


def na2d_av(
    w: Tensor,  # [B, Y, X, H, Ky Kx]
    v: Tensor,  # [B, Y, X, H, D]
    *,
    kernel_size: tuple[int, int],
) -> Tensor:
    """The output [B, Y, X, H, D] in v's dtype."""
    seen = windows(v, kernel_size)  # [B, Y, X, H, Ky Kx, D]
    return (w[..., None, :].to(v.dtype) @ seen)[..., 0, :]


def windows(v: Tensor, kernel_size: tuple[int, int]) -> Tensor:
    """The values that each query sees: [B, Y, X, H, Ky Kx, D] of v [B, Y, X, H, D]."""
    (rows, columns), (height, width) = v.shape[1:3], kernel_size
    y = _keys(rows, height, v.device)[:, None, :, None]  # [Y, 1, Ky, 1]
    x = _keys(columns, width, v.device)[None, :, None, :]  # [1, X, 1, Kx]
    return v[:, y, x].flatten(3, 4).transpose(3, 4)


def _keys(size: int, kernel: int, device: torch.device) -> Tensor:
    """The keys of each query along an axis: [size, kernel]."""
    query = torch.arange(size, device=device)
    start = (query - kernel // 2).clamp(0, size - kernel)
    return start[:, None] + torch.arange(kernel, device=device)


def offsets(size: int, kernel: int, device: torch.device) -> Tensor:
    """key - query + kernel - 1 of the keys of each query along an axis: [size, kernel], each from 0
    to 2 kernel - 2."""
    query = torch.arange(size, device=device)
    return _keys(size, kernel, device) - query[:, None] + kernel - 1
