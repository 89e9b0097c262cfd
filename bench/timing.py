# SPDX-License-Identifier: Apache-2.0
"""Timing of several contenders side by side, peak memory, and the growth exponent.

A machine's speed drifts within a minute, so contenders are timed in turn, round by round, and
compared by the medians of the same run. A sample is one call, or as many as fill 2 ms.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

Call = Callable[[], object]

SAMPLE_SECONDS = 2e-3
FLUSH_BYTES = 256 << 20  # more than any L2 cache


@dataclass(frozen=True)
class Times:
    """Seconds per call: the median of the samples, the quartiles, and how many there were."""

    median: float
    low: float
    high: float
    samples: int


def interleave(
    contenders: Mapping[str, Call],
    *,
    device: str = "cpu",
    budget: float = 6.0,
    rounds: tuple[int, int] = (5, 40),
    failed: dict[str, str] | None = None,
) -> dict[str, Times]:
    """Times every contender in turn until `budget` seconds each, within `rounds` (least, most).

    The order rotates by one each round, so that nobody always runs after the same neighbour. A
    contender that raises is left out, and its error goes into `failed`; without that it ends all.
    """
    sample = _cuda_sampler() if device == "cuda" else _cpu_sample
    once: dict[str, float] = {}
    for name, call in contenders.items():
        with _caught(name, failed):
            once[name] = _warm_up(call, sample)
    names = list(once)
    if not names:
        return {}
    inner = {name: max(1, math.ceil(SAMPLE_SECONDS / once[name])) for name in names}
    round_seconds = sum(once[name] * inner[name] for name in names)
    count = int(budget * len(names) / max(round_seconds, 1e-9))
    count = max(rounds[0], min(rounds[1], count))
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(count):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                if failed is None or name not in failed:
                    with _caught(name, failed):
                        samples[name].append(sample(contenders[name], inner[name]))
    finally:
        if collecting:
            gc.enable()
    whole = (name for name in names if failed is None or name not in failed)
    return {name: summary(samples[name]) for name in whole}


def graphed(call: Call) -> Call:
    """The same work as one replay of a CUDA graph, captured at the first call: what is left of a
    small call when the host has nothing to do."""
    graphs: list[torch.cuda.CUDAGraph] = []

    def replay() -> None:
        if not graphs:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    call()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            graphs.append(graph)
        graphs[0].replay()

    return replay


@contextlib.contextmanager
def _caught(name: str, failed: dict[str, str] | None) -> Iterator[None]:
    """Notes an exception under the contender's name, where it may be noted."""
    try:
        yield
    except Exception as error:
        if failed is None:
            raise
        failed[name] = reason(error)


def reason(error: BaseException) -> str:
    """An exception in one line."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}"[:400]


def summary(samples: Sequence[float]) -> Times:
    """Median and quartiles of the samples."""
    if len(samples) < 2:
        return Times(samples[0], samples[0], samples[0], len(samples))
    low, _, high = statistics.quantiles(samples, n=4)
    return Times(statistics.median(samples), low, high, len(samples))


def growth_exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """The p of seconds ~ sizes**p: least squares on the logarithms; needs four sizes."""
    if len(sizes) != len(seconds) or len(sizes) < 4:
        raise ValueError(f"growth_exponent: {len(sizes)} sizes and {len(seconds)} times, need 4")
    x = [math.log(size) for size in sizes]
    y = [math.log(value) for value in seconds]
    return statistics.linear_regression(x, y).slope


def peak_bytes(call: Call, *, device: str = "cpu") -> int | None:
    """Memory that one call adds at its highest point; None where the system cannot tell."""
    call()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # give freed heap back, so that reuse counts as use
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status_bytes("VmRSS")
        call()
        return max(0, _status_bytes("VmHWM") - before)
    except (OSError, AttributeError, StopIteration):
        return None


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def _warm_up(call: Call, sample: Callable[[Call, int], float]) -> float:
    call()  # compiles, allocates, loads
    return max(1e-7, min(sample(call, 1), sample(call, 1)))


def _cpu_sample(call: Call, inner: int) -> float:
    start = time.perf_counter()
    for _ in range(inner):
        call()
    return (time.perf_counter() - start) / inner


def _cuda_sampler() -> Callable[[Call, int], float]:
    """Device time by events; the L2 cache is flushed before a sample, outside the timed span."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def sample(call: Call, inner: int) -> float:
        start = torch.cuda.Event(enable_timing=True)
        stop = torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        for _ in range(inner):
            call()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) * 1e-3 / inner

    return sample
