# SPDX-License-Identifier: Apache-2.0
"""Hostile memory: poisoned outputs and unusual strides."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "transposed", "strided", "padded", "offset", "expanded")


def restride(x: Tensor, layout: str) -> Tensor:
    """The values of `x` in another memory layout. Memory between the elements is NaN.

    transposed    the second and third dimensions swapped in memory (with 2, the first two)
    strided       every second element of the last dimension of a wider tensor
    padded        rows one element apart
    offset        rows two elements apart, at an odd offset from the start of the storage
    expanded      zero strides along the first dimension: its first slice, repeated
    """
    if layout == "contiguous" or x.dim() < 2 or x.numel() == 0:
        return x
    if layout == "transposed":
        a, b = (1, 2) if x.dim() > 2 else (0, 1)
        return x.transpose(a, b).contiguous().transpose(a, b)
    if layout == "strided":
        y = _gaps(x, (*x.shape[:-1], 2 * x.shape[-1]))[..., ::2]
    elif layout == "padded":
        y = _gaps(x, (*x.shape[:-1], x.shape[-1] + 1))[..., :-1]
    elif layout == "offset":
        y = _gaps(x, (*x.shape[:-1], x.shape[-1] + 2))[..., 1:-1]
    elif layout == "expanded":
        return x[:1].expand_as(x)
    else:
        raise ValueError(f"restride: layout is {layout!r}; expected one of {LAYOUTS}")
    y.copy_(x)
    return y


def _gaps(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    filler = float("nan") if x.is_floating_point() else -1
    return torch.full(shape, filler, dtype=x.dtype, device=x.device)


def poison_empty() -> contextlib.AbstractContextManager[None]:
    """Fill what torch.empty and Tensor.new_empty return: NaN in floats, 0x7f in integers."""

    def poisoned(x: Tensor) -> Tensor:
        if x.is_floating_point():
            x.detach().fill_(float("nan"))
        elif x.dtype != torch.bool and not x.is_complex():
            x.fill_(0x7F)
        return x

    return _empties(poisoned)


def restride_empty(layout: str) -> contextlib.AbstractContextManager[None]:
    """Let torch.empty and Tensor.new_empty, with which operators allocate what they return, give
    tensors of another memory layout."""
    return _empties(lambda x: restride(x, layout))


@contextlib.contextmanager
def _empties(change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Plain ones, that is; tensors of a graph in the making are left alone."""
    empty, new_empty = torch.empty, Tensor.new_empty

    def changed(x: Tensor) -> Tensor:
        plain = type(x) is Tensor and not x.is_meta and not torch._C._len_torch_dispatch_stack()
        return change(x) if plain else x

    with (
        mock.patch.object(torch, "empty", lambda *a, **k: changed(empty(*a, **k))),
        mock.patch.object(Tensor, "new_empty", lambda *a, **k: changed(new_empty(*a, **k))),
    ):
        yield
