# SPDX-License-Identifier: Apache-2.0
"""The training loop of `headworks demo` and of the training runs in bench/."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_QUICK_EXAMPLES = 32  # of the held-out data, for a figure now and then in training


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a model is trained."""

    steps: int
    batch: int  # examples per step
    learning_rate: float
    warmup: int = 30  # steps
    final_rate: float = 0.02  # of learning_rate, at the end of the cosine
    weight_decay: float = 0.1
    clip: float = 1.0  # largest norm of the gradient


class Loop(ABC):
    """Trains a model by AdamW; keeps the curves, and what a checkpoint needs to go on.

    A subclass says what the loss of a step is, and the figure of the held-out data. It draws a
    step's examples from :meth:`draw`, from (seed, step) alone: a run that was interrupted and
    continued sees what an uninterrupted one sees. Parameters that want no gradient stay.
    """

    unit = 1.0  # of the curves, measured in that of the loss
    loss_text = "loss {:.3f}"  # for the display of progress
    validation_text = "validation {:.3f}"
    quick_examples: int | None = _QUICK_EXAMPLES

    def __init__(self, model: nn.Module, schedule: Schedule, steps: int, seed: int) -> None:
        self.model = model
        self.schedule = schedule
        self.steps = steps
        self.seed = seed
        self.step = 0
        self.seconds = 0.0
        self.train_curve: list[list[float]] = []  # [step, loss]
        self.val_curve: list[list[float]] = []  # [step, figure of the held-out data]
        self.optimizer = _optimizer(model, schedule)

    @abstractmethod
    def loss(self) -> Tensor:
        """The loss of this step's examples."""

    def side_loss(self) -> Tensor | None:
        """Added to the loss that was just made, for its gradient alone."""
        return None

    @abstractmethod
    def validate(self, examples: int | None = None) -> float:
        """The figure of the held-out data: of so many examples, evenly spread, or of all."""

    def draw(self) -> torch.Generator:
        """The random numbers of this step."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + self.step) % 2**63)

    def train(
        self,
        seconds: float | None,
        should_stop: Callable[[], bool],
        report: Callable[[Any], None],
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
                self.val_curve.append([self.step, self.validate(self.quick_examples)])
            report(self)
        return "finished"

    def final_figure(self) -> float:
        """The figure of all held-out data after the last step, also the last of the curve."""
        if not self.val_curve or self.val_curve[-1][0] != self.step:
            self.val_curve.append([self.step, self.validate()])
        return self.val_curve[-1][1]

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
        """Goes on where ``state`` was taken; steps and seed stay this loop's own."""
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.train_curve = state["train_curve"]
        self.val_curve = state["val_curve"]
        self.optimizer.load_state_dict(state["optimizer"])

    def _train_step(self, progress: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(progress)
        loss = self.loss()
        beside = self.side_loss()
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss if beside is None else loss + beside)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.schedule.clip)
        self.optimizer.step()
        return loss.item() / self.unit

    def _time_of_a_step(self) -> float:
        # Forward and backward only, in eval: statistics and centroids do not move.
        mode = self.model.training
        self.model.eval()
        start = time.monotonic()
        torch.autograd.backward(self.loss())
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.monotonic() - start
        self.model.train(mode)
        return seconds

    def _rate(self, progress: float) -> float:
        schedule = self.schedule
        warm = min(1.0, (self.step + 1) / schedule.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        falling = schedule.final_rate + (1 - schedule.final_rate) * cosine
        return schedule.learning_rate * warm * falling


@contextmanager
def fastest_threads(loop: Loop) -> Iterator[None]:
    """On a CPU as many threads as are fastest for the loop, until the end of the block."""
    before = torch.get_num_threads()
    try:
        if next(loop.model.parameters()).device.type == "cpu":
            torch.set_num_threads(loop.fastest_threads())
        yield
    finally:
        torch.set_num_threads(before)


def _optimizer(model: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    learnt = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in learnt if p.dim() > 1],
            "weight_decay": schedule.weight_decay,
        },
        {"params": [p for p in learnt if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.95), fused=True)
