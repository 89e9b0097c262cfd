# SPDX-License-Identifier: Apache-2.0
"""The suite of hw.window_attention: the attention of EfficientViT's stages, given q, k and v.

M0 and M5 at 224 pixels: maps of 14 x 14, 7 x 7 and 4 x 4 tokens in windows of 7 x 7, keys of width
16, values of the head's width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import headworks as hw
from bench.parts import call_of, cost_of, empty_op, no_grad
from bench.suite import Case, Result, Target
from bench.timing import Call
from bench.window_peers import window_peers

WINDOW, D = 7, 16
BATCH = {"cpu": 64, "cuda": 256}
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
# By name: side of the map, heads, Dv.
STAGES = {
    "M0 stage 1": (14, 4, 16),
    "M0 stage 3": (4, 4, 48),
    "M5 stage 1": (14, 3, 64),
    "M5 stage 2": (7, 3, 96),
}
PEERS = ("eager", "sdpa", "compiled, eager", "compiled, sdpa")
FORWARD, TRAIN = 1.5, 1.5  # times the best peer


def cases(device: str, quick: bool) -> list[Case]:
    """Forward, forward + backward, overhead."""
    stages = list(STAGES)[:1] if quick else STAGES
    found = [_case(device, mode, s, quick) for mode in ("forward", "train") for s in stages]
    return [*found, _overhead_case()]


def gpu_cases(device: str, tiny: bool) -> list[Case]:
    """Every stage; one in a dry run."""
    stages = list(STAGES)[:1] if tiny else STAGES
    return [_case(device, mode, s, tiny) for mode in ("forward", "train") for s in stages]


def targets(results: Mapping[str, Result], device: str) -> list[Target]:
    """Times the best peer; set for a CPU."""
    if device == "cuda":
        return []
    return [
        Target(f"{mode} {stage}: best peer", _speedup(results, f"{mode} {stage}"), least, "x")
        for mode, least in (("forward", FORWARD), ("train", TRAIN))
        for stage in STAGES
    ]


def _speedup(results: Mapping[str, Result], name: str) -> float | None:
    return results[name].speedup(*PEERS) if name in results else None


def inputs(device: str, stage: str, *, grad: bool = False) -> tuple[Tensor, ...]:
    """Random q, k [B, Y, X, H, 16], v [B, Y, X, H, Dv], table [H, 49]."""
    side, heads, value_dim = STAGES[stage]
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        x = torch.randn(size, generator=generator, device=device).to(DTYPE[device])
        return x.requires_grad_(grad)

    image = BATCH[device], side, side, heads
    return draw(*image, D), draw(*image, D), draw(*image, value_dim), draw(heads, WINDOW**2)


def _case(device: str, mode: str, stage: str, quick: bool) -> Case:
    def contenders() -> dict[str, Call]:
        tensors = inputs(device, stage, grad=mode == "train")

        def ours(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
            return hw.window_attention(q, k, v, window=WINDOW, bias_table=table)

        functions = {"headworks": ours, **window_peers(WINDOW, compiled=not quick)}
        return {name: call_of(f, tensors, mode) for name, f in functions.items()}

    side, heads, value_dim = STAGES[stage]
    shape = {"B": BATCH[device], "Y": side, "X": side, "H": heads, "D": D, "Dv": value_dim}
    total = cost_of("window_attention", mode, **shape, window=WINDOW, dtype=DTYPE[device])
    dtype = str(DTYPE[device]).removeprefix("torch.")
    facts = {**shape, "window": WINDOW, "dtype": dtype, "mode": mode}
    return Case(f"{mode} {stage}", facts, contenders, total, memory=True)


def _overhead_case() -> Case:
    """Host time of a call with next to nothing to compute, beside an operator that does nothing."""

    def contenders() -> dict[str, Call]:
        plain = torch.randn(3, 1, 1, 1, 1, 16)
        learnt = plain.clone().requires_grad_().unbind()
        return {
            "empty op": no_grad(empty_op(), *plain),
            "headworks": no_grad(hw.window_attention, *plain, window=WINDOW),
            "headworks, grad": lambda: hw.window_attention(*learnt, window=WINDOW),
        }

    return Case("overhead", {"S": 1, "D": 16, "dtype": "float32", "mode": "overhead"}, contenders)
