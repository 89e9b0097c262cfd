# SPDX-License-Identifier: Apache-2.0
"""Validation shared by attention and its companions. Nothing is allocated here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from ..._errors import (
    STRIDED,
    describe,
    fail,
    require_dense,
    require_number,
    require_one_dtype,
    require_rank,
    require_same_device,
    require_sizes,
    require_tensors,
)
from ..._native import ACCUMULATION, autocast, autocasts, is_recorded
from .._checks import heads_match, is_integer

# Numbers as in csrc/softmax/params.h.
ACTIVATIONS = {"softmax": 0, "softmax1": 1, "sigmoid": 2, "relu": 3, "relu2": 4}
NORMALIZERS = {None: 0, "length": 1, "sum": 2}
SOFTMAXES = (0, 1)
LAST_ROW = 2**62  # stands for the end of gain_rows that is none

Rows = tuple[int | None, int | None]


def cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In the autocast dtype where autocast is on."""
    if isinstance(tensors[0], Tensor) and autocasts(tensors[0]):
        return tuple(autocast(x)[0] if isinstance(x, Tensor) else x for x in tensors)
    return tensors


def check_inputs(op: str, q: Tensor, k: Tensor) -> None:
    """q [B, Sq, Hq, D] and k [B, Sk, H, D] belong together."""
    if not (
        isinstance(q, Tensor)
        and isinstance(k, Tensor)
        and q.layout is k.layout is STRIDED
        and q.dim() == 4
        and k.dim() == 4
    ):
        _reject_inputs(op, q, k)
    try:
        batch, _, query_heads, d = q.shape
        k_batch, _, heads, k_d = k.shape
    except RuntimeError:  # a nested tensor has no shape
        require_tensors(op, q=q, k=k)
        raise
    if not (
        batch == k_batch
        and d == k_d
        and d > 0
        and heads_match(query_heads, heads)
        and q.dtype == k.dtype
        and q.dtype in ACCUMULATION
        and q.device == k.device
    ):
        _reject_inputs(op, q, k)


def _reject_inputs(op: str, q: Tensor, k: Tensor) -> NoReturn:
    require_tensors(op, q=q, k=k)
    require_rank(op, 4, "[B, S, H, D]", q=q, k=k)
    require_one_dtype(op, ACCUMULATION, q=q, k=k)
    require_same_device(op, "q", q, k=k)
    batch, _, query_heads, d = q.shape
    if d == 0:
        fail(ValueError, op, "the head dimension D of q", 0, "at least 1", "Check the last axis.")
    require_sizes(op, "[B, Sk, Hkv, D]", "k", k, (batch, *k.shape[1:3], d))
    fail(
        ValueError,
        op,
        "the number of heads of q",
        query_heads,
        f"a positive multiple of k's {k.shape[2]}",
        "Each key head serves Hq / Hkv query heads.",
    )


def check_values(
    op: str, name: str, v: Tensor, layout: str, sizes: Sequence[int], q: Tensor
) -> None:
    """v: [*sizes, any] of the dtype and device of q."""
    try:
        fits = (
            isinstance(v, Tensor)
            and v.layout is STRIDED
            and v.dim() == 4
            and v.shape[:3] == sizes
            and v.dtype == q.dtype
            and v.device == q.device
        )
    except RuntimeError:  # a nested tensor has no shape
        fits = False
    if not fits:
        require_tensors(op, **{name: v})
        require_rank(op, 4, layout, **{name: v})
        require_one_dtype(op, ACCUMULATION, q=q, **{name: v})
        require_same_device(op, "q", q, **{name: v})
        require_sizes(op, layout, name, v, (*sizes, v.shape[3]))


