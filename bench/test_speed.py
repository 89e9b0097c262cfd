# SPDX-License-Identifier: Apache-2.0
"""The benchmark cases of every specification under pytest-benchmark, ours beside the peers.

    pytest bench -k linear_attention
    pytest bench -k "S4096 and forward" --benchmark-json out.json

Contenders of a case form a group. They run one after the other here; `headworks bench` times them
in turn, which is the fairer comparison, and judges the targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import headworks as hw
from bench import linear_attention, peers
from bench.linear_attention import call_of
from headworks.cost import Cost, cost
from headworks.testing import Case, Spec
from specs import SPECS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


@dataclass(frozen=True)
class Job:
    """One contender on one case."""

    spec: Spec
    case: Case
    mode: str
    contender: str
    function: Callable[..., Any]

    def __str__(self) -> str:
        return f"{self.spec}-{self.case}-{self.mode}-{self.contender}"


def contenders(spec: Spec, case: Case) -> dict[str, Callable[..., Any]]:
    """Functions of the tensors that spec.make gives, in that order."""
    functions: dict[str, Callable[..., Any]] = {"headworks": spec.function}
    if spec.name == "linear_attention":
        functions |= PEERS["linear"] | PEERS["softmax"]
    elif spec.name == "key_scan":
        functions |= PEERS["key_scan"]
    elif spec.name == "linear_attention_step":
        functions = {
            "headworks": lambda q, k, v, kv, z: hw.linear_attention_step(
                q, k, v, hw.LinearState(kv, z)
            ),
            "eager": peers.step_eager,
        }
    longest = linear_attention.LONGEST
    return {n: f for n, f in functions.items() if case.sizes.get("S", 0) <= longest.get(n, 1 << 30)}


def jobs() -> Iterator[Job]:
    """Every contender on every benchmark case that suits this device."""
    for spec in SPECS:
        for case in spec.benchmark_cases:
            if DEVICE == "cpu" and case.name.endswith("-gpu"):
                continue
            for mode in ("forward", "train") if spec.differentiable else ("forward",):
                for name, function in contenders(spec, case).items():
                    yield Job(spec, case, mode, name, function)


def least_cost(spec: Spec, case: Case, mode: str) -> Cost:
    """hw.cost of the case, the backward pass included where it is timed."""
    names = {"Hq": "H", "H": "Hkv"} if "Hq" in case.sizes else {}
    wanted = ("B", "S", "Hq", "H", "D", "Dv")
    sizes = {names.get(n, n): case.sizes[n] for n in wanted if n in case.sizes}
    forward = cost(spec.name, **sizes, dtype=DTYPE)
    return (
        forward + cost(spec.name, **sizes, dtype=DTYPE, backward=True)
        if mode == "train"
        else forward
    )


PEERS = {
    "linear": peers.linear_attention_peers(DEVICE),
    "softmax": peers.sdpa_peers(DEVICE),
    "key_scan": peers.key_scan_peers(),
}


@pytest.mark.filterwarnings("default")  # the peers' warnings are not ours
@pytest.mark.benchmark(min_rounds=5, max_time=1.0, warmup=False)
@pytest.mark.parametrize("job", list(jobs()), ids=str)
def test_speed(benchmark, job):
    """Times one contender; nothing is asserted of the time."""
    peers.forget_compiled()
    tensors = job.spec.make(job.case, DTYPE, DEVICE)
    if job.contender in PEERS["softmax"]:  # the user's alternative has a full head dim
        tensors |= {n: torch.randn_like(tensors["v"]) for n in ("q", "k")}
    grad = job.mode == "train"
    arguments = tuple(x.requires_grad_(grad and x.is_floating_point()) for x in tensors.values())
    call = call_of(job.function, arguments, job.mode)
    if DEVICE == "cuda":
        call = _synchronised(call)
    call()  # compiles and allocates
    least = least_cost(job.spec, job.case, job.mode)
    benchmark.group = f"{job.spec}-{job.case}-{job.mode}"
    benchmark.extra_info |= {"contender": job.contender, "flops": least.flops, "bytes": least.bytes}
    benchmark(call)


def _synchronised(call: Callable[[], Any]) -> Callable[[], None]:
    def wrapped() -> None:
        call()
        torch.cuda.synchronize()

    return wrapped
