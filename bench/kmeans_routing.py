# SPDX-License-Identifier: Apache-2.0
"""The suite of hw.kmeans_route and hw.kmeans_routing_attention: causal, W = S / K.

Ours and the peers attend within the same clusters; the cases "routed" choose them within the timed
call, for shared queries and keys, which lets PyPI's routing-transformer compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import headworks as hw
from bench import predictions
from bench import routing_peers as peers
from bench.parts import call_of, cost_of, empty_op, exponent, no_grad, speedup
from bench.peers import softmax_peers
from bench.suite import Case, Result, Target
from bench.timing import Call
from headworks.cost import cost

D = 64
SHAPE = {"cpu": {"B": 1, "H": 8, "D": D}, "cuda": {"B": 4, "H": 8, "D": D}}
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
S, K = 8192, 16
LONG_S, LONG_K = 32768, 32
TORCH = ("eager", "compiled")
# K of S = K^2 tokens.
GROWTH = {"cpu": (32, 48, 64, 96, 128), "cuda": (64, 96, 128, 192, 256)}


def cases(device: str, quick: bool) -> list[Case]:
    """Attention within given clusters, routing, both in one, growth, overhead."""
    modes = ("forward", "train")
    return [
        *(_attend_case(device, mode, S, K, quick) for mode in modes),
        *([] if quick else [_attend_case(device, "forward", LONG_S, LONG_K, quick)]),
        _route_case(device, quick),
        *(_routed_case(device, mode, quick) for mode in modes),
        _growth_case(device, routed=False),
        _growth_case(device, routed=True),
        _overhead_case(),
    ]


def gpu_cases(device: str, tiny: bool) -> list[Case]:
    """8192 tokens (fewer where it is only to be seen to run): attention, routing, both in one."""
    modes = ("forward", "train")
    if tiny:
        return [_attend_case(device, mode, 512, 4, True) for mode in modes]
    return [
        *(_attend_case(device, mode, S, K, False) for mode in modes),
        _route_case(device, False),
        *(_routed_case(device, mode, False) for mode in modes),
    ]


def targets(results: Mapping[str, Result], device: str) -> list[Target]:
    """The thresholds of the design, set for a CPU; on a GPU the predictions."""
    if device == "cuda":
        return predictions.targets("kmeans_routing", results)
    forward, train, long = f"forward S {S}", f"train S {S}", f"forward S {LONG_S}"
    growth = exponent(results), exponent(results, "growth, routed")
    return [
        Target(f"{forward}: torch", speedup(results, forward, *TORCH), 3.0),
        Target(f"{train}: torch", speedup(results, train, *TORCH), 2.5),
        Target(f"{forward}: causal SDPA", speedup(results, forward, "sdpa"), 3.0),
        Target(f"{long}: causal SDPA", speedup(results, long, "sdpa"), 10.0),
        Target("growth exponent, K = sqrt S", growth[0], 1.55, "", at_most=True),
        Target("growth exponent, routed", growth[1], 1.55, "", at_most=True),
    ]


def inputs(
    device: str, s: int, clusters: int, *, grad: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random q, k, v [B, S, H, D], and centroids [H, K, D] of length 1."""
    shape, dtype = SHAPE[device], DTYPE[device]
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    q, k, v = (draw(shape["B"], s, shape["H"], D).to(dtype).requires_grad_(grad) for _ in range(3))
    return q, k, v, normalize(draw(shape["H"], clusters, D), dim=-1).to(dtype)


def clusters_of(q: Tensor, mu: Tensor, window: int) -> Tensor:
    """The members by position, as hw.kmeans_route gives them: some tokens in several clusters, and
    a third in none."""
    return peers.kmeans_clusters(normalize(q, dim=-1), mu, window).sort(-1).values


def _facts(device: str, mode: str, **more: Any) -> dict[str, Any]:
    dtype = str(DTYPE[device]).removeprefix("torch.")
    return {**SHAPE[device], **more, "dtype": dtype, "mode": mode}


