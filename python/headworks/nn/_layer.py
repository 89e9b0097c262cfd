# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-call"
"""What all modules here can do: start anew."""

from __future__ import annotations

from typing import Any

from torch import nn


class Layer(nn.Module):
    """A module whose ``reset_parameters`` makes it what a new one is.

    So ``Layer(..., device="meta").to_empty(device=...)`` needs no more than that call.
    """

    def reset_parameters(self) -> None:
        """Draws all weights as for a new module, and sets buffers back."""
        reset_children(self)


def reset_children(module: nn.Module) -> None:
    """Sets back everything below the module."""
    for child in module.children():
        reset: Any = getattr(child, "reset_parameters", None)
        if reset is None:
            reset_children(child)
        else:
            reset()
