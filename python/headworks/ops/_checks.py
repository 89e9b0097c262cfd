# SPDX-License-Identifier: Apache-2.0
"""Validation that several operators share. Nothing is allocated here."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .._errors import describe, fail, require_dense, require_same_device


def is_integer(n: object) -> bool:
    """Whether it is a size: an integer of Python or of a graph, and no flag."""
    return isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool)


def heads_match(hq: int, h: int) -> bool:
    return hq == h or (h > 0 and hq > 0 and hq % h == 0)


def check_cu_seqlens(op: str, name: str, cu_seqlens: object, x: Tensor) -> Tensor:
    """The bounds [N + 1] of the sequences packed in x, as int64. The values are looked at by
    check_cu_seqlens_values."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        fail(
            TypeError,
            op,
            name,
            describe(cu_seqlens),
            "an int32 or int64 tensor [N + 1]",
            "Pass the running sum of the sequence lengths, from 0 to the total.",
        )
    require_dense(op, name, cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        fail(
            ValueError,
            op,
            name,
            f"of shape {list(cu_seqlens.shape)}",
            "[N + 1]",
            "Pass the running sum of the sequence lengths, from 0 to the total.",
        )
    if x.shape[0] != 1:
        fail(
            ValueError,
            op,
            f"the batch size B with {name}",
            x.shape[0],
            "1",
            "Pack the sequences one after the other into [1, total, H, D].",
        )
    require_same_device(op, "q", x, **{name: cu_seqlens})
    return cu_seqlens.to(torch.int64)


def check_cu_seqlens_values(op: str, name: str, cu_seqlens: Tensor, total: int) -> None:
    """From 0 to the total, never decreasing. On a GPU this would wait for the device: not done."""
    if cu_seqlens.is_cpu:
        check_running_sum(op, name, cu_seqlens.tolist(), total)


def check_running_sum(op: str, name: str, bounds: Sequence[int], total: int) -> None:
    """The values of cu_seqlens, on the host."""
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if end < begin:
            fail(
                ValueError,
                op,
                f"{name}[{n + 1}]",
                end,
                f"at least {name}[{n}] = {begin}",
                "Pass a running sum of lengths.",
            )
    if bounds[0] != 0 or bounds[-1] != total:
        fail(
            ValueError,
            op,
            name,
            f"from {bounds[0]} to {bounds[-1]}",
            f"from 0 to the number of packed tokens, {total}",
            "Pass a running sum of lengths.",
        )
