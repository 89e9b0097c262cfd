# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-any-return, no-untyped-call"
"""BiFormer, an image classifier of bi-level routing attention (Zhu et al. 2023, arXiv 2303.08810).

Sizes at 224 x 224: stages of 56, 28, 14 and 7 tokens a side; 7 x 7 regions; topk 1, 4, 16, so that
every token has 64 keys; full attention in the last stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn._layer import Layer, reset_children
from ..nn._recompute import recomputing
from ..nn._types import Device, DType
from ..nn.bilevel_routing import BiLevelRoutingAttention, depthwise
from ..ops.attention.attention import attention

_FULL = -2  # stands for full attention among the numbers of regions
_NORM_EPS = 1e-6
_STAGES = 4


class BatchNorm2d(nn.BatchNorm2d):
    """torch's, whose statistics a recomputation of activation checkpointing leaves alone."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, Y, X] -> the same shape."""
        if not (self.training and recomputing()):
            return super().forward(x)
        moved: list[Any] = [self.running_mean, self.running_var]
        mean, variance = (x.clone() for x in moved)
        return F.batch_norm(x, mean, variance, self.weight, self.bias, True, 0.0, self.eps)


class LePEAttention(Layer):
    """Full attention over an image, with a depthwise convolution of the input added.

    x [B, Y, X, C] -> y of the same shape. Names: ``qkv`` [3 C, C] without bias, ``proj`` [C, C],
    ``lepe`` [C, 1, w, w].
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        side_dwconv: int = 5,
        *,
        backend: str = "auto",
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__()
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.backend = num_heads, backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **like)
        self.proj = nn.Linear(dim, dim, **like)
        self.lepe = depthwise(dim, side_dwconv, **like)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, Y, X, C] -> y of the same shape."""
        qkv = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.num_heads, -1))
        o: Any = attention(*qkv.unbind(2), backend=self.backend)
        o = o.reshape(x.shape)
        if self.lepe is not None:
            o = o + self.lepe(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj(o)


class BiFormerBlock(Layer):
    """x + dwconv(x), then x + attn(norm1(x)), then x + mlp(norm2(x)); x [B, C, Y, X]."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: int = 3,
        drop_path: float = 0.0,
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__()
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **like)
        self.norm1 = nn.LayerNorm(dim, eps=_NORM_EPS, **like)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=_NORM_EPS, **like)
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp_ratio * dim, **like),
            nn.Identity(),  # keeps the official numbers of the layers
            nn.GELU(),
            nn.Linear(mlp_ratio * dim, dim, **like),
        )
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, Y, X] -> the same shape."""
        x = (x + self.pos_embed(x)).permute(0, 2, 3, 1)  # [B, Y, X, C]
        x = x + self._kept(self.attn(self.norm1(x)))
        x = x + self._kept(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)

    def _kept(self, x: Tensor) -> Tensor:
        """Stochastic depth: in training a branch is left out for some images, the others scaled."""
        if not (self.training and self.drop_path):
            return x
        keep = 1 - self.drop_path
        return x * (x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep) / keep)


class BiFormer(nn.Module):
    """Images [B, 3, Y, X] -> logits [B, num_classes]; module names are those of rayleizhu/BiFormer.

    Args:
        depth: blocks of each of the four stages.
        embed_dim: channels of each stage.
        topks: regions of each stage; -2 for full attention.
        num_classes: 0 for the pooled features instead of logits.
        in_chans: channels of the images.
        n_win: regions along each side.
        head_dim: channels of a head of the routing stages.
        mlp_ratio: hidden channels of the MLP by those of its input.
        side_dwconv: width of the depthwise convolution beside attention.
        drop_path_rate: stochastic depth of the last block; earlier ones have less.
        auto_pad: take images whose stages n_win does not divide; see
            hw.nn.BiLevelRoutingAttention.
        backend: of all attention.
    """

    def __init__(
        self,
        depth: Sequence[int],
        embed_dim: Sequence[int],
        topks: Sequence[int] = (1, 4, 16, _FULL),
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        n_win: int = 7,
        head_dim: int = 32,
        mlp_ratio: int = 3,
        side_dwconv: int = 5,
        drop_path_rate: float = 0.0,
        auto_pad: bool = False,
        backend: str = "auto",
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__()
        for name, values in (("depth", depth), ("embed_dim", embed_dim), ("topks", topks)):
            if len(values) != _STAGES:
                raise ValueError(f"BiFormer: {name} is {values}, expected {_STAGES} numbers")
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.downsample_layers = nn.ModuleList([_stem(in_chans, embed_dim[0], like)])
        for i in range(1, _STAGES):
            halved = nn.Sequential(*_halve(embed_dim[i - 1], embed_dim[i], like))
            self.downsample_layers.append(halved)
        drops = torch.linspace(0, drop_path_rate, sum(depth), device="cpu").tolist()
        self.stages = nn.ModuleList()
        for i, dim in enumerate(embed_dim):
            blocks = []
            for _ in range(depth[i]):
                attn: nn.Module
                if topks[i] == _FULL:
                    attn = LePEAttention(dim, side_dwconv=side_dwconv, backend=backend, **like)
                else:
                    attn = BiLevelRoutingAttention(
                        dim, dim // head_dim, n_win, topk=topks[i], side_dwconv=side_dwconv,
                        auto_pad=auto_pad, backend=backend, **like,
                    )  # fmt: skip
                blocks.append(BiFormerBlock(dim, attn, mlp_ratio, drops.pop(0), **like))
            self.stages.append(nn.Sequential(*blocks))
        self.norm = BatchNorm2d(embed_dim[-1], **like)
        self.head = nn.Linear(embed_dim[-1], num_classes, **like) if num_classes else nn.Identity()
        self._draw_weights()

    def reset_parameters(self) -> None:
        """Makes the model what a new one is: weights, norms and their statistics."""
        reset_children(self)
        self._draw_weights()

    def _draw_weights(self) -> None:
        # Linear weights normal with deviation 0.02, cut at 2, their biases 0.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, 3, Y, X] -> the last stage's channels [B, C, Y / 32, X / 32]."""
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, Y, X] -> logits [B, num_classes]."""
        return self.head(self.forward_features(x).mean((2, 3)))


def _halve(inputs: int, outputs: int, like: dict[str, Any]) -> list[nn.Module]:
    """A convolution that halves the image, and its norm."""
    conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, **like)
    return [conv, BatchNorm2d(outputs, **like)]


def _stem(inputs: int, outputs: int, like: dict[str, Any]) -> nn.Module:
    half = outputs // 2
    return nn.Sequential(*_halve(inputs, half, like), nn.GELU(), *_halve(half, outputs, like))


def biformer_tiny(**options: Any) -> BiFormer:
    """BiFormer-T: 13.1 million parameters, 81.4 % on ImageNet. Options: those of BiFormer."""
    return BiFormer((2, 2, 8, 2), (64, 128, 256, 512), **options)


def biformer_small(**options: Any) -> BiFormer:
    """BiFormer-S: 25.5 million parameters, 83.8 % on ImageNet. Options: those of BiFormer."""
    return BiFormer((4, 4, 18, 4), (64, 128, 256, 512), **options)


def biformer_base(**options: Any) -> BiFormer:
    """BiFormer-B: 56.8 million parameters, 84.3 % on ImageNet. Options: those of BiFormer."""
    return BiFormer((4, 4, 18, 4), (96, 192, 384, 768), **options)
