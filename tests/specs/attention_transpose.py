# SPDX-License-Identifier: Apache-2.0
"""Cases of hw.attention_transpose: those of attention, with x [B, Sq, Hq, Dv] instead of v.

`lse`: whether it is handed over ("given") or computed inside.
"""

from __future__ import annotations

import torch

import headworks as hw
from headworks.ops.attention._score import score_of
from headworks.testing import EVERY_DTYPE, HALF, Spec

from . import attention
from .attention_cases import LENGTHS, SAME, WEIGHTS
from .attention_lse import SCORE


def case(*sizes, lse="inside", **options):
    made = attention.case(*sizes, **options)
    words = f"{made.name}-lse_{lse}"
    return type(made)(words, {**made.sizes, "lse": lse}, made.options, made.floor)


def make(case, dtype, device="cpu", seed=0):
    n = case.sizes
    tensors = attention.make(case, dtype, device, seed)
    tensors = {name: tensors[name] for name in SCORE if name in tensors}
    generator = torch.Generator().manual_seed(seed + 1)
    shape = (n["B"], n["Sq"], n["Hq"], n["Dv"])
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
    return {"q": tensors.pop("q"), "k": tensors.pop("k"), "x": x, **tensors}


def run(tensors, case, backend):
    q, k, x = (tensors[n] for n in ("q", "k", "x"))
    options = attention.score_options(tensors, case) | dict(case.options)
    lse = None
    if case.sizes["lse"] == "given":
        with torch.no_grad():
            lse = hw.attention_lse(q, k, backend=backend, **options)
    return {"o": hw.attention_transpose(q, k, x, lse=lse, backend=backend, **options)}


def operators(tensors, case):
    options = attention.score_options(tensors, case) | dict(case.options)
    q, k = tensors["q"], tensors["k"]
    score = score_of("attention_transpose", q, k, **options)
    row = hw.attention_lse(q, k, **options) if score.activation < 2 else None
    given = (*score.tensors, tensors["x"], row, None, *score.numbers, False, False, "auto")
    return [(torch.ops.headworks.attention_columns.default, given)]


CASES = (
    *(
        case(sq, sk, causal=c, Dv=20)
        for sq, sk in ((65, 65), (130, 63), (1, 130), (0, 3), (3, 0))
        for c in (True, False)
    ),
    *(case(66, D=d, Dv=dv) for d, dv in ((1, 1), (40, 8), (64, 64), (96, 0), (128, 128))),
    *(case(66, B=2, H=h, Hq=hq, causal=True, lse="given") for hq, h in ((4, 2), (3, 1))),
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
        )
        for w in WEIGHTS
    ),
    case(66, bias="11qk", hidden=0.4, lse="given"),
    case(66, window=(9, 4)),
    case(lengths=LENGTHS, causal=True),
    case(66, spread=12.0, lse="given", label="large scores"),
)

SAMPLE_CASES = (
    case(
        70,
        B=3,
        H=1,
        Hq=2,
        Dv=20,
        causal=True,
        bias="b1qk",
        key_bias="bhk",
        key_gain="b1k",
        temperature="bqh",
        softcap=3.0,
    ),
    case(300, 362, B=2, causal=True),
    case(70, 90, B=2, weights=("relu", "length")),
    case(lengths=LENGTHS, H=1),
)

SPEC = Spec(
    name="attention_transpose",
    function=hw.attention_transpose,
    make=make,
    run=run,
    differentiable=("q", "k", "x", *attention.SCORE_GRADIENTS),
    cases=CASES,
    emulator_cases=(
        case(70, H=1, Dv=16, causal=True),
        case(20, 40, H=1, Hq=2, bias="11qk", lse="given"),
        case(20, 33, B=2, H=1, Hq=2, D=8, Dv=150, lse="given"),
        case(lengths=((0, 7, 66, 1), (3, 9, 66, 0)), H=1, D=8, Dv=8),
        case(20, 33, H=1, D=8, Dv=8, spread=20.0, **SAME),
        *(case(20, 33, H=1, Hq=2, D=200, Dv=dv, key_bias=b) for dv, b in ((8, None), (5, "11k"))),
    ),
    benchmark_cases=tuple(
        case(s, H=8, D=64, Dv=64, lse=o) for s in (1024, 4096) for o in ("inside", "given")
    ),
    sample_cases=SAMPLE_CASES,
    dtypes={"cpu": EVERY_DTYPE, "simt": EVERY_DTYPE, "sm80": HALF},
    operators=operators,
)
