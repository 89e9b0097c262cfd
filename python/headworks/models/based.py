# SPDX-License-Identifier: Apache-2.0
"""The BASED language model (Arora et al. 2024, arXiv 2402.18668)."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..nn import BasedLinearAttention, GatedShortConv, SlidingWindowAttention
from ..nn._types import Device, DType
from .base import LanguageModel
from .config import BasedConfig, rotary_dim


class BasedLM(LanguageModel):
    """Hybrid by layer: gated short convolutions, linear attention, sliding-window attention.

    The state of a sequence has a fixed size however long it grows, so that generating the
    millionth token costs what the first cost. Parameter names and shapes are those of
    HazyResearch/based (``transformer.layers.3.mixer.in_proj.weight``, ...).

    Example:
        >>> model = BasedLM(BasedConfig.byte_level("tiny"))
        >>> tokens = torch.randint(256, (1, 100))
        >>> logits, state = model.prefill(tokens)
        >>> logits = model.step(logits.argmax(-1), state)
    """

    def __init__(self, config: BasedConfig, *, device: Device = None, dtype: DType = None) -> None:
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        mixers = [_mixer(config, kind, like) for kind in config.layer_kinds]
        super().__init__(config, mixers, **like)


def _mixer(config: BasedConfig, kind: str, like: dict[str, Any]) -> nn.Module:
    if kind == "linear":
        return BasedLinearAttention(
            config.d_model,
            config.num_heads,
            feature_dim=config.feature_dim,
            head_dim=config.head_dim,
            feature_map=config.feature_map,
            g_norm=config.g_norm,
            norm_eps=config.norm_eps,
            **like,
        )
    if kind == "window":
        return SlidingWindowAttention(
            config.d_model,
            config.num_heads,
            window=config.window,
            rotary_dim=rotary_dim(config),
            **like,
        )
    return GatedShortConv(
        config.d_model, conv_width=config.conv_width, conv_bias=config.conv_bias, **like
    )
