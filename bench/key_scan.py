# SPDX-License-Identifier: Apache-2.0
"""The suite of hw.key_scan. A scan moves bytes and little else, so copy bandwidth is its roof."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import headworks as hw
from bench import peers
from bench.parts import call_of, exponent
from bench.suite import Case, Result, Target
from bench.timing import Call
from headworks.cost import cost

SHAPE = {"B": 1, "H": 8, "Dv": 64}
GROWTH = tuple(1024 << i for i in range(7))
# From 16384 tokens on the output exceeds 32 MiB and the C library takes fresh pages from the system
# for every call, which costs several times what the scan does: another regime, not growth.
GROWTH_CPU = GROWTH[:4]


def cases(device: str, quick: bool) -> list[Case]:
    """Forward, forward + backward, growth."""
    lengths = (1024, 4096) if quick else (1024, 4096, 16384)
    return [
        *(_case(device, "forward", s, quick) for s in lengths),
        *(_case(device, "train", s, quick) for s in lengths),
        _growth_case(device, GROWTH_CPU if quick or device == "cpu" else GROWTH),
    ]


def targets(results: Mapping[str, Result], device: str) -> list[Target]:
    """Linear growth; the other figures have no threshold."""
    return [Target("growth exponent", exponent(results), 1.05, "", at_most=True)]


def inputs(s: int, device: str, *, grad: bool = False) -> tuple[Tensor, Tensor]:
    """Random scores [B, S, H] and values [B, S, H, Dv]."""
    generator = torch.Generator(device).manual_seed(0)
    size = (SHAPE["B"], s, SHAPE["H"])
    scores = torch.randn(size, generator=generator, device=device)
    values = torch.randn((*size, SHAPE["Dv"]), generator=generator, device=device)
    return scores.requires_grad_(grad), values.requires_grad_(grad)


def _case(device: str, mode: str, s: int, quick: bool) -> Case:
    def contenders() -> dict[str, Call]:
        arguments = inputs(s, device, grad=mode == "train")
        functions = {"headworks": hw.key_scan} | peers.key_scan_peers(compiled=not quick)
        return {name: call_of(function, arguments, mode) for name, function in functions.items()}

    total = cost("key_scan", **SHAPE, S=s)
    if mode == "train":
        total += cost("key_scan", **SHAPE, S=s, backward=True)
    facts = {**SHAPE, "S": s, "dtype": "float32", "mode": mode}
    return Case(f"{mode} S {s} fp32", facts, contenders, total, memory=s == 4096)


def _growth_case(device: str, sizes: tuple[int, ...]) -> Case:
    def contenders() -> dict[str, Call]:
        return {str(s): call_of(hw.key_scan, inputs(s, device), "forward") for s in sizes}

    return Case("growth", {**SHAPE, "dtype": "float32", "mode": "forward"}, contenders)
