# SPDX-License-Identifier: Apache-2.0
"""What a suite consists of: cases that are timed, results, and targets that are judged.

A suite is a module `bench/<operator>.py` with
    cases(device, quick)      the list of Case
    targets(results, device)  the list of Target, from results by case name
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any

from bench import machine, peers, timing
from headworks._operator_list import OPERATORS
from headworks.cost import Cost

SUITES = tuple(dict.fromkeys(operator.suite for operator in OPERATORS if operator.suite))


@dataclass(frozen=True)
class Case:
    """One comparison: contenders on the same inputs, made when the case is run.

    `cost` is that of one call of the contender called "headworks"; with it the result knows the
    least time at each ceiling. `memory` asks for peak memory too.
    """

    name: str
    shape: Mapping[str, Any]
    contenders: Callable[[], Mapping[str, timing.Call]]
    cost: Cost | None = None
    memory: bool = False


@dataclass
class Result:
    """Times of one case, and what follows from them."""

    case: str
    shape: dict[str, Any]
    seconds: dict[str, timing.Times]
    peak_bytes: dict[str, int] = field(default_factory=dict)
    ceiling: dict[str, float] = field(default_factory=dict)  # rates by roof, see machine.ROOFS
    least: dict[str, float] = field(default_factory=dict)  # seconds at each of them
    failed: dict[str, str] = field(default_factory=dict)  # contenders that raised, and what

    @property
    def roof(self) -> str | None:
        """The roof that binds: "peak" (or "gemm"), "exp" or "copy"."""
        return max(self.least, key=lambda name: self.least[name], default=None)

    def fraction(self, roof: str) -> float | None:
        """Least time at a roof over the time headworks took, as a share of 1."""
        if roof not in self.least or "headworks" not in self.seconds:
            return None
        return self.least[roof] / self.median("headworks")

    @property
    def bound(self) -> str:
        """The share of the roof that binds, in words: "74 % of peak"; empty where there is none."""
        share = self.fraction(self.roof) if self.roof else None
        return "" if share is None else f"{100 * share:.0f} % of {self.roof}"

    def median(self, name: str) -> float:
        """Seconds of one contender."""
        return self.seconds[name].median

    def ratio(self, name: str, other: str = "headworks") -> float | None:
        """Time of a contender over that of another one; None unless both were timed."""
        if name not in self.seconds or other not in self.seconds:
            return None
        return self.median(name) / self.median(other)

    def best(self, *names: str) -> float | None:
        """Seconds of the fastest of those contenders that were timed."""
        times = [self.seconds[name].median for name in names if name in self.seconds]
        return min(times, default=None)

    def speedup(self, *names: str) -> float | None:
        """How many times faster headworks is than the best of those contenders."""
        best = self.best(*names)
        if best is None or "headworks" not in self.seconds:
            return None
        return best / self.median("headworks")


@dataclass(frozen=True)
class Target:
    """A figure that must be at least (or at most) a threshold; None: not measured here."""

    name: str
    figure: float | None
    threshold: float
    unit: str = "x"
    at_most: bool = False

    @property
    def verdict(self) -> str:
        """One of pass, miss, not measured."""
        if self.figure is None:
            return "not measured"
        met = self.figure <= self.threshold if self.at_most else self.figure >= self.threshold
        return "pass" if met else "miss"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "verdict": self.verdict}


def load(name: str) -> ModuleType:
    """The suite of an operator."""
    if name not in SUITES:
        raise ValueError(f"bench: suite is {name!r}, expected one of {list(SUITES)}")
    return importlib.import_module(f"bench.{name}")


@dataclass(frozen=True)
class Effort:
    """How long a case is timed: seconds per contender, rounds (least, most), with peak memory."""

    budget: float
    rounds: tuple[int, int]
    memory: bool = True


THOROUGH, QUICK = Effort(4.0, (5, 40)), Effort(0.5, (3, 15))


def amount(cost: Cost, roof: str) -> int:
    """What a call does of that which a roof counts."""
    return {"copy": cost.bytes, "exp": cost.exponentials}.get(roof, cost.flops)


def run_case(
    case: Case, *, device: str, effort: Effort = THOROUGH, only: str | None = None
) -> Result:
    """Times the contenders side by side; with them the yardsticks, where the case has a cost.

    A contender that raises, ours too, is noted in the result with its error. `only`: no other
    contenders than those whose names begin so.
    """
    peers.forget_compiled()
    result = Result(case.name, dict(case.shape), {})
    contenders = {n: f for n, f in case.contenders().items() if n.startswith(only or "")}
    if device == "cuda" and case.shape.get("mode") == "train" and "headworks" in contenders:
        # The difference is what the host takes.
        contenders["headworks, graph"] = timing.graphed(contenders["headworks"])
    rulers = machine.yardsticks(device, case.shape.get("dtype", "float32")) if case.cost else {}
    times = timing.interleave(
        {**contenders, **{name: ruler.call for name, ruler in rulers.items()}},
        device=device,
        budget=effort.budget,
        rounds=effort.rounds,
        failed=result.failed,
    )
    result.seconds = {name: times[name] for name in contenders if name in times}
    if case.cost and all(name in times for name in rulers):
        result.ceiling = {name: rulers[name].work / times[name].median for name in rulers}
        least = {name: amount(case.cost, name) / rate for name, rate in result.ceiling.items()}
        result.least = {name: seconds for name, seconds in least.items() if seconds > 0}
    if case.memory and effort.memory:
        peaks = {n: timing.peak_bytes(contenders[n], device=device) for n in result.seconds}
        result.peak_bytes = {name: peak for name, peak in peaks.items() if peak is not None}
    return result
