# SPDX-License-Identifier: Apache-2.0
"""Attention of the heads that a gate has chosen (MoH, arXiv 2410.11842) in plain PyTorch.

    o_i = g_i sum_j softmax_j(s_ij) v_j    per head; where g_i = 0, o_i = 0 whatever the sum is

A gate of 0 says that the head was not chosen for the token. What is not chosen has no gradient:
d_g_i = <d_o_i, sum_j p_ij v_j> where g_i != 0, and 0 elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import attention as reference


def moh_attention(
    q: Tensor,  # [B, Sq, Hq, D]
    k: Tensor,  # [B, Sk, H, D]
    v: Tensor,  # [B, Sk, H, Dv]
    gate: Tensor,  # g [B, Sq, Hq]
    **score: Any,
) -> Tensor:
    """The output [B, Sq, Hq, Dv]."""
    chosen = (gate != 0)[..., None]
    q = torch.where(chosen, q, 0)  # what is not finite there has no part in any gradient
    if (tau := score.get("row_temperature")) is not None:
        score["row_temperature"] = torch.where(chosen[..., 0], tau, 0)
    w, _ = reference.attention(q, k, v, **score)
    g = gate[..., None]
    return torch.where(chosen, g * w.to(g.dtype), 0).to(v.dtype)
