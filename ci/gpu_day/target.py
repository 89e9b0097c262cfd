# SPDX-License-Identifier: Apache-2.0
"""What the day runs on: the GPU, or in a dry run the emulator, by the same code."""

from __future__ import annotations

import os
from dataclasses import dataclass

VARIABLE = "HEADWORKS_GPU_DAY"  # the target's name, for the processes that the day starts


@dataclass(frozen=True)
class Target:
    """A device by name.

    device     of the tensors, for torch
    prefix     of the backends' names
    most       cases of a specification, by step: None for all
    workers    processes at a time
    stretch    of every stage's time, for a machine that is slower than the one of the table
    """

    name: str
    device: str
    prefix: str
    most: int | None
    workers: int
    stretch: float

    def backend(self, name: str) -> str:
        """The full name of simt, sm80 or sm90 here."""
        return self.prefix + name

    def runs(self, backend: str) -> bool:
        """Whether a full name is one of the backends under test."""
        return backend in map(self.backend, KERNELS)


KERNELS = ("simt", "sm80", "sm90")
TARGETS = {
    "cuda": Target("cuda", "cuda", "", None, 14, 1.0),
    "emulator": Target("emulator", "cpu", "emulate:", 1, 2, 4.0),
}


def target() -> Target:
    """The one that the day's processes were started for."""
    return TARGETS[os.environ.get(VARIABLE, "cuda")]
