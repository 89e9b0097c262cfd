# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-any-return, no-untyped-call"
"""The Routing Transformer language model (Roy et al. 2021, arXiv 2003.05997), small."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from ..nn._types import Device, DType
from ..nn.kmeans_routing import KMeansRoutingAttention
from .base import LanguageModel
from .config import SoftmaxConfig, rotary_dim


@dataclass(frozen=True)
class RoutingConfig(SoftmaxConfig):
    """Sizes of a :class:`RoutingLM`: those of a softmax model, and of the routing."""

    local_heads: int = 4  # of num_heads; the others route
    num_clusters: int = 16
    window: int = 64  # members of a cluster
    local_window: int = 128  # earlier tokens that local heads see
    is_causal_prefix: bool = True  # decodable; False: the paper's routing by the whole sequence
    length: int | None = None  # of the longest sequence; num_clusters * window by default
    shared_qk: bool = True
    norm: str = "l2"
    mean_eps: float = 0.0
    decay: float = 0.999
    commitment: float = 1e-4

    @classmethod
    def byte_level(cls, size: str = "tiny") -> RoutingConfig:
        """Byte-level models of about 1 and 6 million parameters: "tiny" or "small"."""
        if size not in _BYTE_LEVEL:
            raise ValueError(f"size is {size!r}, expected one of {sorted(_BYTE_LEVEL)}")
        sizes = _BYTE_LEVEL[size]
        return cls(vocab_size=256, init_std=sizes["d_model"] ** -0.5, **sizes)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RoutingConfig:
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"{cls.__name__}: unknown fields {unknown}")
        return cls(**values)


_BYTE_LEVEL: dict[str, dict[str, Any]] = {
    "tiny": {
        "d_model": 128, "num_layers": 5, "num_heads": 4, "local_heads": 2, "num_clusters": 8,
        "window": 64, "local_window": 64, "mlp_hidden": 256,
    },
    "small": {
        "d_model": 256, "num_layers": 8, "num_heads": 8, "local_heads": 4, "num_clusters": 16,
        "window": 64, "local_window": 64, "mlp_hidden": 512,
    },
}  # fmt: skip


class RoutingLM(LanguageModel):
    """Every layer mixes tokens by local and routing heads (hw.nn.KMeansRoutingAttention).

    With ``is_causal_prefix``, the default, ``prefill`` and ``step`` agree with the parallel form,
    up to ``length`` tokens; the state holds all of them. Without it the model is the paper's, and
    can be trained and evaluated but not decoded.

    Training adds :meth:`pop_loss` to the loss of the predictions. The clusters move with every
    forward in training.

    Example:
        >>> model = RoutingLM(RoutingConfig.byte_level("tiny"))
        >>> logits = model(torch.randint(256, (1, 100)))
        >>> loss = logits.logsumexp(-1).mean() + model.pop_loss()
    """

    def __init__(
        self,
        config: RoutingConfig,
        *,
        backend: str = "auto",
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        mixers: list[nn.Module] = [
            KMeansRoutingAttention(
                config.d_model,
                config.num_heads,
                local_heads=config.local_heads,
                num_clusters=config.num_clusters,
                window=config.window,
                local_window=config.local_window,
                is_causal_prefix=config.is_causal_prefix,
                length=config.length,
                shared_qk=config.shared_qk,
                norm=config.norm,
                mean_eps=config.mean_eps,
                rotary_dim=rotary_dim(config),
                decay=config.decay,
                commitment=config.commitment,
                backend=backend,
                **like,
            )
            for _ in range(config.num_layers)
        ]
        super().__init__(config, mixers, **like)

    def pop_loss(self) -> Tensor:
        """The sum of the layers' commitment losses since they were last taken."""
        losses = [block.mixer.pop_loss().float() for block in self.blocks]
        return torch.stack(losses).sum()
