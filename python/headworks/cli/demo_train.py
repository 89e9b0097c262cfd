# SPDX-License-Identifier: Apache-2.0
"""Training a byte-level language model on a text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import LanguageModel
from .training import Loop, Schedule


@dataclass(frozen=True, kw_only=True)
class Recipe(Schedule):
    """How a language model is trained; an example is a window of the text."""

    length: int  # bytes per window


# The steps of "tiny" take about a minute on two CPU cores, those of the others minutes on a GPU.
RECIPES = {
    "tiny": Recipe(steps=900, batch=4, length=256, learning_rate=4e-3),
    "small": Recipe(steps=2000, batch=32, length=512, learning_rate=3e-3),
    "base": Recipe(steps=3000, batch=64, length=512, learning_rate=1.5e-3),
}

_VALIDATION_BATCH = 16


class Trainer(Loop):
    """Trains a model on a text to predict the next byte."""

    model: LanguageModel
    unit = math.log(2)  # curves are in bits, the loss in nats
    loss_text = "loss {:.2f} bits/byte"
    validation_text = "validation {:.2f}"

    def __init__(
        self,
        model: LanguageModel,
        train_text: Tensor,
        val_text: Tensor,
        recipe: Recipe,
        steps: int,
        seed: int,
    ) -> None:
        super().__init__(model, recipe, steps, seed)
        self.train_text = train_text.to(model.device)  # [n] uint8
        self.val_text = val_text.to(model.device)  # [m] uint8
        self.recipe = recipe
        self._window = torch.arange(recipe.length + 1, device=model.device)

    def loss(self) -> Tensor:
        """Nats per byte."""
        return self._loss(self._batch(), "mean")

    def side_loss(self) -> Tensor:
        """What the layers add: the commitment to the clusters of a RoutingLM, else 0."""
        return self.model.pop_loss()

    @torch.no_grad()
    def validate(self, examples: int | None = None) -> float:
        """Bits per byte on the held-out text, cut into windows of the training length.

        ``examples`` takes only so many, evenly spread; None takes all.
        """
        self.model.eval()
        length = self.recipe.length
        starts = torch.arange(0, len(self.val_text) - length, length, device=self._window.device)
        if examples is not None and examples < len(starts):
            starts = starts[torch.linspace(0, len(starts) - 1, examples).long()]
        nats = 0.0
        for some in torch.split(starts, _VALIDATION_BATCH):
            tokens = self.val_text[some.unsqueeze(1) + self._window].long()
            nats += self._loss(tokens, "sum").item()
        self.model.train()
        return nats / (len(starts) * length) / math.log(2)

    def _batch(self) -> Tensor:
        # Windows at random places -> [batch, length + 1] int64
        last = len(self.train_text) - self.recipe.length - 1
        starts = torch.randint(last + 1, (self.recipe.batch, 1), generator=self.draw())
        return self.train_text[starts.to(self._window.device) + self._window].long()

    def _loss(self, tokens: Tensor, reduction: str) -> Tensor:
        # tokens [B, S + 1] -> nats
        logits = self.model(tokens[:, :-1])
        return F.cross_entropy(
            logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction=reduction
        )
