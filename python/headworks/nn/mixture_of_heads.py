# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-any-return, no-untyped-call"
"""Mixture of heads as a layer (MoH, Jin et al. 2025, arXiv 2410.11842)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._errors import require_flags
from ..ops.routing.moh_attention import moh_attention
from ..ops.routing.select_topk import select_topk
from ._checks import check_sequence
from ._side_loss import SideLoss
from ._types import Device, DType


class MixtureOfHeads(SideLoss):
    r"""Multi-head attention in which each token chooses heads; some are shared by all tokens.

    .. math::
        y_i = W \, [\, g_{i1} o_{i1} \,|\, \dots \,|\, g_{iH} o_{iH} \,], \qquad
        g_{ih} = \begin{cases}
            \alpha_{i1} \, H_s \, \mathrm{softmax}(W_1 x_i)_h & h \le H_s \text{ (shared)} \\
            \alpha_{i2} \, K \, p_{ih} / \sum_{h' \in T_i} p_{ih'} & h \in T_i \\
            0 & \text{otherwise}
        \end{cases}

    with :math:`p_i = \mathrm{softmax}(W_r x_i)` over the routed heads, T_i the K largest of them
    (hw.select_topk), and :math:`\alpha_i = 2 \, \mathrm{softmax}(W_0 x_i)` between both groups.
    Heads that a token did not choose are not computed (hw.moh_attention).

    Names are those of SkyworkAI/MoH: ``qkv`` [3 d, d], ``proj`` [d, d], the routers ``wg`` (W_r)
    [H - H_s, d], ``wg_0`` [2, d] and ``wg_1`` [H_s, d], the latter two where there are shared and
    routed heads, and more than one shared head. A single shared head has the weight 1.

    In training the balance loss :math:`E \sum_h \bar p_h f_h` over the E routed heads, with the
    mean of p and the fraction of tokens that chose h, is kept until :meth:`pop_loss` takes it; the
    paper weighs it with 0.01.

    Args:
        d_model: width of the input and the output, a multiple of num_heads.
        num_heads: H.
        shared_heads: H_s, the first heads.
        routed_heads: K, how many of the other heads a token chooses.
        is_causal: tokens see earlier tokens only.
        qkv_bias: bias of the projection of q, k and v.
        backend: as in :func:`headworks.moh_attention`.

    Example:
        >>> layer = MixtureOfHeads(64, 8, shared_heads=2, routed_heads=3)
        >>> y = layer(torch.randn(2, 10, 64))
        >>> loss = 0.01 * layer.pop_loss()
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int = 8,
        *,
        shared_heads: int,
        routed_heads: int,
        is_causal: bool = False,
        qkv_bias: bool = False,
        backend: str = "auto",
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__()
        require_flags(type(self).__name__, is_causal=is_causal)
        name, others = type(self).__name__, num_heads - shared_heads
        if num_heads < 1 or d_model % num_heads:
            raise ValueError(
                f"{name}: d_model {d_model} is not a multiple of num_heads {num_heads}"
            )
        if not 0 <= shared_heads <= num_heads or not 0 <= routed_heads <= others:
            raise ValueError(
                f"{name}: shared_heads {shared_heads} and routed_heads {routed_heads}, expected "
                f"0 or more, together at most num_heads {num_heads}"
            )
        if others and not routed_heads:
            raise ValueError(
                f"{name}: routed_heads is 0, expected 1 to {others}: no token could choose the "
                f"{others} heads that are not shared"
            )
        self.d_model, self.num_heads = d_model, num_heads
        self.shared_heads, self.routed_heads = shared_heads, routed_heads
        self.is_causal, self.backend = is_causal, backend
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=qkv_bias, **like)
        self.proj = nn.Linear(d_model, d_model, **like)
        if routed_heads:
            self.wg = nn.Linear(d_model, others, bias=False, **like)
            if shared_heads:
                self.wg_0 = nn.Linear(d_model, 2, bias=False, **like)
        if shared_heads > 1:
            self.wg_1 = nn.Linear(d_model, shared_heads, bias=False, **like)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, d_model] -> y of the same shape."""
        check_sequence(self, x)
        gate, loss = self.route(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        o = moh_attention(q, k, v, gate, is_causal=self.is_causal, backend=self.backend)
        return self._aside(loss, x, self.proj(o.flatten(-2)))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The gate [B, S, H] and the balance loss, both in fp32 (fp64 for fp64)."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        groups, loss = [], x.new_zeros((), dtype=dtype)
        if self.shared_heads > 1:
            groups.append(self.shared_heads * self.wg_1(x).softmax(-1, dtype=dtype))
        elif self.shared_heads:
            groups.append(x.new_ones(*x.shape[:2], 1, dtype=dtype))
        if self.routed_heads:
            p = self.wg(x).softmax(-1, dtype=dtype)  # [B, S, E]
            index = select_topk(p, self.routed_heads, backend=self.backend)
            chosen = torch.zeros_like(p).scatter(-1, index, 1)
            kept = p * chosen
            total = kept.sum(-1, keepdim=True).clamp(min=torch.finfo(dtype).eps)
            groups.append(self.routed_heads * kept / total)
            tokens = torch.ones_like(p[..., 0]).sum().clamp(min=1)
            loss = p.shape[-1] * (p.sum((0, 1)) * chosen.sum((0, 1))).sum() / tokens**2
        if self.shared_heads and self.routed_heads:
            alpha = 2 * self.wg_0(x).softmax(-1, dtype=dtype)  # [B, S, 2]
            groups = [alpha[..., i, None] * g for i, g in enumerate(groups)]
        return torch.cat(groups, -1), loss

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, num_heads={self.num_heads}, "
            f"shared_heads={self.shared_heads}, routed_heads={self.routed_heads}"
        )
