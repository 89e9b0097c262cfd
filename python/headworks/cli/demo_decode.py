# SPDX-License-Identifier: Apache-2.0
"""Generation, and decode speed and memory against the length of the context."""

from __future__ import annotations

import codecs
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..models import ByteTokenizer, LanguageModel, ModelState, SoftmaxConfig, SoftmaxLM

_ROUNDS = 15
_STEPS_PER_ROUND = 8
_SECONDS_PER_CONTEXT = 4.0


@dataclass(frozen=True)
class DecodeRow:
    """One context length. Bytes are those of the state of one sequence, weights not included."""

    context: int
    based_tokens_per_second: float
    softmax_tokens_per_second: float
    based_state_bytes: int
    softmax_state_bytes: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def stream_text(
    model: LanguageModel, tokenizer: ByteTokenizer, prompt: str, tokens: int, seed: int
) -> Iterator[str]:
    """The continuation of the prompt, piece by piece."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    start = tokenizer.encode(prompt).unsqueeze(0).to(model.device)
    made = model.generate(start, tokens, temperature=0.7, top_k=50, seed=seed, stream=True)
    for token in made:
        yield decoder.decode(bytes([int(token)]))
    yield decoder.decode(b"", final=True)


@torch.no_grad()
def measure_decode(
    model: LanguageModel,
    baseline: SoftmaxConfig,
    text: Tensor,
    contexts: tuple[int, ...],
    seed: int,
) -> Iterator[DecodeRow]:
    """Times single steps of the model and of a softmax model of equal width, in turns.

    The linear model reads ``text`` [n] uint8 (repeated as needed) up to the context. The softmax
    model is untrained and its cache filled with random keys and values: the time of a step does
    not depend on what they are, and reading 16 k tokens would take it seconds.
    """
    generator = torch.Generator().manual_seed(seed)
    softmax = SoftmaxLM(baseline, device=model.device).eval()
    model.eval()
    for context in contexts:
        repeats = -(-context // len(text))
        tokens = text.repeat(repeats)[:context].long().unsqueeze(0).to(model.device)
        based_state = model.prefill(tokens)[1]
        softmax_state = _filled_cache(softmax, context, generator)
        based_bytes, softmax_bytes = based_state.nbytes, softmax_state.nbytes
        contenders = ((model, based_state), (softmax, softmax_state))
        based, plain = _tokens_per_second(contenders, tokens[:, -1])
        yield DecodeRow(context, based, plain, based_bytes, softmax_bytes)


def _filled_cache(model: SoftmaxLM, context: int, generator: torch.Generator) -> ModelState:
    state = model.init_state(1)
    for block, cache in zip(model.blocks, state.layers, strict=True):
        shape = (1, block.mixer.num_heads, context, block.mixer.head_dim)
        k, v = (torch.randn(shape, generator=generator).to(model.device) for _ in range(2))
        cache.append(k, v)
    return state


def _tokens_per_second(
    contenders: tuple[tuple[LanguageModel, ModelState], ...], token: Tensor
) -> list[float]:
    """Median over rounds in which the contenders take turns, so that a busy moment hits both."""
    seconds: list[list[float]] = [[] for _ in contenders]
    start = time.monotonic()
    for turn in range(_ROUNDS + 1):
        for times, (model, state) in zip(seconds, contenders, strict=True):
            _synchronize(token)
            begin = time.perf_counter()
            for _ in range(_STEPS_PER_ROUND):
                model.step(token, state)
            _synchronize(token)
            if turn > 0:  # the first round warms up
                times.append((time.perf_counter() - begin) / _STEPS_PER_ROUND)
        if turn > 2 and time.monotonic() - start > _SECONDS_PER_CONTEXT:
            break
    return [1 / statistics.median(times) for times in seconds]


def _synchronize(like: Tensor) -> None:
    if like.device.type == "cuda":
        torch.cuda.synchronize(like.device)
