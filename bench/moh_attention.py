# SPDX-License-Identifier: Apache-2.0
"""The suite of hw.moh_attention: each token chooses some of its heads.

The yardstick is hw.attention of all heads: the time should fall with the share of heads. The peers
compute all heads and multiply, as the official code does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import headworks as hw
from bench import predictions
from bench import routing_peers as peers
from bench.parts import call_of, cost_of, empty_op, no_grad
from bench.suite import Case, Result, Target
from bench.timing import Call

S, H, D = 1024, 32, 64
BATCH = {"cpu": 1, "cuda": 4}
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
ACTIVE = (0.5, 0.75)  # shares of heads that a token chooses
WITHIN = 1.1  # of that share of the time of all heads


def cases(device: str, quick: bool) -> list[Case]:
    """Forward, forward + backward, overhead."""
    shares = ACTIVE[:1] if quick else ACTIVE
    return [
        *(
            _case(device, mode, share, causal, quick)
            for mode in ("forward", "train")
            for share in shares
            for causal in (False, True)
        ),
        _overhead_case(),
    ]


def gpu_cases(device: str, tiny: bool) -> list[Case]:
    """Both shares of heads, without and with the causal mask."""
    if tiny:
        return [_case(device, "forward", ACTIVE[0], True, True)]
    return [
        _case(device, mode, share, causal, False)
        for mode in ("forward", "train")
        for share in ACTIVE
        for causal in (False, True)
    ]


def targets(results: Mapping[str, Result], device: str) -> list[Target]:
    """The threshold of the design, set for a CPU; on a GPU the predictions."""
    if device == "cuda":
        return predictions.targets("moh_attention", results)
    return [
        Target(f"{name}: of its share of dense", _over_share(results, name), WITHIN, "x", True)
        for mode in ("forward", "train")
        for share in ACTIVE
        for name in (_name(mode, share, causal) for causal in (False, True))
    ]


def inputs(
    device: str, share: float, *, grad: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random q, k, v [B, S, H, D]; of the gate [B, S, H] the `share` largest of random softmaxes
    per token, times their number over their sum, as MoH's router gives."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(BATCH[device], S, H, *size, generator=generator, device=device)

    q, k, v = (draw(D).to(DTYPE[device]) for _ in range(3))
    best = draw().softmax(-1).topk(round(share * H), dim=-1)
    values = best.values * best.values.shape[-1] / best.values.sum(-1, keepdim=True)
    gate = torch.zeros(BATCH[device], S, H, device=device).scatter(-1, best.indices, values)
    q, k, v, gate = (x.requires_grad_(grad) for x in (q, k, v, gate.to(DTYPE[device])))
    return q, k, v, gate


def _name(mode: str, share: float, causal: bool) -> str:
    return f"{mode} {'causal' if causal else 'full'} {100 * share:g} %"


def _over_share(results: Mapping[str, Result], name: str) -> float | None:
    """Time over that of all heads, as a multiple of the share of heads."""
    if name not in results:
        return None
    ratio = results[name].ratio("headworks", "dense")
    return None if ratio is None else ratio / results[name].shape["active"]


def _case(device: str, mode: str, share: float, causal: bool, quick: bool) -> Case:
    def contenders() -> dict[str, Call]:
        tensors = inputs(device, share, grad=mode == "train")

        def ours(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
            return hw.moh_attention(q, k, v, gate, is_causal=causal)

        def dense(q: Tensor, k: Tensor, v: Tensor) -> Any:
            return hw.attention(q, k, v, is_causal=causal)

        def gated(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Any:
            return hw.attention(q, k, v, is_causal=causal, head_gate=gate)

        functions = {"headworks": ours, "dense, gated": gated}
        functions |= peers.moh_peers(causal=causal, compiled=not quick)
        calls = {name: call_of(f, tensors, mode) for name, f in functions.items()}
        return calls | {"dense": call_of(dense, tensors[:3], mode)}

    shape = {"B": BATCH[device], "S": S, "H": H, "D": D, "active": share}
    total = cost_of("moh_attention", mode, **shape, dtype=DTYPE[device], is_causal=causal)
    dtype = str(DTYPE[device]).removeprefix("torch.")
    facts = {**shape, "is_causal": causal, "dtype": dtype, "mode": mode}
    return Case(_name(mode, share, causal), facts, contenders, total, memory=True)


def _overhead_case() -> Case:
    """Host time of a call with next to nothing to compute, beside an operator that does nothing."""

    def contenders() -> dict[str, Call]:
        plain = torch.randn(3, 1, 1, 1, 16)
        learnt = plain.clone().requires_grad_().unbind()
        gate = torch.ones(1, 1, 1)
        return {
            "empty op": no_grad(empty_op(), *plain),
            "headworks": no_grad(hw.moh_attention, *plain, gate),
            "headworks, grad": lambda: hw.moh_attention(*learnt, gate),
        }

    return Case("overhead", {"S": 1, "D": 16, "dtype": "float32", "mode": "overhead"}, contenders)
