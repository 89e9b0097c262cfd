# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-any-return, no-untyped-call"
"""Parts of convolutional blocks over maps [B, C, Y, X], with the official names of weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._types import Device, DType


class ResidualDepthwise(nn.Conv2d):
    """x + depthwise convolution of x."""

    def __init__(
        self, dim: int, width: int = 3, *, device: Device = None, dtype: DType = None
    ) -> None:
        super().__init__(
            dim, dim, width, padding=width // 2, groups=dim, device=device, dtype=dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, Y, X]"""
        return x + super().forward(x)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each token."""

    def __init__(self, dim: int, *, device: Device = None, dtype: DType = None) -> None:
        super().__init__(dim, eps=1e-6, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, Y, X]"""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ChannelScale(nn.Module):
    """w x + b per channel; ``weight`` [C, 1, 1, 1], ``bias`` [C]."""

    def __init__(
        self, dim: int, value: float, *, device: Device = None, dtype: DType = None
    ) -> None:
        super().__init__()
        self.value = value
        self.weight = nn.Parameter(torch.empty(dim, 1, 1, 1, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """w = value, b = 0"""
        nn.init.constant_(self.weight, self.value)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, Y, X]"""
        return x * self.weight[:, 0] + self.bias[:, None, None]


class ResponseNorm(nn.Module):
    """Global response normalisation (ConvNeXt V2, arXiv 2301.00808): (gamma n + 1) x + beta, n the
    norm of a channel over the map, divided by the mean of all channels' norms."""

    def __init__(self, dim: int, *, device: Device = None, dtype: DType = None) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(1, dim, 1, 1, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.empty(1, dim, 1, 1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The identity."""
        nn.init.zeros_(self.gamma)
        nn.init.zeros_(self.beta)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, Y, X]"""
        norm = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        norm = norm / (norm.mean(dim=1, keepdim=True) + 1e-6)
        return (self.gamma * norm + 1) * x + self.beta


class SqueezeExcite(nn.Module):
    """x times a gate of each channel, made of the means of all channels; ``proj``."""

    def __init__(
        self, dim: int, reduction: int = 8, *, device: Device = None, dtype: DType = None
    ) -> None:
        super().__init__()
        inner = max(16, dim // reduction)
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.proj = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(dim, inner, 1, **like),
            nn.GELU(),
            nn.Conv2d(inner, dim, 1, **like),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, Y, X]"""
        return x * self.proj(x)


class DropPath(nn.Module):
    """In training drops a sample's branch with probability p, and scales what is kept."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ...]"""
        if not self.training or self.p == 0:
            return x
        kept = x.new_empty(x.shape[0], *(1,) * (x.dim() - 1)).bernoulli_(1 - self.p)
        return x * kept / (1 - self.p)


# By kernel size: (size, dilation) of the branches beside the dense one.
BRANCHES: dict[int, tuple[tuple[int, int], ...]] = {
    19: ((5, 1), (7, 1), (9, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    5: ((3, 1), (3, 2)),
}


class DilatedReparam(nn.Module):
    """A depthwise convolution as the sum of a dense one and dilated ones, each normalised, which
    :meth:`fuse` makes one (UniRepLKNet, arXiv 2311.15599).

    Names: ``lk_origin``, ``origin_bn``, and ``dil_conv_k{size}_{dilation}``, ``dil_bn_k...``.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        *,
        fused: bool = False,
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__()
        self.dim, self.kernel_size, self.fused = dim, kernel_size, fused
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.lk_origin = self._depthwise(kernel_size, 1, bias=fused, **like)
        if fused:
            return
        self.origin_bn = nn.BatchNorm2d(dim, **like)
        for size, dilation in BRANCHES[kernel_size]:
            name = f"k{size}_{dilation}"
            self.add_module(f"dil_conv_{name}", self._depthwise(size, dilation, **like))
            self.add_module(f"dil_bn_{name}", nn.BatchNorm2d(dim, **like))

    def _depthwise(self, size: int, dilation: int, *, bias: bool = False, **like: Any) -> nn.Conv2d:
        padding = (dilation * (size - 1) + 1) // 2
        return nn.Conv2d(
            self.dim, self.dim, size, padding=padding, dilation=dilation, groups=self.dim,
            bias=bias, **like,
        )  # fmt: skip

    def _branches(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        found: list[tuple[Any, Any]] = [(self.lk_origin, self.origin_bn)]
        for size, dilation in BRANCHES[self.kernel_size]:
            name = f"k{size}_{dilation}"
            found.append((getattr(self, f"dil_conv_{name}"), getattr(self, f"dil_bn_{name}")))
        return found

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, Y, X]"""
        if self.fused:
            return self.lk_origin(x)
        y, *others = (norm(conv(x)) for conv, norm in self._branches())
        for other in others:
            y = y + other
        return y

    @torch.no_grad()
    def fuse(self) -> None:
        """Makes it one convolution that gives what the module gives in evaluation mode."""
        if self.fused:
            return
        like = self.lk_origin.weight
        weight, bias = torch.zeros_like(like), like.new_zeros(self.dim)
        for conv, norm in self._branches():
            assert norm.running_mean is not None and norm.running_var is not None
            factor = norm.weight * (norm.running_var + norm.eps).rsqrt()
            dilation = conv.dilation[0]
            reach = dilation * (conv.kernel_size[0] - 1) // 2
            first = self.kernel_size // 2 - reach
            at = slice(first, first + 2 * reach + 1, dilation)
            weight[:, :, at, at] += factor[:, None, None, None] * conv.weight
            bias += norm.bias - factor * norm.running_mean
        merged = self._depthwise(
            self.kernel_size, 1, bias=True, device=like.device, dtype=like.dtype
        )
        merged.weight.copy_(weight)
        assert merged.bias is not None
        merged.bias.copy_(bias)
        for name in [name for name, _ in self.named_children()]:
            delattr(self, name)
        self.lk_origin, self.fused = merged, True


def enlarged(x: Tensor, least: int) -> Tensor:
    """A map [B, C, Y, X] whose shorter side is at least `least`: as it is, or enlarged bilinearly
    with its shape kept."""
    height, width = x.shape[2:]
    shorter, longer = (height, width) if height < width else (width, height)
    if shorter >= least:
        return x
    other = max(least, int(least / shorter * longer))
    size = (least, other) if height < width else (other, least)
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
