# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-call"
"""Cascaded group attention (EfficientViT, arXiv 2305.07027) in plain PyTorch.

Of a window of N tokens, its channels cut into H groups x_0 .. x_{H-1}, head by head:

    f_0 = x_0,  f_i = o_{i-1} + x_i                              [N, d]
    (q, k, v) = f_i W_i + b_i                                    [N, K], [N, K], [N, d]
    q = dwconv_i(q) + c_i                                        over the window, zeros beyond it
    o_i = softmax(K^-1/2 q k^T + T_i[|dy| R + |dx|]) v           [N, d]
    y = relu([o_0 .. o_{H-1}]) W + b                             [N, C]

An image that is larger than a window is filled with zeros, below and on the right, to whole
windows; such tokens are keys like others.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Weights(Protocol):
    """The fields of headworks.CascadeWeights."""

    @property
    def qkv_weight(self) -> Tensor: ...  # [H, d, 2 K + d]
    @property
    def qkv_bias(self) -> Tensor: ...  # [H, 2 K + d]
    @property
    def conv_weight(self) -> Tensor: ...  # [H, S, S, K]
    @property
    def conv_bias(self) -> Tensor: ...  # [H, K]
    @property
    def bias_table(self) -> Tensor: ...  # [H, R R]
    @property
    def out_weight(self) -> Tensor: ...  # [C, C]
    @property
    def out_bias(self) -> Tensor: ...  # [C]


def cascaded_group_attention(
    x: Tensor,  # [B, Y, X, C]
    weights: Weights,
    *,
    window: int | None = None,
) -> Tensor:
    """y [B, Y, X, C] in the dtype of x."""
    batch, height, width, channels = x.shape
    if x.numel() == 0:
        return x.clone()
    if window is None or (height <= window and width <= window):
        return _cascade(x, weights)
    below, beyond = -height % window, -width % window
    x = F.pad(x, (0, 0, 0, beyond, 0, below))
    rows, columns = (height + below) // window, (width + beyond) // window
    x = x.unflatten(2, (columns, window)).unflatten(1, (rows, window)).transpose(2, 3)
    y = _cascade(x.reshape(-1, window, window, channels), weights)
    y = y.view(batch, rows, columns, window, window, channels).transpose(2, 3)
    return y.flatten(3, 4).flatten(1, 2)[:, :height, :width].contiguous()


def _cascade(x: Tensor, weights: Weights) -> Tensor:
    """Of windows x [M, R_y, R_x, C]."""
    heads, key_dim = weights.conv_bias.shape
    table = table_bias(weights.bias_table, x.shape[1], x.shape[2])
    outputs: list[Tensor] = []
    for i, group in enumerate(x.chunk(heads, dim=-1)):
        f = outputs[-1] + group if outputs else group
        qkv = f @ weights.qkv_weight[i] + weights.qkv_bias[i]
        q, k, v = qkv.split([key_dim, key_dim, group.shape[-1]], dim=-1)
        taps = weights.conv_weight[i].permute(2, 0, 1)[:, None]  # [K, 1, S, S]
        q = F.conv2d(
            q.permute(0, 3, 1, 2), taps, weights.conv_bias[i], padding=taps.shape[-1] // 2,
            groups=key_dim,
        ).permute(0, 2, 3, 1)  # fmt: skip
        q, k, v = (t.flatten(1, 2) for t in (q, k, v))  # [M, N, *]
        s = key_dim**-0.5 * q @ k.transpose(1, 2) + table[i]
        outputs.append((s.softmax(-1) @ v).view(group.shape))
    return torch.cat(outputs, -1).relu() @ weights.out_weight + weights.out_bias


def table_bias(table: Tensor, height: int, width: int) -> Tensor:
    """table [H, R R] -> [H, N, N] for the N = height width tokens of a window."""
    side = round(table.shape[-1] ** 0.5)
    y = torch.arange(height, device=table.device)
    x = torch.arange(width, device=table.device)
    dy, dx = (y[:, None] - y).abs(), (x[:, None] - x).abs()
    index = dy[:, None, :, None] * side + dx[:, None]  # [Ry, Rx, Ry, Rx]
    return table[:, index.flatten(2).flatten(0, 1)]
