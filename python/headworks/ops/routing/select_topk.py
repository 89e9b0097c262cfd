# SPDX-License-Identifier: Apache-2.0
"""hw.select_topk: the k largest of each row, deterministic, in order of position if asked."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..._errors import fail, require_flag, require_one_dtype, require_tensors
from ..._native import ACCUMULATION, NATIVE_CALLS, NativeCall, backend_for
from ..._repeated import Repeated, detached
from ...reference import select_topk as reference
from . import _select_topk_native as native
from ._checks import require_count

OP = "select_topk"


def select_topk(score: Tensor, k: int, *, keep_order: bool = True, backend: str = "auto") -> Tensor:
    r"""The indices of the k largest scores of each row.

    .. math::
        I = \text{the first } k \text{ of } 0 \dots N - 1 \text{ ordered by } (-s_i, i)

    The order is complete, so that the result is the same everywhere: equal scores rank by their
    index, the lower first; -0.0 equals 0.0; NaN counts as the smallest, below -inf.

    Args:
        score: [..., N], float64, float32, bfloat16 or float16; any strides.
        k: how many, from 0 to N.
        keep_order: return them by increasing index, as they stand in the row; else by rank, the
            best first.
        backend: "auto", "reference", or a compiled one by name.

    Returns:
        int64 [..., k]. Without gradient.

    Raises:
        ValueError: k out of range, a score without dimensions.
        TypeError: score that is not floating-point, k that is no integer.
        RuntimeError: a backend of another device.
        NotImplementedError: a backend that cannot take the call.

    Source: the order-preserving selection of SpAtten, Wang et al., HPCA 2021, arXiv 2012.09852.

    Example:
        >>> import torch, headworks as hw
        >>> score = torch.tensor([0.5, 2.0, 1.0, 2.0])
        >>> hw.select_topk(score, 3)
        tensor([1, 2, 3])
        >>> hw.select_topk(score, 3, keep_order=False)
        tensor([1, 3, 2])
    """
    score = detached(score)
    key = _repeated.key((score,), k, keep_order, backend)
    if (ready := _repeated.get(key)) is not None:
        return ready(score)
    k, keep_order, backend = _checked(score, k, keep_order, backend)
    if backend == "reference":
        return reference.select_topk(score, k, keep_order=keep_order)
    _repeated.offer(key, native.select_prepared, score, k, keep_order, backend)
    return native.select_topk(score, k, keep_order, backend)


_repeated: Repeated[Callable[[Tensor], Tensor]] = Repeated(OP)


def _checked(score: Tensor, k: int, keep_order: bool, backend: str) -> tuple[int, bool, str]:
    require_tensors(OP, score=score)
    require_one_dtype(OP, ACCUMULATION, score=score)
    if score.dim() == 0:
        fail(ValueError, OP, "score", "a number", "[..., N]", "Add a dimension: score[None].")
    k = require_count(OP, "k", k, 0, score.shape[-1], "A row has N scores.")
    keep_order = require_flag(OP, "keep_order", keep_order)
    return k, keep_order, backend_for(OP, backend, score)


def _native_call(
    score: Tensor, k: int, *, keep_order: bool = True, backend: str = "auto"
) -> NativeCall:
    return native.select_topk_call(score, *_checked(score, k, keep_order, backend))


NATIVE_CALLS[select_topk] = _native_call
