# SPDX-License-Identifier: Apache-2.0
"""What the specifications of attention by lists share."""

from __future__ import annotations

import torch

from headworks.ops.attention._native import WantGrad
from headworks.ops.routing import _routing_attention as module
from headworks.ops.routing import _routing_attention_native as native

WIDEST = 128  # of what the tensor-core kernels are built for


def limit(backend, case):
    """The tensor-core kernels: q, k and v of up to 128 numbers a token."""
    wide = max(case.sizes["D"], case.sizes["Dv"]) > WIDEST
    return "no dim [0-9]+" if wide and backend.endswith("sm80") else ""


def forward_of(score, v, gate, routing, read_outs=(False,) * 4, backend="auto"):
    """The torch operator of a validated call's forward pass, and its arguments."""
    want = module._wanted(routing, gate is not None, (True, *read_outs[1:]))
    inputs = native._forward_inputs(score, v, gate, routing)
    numbers = native._forward_numbers(score, routing)
    given = (*inputs, *numbers, routing.covers, *want[:-1], backend)
    return torch.ops.headworks.routing_attention_fwd.default, given


def operators_of(score, v, gate, routing, read_outs=(False,) * 4):
    """The torch operators of a validated call, for opcheck."""
    forward, given = forward_of(score, v, gate, routing, read_outs)
    made = native.Forward(*forward(*given))
    delta = None if routing.by_slot else torch.randn_like(made.row[0])
    slots = made.w if routing.by_slot else None
    wanted = {n: getattr(score, n) is not None for n in ("bias", "key_bias", "row_temperature")}
    inputs = native.BACKWARD.tensors(
        (*score.tensors, routing.rows, routing.keys),
        v=v, d_w=torch.randn_like(made.o), row=made.row, delta=delta, slots=slots,
    )  # fmt: skip
    numbers = native.BACKWARD.numbers(score.numbers, **routing.numbers)
    given_back = (*inputs, *numbers, routing.covers, *WantGrad(v=True, **wanted), "auto")
    backward = torch.ops.headworks.routing_attention_bwd.default
    return [(forward, given), (backward, given_back)]
