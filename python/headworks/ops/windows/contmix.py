# SPDX-License-Identifier: Apache-2.0
"""hw.contmix: windows whose weights are made of a pixel's affinities to a few centres."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._autograd import Saved, apart, first_order
from ..._errors import (
    fail,
    require_one_dtype,
    require_rank,
    require_same_device,
    require_sizes,
    require_tensors,
)
from ..._functions import Maybe
from ..._native import (
    ACCUMULATION,
    NATIVE_CALLS,
    NativeCall,
    as_written,
    autocast,
    autocasts,
    backend_for,
    described,
    is_direct,
    route,
)
from ..._repeated import Ready, Repeated
from ...reference import contmix as reference
from . import _contmix_native as native
from ._checks import Pair, as_option, require_kernel, require_window_fits

_OP = "contmix"


class _Operands(NamedTuple):
    """In the order of the native list."""

    affinity: Tensor  # [B, Y, X, G, A]
    weight: Tensor  # [T, A], T = Sy Sx + Ky Kx
    bias: Maybe  # [T]
    small_rpb: Maybe  # [G, 2 Sy - 1, 2 Sx - 1]
    rpb: Maybe  # [G, 2 Ky - 1, 2 Kx - 1]
    v: Tensor  # [B, Y, X, 2 G, D]


def contmix(
    affinity: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    v: Tensor,
    *,
    kernel_size: int | Pair,
    small_kernel_size: int | Pair,
    rpb: Tensor | None = None,
    small_rpb: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Two windows per pixel, a small and a large one, whose weights are made of its affinities.

    .. math::
        s = W a + c \qquad p^{(1)} = \mathrm{softmax}(s_{< S^2} + r^{(1)}) \qquad
        p^{(2)} = \mathrm{softmax}(s_{\ge S^2} + r^{(2)})

    .. math::
        o^{(m)}_{yx} = \sum_{j \in \mathrm{window}_m(y, x)} p^{(m)}_{yx, j}\, v^{(m)}_j

    for every pixel and group. The windows are those of :func:`headworks.na2d_av`: shifted at a
    border, never padded. r are tables of a group, read at (key - query + K - 1) along each axis.
    The S^2 + K^2 weights of a pixel are made where they are used and never stored; the backward
    pass makes them again.

    The layout is that of the official code, without copies: its channels are (half, group,
    channel), so that ``x.unflatten(1, (2 * G, -1)).permute(0, 3, 4, 1, 2)`` of a map
    [B, C, Y, X] is v, and its ``weight_proj`` and tables are weight, bias and rpb as they are.

    Args:
        affinity: [B, Y, X, G, A], of each pixel to A centres, by group (A = 49 in the paper).
            float64, float32, bfloat16 or float16; any strides.
        weight: [Sy Sx + Ky Kx, A], one map for all groups; the rows of the small window first.
            All tensors are of one dtype.
        bias: [Sy Sx + Ky Kx], or None.
        v: [B, Y, X, 2 G, D]; heads 0 to G - 1 have the small window, the others the large one.
        kernel_size: K or (Ky, Kx), of the large window; odd, at most the image.
        small_kernel_size: S or (Sy, Sx), of the small window; the same.
        rpb: [G, 2 Ky - 1, 2 Kx - 1], added to the scores of the large window, or None.
        small_rpb: [G, 2 Sy - 1, 2 Sx - 1], the same of the small window.
        backend: "auto", "reference", "cpu", "simt" or "emulate:simt"; see hw.explain.

    Returns:
        o [B, Y, X, 2 G, D] in the dtype of the inputs, heads as in v. Scores, softmax and sums in
        fp32 (fp64 for fp64).

    Under ``torch.autocast`` all tensors are cast to the autocast dtype. Gradients flow to affinity,
    weight, bias, v and both tables, once (the reference backend: any number of times). Saved for
    them: the inputs alone.

    Raises:
        ValueError: sizes that do not belong together, a window that is even or larger than the
            image (hw.nn.ContMix enlarges such images).
        TypeError: dtypes that differ or are not floating-point.
        RuntimeError: tensors on different devices, a backend of another device.
        NotImplementedError: a backend that cannot take the call.

    Source: Lou and Yu, "OverLoCK", CVPR 2025, arXiv 2502.20087.

    Example:
        >>> import torch, headworks as hw
        >>> affinity, v = torch.randn(1, 14, 14, 8, 49), torch.randn(1, 14, 14, 16, 16)
        >>> weight, bias = torch.randn(25 + 169, 49) / 7, torch.zeros(25 + 169)
        >>> hw.contmix(affinity, weight, bias, v, kernel_size=13, small_kernel_size=5).shape
        torch.Size([1, 14, 14, 16, 16])
    """
    given = affinity, weight, bias, small_rpb, rpb, v
    present = tuple([x for x in given if x is not None])
    options = bias is None, small_rpb is None, rpb is None, as_option(small_kernel_size)
    key = _repeated.key(present, *options, as_option(kernel_size), backend)
    if (ready := _repeated.get(key)) is not None:
        return ready(*present)
    operands, kernels = _checked(given, small_kernel_size, kernel_size)
    backend = backend_for(_OP, backend, operands.v)
    if backend == "reference":
        x = operands._asdict()
        with as_written(operands.v):
            return reference.contmix(**x, small_kernel_size=kernels[:2], kernel_size=kernels[2:])
    if not operands.v.numel():
        return operands.v + operands.affinity.sum() * 0
    way = route(_OP, operands)
    if way == "direct":
        _repeated.offer(key, native.ready, operands, kernels, backend)
        return native.forward(*operands, *kernels, backend)
    if way == "operator":
        o: Tensor = torch.ops.headworks.contmix_fwd(*operands, *kernels, backend)
        return o
    return _differentiable(*apart(*operands, kernels, backend))