def _attend_case(device: str, mode: str, s: int, clusters: int, quick: bool) -> Case:
    window = s // clusters

    def contenders() -> dict[str, Call]:
        q, k, v, mu = inputs(device, s, clusters, grad=mode == "train")
        index = clusters_of(q, mu, window)

        def ours(q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Tensor:
            return hw.kmeans_routing_attention(
                q, k, v, q_index=index, is_causal=True, mean_eps=peers.EPS
            )

        functions = {"headworks": ours, **peers.kmeans_peers(causal=True, compiled=not quick)}
        calls = {name: call_of(f, (q, k, v, index), mode) for name, f in functions.items()}
        for name, function in softmax_peers(device, causal=True).items():
            calls[name] = call_of(function, (q, k, v), mode)
        return calls

    sizes = {"S": s, "K": clusters, "W": window}
    shape = {**SHAPE[device], **sizes, "dtype": DTYPE[device]}
    total = cost_of("kmeans_routing_attention", mode, **shape, is_causal=True)
    facts = _facts(device, mode, **sizes)
    return Case(f"{mode} S {s}", facts, contenders, total, memory=s == S)


def _route_case(device: str, quick: bool) -> Case:
    window = S // K

    def contenders() -> dict[str, Call]:
        q, _, _, mu = inputs(device, S, K)
        x = normalize(q, dim=-1)
        calls = {
            "headworks": no_grad(hw.kmeans_route, x, mu, window=window),
            "headworks, prefix": no_grad(
                hw.kmeans_route, x, mu, window=window, is_causal_prefix=True
            ),
        }
        theirs = peers.kmeans_route_peers(window, compiled=not quick)
        return calls | {name: no_grad(f, x, mu) for name, f in theirs.items()}

    sizes = {"S": S, "K": K, "W": window}
    shape = {n: x for n, x in SHAPE[device].items() if n != "Dv"}
    total = cost("kmeans_route", **shape, **sizes, dtype=DTYPE[device])
    return Case(f"route S {S}", _facts(device, "route", **sizes), contenders, total)


def _routed_case(device: str, mode: str, quick: bool) -> Case:
    window = S // K

    def contenders() -> dict[str, Call]:
        q, _, v, mu = inputs(device, S, K, grad=mode == "train")
        theirs = peers.kmeans_routed_peers(mu, window, causal=True, compiled=not quick)
        functions = {"headworks": _route_and_attend(mu, window), **theirs}
        return {name: call_of(f, (q, v), mode) for name, f in functions.items()}

    facts = _facts(device, f"routed {mode}", S=S, K=K, W=window)
    return Case(f"routed {mode} S {S}", facts, contenders, memory=True)


def _route_and_attend(mu: Tensor, window: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Ours as a layer with shared queries and keys calls it: a function of q and v."""

    def call(q: Tensor, v: Tensor) -> Tensor:
        x = normalize(q, dim=-1)
        index = hw.kmeans_route(x, mu, window=window)
        options = {"is_causal": True, "mask_self": True, "mean_eps": peers.EPS}
        return hw.kmeans_routing_attention(q, x, v, q_index=index, **options)

    return call


def _growth_case(device: str, *, routed: bool) -> Case:
    """K = W = sqrt S: S^1.5 pairs. The numbers of tokens name the calls."""

    def call(clusters: int) -> Call:
        q, k, v, mu = inputs(device, clusters**2, clusters)
        index = clusters_of(q, mu, clusters)

        def attend(q: Tensor, k: Tensor, v: Tensor, mu: Tensor) -> Tensor:
            chosen = hw.kmeans_route(q, mu, window=clusters) if routed else index
            return hw.kmeans_routing_attention(q, k, v, q_index=chosen, is_causal=True)

        return no_grad(attend, q, k, v, mu)

    name = "growth, routed" if routed else "growth"
    return Case(
        name,
        _facts(device, name),
        lambda: {str(clusters**2): call(clusters) for clusters in GROWTH[device]},
    )


def _overhead_case() -> Case:
    """Host time of a call with next to nothing to compute, beside an operator that does nothing."""

    def contenders() -> dict[str, Call]:
        plain = torch.randn(3, 1, 1, 1, 16)
        learnt = plain.clone().requires_grad_().unbind()
        index = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
        mu = torch.randn(1, 1, 16)
        return {
            "empty op": no_grad(empty_op(), *plain),
            "headworks": no_grad(hw.kmeans_routing_attention, *plain, q_index=index),
            "headworks, route": no_grad(hw.kmeans_route, plain[0], mu, window=1),
            "headworks, grad": lambda: hw.kmeans_routing_attention(*learnt, q_index=index),
        }

    return Case("overhead", {"S": 1, "D": 16, "dtype": "float32", "mode": "overhead"}, contenders)
