# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing of layers that a forward in training changes.

torch.utils.checkpoint runs a forward once more inside the backward pass. That second run must
compute what the first did, from a layer that has changed since, and must not change it again:

- a forward inside a backward pass is taken for a recomputation, `recomputing`;
- a forward that may be repeated, `may_repeat`, leaves in a `Memory` what the repetition needs;
- the repetition finds it by its input. A sketch of the input, a few sums, stands for it: the first
  run and the second have the same one, up to the order of sums that are not deterministic.

Of two forwards with the same input the one that was not repeated yet, then the later one, is
taken: backward passes run from late to early.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

_MOST = 64  # forwards that wait for their backward pass
_TOLERANCE = 1e-3  # of the largest number of a sketch


def recomputing() -> bool:
    """Whether this code runs inside a backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def may_repeat() -> bool:
    """Whether a backward pass may repeat this forward: without gradients, as in the reentrant mode
    of checkpointing, or while somebody packs saved tensors, as in the other."""
    if torch.compiler.is_compiling():
        return False
    return not torch.is_grad_enabled() or _hooks() is not None


def _hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def unrecorded() -> contextlib.AbstractContextManager[Any]:
    """Without gradients and out of sight of selective checkpointing, which counts operations: one
    that only the first run makes would shift what is stored for the others."""
    if recomputing() or (not torch.compiler.is_compiling() and _hooks() is not None):
        return _without_modes()
    return torch.no_grad()


@contextlib.contextmanager
def _without_modes() -> Iterator[None]:
    with torch.no_grad(), _disable_current_modes():
        yield


@dataclass
class _Entry:
    shape: torch.Size
    sketch: Tensor
    past: Any
    is_taken: bool = False


@dataclass
class Memory:
    """The forwards that wait for their backward pass, in order. Copies start empty."""

    entries: list[_Entry] = field(default_factory=list)

    def note(self, x: Tensor, past: Any) -> None:
        """Remembers what a forward with input x [B, S, ...] leaves; forgets what was repeated."""
        with unrecorded():
            waiting = [entry for entry in self.entries if not entry.is_taken]
            self.entries = [*waiting[1 - _MOST :], _Entry(x.shape, _sketch(x), past)]

    def recall(self, x: Tensor) -> Any:
        """What the forward with this input left; None if there was none."""
        if not self.entries:
            return None
        with unrecorded():
            sketch = _sketch(x)
            fitting = [entry for entry in self.entries if entry.shape == x.shape]
            distance = [float((entry.sketch - sketch).abs().amax()) for entry in fitting]
            largest = float(sketch.abs().amax())
        order = [
            (d, e.is_taken, -i) for i, (d, e) in enumerate(zip(distance, fitting, strict=True))
        ]
        if not order or min(order)[0] > _TOLERANCE * largest:
            return None
        entry = fitting[-min(order)[2]]
        entry.is_taken = True
        return entry.past

    def __deepcopy__(self, memo: Any) -> Memory:
        return Memory()

    def __reduce__(self) -> tuple[Any, ...]:
        return Memory, ()


def _sketch(x: Tensor) -> Tensor:
    """Weighted sums of the tokens of x [B, S, ...], which tell their order too."""
    x = x.detach().flatten(0, 1).flatten(1).float()  # [B S, C]
    x = x.nan_to_num(0.0, 0.0, 0.0)
    weight = torch.arange(1, len(x) + 1, dtype=torch.float32, device=x.device).cos()
    return torch.nn.functional.pad(weight @ x, (0, 1))  # never empty
