# SPDX-License-Identifier: Apache-2.0
"""Cases of hw.attention_probs: those of attention with `chosen`, keys, rows or offsets."""

from __future__ import annotations

import torch

import headworks as hw
from headworks.ops.attention._score import score_of
from headworks.testing import EVERY_DTYPE, Spec

from . import attention
from .attention_cases import LENGTHS, SAME, WEIGHTS
from .attention_lse import SCORE

CHOICES = ("keys", "rows", "offsets")


def case(*sizes, chosen="keys", **options):
    made = attention.case(*sizes, **options)
    return type(made)(f"{made.name}-{chosen}", {**made.sizes, "chosen": chosen}, made.options)


def make(case, dtype, device="cpu", seed=0):
    n = case.sizes
    tensors = attention.make(case, dtype, device, seed)
    tensors = {name: tensors[name] for name in SCORE if name in tensors}
    generator = torch.Generator().manual_seed(seed + 1)
    if n["chosen"] == "offsets":
        index = torch.tensor([0, -1, 3, -n["Sk"], n["Sq"]])
    else:
        size = n["Sk"] if n["chosen"] == "keys" else n["Sq"]
        index = torch.randint(max(size, 1), (n["B"], 4 if size else 0), generator=generator)
    tensors[n["chosen"]] = index.to(device)
    return tensors


def run(tensors, case, backend):
    options = attention.score_options(tensors, case) | dict(case.options)
    options |= {n: tensors[n] for n in CHOICES if n in tensors}
    return {"o": hw.attention_probs(tensors["q"], tensors["k"], backend=backend, **options)}


def operators(tensors, case):
    options = attention.score_options(tensors, case) | dict(case.options)
    q, k = tensors["q"], tensors["k"]
    score = score_of("attention_probs", q, k, **options)
    row = hw.attention_lse(q, k, **options) if score.activation < 2 else None
    chosen = [tensors.get(n) for n in CHOICES]
    given = (*score.tensors, row, *chosen, *score.numbers, "auto")
    return [(torch.ops.headworks.attention_probs.default, given)]


CASES = (
    *(case(66, 70, B=2, Hq=4, sink="bh", chosen=x) for x in CHOICES),
    *(
        case(sq, sk, causal=c, chosen=x)
        for sq, sk in ((65, 65), (130, 63), (40, 66), (0, 3), (3, 0))
        for c in (True, False)
        for x in CHOICES
    ),
    *(
        case(
            50,
            66,
            B=2,
            Hq=4,
            D=40,
            weights=w,
            softcap=2.0,
            bias="11qk",
            key_bias="1hk",
            key_gain="11k",
            gain_rows=(20, None),
            temperature="bqh",
            chosen=x,
        )
        for w in WEIGHTS
        for x in CHOICES
    ),
    *(case(lengths=LENGTHS, causal=True, chosen=x) for x in CHOICES),
    *(case(66, bias="11qk", hidden=0.4, chosen=x) for x in CHOICES),
)

FULL = {"bias": "b1qk", "key_bias": "bhk", "key_gain": "b1k", "temperature": "bqh", "softcap": 3.0}

SPEC = Spec(
    name="attention_probs",
    function=hw.attention_probs,
    make=make,
    run=run,
    differentiable=(),
    cases=CASES,
    emulator_cases=(
        case(20, 40, H=1, Hq=2, bias="11qk"),
        case(40, 20, H=1, causal=True, chosen="rows"),
        case(lengths=((0, 7, 20, 1), (3, 9, 20, 0)), H=1, D=8, chosen="offsets"),
        case(lengths=((0, 4, 23, 1), (3, 9, 20, 0)), H=1, D=8, chosen="rows"),
        case(20, 70, B=2, H=1, Hq=2, D=8, chosen="rows"),
        case(20, 33, B=2, H=2, Hq=4, D=8, gain_rows=(5, 15), **FULL),
        case(20, 33, H=1, D=8, spread=20.0, **SAME),
    ),
    benchmark_cases=(case(4096, H=8, D=64, causal=True),),
    sample_cases=(
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
        ),
        case(70, 90, B=2, chosen="rows"),
        case(lengths=LENGTHS, H=1, chosen="offsets", causal=True),
    ),
    dtypes={"cpu": EVERY_DTYPE, "simt": EVERY_DTYPE},
    operators=operators,
)
