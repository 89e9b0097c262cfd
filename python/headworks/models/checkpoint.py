# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: one file with the config, the weights and the name of the tokenizer.

The file is a plain dictionary of tensors, numbers and strings, read with ``weights_only=True``:
loading it runs no code from it.
"""

from __future__ import annotations

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

    The file appears under its name only when it is complete; an older one stays until then.
    """
    content = {
        "format": FORMAT,
        "model": type(model).__name__,
        "config": model.config.to_dict(),
        "tokenizer": None if tokenizer is None else tokenizer.name,
        "state_dict": model.state_dict(),
        "extra": extra or {},
    }
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        torch.save(content, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(
    path: str | os.PathLike[str], device: str | torch.device = "cpu", **options: Any
) -> Checkpoint:
    """Reads what :func:`save_checkpoint` wrote, the model on ``device``.

    ``options`` are arguments of the model beside its config, as ``backend`` of a RoutingLM.
    """
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is not a headworks checkpoint: {_first_line(error)}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a headworks checkpoint (no {FORMAT!r} in it)")
    if content["model"] not in _MODELS:
        raise ValueError(
            f"{path} holds a {content['model']}, expected one of {sorted(_MODELS)}; "
            "was it written by a newer headworks?"
        )
    model_type, config_type = _MODELS[content["model"]]
    model = model_type(config_type.from_dict(content["config"]), device="meta", **options)
    model.load_state_dict(content["state_dict"], assign=True)
    model._tie()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    name = content["tokenizer"]
    return Checkpoint(model, None if name is None else TOKENIZERS[name](), content["extra"])


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
