# SPDX-License-Identifier: Apache-2.0
"""Packed sequences of attention: cu_seqlens and the longest lengths, without asking a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..._errors import describe, fail
from ..._native import Maybe, is_readable
from .._checks import check_cu_seqlens, check_cu_seqlens_values, check_running_sum

Bounds = Tensor | Sequence[int]


def check_bounds(
    op: str, which: str, bounds: Bounds | None, longest: object, x: Tensor, packed: bool
) -> tuple[Maybe, int]:
    """cu_seqlens as int64 and max_seqlen, -1 where it can be had from the values."""
    name, name_max = f"cu_seqlens_{which}", f"max_seqlen_{which}"
    if bounds is None:
        got, expected = (name, "a tensor or list") if packed else (name_max, "None")
        fail(
            ValueError,
            op,
            got,
            "None" if packed else longest,
            f"{expected} {'with' if packed else 'without'} packed sequences",
            "Packed sequences need cu_seqlens_q and cu_seqlens_k, and both max_seqlen if those "
            "are tensors on a GPU.",
        )
    number = _is_length(longest)
    if longest is not None and not (number and longest >= 0):  # type: ignore[operator]
        fail(
            ValueError if number else TypeError,
            op,
            name_max,
            longest if number else describe(longest),
            "a Python integer >= 0",
            "Pass the length of the longest sequence, without asking the device for it.",
        )
    if isinstance(bounds, (tuple, list)):
        bounds, longest = _bounds_of_list(op, name, bounds, longest, x)
    tensor = check_cu_seqlens(op, name, bounds, x)
    if longest is None and tensor.is_cuda:
        fail(
            ValueError,
            op,
            name_max,
            "None",
            f"the length of the longest sequence, as {name} is on the GPU",
            f"Pass {name_max}, or {name} as a list of numbers: reading it from the device would "
            "make the host wait.",
        )
    return tensor, -1 if longest is None else longest  # type: ignore[return-value]


def _is_length(n: object) -> bool:
    """numpy's integers too; a tensor, of which the device would have to be asked, is none."""
    if isinstance(n, (bool, Tensor)):
        return False
    return isinstance(n, (int, torch.SymInt)) or hasattr(type(n), "__index__")


def _bounds_of_list(
    op: str, name: str, bounds: Sequence[int], longest: object, x: Tensor
) -> tuple[Tensor, object]:
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in bounds):
        fail(TypeError, op, name, bounds, "a list of integers", "Pass the running sum of lengths.")
    if bounds:
        check_running_sum(op, name, bounds, x.shape[1])
    host = torch.tensor(bounds, dtype=torch.int64)
    if longest is None:
        longest = max([0, *(b - a for a, b in itertools.pairwise(bounds))])
    if x.is_cuda:
        host = host.pin_memory()
    return host.to(x.device, non_blocking=True), longest


def check_same_number(op: str, bounds_q: Tensor, bounds_k: Tensor) -> None:
    if bounds_q.shape != bounds_k.shape:
        fail(
            ValueError,
            op,
            "cu_seqlens_k",
            f"of shape {list(bounds_k.shape)}",
            f"that of cu_seqlens_q, {list(bounds_q.shape)}",
            "Every sequence has queries and keys, though either may be none.",
        )


def check_values(op: str, which: str, bounds: Maybe, longest: int, total: int) -> None:
    """What can be checked where cu_seqlens lie on the CPU."""
    if bounds is None or not bounds.is_cpu:
        return
    check_cu_seqlens_values(op, f"cu_seqlens_{which}", bounds, total)
    true = longest_of(bounds)
    if 0 <= longest < true:
        fail(
            ValueError,
            op,
            f"max_seqlen_{which}",
            longest,
            f"at least {true}, the longest sequence of cu_seqlens_{which}",
            "Pass the length of the longest sequence, or None.",
        )


def check_rows_have_values(op: str, bounds_q: Maybe, bounds_k: Maybe) -> None:
    """For identity_mix: every sequence has as many values as rows, where that can be looked at."""
    if bounds_q is None or bounds_k is None or bounds_q is bounds_k:
        return
    for bounds in (bounds_q, bounds_k):
        if not is_readable(bounds) or not bounds.is_cpu:
            return
    if not torch.equal(bounds_q.long(), bounds_k.long()):
        fail(
            ValueError,
            op,
            "cu_seqlens_k with identity_mix",
            "other bounds than cu_seqlens_q",
            "the same",
            "It mixes v_i into o_i, so every row needs a value of its own.",
        )


def longest_of(bounds: Tensor) -> int:
    """The longest sequence, of bounds on the CPU."""
    return int(bounds.diff().amax()) if bounds.shape[0] > 1 else 0
