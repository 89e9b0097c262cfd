# SPDX-License-Identifier: Apache-2.0
"""Cases of hw.moh_attention; sizes and inputs as in attention, whose head_gate is the gate here."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from unittest import mock

import torch

import headworks as hw
from headworks.ops.routing import _native as native
from headworks.ops.routing._moh_route_native import chosen_rows
from headworks.testing import EVERY_DTYPE, HALF, Spec

from . import attention
from .pairs import pairwise
from .routing import limit, operators_of

# The function shadows its module in the package.
module = importlib.import_module("headworks.ops.routing.moh_attention")


def case(*args, gate=0.5, shuffled=False, **more):
    """`gate`: the share of zeros. From row 8 on every second head has 64 rows of them. `shuffled`:
    lists of rows are as short as they can be and in another order, absent rows among the others."""
    more |= {"label": "shuffled"} if shuffled else {}
    made = attention.case(*args, gate=gate, **more)
    kept = {n: x for n, x in made.options.items() if n not in ("activation", "normalizer")}
    return dataclasses.replace(made, options=kept, sizes={**made.sizes, "shuffled": shuffled})


def make(case, dtype, device="cpu", seed=0):
    """q k v gate, and the optional tensors that the case has."""
    tensors = attention.make(case, dtype, device, seed)
    tensors["gate"] = tensors.pop("head_gate")
    return tensors


def run(tensors, case, backend):
    with contextlib.ExitStack() as stack:
        if case.sizes["shuffled"]:
            stack.enter_context(mock.patch.object(native, "chosen_rows", _shuffled_rows))
        return {"o": hw.moh_attention(**tensors, backend=backend, **case.options)}


def _shuffled_rows(gate, backend):
    rows = chosen_rows(gate, backend)
    most = int((rows >= 0).sum(2).max())
    order = torch.randperm(most, generator=torch.Generator().manual_seed(3))
    return rows[..., order.to(rows.device)]


def operators(tensors, case):
    """The torch operators with the arguments this case gives them, for opcheck."""
    *given, _ = module._checked(**tensors, backend="cpu", **case.options)
    route, gate = torch.ops.headworks.moh_route.default, given[2].detach()
    rows = route(gate, "cpu")
    return [(route, (gate, "cpu")), *operators_of(*native._moh_arguments(*given, rows))]


CASES = (
    *(case(gate=g, causal=c) for g in (0.0, 0.5, 0.9, 1.0) for c in (True, False)),
    *(case(Sq=s, H=4, causal=True) for s in (1, 2, 63, 64, 130, 200)),
    *(
        case(Sq=sq, Sk=sk, causal=c)
        for sq, sk in ((1, 130), (40, 65), (130, 63))
        for c in (True, False)
    ),
    *(case(Sq=130, window=w) for w in ((5, None), (64, 3), (0, 0))),
    case(Sq=130, window=(20, 0), causal=True),
    *(
        case(Sq=66, D=d, Dv=dv, causal=True)
        for d, dv in ((1, 1), (8, 0), (40, 64), (64, 100), (128, 200))
    ),
    *(case(Sq=66, B=2, H=h, Hq=hq, causal=True) for hq, h in ((4, 2), (6, 1), (3, 3))),
    *(
        case(B=b, Sq=sq, Sk=sk, H=h)
        for b, sq, sk, h in ((0, 5, 5, 2), (2, 0, 5, 2), (2, 5, 0, 2), (2, 5, 5, 0))
    ),
    *(
        case(Sq=40, Sk=65, B=2, bias=b, causal=c)
        for b in ("bhqk", "11qk", "b11k")
        for c in (False, True)
    ),
    case(bias="11qk", hidden=0.4),
    case(B=2, Hq=4, key_bias="1hk", temperature="bqh", softcap=2.0, causal=True),
    *(case(scale=s) for s in (1.0, -0.7)),
    *(case(Sq=66, B=2, Hq=4, sink=z, causal=c) for z, c in (("h", True), ("bh", False))),
    case(spread=20.0, causal=True),
)

EMULATOR_CASES = (
    case(Sq=90, H=1, Hq=2, D=16, Dv=16, causal=True, bias="1hqk", key_bias="bhk", softcap=3.0),
    case(Sq=40, Sk=130, H=2, D=16, Dv=8, causal=True),
    case(Sq=40, H=2, D=16, Dv=8, causal=True, sink="h"),
    case(Sq=150, H=2, D=8, Dv=8, gate=0.9),
    *(case(Sq=s, H=2, D=8, Dv=8, causal=True) for s in (1, 63, 64, 65)),
    case(Sq=250, H=1, D=8, Dv=8, causal=True, window=(20, 0), gate=0.3),
    case(Sq=300, Sk=16, H=1, D=8, Dv=8),
    case(Sq=2, Sk=1100, H=1, D=8, Dv=8, gate=0.0),  # keys that attention would cut
    case(Sq=70, H=2, D=8, Dv=8, gate=1.0),
    case(Sq=0, H=1, D=8, Dv=8),
    case(Sq=12, B=2, H=10, D=8, Dv=8),  # more heads than one task of the CPU lists
    case(Sq=90, Sk=20, B=2, H=1, Hq=2, D=8, Dv=8, bias="11qk", causal=True, shuffled=True),
    # Widths of the tensor-core kernels with few, more and many rows; columns of v in parts.
    *(case(Sq=s, Sk=20, H=2, D=100, Dv=8, gate=0.0) for s in (9, 40, 90)),
    case(Sq=40, H=1, D=100, Dv=8, key_bias="11k"),
    *(case(Sq=20, H=1, D=8, Dv=dv) for dv in (0, 150)),
    # A bias that heads or batch entries share, of which the gradient is a sum.
    *(case(Sq=40, B=2, H=1, Hq=2, D=d, Dv=8, bias="11qk") for d in (8, 100)),
    case(Sq=20, H=1, D=8, Dv=8, bias="11qk", gate=0.0),
    *(
        case(B=2, Dv=8, label="pairs", **choice)
        for choice in pairwise(
            Sq=(20, 70),
            Sk=(30, 70),
            gate=(0.0, 0.6),
            heads=({"H": 1}, {"H": 2, "Hq": 4}, {"H": 1, "Hq": 3}),
            scale=(None, -0.7, 0.0),
            mask=({}, {"causal": True}, {"window": (0, 3)}, {"causal": True, "window": (9, 0)}),
            bias=(None, "b1qk", "1h1k"),
            key_bias=(None, "1hk"),
            temperature=(None, "bq1"),
            softcap=(0.0, 2.0),
            D=(8, 40),
        )
    ),
)

SAMPLE_CASES = (
    case(
        Sq=90,
        B=3,
        H=1,
        Hq=2,
        D=24,
        Dv=20,
        causal=True,
        window=(40, 0),
        bias="b1qk",
        key_bias="bhk",
        temperature="bqh",
        softcap=3.0,
    ),
    case(Sq=200, B=2, H=4, gate=0.75),
)

# 50 and 75 % of the heads, against dense attention.
BENCHMARK_CASES = tuple(
    case(Sq=1024, H=32, D=64, Dv=64, gate=g, causal=c)
    for g in (0.5, 0.25, 0.0)
    for c in (True, False)
)

SPEC = Spec(
    name="moh_attention",
    function=hw.moh_attention,
    make=make,
    run=run,
    differentiable=("q", "k", "v", "gate", "bias", "key_bias", "row_temperature", "sink"),
    cases=CASES,
    emulator_cases=EMULATOR_CASES,
    benchmark_cases=BENCHMARK_CASES,
    sample_cases=SAMPLE_CASES,
    dtypes={"cpu": EVERY_DTYPE, "simt": EVERY_DTYPE, "sm80": HALF},
    operators=operators,
    limit=limit,
)
