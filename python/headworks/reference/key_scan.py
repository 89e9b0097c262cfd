# SPDX-License-Identifier: Apache-2.0
"""Key-only softmax scan ("non-approximate" attention, arXiv 2510.11602) in plain PyTorch.

    o_i = sum_{j <= i} e^{s_j} v_j / sum_{j <= i} e^{s_j}        L_i = log sum_{j <= i} e^{s_j}

An initial state (o_0, L_0) is one more key with score L_0 and value o_0. Where L_i = -inf, o_i = 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class State(NamedTuple):
    """The mean over the tokens so far, and the log-sum of their scores' exponentials."""

    o: Tensor  # [B, H, Dv]
    lse: Tensor  # [B, H]


def key_scan(
    s: Tensor,  # [B, S, H]
    v: Tensor,  # [B, S, H, Dv]
    *,
    initial_state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, State]:
    """The output [B, S, H, Dv] in v's dtype and the final state in fp32 (or fp64)."""
    dtype = torch.float64 if s.dtype == torch.float64 else torch.float32
    batch, tokens, heads = s.shape
    if initial_state is None:
        initial_state = (
            v.new_zeros(batch, heads, v.shape[-1], dtype=dtype),
            s.new_full((batch, heads), -torch.inf, dtype=dtype),
        )
    o_0, lse_0 = initial_state

    # The state is key 0; row i of the mask sees keys 0 .. i. Row 0 is the state itself.
    score = torch.cat([lse_0[:, :, None], s.to(dtype).transpose(1, 2)], -1)  # [B, H, 1 + S]
    value = torch.cat([o_0[:, :, None], v.to(dtype).transpose(1, 2)], 2)  # [B, H, 1 + S, Dv]
    seen = torch.ones(tokens + 1, tokens + 1, dtype=torch.bool, device=s.device).tril()
    score = torch.where(seen, score[:, :, None], -torch.inf)  # [B, H, 1 + S, 1 + S]
    empty = (score == -torch.inf).all(-1, keepdim=True)
    score = torch.where(empty, 0, score)
    p = torch.where(empty, 0, score.softmax(-1))
    lse = torch.where(empty[..., 0], -torch.inf, score.logsumexp(-1))  # [B, H, 1 + S]

    o = (p[:, :, 1:].to(v.dtype) @ value.to(v.dtype)).transpose(1, 2)
    final = (p[:, :, -1:] @ value)[:, :, 0]
    return o, State(final, lse[:, :, -1])
