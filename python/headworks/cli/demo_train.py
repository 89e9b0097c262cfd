# SPDX-License-Identifier: Apache-2.0
"""The training loop of `headworks demo`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import LanguageModel


@dataclass(frozen=True)
class Recipe:
    """How a size is trained."""

    steps: int
    batch: int  # windows per step
    length: int  # bytes per window
    learning_rate: float
    warmup: int = 30  # steps
    final_rate: float = 0.02  # of learning_rate, at the end of the cosine
    weight_decay: float = 0.1
    clip: float = 1.0  # largest norm of the gradient


# The steps of "tiny" take about a minute on two CPU cores, those of the others minutes on a GPU.
RECIPES = {
    "tiny": Recipe(steps=900, batch=4, length=256, learning_rate=4e-3),
    "small": Recipe(steps=2000, batch=32, length=512, learning_rate=3e-3),
    "base": Recipe(steps=3000, batch=64, length=512, learning_rate=1.5e-3),
}

_VALIDATION_BATCH = 16
_QUICK_WINDOWS = 32


class Trainer:
    """Trains a model on a text to predict the next byte.

    The windows of a step are drawn from (seed, step) alone: a run that was interrupted and
    continued sees what an uninterrupted one sees.
    """

    def __init__(
        self,
        model: LanguageModel,
        train_text: Tensor,
        val_text: Tensor,
        recipe: Recipe,
        steps: int,
        seed: int,
    ) -> None:
        self.model = model
        self.train_text = train_text.to(model.device)  # [n] uint8
        self.val_text = val_text.to(model.device)  # [m] uint8
        self.recipe = recipe
        self.steps = steps
        self.seed = seed
        self.step = 0
        self.seconds = 0.0
        self.train_curve: list[list[float]] = []  # [step, bits per byte]
        self.val_curve: list[list[float]] = []
        self.optimizer = _optimizer(model, recipe)
        self._window = torch.arange(recipe.length + 1, device=model.device)

    def train(
        self,
        seconds: float | None,
        should_stop: Callable[[], bool],
        report: Callable[[Trainer], None],
    ) -> str:
        """Trains to the last step -> "finished", or "time" or "interrupted" if cut short.

        With a time limit the learning rate follows whichever is further, the steps or the clock,
        so that it has decayed when the time is up.
        """
        first, start, before = self.step, time.monotonic(), self.seconds
        every = max(self.steps // 10, 1)
        self.model.train()
        while self.step < self.steps:
            if should_stop():
                return "interrupted"
            elapsed = time.monotonic() - start
            progress = self.step / self.steps
            if seconds is not None:
                if elapsed >= seconds:
                    return "time"
                by_clock = first / self.steps + (1 - first / self.steps) * elapsed / seconds
                progress = max(progress, by_clock)
            loss = self._train_step(progress)
            self.step += 1
            self.seconds = before + time.monotonic() - start
            self.train_curve.append([self.step, loss])
            if self.step % every == 0 and self.step < self.steps:
                self.val_curve.append([self.step, self.validate(_QUICK_WINDOWS)])
            report(self)
        return "finished"

    @torch.no_grad()
    def validate(self, windows: int | None = None) -> float:
        """Bits per byte on the held-out text, cut into windows of the training length.

        ``windows`` takes only so many, evenly spread; None takes all.
        """
        self.model.eval()
        length = self.recipe.length
        starts = torch.arange(0, len(self.val_text) - length, length, device=self._window.device)
        if windows is not None and windows < len(starts):
            starts = starts[torch.linspace(0, len(starts) - 1, windows).long()]
        nats = 0.0
        for some in torch.split(starts, _VALIDATION_BATCH):
            tokens = self.val_text[some.unsqueeze(1) + self._window].long()
            nats += self._loss(tokens, "sum").item()
        self.model.train()
        return nats / (len(starts) * length) / math.log(2)

    def fastest_threads(self) -> int:
        """How many threads make a step fastest: 1, 2, 4, ... while it gets faster, up to torch's.

        Threads that wait for each other slow a tiny model down on a machine of many cores, and any
        model on cores that other processes use. The model is left as it was.
        """
        most = torch.get_num_threads()
        best, least = 1, math.inf
        candidates = [2**i for i in range(most.bit_length()) if 2**i < most] + [most]
        for threads in candidates:
            torch.set_num_threads(threads)
            seconds = self._time_of_a_step()
            if seconds < 2 * least:  # not hopeless: once more, warm
                seconds = min(seconds, self._time_of_a_step())
            if seconds >= least:
                break
            best, least = threads, seconds
        torch.set_num_threads(most)
        return best

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs for the training to go on."""
        return {
            "step": self.step,
            "steps": self.steps,
            "seed": self.seed,
            "seconds": self.seconds,
            "train_curve": self.train_curve,
            "val_curve": self.val_curve,
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on where ``state`` was taken; steps and seed stay this trainer's own."""
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.train_curve = state["train_curve"]
        self.val_curve = state["val_curve"]
        self.optimizer.load_state_dict(state["optimizer"])

    def _train_step(self, progress: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(progress)
        loss = self._loss(self._batch(), "mean")
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        return loss.item() / math.log(2)

    def _time_of_a_step(self) -> float:
        # Forward and backward only.
        start = time.monotonic()
        torch.autograd.backward(self._loss(self._batch(), "mean"))
        self.optimizer.zero_grad(set_to_none=True)
        return time.monotonic() - start

    def _rate(self, progress: float) -> float:
        recipe = self.recipe
        warm = min(1.0, (self.step + 1) / recipe.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return recipe.learning_rate * warm * (recipe.final_rate + (1 - recipe.final_rate) * cosine)

    def _batch(self) -> Tensor:
        # Windows at random places -> [batch, length + 1] int64
        draw = torch.Generator().manual_seed((self.seed * 1_000_003 + self.step) % 2**63)
        last = len(self.train_text) - self.recipe.length - 1
        starts = torch.randint(last + 1, (self.recipe.batch, 1), generator=draw)
        return self.train_text[starts.to(self._window.device) + self._window].long()

    def _loss(self, tokens: Tensor, reduction: str) -> Tensor:
        # tokens [B, S + 1] -> nats
        logits = self.model(tokens[:, :-1])
        return F.cross_entropy(
            logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction=reduction
        )


def _optimizer(model: LanguageModel, recipe: Recipe) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)
