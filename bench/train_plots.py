# SPDX-License-Identifier: Apache-2.0
"""The pictures of bench.train_routing, from its result files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headworks.cli.demo_plots import BLUE, QUIET, RED, finish, pyplot, running_mean

_COLORS = (BLUE, RED)


def plot_text(data: Mapping[str, Any], path: Path) -> None:
    """Bits per byte of each model against the step, beside the entropies of counts."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for color, (name, run) in zip(_COLORS, data["runs"].items(), strict=True):
        _train_curve(axes, run["train_curve"], color)
        _held_out(axes, run["validation_curve"], color, f"{name}, held-out text", "{:.3f}")
    _levels(axes, data["baselines"], "{:.2f}")
    least = min(run["held_out"] for run in data["runs"].values())
    axes.set_ylim(0.85 * least, 1.35 * max(data["baselines"].values()))
    axes.set(xlabel="step", ylabel="bits per byte", xlim=(0, None), title=data["title"])
    axes.legend(frameon=False)
    finish(plt, figure, [axes], path)


def plot_digits(data: Mapping[str, Any], path: Path) -> None:
    """Loss in training, and held-out accuracy beside that of the baselines."""
    plt = pyplot()
    figure, (loss, accuracy) = plt.subplots(1, 2, figsize=(10, 4.3), layout="constrained")
    (run,) = data["runs"].values()
    _train_curve(loss, run["train_curve"], BLUE)
    loss.set(xlabel="step", ylabel="cross entropy, nats", title="Training", xlim=(0, None))
    loss.set_ylim(0, None)
    _held_out(accuracy, run["validation_curve"], RED, "BiFormer", "{:.1f} %")
    _levels(accuracy, data["baselines"], "{:.1f} %")
    accuracy.set(xlabel="step", ylabel="right, %", title="Held-out digits", xlim=(0, None))
    accuracy.set_ylim(0, 106)
    accuracy.legend(frameon=False, loc="center right")
    figure.suptitle(data["title"])
    finish(plt, figure, [loss, accuracy], path)


def _train_curve(axes: Any, curve: Sequence[Sequence[float]], color: str) -> None:
    steps, values = zip(*curve, strict=True)
    axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.25)
    axes.plot(steps, running_mean(values), color=color, linewidth=1.5, alpha=0.8)


def _held_out(
    axes: Any, curve: Sequence[Sequence[float]], color: str, name: str, text: str
) -> None:
    steps, values = zip(*curve, strict=True)
    label = f"{name}: {text.format(values[-1])}"
    axes.plot(steps, values, "o-", color=color, markersize=5, linewidth=0, label=label)


def _levels(axes: Any, baselines: Mapping[str, float], text: str) -> None:
    for style, (name, level) in zip(("--", ":"), baselines.items(), strict=True):
        label = f"{name}: {text.format(level)}"
        axes.axhline(level, color=QUIET, linestyle=style, linewidth=1.5, label=label)
