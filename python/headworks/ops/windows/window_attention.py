# SPDX-License-Identifier: Apache-2.0
"""hw.window_attention: attention inside the windows of an image, with a table of biases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._autograd import Saved, apart, first_order
from ..._errors import require_number, require_sizes
from ..._functions import Maybe
from ..._native import NATIVE_CALLS, NativeCall, as_written, backend_for, route, widen
from ..._repeated import Repeated
from ...reference import window_attention as reference
from .._images import IMAGE, check_image_values, check_images
from ..attention._checks import cast
from ..attention._operators import row_dot
from . import _window_attention_native as native
from ._window_attention_checks import Window, check_bias_table, check_window
from ._window_attention_native import Geometry

_OP = "window_attention"


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: Window,
    bias_table: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Softmax attention of each token of an image to the tokens of its window.

    .. math::
        o_i = \sum_{j \in W(i)} p_{ij} v_j, \qquad
        s_{ij} = \mathrm{scale} \langle q_i, k_j \rangle + t_{h,\, |dy| w_x + |dx|}, \quad
        p_{ij} = e^{s_{ij} - L_i}

    where (dy, dx) is the way from token i to token j, and L the log-sum-exp of the row. Windows of
    window = (w_y, w_x) tokens are laid side by side from the upper left; those of the last row and
    column end with the image, and hold the tokens that there are. For windows that are filled up
    with padding pad the image before the projection to q, k and v, as EfficientViT does: then
    padding has keys and values of its own.

    Args:
        q: [B, Y, X, Hq, D]. float64, float32, bfloat16 or float16; any strides.
        k: [B, Y, X, H, D], with Hq a multiple of H.
        v: [B, Y, X, H, Dv], any Dv.
        window: (height, width) in tokens, or one number for both; it may exceed the image.
        bias_table: t [Hq, height * width], any floating dtype; no bias by default. The sign of a
            distance does not matter, as in LeViT and EfficientViT.
        scale: of the products; ``D ** -0.5`` by default.
        backend: "auto", "reference", or a compiled one by name.

    Returns:
        o [B, Y, X, Hq, Dv] in the dtype of the inputs.

    Gradients flow to q, k, v and the table, which is rounded to the dtype of q first. The table's
    gradient is a sum over all windows in an order that does not change from call to call. Under
    ``torch.autocast`` q, k and v are cast to its dtype.

    Raises:
        ValueError: shapes that do not fit, a table of another window.
        TypeError: unsupported or mixed dtypes, a window that is no number.
        RuntimeError: tensors on different devices, or a backend of another device.
        NotImplementedError: a backend that cannot take the call.

    Source: Liu et al., "EfficientViT: Memory Efficient Vision Transformer with Cascaded Group
    Attention", CVPR 2023, arXiv 2305.07027; the table is that of LeViT, arXiv 2104.01136.

    Example:
        >>> import torch, headworks as hw
        >>> q, k, v = torch.randn(3, 1, 14, 14, 4, 16)
        >>> o = hw.window_attention(q, k, v, window=7, bias_table=torch.zeros(4, 49))
        >>> o.shape
        torch.Size([1, 14, 14, 4, 16])
    """
    tensors = (q, k, v) if bias_table is None else (q, k, v, bias_table)
    key = _repeated.key(tensors, window, scale, backend)
    if (ready := _repeated.get(key)) is not None:
        return ready(*tensors)
    q, k, v, table, sides, scale, backend = _checked(
        q, k, v, window=window, bias_table=bias_table, scale=scale, backend=backend
    )
    if backend == "reference":
        with as_written(q):
            return reference.window_attention(q, k, v, window=sides, bias_table=table, scale=scale)
    if not v.shape[4]:
        o = window_attention(
            q, k, widen(v), window=sides, bias_table=table, scale=scale, backend=backend
        )
        return o[..., :0]
    if bias_table is None or table is bias_table:  # the kept call takes it as it is
        _repeated.offer(key, _ready, q, k, table, v, sides, scale, backend)
    geometry = _geometry(q, sides, scale)
    o = _attend(*_flat(q, k, v), table, geometry, backend)
    return o.view(*q.shape[:4], v.shape[4])


