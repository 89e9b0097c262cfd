# SPDX-License-Identifier: Apache-2.0
"""Everything `headworks demo` can refuse, refused before anything is trained."""

from __future__ import annotations

import argparse
import importlib.util
import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..models import BasedConfig, BasedLM, Checkpoint, load_checkpoint
from ..ops.linear.linear_attention import linear_attention
from .demo_train import RECIPES, Recipe

DEFAULT_MINUTES = 1.8
DEFAULT_CONTEXTS = "1024,4096,16384"
MAX_CONTEXT = 1 << 20
HELD_OUT = 0.1
_BYTES_PER_PARAMETER = 13  # of a checkpoint: the weight, two moments, and a little


class DemoError(ValueError):
    """A request that cannot be met; the message is one line for the user."""


@dataclass(frozen=True)
class Plan:
    """A checked request."""

    device: torch.device
    out: Path
    text_name: str
    train_text: Tensor  # [n] uint8
    val_text: Tensor  # [m] uint8, the end of the text
    config: BasedConfig
    recipe: Recipe
    steps: int
    seed: int
    minutes: float | None  # None: no limit
    prompt: str
    tokens: int
    contexts: tuple[int, ...]
    plots: bool
    quiet: bool
    checkpoint: Checkpoint | None  # to continue from


def make_plan(args: argparse.Namespace) -> Plan:
    """Checks the options and reads what they name. Raises DemoError."""
    _check_numbers(args)
    contexts = _contexts(args.contexts)
    if not args.no_plots and importlib.util.find_spec("matplotlib") is None:
        raise DemoError(
            "the plots need matplotlib: pip install 'headworks[demo]', or give --no-plots"
        )
    device = choose_device(args.device)
    name, text = read_text(args.text)
    checkpoint = _checkpoint(args.resume, device)
    size = _size(args.size, checkpoint, device)
    recipe = RECIPES[size]
    trained = {} if checkpoint is None else checkpoint.extra["training"]
    train_text, val_text = split_text(name, text, recipe.length)
    _check_kernels(device)
    minutes = args.minutes
    if minutes is None and args.steps is None and device.type == "cpu" and size == "tiny":
        minutes = DEFAULT_MINUTES
    config = BasedConfig.byte_level(size) if checkpoint is None else _based(checkpoint)
    return Plan(
        device=device,
        out=_output_folder(args.out, config),
        text_name=name,
        train_text=train_text,
        val_text=val_text,
        config=config,
        recipe=recipe,
        steps=_first_given(args.steps, trained.get("steps"), recipe.steps),
        seed=_first_given(args.seed, trained.get("seed"), 0),
        minutes=minutes,
        prompt=args.prompt,
        tokens=args.tokens,
        contexts=contexts,
        plots=not args.no_plots,
        quiet=args.quiet,
        checkpoint=checkpoint,
    )


def _check_numbers(args: argparse.Namespace) -> None:
    if args.steps is not None and args.steps < 1:
        raise DemoError(f"--steps is {args.steps}, expected at least 1")
    if args.tokens < 0:
        raise DemoError(f"--tokens is {args.tokens}, expected 0 or more")
    if args.minutes is not None and not (math.isfinite(args.minutes) and args.minutes > 0):
        raise DemoError(f"--minutes is {args.minutes}, expected a number above 0")
    if args.seed is not None and not 0 <= args.seed < 2**63:
        raise DemoError(f"--seed is {args.seed}, expected 0 .. 2^63 - 1")
    if not args.prompt:
        raise DemoError("--prompt is empty, expected at least one character")
    try:
        args.prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DemoError(
            f"--prompt is not UTF-8 text (character {error.start}), expected what the model reads"
        ) from error


def _first_given(*values: int | None) -> int:
    return next(value for value in values if value is not None)


def _contexts(given: str) -> tuple[int, ...]:
    try:
        contexts = tuple(sorted({int(part) for part in given.split(",")}))
    except ValueError:
        raise DemoError(
            f"--contexts is {given!r}, expected whole numbers with commas, as {DEFAULT_CONTEXTS}"
        ) from None
    if not 1 <= contexts[0] <= contexts[-1] <= MAX_CONTEXT:
        raise DemoError(f"--contexts is {given!r}, expected lengths from 1 to {MAX_CONTEXT}")
    return contexts


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" takes a GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise DemoError(f"--device is {name!r}, expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DemoError(
            f"--device is {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices; "
            "use --device cpu"
        )
    return device


def read_text(path: Path | None) -> tuple[str, bytes]:
    """Name and bytes of a UTF-8 file, or of Python's own documentation."""
    if path is None:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics))
        return "pydoc_data.topics", text.encode("utf-8")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DemoError(f"--text {path} cannot be read: {error.strerror}") from error
    if not content:
        raise DemoError(f"--text {path} is empty")
    if b"\0" in content:
        raise DemoError(f"--text {path} is binary (it holds NUL bytes), expected UTF-8 text")
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DemoError(
            f"--text {path} is not UTF-8 text (byte {error.start}: {error.reason}); "
            "convert it, for instance with iconv -t utf-8"
        ) from error
    return str(path), content


def split_text(name: str, text: bytes, length: int) -> tuple[Tensor, Tensor]:
    """The text without its last tenth, and that tenth."""
    least = math.ceil((length + 1) / HELD_OUT)
    if len(text) < least:
        raise DemoError(
            f"--text {name} has {len(text)} bytes, expected at least {least}: its last tenth "
            f"is held out and must fill one window of {length}"
        )
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    held_out = math.ceil(len(text) * HELD_OUT)
    return data[:-held_out], data[-held_out:]


def _checkpoint(path: Path | None, device: torch.device) -> Checkpoint | None:
    if path is None:
        return None
    try:
        checkpoint = load_checkpoint(path, device)
    except OSError as error:
        raise DemoError(f"--resume {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DemoError(f"--resume: {error}") from error
    if checkpoint.extra.get("size") not in RECIPES:
        raise DemoError(f"--resume {path} was not written by headworks demo")
    return checkpoint


def _size(given: str | None, checkpoint: Checkpoint | None, device: torch.device) -> str:
    if checkpoint is None:
        return given or ("tiny" if device.type == "cpu" else "small")
    trained = str(checkpoint.extra["size"])
    if given not in (None, trained):
        raise DemoError(f"--size is {given}, but the checkpoint to resume is {trained}")
    return trained


def _based(checkpoint: Checkpoint) -> BasedConfig:
    config = checkpoint.model.config
    if not isinstance(config, BasedConfig):
        raise DemoError("--resume: the checkpoint holds no BasedLM")
    return config


def _check_kernels(device: torch.device) -> None:
    # One tiny forward and backward: a missing library or backend shows here, in its own words.
    x = torch.ones(1, 4, 1, 16, device=device, requires_grad=True)
    try:
        o = linear_attention(x, x, x)
        assert isinstance(o, Tensor)
        torch.autograd.grad([o], [x], [x.detach()])
    except (ImportError, OSError, RuntimeError, NotImplementedError) as error:
        message = " ".join(str(error).split())
        raise DemoError(f"linear attention does not run on {device}: {message}") from error


def _output_folder(path: Path, config: BasedConfig) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
        free = shutil.disk_usage(path).free
    except OSError as error:
        raise DemoError(f"--out {path} cannot be written: {error.strerror}") from error
    needed = _BYTES_PER_PARAMETER * BasedLM(config, device="meta").num_parameters()
    if free < needed:
        raise DemoError(
            f"--out {path} has {free / 2**20:.0f} MiB free, expected {needed / 2**20:.0f} MiB for "
            "the checkpoint; choose another folder"
        )
    return path
