# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-any-return, no-untyped-call"
"""Causal softmax attention over a sliding window, with a ring buffer for decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.attention.attention import attention
from ._checks import check_batch, check_packed, check_sequence, check_token, packed_positions
from ._layer import Layer
from ._types import Device, DType
from .rotary import apply_rotary, rotary_tables


@dataclass
class WindowState:
    """The last window + 1 keys and values of B sequences, in a ring.

    The key of the token at position p lies in slot p % (window + 1), rotated already; ``position``
    is the number of tokens seen. The order of the slots does not matter to a softmax.
    """

    k: Tensor  # [B, H, window + 1, D]
    v: Tensor  # [B, H, window + 1, D]
    position: int = 0

    def tensors(self) -> list[Tensor]:
        return [self.k, self.v]


class SlidingWindowAttention(Layer):
    r"""Multi-head softmax attention in which a token sees itself and the ``window`` tokens before:

    .. math:: o_i = \sum_{j=i-w}^{i} \mathrm{softmax}_j(q_i \cdot k_j / \sqrt{D}) \, v_j

    ``window`` counts earlier tokens: 128 means 129 keys including the token's own. (A config of
    HazyResearch/based states twice that number: its 256 is 128 here.)

    Time grows as S * window and memory as S: :func:`headworks.attention` visits only the tiles of
    scores that the window touches and stores none of them.

    Parameter names and shapes are those of HazyResearch/based: ``Wqkv.weight`` [3 H D, d_model]
    (rows: all of q, then k, then v; head by head) and ``out_proj.weight`` [d_model, H D].

    Args:
        d_model: width of the input and the output, a multiple of num_heads.
        num_heads: H; D = d_model / H.
        window: earlier tokens that a token sees.
        rotary_dim: leading channels of a head that get rotary position embedding; 0 for none.
        rotary_base: base of its wavelengths.
        bias: give the two projections a bias.
        backend: of both forms, as in :func:`headworks.attention`.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int = 16,
        *,
        window: int = 128,
        rotary_dim: int = 0,
        rotary_base: float = 10000.0,
        bias: bool = False,
        backend: str = "auto",
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__()
        if d_model % num_heads:
            raise ValueError(
                f"SlidingWindowAttention: d_model {d_model} is not a multiple of num_heads "
                f"{num_heads}"
            )
        self.head_dim = d_model // num_heads
        if window < 0:
            raise ValueError(f"SlidingWindowAttention: window is {window}, expected 0 or more")
        if rotary_dim % 2 or not 0 <= rotary_dim <= self.head_dim:
            raise ValueError(
                f"SlidingWindowAttention: rotary_dim is {rotary_dim}, expected an even number "
                f"between 0 and the head dim {self.head_dim}"
            )
        self.d_model = d_model
        self.num_heads = num_heads
        self.window = window
        self.rotary_dim = rotary_dim
        self.rotary_base = rotary_base
        self.backend = backend
        like: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.Wqkv = nn.Linear(d_model, 3 * d_model, **like)
        self.out_proj = nn.Linear(d_model, d_model, **like)

    def init_state(self, batch_size: int) -> WindowState:
        """The state before any token, in the dtype of the weights. Its size never changes."""
        shape = (batch_size, self.num_heads, self.window + 1, self.head_dim)
        weight = self.out_proj.weight
        return WindowState(weight.new_zeros(shape), weight.new_zeros(shape))

    def forward(
        self,
        x: Tensor,
        state: WindowState | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, WindowState]:
        """Parallel form. x [B, S, d_model] -> y of the same shape, and the state after x if asked.

        ``state`` continues earlier tokens and is not modified. With ``cu_seqlens`` [N + 1] the
        batch size is 1 and x holds N sequences one after the other.
        """
        check_sequence(self, x)
        if cu_seqlens is not None:
            check_packed(self, x, cu_seqlens, state is not None or return_state)
            q, k, v = self._heads(x, packed_positions(cu_seqlens, x.shape[1]))
            return self.out_proj(self._attend(q, k, v, cu_seqlens).flatten(-2))
        seen = 0
        if state is not None:
            check_batch(self, x, state.k.shape[0])
            seen = state.position
        q, k, v = self._heads(x, torch.arange(seen, seen + x.shape[1], device=x.device))
        if state is not None and seen:
            past_k, past_v = self._past(state)
            k = torch.cat([past_k.to(k.dtype), k], dim=1)
            v = torch.cat([past_v.to(v.dtype), v], dim=1)
        y = self.out_proj(self._attend(q, k, v).flatten(-2))
        return (y, self._state_after(k, v, seen + x.shape[1])) if return_state else y

    @torch.no_grad()
    def step(self, x_t: Tensor, state: WindowState) -> Tensor:
        """Recurrent form, one token: x_t [B, d_model] -> y_t; the state is updated in place."""
        check_token(self, x_t)
        check_batch(self, x_t, state.k.shape[0])
        position = torch.full((1,), state.position, device=x_t.device)
        q, k, v = self._heads(x_t.unsqueeze(1), position)  # [B, 1, H, D]
        slot = state.position % (self.window + 1)
        state.k[:, :, slot] = k[:, 0]
        state.v[:, :, slot] = v[:, 0]
        state.position += 1
        filled = min(state.position, self.window + 1)
        k, v = (t[:, :, :filled].transpose(1, 2).to(q.dtype) for t in state.tensors())
        o: Any = attention(q, k, v, backend=self.backend)  # every slot is visible: [B, 1, H, D]
        return self.out_proj(o.flatten(1))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """q [B, S, H, D], k and v [B, P + S, H, D] with P keys before the first query -> o like q.

        The longest sequence is asked of cu_seqlens where that costs nothing, on the CPU; elsewhere
        the sum of all lengths bounds it.
        """
        longest = None
        if cu_seqlens is not None and cu_seqlens.device.type != "cpu":
            longest = q.shape[1]
        o: Any = attention(
            q, k, v,
            is_causal=True,
            window_size=(self.window, 0),
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            backend=self.backend,
        )  # fmt: skip
        return o

    def _heads(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # x [B, S, d_model] -> q, k, v [B, S, H, D], q and k rotated. position [S]
        qkv = self.Wqkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        if not self.rotary_dim:
            return qkv.unbind(2)
        qk, v = qkv[:, :, :2].flatten(2, 3), qkv[:, :, 2]  # [B, S, 2 H, D]
        cos, sin = rotary_tables(position, self.rotary_dim, self.rotary_base)
        q, k = apply_rotary(qk, cos, sin).chunk(2, dim=2)
        return q, k, v

    def _past(self, state: WindowState) -> tuple[Tensor, Tensor]:
        # The keys and values that the next token sees, oldest first: [B, P, H, D], P <= window
        count = min(state.position, self.window)
        slots = torch.arange(state.position - count, state.position, device=state.k.device)
        slots = slots % (self.window + 1)
        return state.k[:, :, slots].transpose(1, 2), state.v[:, :, slots].transpose(1, 2)

    def _state_after(self, k: Tensor, v: Tensor, position: int) -> WindowState:
        # k, v [B, past + S, H, D]: the last window + 1 of them go to their slots.
        state = self.init_state(k.shape[0])
        count = min(k.shape[1], self.window + 1)
        slots = torch.arange(position - count, position, device=k.device) % (self.window + 1)
        state.k[:, :, slots] = k[:, k.shape[1] - count :].transpose(1, 2).to(state.k.dtype)
        state.v[:, :, slots] = v[:, v.shape[1] - count :].transpose(1, 2).to(state.v.dtype)
        state.position = position
        return state

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, num_heads={self.num_heads}, window={self.window}, "
            f"rotary_dim={self.rotary_dim}"
        )
