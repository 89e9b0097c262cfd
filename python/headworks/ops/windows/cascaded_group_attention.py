# SPDX-License-Identifier: Apache-2.0
"""hw.cascaded_group_attention: all heads of a window in one pass (EfficientViT)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from ..._errors import describe, fail
from ..._native import (
    NATIVE_CALLS,
    NativeCall,
    as_written,
    autocast,
    autocasts,
    backend_for,
    route,
)
from ..._repeated import Repeated
from ...reference import cascaded_group_attention as reference
from . import _cascaded_group_attention_native as native
from ._cascade_weights import OP, CascadeWeights, check_sizes, check_weights


def cascaded_group_attention(
    x: Tensor, weights: CascadeWeights, *, window: int | None = None, backend: str = "auto"
) -> Tensor:
    r"""Cascaded group attention of EfficientViT, inference: all heads of a window in one pass.

    The channels of x are cut into H groups x_i of d. Head by head, within a window of N tokens:

    .. math::
        f_i &= o_{i-1} + x_i, \qquad (q, k, v) = f_i W_i + b_i, \qquad q = \mathrm{dwconv}_i(q) \\
        o_i &= \mathrm{softmax}\big(K^{-1/2} q k^T + T_i[|dy| R + |dx|]\big)\, v \\
        y &= \mathrm{relu}([o_0 \dots o_{H-1}])\, W + b

    with f_0 = x_0. The convolution sees zeros beyond its window. Batch norms are folded into the
    weights (:class:`headworks.CascadeWeights`), so that a window needs nothing from the others.

    Args:
        x: [B, Y, X, C]. float64, float32, bfloat16 or float16; any strides. An image of torch's
            usual layout is ``image.permute(0, 2, 3, 1)``; y lies in memory as x does.
        weights: CascadeWeights of the same dtype.
        window: side of the windows that the image is cut into. An image of other sizes is filled
            with zeros, below and on the right; such tokens enter the projection and are keys, not
            masked, as the released models have it. None, or an image no larger than a window: the
            whole image is one window.
        backend: "auto", "reference", or a compiled one by name; see hw.explain. Tensor cores take
            K = 16 and windows of up to 64 tokens.

    Returns:
        y [B, Y, X, C] in the dtype of x.

    Compiled backends have no gradient: batch norms of a training step need statistics between the
    steps of the cascade. Train ``hw.nn.CascadedGroupAttention`` (whose core is
    ``hw.window_attention``) and fold it afterwards. Products, softmax and sums are fp32 (fp64 for
    fp64). Under ``torch.autocast`` x and weights are cast to the autocast dtype.

    Raises:
        ValueError: shapes that do not fit, an even kernel, a bias table of another window.
        TypeError: unsupported or mixed dtypes, weights that are a module or not complete.
        RuntimeError: tensors on different devices, or a backend of another device.
        NotImplementedError: an input that requires grad; a backend that cannot take the call.

    Source: Liu et al., "EfficientViT: Memory Efficient Vision Transformer with Cascaded Group
    Attention", CVPR 2023, arXiv 2305.07027.

    Example:
        >>> import torch, headworks as hw
        >>> layer = hw.nn.CascadedGroupAttention(64, key_dim=16, num_heads=4, resolution=7).eval()
        >>> x = torch.randn(1, 14, 14, 64)
        >>> hw.cascaded_group_attention(x, layer.folded(), window=7).shape
        torch.Size([1, 14, 14, 64])
    """
    key = None
    if type(weights) is CascadeWeights:
        key = _repeated.key((x, *weights), window, backend)
        if (ready := _repeated.get(key)) is not None:
            return ready(x, *weights)
    x, weights, size, backend = _checked(x, weights, window, backend)
    if backend == "reference":
        with as_written(x):
            return reference.cascaded_group_attention(x, weights, window=window)
    way = route(OP, (x, *weights))
    if way == "autograd":
        _refuse_gradient(x, weights)
    if way == "operator":
        y: Tensor = native.operator(x, *weights, *size, backend)
        return y
    _repeated.offer(key, native.prepared, x, weights, size, backend)
    return native.run(x, weights, size, backend)


_repeated: Repeated[Callable[..., Tensor]] = Repeated(OP)


def _checked(
    x: Tensor, weights: object, window: int | None, backend: str
) -> tuple[Tensor, CascadeWeights, native.Size, str]:
    made = check_weights(weights)
    if isinstance(x, Tensor) and autocasts(x) and all(isinstance(t, Tensor) for t in made):
        x, *rest = autocast(x, *made)
        made = CascadeWeights(*rest)
    check_sizes(x, made)
    return x, made, _window(x, made, window), backend_for(OP, backend, x)


def _window(x: Tensor, weights: CascadeWeights, window: int | None) -> native.Size:
    """Height and width of the windows that the image is cut into."""
    height, width, side = x.shape[1], x.shape[2], weights.window
    if window is not None:
        _check_side(window)
    whole = window is None or (height <= window and width <= window)
    if (height > side or width > side) if whole else window != side:
        fail(
            ValueError,
            OP,
            "weights.bias_table",
            f"of shape {list(weights.bias_table.shape)}, of windows of {side} x {side}",
            f"that of windows of {height} x {width}, the image"
            if whole
            else f"that of windows of {window} x {window}",
            "Resize the table (timm: model.set_input_size), or give the window that it is of.",
        )
    return (height, width) if whole else (side, side)


def _check_side(window: object) -> None:
    remedy = "Give the side of a window in tokens, 7 in the released models."
    if not isinstance(window, (int, torch.SymInt)) or isinstance(window, bool):
        got = describe(window) if isinstance(window, Tensor) else repr(window)
        fail(TypeError, OP, "window", got, "an integer or None", remedy)
    if window < 1:
        fail(ValueError, OP, "window", window, "an integer of at least 1", remedy)


def _refuse_gradient(x: Tensor, weights: CascadeWeights) -> NoReturn:
    named = {"x": x} | {
        f"weights.{n}": t for n, t in zip(CascadeWeights._fields, weights, strict=True)
    }
    name = next(n for n, t in named.items() if t.requires_grad)
    fail(
        NotImplementedError,
        OP,
        name,
        "a tensor that requires grad",
        "none: the fused cascade is for inference",
        "Call it under torch.no_grad() or torch.inference_mode(); to train use "
        "hw.nn.CascadedGroupAttention, or hw.window_attention between projections of your own.",
    )


def _native_call(
    x: Tensor, weights: CascadeWeights, *, window: int | None = None, backend: str = "auto"
) -> NativeCall:
    return native.call(*_checked(x, weights, window, backend))


NATIVE_CALLS[cascaded_group_attention] = _native_call
