# SPDX-License-Identifier: Apache-2.0
"""The native calls of hw.contmix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._functions import Maybe, NativeFunction
from ..._native import define, empties, fixed_arity
from ..._repeated import Ready
from .._operands import check_operands, require

FORWARD = NativeFunction("contmix.forward")
BACKWARD = NativeFunction("contmix.backward")
Kernels = tuple[int, int, int, int]  # Sy, Sx, Ky, Kx

_INPUTS = ("affinity", "weight", "bias", "small_rpb", "rpb", "v")
_NUMBERS = ("small_y", "small_x", "kernel_y", "kernel_x")
FORWARD.begins_with(_INPUTS, _NUMBERS)
BACKWARD.begins_with((*_INPUTS, "d_o"), _NUMBERS)


def output(v: Tensor) -> Tensor:
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


def forward(*arguments: Any) -> Tensor:
    """The inputs, the numbers and a backend -> o."""
    inputs, kernels, (backend,) = FORWARD.split(arguments)
    o = output(inputs[5])
    FORWARD.run(backend, inputs, (o,), kernels)
    return o


def ready(operands: tuple[Maybe, ...], kernels: Kernels, backend: str) -> Ready:
    """`forward` as a function of the operands that are there."""
    v = operands[5]
    assert v is not None
    present = [x for x in operands if x is not None]
    return Ready(FORWARD, backend, operands, (output(v),), kernels, present)


def _check(op: str, sizes: dict[str, int], kernels: Any) -> None:
    """What the shapes alone do not say of the operators below."""
    for name, k, axis in zip(_NUMBERS, kernels, "YXYX", strict=True):
        require(op, name, k, 1 <= k <= sizes[axis] and k % 2 == 1, "an odd number up to the image")
    small_y, small_x, kernel_y, kernel_x = kernels
    require(op, "weight", sizes["T"], sizes["T"] == small_y * small_x + kernel_y * kernel_x,
            "a row for each key of both windows")  # fmt: skip
    require(op, "v", sizes["M"], sizes["M"] == 2 * sizes["G"], "two heads for each group")
    require(op, "v and affinity", "width 0", sizes["D"] * sizes["A"] > 0, "at least 1")
    for axes, k in (("P", small_y), ("Q", small_x), ("R", kernel_y), ("S", kernel_x)):
        require(op, "a table", sizes.get(axes), sizes.get(axes, 2 * k - 1) == 2 * k - 1,
                "2 K - 1 along each axis")  # fmt: skip


def _forward_operator(*arguments: Any) -> Tensor:
    inputs, kernels, _ = FORWARD.split(arguments)
    _check("contmix_fwd", check_operands("contmix_fwd", FORWARD.inputs, inputs), kernels)
    return forward(*arguments)


def _forward_fake(*arguments: Any) -> Tensor:
    return output(FORWARD.split(arguments)[0][5])


def _gradients(inputs: tuple[Any, ...], wanted: list[bool]) -> Any:
    """Outputs of BACKWARD, unfilled, None for what is not asked for."""
    given = inputs[: len(wanted)]
    return BACKWARD.Outputs(
        *empties(*(x if asked else None for x, asked in zip(given, wanted, strict=True)))
    )


def backward(*arguments: Any) -> Any:
    """The inputs, d_o, the numbers, which gradients are wanted, a backend -> those gradients."""
    inputs, kernels, (*wanted, backend) = BACKWARD.split(arguments)
    made = _gradients(inputs, wanted)
    BACKWARD.run(backend, inputs, made, kernels)
    return made


def _backward_operator(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, kernels, _ = BACKWARD.split(arguments)
    _check("contmix_bwd", check_operands("contmix_bwd", BACKWARD.inputs, inputs), kernels)
    return fixed_arity(backward(*arguments), inputs[0])


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, _, (*wanted, _backend) = BACKWARD.split(arguments)
    return fixed_arity(_gradients(inputs, wanted), inputs[0])


_WANTED = ", ".join(f"bool {name}_grad" for name in _INPUTS)
define(FORWARD.schema("contmix_fwd"), _forward_operator, _forward_fake)
define(BACKWARD.schema("contmix_bwd", _WANTED), _backward_operator, _backward_fake)