_repeated: Repeated[Ready] = Repeated(_OP)


def _checked(
    given: tuple[Any, ...], small_kernel_size: object, kernel_size: object
) -> tuple[_Operands, native.Kernels]:
    """The arguments cast and validated. Nothing is allocated before."""
    named = {
        n: x
        for n, x in zip(_Operands._fields, given, strict=True)
        if x is not None or n in ("affinity", "weight", "v")
    }
    require_tensors(_OP, **named)
    if autocasts(named["v"]):
        named = dict(zip(named, autocast(*named.values()), strict=True))
    x = _Operands(**{n: named.get(n) for n in _Operands._fields})  # type: ignore[arg-type]
    require_rank(_OP, 5, "[B, Y, X, G, A]", affinity=x.affinity)
    require_rank(_OP, 5, "[B, Y, X, 2 G, D]", v=x.v)
    require_one_dtype(_OP, ACCUMULATION, **named)
    require_same_device(_OP, "affinity", x.affinity, **named)
    small = require_kernel(_OP, "small_kernel_size", small_kernel_size)
    large = require_kernel(_OP, "kernel_size", kernel_size)
    _check_sizes(x, small, large)
    require_window_fits(_OP, "small_kernel_size", small, x.v)
    require_window_fits(_OP, "kernel_size", large, x.v)
    return x, (*small, *large)


def _check_sizes(x: _Operands, small: Pair, large: Pair) -> None:
    *image, groups, centres = x.affinity.shape
    if centres == 0:
        fail(ValueError, _OP, "A, the last axis of affinity", 0, "at least 1", "Check its axes.")
    require_sizes(_OP, "[B, Y, X, 2 G, D]", "v", x.v, (*image, 2 * groups, x.v.shape[4]))
    taps = small[0] * small[1] + large[0] * large[1]
    require_sizes(_OP, "[Sy Sx + Ky Kx, A]", "weight", x.weight, (taps, centres))
    if x.bias is not None:
        require_sizes(_OP, "[Sy Sx + Ky Kx]", "bias", x.bias, (taps,))
    for name, table, (height, width) in (
        ("small_rpb", x.small_rpb, small),
        ("rpb", x.rpb, large),
    ):
        if table is not None:
            sizes = (groups, 2 * height - 1, 2 * width - 1)
            require_sizes(_OP, "[G, 2 Ky - 1, 2 Kx - 1]", name, table, sizes)


class _ContMix(torch.autograd.Function):
    """Saves the inputs."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *operands, kernels, backend = arguments
        direct = is_direct(operands)
        call = native.forward if direct else torch.ops.headworks.contmix_fwd
        ctx.save_for_backward(*operands)
        ctx.kernels, ctx.backend = kernels, backend
        o: Tensor = call(*operands, *kernels, backend)
        return o

    @staticmethod
    @first_order(_OP)
    def backward(ctx: Any, saved: Saved, d_o: Tensor) -> tuple[Maybe, ...]:
        wanted = ctx.needs_input_grad[:6]
        inputs = (*saved, d_o)
        call = native.backward if is_direct(inputs) else torch.ops.headworks.contmix_bwd
        made = call(*inputs, *ctx.kernels, *wanted, ctx.backend)
        grads = [x if asked else None for x, asked in zip(made, wanted, strict=True)]
        return *grads, None, None


_differentiable: Callable[..., Tensor] = _ContMix.apply


def _native_call(
    affinity: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    v: Tensor,
    *,
    kernel_size: int | Pair,
    small_kernel_size: int | Pair,
    rpb: Tensor | None = None,
    small_rpb: Tensor | None = None,
    backend: str = "auto",
) -> NativeCall:
    given = affinity, weight, bias, small_rpb, rpb, v
    operands, kernels = _checked(given, small_kernel_size, kernel_size)
    backend = backend_for(_OP, backend, operands.v)
    return described(native.FORWARD, backend, operands, (native.output(operands.v),), kernels)


NATIVE_CALLS[contmix] = _native_call
