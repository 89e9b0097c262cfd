# SPDX-License-Identifier: Apache-2.0
"""What the specifications of attention by lists share."""

from __future__ import annotations

import torch

from headworks.ops.routing import _routing_attention as module
from headworks.ops.routing._routing_attention_native import packed

WIDEST = 128  # of what the tensor-core kernels are built for


def limit(backend, case):
    """The tensor-core kernels: q, k and v of up to 128 numbers a token."""
    wide = max(case.sizes["D"], case.sizes["Dv"]) > WIDEST
    return "no dim [0-9]+" if wide and backend.endswith("sm80") else ""


def forward_of(score, v, gate, routing, read_outs=(False,) * 4, backend="auto"):
    """The torch operator of a validated call's forward pass, and its arguments."""
    want = module._wanted(routing, gate is not None, (True, *read_outs[1:]))
    given = (*packed(score, routing, v, gate), *want[:5], backend)
    return torch.ops.headworks.routing_attention_fwd.default, given


def operators_of(score, v, gate, routing, read_outs=(False,) * 4):
    """The torch operators of a validated call, for opcheck."""
    forward, given = forward_of(score, v, gate, routing, read_outs)
    o, w, row, *_ = forward(*given)
    delta = None if routing.by_slot else torch.randn_like(row[0])
    slots = w if routing.by_slot else None
    wanted = [score.tensors[i] is not None for i in (2, 3, 5)]
    backward = torch.ops.headworks.routing_attention_bwd.default
    d_o = torch.randn_like(o)
    given_back = (*packed(score, routing, v, d_o, row, delta, slots, None), *wanted, "auto")
    return [(forward, given), (backward, given_back)]
