# SPDX-License-Identifier: Apache-2.0
"""hw.attention: inputs, which all its companions share, and calls. Cases: attention_cases.py."""

from __future__ import annotations

import torch

import headworks as hw
from headworks.ops.attention import _native as native
from headworks.ops.attention import attention as module
from headworks.ops.attention._score import score_of
from headworks.testing import EVERY_DTYPE, HALF, Spec

from .attention_cases import (
    BENCHMARK_CASES,
    CASES,
    EMULATOR_CASES,
    SAMPLE_CASES,
    SCORE_GRADIENTS,
    SCORE_TENSORS,
    STATISTICS,
)
from .attention_cases import case as case


def make(case, dtype, device="cpu", seed=0):
    """q k v and the optional tensors that the case has. Where the score has a kink at 0, the row in
    the middle is there."""
    n = case.sizes
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def draw_as(spec, symbols):
        shape = [1 if c == "1" else n[s] for c, s in zip(spec, symbols, strict=True)]
        return draw(*shape)

    q, k = draw(n["B"], n["Sq"], n["Hq"], n["D"]), draw(n["B"], n["Sk"], n["H"], n["D"])
    if n["spread"] != 1.0:  # few digits, so that large scores are exact in every dtype
        q, k = (n["spread"] * q).round(), (4 * k).round() / 4
    if n["key_gain"] or case.options.get("activation", "softmax") != "softmax":
        q[:, n["Sq"] // 2 :][:, :1] = 0
    tensors = {"q": q.to(device, dtype), "k": k.to(device, dtype)}
    if n["shared"]:
        tensors = {name: x[:1].expand_as(x) for name, x in tensors.items()}
    tensors["v"] = draw(n["B"], n["Sk"], n["H"], n["Dv"]).to(device, dtype)
    if n["bias"]:
        bias = draw_as(n["bias"], ("B", "Hq", "Sq", "Sk"))
        if n["hidden"]:
            uniform = torch.rand(bias.shape, generator=generator, dtype=torch.float64)
            bias[uniform < n["hidden"]] = -torch.inf
            bias[:, :, 3:4] = -torch.inf
        tensors["bias"] = bias.to(device, dtype)
    for name in ("key_bias", "key_gain"):
        if n[name]:
            tensors[name] = draw_as(n[name], ("B", "Hq", "Sk")).to(device, wide)
    if n["temperature"]:
        tau = draw_as(n["temperature"], ("B", "Sq", "Hq"))
        tensors["row_temperature"] = tau.to(device, wide)
    if n["gate"] is not None:
        tensors["head_gate"] = _gate(draw, generator, n).to(device, wide)
    if n["mix"]:
        u = torch.tensor([0.3, 0.0, 1.0], dtype=torch.float64)
        u = u.repeat(n["B"] * n["Hq"])[: n["B"] * n["Hq"]].view(n["B"], n["Hq"])
        tensors["identity_mix"] = (u if n["mix"] == "bh" else u[0]).to(device, wide)
    if "mass" in n["aux"]:
        index = torch.randint(n["Sk"], (n["B"], 5), generator=generator) if n["Sk"] else None
        tensors["mass"] = torch.zeros(n["B"], 0, dtype=torch.int64) if index is None else index
        tensors["mass"] = tensors["mass"].to(device)
    if n["lengths"] is not None:
        for name, lengths in zip(("cu_seqlens_q", "cu_seqlens_k"), n["lengths"], strict=True):
            tensors[name] = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    return tensors


def _gate(draw, generator, n):
    """Single zeros, and from row 8 on whole heads of 64 rows."""
    gate = draw(n["B"], n["Sq"], n["Hq"])
    gate[torch.rand(gate.shape, generator=generator, dtype=torch.float64) < n["gate"]] = 0
    gate[:, 8:72, ::2] = 0
    return gate


def score_options(tensors, case):
    """Score tensors and numbers as keyword arguments; the longest lengths where there is a GPU."""
    options = {n: tensors[n] for n in SCORE_TENSORS if n in tensors}
    if case.sizes["lengths"] is not None:
        for which, lengths in zip("qk", case.sizes["lengths"], strict=True):
            options[f"max_seqlen_{which}"] = max((0, *lengths))
    return options


def arguments(tensors, case):
    """Keyword arguments of hw.attention."""
    options = score_options(tensors, case) | dict(case.options)
    options |= {n: tensors[n] for n in ("head_gate", "identity_mix") if n in tensors}
    asked = case.sizes["aux"]
    if asked:
        flags = {n: n in asked for n in STATISTICS[:4]}
        options["return_aux"] = hw.Aux(**flags, mass=tensors.get("mass"))
    return options


def run(tensors, case, backend):
    q, k, v = (tensors[n] for n in ("q", "k", "v"))
    result = hw.attention(q, k, v, backend=backend, **arguments(tensors, case))
    if not case.sizes["aux"]:
        return {"o": result}
    o, aux = result
    return {"o": o} | {n: x for n, x in aux._asdict().items() if x is not None}


def operators(tensors, case):
    """The torch operators with the arguments this case gives them, for opcheck."""
    options = arguments(tensors, case)
    named = [options.pop(n, None) for n in ("head_gate", "identity_mix", "return_aux")]
    q, k, v = (tensors[n] for n in ("q", "k", "v"))
    score = score_of("attention", q, k, **options)
    gate, mix, aux, mass = module._checked_rest(score, *named)
    want = True, score.has_row_statistic, aux.entropy, aux.p_max, aux.sq_norm
    forward = torch.ops.headworks.attention_fwd.default
    inputs = native.FORWARD.tensors(
        score.tensors, v=v, head_gate=gate, identity_mix=mix, mass_keys=mass
    )
    numbers = native.FORWARD.numbers(score.numbers, skip_dead=False)
    given = (*inputs, *numbers, *want, "auto")
    made = native.Forward(*forward(*given))
    delta = torch.randn(score.row_shape, dtype=native.ACCUMULATION[q.dtype])
    options = {n: getattr(score, n, None) is not None for n in native.WantGrad._fields}
    grads = native.WantGrad(**options | {"v": True})
    row = made.row if score.has_row_statistic else None
    backward = torch.ops.headworks.attention_bwd.default
    inputs = native.BACKWARD.tensors(
        score.tensors, v=v, d_w=torch.randn_like(made.w), row=row, delta=delta
    )
    given_back = (*inputs, *score.numbers, *grads, "auto")
    return [(forward, given), (backward, given_back)]


SPEC = Spec(
    name="attention",
    function=hw.attention,
    make=make,
    run=run,
    differentiable=(
        "q",
        "k",
        "v",
        *SCORE_GRADIENTS,
        "head_gate",
        "identity_mix",
    ),
    cases=CASES,
    emulator_cases=EMULATOR_CASES,
    benchmark_cases=BENCHMARK_CASES,
    sample_cases=SAMPLE_CASES,
    dtypes={"cpu": EVERY_DTYPE, "simt": EVERY_DTYPE, "sm80": HALF},
    operators=operators,
)
