# SPDX-License-Identifier: Apache-2.0
"""Tolerance rules: a tensor against its oracle.

The oracle x is the reference in fp64 on the rounded inputs; m = max(1, max |x|) over its finite
elements. Inputs and cotangents of a case are of size 1.

    fp64, fp32    |y - x| <= atol * m + rtol * |x|                   fixed bounds, FIXED below
    fp16, bf16    |y - x| <= 2 * max |r - x| + floor * eps * m       r: the reference in that dtype

The floor is counted in eps, the input dtype's precision: two, for rounding the inputs of a matrix
product and a saved intermediate once each, unless an ill-conditioned case states its own. NaN and
infinities must be where the oracle has them.
"""

from __future__ import annotations

import torch
from torch import Tensor

# dtype of the inputs: (atol, rtol)
FIXED = {torch.float64: (1e-12, 1e-10), torch.float32: (1e-5, 1e-4)}
FLOOR = 2.0

_count = 0


def comparisons() -> int:
    """How many tensors have been compared in this process."""
    return _count


def compare(
    actual: Tensor,
    oracle: Tensor,
    dtype: torch.dtype,
    *,
    reference: Tensor | None = None,
    floor: float = FLOOR,
    name: str = "result",
) -> None:
    """Raise AssertionError unless `actual`, from inputs of `dtype`, is as good as it must be.

    `reference`, needed for 16-bit inputs, is the reference evaluated in `dtype`.
    """
    global _count
    _count += 1
    if actual.shape != oracle.shape:
        raise AssertionError(f"{name}: shape {list(actual.shape)}, expected {list(oracle.shape)}")
    if actual.numel() == 0:
        return
    rounded = oracle.detach().to(actual.dtype).cpu().double()
    x, y = oracle.detach().cpu().double(), actual.detach().cpu().double()
    _same_special(name, y, rounded)
    finite = torch.isfinite(rounded)
    x, y = x[finite], y[finite]
    if not x.numel():
        return
    error, size = (y - x).abs(), max(1.0, x.abs().max().item())
    if dtype in FIXED:
        atol, rtol = FIXED[dtype]
        bound = atol * size + rtol * x.abs()
    else:
        if reference is None:
            raise AssertionError(f"{name}: inputs of {dtype} need the reference in that dtype")
        r = reference.detach().cpu().double()[finite]
        r = torch.where(torch.isfinite(r), r, x)
        bound = 2 * (r - x).abs().max() + floor * torch.finfo(dtype).eps * size
        bound = bound.expand_as(error)
    worst = (error - bound).argmax()
    if not error[worst] <= bound[worst]:
        raise AssertionError(
            f"{name}: {int((error > bound).sum())} of {error.numel()} elements off; worst "
            f"{y[worst]:.9g} where the oracle has {x[worst]:.9g}: error {error[worst]:.3g}, "
            f"allowed {bound[worst]:.3g}; m = {size:.3g}"
        )


def _same_special(name: str, y: Tensor, x: Tensor) -> None:
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        if not torch.equal(kind(y), kind(x)):
            where = (kind(y) != kind(x)).nonzero()[0].tolist()
            raise AssertionError(
                f"{name}: {kind.__name__} at {int(kind(y).sum())} places, the oracle at "
                f"{int(kind(x).sum())}; first difference at {where}: {y[tuple(where)]:.6g}, "
                f"oracle {x[tuple(where)]:.6g}"
            )


def assert_same_bits(actual: Tensor, expected: Tensor, name: str = "result") -> None:
    """Raise unless both tensors are the same bit for bit (NaN equal to NaN)."""
    global _count
    _count += 1
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        raise AssertionError(
            f"{name}: {actual.dtype} {list(actual.shape)}, expected {expected.dtype} "
            f"{list(expected.shape)}"
        )
    if not torch.equal(_bits(actual), _bits(expected)):
        differ = _bits(actual) != _bits(expected)
        raise AssertionError(f"{name}: {int(differ.sum())} of {differ.numel()} elements differ")


def _bits(x: Tensor) -> Tensor:
    x = x.detach().contiguous()
    return x.view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[x.element_size()])
