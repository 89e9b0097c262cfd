# SPDX-License-Identifier: Apache-2.0
"""Cases of hw.column_stats: those of attention with kind, reduce_heads, and row weights.

`weight`: the shape of row_weight ("1" or a symbol per dimension), "" for none.
"""

from __future__ import annotations

import torch

import headworks as hw
from headworks.ops.attention._checks import broadcast
from headworks.ops.attention._score import score_of
from headworks.testing import EVERY_DTYPE, HALF, Spec

from . import attention
from .attention_cases import LENGTHS, WEIGHTS
from .attention_lse import SCORE


def case(*sizes, kind="sum", weight="", **options):
    made = attention.case(*sizes, kind=kind, **options)
    words = f"{made.name}-weight_{weight}" if weight else made.name
    return type(made)(words, {**made.sizes, "weight": weight}, made.options, made.floor)


def make(case, dtype, device="cpu", seed=0):
    n = case.sizes
    tensors = attention.make(case, dtype, device, seed)
    tensors = {name: tensors[name] for name in SCORE if name in tensors}
    if n["weight"]:
        generator = torch.Generator().manual_seed(seed + 1)
        symbols = zip(n["weight"], ("B", "Hq", "Sq"), strict=True)
        shape = [1 if c == "1" else n[s] for c, s in symbols]
        r = torch.randn(shape, generator=generator, dtype=torch.float64)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        tensors["row_weight"] = r.to(device, wide)
    return tensors


def run(tensors, case, backend):
    options = attention.score_options(tensors, case) | dict(case.options)
    result = hw.column_stats(
        tensors["q"], tensors["k"], row_weight=tensors.get("row_weight"), backend=backend, **options
    )
    return {"o": result}


def operators(tensors, case):
    options = attention.score_options(tensors, case) | dict(case.options)
    for name in ("kind", "reduce_heads"):
        options.pop(name, None)
    q, k, r = tensors["q"], tensors["k"], tensors.get("row_weight")
    score = score_of("column_stats", q, k, **options)
    row = hw.attention_lse(q, k, **options) if score.activation < 2 else None
    r = None if r is None else broadcast("", "", r, "", score.row_shape, 3, q)
    given = (*score.tensors, None, row, r, *score.numbers, True, True, "auto")
    return [(torch.ops.headworks.attention_columns.default, given)]


KINDS = ("sum", "mean", "max")

CASES = (
    *(
        case(sq, sk, causal=c, kind=kind)
        for sq, sk in ((65, 65), (130, 63), (40, 66), (0, 3), (3, 0))
        for c in (True, False)
        for kind in KINDS
    ),
    *(case(66, D=d, kind=kind) for d in (1, 40, 128) for kind in KINDS),
    *(case(66, B=2, H=2, Hq=4, causal=True, kind=kind, reduce_heads=True) for kind in KINDS),
    *(
        case(66, B=2, H=1, Hq=3, kind=kind, weight=r, window=(9, 3))
        for kind in KINDS[:2]
        for r in ("bhq", "11q")
    ),
    *(
        case(
            50,
            66,
            B=2,
            Hq=4,
            weights=w,
            softcap=2.0,
            bias="11qk",
            key_bias="1hk",
            key_gain="11k",
            gain_rows=(20, None),
            temperature="bqh",
            kind=kind,
        )
        for w in WEIGHTS
        for kind in ("sum", "max")
    ),
    *(case(66, bias="11qk", hidden=0.4, kind=kind) for kind in KINDS),
    *(
        case(lengths=LENGTHS, causal=c, window=w, kind=kind)
        for c, w in ((True, None), (False, (5, 2)))
        for kind in KINDS
    ),
    case(66, spread=20.0, label="large scores"),
)

SAMPLE_CASES = (
    case(
        70,
        B=3,
        H=1,
        Hq=2,
        causal=True,
        bias="b1qk",
        key_bias="bhk",
        key_gain="b1k",
        temperature="bqh",
        softcap=3.0,
        weight="bhq",
    ),
    case(300, 330, B=2, kind="mean", causal=True, reduce_heads=True),
    case(70, 90, B=2, weights=("relu", "length")),
    case(lengths=LENGTHS, H=1, kind="mean"),
)

SPEC = Spec(
    name="column_stats",
    function=hw.column_stats,
    make=make,
    run=run,
    differentiable=("q", "k", "row_weight", *attention.SCORE_GRADIENTS),
    cases=CASES,
    emulator_cases=(
        case(70, H=1, causal=True),
        case(20, 40, H=1, Hq=2, kind="mean", weight="bhq"),
        case(lengths=((0, 7, 66, 1), (3, 9, 66, 0)), H=1, D=8, kind="sum"),
        case(40, 66, H=1, kind="max", causal=True),
    ),
    benchmark_cases=tuple(
        case(s, H=8, D=64, Dv=64, causal=True, kind="mean") for s in (1024, 4096)
    ),
    sample_cases=SAMPLE_CASES,
    dtypes={"cpu": EVERY_DTYPE, "simt": EVERY_DTYPE, "sm80": HALF},
    operators=operators,
)
