# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-any-return, no-untyped-call"
"""The gated short convolution of BASED ("BaseConv")."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import check_batch, check_packed, check_sequence, check_token, packed_positions
from ._layer import Layer
from ._types import Device, DType
from .functional import gated_short_conv, short_conv


class _ShortConv(nn.Module):
    """Holds the depthwise filter under the name the official checkpoints use (conv.conv.weight)."""

    def __init__(self, channels: int, width: int, bias: bool, device: Device, dtype: DType) -> None:
        super().__init__()
        self.conv = nn.Conv1d(
            channels, channels, width, groups=channels, bias=bias, device=device, dtype=dtype
        )


class GatedShortConv(Layer):
    r"""Token mixing of the nearest neighbours, gated:

    .. math:: [a \,|\, b] = x W_{in}^T + c_{in}, \qquad
              y = (\mathrm{silu}(w * a) \odot b) W_{out}^T + c_{out}

    where ``*`` is a causal depthwise convolution of ``conv_width`` taps along the tokens; tokens
    before the first count as zeros.

    Parameter names and shapes are those of HazyResearch/based: ``in_proj.weight``
    [2 E, d_model], ``conv.conv.weight`` [E, 1, conv_width], ``out_proj.weight`` [d_model, E], and
    the biases; E = expand * d_model / 2, that is 2 d_model by default.

    Args:
        d_model: width of the input and the output.
        expand: ``in_proj`` goes from d_model to expand * d_model channels.
        conv_width: taps of the filter.
        bias: bias of the two projections.
        conv_bias: bias of the filter.

    The state of a sequence is its last conv_width - 1 rows of a: [B, conv_width - 1, E].
    """

    def __init__(
        self,
        d_model: int,
        *,
        expand: int = 4,
        conv_width: int = 3,
        bias: bool = True,
        conv_bias: bool = False,
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__()
        if expand * d_model % 2:
            raise ValueError(
                f"GatedShortConv: expand * d_model = {expand} * {d_model} must be even"
            )
        if conv_width < 1:
            raise ValueError(f"GatedShortConv: conv_width is {conv_width}, expected at least 1")
        self.d_model = d_model
        self.channels = expand * d_model // 2
        self.conv_width = conv_width
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, 2 * self.channels, bias=bias, **like)
        self.conv = _ShortConv(self.channels, conv_width, conv_bias, **like)
        self.out_proj = nn.Linear(self.channels, d_model, bias=bias, **like)

    def init_state(self, batch_size: int) -> Tensor:
        """The state before any token: zeros [B, conv_width - 1, E] in the dtype of the weights."""
        return self.in_proj.weight.new_zeros(batch_size, self.conv_width - 1, self.channels)

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Parallel form. x [B, S, d_model] -> y of the same shape, and the state after x if asked.

        ``state`` continues earlier tokens and is not modified. With ``cu_seqlens`` [N + 1] the
        batch size is 1 and x holds N sequences one after the other.
        """
        check_sequence(self, x)
        filters = self.conv.conv
        u = self.in_proj(x)
        if cu_seqlens is not None:
            check_packed(self, x, cu_seqlens, state is not None or return_state)
            mixed = self._packed(u, cu_seqlens)
        elif state is not None:
            check_batch(self, x, state.shape[0])
            a, b = u.chunk(2, -1)
            conv = short_conv(a, filters.weight, history=state)
            mixed = F.silu(_add_bias(conv, filters.bias)) * b
        else:
            mixed = gated_short_conv(u, filters.weight, filters.bias)
        y = self.out_proj(mixed)
        return (y, self._next_state(u, state)) if return_state else y

    @torch.no_grad()
    def step(self, x_t: Tensor, state: Tensor) -> Tensor:
        """Recurrent form, one token: x_t [B, d_model] -> y_t; the state is updated in place."""
        check_token(self, x_t)
        check_batch(self, x_t, state.shape[0])
        a, b = self.in_proj(x_t).chunk(2, -1)  # [B, E] each
        taps = self.conv.conv.weight[:, 0].t().to(a.dtype)  # [K, E]
        window = torch.cat([state.to(a.dtype), a.unsqueeze(1)], dim=1)  # [B, K, E]
        conv = _add_bias((window * taps).sum(1), self.conv.conv.bias)
        state.copy_(window[:, 1:])
        return self.out_proj(F.silu(conv) * b)

    def _packed(self, u: Tensor, cu_seqlens: Tensor) -> Tensor:
        # A tap reaches back only within its own sequence.
        a, b = u.chunk(2, -1)
        position = packed_positions(cu_seqlens, u.shape[1])
        taps = self.conv.conv.weight[:, 0].to(u.dtype)
        conv = a * taps[:, -1]
        for lag in range(1, min(self.conv_width, u.shape[1])):
            inside = (position >= lag).unsqueeze(-1)
            conv = conv + a.roll(lag, dims=1) * inside * taps[:, self.conv_width - 1 - lag]
        return F.silu(_add_bias(conv, self.conv.conv.bias)) * b

    def _next_state(self, u: Tensor, state: Tensor | None) -> Tensor:
        keep = self.conv_width - 1
        a = u[..., : self.channels]
        rows = a[:, max(a.shape[1] - keep, 0) :]
        missing = keep - rows.shape[1]
        if missing == 0:
            return rows.clone()
        past = self.init_state(u.shape[0]) if state is None else state
        return torch.cat([past[:, keep - missing :].to(a.dtype), rows], dim=1)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, channels={self.channels}, conv_width={self.conv_width}"


def _add_bias(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias.to(x.dtype)
