# SPDX-License-Identifier: Apache-2.0
"""hw.attention_probs: chosen columns, rows or diagonals of the weights, never all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..._errors import describe, fail, require_dense, require_same_device
from ..._native import (
    NATIVE_CALLS,
    Maybe,
    NativeCall,
    as_written,
    backend_for,
    route,
)
from ...reference import attention as reference
from . import _native as native
from . import _operators as operators
from ._checks import cast, check_index, check_index_values, check_inputs
from ._score import Score, ScoreOptions, check_lse, reference_options, score_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

_OP = "attention_probs"


def attention_probs(
    q: Tensor,
    k: Tensor,
    *,
    lse: Tensor | None = None,
    keys: Tensor | None = None,
    rows: Tensor | None = None,
    offsets: Tensor | None = None,
    backend: str = "auto",
    **options: Unpack[ScoreOptions],
) -> Tensor:
    r"""Attention weights p of chosen pairs, in time and memory proportional to their number.

    Exactly one of keys, rows and offsets says which.

    Args:
        q: [B, Sq, Hq, D].
        k: [B, Sk, H, D], with Hq a multiple of H.
        lse: [B, Hq, Sq] of the same q, k and options; computed here if None. See
            hw.attention_transpose.
        keys: int64 [n] or [B, n]: these columns, p_{i, keys[n]}.
        rows: int64 [n] or [B, n]: these rows, p_{rows[n], j}.
        offsets: int64 [n]: these diagonals, p_{i, i + Sk - Sq + offsets[n]}; 0 is the last key
            that a causal row sees, -1 the one before it.
        backend: as in hw.attention.
        options: the score options of hw.attention.

    With packed sequences all three count within each sequence: keys [0] is the first key of the
    sequence of row i, rows [0] the first row of the sequence of key j.

    Returns:
        [B, Hq, Sq, n] for keys and offsets, [B, Hq, n, Sk] for rows; float32 (float64 for float64
        inputs). A key that the row does not see, or that is none, has weight 0. Not
        differentiable: the result is detached.

    Raises:
        as hw.attention_transpose; ValueError for none or several of the three, or (where they lie
        on the CPU) keys or rows out of range.

    Example:
        >>> import torch, headworks as hw
        >>> q, k = torch.randn(2, 1, 100, 4, 64)
        >>> first = hw.attention_probs(q, k, is_causal=True, keys=torch.tensor([0]))
        >>> first.shape, first[0, :, 0, 0].round()
        (torch.Size([1, 4, 100, 1]), tensor([1., 1., 1., 1.]))
    """
    score, lse, keys, rows, offsets = _arguments(q, k, lse, keys, rows, offsets, options)
    backend = backend_for(_OP, backend, score.q)
    if backend == "reference":
        with as_written(score.q):
            return reference.attention_probs(
                score.q, score.k, lse=lse, keys=keys, rows=rows, offsets=offsets,
                **reference_options(_OP, score),
            )  # fmt: skip
    way = route(_OP, (*score.tensors, lse, keys, rows, offsets))
    score, way = score.detached(), "operator" if way == "autograd" else way
    row = operators.row_statistic(score, backend) if lse is None else lse
    call = native.probs if way == "direct" else operators.probs
    return call(score, row, keys, rows, offsets, backend)


def _arguments(
    q: Tensor, k: Tensor, lse: Maybe, keys: Maybe, rows: Maybe, offsets: Maybe, options: Any
) -> tuple[Score, Maybe, Maybe, Maybe, Maybe]:
    """The arguments cast and validated: score lse keys rows offsets."""
    q, k = cast(q, k)
    check_inputs(_OP, q, k)
    given = [n for n, x in (("keys", keys), ("rows", rows), ("offsets", offsets)) if x is not None]
    if len(given) != 1:
        fail(
            ValueError,
            _OP,
            "the choice of weights",
            " and ".join(given) or "None",
            "exactly one of keys, rows and offsets",
            "Call it once for each.",
        )
    keys = None if keys is None else check_index(_OP, "keys", keys, q)
    rows = None if rows is None else check_index(_OP, "rows", rows, q)
    check_index_values(_OP, "keys", keys, k.shape[1])
    check_index_values(_OP, "rows", rows, q.shape[1])
    if offsets is not None:
        _check_offsets(offsets, q)
    score = score_of(_OP, q, k, **options)
    return score, check_lse(_OP, lse, score), keys, rows, offsets


def _check_offsets(offsets: object, q: Tensor) -> None:
    if not isinstance(offsets, Tensor) or offsets.dtype != torch.int64 or offsets.dim() != 1:
        kind = ValueError if isinstance(offsets, Tensor) and offsets.dim() != 1 else TypeError
        fail(
            kind,
            _OP,
            "offsets",
            describe(offsets),
            "an int64 tensor [n]",
            "Diagonals are the same for all batch elements.",
        )
    require_dense(_OP, "offsets", offsets)
    require_same_device(_OP, "q", q, offsets=offsets)


def _native_call(
    q: Tensor,
    k: Tensor,
    *,
    lse: Maybe = None,
    keys: Maybe = None,
    rows: Maybe = None,
    offsets: Maybe = None,
    backend: str = "auto",
    **options: Any,
) -> NativeCall:
    score, lse, keys, rows, offsets = _arguments(q, k, lse, keys, rows, offsets, options)
    row = native.row_placeholder(score, lse)
    backend = backend_for(_OP, backend, score.q)
    return native.probs_call(score, row, keys, rows, offsets, backend)


NATIVE_CALLS[attention_probs] = _native_call
