# SPDX-License-Identifier: Apache-2.0
"""Results that are named tuples, as nodes of torch's trees."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch.utils import _pytree

Class = TypeVar("Class", bound=type)


def saved_by_name(cls: Class) -> Class:
    """A decorator of named tuples: torch.export.save writes what holds them, and load finds them.

    torch takes every named tuple apart; only its name in a file has to be told, and that it is no
    harm to make one. Old versions cannot be told.
    """
    register = getattr(_pytree, "_register_namedtuple", None)
    if register is not None:
        register(cls, serialized_type_name=f"headworks.{cls.__name__}")
    if hasattr(torch.serialization, "add_safe_globals"):
        torch.serialization.add_safe_globals([cls])
    return cls
