# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-any-return, no-untyped-call"
"""A loss that a layer adds to that of the model, kept until it is asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._layer import Layer
from ._recompute import Memory, recomputing


class _Joined(torch.autograd.Function):
    """y as it is. Backward hands the loss the gradient that its stand-in has received.

    A forward that checkpointing runs without gradients can only give out a loss without a graph.
    The recomputation has the graph, but nobody adds that loss to theirs; so it goes with y.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, stand_in: Tensor) -> Tensor:
        ctx.stand_in = stand_in
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        received, ctx.stand_in.grad = ctx.stand_in.grad, None
        return dy, received, None


class SideLoss(Layer):
    """A layer with a loss of its own. What it keeps is left out of copies and pickles."""

    def __init__(self) -> None:
        super().__init__()
        self._loss: Tensor | None = None
        self._memory = Memory()

    def pop_loss(self) -> Tensor:
        """The loss of the latest forward, once; 0 if that was not in training."""
        loss, self._loss = self._loss, None
        return self._zero() if loss is None else loss

    def _zero(self) -> Tensor:
        return next(self.parameters()).new_zeros(())

    def _aside(self, loss: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """y of a forward with input x; its loss is kept, in training."""
        if not self.training:
            self._loss = None
        elif recomputing():
            return joined(y, loss, self._memory.recall(x))
        else:
            stand_in = self._keep(loss)
            if stand_in is not None:
                self._memory.note(x, stand_in)
        return y

    def _keep(self, loss: Tensor) -> Tensor | None:
        """Keeps the loss of a forward in training; its stand-in if there are no gradients."""
        self._loss = loss
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        self._loss = loss.detach().requires_grad_()
        return self._loss

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loss": None}


def joined(y: Tensor, loss: Tensor, stand_in: Tensor | None) -> Tensor:
    """y of a recomputation, with the gradient of its loss if the first forward had none."""
    return y if stand_in is None else _Joined.apply(y, loss, stand_in)
