# SPDX-License-Identifier: Apache-2.0
"""The suite of hw.bilevel_route and hw.bilevel_routing_attention: BiFormer's first three stages.

Ours and the peers attend by the same graph; the cases "routed" choose it within the timed call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import headworks as hw
from bench import predictions
from bench import routing_peers as peers
from bench.parts import call_of, cost_of, empty_op, exponent, no_grad, speedup
from bench.suite import Case, Result, Target
from bench.timing import Call
from headworks.cost import cost

REGIONS = (7, 7)
D = 32
STAGES = ((56, 1, 2), (28, 4, 4), (14, 16, 8))  # side of the image, topk, heads
BATCH = {"cpu": 4, "cuda": 128}
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
# At least so many times faster than the best peer, by side.
FASTER = {"forward": {56: 2.0, 28: 2.0, 14: 2.0}, "train": {56: 6.0, 28: 4.0, 14: 3.0}}
GROWTH = (32, 64, 128, 256)  # sides, in regions of 8 x 8


def cases(device: str, quick: bool) -> list[Case]:
    """Attention by a given graph, routing, both in one, growth, overhead."""
    stages = STAGES[1:2] if quick else STAGES
    modes = ("forward", "train")
    return [
        *(_attend_case(device, mode, *stage, quick) for mode in modes for stage in stages),
        *(_route_case(device, *stage, quick) for stage in stages),
        *(_routed_case(device, mode, *stage, quick) for mode in modes for stage in stages),
        _growth_case(device),
        _overhead_case(),
    ]


def gpu_cases(device: str, tiny: bool) -> list[Case]:
    """The stages, attention by a given graph with routing beside it, and both in one."""
    stages = STAGES[2:] if tiny else STAGES
    modes = ("forward", "train")
    return [
        *(_attend_case(device, mode, *stage, tiny) for mode in modes for stage in stages),
        *(_route_case(device, *stage, tiny) for stage in stages),
        *(_routed_case(device, mode, *stages[0], tiny) for mode in modes),
    ]


def targets(results: Mapping[str, Result], device: str) -> list[Target]:
    """The thresholds of the design, set for a CPU; on a GPU the predictions."""
    if device == "cuda":
        return predictions.targets("bilevel_routing", results)
    rows = []
    for mode, by_side in FASTER.items():
        for side, topk, _ in STAGES:
            name = f"{mode} {side}x{side} topk {topk}"
            official = _over(results, name, lambda peer: "indexed" not in peer)
            rows.append(Target(f"{name}: official form", official, by_side[side]))
            rows.append(Target(f"{name}: any torch form", _over(results, name), 1.0))
    rows.append(Target("growth exponent, regions of 64", exponent(results), 1.05, "", True))
    return rows


def inputs(
    batch: int, side: int, heads: int, dtype: torch.dtype, device: str, *, grad: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v [B, side, side, H, D]."""
    generator = torch.Generator(device).manual_seed(0)

    def tensor() -> Tensor:
        size = (batch, side, side, heads, D)
        x = torch.randn(size, generator=generator, device=device).to(dtype)
        return x.requires_grad_(grad)

    return tensor(), tensor(), tensor()


def _over(
    results: Mapping[str, Result], name: str, judged: Callable[[str], bool] = lambda peer: True
) -> float | None:
    """How many times faster than the best of the peers that are judged."""
    if name not in results:
        return None
    peers = (n for n in results[name].seconds if n != "headworks" and judged(n))
    return speedup(results, name, *peers)


def _shape(device: str, side: int, topk: int, heads: int) -> dict[str, Any]:
    image = {"B": BATCH[device], "Y": side, "X": side, "H": heads, "D": D}
    return {**image, "num_regions": REGIONS, "topk": topk}


def _facts(shape: Mapping[str, Any], device: str, mode: str) -> dict[str, Any]:
    return {**shape, "dtype": str(DTYPE[device]).removeprefix("torch."), "mode": mode}


