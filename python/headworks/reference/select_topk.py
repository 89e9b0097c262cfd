# SPDX-License-Identifier: Apache-2.0
"""The k largest of a row, in a defined order, in plain PyTorch.

Rank: by (-score, index). Equal scores rank by their index, the lower first; -0.0 equals 0.0. NaN
counts as the smallest: below -inf, and among themselves NaNs rank by their index.
"""

from __future__ import annotations

from torch import Tensor


def ranked(score: Tensor) -> Tensor:
    """The indices of the last dimension by rank, the best first. No gradient."""
    score = score.detach()
    missing = score.isnan()
    order = score.argsort(dim=-1, descending=True, stable=True)  # NaN before all numbers
    numbers_first = missing.gather(-1, order).int().argsort(dim=-1, stable=True)
    return order.gather(-1, numbers_first)


def select_topk(score: Tensor, k: int, *, keep_order: bool = True) -> Tensor:
    """int64 [..., k] of score [..., N]: by index with keep_order, else by rank."""
    best = ranked(score)[..., :k]
    return best.sort(-1).values if keep_order else best