def broadcast(
    op: str, name: str, x: object, layout: str, sizes: Sequence[int], free: int, like: Tensor
) -> Tensor:
    """x as a tensor of the accumulation dtype and of `sizes`; the dimensions that the bits of
    `free` name may be 1 and are then expanded, without memory."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        fail(
            TypeError,
            op,
            name,
            describe(x),
            f"a tensor {layout} of floating-point numbers",
            "Cast it, for example with .float().",
        )
    require_dense(op, name, x)
    fits = x.dim() == len(sizes)
    for i, size in enumerate(sizes if fits else ()):
        fits = fits and (x.shape[i] == size or (free >> i & 1 == 1 and x.shape[i] == 1))
    if not fits:
        fail(
            ValueError,
            op,
            name,
            f"of shape {list(x.shape)}",
            f"{layout} where that is {list(sizes)}",
            "Heads are those of q. Check the order of the dimensions.",
        )
    if x.device != like.device:
        require_same_device(op, "q", like, **{name: x})
    dtype = ACCUMULATION[like.dtype]
    return (x if x.dtype is dtype else x.to(dtype)).expand(sizes)


def check_bias(op: str, bias: object, q: Tensor, k: Tensor) -> Tensor:
    """bias with four dimensions, each that of [B, Hq, Sq, Sk] or 1."""
    sizes = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if not isinstance(bias, Tensor) or bias.dtype != q.dtype:
        fail(
            TypeError,
            op,
            "bias",
            describe(bias),
            f"a tensor of {q.dtype}, the dtype of q",
            "Cast it; of a mask of booleans make 0 and -inf: "
            "torch.where(mask, 0.0, -torch.inf).to(q.dtype).",
        )
    require_dense(op, "bias", bias)
    fits = bias.dim() <= 4
    for size, own in zip(sizes[::-1], tuple(bias.shape)[::-1], strict=False):
        fits = fits and (own == size or own == 1)
    if not fits:
        fail(
            ValueError,
            op,
            "bias",
            f"of shape {list(bias.shape)}",
            f"a shape that broadcasts to [B, Hq, Sq, Sk] = {list(sizes)}",
            "Heads are those of q; give dimensions that do not matter the size 1.",
        )
    require_same_device(op, "q", q, bias=bias)
    return bias[(None,) * (4 - bias.dim())] if bias.dim() < 4 else bias


def check_window(op: str, is_causal: bool, window_size: object) -> tuple[int, int]:
    """(left, right), -1 for unlimited."""
    if window_size is None:
        return -1, -1
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        got = window_size if isinstance(window_size, (int, tuple, list)) else describe(window_size)
        fail(
            TypeError,
            op,
            "window_size",
            got,
            "(left, right), counts of neighbours or None for all",
            "For w earlier tokens and the token itself pass (w, 0).",
        )
    left, right = window_size
    for name, n in (("left", left), ("right", right)):
        if n is not None and (not is_integer(n) or n < 0):
            fail(
                ValueError if is_integer(n) else TypeError,
                op,
                f"window_size ({name})",
                n,
                "a number of neighbours, 0 or more, or None",
                "None stands for no limit.",
            )
    if is_causal and right is not None and right > 0:
        fail(
            ValueError,
            op,
            "window_size (right) with is_causal=True",
            right,
            "0 or None",
            "A causal row sees no later key; leave one of the two out.",
        )
    return (-1 if left is None else left), (-1 if right is None else right)


def check_softcap(op: str, softcap: object) -> float:
    """The cap; 0 for none."""
    cap = require_number(op, "softcap", softcap)
    if cap < 0:
        fail(ValueError, op, "softcap", cap, "a number >= 0", "Use 0.0 for none.")
    return cap


def check_activation(op: str, activation: object, normalizer: object) -> tuple[int, int]:
    """The numbers of both."""
    a = ACTIVATIONS.get(activation) if isinstance(activation, str) else None
    if a is None:
        names = ", ".join(ACTIVATIONS)
        fail(ValueError, op, "activation", repr(activation), f"one of {names}", "Choose one.")
    n = NORMALIZERS.get(normalizer) if normalizer is None or isinstance(normalizer, str) else None
    if n is None:
        fail(
            ValueError, op, "normalizer", repr(normalizer), 'None, "length" or "sum"', "Choose one."
        )
    if n and a in SOFTMAXES:
        fail(
            ValueError,
            op,
            f'normalizer with activation="{activation}"',
            repr(normalizer),
            "None",
            "A softmax is normalized already; normalizers are for sigmoid, relu and relu2.",
        )
    return a, n


def check_gain_rows(op: str, gain_rows: object, has_gain: bool, packed: bool) -> tuple[int, int]:
    """(start, stop) as given, 0 and LAST_ROW where they are None."""
    if gain_rows is None:
        return 0, LAST_ROW
    if (
        not isinstance(gain_rows, (tuple, list))
        or len(gain_rows) != 2
        or not all(n is None or is_integer(n) for n in gain_rows)
    ):
        fail(
            TypeError,
            op,
            "gain_rows",
            repr(gain_rows),
            "(start, stop), each a number or None",
            "They are the ends of a slice of rows: (-1, None) is the last row.",
        )
    if not has_gain:
        fail(
            ValueError, op, "gain_rows", tuple(gain_rows), "None without key_gain", "Leave it out."
        )
    start, stop = gain_rows
    start, stop = 0 if start is None else start, LAST_ROW if stop is None else stop
    if packed and (start < 0 or stop < 0):
        fail(
            ValueError,
            op,
            "gain_rows with packed sequences",
            tuple(gain_rows),
            "numbers >= 0",
            "Sequences differ in length; count rows from the start of each.",
        )
    return start, stop


def check_index(op: str, name: str, index: object, q: Tensor) -> Tensor:
    """index [B, n], of int64 [n], [1, n] or [B, n]."""
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        fail(TypeError, op, name, describe(index), "an int64 tensor", "Convert it with .long().")
    require_dense(op, name, index)
    if index.dim() not in (1, 2) or (index.dim() == 2 and index.shape[0] not in (1, q.shape[0])):
        fail(
            ValueError,
            op,
            name,
            f"of shape {list(index.shape)}",
            f"[n] or [B, n] with B = {q.shape[0]}",
            "One list of indices for all batch elements, or one for each.",
        )
    require_same_device(op, "q", q, **{name: index})
    return index.expand(q.shape[0], index.shape[-1])


def check_index_values(op: str, name: str, index: Tensor | None, size: int) -> None:
    """0 <= index < size, of plain tensors on the CPU. A GPU would have to be waited for."""
    if index is None or is_recorded() or type(index) is not Tensor:
        return
    if not index.is_cpu or not index.numel():
        return
    low, high = index.aminmax()
    if low < 0 or high >= size:
        fail(
            ValueError,
            op,
            name,
            f"from {int(low)} to {int(high)}",
            f"indices from 0 to {size - 1}",
            "Negative numbers do not count from the end here.",
        )


def require_softmax(op: str, what: str, got: object, activation: int) -> None:
    """Refuse what other activations do not have."""
    if activation not in SOFTMAXES:
        names = list(ACTIVATIONS)
        fail(
            ValueError,
            op,
            f'{what} with activation="{names[activation]}"',
            got,
            "None: statistics belong to the distribution that a softmax makes",
            'Use activation="softmax" or "softmax1", or leave it out.',
        )


def reject_unknown(op: str, unknown: dict[str, object]) -> NoReturn:
    """Arguments that are not offered, dropout with the reason."""
    name, value = next(iter(unknown.items()))
    if name in ("dropout", "dropout_p"):
        fail(
            NotImplementedError,
            op,
            name,
            value,
            "no such argument: dropout of the weights is not offered",
            "The backward pass and the read-outs replay the weights, which would need the state "
            "of the random numbers (Philox) of every tile. Leave it out; dropout of the output, "
            "torch.nn.functional.dropout(o, p), is the usual substitute.",
        )
    remedy = "A mask of booleans is a bias of 0 and -inf." if name == "attn_mask" else ""
    fail(
        TypeError,
        op,
        "an argument",
        f"named '{name}'",
        "one of those in help(headworks.attention)",
        remedy or "Check its spelling.",
    )
