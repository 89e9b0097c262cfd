# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-any-return, no-untyped-call"
"""ContMix as a layer (OverLoCK, Lou and Yu 2025, arXiv 2502.20087)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from .._errors import require_flags
from ..ops.windows.contmix import contmix
from ._convolution import (
    BRANCHES,
    ChannelNorm,
    ChannelScale,
    DilatedReparam,
    DropPath,
    ResidualDepthwise,
    ResponseNorm,
    SqueezeExcite,
    enlarged,
)
from ._layer import Layer, reset_children
from ._types import Device, DType

CENTRES = 7  # of the context along each side


class ContMix(Layer):
    r"""A convolutional block whose kernels are made of each token's affinities to 7 x 7 regions.

    .. math::
        a = q^T k / \sqrt{C / G} \qquad
        y = W_p \big( g \odot \mathrm{se}( W_f\, \mathrm{contmix}(a, v) + \mathrm{lepe}(x) ) \big)

    q, k, v are projections of the normalised map, k of its averages over 7 x 7 regions;
    G = 2 num_heads groups; :func:`headworks.contmix` makes the weights of a small and a large
    window and mixes v with them; lepe is a depthwise convolution of kernel_size, se squeezes and
    excites, g is a SiLU gate. Depthwise convolutions stand before and after, and a feed-forward
    part follows; both parts are residual. A map whose shorter side is below kernel_size is enlarged
    bilinearly before the windows, and the result averaged back.

    It is the block that the official code offers for use elsewhere, and loads its state dict:
    ``dwconv1``, ``norm1``, ``weight_query``, ``weight_key``, ``weight_value``, ``weight_proj``,
    ``fusion_proj``, ``lepe``, ``se_layer``, ``gate``, ``proj``, ``rpb1`` [G, 2 S - 1, 2 S - 1],
    ``rpb2`` [G, 2 K - 1, 2 K - 1], ``dwconv2``, ``norm2``, ``mlp``, ``ls1``, ``ls2``.

    Args:
        dim: channels C, a multiple of 4 num_heads.
        kernel_size: K of the large window and of lepe; 5, 7, ... 19.
        small_kernel_size: S of the small window, odd, at most K.
        num_heads: half as many as groups.
        mlp_ratio: width of the feed-forward part, in dim.
        res_scale: scale the residual way (``ls1``, ``ls2``) and not the branches.
        ls_init_value: of these scales; None for none.
        drop_path: probability that a sample's branch is dropped in training.
        deploy: lepe as one convolution, as :meth:`fuse` makes it.
        backend: as in :func:`headworks.contmix`.

    Example:
        >>> layer = ContMix(64, kernel_size=7, num_heads=2)
        >>> layer(torch.randn(1, 64, 14, 14)).shape
        torch.Size([1, 64, 14, 14])
    """

    rpb1: Parameter
    rpb2: Parameter

    def __init__(
        self,
        dim: int,
        kernel_size: int = 7,
        small_kernel_size: int = 5,
        num_heads: int = 2,
        mlp_ratio: float = 4,
        *,
        res_scale: bool = False,
        ls_init_value: float | None = None,
        drop_path: float = 0.0,
        deploy: bool = False,
        backend: str = "auto",
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__()
        require_flags(type(self).__name__, res_scale=res_scale, deploy=deploy)
        _check_options(dim, kernel_size, small_kernel_size, num_heads)
        self.dim, self.num_heads, self.groups = dim, num_heads, 2 * num_heads
        self.kernel_size, self.small_kernel_size = kernel_size, small_kernel_size
        self.scale = (dim // self.groups) ** -0.5
        self.res_scale, self.backend = res_scale, backend
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dwconv1 = ResidualDepthwise(dim, **like)
        self.norm1 = ChannelNorm(dim, **like)
        self.weight_query = nn.Sequential(*_projection(dim, dim // 2, **like))
        self.weight_key = nn.Sequential(
            nn.AdaptiveAvgPool2d(CENTRES), *_projection(dim, dim // 2, **like)
        )
        self.weight_value = nn.Sequential(*_projection(dim, dim, **like))
        taps = kernel_size**2 + small_kernel_size**2
        self.weight_proj = nn.Conv2d(CENTRES**2, taps, 1, **like)
        self.fusion_proj = nn.Sequential(*_projection(dim, dim, **like))
        self.lepe = nn.Sequential(
            DilatedReparam(dim, kernel_size, fused=deploy, **like), nn.BatchNorm2d(dim, **like)
        )
        self.se_layer = SqueezeExcite(dim, **like)
        self.gate = nn.Sequential(*_projection(dim, dim, **like), nn.SiLU())
        self.proj = nn.Sequential(nn.BatchNorm2d(dim, **like), nn.Conv2d(dim, dim, 1, **like))
        self.dwconv2 = ResidualDepthwise(dim, **like)
        self.norm2 = ChannelNorm(dim, **like)
        self.mlp = _mlp(dim, int(dim * mlp_ratio), **like)
        self.ls1, self.ls2 = (
            nn.Identity() if ls_init_value is None else ChannelScale(dim, ls_init_value, **like)
            for _ in range(2)
        )
        self.drop_path = DropPath(drop_path)
        for name, size in (("rpb1", small_kernel_size), ("rpb2", kernel_size)):
            sizes = (self.groups, 2 * size - 1, 2 * size - 1)
            self.register_parameter(name, Parameter(torch.empty(sizes, **like)))
        self._reset_tables()

    def _reset_tables(self) -> None:
        for table in (self.rpb1, self.rpb2):
            nn.init.trunc_normal_(table, std=0.02)

    def reset_parameters(self) -> None:
        """Draws all weights as for a new module."""
        reset_children(self)
        self._reset_tables()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, Y, X] -> y of the same shape."""
        if x.dim() != 4 or x.shape[1] != self.dim:
            raise ValueError(
                f"{type(self).__name__}: x has shape {list(x.shape)}, expected "
                f"[B, {self.dim}, Y, X]"
            )
        x = self.dwconv1(x)
        x = self._residual(self.ls1, x, self._mix(self.norm1(x)))
        x = self.dwconv2(x)
        return self._residual(self.ls2, x, self.mlp(self.norm2(x)))

    def _residual(self, scale: nn.Module, x: Tensor, branch: Tensor) -> Tensor:
        if self.res_scale:
            return scale(x) + self.drop_path(branch)
        return x + self.drop_path(scale(branch))

    def _mix(self, x: Tensor) -> Tensor:
        """The first branch, of the normalised map."""
        gate, near = self.gate(x), self.lepe(x)
        large = enlarged(x, self.kernel_size)
        mixed = self._windows(large)
        if large.shape != x.shape:
            mixed = F.adaptive_avg_pool2d(mixed, (x.shape[2], x.shape[3]))
        return self.proj(gate * self.se_layer(self.fusion_proj(mixed) + near))

    def _windows(self, x: Tensor) -> Tensor:
        # q [B, G, N, c], k [B, G, c, 49] -> affinity [B, Y, X, G, 49], a view
        q = (self.weight_query(x) * self.scale).unflatten(1, (self.groups, -1))
        k = self.weight_key(x).unflatten(1, (self.groups, -1)).flatten(3)
        affinity = q.flatten(3).mT @ k
        affinity = affinity.unflatten(2, x.shape[2:]).permute(0, 2, 3, 1, 4)
        v = self.weight_value(x).unflatten(1, (2 * self.groups, -1)).permute(0, 3, 4, 1, 2)
        o = contmix(
            affinity,
            self.weight_proj.weight.flatten(1),
            self.weight_proj.bias,
            v,
            kernel_size=self.kernel_size,
            small_kernel_size=self.small_kernel_size,
            rpb=self.rpb2,
            small_rpb=self.rpb1,
            backend=self.backend,
        )
        return o.flatten(3).permute(0, 3, 1, 2)

    def fuse(self) -> ContMix:
        """Makes lepe one convolution, for evaluation; state dicts are then those of deploy=True.
        Returns the module."""
        for part in self.lepe:
            if isinstance(part, DilatedReparam):
                part.fuse()
        return self

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, kernel_size={self.kernel_size}, "
            f"small_kernel_size={self.small_kernel_size}, num_heads={self.num_heads}"
        )


def _projection(inputs: int, outputs: int, **like: Any) -> tuple[nn.Module, nn.Module]:
    conv = nn.Conv2d(inputs, outputs, 1, bias=False, **like)
    return conv, nn.BatchNorm2d(outputs, **like)


def _mlp(dim: int, inner: int, **like: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(dim, inner, 1, **like),
        nn.GELU(),
        ResidualDepthwise(inner, **like),
        ResponseNorm(inner, **like),
        nn.Conv2d(inner, dim, 1, **like),
    )


def _check_options(dim: int, kernel_size: int, small: int, num_heads: int) -> None:
    name = "ContMix"
    if num_heads < 1 or dim < 1 or dim % (4 * num_heads):
        raise ValueError(
            f"{name}: dim is {dim}, expected a multiple of 4 num_heads = {4 * num_heads}: two "
            "halves of values, each of 2 num_heads groups"
        )
    if kernel_size not in BRANCHES:
        raise ValueError(f"{name}: kernel_size is {kernel_size}, expected one of {list(BRANCHES)}")
    if small < 1 or small % 2 == 0 or small > kernel_size:
        raise ValueError(
            f"{name}: small_kernel_size is {small}, expected an odd number up to kernel_size "
            f"{kernel_size}"
        )
