# SPDX-License-Identifier: Apache-2.0
"""Errors in one form: the operator, the argument, what came, what was expected, the remedy."""

from __future__ import annotations

import math
from collections.abc import Container
from typing import NoReturn

import torch
from torch import Tensor

STRIDED = torch.strided


def fail(
    kind: type[Exception], op: str, argument: str, got: object, expected: str, remedy: str
) -> NoReturn:
    raise kind(f"{op}: {argument} is {got}; expected {expected}. {remedy}")


def describe(x: object) -> str:
    """A tensor as dtype, shape and device; anything else by its type."""
    if isinstance(x, Tensor):
        try:
            shape = str(list(x.shape))
        except RuntimeError:  # of a nested tensor, or a parameter that is not initialised
            shape = "without a shape"
        return f"{str(x.dtype).removeprefix('torch.')} {shape} on {x.device}"
    return f"a {type(x).__name__}"


def require_tensors(op: str, **tensors: object) -> None:
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            fail(TypeError, op, name, describe(x), "a torch.Tensor", "Convert it first.")
        require_dense(op, name, x)


def require_dense(op: str, name: str, x: Tensor) -> None:
    """Numbers in memory with strides."""
    if x.layout is STRIDED and not x.is_nested:
        return
    remedy = f"Use {name}.to_dense()."
    if x.is_nested:
        remedy = (
            f"Pad it, {name}.to_padded_tensor(0.0), and hide the padding, or pack the sequences "
            "one after the other where there is cu_seqlens."
        )
    kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.").lstrip("_")
    fail(TypeError, op, name, f"a tensor of layout {kind}", "a dense tensor of any strides", remedy)


def require_rank(op: str, rank: int, layout: str, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.dim() != rank:
            fail(
                ValueError,
                op,
                name,
                f"of shape {list(x.shape)}",
                f"{rank} dimensions {layout}",
                "Add or move dimensions with unsqueeze() or transpose(); strides are free.",
            )


def require_sizes(op: str, expected: str, name: str, x: Tensor, sizes: tuple[int, ...]) -> None:
    if tuple(x.shape) != tuple(sizes):
        fail(
            ValueError,
            op,
            name,
            f"of shape {list(x.shape)}",
            f"{expected} = {list(sizes)}",
            "Check the order of the dimensions.",
        )


def require_same_device(op: str, first: str, x: Tensor, /, **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and t.device != x.device:
            fail(
                RuntimeError,
                op,
                name,
                f"on {t.device}",
                f"{x.device}, where {first} is",
                f"Move it with {name}.to({first}.device).",
            )


def require_one_dtype(op: str, allowed: Container[torch.dtype], **tensors: Tensor) -> None:
    """All floating tensors share one of the supported dtypes."""
    (first, x), *rest = tensors.items()
    if x.dtype not in allowed:
        fail(
            TypeError,
            op,
            first,
            x.dtype,
            "float64, float32, bfloat16 or float16",
            f"Cast it, for example {first}.{'dequantize' if x.is_quantized else 'float'}().",
        )
    for name, t in rest:
        if t.dtype != x.dtype:
            fail(
                TypeError,
                op,
                name,
                t.dtype,
                f"{x.dtype}, the dtype of {first}",
                "Cast them to one dtype, or call under torch.autocast, which casts them for you.",
            )


def require_flag(op: str, name: str, flag: object) -> bool:
    """A Python boolean and nothing else: "False" is true, and 0 may be a number misplaced."""
    if not isinstance(flag, bool):
        got = describe(flag) if isinstance(flag, Tensor) else repr(flag)
        fail(TypeError, op, name, got, "True or False", "Flags are fixed when the call is made.")
    return flag


def require_flags(op: str, **flags: object) -> None:
    for name, flag in flags.items():
        require_flag(op, name, flag)


def require_number(op: str, name: str, x: object) -> float:
    """A finite Python number as a float."""
    if type(x) is float and -math.inf < x < math.inf:  # as torch.compile can follow it
        return x
    if type(x) is int:
        return float(x)
    if isinstance(x, (Tensor, str)) or not hasattr(x, "__float__"):
        fail(
            TypeError,
            op,
            name,
            describe(x),
            "a Python number",
            "Pass a float; numbers are fixed when the call is made.",
        )
    x = float(x)
    if not math.isfinite(x):
        fail(ValueError, op, name, x, "a finite number", "Check how it was computed.")
    return x
