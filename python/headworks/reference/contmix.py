# SPDX-License-Identifier: Apache-2.0
"""ContMix (OverLoCK, arXiv 2502.20087): kernels made of a pixel's affinities, in plain PyTorch.

    s   = W a + c                    of every pixel and group: S^2 + K^2 scores of its A affinities
    p_1 = softmax(s[: S^2] + r_1)    p_2 = softmax(s[S^2 :] + r_2)
    o   = (sum over the S x S window of p_1 v,  sum over the K x K window of p_2 v)

r_1 and r_2 are tables of a group, read at key - query. The first half of the heads of v has the
small window, the second half the large one: groups in the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .na2d_av import na2d_av, offsets


def contmix(
    affinity: Tensor,  # [B, Y, X, G, A]
    weight: Tensor,  # [Sy Sx + Ky Kx, A]
    bias: Tensor | None,  # [Sy Sx + Ky Kx]
    v: Tensor,  # [B, Y, X, 2 G, D]
    *,
    kernel_size: tuple[int, int],  # Ky, Kx
    small_kernel_size: tuple[int, int],  # Sy, Sx
    rpb: Tensor | None = None,  # [G, 2 Ky - 1, 2 Kx - 1]
    small_rpb: Tensor | None = None,  # [G, 2 Sy - 1, 2 Sx - 1]
) -> Tensor:
    """The output [B, Y, X, 2 G, D] in v's dtype; scores and softmax in fp32 (or fp64)."""
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    score = affinity.to(dtype) @ weight.to(dtype).mT  # [B, Y, X, G, Sy Sx + Ky Kx]
    if bias is not None:
        score = score + bias.to(dtype)
    taps = [size[0] * size[1] for size in (small_kernel_size, kernel_size)]
    mixed = []
    for part, table, size, values in zip(
        torch.split(score, taps, dim=-1),
        (small_rpb, rpb),
        (small_kernel_size, kernel_size),
        v.chunk(2, dim=3),
        strict=True,
    ):
        if table is not None:
            part = part + at_offsets(table.to(dtype), v.shape[1], v.shape[2], size)
        mixed.append(na2d_av(part.softmax(-1), values, kernel_size=size))
    return torch.cat(mixed, dim=3)


def at_offsets(table: Tensor, rows: int, columns: int, kernel_size: tuple[int, int]) -> Tensor:
    """What a table [G, 2 Ky - 1, 2 Kx - 1] adds to the scores: [Y, X, G, Ky Kx]."""
    height, width = kernel_size
    y = offsets(rows, height, table.device)[:, None, :, None]  # [Y, 1, Ky, 1]
    x = offsets(columns, width, table.device)[None, :, None, :]  # [1, X, 1, Kx]
    return table[:, y, x].flatten(3, 4).permute(1, 2, 0, 3)
