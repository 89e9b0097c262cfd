# SPDX-License-Identifier: Apache-2.0
"""Checks of the arguments that every layer shares."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


def check_sequence(layer: nn.Module, x: Tensor) -> None:
    """x must be [B, S, d_model]."""
    if x.dim() != 3 or x.shape[-1] != layer.d_model:
        raise ValueError(
            f"{type(layer).__name__}: x has shape {list(x.shape)}, expected [B, S, {layer.d_model}]"
        )


def check_token(layer: nn.Module, x_t: Tensor) -> None:
    """x_t must be [B, d_model]."""
    if x_t.dim() != 2 or x_t.shape[-1] != layer.d_model:
        raise ValueError(
            f"{type(layer).__name__}.step: x_t has shape {list(x_t.shape)}, expected "
            f"[B, {layer.d_model}]; for more than one token call the layer itself"
        )


def check_batch(layer: nn.Module, x: Tensor, batch: int) -> None:
    """The state must belong to as many sequences as x."""
    if x.shape[0] != batch:
        raise ValueError(
            f"{type(layer).__name__}: x holds {x.shape[0]} sequences but the state {batch}; "
            "make the state with init_state(batch_size) or by return_state=True"
        )


def check_packed(layer: nn.Module, x: Tensor, cu_seqlens: Tensor, stateful: bool) -> None:
    """Packed sequences: batch 1, offsets from 0 up to the total, and no state."""
    name = type(layer).__name__
    if stateful:
        raise NotImplementedError(
            f"{name}: a state together with cu_seqlens; run the sequences of the pack one by one"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name}: cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)}, expected int32 or "
            "int64 [N + 1]"
        )
    if x.shape[0] != 1:
        raise ValueError(
            f"{name}: cu_seqlens needs batch size 1, got x {list(x.shape)}; join the sequences "
            "along dim 1"
        )
    if cu_seqlens.device.type != "cpu":
        return
    ends = cu_seqlens.tolist()
    increasing = all(a <= b for a, b in pairwise(ends))
    if not ends or ends[0] != 0 or ends[-1] != x.shape[1] or not increasing:
        raise ValueError(
            f"{name}: cu_seqlens {ends} must increase from 0 to the number of tokens {x.shape[1]}"
        )


def packed_positions(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The position of every token in its own sequence, [tokens] int64."""
    cu_seqlens = cu_seqlens.long()
    token = torch.arange(tokens, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, token, right=True) - 1
    return token - cu_seqlens[sequence]
