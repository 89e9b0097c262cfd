# SPDX-License-Identifier: Apache-2.0
"""Cases of hw.attention_lse, with the inputs of attention's."""

from __future__ import annotations

import torch

import headworks as hw
from headworks.ops.attention import _native as native
from headworks.ops.attention._score import score_of
from headworks.testing import EVERY_DTYPE, HALF, Spec

from . import attention
from .attention_cases import LENGTHS, SOFTMAXES, case

SCORE = ("q", "k", *attention.SCORE_TENSORS)


def make(case, dtype, device="cpu", seed=0):
    tensors = attention.make(case, dtype, device, seed)
    return {n: tensors[n] for n in SCORE if n in tensors}


def run(tensors, case, backend):
    options = attention.score_options(tensors, case) | dict(case.options)
    return {"o": hw.attention_lse(tensors["q"], tensors["k"], backend=backend, **options)}


def operators(tensors, case):
    options = attention.score_options(tensors, case) | dict(case.options)
    score = score_of("attention_lse", tensors["q"], tensors["k"], **options)
    inputs = native.FORWARD.tensors(score.tensors)
    numbers = native.FORWARD.numbers(score.numbers, skip_dead=False)
    given = (*inputs, *numbers, *native.Want(row=True)[:-1], "auto")
    return [(torch.ops.headworks.attention_fwd.default, given)]


CASES = (
    *(
        case(Sq=sq, Sk=sk, causal=c)
        for sq, sk in ((65, 65), (130, 63), (1, 130), (0, 3), (3, 0))
        for c in (True, False)
    ),
    *(
        case(Sq=66, Hq=4, weights=(a, None), softcap=2.0, bias="11qk", hidden=0.3, key_gain="11k")
        for a in SOFTMAXES
    ),
    case(Sq=66, B=2, key_bias="1hk", temperature="bq1", window=(9, 3)),
    case(lengths=LENGTHS, causal=True),
    case(spread=20.0, label="large scores"),
)

SAMPLE_CASES = (
    case(
        Sq=70,
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
    case(Sq=300, Sk=330, B=2),
    case(lengths=LENGTHS, H=1),
)

SPEC = Spec(
    name="attention_lse",
    function=hw.attention_lse,
    make=make,
    run=run,
    differentiable=("q", "k", *attention.SCORE_GRADIENTS),
    cases=CASES,
    emulator_cases=(case(Sq=70, H=1, causal=True), case(Sq=20, Sk=40, H=1, bias="11qk")),
    benchmark_cases=(case(Sq=4096, H=8, D=64, Dv=64),),
    sample_cases=SAMPLE_CASES,
    dtypes={"cpu": EVERY_DTYPE, "simt": EVERY_DTYPE, "sm80": HALF},
    operators=operators,
)
