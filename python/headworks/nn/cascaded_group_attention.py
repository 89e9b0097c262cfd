# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-any-return, no-untyped-call"
"""Cascaded group attention as a layer (EfficientViT, Liu et al. 2023, arXiv 2305.07027)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._errors import describe, fail
from ..ops.windows._cascade_weights import CascadeWeights
from ..ops.windows.cascaded_group_attention import cascaded_group_attention
from ._layer import Layer
from ._types import Device, DType

_NAME = "CascadedGroupAttention"


class CascadedGroupAttention(Layer):
    r"""Heads of a window one after another, each fed with what the one before it gave.

    The mathematics is that of :func:`headworks.cascaded_group_attention`, with a batch norm behind
    each projection and each convolution:

    .. math::
        f_i = o_{i-1} + x_i, \quad (q, k, v) = \mathrm{BN}(W_i f_i), \quad
        o_i = \mathrm{attention}(\mathrm{BN}(\mathrm{dwconv}_i(q)), k, v), \quad
        y = \mathrm{BN}(W \, \mathrm{relu}[o_0 \dots o_{H-1}])

    An image is filled with zeros, below and on the right, to whole windows of ``resolution`` x
    ``resolution`` tokens, as timm does; they are keys like others.

    Names are those of timm's ``CascadedGroupAttention``, whose state dict loads: ``qkvs.i.conv``,
    ``qkvs.i.bn``, ``dws.i.conv``, ``dws.i.bn``, ``proj.1.conv``, ``proj.1.bn``,
    ``attention_biases`` [H, R * R]. So does that of ``LocalWindowAttention``, which calls it
    ``attn``.

    Three ways to compute, by what the call needs:

    * training, or a gradient wanted: layers of torch with attention between them;
    * evaluation without gradient: one fused pass a window, batch norms folded in every call;
    * after :meth:`fuse`: the same, folded once and for all.

    Args:
        dim: channels C, a multiple of num_heads.
        key_dim: K, channels of queries and keys of a head.
        num_heads: H.
        resolution: R, side of a window.
        kernels: side of the convolution of each head, odd numbers; as many as heads, or more.
        layout: of the input and the output, "NCHW" or "NHWC".
        backend: of the fused pass, as in :func:`headworks.cascaded_group_attention`.

    Example:
        >>> layer = CascadedGroupAttention(64, key_dim=16, num_heads=4, resolution=7)
        >>> layer(torch.randn(2, 64, 14, 14)).shape
        torch.Size([2, 64, 14, 14])
        >>> with torch.no_grad():
        ...     y = layer.eval().fuse()(torch.randn(2, 64, 14, 14))
    """

    def __init__(
        self,
        dim: int,
        key_dim: int = 16,
        num_heads: int = 4,
        *,
        resolution: int = 7,
        kernels: Sequence[int] = (5, 5, 5, 5),
        layout: str = "NCHW",
        backend: str = "auto",
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__()
        kernels = tuple(kernels)
        _check_options(dim, key_dim, num_heads, resolution, kernels, layout)
        self.dim, self.key_dim, self.num_heads = dim, key_dim, num_heads
        self.resolution, self.kernels = resolution, kernels[:num_heads]
        self.layout, self.backend = layout, backend
        self.is_fused = False
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        group = dim // num_heads
        self.qkvs = nn.ModuleList(
            conv_norm(group, 2 * key_dim + group, 1, **like) for _ in range(num_heads)
        )
        self.dws = nn.ModuleList(
            conv_norm(key_dim, key_dim, side, groups=key_dim, **like) for side in self.kernels
        )
        self.proj = nn.Sequential(nn.ReLU(), conv_norm(dim, dim, 1, **like))
        self.attention_biases = nn.Parameter(torch.empty(num_heads, resolution**2, **like))
        self._reset_own()

    def reset_parameters(self) -> None:
        """Draws all weights as for a new module, and sets buffers back."""
        if self.is_fused:
            raise RuntimeError(f"{_NAME}: a fused module has no parameters; make a new one")
        super().reset_parameters()
        self._reset_own()

    def _reset_own(self) -> None:
        nn.init.zeros_(self.attention_biases)
        out: Any = self.proj[1]
        nn.init.zeros_(out.bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, Y, X], or [B, Y, X, C] with layout "NHWC" -> y of the same shape."""
        first = self.layout == "NCHW"
        if x.dim() != 4 or x.shape[1 if first else 3] != self.dim:
            expected = f"[B, {self.dim}, Y, X]" if first else f"[B, Y, X, {self.dim}]"
            raise ValueError(f"{_NAME}: x has shape {list(x.shape)}, expected {expected}")
        image = x.permute(0, 2, 3, 1) if first else x  # [B, Y, X, C]
        if self.is_fused and self.training:
            raise RuntimeError(
                f"{_NAME}: a fused module cannot train, its batch norms are folded; call eval(), "
                "or train the module that it was made of"
            )
        y = self._train(image) if self._needs_layers(x) else self._infer(image)
        return y.permute(0, 3, 1, 2) if first else y

    def _needs_layers(self, x: Tensor) -> bool:
        if self.is_fused:
            return False
        wanted = x.requires_grad or any(p.requires_grad for p in self.parameters())
        return self.training or (torch.is_grad_enabled() and wanted)

    def _infer(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        side = self.resolution
        if height <= side and width <= side and (height < side or width < side):
            # timm fills a smaller image to a whole window too.
            x = F.pad(x, (0, 0, 0, side - width, 0, side - height))
        y = cascaded_group_attention(x, self.folded(), window=side, backend=self.backend)
        return y[:, :height, :width]

    def _train(self, x: Tensor) -> Tensor:
        """[B, Y, X, C]; batch norms see the windows' tokens, filled ones too."""
        batch, height, width, _ = x.shape
        side = self.resolution
        x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
        rows, columns = x.shape[1] // side, x.shape[2] // side
        windows = x.unflatten(2, (columns, side)).unflatten(1, (rows, side)).transpose(2, 3)
        y = self._cascade(windows.flatten(0, 2).permute(0, 3, 1, 2))  # [M, C, R, R]
        y = y.permute(0, 2, 3, 1).unflatten(0, (batch, rows, columns)).transpose(2, 3)
        return y.flatten(3, 4).flatten(1, 2)[:, :height, :width]

    def _cascade(self, x: Tensor) -> Tensor:
        group = self.dim // self.num_heads
        outputs: list[Tensor] = []
        for i, own in enumerate(x.chunk(self.num_heads, dim=1)):
            f = outputs[-1] + own if outputs else own
            q, k, v = self.qkvs[i](f).split([self.key_dim, self.key_dim, group], dim=1)
            heads = (t.permute(0, 2, 3, 1)[:, :, :, None] for t in (self.dws[i](q), k, v))
            o = _window_attention(
                *heads, window=self.resolution, bias_table=self.attention_biases[i : i + 1]
            )  # [M, R, R, 1, d]
            outputs.append(o[:, :, :, 0].permute(0, 3, 1, 2))
        return self.proj(torch.cat(outputs, dim=1))

    def folded(self) -> CascadeWeights:
        """The weights of the fused pass, batch norms in evaluation mode folded into them."""
        if self.is_fused:
            return CascadeWeights(*(getattr(self, f"folded_{n}") for n in CascadeWeights._fields))
        return _folded(self)

    def fuse(self) -> CascadedGroupAttention:
        """Folds the batch norms for good, in place: parameters become buffers ``folded_*``, made
        for evaluation. Returns the module."""
        if not self.is_fused:
            self._become(_folded(self))
        return self

    def _become(self, weights: CascadeWeights) -> None:
        for name in ("qkvs", "dws", "proj", "attention_biases"):
            delattr(self, name)
        for name, x in zip(CascadeWeights._fields, weights, strict=True):
            self.register_buffer(f"folded_{name}", x.detach())
        self.is_fused = True

    def set_input_size(self, resolution: int) -> None:
        """What models of timm call in `set_input_size`; the windows stay as they are."""
        side = self.resolution
        raise RuntimeError(
            f"{_NAME}: the input size of a model whose attention was replaced is fixed (windows of "
            f"{side} x {side}, asked for {resolution}); restore() it, set the size, optimize again"
        )

    @classmethod
    def from_timm(cls, module: nn.Module, *, backend: str = "auto") -> CascadedGroupAttention:
        """Of timm's ``CascadedGroupAttention`` or ``LocalWindowAttention``, with its weights.

        A module whose batch norms timm has folded already gives a fused one.

        Raises:
            TypeError: a module of another kind.
            ValueError: sizes that this layer does not have.

        Example:
            >>> import timm
            >>> model = timm.create_model("efficientvit_m0").eval()
            >>> module = model.stages[0].blocks[0].mixer.m
            >>> layer = CascadedGroupAttention.from_timm(module)
            >>> torch.allclose(layer(x := torch.randn(1, 64, 14, 14)), module(x), atol=1e-5)
            True
        """
        source: Any = _inner(module)
        weight = source.attention_biases
        group = _conv_of(source.qkvs[0]).in_channels
        if source.val_dim != group:
            fail(
                ValueError, _NAME, "val_dim of the module", source.val_dim,
                f"{group}, the channels of a group: what a head gives is added to the next group",
                "Use attn_ratio = dim / (key_dim * num_heads).",
            )  # fmt: skip
        layers = [*source.qkvs, *source.dws, source.proj[1]]
        convs = [_conv_of(layer) for layer in layers]
        made = cls(
            group * source.num_heads, source.key_dim, source.num_heads,
            resolution=source.resolution,
            kernels=[conv.kernel_size[0] for conv in convs[source.num_heads : -1]],
            backend=backend, device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        if all(isinstance(layer, nn.Sequential) for layer in layers):
            made.load_state_dict(source.state_dict())
            own = [*made.qkvs, *made.dws, made.proj[1]]
            for layer, like in zip(own, layers, strict=True):
                layer.bn.eps, layer.bn.momentum = like.bn.eps, like.bn.momentum
            for p, like in zip(made.parameters(), source.parameters(), strict=True):
                p.requires_grad_(like.requires_grad)
        else:
            made._become(_folded(source))
        return made.train(source.training)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """That of LocalWindowAttention has the same tensors below ``attn``."""
        for name in [n for n in state_dict if n.startswith(f"{prefix}attn.")]:
            state_dict[prefix + name[len(prefix) + 5 :]] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, key_dim={self.key_dim}, num_heads={self.num_heads}, "
            f"resolution={self.resolution}, kernels={self.kernels}, layout={self.layout}"
            + (", fused" if self.is_fused else "")
        )


def _window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    bias_table: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """q, k [B, Y, X, H, D], v [B, Y, X, H, Dv] -> [B, Y, X, H, Dv]; Y and X are multiples of R.

    Softmax attention within windows of R x R tokens, R = `window`; bias_table [H, R * R] is by
    |dy| R + |dx|.
    """

    def cut(x: Tensor) -> Tensor:  # [B, nY, nX, H, N, D]
        x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))
        return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5)

    s = (q.shape[-1] ** -0.5 if scale is None else scale) * cut(q) @ cut(k).transpose(-1, -2)
    if bias_table is not None:
        s = s + bias_table[:, _pair_index(window, q.device)]
    o = (s.softmax(-1) @ cut(v)).unflatten(4, (window, window))  # [B, nY, nX, H, R, R, Dv]
    return o.permute(0, 1, 4, 2, 5, 3, 6).flatten(3, 4).flatten(1, 2)


