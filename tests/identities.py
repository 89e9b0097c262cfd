# SPDX-License-Identifier: Apache-2.0
"""Helpers of the operators' own tests."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import pytest
import torch


def randn(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def fla_naive(operator):
    """fla's reference functions of an operator, read from their file (its package needs triton)."""
    spec = importlib.util.find_spec("fla")
    roots = list(spec.submodule_search_locations or []) if spec else []
    files = [f for root in roots if (f := Path(root, f"ops/{operator}/naive.py")).is_file()]
    if not files or importlib.util.find_spec("einops") is None:
        pytest.skip("fla's naive functions are not installed: pip install fla-core")
    spec = importlib.util.spec_from_file_location(f"fla_{operator}_naive", files[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Refused:
    """A call that must raise, and what the message must name."""

    def __init__(self, kind, /, *words, **arguments):
        self.kind, self.words, self.arguments = kind, words, arguments

    def __repr__(self):
        return "-".join([self.kind.__name__, *self.arguments, *self.words])[:80]

    def check(self, call):
        with pytest.raises(self.kind) as caught:
            call()
        message = str(caught.value)
        for word in (*self.words, "expected"):
            assert word in message, f"'{word}' is not in: {message}"
        assert message.rstrip().endswith("."), f"no remedy in: {message}"


def allocates_nothing(monkeypatch):
    """From here on every torch.empty fails."""

    def refuse(*args, **kwargs):
        raise AssertionError("something was allocated before the call was refused")

    monkeypatch.setattr(torch, "empty", refuse)
