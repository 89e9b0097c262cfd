# SPDX-License-Identifier: Apache-2.0
"""The native call that lists the rows of mixture-of-heads attention, csrc/ops/moh_route."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._functions import NativeFunction
from ..._native import ACCUMULATION, define, route
from ..._repeated import Ready
from .._operands import check_operands, require

FORWARD = NativeFunction("moh_route.forward")


def chosen_rows(gate: Tensor, backend: str) -> Tensor:
    """Of gate [B, S, H], in an accumulation dtype, the rows that are not 0, by position, and -1
    behind them: int64 [B, H, S]. No gradient."""
    direct = route("moh_attention", (gate,)) == "direct"
    return (list_rows if direct else torch.ops.headworks.moh_route.default)(gate, backend)


def unfilled_rows(gate: Tensor) -> Tensor:
    """Memory for the rows, [B, H, S]."""
    batch, tokens, heads = gate.shape
    return gate.new_empty((batch, heads, tokens), dtype=torch.int64)


def list_rows(gate: Tensor, backend: str) -> Tensor:
    """`chosen_rows` of a gate whose checks have passed, by the native call."""
    rows = unfilled_rows(gate)
    if rows.numel():
        FORWARD.run(backend, (gate,), (rows,))
    return rows


def ready_rows(gate: Tensor, backend: str) -> Ready:
    """`list_rows` of other gates like this, which is not empty."""
    return Ready(FORWARD, backend, (gate,), (unfilled_rows(gate),), (), (gate,))


def _rows_operator(gate: Tensor, backend: str) -> Tensor:
    check_operands("moh_route", FORWARD.inputs, (gate,))
    wide = gate.dtype in ACCUMULATION.values()
    require("moh_route", "gate", gate.dtype, wide, "torch.float32 or torch.float64")
    return list_rows(gate, backend)


def _rows_fake(gate: Tensor, backend: str) -> Tensor:
    return unfilled_rows(gate)


define(FORWARD.schema("moh_route"), _rows_operator, _rows_fake)
