# SPDX-License-Identifier: Apache-2.0
"""What the suites share: calls to time, and figures for their targets."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bench.suite import Result
from bench.timing import Call, growth_exponent
from headworks.cost import Cost, cost


def call_of(function: Callable[..., Any], arguments: tuple[Tensor, ...], mode: str) -> Call:
    """A call to time: the function alone without grad, or with the backward pass."""
    if mode == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return function(*arguments)

        return forward
    wanted = [x for x in arguments if x.requires_grad]
    cotangents: list[Tensor] = []  # made by the first call, so that nothing runs before it

    def train() -> Any:
        o = function(*arguments)
        if not cotangents:
            cotangents.append(torch.randn(o.shape, dtype=o.dtype, device=o.device))
        return torch.autograd.grad(o, wanted, cotangents[0])

    return train


def cost_of(op: str, mode: str, **shape: Any) -> Cost:
    """What a call costs; with the backward pass where mode is train."""
    total = cost(op, **shape)
    return total + cost(op, **shape, backward=True) if mode == "train" else total


def no_grad(function: Callable[..., Any], *arguments: Any, **options: Any) -> Call:
    """A call to time, without gradient."""

    def call() -> Any:
        with torch.no_grad():
            return function(*arguments, **options)

    return call


@functools.lru_cache
def empty_op() -> Callable[..., Tensor]:
    """A torch operator, registered as ours are, that only allocates its output."""
    library = torch.library.Library("headworks_bench", "FRAGMENT")
    library.define("empty(Tensor q, Tensor k, Tensor v) -> Tensor")
    library.impl("empty", lambda q, k, v: torch.empty_like(v), "CompositeExplicitAutograd")
    empty_op.library = library  # type: ignore[attr-defined]  # the registration lives as long
    return torch.ops.headworks_bench.empty.default


def speedup(results: Mapping[str, Result], name: str, *contenders: str) -> float | None:
    """How many times faster headworks is than the best of the contenders; None: not measured."""
    return results[name].speedup(*contenders) if name in results else None


def percent(results: Mapping[str, Result], name: str, roof: str) -> float | None:
    """Percent of a roof."""
    fraction = results[name].fraction(roof) if name in results else None
    return None if fraction is None else 100 * fraction


def exponent(results: Mapping[str, Result], name: str = "growth") -> float | None:
    """Of a case whose contenders are lengths."""
    if name not in results:
        return None
    times = results[name].seconds
    if results[name].failed:
        return None
    return growth_exponent([int(s) for s in times], [t.median for t in times.values()])


def overhead(results: Mapping[str, Result]) -> float | None:
    """Microseconds over an operator that does nothing."""
    if "overhead" not in results:
        return None
    result = results["overhead"]
    if result.ratio("empty op") is None:
        return None
    return 1e6 * (result.median("headworks") - result.median("empty op"))
