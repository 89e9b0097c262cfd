# SPDX-License-Identifier: Apache-2.0
"""Native functions. The order of their arguments is written in C++ alone, in the list of each
(csrc/core/host/call_list.h): here the lists are read, and everything in Python that depends on the
order is made of them: tuples of arguments and results, checks, the schemas of torch operators.

    FORWARD = NativeFunction("key_scan.forward")
    made = FORWARD.Outputs(o=..., lse=...)
    FORWARD.run(backend, FORWARD.tensors(s=s, v=v), made, FORWARD.numbers())
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from . import _library

Maybe = Tensor | None


class Argument(NamedTuple):
    """An argument of a list.

    kind  of tensors "element", "wide" (the accumulation dtype of elements) or "index" (int64); of
          numbers "number", "flag", "integer" or "choice"
    axes  sizes of a tensor by symbol; "Sk?" may be 1 too. None: a number
    """

    name: str
    kind: str
    axes: tuple[str, ...] | None
    way: str  # "in", "out" or "inout"
    optional: bool
    has_rest: bool  # a dimension of size 2 may stand in front: a statistic and its rest


_TYPES = {"number": "float", "flag": "bool", "integer": "SymInt", "choice": "int"}


class NativeFunction:
    """A function of the native library, by a name such as "attention.forward"."""

    def __init__(self, name: str) -> None:
        self.name, self.number = name, _library.function(name)
        arguments = [
            Argument(n, kind, None if sizes is None else tuple(sizes.split()), *rest)
            for n, kind, sizes, *rest in _library.arguments(name)
        ]
        given = [a for a in arguments if a.axes is not None]
        self.inputs = tuple(a for a in given if a.way != "out")
        self.outputs = tuple(a for a in given if a.way == "out")
        self.scalars = tuple(a for a in arguments if a.axes is None)
        self._inputs = tuple(a.name for a in self.inputs)
        self._scalars = tuple(a.name for a in self.scalars)
        # Results by name, None for what is not wanted.
        self.Outputs = record("Outputs", [a.name for a in self.outputs], None)

    def tensors(self, first: Sequence[Maybe] = (), /, **others: Maybe) -> tuple[Maybe, ...]:
        """Inputs in order: `first`, with which the list begins, the others by name; what is left
        out is absent."""
        return _ordered(self, self._inputs, first, others)

    def numbers(self, first: Sequence[Any] = (), /, **others: Any) -> tuple[Any, ...]:
        """Scalars in order: `first`, with which the list begins, the others by name."""
        if len(first) + len(others) != len(self._scalars):
            raise TypeError(f"{self.name} takes {', '.join(self._scalars)}")
        return _ordered(self, self._scalars, first, others)

    def begins_with(self, tensors: Sequence[str], numbers: Sequence[str]) -> None:
        """Raises ImportError unless the list begins with these: then a tuple of such fields is a
        `first` of `tensors` and `numbers`."""
        for what, have, wanted in (
            ("tensors", self._inputs, tuple(tensors)),
            ("numbers", self._scalars, tuple(numbers)),
        ):
            if have[: len(wanted)] != wanted:
                raise ImportError(
                    f"headworks: {self.name} begins with the {what} {have[: len(wanted)]}, "
                    f"expected {wanted}. The library is of another version; rebuild it."
                )

    def run(
        self,
        backend: str,
        inputs: Sequence[Maybe],
        outputs: Sequence[Maybe],
        numbers: Sequence[Any] = (),
    ) -> None:
        """Call it: `inputs`, `outputs` and `numbers` in order."""
        _library.call(self.number, backend, (*inputs, *outputs), numbers)

    def schema(self, operator: str, extra: str = "") -> str:
        """Of the torch operator that takes the inputs, the scalars, what `extra` declares and a
        backend, and returns the outputs."""
        tensors = [_declared(a, i) for i, a in enumerate(self.inputs)]
        scalars = [f"{_TYPES[a.kind]} {a.name}" for a in self.scalars]
        given = ", ".join([*tensors, *scalars, *([extra] if extra else []), "str backend"])
        made = ", ".join(f"Tensor {a.name}" for a in self.outputs)
        return f"{operator}({given}) -> {f'({made})' if len(self.outputs) > 1 else 'Tensor'}"

    def split(self, arguments: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...], list[Any]]:
        """Arguments of such an operator: the inputs, the scalars, the rest."""
        tensors, end = len(self.inputs), len(self.inputs) + len(self.scalars)
        return tuple(arguments[:tensors]), tuple(arguments[tensors:end]), list(arguments[end:])


def record(name: str, fields: Sequence[str], default: object) -> Any:
    """A named tuple whose fields are those of a list, and have a default."""
    make: Any = namedtuple
    return make(name, fields, defaults=(default,) * len(fields))


def _declared(a: Argument, position: int) -> str:
    written = f"({chr(ord('a') + position)}!)" if a.way == "inout" else ""
    return f"Tensor{written}{'?' if a.optional else ''} {a.name}"


def _ordered(
    function: NativeFunction, names: tuple[str, ...], first: Sequence[Any], others: dict[str, Any]
) -> tuple[Any, ...]:
    get = others.get
    rest = [get(name) for name in names[len(first) :]]
    if len(others) > len(rest) or not others.keys() <= set(names[len(first) :]):
        got = ", ".join(others)
        raise TypeError(f"{function.name} takes {', '.join(names)}; got {got} by name")
    return (*first, *rest)