def _attend_case(device: str, mode: str, side: int, topk: int, heads: int, quick: bool) -> Case:
    dtype = DTYPE[device]

    def contenders() -> dict[str, Call]:
        qkv = inputs(BATCH[device], side, heads, dtype, device, grad=mode == "train")
        graph = peers.bilevel_graph(REGIONS, topk, *qkv[:2])

        def ours(q: Tensor, k: Tensor, v: Tensor, graph: Tensor) -> Any:
            return hw.bilevel_routing_attention(q, k, v, num_regions=REGIONS, graph=graph)

        functions = {"headworks": ours, **peers.bilevel_peers(REGIONS, compiled=not quick)}
        return {name: call_of(f, (*qkv, graph), mode) for name, f in functions.items()}

    shape = _shape(device, side, topk, heads)
    total = cost_of("bilevel_routing_attention", mode, **shape, dtype=dtype)
    name = f"{mode} {side}x{side} topk {topk}"
    return Case(name, _facts(shape, device, mode), contenders, total, memory=True)


def _route_case(device: str, side: int, topk: int, heads: int, quick: bool) -> Case:
    dtype = DTYPE[device]

    def contenders() -> dict[str, Call]:
        q, k, _ = inputs(BATCH[device], side, heads, dtype, device)

        def ours(q: Tensor, k: Tensor) -> Tensor:
            return hw.bilevel_route(q, k, num_regions=REGIONS, topk=topk)

        theirs = peers.bilevel_route_peers(REGIONS, topk, compiled=not quick)
        functions = {"headworks": ours, **theirs}
        return {name: no_grad(f, q, k) for name, f in functions.items()}

    shape = _shape(device, side, topk, heads)
    total = cost("bilevel_route", **shape, dtype=dtype)
    name = f"route {side}x{side} topk {topk}"
    return Case(name, _facts(shape, device, "route"), contenders, total)


def _routed_case(device: str, mode: str, side: int, topk: int, heads: int, quick: bool) -> Case:
    dtype = DTYPE[device]

    def contenders() -> dict[str, Call]:
        qkv = inputs(BATCH[device], side, heads, dtype, device, grad=mode == "train")

        def ours(q: Tensor, k: Tensor, v: Tensor) -> Any:
            return hw.bilevel_routing_attention(q, k, v, num_regions=REGIONS, topk=topk)

        theirs = peers.bilevel_routed_peers(REGIONS, topk, compiled=not quick)
        functions = {"headworks": ours, **theirs}
        return {name: call_of(f, qkv, mode) for name, f in functions.items()}

    shape = _shape(device, side, topk, heads)
    total = cost_of("bilevel_routing_attention", mode, **shape, dtype=dtype)
    total += cost("bilevel_route", **shape, dtype=dtype)
    name = f"routed {mode} {side}x{side} topk {topk}"
    return Case(name, _facts(shape, device, f"routed {mode}"), contenders, total)


def _growth_case(device: str) -> Case:
    """Of regions of 8 x 8 tokens every one chooses four: linear in tokens, which name the calls."""
    batch, heads, topk = (1 if device == "cpu" else 16), 2, 4

    def call(side: int) -> Call:
        qkv = inputs(batch, side, heads, DTYPE[device], device)
        regions = (side // 8, side // 8)
        graph = peers.bilevel_graph(regions, topk, *qkv[:2])
        return no_grad(hw.bilevel_routing_attention, *qkv, num_regions=regions, graph=graph)

    facts = _facts({"B": batch, "H": heads, "D": D, "topk": topk}, device, "growth")
    return Case("growth", facts, lambda: {str(side * side): call(side) for side in GROWTH})


def _overhead_case() -> Case:
    """Host time of a call with next to nothing to compute, beside an operator that does nothing."""
    options: dict[str, Any] = {"num_regions": (1, 1)}

    def contenders() -> dict[str, Call]:
        plain = inputs(1, 1, 1, torch.float32, "cpu")
        learnt = inputs(1, 1, 1, torch.float32, "cpu", grad=True)
        given = {**options, "graph": torch.zeros(1, 1, 1, dtype=torch.int64)}
        return {
            "empty op": no_grad(empty_op(), *plain),
            "headworks": no_grad(hw.bilevel_routing_attention, *plain, **given),
            "headworks, routed": no_grad(hw.bilevel_routing_attention, *plain, **options, topk=1),
            "headworks, grad": lambda: hw.bilevel_routing_attention(*learnt, **given),
        }

    return Case("overhead", {"Y": 1, "X": 1, "dtype": "float32", "mode": "overhead"}, contenders)
