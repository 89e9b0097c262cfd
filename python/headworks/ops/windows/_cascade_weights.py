# SPDX-License-Identifier: Apache-2.0
"""The folded weights of hw.cascaded_group_attention, and their checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._errors import (
    describe,
    fail,
    require_one_dtype,
    require_rank,
    require_same_device,
    require_sizes,
    require_tensors,
)
from ..._native import ACCUMULATION
from ..._trees import saved_by_name

OP = "cascaded_group_attention"

# What a projection or a convolution is given as: weight and bias.
Affine = tuple[Tensor, Tensor]


@saved_by_name
class CascadeWeights(NamedTuple):
    """The weights of cascaded group attention, batch norms folded into them.

    qkv_weight   [H, d, 2 K + d]   of head i: (q, k, v) = f W_i + b_i for its group f [N, d]
    qkv_bias     [H, 2 K + d]
    conv_weight  [H, S, S, K]      taps [dy, dx] of the depthwise convolution of q, S odd; a smaller
                                   kernel stands in the middle, zeros around it cost nothing
    conv_bias    [H, K]
    bias_table   [H, R * R]        added to the score of two tokens of a window: [|dy| R + |dx|]
    out_weight   [C, C]            y = relu(o) W + b, C = H d
    out_bias     [C]

    Projections are stored as they multiply from the right, inputs by outputs. All are of one dtype.
    ``hw.nn.CascadedGroupAttention.folded()`` makes them of a module with batch norms;
    ``of_heads`` of the weights of single heads as torch's layers have them.
    """

    qkv_weight: Tensor
    qkv_bias: Tensor
    conv_weight: Tensor
    conv_bias: Tensor
    bias_table: Tensor
    out_weight: Tensor
    out_bias: Tensor

    @classmethod
    def of_heads(
        cls, qkvs: Sequence[Affine], convs: Sequence[Affine], bias_table: Tensor, out: Affine
    ) -> CascadeWeights:
        """From (weight, bias) of each head, with the shapes of torch's layers.

        Args:
            qkvs: weight [2 K + d, d] or [2 K + d, d, 1, 1], bias [2 K + d] of each head.
            convs: weight [K, 1, S_i, S_i], bias [K]; odd S_i that may differ.
            bias_table: [H, R * R].
            out: weight [C, C] or [C, C, 1, 1], bias [C].

        Example:
            >>> import torch, headworks as hw
            >>> qkvs = [(torch.randn(48, 16), torch.zeros(48)) for _ in range(2)]
            >>> convs = [(torch.randn(16, 1, s, s), torch.zeros(16)) for s in (5, 3)]
            >>> weights = hw.CascadeWeights.of_heads(
            ...     qkvs, convs, torch.zeros(2, 49), (torch.randn(32, 32), torch.zeros(32)))
            >>> weights.conv_weight.shape
            torch.Size([2, 5, 5, 16])
        """
        sides = [w.shape[-1] for w, _ in convs]
        for i, side in enumerate(sides):
            _require_odd(f"convs[{i}]", convs[i][0], side)
        widest = max(sides, default=1)
        taps = [
            F.pad(w[:, 0], ((widest - s) // 2,) * 4) for (w, _), s in zip(convs, sides, strict=True)
        ]
        return cls(
            torch.stack([w.flatten(1).T for w, _ in qkvs]).contiguous(),
            torch.stack([b for _, b in qkvs]),
            torch.stack([w.permute(1, 2, 0) for w in taps]).contiguous(),
            torch.stack([b for _, b in convs]),
            bias_table.contiguous(),
            out[0].flatten(1).T.contiguous(),
            out[1],
        )

    def to(self, *args: Any, **kwargs: Any) -> CascadeWeights:
        """Each as Tensor.to."""
        return CascadeWeights(*(x.to(*args, **kwargs) for x in self))

    @property
    def window(self) -> int:
        """R, the side of the windows that the table is of."""
        side = 0
        while side * side < self.bias_table.shape[-1]:  # as torch.compile can follow it
            side += 1
        return side if side * side == self.bias_table.shape[-1] else side - 1


def _require_odd(name: str, x: Tensor, side: int) -> None:
    if side % 2 == 0:
        fail(
            ValueError,
            OP,
            name,
            f"of shape {list(x.shape)}, a kernel of {side} x {side}",
            "a kernel of odd size, which has a middle",
            "Pad it with zeros to the next odd size, on the side where its middle is missing.",
        )


def check_weights(weights: object) -> CascadeWeights:
    """A complete tuple; sizes are looked at by check_sizes."""
    if isinstance(weights, nn.Module):
        fail(
            TypeError,
            OP,
            "weights",
            f"a module, {type(weights).__name__}, whose batch norms are not folded",
            "hw.CascadeWeights",
            "Fold them: hw.nn.CascadedGroupAttention.from_timm(module).folded() for a module of "
            "timm, .folded() for one of hw.nn.",
        )
    if not isinstance(weights, tuple) or len(weights) != len(CascadeWeights._fields):
        fail(
            TypeError,
            OP,
            "weights",
            describe(weights),
            "hw.CascadeWeights",
            "Make it with hw.CascadeWeights.of_heads or .folded() of a module.",
        )
    made = weights if isinstance(weights, CascadeWeights) else CascadeWeights(*weights)
    fields: tuple[object, ...] = made
    for name, x in zip(CascadeWeights._fields, fields, strict=True):
        if isinstance(x, nn.Module):
            fail(
                TypeError,
                OP,
                f"weights.{name}",
                f"a module, {type(x).__name__}",
                "a tensor with the batch norm folded in",
                "Fold it: w g / sqrt(var + eps) and b - mean g / sqrt(var + eps), as "
                "hw.nn.CascadedGroupAttention.folded() does.",
            )
    return made


def check_sizes(x: Tensor, w: CascadeWeights) -> None:
    """That everything is of one dtype and device, and of sizes that belong together."""
    named = {f"weights.{name}": t for name, t in zip(CascadeWeights._fields, w, strict=True)}
    require_tensors(OP, x=x, **named)
    require_rank(OP, 4, "[B, Y, X, C]", x=x)
    require_one_dtype(OP, ACCUMULATION, x=x, **named)
    require_same_device(OP, "x", x, **named)
    require_rank(OP, 3, "[H, d, 2 K + d]", **{"weights.qkv_weight": w.qkv_weight})
    require_rank(OP, 2, "[H, K]", **{"weights.conv_bias": w.conv_bias})
    require_rank(OP, 4, "[H, S, S, K]", **{"weights.conv_weight": w.conv_weight})
    require_rank(OP, 2, "[H, R * R]", **{"weights.bias_table": w.bias_table})
    channels, (heads, width, _) = x.shape[3], w.qkv_weight.shape
    if heads == 0 or channels % heads or channels == 0:
        fail(
            ValueError,
            OP,
            "the number of channels of x",
            channels,
            f"a multiple of the {heads} heads of the weights",
            "Each head has a group of as many channels.",
        )
    key_dim, side = w.conv_bias.shape[1], w.conv_weight.shape[1]
    _require_odd("weights.conv_weight", w.conv_weight, side)
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "conv_bias": ("[H, K]", (heads, max(key_dim, 1))),
        "qkv_weight": ("[H, d, 2 K + d]", (heads, channels // heads, 2 * key_dim + width)),
        "qkv_bias": ("[H, 2 K + d]", (heads, 2 * key_dim + width)),
        "conv_weight": ("[H, S, S, K]", (heads, side, side, key_dim)),
        "bias_table": ("[H, R * R]", (heads, max(w.window, 1) ** 2)),
        "out_weight": ("[C, C]", (channels, channels)),
        "out_bias": ("[C]", (channels,)),
    }
    for name, (layout, sizes) in expected.items():
        require_sizes(OP, layout, f"weights.{name}", getattr(w, name), sizes)
