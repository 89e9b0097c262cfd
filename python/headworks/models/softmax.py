# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-any-return, no-untyped-call"
"""The usual transformer, as the baseline: softmax attention with a growing key-value cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn._layer import Layer
from ..nn._types import Device, DType
from ..nn.rotary import apply_rotary, rotary_tables
from .base import LanguageModel
from .config import SoftmaxConfig, rotary_dim

_FIRST_CAPACITY = 256


@dataclass
class KVCache:
    """Keys and values of all tokens so far; the buffers double when they are full."""

    k: Tensor  # [B, H, capacity, D], the first ``length`` of them in use
    v: Tensor  # [B, H, capacity, D]
    length: int = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        """Adds k and v [B, H, n, D]."""
        end = self.length + k.shape[2]
        if end > self.k.shape[2]:
            more = max(end, 2 * self.k.shape[2]) - self.k.shape[2]
            self.k, self.v = (F.pad(t, (0, 0, 0, more)) for t in (self.k, self.v))
        self.k[:, :, self.length : end] = k
        self.v[:, :, self.length : end] = v
        self.length = end

    def tensors(self) -> list[Tensor]:
        return [self.k[:, :, : self.length], self.v[:, :, : self.length]]


class SoftmaxAttention(Layer):
    """Causal multi-head attention by torch's SDPA. Wqkv.weight [3 d, d], out_proj.weight [d, d]."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        rotary_dim: int,
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = d_model // num_heads
        self.rotary_dim = rotary_dim
        like: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.Wqkv = nn.Linear(d_model, 3 * d_model, **like)
        self.out_proj = nn.Linear(d_model, d_model, **like)

    def init_state(self, batch_size: int, capacity: int = _FIRST_CAPACITY) -> KVCache:
        shape = (batch_size, self.num_heads, capacity, self.head_dim)
        weight = self.out_proj.weight
        return KVCache(weight.new_zeros(shape), weight.new_zeros(shape))

    def forward(
        self,
        x: Tensor,
        state: KVCache | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, KVCache]:
        """x [B, S, d_model] -> y of the same shape, and the cache after x if asked."""
        if cu_seqlens is not None or (state is not None and state.length):
            raise NotImplementedError(
                "SoftmaxAttention: packed sequences and continuing a cache by several tokens; "
                "the baseline takes one whole sequence, then single steps"
            )
        q, k, v = self._heads(x, torch.arange(x.shape[1], device=x.device))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = self.out_proj(o.transpose(1, 2).flatten(-2))
        if not return_state:
            return y
        cache = self.init_state(x.shape[0], max(x.shape[1], _FIRST_CAPACITY))
        with torch.no_grad():
            cache.append(k, v)
        return y, cache

    @torch.no_grad()
    def step(self, x_t: Tensor, state: KVCache) -> Tensor:
        """x_t [B, d_model] -> y_t [B, d_model]; the cache grows by one token."""
        position = torch.full((1,), state.length, device=x_t.device)
        q, k, v = self._heads(x_t.unsqueeze(1), position)
        state.append(k, v)
        keys, values = state.tensors()
        o = F.scaled_dot_product_attention(q, keys, values)
        return self.out_proj(o.flatten(1))

    def _heads(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # x [B, S, d_model] -> q, k, v [B, H, S, D], q and k rotated. position [S]
        qkv = self.Wqkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.unbind(2)
        if self.rotary_dim:
            cos, sin = rotary_tables(position, self.rotary_dim)
            q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class SoftmaxLM(LanguageModel):
    """A transformer with the block, embedding and head of :class:`BasedLM`.

    Its state holds every earlier token: memory and the time of a step grow with the context.
    """

    def __init__(
        self, config: SoftmaxConfig, *, device: Device = None, dtype: DType = None
    ) -> None:
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        mixers: list[nn.Module] = [
            SoftmaxAttention(config.d_model, config.num_heads, rotary_dim(config), **like)
            for _ in range(config.num_layers)
        ]
        super().__init__(config, mixers, **like)
