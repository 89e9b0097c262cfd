# SPDX-License-Identifier: Apache-2.0
"""Calls that come again: what shapes and options decide is decided once.

The checks of an operator depend on shapes, dtypes, devices and options, and so does most of what
its native call is made of. A layer makes the same call again and again, with other numbers in its
tensors. For plain tensors that want no gradient such a call is kept, ready to be made: it costs
less, and it touches less of what has left the caches since the last one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import Tensor

from . import _native
from ._native import autocasts, route

Key = tuple[Any, ...]
Call = TypeVar("Call", bound=Callable[..., Any])

_PLAIN = {int, float, bool, str, type(None)}


class Repeated(Generic[Call]):
    """The calls of an operator that are ready, by `key`; at most `most`, then it starts afresh."""

    def __init__(self, op: str, most: int = 256) -> None:
        self._op, self._most = op, most
        self._calls: dict[Key, Call | None] = {}

    def key(self, tensors: tuple[Tensor, ...], *options: Any) -> Key | None:
        """All that a call depends on but the elements of its tensors; None: it is not plain.

        Options are numbers, flags, names, None, or tuples of integers. 1, 1.0 and True differ.
        """
        for x in tensors:
            if type(x) is not Tensor:
                return None
        for y in options:
            kind = type(y)
            if kind is tuple:
                for n in y:
                    if type(n) is not int:
                        return None
            elif kind not in _PLAIN:
                return None
        if route(self._op, tensors) != "direct" or autocasts(tensors[0]):
            return None
        try:
            shapes, strides = [x.shape for x in tensors], [x.stride() for x in tensors]
        except RuntimeError:  # nested and sparse tensors have none: the checks will say so
            return None
        return (
            *shapes,
            *strides,
            *[x.dtype for x in tensors],
            *[x.device for x in tensors],
            options,
            *[type(y) for y in options],
            _native.DEFAULT_BACKEND,
        )

    def get(self, key: Key | None) -> Call | None:
        """The call, if it is ready."""
        return None if key is None else self._calls.get(key)

    def knows(self, key: Key) -> bool:
        """Whether a call like that was kept, or that there is no shorter way for it."""
        return key in self._calls

    def keep(self, key: Key, call: Call | None) -> None:
        """Keeps a call whose checks have passed; None: that there is no shorter way."""
        if len(self._calls) >= self._most:
            self._calls.clear()
        self._calls[key] = call
