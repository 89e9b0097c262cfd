# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), two-halves layout.

The first R channels of a head are R/2 pairs (x_i, x_{i + R/2}); the pair i of the token at position
p is rotated by the angle p * base^(-2 i / R). Scores then depend on p_query - p_key alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(positions: Tensor, dim: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles, each [..., dim/2] fp32. positions [...] integers.

    The angles are formed in fp64: at position 10^6 an fp32 angle is wrong by 0.06 rad.
    """
    pair = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device)
    angle = positions.double().unsqueeze(-1) * base ** (-pair / dim)
    return angle.cos().float(), angle.sin().float()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first R = 2 * cos.shape[-1] channels. x [B, S, H, D], cos and sin [S, R/2]."""
    half = cos.shape[-1]
    cos, sin = (t.to(x.dtype).unsqueeze(-2) for t in (cos, sin))  # [S, 1, R/2]
    first, second = x[..., :half], x[..., half : 2 * half]
    turned = [first * cos - second * sin, second * cos + first * sin]
    if 2 * half < x.shape[-1]:
        turned.append(x[..., 2 * half :])
    return torch.cat(turned, dim=-1)