_repeated: Repeated[Callable[..., Tensor]] = Repeated(_OP)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, table: Maybe, geometry: Geometry, backend: str
) -> Tensor:
    """o [B, S, Hq, Dv]"""
    way = route(_OP, (q, k, table, v))
    if way == "autograd":
        return _differentiable(*apart(q, k, table, v, *geometry, backend))
    call = native.forward if way == "direct" else native.forward_operator
    o: Tensor = call(q, k, table, v, geometry, False, backend).o
    return o


def _ready(
    q: Tensor, k: Tensor, table: Maybe, v: Tensor, window: tuple[int, int], scale: float,
    backend: str,
) -> Callable[..., Tensor] | None:  # fmt: skip
    """A call that has passed its checks, for others like it; None for an empty image."""
    sizes = (*q.shape[:4], v.shape[4])
    flat_q, flat_k, flat_v = _flat(q, k, v)
    call = native.ready(flat_q, flat_k, table, flat_v, _geometry(q, window, scale), backend)
    if call is None:
        return None

    def ready(q: Tensor, k: Tensor, v: Tensor, *table: Tensor) -> Tensor:
        return call(*_flat(q, k, v), *table).view(sizes)

    return ready


def _flat(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, Y, X, H, D] as [B, S, H, D]: copied only where rows of pixels have gaps between them."""
    return q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2)


def _geometry(q: Tensor, window: tuple[int, int], scale: float) -> Geometry:
    (height, width), (rows, columns) = window, q.shape[1:3]
    return Geometry(scale, max(-(-columns // width), 1), height, width, rows, columns)


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: Window,
    bias_table: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Maybe, tuple[int, int], float, str]:
    """q k v, the table, the window, scale, the backend."""
    q, k, v = cast(q, k, v)
    check_images(_OP, q, k)
    require_sizes(_OP, IMAGE, "k", k, (*q.shape[:3], *k.shape[3:]))
    check_image_values(_OP, v, k)
    sides = check_window(_OP, window)
    table = None if bias_table is None else check_bias_table(_OP, bias_table, sides, q)
    scale = float(q.shape[4] ** -0.5) if scale is None else require_number(_OP, "scale", scale)
    return q, k, v, table, sides, scale, backend_for(_OP, backend, q)


class _WindowAttention(torch.autograd.Function):
    """q, k, table, v, the geometry, backend -> o. Saves o and the row statistic."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        (q, k, table, v), numbers, backend = arguments[:4], arguments[4:-1], arguments[-1]
        geometry = Geometry(*numbers)
        o, row = native.forward_operator(q, k, table, v, geometry, True, backend)
        ctx.save_for_backward(q, k, table, v, o, row)
        ctx.geometry, ctx.backend = geometry, backend
        return o  # type: ignore[no-any-return]

    @staticmethod
    @first_order(_OP)
    def backward(ctx: Any, saved: Saved, d_o: Tensor) -> tuple[Maybe, ...]:
        q, k, table, v, o, row = saved
        delta = row_dot(o, d_o, ctx.backend).transpose(1, 2)
        want_table = ctx.needs_input_grad[2]
        made = native.backward_operator(
            ctx.geometry, want_table, ctx.backend, q=q, k=k, bias_table=table, v=v, d_o=d_o,
            row=row, delta=delta,
        )  # fmt: skip
        d_table = made.d_bias_table.to(table.dtype) if want_table else None
        return made.d_q, made.d_k, d_table, made.d_v, *(None,) * (len(ctx.geometry) + 1)


_differentiable: Callable[..., Tensor] = _WindowAttention.apply


def _native_call(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> NativeCall:
    q, k, v, table, window, scale, backend = _checked(q, k, v, **options)
    flat_q, flat_k, flat_v = _flat(q, k, v)
    geometry = _geometry(q, window, scale)
    return native.forward_call(flat_q, flat_k, table, flat_v, geometry, backend)


NATIVE_CALLS[window_attention] = _native_call
