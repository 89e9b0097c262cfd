# SPDX-License-Identifier: Apache-2.0
"""What the registered torch operators check of their tensors.

The public functions validate their arguments and say what is wrong in the caller's words. The
operators below them are called from elsewhere too: from a graph, with what hooks made of saved
tensors, by hand. Native code reads memory by shapes: here they are found to belong together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .._errors import describe, fail, require_same_device
from .._functions import Argument, Maybe
from .._native import ACCUMULATION
from ._checks import heads_match

_REMEDY = "Call the function of headworks, which makes such a call from any arguments."


def operands(**layouts: str) -> tuple[Argument, ...]:
    """Tensors of an operator that is not one native function, from name="kind axis axis ..."; of
    others `NativeFunction.inputs` says the same."""
    made = []
    for name, layout in layouts.items():
        kind, *axes = layout.split()
        made.append(Argument(name, kind, tuple(axes), "in", True, False))
    return tuple(made)


def check_operands(
    op: str, expected: Sequence[Argument], tensors: Sequence[Maybe], **sizes: int
) -> dict[str, int]:
    """All sizes by symbol, of tensors that fit; `sizes` are those known before."""
    first = tensors[0]
    assert first is not None
    if first.dtype not in ACCUMULATION:
        _refuse(op, TypeError, expected[0].name, first, "a floating-point dtype that is supported")
    dtypes = {"element": first.dtype, "wide": ACCUMULATION[first.dtype], "index": torch.int64}
    for operand, x in zip(expected, tensors, strict=True):
        if x is None:
            require(op, operand.name, "None", operand.optional, "a tensor")
            continue
        name, axes = operand.name, operand.axes
        assert axes is not None
        if x.dtype != dtypes[operand.kind]:
            _refuse(op, TypeError, name, x, str(dtypes[operand.kind]))
        require_same_device(op, expected[0].name, first, **{name: x})
        shape, fits = x.shape, True
        if operand.has_rest and len(shape) == len(axes) + 1:
            fits, shape = shape[0] == 2, shape[1:]
        fits = fits and len(shape) == len(axes)
        for axis, size in zip(axes, shape, strict=False):
            known = sizes.setdefault(axis.rstrip("?"), size)
            fits = fits and (size == known or (size == 1 and axis[-1] == "?"))
        if not fits:
            _refuse(op, ValueError, name, x, f"[{', '.join(axes)}] with {_in_words(sizes)}")
    if "Hq" in sizes and "H" in sizes:
        heads = sizes["Hq"], sizes["H"]
        require(op, "Hq and H", heads, heads_match(*heads), "Hq a multiple of H")
    return sizes


def _refuse(op: str, kind: type[Exception], name: str, x: torch.Tensor, expected: str) -> None:
    fail(kind, op, name, describe(x), expected, _REMEDY)


def _in_words(sizes: dict[str, int]) -> str:
    return ", ".join(f"{axis} = {size}" for axis, size in sizes.items())


def require(op: str, what: str, got: object, condition: bool, expected: str) -> None:
    """What the shapes alone do not say."""
    if not condition:
        fail(ValueError, op, what, str(got), expected, _REMEDY)


def require_given(op: str, **pairs: tuple[Maybe, bool]) -> None:
    """name=(tensor, wanted): there where it is wanted, and only there."""
    for name, (x, wanted) in pairs.items():
        if (x is not None) != wanted:
            got, expected = ("None", "a tensor") if wanted else ("a tensor", "None")
            fail(ValueError, op, name, got, f"{expected} with these options", _REMEDY)
