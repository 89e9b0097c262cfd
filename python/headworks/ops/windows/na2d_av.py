# SPDX-License-Identifier: Apache-2.0
"""hw.na2d_av: values of a neighbourhood, mixed with given weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._autograd import Saved, apart, first_order
from ..._errors import (
    require_one_dtype,
    require_rank,
    require_same_device,
    require_sizes,
    require_tensors,
)
from ..._functions import Maybe, NativeFunction
from ..._native import (
    ACCUMULATION,
    NATIVE_CALLS,
    NativeCall,
    as_written,
    autocast,
    autocasts,
    backend_for,
    define,
    described,
    empties,
    fixed_arity,
    is_direct,
    route,
)
from ..._repeated import Ready, Repeated
from ...reference import na2d_av as reference
from .._operands import check_operands, require
from ._checks import Pair, as_option, require_kernel, require_window_fits

_OP = "na2d_av"


def na2d_av(w: Tensor, v: Tensor, *, kernel_size: int | Pair, backend: str = "auto") -> Tensor:
    r"""The values that each pixel's window holds, mixed with weights of its own.

    .. math::
        o_{yx} = \sum_{a < K_y} \sum_{b < K_x}
            w_{yx, a K_x + b}\; v_{\mathrm{start}(y; Y, K_y) + a,\ \mathrm{start}(x; X, K_x) + b}
        \qquad
        \mathrm{start}(i; L, K) = \min(\max(i - \lfloor K/2 \rfloor, 0), L - K)

    The windows are NATTEN's: at a border they are shifted, never padded, so every pixel has
    Ky Kx keys. The weights are used as they are; what makes them (usually a softmax) is the
    caller's.

    Args:
        w: [B, Y, X, H, Ky Kx], the weights of a pixel's keys, row by row. float64, float32,
            bfloat16 or float16; any strides.
        v: [B, Y, X, H, D], of the same dtype.
        kernel_size: K, or (Ky, Kx); odd, at most the image. (1, K) is the neighbourhood of a
            sequence [B, 1, X, H, D].
        backend: "auto", "reference", "cpu", "simt" or "emulate:simt"; see hw.explain.

    Returns:
        o [B, Y, X, H, D] in the dtype of the inputs; sums in fp32 (fp64 for fp64).

    Under ``torch.autocast`` w and v are cast to the autocast dtype. Gradients flow to w and v,
    once (the reference backend: any number of times). Saved for them: w and v.

    Raises:
        ValueError: sizes that do not belong together, a window that is even or larger than the
            image.
        TypeError: dtypes that differ or are not floating-point.
        RuntimeError: tensors on different devices, a backend of another device.
        NotImplementedError: a backend that cannot take the call.

    Source: Hassani et al., "Neighborhood Attention Transformer", CVPR 2023, arXiv 2204.07143; the
    function of that name in natten up to 0.17.

    Example:
        >>> import torch, headworks as hw
        >>> w = torch.randn(1, 28, 28, 4, 49).softmax(-1)
        >>> hw.na2d_av(w, torch.randn(1, 28, 28, 4, 32), kernel_size=7).shape
        torch.Size([1, 28, 28, 4, 32])
    """
    key = _repeated.key((w, v), as_option(kernel_size), backend)
    if (ready := _repeated.get(key)) is not None:
        return ready(w, v)
    w, v, kernel = _checked(w, v, kernel_size)
    backend = backend_for(_OP, backend, v)
    if backend == "reference":
        with as_written(v):
            return reference.na2d_av(w, v, kernel_size=kernel)
    if not v.numel():
        return v * w[..., :1]
    way = route(_OP, (w, v))
    if way == "direct":
        _repeated.offer(key, _ready, w, v, kernel, backend)
        return _forward(w, v, *kernel, backend)
    if way == "operator":
        o: Tensor = torch.ops.headworks.na2d_av_fwd(w, v, *kernel, backend)
        return o
    return _differentiable(*apart(w, v, kernel, backend))


_repeated: Repeated[Ready] = Repeated(_OP)


def _checked(w: Tensor, v: Tensor, kernel_size: object) -> tuple[Tensor, Tensor, Pair]:
    """The arguments cast and validated. Nothing is allocated before."""
    require_tensors(_OP, w=w, v=v)
    if autocasts(v):
        w, v = autocast(w, v)
    require_rank(_OP, 5, "[B, Y, X, H, Ky Kx]", w=w)
    require_rank(_OP, 5, "[B, Y, X, H, D]", v=v)
    require_one_dtype(_OP, ACCUMULATION, w=w, v=v)
    require_same_device(_OP, "w", w, v=v)
    height, width = require_kernel(_OP, "kernel_size", kernel_size)
    require_sizes(_OP, "[B, Y, X, H, Ky Kx]", "w", w, (*v.shape[:4], height * width))
    require_window_fits(_OP, "kernel_size", (height, width), v)
    return w, v, (height, width)


FORWARD = NativeFunction("na2d_av.forward")
BACKWARD = NativeFunction("na2d_av.backward")
FORWARD.begins_with(("w", "v"), ("kernel_y", "kernel_x"))
BACKWARD.begins_with(("w", "v", "d_o"), ("kernel_y", "kernel_x"))


def _output(v: Tensor) -> Tensor:
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


def _ready(w: Tensor, v: Tensor, kernel: Pair, backend: str) -> Ready:
    """`_forward` as a function of w and v."""
    return Ready(FORWARD, backend, (w, v), (_output(v),), kernel, (w, v))


def _forward(w: Tensor, v: Tensor, kernel_y: int, kernel_x: int, backend: str) -> Tensor:
    o = _output(v)
    FORWARD.run(backend, (w, v), (o,), (kernel_y, kernel_x))
    return o


def _require_kernel(op: str, sizes: dict[str, int], kernel_y: int, kernel_x: int) -> None:
    """What the shapes alone do not say of the operators below."""
    for name, k, size in (("kernel_y", kernel_y, sizes["Y"]), ("kernel_x", kernel_x, sizes["X"])):
        require(op, name, k, 1 <= k <= size and k % 2 == 1, "an odd number up to the image")
    require(op, "w", sizes["T"], sizes["T"] == kernel_y * kernel_x, "kernel_y kernel_x weights")
    require(op, "v", "width 0", sizes["D"] > 0, "a width of at least 1")


def _forward_operator(w: Tensor, v: Tensor, kernel_y: int, kernel_x: int, backend: str) -> Tensor:
    sizes = check_operands("na2d_av_fwd", FORWARD.inputs, (w, v))
    _require_kernel("na2d_av_fwd", sizes, kernel_y, kernel_x)
    return _forward(w, v, kernel_y, kernel_x, backend)


def _forward_fake(w: Tensor, v: Tensor, kernel_y: int, kernel_x: int, backend: str) -> Tensor:
    return _output(v)


def _gradients(w: Tensor, v: Tensor, w_grad: bool, v_grad: bool) -> Any:
    """Outputs of BACKWARD, unfilled, None for what is not asked for."""
    return BACKWARD.Outputs(*empties(w if w_grad else None, v if v_grad else None))


def _backward(*arguments: Any) -> Any:
    inputs, kernel, (w_grad, v_grad, backend) = BACKWARD.split(arguments)
    made = _gradients(inputs[0], inputs[1], w_grad, v_grad)
    BACKWARD.run(backend, inputs, made, kernel)
    return made


def _backward_operator(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, kernel, _ = BACKWARD.split(arguments)
    sizes = check_operands("na2d_av_bwd", BACKWARD.inputs, inputs)
    _require_kernel("na2d_av_bwd", sizes, *kernel)
    return fixed_arity(_backward(*arguments), inputs[0])


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, _, (w_grad, v_grad, _backend) = BACKWARD.split(arguments)
    return fixed_arity(_gradients(inputs[0], inputs[1], w_grad, v_grad), inputs[0])


define(FORWARD.schema("na2d_av_fwd"), _forward_operator, _forward_fake)
define(
    BACKWARD.schema("na2d_av_bwd", "bool w_grad, bool v_grad"), _backward_operator, _backward_fake
)


class _Na2dAv(torch.autograd.Function):
    """Saves w and v."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, v: Tensor, kernel: Pair, backend: str) -> Tensor:
        call = _forward if is_direct((w, v)) else torch.ops.headworks.na2d_av_fwd
        ctx.save_for_backward(w, v)
        ctx.kernel, ctx.backend = kernel, backend
        o: Tensor = call(w, v, *kernel, backend)
        return o

    @staticmethod
    @first_order(_OP)
    def backward(ctx: Any, saved: Saved, d_o: Tensor) -> tuple[Maybe, ...]:
        w, v = saved
        wanted = ctx.needs_input_grad[:2]
        inputs = BACKWARD.tensors((w, v, d_o))
        call = _backward if is_direct(inputs) else torch.ops.headworks.na2d_av_bwd
        made = call(*inputs, *ctx.kernel, *wanted, ctx.backend)
        d_w, d_v = (x if asked else None for x, asked in zip(made, wanted, strict=True))
        return d_w, d_v, None, None


_differentiable: Callable[..., Tensor] = _Na2dAv.apply


def _native_call(
    w: Tensor, v: Tensor, *, kernel_size: int | Pair, backend: str = "auto"
) -> NativeCall:
    w, v, kernel = _checked(w, v, kernel_size)
    return described(FORWARD, backend_for(_OP, backend, v), (w, v), (_output(v),), kernel)


NATIVE_CALLS[na2d_av] = _native_call
