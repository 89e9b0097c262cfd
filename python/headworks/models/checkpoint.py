# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: one file with the config, the weights and the name of the tokenizer.

The file is a plain dictionary of tensors, numbers and strings, read with ``weights_only=True``:
loading it runs no code from it.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .base import LanguageModel
from .based import BasedLM
from .config import BasedConfig, SoftmaxConfig
from .routing import RoutingConfig, RoutingLM
from .softmax import SoftmaxLM
from .tokenizer import TOKENIZERS, ByteTokenizer

FORMAT = "headworks checkpoint 1"
_MODELS: dict[str, tuple[type[Any], type[Any]]] = {
    "BasedLM": (BasedLM, BasedConfig),
    "RoutingLM": (RoutingLM, RoutingConfig),
    "SoftmaxLM": (SoftmaxLM, SoftmaxConfig),
}


@dataclass
class Checkpoint:
    """What a checkpoint file holds: a model, its tokenizer and anything else saved beside them."""

    model: LanguageModel
    tokenizer: ByteTokenizer | None
    extra: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    path: str | os.PathLike[str],
    model: LanguageModel,
    *,
    tokenizer: ByteTokenizer | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """Writes the model, and ``extra`` (tensors, numbers, strings, and lists and dicts of them).

    The file appears under its name only when it is complete and :func:`load_checkpoint` would take
    it; an older one stays until then.

    Raises:
        ValueError: a model that is none of these, or something in ``extra`` that loading refuses.
        OSError: the file cannot be written, as on a full disk, or the name is that of something
            else, such as a device.
    """
    if _MODELS.get(type(model).__name__, (None,))[0] is not type(model):
        raise ValueError(
            f"save_checkpoint: model is a {type(model).__name__}, expected one of "
            f"{sorted(_MODELS)} itself; take it out of its wrapper (module, _orig_mod)"
        )
    content = {
        "format": FORMAT,
        "model": type(model).__name__,
        "config": model.config.to_dict(),
        "tokenizer": None if tokenizer is None else tokenizer.name,
        "state_dict": model.state_dict(),
        "extra": extra or {},
    }
    path = Path(path).resolve()  # a link stays one
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a file that a checkpoint could replace", str(path))
    partial = path.with_name(path.name + ".partial")
    try:
        try:
            _write(content, partial)
            torch.load(partial, map_location="meta", weights_only=True, mmap=True)
        except OSError:
            raise
        except Exception as error:
            raise ValueError(
                "save_checkpoint: extra holds what a checkpoint cannot, expected tensors, numbers, "
                f"strings, and lists and dicts of them: {_first_line(error)}"
            ) from error
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(
    path: str | os.PathLike[str], device: str | torch.device = "cpu", **options: Any
) -> Checkpoint:
    """Reads what :func:`save_checkpoint` wrote, the model on ``device``.

    ``options`` are arguments of the model beside its config, as ``backend`` of a RoutingLM.

    Raises:
        ValueError: the file is no checkpoint, or not all of one.
        OSError: there is no such file, or it cannot be opened.
    """
    content = _read(path, device)
    model_type, config_type = _MODELS[content["model"]]
    try:
        config = config_type.from_dict(content["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} holds a config that is none: {_first_line(error)}") from error
    model = model_type(config, device="meta", **options)
    try:
        model.load_state_dict(content["state_dict"], assign=True)
    except (AttributeError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{path} holds weights of another model than its config says: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    model._tie()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    name = content["tokenizer"]
    return Checkpoint(model, None if name is None else TOKENIZERS[name](), content["extra"])


def _write(content: dict[str, Any], path: Path) -> None:
    """torch.save, with the system's own error where the file cannot be written."""
    try:
        with path.open("wb") as file:
            torch.save(content, file)
    except RuntimeError as error:  # torch's, about what followed the failed write
        cause = error.__context__
        if isinstance(cause, OSError):
            raise OSError(cause.errno, os.strerror(cause.errno or 0), str(path)) from error
        raise


def _read(path: str | os.PathLike[str], device: str | torch.device) -> dict[str, Any]:
    """The content of a checkpoint, with everything that belongs to one."""
    with Path(path).open("rb") as file:
        try:
            content = torch.load(file, map_location=device, weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{path} is not a headworks checkpoint: {_first_line(error)}"
            ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a headworks checkpoint (no {FORMAT!r} in it)")
    missing = sorted({"model", "config", "tokenizer", "state_dict", "extra"} - set(content))
    if missing:
        raise ValueError(f"{path} is not all of a headworks checkpoint: {missing} are missing")
    expected: list[tuple[str, list[Any]]] = [
        ("model", sorted(_MODELS)), ("tokenizer", [None, *TOKENIZERS])
    ]  # fmt: skip
    for what, known in expected:
        if content[what] not in known:
            raise ValueError(
                f"{path} holds a {what} {content[what]}, expected one of {known}; "
                "was it written by a newer headworks?"
            )
    return content


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
