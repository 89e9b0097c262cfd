# SPDX-License-Identifier: Apache-2.0
"""Gradients of first order: what the backward passes of operators and layers have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from ._errors import fail

Backward = Callable[..., Any]
Saved = tuple[Any, ...]  # tensors as they were saved, None for absent ones


def apart(*arguments: Any) -> tuple[Any, ...]:
    """The arguments of an autograd.Function, a view for a tensor that comes again: torch.compile
    wants them to be different tensors."""
    if not torch.compiler.is_compiling():
        return arguments
    made: list[Any] = []
    for x in arguments:
        again = isinstance(x, Tensor) and any(x is y for y in arguments[: len(made)])
        made.append(x.view_as(x) if again else x)
    return tuple(made)


class _FirstOrder(torch.autograd.Function):
    """(op, n, n tensors that gradients depend on, gradients) -> the gradients.

    To differentiate them is an error, on every way from them to those tensors.
    """

    @staticmethod
    def forward(ctx: Any, op: str, n: int, *tensors: Tensor | None) -> tuple[Any, ...]:
        ctx.op = op
        return tensors[n:]

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> NoReturn:
        fail(
            NotImplementedError,
            ctx.op,
            "a second derivative",
            "asked for (a gradient made with create_graph=True is differentiated)",
            "gradients of first order only",
            'Use backend="reference", which is differentiable any number of times, or plain torch '
            "operations where there is no such choice.",
        )


def first_order(op: str | None = None) -> Callable[[Backward], Backward]:
    """For the backward of an autograd.Function that is not made of differentiable operations: it is
    called as backward(ctx, saved tensors, *cotangents). `op` is the name in its error, None: that
    of ctx.op.

    torch's once_differentiable raises where a gradient depends on a cotangent that requires grad,
    and takes the gradient for a constant where the cotangent is one, as that of a sum is. It is
    still a function of the inputs, which are among the saved tensors: here every gradient made
    under create_graph=True raises when it is differentiated.
    """

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def wrapper(ctx: Any, *cotangents: Tensor | None) -> Any:
            saved = ctx.saved_tensors  # once: checkpoints unpack them no second time
            with torch.no_grad():
                grads = backward(ctx, saved, *cotangents)
            if not torch.is_grad_enabled():
                return grads
            given = grads if isinstance(grads, tuple) else (grads,)
            causes = [x for x in (*saved, *cotangents) if x is not None and x.requires_grad]
            if not causes:  # hooks detached what was saved
                causes.append(torch.empty(0, requires_grad=True))
            made = _FirstOrder.apply(  # type: ignore[no-untyped-call]
                op or ctx.op, len(causes), *causes, *given
            )
            return made if isinstance(grads, tuple) else made[0]

        return wrapper

    return decorate
