# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-any-return, no-untyped-call"
"""BASED linear attention as a layer (Arora et al. 2024, arXiv 2402.18668)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._errors import require_flags
from ..ops.linear.linear_attention import LinearState, linear_attention
from ..ops.linear.linear_attention_step import linear_attention_step
from ._checks import check_sequence, check_token
from ._layer import Layer
from ._types import Device, DType
from .norm import RMSNorm


class BasedLinearAttention(Layer):
    r"""Multi-head linear attention with the second-order Taylor map of exp.

    .. math:: o_i = \sum_{j \le i} w_{ij} v_j \Big/ \sum_{j \le i} w_{ij}, \qquad
              w_{ij} = 1 + s_{ij} + s_{ij}^2 / 2, \quad s_{ij} = q_i \cdot k_j / \sqrt{d}

    per head, then concatenated and projected. Queries and keys are narrow (``feature_dim`` d = 16),
    so that the whole past is held in F = 1 + d + d(d+1)/2 = 153 features per head whatever its
    length.

    Parameter names and shapes are those of HazyResearch/based: ``proj_q.weight`` and
    ``proj_k.weight`` [H * feature_dim, d_model], ``proj_v.weight`` [H * head_dim, d_model],
    ``out_proj.weight`` [d_model, H * head_dim], and, with ``g_norm=True``, ``g_norm.weight``
    [head_dim].

    Args:
        d_model: width of the input and the output.
        num_heads: H.
        feature_dim: d, width of a query or key head; at most 32 with ``taylor2``.
        head_dim: width of a value head; default ``d_model // num_heads``.
        feature_map: "taylor2", "identity", "elu1" or "relu", as :func:`headworks.linear_attention`.
        normalize: divide by the sum of the weights.
        eps: added to that sum; 0 is safe with ``taylor2``, whose weights are at least 1/2.
        g_norm: RMS normalisation of every head's output before the projection.
        bias: give the four projections a bias.
        backend: of both forms, as in :func:`headworks.linear_attention`.

    Example:
        >>> layer = BasedLinearAttention(64, num_heads=4)
        >>> x = torch.randn(2, 10, 64)
        >>> y, state = layer(x[:, :9], return_state=True)   # parallel
        >>> last = layer.step(x[:, 9], state)               # recurrent, equals layer(x)[:, 9]
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int = 16,
        *,
        feature_dim: int = 16,
        head_dim: int | None = None,
        feature_map: str = "taylor2",
        normalize: bool = True,
        eps: float = 0.0,
        g_norm: bool = False,
        norm_eps: float = 1e-5,
        bias: bool = False,
        backend: str = "auto",
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__()
        require_flags(type(self).__name__, normalize=normalize, g_norm=g_norm)
        if head_dim is None and d_model % num_heads:
            raise ValueError(
                f"BasedLinearAttention: d_model {d_model} is not a multiple of num_heads "
                f"{num_heads}; choose another num_heads or give head_dim"
            )
        self.d_model = d_model
        self.num_heads = num_heads
        self.feature_dim = feature_dim
        self.head_dim = d_model // num_heads if head_dim is None else head_dim
        self.feature_map = feature_map
        self.normalize = normalize
        self.eps = eps
        self.backend = backend
        like: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.proj_q = nn.Linear(d_model, num_heads * feature_dim, **like)
        self.proj_k = nn.Linear(d_model, num_heads * feature_dim, **like)
        self.proj_v = nn.Linear(d_model, num_heads * self.head_dim, **like)
        self.out_proj = nn.Linear(num_heads * self.head_dim, d_model, **like)
        self.g_norm: RMSNorm | None = None
        if g_norm:
            self.g_norm = RMSNorm(self.head_dim, eps=norm_eps, device=device, dtype=dtype)

    def init_state(self, batch_size: int) -> LinearState:
        """The state before any token: kv [B, H, F, head_dim], z [B, H, F], zeros in fp32."""
        weight = self.out_proj.weight
        return LinearState.initial(
            batch_size,
            self.num_heads,
            self.feature_dim,
            self.head_dim,
            feature_map=self.feature_map,
            dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32,
            device=weight.device,
        )

    def forward(
        self,
        x: Tensor,
        state: LinearState | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, LinearState]:
        """Parallel form. x [B, S, d_model] -> y of the same shape, and the state after x if asked.

        ``state`` continues earlier tokens and is not modified. With ``cu_seqlens`` [N + 1] the
        batch size is 1, x holds N sequences one after the other and the states are N.
        """
        check_sequence(self, x)
        q, k, v = self._heads(x)
        out = linear_attention(
            q, k, v,
            feature_map=self.feature_map,
            normalize=self.normalize,
            eps=self.eps,
            initial_state=state,
            output_final_state=return_state,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )  # fmt: skip
        if isinstance(out, Tensor):
            return self._merge(out)
        o, new_state = out
        return self._merge(o), new_state

    @torch.no_grad()
    def step(self, x_t: Tensor, state: LinearState) -> Tensor:
        """Recurrent form, one token: x_t [B, d_model] -> y_t; the state is updated in place."""
        check_token(self, x_t)
        q, k, v = self._heads(x_t)
        o = linear_attention_step(
            q, k, v, state,
            feature_map=self.feature_map,
            normalize=self.normalize,
            eps=self.eps,
            backend=self.backend,
        )  # fmt: skip
        return self._merge(o)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # [..., d_model] -> q, k [..., H, feature_dim], v [..., H, head_dim]
        q = self.proj_q(x).unflatten(-1, (self.num_heads, self.feature_dim))
        k = self.proj_k(x).unflatten(-1, (self.num_heads, self.feature_dim))
        v = self.proj_v(x).unflatten(-1, (self.num_heads, self.head_dim))
        return q, k, v

    def _merge(self, o: Tensor) -> Tensor:
        # [..., H, head_dim] -> [..., d_model]
        if self.g_norm is not None:
            o = self.g_norm(o)
        return self.out_proj(o.flatten(-2))

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, num_heads={self.num_heads}, feature_dim={self.feature_dim}, "
            f"head_dim={self.head_dim}, feature_map={self.feature_map!r}"
        )
