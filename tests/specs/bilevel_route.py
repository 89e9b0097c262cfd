# SPDX-License-Identifier: Apache-2.0
"""Cases of hw.bilevel_route; inputs as in bilevel_routing_attention."""

from __future__ import annotations

import dataclasses

import torch

import headworks as hw
from headworks.reference.bilevel_routing import grid_of
from headworks.testing import EVERY_DTYPE, Spec

from . import bilevel_routing_attention as attention
from .pairs import pairwise
from .select_topk import one_hot


def case(*args, per_head=False, equal=False, **sizes):
    """`equal`: all regions have the same means, so that all scores tie."""
    made = attention.case(*args, Dv=1, **sizes)
    options = {n: x for n, x in made.options.items() if n != "mask_padding"}
    name = made.name + ("-per_head" if per_head else "") + ("-equal" if equal else "")
    return dataclasses.replace(
        made,
        name=name,
        options=options | {"per_head": per_head},
        sizes=made.sizes | {"equal": equal},
    )


def make(case, dtype, device="cpu", seed=0):
    """q k."""
    tensors = attention.make(case, dtype, device, seed)
    if case.sizes["equal"]:
        tensors = {n: x[:, :1, :1].round().expand_as(x).contiguous() for n, x in tensors.items()}
    return {"q": tensors["q"], "k": tensors["k"]}


def run(tensors, case, backend):
    q, k = tensors["q"], tensors["k"]
    graph = hw.bilevel_route(q, k, backend=backend, **case.options)
    return {"graph": one_hot(graph, grid_of(k, case.sizes["kv_regions"]).regions)}


def operators(tensors, case):
    """The torch operators with the arguments this case gives them, for opcheck."""
    q, k, own, other, *rest = attention.module._checked_route(
        tensors["q"], tensors["k"], **DEFAULTS | case.options, backend="cpu"
    )
    arguments = (q, k, *own, *other, *rest[:-1], "auto")
    return [(torch.ops.headworks.bilevel_route.default, arguments)]


DEFAULTS = {"num_regions": (7, 7), "kv_num_regions": None, "per_head": False}

CASES = (
    *(case(topk=t, per_head=p) for t in (1, 4, 49) for p in (True, False)),
    *(
        case(Y=y, X=x, B=2, topk=9, per_head=p)
        for y, x in ((17, 25), (7, 13))
        for p in (True, False)
    ),
    *(case(Y=8, X=8, regions=(4, 4), topk=t, equal=True) for t in (1, 5, 16)),
    *(
        case(Y=9, X=10, regions=(3, 3), topk=3, H=h, Hq=hq, D=d, per_head=p)
        for hq, h, d in ((4, 2, 1), (6, 1, 40), (3, 3, 100))
        for p in (True, False)
    ),
    case(Y=12, X=14, regions=(3, 2), Yk=9, Xk=5, topk=3),
    case(Y=12, X=12, regions=(3, 3), kv_regions=(5, 4), topk=7),
    case(Y=1, X=1, regions=(1, 1), topk=1),
    *(case(B=b, H=h, per_head=True) for b, h in ((0, 2), (2, 0))),
    case(Y=64, X=64, regions=(16, 16), topk=8),
)

EMULATOR_CASES = (
    case(Y=9, X=10, regions=(4, 4), topk=5, Hq=4, D=16),
    case(Y=9, X=10, regions=(4, 4), topk=5, H=1, D=8, per_head=True),
    case(Y=4, X=4, regions=(4, 4), topk=5, H=1, D=8, equal=True),
    case(Y=9, X=8, regions=(2, 3), Yk=7, Xk=5, topk=2, H=1, D=8),
    case(B=0, H=1, D=8),
    # Regions of q that one tile of scores holds, of k two.
    case(Y=6, X=8, regions=(2, 2), Yk=10, Xk=8, kv_regions=(5, 4), topk=7, H=1, D=8),
    # Channels of a token of k that fill no vector, of q one and a part.
    *(case(Y=9, X=10, regions=(4, 4), topk=5, H=1, Hq=3, D=4, per_head=p) for p in (False, True)),
    *(
        case(**choice)
        for choice in pairwise(
            image=(
                {"Y": 6, "X": 8, "regions": (2, 2)},
                {"Y": 9, "X": 7, "regions": (4, 3)},
                {"Y": 6, "X": 7, "Yk": 7, "Xk": 5, "regions": (3, 2)},
                {"Y": 5, "X": 4, "regions": (2, 2), "kv_regions": (3, 2)},
            ),
            topk=(1, 3, 4),
            B=(1, 2),
            heads=({"H": 1}, {"H": 2, "Hq": 4}, {"H": 1, "Hq": 3}),
            per_head=(False, True),
            D=(1, 8, 40),
        )
    ),
)

SAMPLE_CASES = (
    case(Y=15, X=13, topk=6, B=3, H=1, Hq=2, D=24),
    case(Y=12, X=14, regions=(3, 3), Yk=8, Xk=9, topk=4, B=2, per_head=True),
)

BENCHMARK_CASES = tuple(
    case(Y=side, X=side, topk=topk, B=4, H=h, D=32)
    for side, topk, h in ((56, 1, 2), (28, 4, 4), (14, 16, 8))
)

SPEC = Spec(
    name="bilevel_route",
    function=hw.bilevel_route,
    make=make,
    run=run,
    differentiable=(),
    cases=CASES,
    emulator_cases=EMULATOR_CASES,
    benchmark_cases=BENCHMARK_CASES,
    sample_cases=SAMPLE_CASES,
    dtypes={"cpu": EVERY_DTYPE, "simt": EVERY_DTYPE},
    operators=operators,
)
