# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-any-return, no-untyped-call"
"""Memory-bound pieces of the blocks, as single autograd nodes.

Composed from elementary torch operations these cost more time on a CPU than the matrix products
around them: every elementary operation reads and writes a full [tokens, channels] tensor, and the
backward of a split or a slice writes another one full of zeros. Written as one node, each keeps
only its inputs and writes its gradient once. The formulas themselves, `_..._formula`, serve where
that does not matter: in a graph that is compiled, which fuses them, for second derivatives, and for
tensors that are not what they look like (subclasses, batched cotangents).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._native import is_direct

_silu_backward = torch.ops.aten.silu_backward


def _differentiable(ctx: Any, formula: Callable[..., Tensor], *inputs: Any, dy: Tensor) -> Any:
    """The gradients of the formula's inputs as functions of them, for create_graph=True and where a
    tensor is not ordinary."""
    with torch.enable_grad():
        y = formula(*inputs)
        wanted = [x for x, wants in zip(inputs, ctx.needs_input_grad, strict=True) if wants]
        grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return tuple(next(grads) if wants else None for wants in ctx.needs_input_grad)


def _rms_formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    r = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * r * weight.to(wide.dtype)).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """y = x * r * w,  r = (mean_c x^2 + eps)^(-1/2);  statistics in fp32 (fp64 for fp64)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # x [..., C]  weight [C]
        wide = x if x.dtype == torch.float64 else x.float()
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        r = mean_square.div_(x.shape[-1]).add_(eps).rsqrt_()  # [..., 1]
        ctx.save_for_backward(x, weight, r)
        ctx.eps = eps
        return (wide * r).mul_(weight.to(wide.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # With n = x r:  dw = sum dy n,  dx = r (dy w - n mean_c(dy w n)).
        x, weight, r = ctx.saved_tensors
        if torch.is_grad_enabled() or not is_direct((x, dy)):
            return _differentiable(ctx, _rms_formula, x, weight, ctx.eps, dy=dy)
        n = x.to(r.dtype) * r
        dy_n = dy * n
        along = (dy_n @ weight.to(r.dtype)).unsqueeze(-1).div_(x.shape[-1])
        dx = n.mul_(along).neg_().addcmul_(dy.to(r.dtype), weight.to(r.dtype)).mul_(r)
        dw = dy_n.flatten(0, -2).sum(0)
        return dx.to(x.dtype), dw.to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. x [..., C], weight [C]."""
    if not is_direct((x, weight)):
        return _rms_formula(x, weight, eps)
    if x.device.type == "cpu":
        return _RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def _swiglu_formula(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return a * F.silu(b)


class _SwiGLU(torch.autograd.Function):
    """y = a * silu(b) for x = [a | b]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        # x [..., 2 C] -> y [..., C]
        a, b = x.chunk(2, -1)
        ctx.save_for_backward(x)
        return F.silu(b).mul_(a)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled() or not is_direct((x, dy)):
            return _differentiable(ctx, _swiglu_formula, x, dy=dy)
        a, b = x.chunk(2, -1)
        dx = torch.empty_like(x)
        da, db = dx.chunk(2, -1)
        torch.mul(dy, F.silu(b), out=da)
        db.copy_(_silu_backward(dy * a, b))
        return dx


def swiglu(x: Tensor) -> Tensor:
    """a * silu(b) for x = [a | b]. x [..., 2 C] -> [..., C]."""
    return _SwiGLU.apply(x) if is_direct((x,)) else _swiglu_formula(x)


def short_conv(x: Tensor, weight: Tensor, history: Tensor | None = None) -> Tensor:
    """Depthwise causal convolution y_t = sum_j w_j x_{t - (K-1) + j}; zeros (or history) before 0.

    x [B, S, C], weight [C, 1, K], history [B, K-1, C] -> y [B, S, C].
    """
    width = weight.shape[-1]
    taps = weight[:, 0].to(x.dtype)  # [C, K]
    if history is not None:
        return _conv_formula(torch.cat([history.to(x.dtype), x], dim=1), taps)
    y = x * taps[:, width - 1]
    for lag in range(1, min(width, x.shape[1])):
        y[:, lag:].addcmul_(x[:, :-lag], taps[:, width - 1 - lag])
    return y


def _conv_formula(padded: Tensor, taps: Tensor) -> Tensor:
    # padded [B, K - 1 + S, C]  taps [C, K] -> y [B, S, C]
    last = taps.shape[1] - 1
    tokens = padded.shape[1] - last
    y = padded[:, last:] * taps[:, last]
    for j in range(last):
        y = torch.addcmul(y, padded[:, j : j + tokens], taps[:, j])
    return y


def _gated_conv_formula(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    a, b = x.chunk(2, -1)
    padded = F.pad(a, (0, 0, weight.shape[-1] - 1, 0))
    conv = _conv_formula(padded, weight[:, 0].to(x.dtype))
    return F.silu(conv if bias is None else conv + bias.to(x.dtype)) * b


class _GatedShortConv(torch.autograd.Function):
    """y = silu(conv(a) + bias) * b for x = [a | b], conv causal and depthwise along tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # x [B, S, 2 C]  weight [C, 1, K]  bias [C] -> y [B, S, C]
        a, b = x.chunk(2, -1)
        conv = short_conv(a, weight)
        if bias is not None:
            conv.add_(bias.to(x.dtype))
        ctx.save_for_backward(x, weight, bias, conv)
        return F.silu(conv).mul_(b)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, conv = ctx.saved_tensors
        if torch.is_grad_enabled() or not is_direct((x, dy)):
            return _differentiable(ctx, _gated_conv_formula, x, weight, bias, dy=dy)
        width, tokens = weight.shape[-1], x.shape[1]
        a, b = x.chunk(2, -1)
        dx = torch.empty_like(x)
        da, db = dx.chunk(2, -1)
        torch.mul(dy, F.silu(conv), out=db)
        dconv = _silu_backward(dy * b, conv)
        taps = weight[:, 0].to(x.dtype)
        dtaps = torch.zeros_like(taps)  # [C, K]
        torch.mul(dconv, taps[:, width - 1], out=da)
        dtaps[:, width - 1] = (dconv * a).sum((0, 1))
        for lag in range(1, min(width, tokens)):
            late, early, j = dconv[:, lag:], a[:, :-lag], width - 1 - lag
            da[:, :-lag].addcmul_(late, taps[:, j])
            dtaps[:, j] = (late * early).sum((0, 1))
        dbias = None if bias is None else dconv.sum((0, 1)).to(bias.dtype)
        return dx, dtaps.unsqueeze(1).to(weight.dtype), dbias


def gated_short_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """silu(conv(a) + bias) * b for x = [a | b]. x [B, S, 2 C], weight [C, 1, K] -> [B, S, C]."""
    if not is_direct((x, weight)):
        return _gated_conv_formula(x, weight, bias)
    return _GatedShortConv.apply(x, weight, bias)
