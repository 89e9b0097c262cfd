# SPDX-License-Identifier: Apache-2.0
"""The pictures of `headworks demo`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .demo_decode import DecodeRow

BLUE, RED, QUIET = "#1b6ca8", "#d1495b", "#9aa5b1"
_MODELS = {
    "BASED": (BLUE, "BASED (state of fixed size)"),
    "softmax": (RED, "softmax (key-value cache)"),
}


def plot_training(
    path: Path, train_curve: list[list[float]], val_curve: list[list[float]], title: str
) -> None:
    """Bits per byte against the step: every step, their running mean, and the held-out text."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    steps, bits = zip(*train_curve, strict=True)
    axes.plot(steps, bits, color=QUIET, linewidth=0.7, alpha=0.6, label="training, each step")
    axes.plot(steps, running_mean(bits), color=BLUE, linewidth=2, label="training, running mean")
    if val_curve:
        val_steps, val_bits = zip(*val_curve, strict=True)
        axes.plot(val_steps, val_bits, "o-", color=RED, markersize=5, label="held-out text")
        axes.annotate(
            f"{val_bits[-1]:.2f}", (val_steps[-1], val_bits[-1]), xytext=(0, 12),
            textcoords="offset points", ha="right", color=RED, fontweight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )  # fmt: skip
    axes.set(xlabel="step", ylabel="bits per byte", title=title, xlim=(0, None))
    axes.set_ylim(0.95 * min(bits[len(bits) // 2 :]), 1.02 * max(bits))
    axes.legend(frameon=False)
    finish(plt, figure, [axes], path)


def plot_decode(path: Path, rows: list[DecodeRow], title: str) -> None:
    """Decode speed and state memory against the length of the context."""
    plt = pyplot()
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(10, 4.3), layout="constrained")
    contexts = [row.context for row in rows]
    for axes in (speed, memory):
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, [_short(n) for n in contexts])
        axes.minorticks_off()
        axes.margins(x=0.14, y=0.2)
        axes.set_xlabel("context (tokens)")
    memory.set_yscale("log")
    memory.yaxis.set_major_locator(plt.LogLocator(base=10, subs=(1, 2, 5)))
    memory.yaxis.set_major_formatter(_plain_numbers)
    _curve(speed, contexts, [row.based_tokens_per_second for row in rows], "BASED")
    _curve(speed, contexts, [row.softmax_tokens_per_second for row in rows], "softmax")
    _curve(memory, contexts, [row.based_state_bytes / 2**20 for row in rows], "BASED")
    _curve(memory, contexts, [row.softmax_state_bytes / 2**20 for row in rows], "softmax")
    speed.set_ylim(0, None)
    speed.set(ylabel="tokens per second", title="Decode speed, one sequence")
    memory.set(ylabel="MiB per sequence", title="Memory of the state")
    memory.minorticks_off()
    speed.legend(frameon=False, loc="lower left")
    figure.suptitle(title)
    finish(plt, figure, [speed, memory], path)


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _curve(axes: Any, x: list[int], y: list[float], name: str) -> None:
    color, label = _MODELS[name]
    axes.plot(x, y, "o-", color=color, linewidth=2, markersize=6, label=label)
    for place in {0, len(x) - 1}:
        axes.annotate(
            f"{y[place]:.3g}" if y[place] < 1000 else f"{y[place]:.0f}", (x[place], y[place]),
            xytext=(0, 8), textcoords="offset points", ha="center", color=color,
        )  # fmt: skip


def finish(plt: Any, figure: Any, panels: list[Any], path: Path) -> None:
    """Grid and frame of the panels, and the file."""
    for axes in panels:
        axes.grid(True, color="#e5e9ee", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def running_mean(values: Sequence[float]) -> list[float]:
    """Mean over a fortieth of the run to either side of each step, as far as there are values."""
    reach = len(values) // 40
    return [statistics.fmean(values[max(i - reach, 0) : i + reach + 1]) for i in range(len(values))]


def _short(n: int) -> str:
    return f"{n // 1024} k" if n % 1024 == 0 else str(n)


def _plain_numbers(value: float, _position: int) -> str:
    return f"{value:g}"
