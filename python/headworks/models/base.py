# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-any-return, no-untyped-call"
"""What every language model here shares: the block, the state, prefill, step and generation."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from ..nn._layer import Layer, reset_children
from ..nn._types import Device, DType
from ..nn.functional import swiglu
from ..nn.norm import RMSNorm
from .config import BasedConfig, SoftmaxConfig, mlp_hidden, padded_vocab
from .sampling import sample

Config: TypeAlias = "BasedConfig | SoftmaxConfig"


class GatedMLP(Layer):
    """y = (a * silu(b)) W2^T for [a | b] = x W1^T. fc1.weight [2 E, d], fc2.weight [d, E]."""

    def __init__(
        self, d_model: int, hidden: int, device: Device = None, dtype: DType = None
    ) -> None:
        super().__init__()
        like: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.fc1 = nn.Linear(d_model, 2 * hidden, **like)
        self.fc2 = nn.Linear(hidden, d_model, **like)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(swiglu(self.fc1(x)))


class Block(Layer):
    """x + mixer(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(
        self, config: Config, mixer: nn.Module, device: Device = None, dtype: DType = None
    ) -> None:
        super().__init__()
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.mixer: Any = mixer
        self.norm1 = RMSNorm(config.d_model, eps=config.norm_eps, **like)
        self.mlp = GatedMLP(config.d_model, mlp_hidden(config), **like)
        self.norm2 = RMSNorm(config.d_model, eps=config.norm_eps, **like)

    def forward(
        self, x: Tensor, state: Any, return_state: bool, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Any]:
        mixed = self.mixer(self.norm1(x), state, return_state, cu_seqlens)
        mixed, new_state = mixed if return_state else (mixed, None)
        x = x + mixed
        return x + self.mlp(self.norm2(x)), new_state

    def step(self, x_t: Tensor, state: Any) -> Tensor:
        x_t = x_t + self.mixer.step(self.norm1(x_t), state)
        return x_t + self.mlp(self.norm2(x_t))


class _Embeddings(nn.Module):
    def __init__(self, rows: int, d_model: int, device: Device = None, dtype: DType = None) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(rows, d_model, device=device, dtype=dtype)


class _Trunk(nn.Module):
    """Everything but the head, under the names of the official checkpoints."""

    def __init__(
        self, config: Config, mixers: list[nn.Module], device: Device = None, dtype: DType = None
    ) -> None:
        super().__init__()
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embeddings = _Embeddings(padded_vocab(config), config.d_model, **like)
        self.layers = nn.ModuleList(Block(config, mixer, **like) for mixer in mixers)
        self.ln_f = RMSNorm(config.d_model, eps=config.norm_eps, **like)


@dataclass
class ModelState:
    """All that a model keeps of the tokens so far: one entry per layer, as its mixer defines it."""

    layers: list[Any] = field(default_factory=list)

    def tensors(self) -> list[Tensor]:
        """Every tensor of the state; of a growing cache the part in use."""
        return [t for layer in self.layers for t in _tensors(layer)]

    @property
    def nbytes(self) -> int:
        """Bytes of those tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def clone(self) -> ModelState:
        return copy.deepcopy(self)


def _tensors(layer: Any) -> list[Tensor]:
    if isinstance(layer, Tensor):
        return [layer]
    if isinstance(layer, tuple):
        return list(layer)
    return layer.tensors()


class LanguageModel(nn.Module):
    """Embedding, pre-norm blocks, final norm, head. Subclasses choose the mixers.

    Three ways to run it, with equal results:
    ``model(tokens)`` all logits in parallel (training);
    ``model.prefill(tokens)`` the logits after the last token, and the state;
    ``model.step(token, state)`` one token further, the state updated in place.
    """

    def __init__(
        self, config: Config, mixers: list[nn.Module], device: Device = None, dtype: DType = None
    ) -> None:
        super().__init__()
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        self.transformer = _Trunk(config, mixers, **like)
        self.lm_head = nn.Linear(config.d_model, padded_vocab(config), bias=False, **like)
        self._draw_weights()
        self._tie()

    def reset_parameters(self) -> None:
        """Makes the model what a new one is: weights, norms, and what the mixers keep."""
        reset_children(self)
        self._draw_weights()
        self._tie()

    def _draw_weights(self) -> None:
        # Normal weights of init_std; what writes to the residual stream 1 / sqrt(2 L) smaller.
        std = self.config.init_std
        residual_std = std / math.sqrt(2 * self.config.num_layers)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                to_residual = name.endswith(("out_proj", "fc2"))
                nn.init.normal_(module.weight, std=residual_std if to_residual else std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=std)

    def _tie(self) -> None:
        if self.config.tie_embeddings:
            self.lm_head.weight = self.transformer.embeddings.word_embeddings.weight

    def _apply(self, *arguments: Any, **options: Any) -> LanguageModel:
        # Off the meta device every module gets a parameter of its own.
        super()._apply(*arguments, **options)
        self._tie()
        return self

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def blocks(self) -> list[Block]:
        """The layers in order."""
        return cast("list[Block]", list(self.transformer.layers))

    def num_parameters(self) -> int:
        """Parameters, tied ones counted once."""
        return sum(p.numel() for p in self.parameters())

    def pop_loss(self) -> Tensor:
        """What the layers of the latest forward in training add to the loss of a model; here 0."""
        return self.lm_head.weight.new_zeros(())

    def init_state(self, batch_size: int) -> ModelState:
        """The state before any token."""
        return ModelState([b.mixer.init_state(batch_size) for b in self.blocks])

    def forward(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ModelState]:
        """Logits of every position [B, S, V] for tokens [B, S], and the state after them if asked.

        ``state`` continues earlier tokens and is not modified. With ``cu_seqlens`` [N + 1] the
        batch size is 1 and tokens holds N independent sequences one after the other.
        """
        x, new_state = self._trunk(tokens, state, return_state, cu_seqlens)
        logits = self.lm_head(x)
        return (logits, new_state) if return_state else logits

    @torch.no_grad()
    def prefill(self, tokens: Tensor, state: ModelState | None = None) -> tuple[Tensor, ModelState]:
        """Logits after the last of tokens [B, S] -> [B, V], and the state, ready for ``step``."""
        x, new_state = self._trunk(tokens, state, True, None)
        return self.lm_head(x[:, -1]), new_state

    @torch.no_grad()
    def step(self, token: Tensor, state: ModelState) -> Tensor:
        """Logits [B, V] after one more token [B]; the state is updated in place."""
        if token.dim() != 1:
            raise ValueError(
                f"{type(self).__name__}.step: token has shape {list(token.shape)}, expected [B]; "
                "for more than one token per sequence call prefill"
            )
        if len(state.layers) != len(self.transformer.layers):
            raise ValueError(
                f"{type(self).__name__}.step: the state has {len(state.layers)} layers, the model "
                f"{len(self.transformer.layers)}"
            )
        x = self.transformer.embeddings.word_embeddings(token)
        for block, layer in zip(self.blocks, state.layers, strict=True):
            x = block.step(x, layer)
        return self.lm_head(self.transformer.ln_f(x))

    def generate(
        self,
        prompt: Tensor,
        n: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
        stream: bool = False,
    ) -> Tensor | Iterator[Tensor]:
        """Continues prompt [B, S] by n tokens -> [B, n].

        Args:
            temperature: divides the logits; 0 takes the most likely token.
            top_k: sample among the k most likely tokens only.
            seed: of the sampling; None takes torch's global generator.
            stream: return an iterator over the tokens [B], each made when it is asked for.
        """
        self._check_prompt(prompt, n)
        if not (math.isfinite(temperature) and temperature >= 0):
            raise ValueError(f"generate: temperature is {temperature}, expected 0 or more")
        if top_k is not None and top_k < 1:
            raise ValueError(f"generate: top_k is {top_k}, expected at least 1")
        generator = None
        if seed is not None:
            generator = torch.Generator(self.device).manual_seed(seed)
        tokens = self._stream(prompt, n, temperature, top_k, generator)
        if stream:
            return tokens
        made = list(tokens)
        return torch.stack(made, dim=1) if made else prompt.new_empty(prompt.shape[0], 0)

    @torch.no_grad()
    def _stream(
        self,
        prompt: Tensor,
        n: int,
        temperature: float,
        top_k: int | None,
        generator: torch.Generator | None,
    ) -> Iterator[Tensor]:
        if n == 0:
            return
        logits, state = self.prefill(prompt)
        for made in range(n):
            token = sample(logits[:, : self.config.vocab_size], temperature, top_k, generator)
            yield token
            if made + 1 < n:
                logits = self.step(token, state)

    def _trunk(
        self,
        tokens: Tensor,
        state: ModelState | None,
        return_state: bool,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, ModelState]:
        if tokens.dim() != 2:
            raise ValueError(
                f"{type(self).__name__}: tokens has shape {list(tokens.shape)}, expected [B, S]"
            )
        x = self.transformer.embeddings.word_embeddings(tokens)
        new_layers = []
        for i, block in enumerate(self.blocks):
            past = None if state is None else state.layers[i]
            x, layer = block(x, past, return_state, cu_seqlens)
            new_layers.append(layer)
        return self.transformer.ln_f(x), ModelState(new_layers)

    def _check_prompt(self, prompt: Tensor, n: int) -> None:
        if prompt.dim() != 2 or prompt.shape[1] == 0:
            raise ValueError(
                f"generate: prompt has shape {list(prompt.shape)}, expected [B, S] with S >= 1"
            )
        if n < 0:
            raise ValueError(f"generate: n is {n}, expected 0 or more")
        on_cpu = prompt.device.type == "cpu" and prompt.numel()
        if on_cpu and not 0 <= prompt.min() <= prompt.max() < self.config.vocab_size:
            raise ValueError(
                f"generate: prompt holds tokens from {prompt.min()} to {prompt.max()}, expected "
                f"0 .. {self.config.vocab_size - 1}"
            )
