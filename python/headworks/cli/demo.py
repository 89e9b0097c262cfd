# SPDX-License-Identifier: Apache-2.0
"""`headworks demo`: trains a small BASED language model, generates, and measures decoding."""

from __future__ import annotations

import argparse
import io
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..models import BasedLM, ByteTokenizer, LanguageModel, SoftmaxConfig, save_checkpoint
from .demo_checks import DEFAULT_CONTEXTS, DEFAULT_MINUTES, DemoError, Plan, make_plan
from .demo_decode import DecodeRow, measure_decode, stream_text
from .demo_plots import plot_decode, plot_training
from .demo_train import RECIPES, Trainer
from .progress import ctrl_c, progress
from .training import fastest_threads

# Seconds of the time limit that are kept for what follows the training.
_RESERVE = 25.0
_INTERRUPTED = 130
_CHECKPOINT = "checkpoint.pt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--size", choices=sorted(RECIPES), help="default: tiny on a CPU, small on a GPU"
    )
    parser.add_argument("--steps", type=int, help="training steps (default: by size)")
    parser.add_argument(
        "--minutes", type=float, metavar="M",
        help="stop training so that the whole run takes at most so long "
        f"(default: {DEFAULT_MINUTES} for tiny on a CPU, otherwise no limit; none with --steps)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, help="default: 0")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--out", type=Path, default=Path("headworks-demo"), metavar="FOLDER")
    parser.add_argument(
        "--text", type=Path, metavar="FILE",
        help="UTF-8 text to learn (default: Python's own documentation, pydoc_data.topics)",
    )  # fmt: skip
    parser.add_argument("--prompt", default="The ", help="text to continue")
    parser.add_argument("--tokens", type=int, default=400, help="bytes to generate")
    parser.add_argument(
        "--contexts", default=DEFAULT_CONTEXTS, metavar="N,N,...",
        help=f"context lengths to measure decoding at (default: {DEFAULT_CONTEXTS})",
    )  # fmt: skip
    parser.add_argument("--no-plots", action="store_true", help="write no pictures")
    parser.add_argument(
        "--resume", type=Path, metavar="CHECKPOINT", help="continue the training of a checkpoint"
    )
    parser.add_argument("--quiet", action="store_true", help="print errors only")


def run(args: argparse.Namespace) -> int:
    """Runs the command; the exit status: 0, 2 for a bad request, 130 after Ctrl-C."""
    start = time.monotonic()
    _print_anything()
    try:
        plan = make_plan(args)
    except DemoError as error:
        print(f"headworks demo: {error}", file=sys.stderr)
        return 2
    trainer = _trainer(plan)
    try:
        with fastest_threads(trainer):
            return _demo(plan, trainer, start)
    except KeyboardInterrupt:
        return _interrupted(plan, trainer)
    except _NotSavedError as error:
        print(f"headworks demo: {error}", file=sys.stderr)
        return 1


class _NotSavedError(Exception):
    """A result could not be written; the message says which, and where the checkpoint is."""


def _interrupted(plan: Plan, trainer: Trainer) -> int:
    try:
        return _stopped(plan, trainer, _save(plan, trainer))
    except _NotSavedError as error:
        print(f"headworks demo: {error}", file=sys.stderr)
        return _INTERRUPTED


def _demo(plan: Plan, trainer: Trainer, start: float) -> int:
    say = _silent if plan.quiet else print
    say(_describe(plan, trainer))
    ended = _train(plan, trainer, start, say)
    checkpoint = _save(plan, trainer)
    results = _training_results(plan, trainer, ended)
    try:
        if ended == "interrupted":
            _write_json(plan, results)
            return _stopped(plan, trainer, checkpoint)
        return _show(plan, trainer, results, start, say)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _NotSavedError(f"{_why(error)}; the checkpoint is {checkpoint}") from error


def _show(
    plan: Plan, trainer: Trainer, results: dict[str, Any], start: float, say: Callable[..., None]
) -> int:
    """What the trained model does: text, decoding, pictures."""
    say(f"validation: {results['validation_bits_per_byte']:.3f} bits per byte\n")
    results["generated_text"] = _generate(plan, trainer, say)
    rows = _measure(plan, trainer, say)
    results["decode"] = [row.to_dict() for row in rows]
    results["softmax_config"] = SoftmaxConfig.like(plan.config).to_dict()
    if plan.plots:
        _plot(plan, trainer, rows)
    results["total_seconds"] = time.monotonic() - start
    _write_json(plan, results)
    say(f"\n{results['total_seconds']:.0f} s. Files in {plan.out}: {', '.join(_files(plan))}")
    return 0


def _trainer(plan: Plan) -> Trainer:
    torch.manual_seed(plan.seed)
    model: LanguageModel
    if plan.checkpoint is None:
        model = BasedLM(plan.config, device=plan.device)
    else:
        model = plan.checkpoint.model
    trainer = Trainer(model, plan.train_text, plan.val_text, plan.recipe, plan.steps, plan.seed)
    if plan.checkpoint is not None:
        trainer.load_state(plan.checkpoint.extra["training"])
    return trainer


def _describe(plan: Plan, trainer: Trainer) -> str:
    kinds = plan.config.layer_kinds
    layers = ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("conv", "linear", "window"))
    parameters = trainer.model.num_parameters() / 1e6
    text = (len(plan.train_text) + len(plan.val_text)) / 1e6
    where = torch.cuda.get_device_name(plan.device) if plan.device.type == "cuda" else "CPU"
    if plan.device.type == "cpu":
        where += f", threads: {torch.get_num_threads()}"
    limit = "" if plan.minutes is None else f", at most {plan.minutes:g} minutes in all"
    resumed = f" (resumed at {trainer.step})" if trainer.step else ""
    return (
        f"BASED, {parameters:.2f} M parameters, layers: {layers}; {where}\n"
        f"text: {plan.text_name}, {text:.2f} MB, the last tenth held out\n"
        f"{plan.steps} steps{resumed} of {plan.recipe.batch} x {plan.recipe.length} bytes{limit}"
    )


