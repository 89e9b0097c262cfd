# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-any-return, no-untyped-call"
"""Bi-level routing attention as a layer (BiFormer, Zhu et al. 2023, arXiv 2303.08810)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .._errors import require_flags
from ..ops.routing.bilevel_routing import bilevel_routing_attention
from ._layer import Layer
from ._types import Device, DType


class BiLevelRoutingAttention(Layer):
    r"""Image tokens attend to the tokens of the topk regions that suit their region best.

    .. math:: y = W_o \big( \mathrm{attention}(q, k, v) + \mathrm{dwconv}(v) \big)

    with :func:`headworks.bilevel_routing_attention`, the heads sharing one graph, and a depthwise
    convolution of the values over the image (LEPE). The scores are scaled by ``qk_dim ** -0.5``,
    all channels, as in the released models.

    The official code has two forms, with the same arithmetic where ``n_win`` divides the image:

    ``layout="NHWC"``, the legacy form of the released classification models. Names: ``qkv.qkv``
        [2 qk_dim + dim, dim], ``wo`` [dim, dim], ``lepe`` [dim, 1, w, w]. An image that n_win does
        not divide is refused, or with ``auto_pad`` padded with zeros at the lower and right edge
        before the projection: padding takes part with the projection's bias as its keys and values.
    ``layout="NCHW"``, the later form. Names: ``qkv_linear`` [3 dim, dim, 1, 1], ``output_linear``
        [dim, dim, 1, 1], ``lepe``. Regions are of floor(size / n_win) tokens, as many as it takes,
        zeros are appended after the projection, and, with ``mask_padding=False``, count as keys
        of score 0 (as the official code does); the default hides them.

    Args:
        dim: channels C of the input, the values and the output; a multiple of num_heads.
        num_heads: H.
        n_win: regions along each side.
        qk_dim: channels of queries and keys; dim by default (always with "NCHW").
        qk_scale: of the scores; ``qk_dim ** -0.5`` by default.
        topk: regions that a region attends to.
        side_dwconv: width w of the depthwise convolution, an odd number; 0 for none.
        auto_pad: "NHWC" only, see there.
        mask_padding: "NCHW" only, see there.
        layout: of the input and the output, and the names that go with it.
        backend: as in :func:`headworks.bilevel_routing_attention`.

    Example:
        >>> layer = BiLevelRoutingAttention(64, num_heads=2, n_win=7, topk=4)
        >>> layer(torch.randn(1, 28, 28, 64)).shape
        torch.Size([1, 28, 28, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        n_win: int = 7,
        *,
        qk_dim: int | None = None,
        qk_scale: float | None = None,
        topk: int = 4,
        side_dwconv: int = 3,
        auto_pad: bool = False,
        mask_padding: bool = True,
        layout: str = "NHWC",
        backend: str = "auto",
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__()
        require_flags(type(self).__name__, auto_pad=auto_pad, mask_padding=mask_padding)
        qk_dim = dim if qk_dim is None else qk_dim
        _check_options(dim, qk_dim, num_heads, side_dwconv, layout, auto_pad)
        self.dim, self.qk_dim, self.num_heads = dim, qk_dim, num_heads
        self.n_win, self.topk = n_win, topk
        self.scale = qk_dim**-0.5 if qk_scale is None else qk_scale
        self.auto_pad, self.mask_padding = auto_pad, mask_padding
        self.layout, self.backend = layout, backend
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.lepe = depthwise(dim, side_dwconv, **like)
        if layout == "NHWC":
            self.qkv = _Projection(dim, 2 * qk_dim + dim, **like)
            self.wo = nn.Linear(dim, dim, **like)
        else:
            self.qkv_linear = nn.Conv2d(dim, 3 * dim, 1, **like)
            self.output_linear = nn.Conv2d(dim, dim, 1, **like)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, Y, X, C], or [B, C, Y, X] with layout "NCHW" -> y of the same shape."""
        channels = x.shape[-1 if self.layout == "NHWC" else 1] if x.dim() == 4 else None
        if channels != self.dim:
            expected = (
                f"[B, Y, X, {self.dim}]" if self.layout == "NHWC" else f"[B, {self.dim}, Y, X]"
            )
            raise ValueError(
                f"{type(self).__name__}: x has shape {list(x.shape)}, expected {expected}"
            )
        return self._channels_last(x) if self.layout == "NHWC" else self._channels_first(x)

    def _channels_last(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        below, beyond = -height % self.n_win, -width % self.n_win
        if (below or beyond) and not self.auto_pad:
            raise ValueError(
                f"{type(self).__name__}: the image is {height} x {width}, expected multiples of "
                f"n_win = {self.n_win}; resize it, or use auto_pad=True"
            )
        x = F.pad(x, (0, 0, 0, beyond, 0, below))
        q, k, v = self.qkv.qkv(x).split([self.qk_dim, self.qk_dim, self.dim], dim=-1)
        o = self._attend(*(t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))).flatten(-2)
        if self.lepe is not None:
            o = o + self.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.wo(o[:, :height, :width])

    def _channels_first(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv_linear(x).chunk(3, dim=1)
        heads = (t.unflatten(1, (self.num_heads, -1)).permute(0, 3, 4, 1, 2) for t in (q, k, v))
        o = self._attend(*heads).flatten(-2).permute(0, 3, 1, 2)  # [B, C, Y, X]
        if self.lepe is not None:
            o = o + self.lepe(v)
        return self.output_linear(o)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # q, k, v [B, Y, X, H, D] -> o of the same shape
        o: Any = bilevel_routing_attention(
            q, k, v,
            num_regions=(self.n_win, self.n_win),
            topk=self.topk,
            scale=self.scale,
            mask_padding=self.mask_padding,
            backend=self.backend,
        )  # fmt: skip
        return o

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, n_win={self.n_win}, topk={self.topk}, "
            f"layout={self.layout}"
        )


def depthwise(dim: int, width: int, device: Device = None, dtype: DType = None) -> nn.Conv2d | None:
    """The depthwise convolution over an image that keeps its size; None for width 0."""
    if width == 0:
        return None
    return nn.Conv2d(dim, dim, width, padding=width // 2, groups=dim, device=device, dtype=dtype)


class _Projection(nn.Module):
    """Holds the projection under the name that the official checkpoints use (qkv.qkv.weight)."""

    def __init__(
        self, inputs: int, outputs: int, device: Device = None, dtype: DType = None
    ) -> None:
        super().__init__()
        self.qkv = nn.Linear(inputs, outputs, device=device, dtype=dtype)


def _check_options(
    dim: int, qk_dim: int, num_heads: int, side_dwconv: int, layout: str, auto_pad: bool
) -> None:
    name = "BiLevelRoutingAttention"
    if layout not in ("NHWC", "NCHW"):
        raise ValueError(f'{name}: layout is {layout!r}, expected "NHWC" or "NCHW"')
    for what, size in (("dim", dim), ("qk_dim", qk_dim)):
        if num_heads < 1 or size < 1 or size % num_heads:
            raise ValueError(
                f"{name}: {what} is {size}, expected a multiple of num_heads {num_heads}"
            )
    if side_dwconv < 0 or (side_dwconv and side_dwconv % 2 == 0):
        raise ValueError(f"{name}: side_dwconv is {side_dwconv}, expected 0 or an odd number")
    if layout == "NCHW" and (qk_dim != dim or auto_pad):
        raise ValueError(
            f"{name}: qk_dim {qk_dim} and auto_pad {auto_pad} with layout NCHW, expected "
            f"{dim} and False; regions of that layout take any image"
        )
