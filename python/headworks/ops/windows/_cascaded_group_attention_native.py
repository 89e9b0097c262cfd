# SPDX-License-Identifier: Apache-2.0
"""The native call of hw.cascaded_group_attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._functions import NativeFunction
from ..._native import NativeCall, define, described
from .._operands import check_operands, require
from ._cascade_weights import CascadeWeights

FORWARD = NativeFunction("cascaded_group_attention.forward")
FORWARD.begins_with(("x", *CascadeWeights._fields), ("window_height", "window_width"))

Size = tuple[int, int]


def run(x: Tensor, weights: Sequence[Tensor], window: Size, backend: str) -> Tensor:
    y = _output(x)
    if y.numel():
        FORWARD.run(backend, (x, *weights), (y,), window)
    return y


def prepared(
    x: Tensor, weights: CascadeWeights, window: Size, backend: str
) -> Callable[..., Tensor]:
    """`run` as a function of tensors like these."""
    return lambda x, *weights: run(x, weights, window, backend)


def call(x: Tensor, weights: CascadeWeights, window: Size, backend: str) -> NativeCall:
    """The call that `run` makes, for hw.explain."""
    return described(FORWARD, backend, (x, *weights), (_output(x),), window)


def _output(x: Tensor) -> Tensor:
    """y, unfilled, in memory as x lies: channels first, or else channels last."""
    batch, height, width, channels = x.shape
    if x.stride(3) != 1 and x.permute(0, 3, 1, 2).is_contiguous():
        return x.new_empty((batch, channels, height, width)).permute(0, 2, 3, 1)
    return x.new_empty((batch, height, width, channels))


def _operator(x: Tensor, *arguments: Any) -> Tensor:
    op = "cascaded_group_attention"
    weights, backend = CascadeWeights(*arguments[:7]), arguments[9]
    window: Size = arguments[7], arguments[8]
    sizes = check_operands(op, FORWARD.inputs, (x, *weights))
    key_dim, width = sizes["K"], sizes["d"]
    require(op, "qkv_weight", f"{sizes['F']} columns", sizes["F"] == 2 * key_dim + width, "2 K + d")
    require(op, "C", sizes["C"], sizes["C"] == sizes["H"] * width > 0, "H d")
    require(op, "conv_weight", f"S = {sizes['S']}", sizes["S"] % 2 == 1, "an odd number")
    require(op, "bias_table", sizes["RR"], weights.window**2 == sizes["RR"], "a square number")
    fits = all(1 <= side <= weights.window for side in window) or x.numel() == 0
    require(op, "window", window, fits, f"sides from 1 to {weights.window}, of the table")
    return run(x, weights, window, backend)


def _fake(x: Tensor, *arguments: Any) -> Tensor:
    return _output(x)


define(FORWARD.schema("cascaded_group_attention"), _operator, _fake)
operator = torch.ops.headworks.cascaded_group_attention.default