def _train(plan: Plan, trainer: Trainer, start: float, say: Callable[..., None]) -> str:
    """Trains within the time limit and validates on the whole held-out text."""
    seconds = None
    if plan.minutes is not None:
        seconds = max(60 * plan.minutes - _RESERVE - (time.monotonic() - start), 1.0)
    with ctrl_c() as stopped, progress(trainer, plan.quiet) as report:
        ended = trainer.train(seconds, stopped, report)
    if ended != "interrupted":
        trainer.final_figure()
    if ended == "time":
        say(f"time limit: stopped after {trainer.step} of {trainer.steps} steps")
    return ended


def _save(plan: Plan, trainer: Trainer) -> Path:
    """Writes the checkpoint, into the system's temporary folder if its own cannot be written."""
    extra = {"size": _size_name(plan), "text": plan.text_name, "training": trainer.state()}
    path = plan.out / _CHECKPOINT
    try:
        save_checkpoint(path, trainer.model, tokenizer=ByteTokenizer(), extra=extra)
        return path
    except OSError as error:
        why = f"{path} cannot be written: {error.strerror}"
    try:
        instead = Path(tempfile.mkdtemp(prefix="headworks-demo-")) / _CHECKPOINT
        save_checkpoint(instead, trainer.model, tokenizer=ByteTokenizer(), extra=extra)
    except OSError as error:
        raise _NotSavedError(f"{why}; nor can {tempfile.gettempdir()}: {_why(error)}") from error
    raise _NotSavedError(f"{why}; the checkpoint is {instead}")


def _why(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}"


def _print_anything() -> None:
    """Text that the terminal's encoding lacks becomes question marks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _size_name(plan: Plan) -> str:
    return next(name for name, recipe in RECIPES.items() if recipe == plan.recipe)


def _training_results(plan: Plan, trainer: Trainer, ended: str) -> dict[str, Any]:
    return {
        "size": _size_name(plan),
        "config": plan.config.to_dict(),
        "parameters": trainer.model.num_parameters(),
        "text": plan.text_name,
        "seed": plan.seed,
        "ended": ended,
        "steps": trainer.step,
        "planned_steps": trainer.steps,
        "bytes_per_step": plan.recipe.batch * plan.recipe.length,
        "training_seconds": trainer.seconds,
        "validation_bits_per_byte": trainer.val_curve[-1][1] if trainer.val_curve else None,
        "train_curve": trainer.train_curve,
        "validation_curve": trainer.val_curve,
        "machine": {
            "device": str(plan.device),
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _generate(plan: Plan, trainer: Trainer, say: Callable[..., None]) -> str:
    pieces = [plan.prompt]
    say(plan.prompt, end="", flush=True)
    for piece in stream_text(trainer.model, ByteTokenizer(), plan.prompt, plan.tokens, plan.seed):
        say(piece, end="", flush=True)
        pieces.append(piece)
    say("\n")
    text = "".join(pieces)
    (plan.out / "generated.txt").write_text(text, encoding="utf-8")
    return text


def _measure(plan: Plan, trainer: Trainer, say: Callable[..., None]) -> list[DecodeRow]:
    baseline = SoftmaxConfig.like(plan.config)
    measured = measure_decode(trainer.model, baseline, plan.train_text, plan.contexts, plan.seed)
    say("decoding one sequence, beside a softmax model of equal width with a key-value cache")
    say(f"{'context':>9} {'BASED':>16} {'softmax':>16} {'BASED state':>13} {'softmax cache':>14}")
    rows = []
    for row in measured:
        say(
            f"{row.context:>9} {row.based_tokens_per_second:>10.0f} tok/s "
            f"{row.softmax_tokens_per_second:>10.0f} tok/s "
            f"{row.based_state_bytes / 2**20:>9.2f} MiB "
            f"{row.softmax_state_bytes / 2**20:>10.2f} MiB"
        )
        rows.append(row)
    return rows


def _plot(plan: Plan, trainer: Trainer, rows: list[DecodeRow]) -> None:
    parameters = f"{trainer.model.num_parameters() / 1e6:.1f} M parameters"
    plot_training(
        plan.out / "training.png", trainer.train_curve, trainer.val_curve,
        f"Byte-level BASED language model, {parameters}",
    )  # fmt: skip
    plot_decode(
        plan.out / "decode.png", rows,
        f"BASED and softmax model, width {plan.config.d_model}, "
        f"{plan.config.num_layers} layers, {plan.device.type.upper()}",
    )  # fmt: skip


def _files(plan: Plan) -> list[str]:
    plots = ["training.png", "decode.png"] if plan.plots else []
    return [*plots, "results.json", "generated.txt", _CHECKPOINT]


def _write_json(plan: Plan, results: dict[str, Any]) -> None:
    text = json.dumps(results, indent=1, ensure_ascii=False)
    (plan.out / "results.json").write_text(text + "\n", encoding="utf-8")


def _stopped(plan: Plan, trainer: Trainer, checkpoint: Path) -> int:
    print(
        f"\nstopped after {trainer.step} of {trainer.steps} steps; checkpoint: {checkpoint}\n"
        f"go on with: headworks demo --resume {checkpoint} --out {checkpoint.parent}",
        file=sys.stderr,
    )
    return _INTERRUPTED


def _silent(*_ignored: object, **_options: object) -> None:
    pass
