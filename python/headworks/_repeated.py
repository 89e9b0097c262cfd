# SPDX-License-Identifier: Apache-2.0
"""Calls that come again: what shapes and options decide is decided once.

The checks of an operator depend on shapes, dtypes, devices and options, and so does most of what
its native call is made of. A layer makes the same call again and again, with other numbers in its
tensors. For plain tensors that want no gradient such a call is kept, ready to be made: it costs
less, and it touches less of what has left the caches since the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.nn import Parameter

from . import _library, _native
from ._functions import Maybe, NativeFunction
from ._native import autocasts, route

Key = bytes
Call = TypeVar("Call", bound=Callable[..., Any])


class Repeated(Generic[Call]):
    """The calls of an operator that are ready, by `key`; at most `most`, then it starts afresh."""

    def __init__(self, op: str, most: int = 256) -> None:
        self._op, self._most = op, most
        self._calls: dict[Key, Call | None] = {}
        self._once: set[Key] = set()

    def key(self, tensors: tuple[Tensor, ...], *options: Any) -> Key | None:
        """All that a call depends on but the elements of its tensors; None: it is not plain.

        Options are numbers, flags, names, None, or tuples of them. 1, 1.0 and True differ.
        """
        for x in tensors:
            if type(x) is not Tensor:
                return None
        try:
            if route(self._op, tensors) != "direct" or autocasts(tensors[0]):
                return None
        except NotImplementedError:  # of compiled backends; the call may be the reference's
            return None
        return _library.repeat_key(tensors, (*options, _native.DEFAULT_BACKEND))

    def get(self, key: Key | None) -> Call | None:
        """The call, if it is ready."""
        return None if key is None else self._calls.get(key)

    def comes_again(self, key: Key) -> bool:
        """Whether a call like that was made before and is not kept: it should be. A shape that
        comes once, as of a cache that grows, is not worth it."""
        if key in self._calls:
            return False
        if key in self._once:
            self._once.discard(key)
            return True
        if len(self._once) >= self._most:
            self._once.clear()
        self._once.add(key)
        return False

    def offer(self, key: Key | None, make: Callable[..., Call | None], *arguments: Any) -> None:
        """Keeps what `make(*arguments)` gives, if a call like that was made before."""
        if key is not None and self.comes_again(key):
            self.keep(key, make(*arguments))

    def keep(self, key: Key, call: Call | None) -> None:
        """Keeps a call whose checks have passed; None: that there is no shorter way."""
        if len(self._calls) >= self._most:
            self._calls.clear()
        self._calls[key] = call


def detached(x: Tensor) -> Tensor:
    """An argument of an operator without gradient, as it enters a key. What is no tensor or no
    ordinary one is for the checks."""
    if type(x) is Parameter or (type(x) is Tensor and x.requires_grad):
        return x.detach()
    return x


class Ready:
    """A native call as a function of the tensors that it was made with: of others of the same
    sizes, strides, dtypes and device it gives the first output."""

    __slots__ = ("_at", "_backend", "_given", "_made", "_number", "_numbers")

    def __init__(
        self,
        function: NativeFunction,
        backend: str,
        inputs: Sequence[Maybe],
        outputs: Sequence[Maybe],
        numbers: Sequence[Any],
        tensors: Sequence[Tensor],
    ) -> None:
        self._given: list[Maybe] = [*inputs, *(None,) * len(outputs)]
        self._at = []
        for x in tensors:
            place = next(i for i, y in enumerate(self._given) if y is x)
            self._at.append(place)
            self._given[place] = None  # the next one may be the same tensor
        self._made = [
            (len(inputs) + i, x.shape, x.dtype) for i, x in enumerate(outputs) if x is not None
        ]
        self._number, self._backend, self._numbers = function.number, backend, tuple(numbers)

    def __call__(self, *tensors: Tensor) -> Tensor:
        given = self._given.copy()
        for i, x in zip(self._at, tensors, strict=True):
            given[i] = x
        for i, size, dtype in self._made:
            given[i] = tensors[0].new_empty(size, dtype=dtype)
        _library.call(self._number, self._backend, given, self._numbers)
        return given[self._made[0][0]]  # type: ignore[return-value]