def _pair_index(side: int, device: torch.device) -> Tensor:
    """[N, N]: |dy| R + |dx| of two tokens of a window."""
    at = torch.arange(side, device=device)
    apart = (at[:, None] - at).abs()
    index = apart[:, None, :, None] * side + apart[:, None]  # [R, R, R, R]
    return index.flatten(2).flatten(0, 1)


def conv_norm(
    inputs: int,
    outputs: int,
    side: int,
    *,
    groups: int = 1,
    device: Device = None,
    dtype: DType = None,
) -> nn.Sequential:
    """A convolution that keeps the size of the image, and a batch norm."""
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    conv = nn.Conv2d(inputs, outputs, side, padding=side // 2, groups=groups, bias=False, **like)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(outputs, **like)))


def _conv_of(layer: Any) -> Any:
    return layer[0] if isinstance(layer, nn.Sequential) else layer


def _affine(layer: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias in fp64 of a convolution with what follows it: a batch norm, or nothing."""
    conv = _conv_of(layer)
    weight = conv.weight.double()
    bias = weight.new_zeros(weight.shape[0]) if conv.bias is None else conv.bias.double()
    if conv is layer:
        return weight, bias
    norm = layer[1]
    if norm.running_var is None:
        fail(
            ValueError, _NAME, "a batch norm", "without running statistics",
            "track_running_stats=True", "Statistics of a batch cannot be folded into weights.",
        )  # fmt: skip
    gain = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean.double()
    if norm.weight is not None:
        gain = gain * norm.weight.double()
    bias = (bias + shift) * gain
    if norm.bias is not None:
        bias = bias + norm.bias.double()
    return weight * gain[:, None, None, None], bias


@torch.no_grad()
def _folded(module: Any) -> CascadeWeights:
    """Of this layer or of timm's, in the dtype of its parameters."""
    weights = CascadeWeights.of_heads(
        [_affine(layer) for layer in module.qkvs],
        [_affine(layer) for layer in module.dws],
        module.attention_biases.double(),
        _affine(module.proj[1]),
    )
    return weights.to(module.attention_biases.dtype)


def _inner(module: Any) -> Any:
    """The attention itself, of timm's CascadedGroupAttention or LocalWindowAttention."""
    inner = getattr(module, "attn", module)
    needed = ("qkvs", "dws", "proj", "attention_biases", "key_dim", "val_dim", "num_heads",
              "resolution")  # fmt: skip
    if not isinstance(module, nn.Module) or not all(hasattr(inner, n) for n in needed):
        fail(
            TypeError, f"{_NAME}.from_timm", "module", describe(module),
            "CascadedGroupAttention or LocalWindowAttention of timm.models.efficientvit_msra",
            "Other modules have no counterpart here.",
        )  # fmt: skip
    return inner


def _check_options(
    dim: int, key_dim: int, num_heads: int, resolution: int, kernels: Sequence[int], layout: str
) -> None:
    if num_heads < 1 or dim < 1 or dim % num_heads:
        raise ValueError(f"{_NAME}: dim is {dim}, expected a multiple of num_heads {num_heads}")
    for what, size in (("key_dim", key_dim), ("resolution", resolution)):
        if size < 1:
            raise ValueError(f"{_NAME}: {what} is {size}, expected at least 1")
    if len(kernels) < num_heads or any(k < 1 or k % 2 == 0 for k in kernels):
        raise ValueError(
            f"{_NAME}: kernels are {kernels}, expected an odd number for each of {num_heads} heads"
        )
    if layout not in ("NCHW", "NHWC"):
        raise ValueError(f'{_NAME}: layout is {layout!r}, expected "NCHW" or "NHWC"')
