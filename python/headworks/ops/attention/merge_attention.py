# SPDX-License-Identifier: Apache-2.0
"""hw.merge_attention: one attention result from results over parts of the keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._errors import (
    describe,
    fail,
    require_one_dtype,
    require_rank,
    require_same_device,
    require_sizes,
    require_tensors,
)
from ..._native import ACCUMULATION, as_written

_OP = "merge_attention"


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    r"""Softmax attention over all keys from attention over disjoint parts of them, exactly.

    .. math::
        L = \log \sum_n e^{L_n} \qquad o = \sum_n e^{L_n - L} o_n

    in fp32 (fp64 for fp64), with no exponent above 0. A part that a row sees nothing of has
    L_n = -inf and does not count; where no part does, o = 0 and L = -inf.

    Args:
        outs: N tensors [B, S, H, D], from hw.attention with activation "softmax" (the 1 of
            softmax1 would be counted once for every part).
        lses: N tensors [B, H, S], float32 (float64 for float64), from the same calls.

    Returns:
        (o [B, S, H, D] in the dtype of outs, L [B, H, S]), differentiable. Made of torch
        operators on every device.

    Raises:
        ValueError: no parts, as many outs as lses are needed, shapes that differ.
        TypeError, RuntimeError: dtypes or devices that differ.

    Example:
        >>> import torch, headworks as hw
        >>> q, k, v = torch.randn(3, 1, 100, 4, 64)
        >>> halves = [
        ...     hw.attention(q, k[:, part], v[:, part], return_aux=hw.Aux(lse=True))
        ...     for part in (slice(0, 50), slice(50, 100))
        ... ]
        >>> o, lse = hw.merge_attention([o for o, _ in halves], [aux.lse for _, aux in halves])
        >>> torch.allclose(o, hw.attention(q, k, v), atol=1e-6)
        True
    """
    _check(outs, lses)
    with as_written(outs[0]):
        return _merged(outs, lses)


def _merged(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Parts are added one after another, element by element: no order of sums is left to torch,
    which would choose it by the number of threads. An o without keys is not looked at: it may be
    NaN."""
    most = torch.stack([x.detach() for x in lses]).amax(0)  # [B, H, S]
    sees_none = most == -torch.inf
    shift = most.masked_fill(sees_none, 0)
    shares = [(x - shift).exp() for x in lses]  # e^{L_n - max}
    mass = shares[0]
    for share in shares[1:]:
        mass = mass + share
    mass = mass.masked_fill(sees_none, 1)
    o = torch.zeros((), dtype=mass.dtype, device=mass.device)
    for x, x_lse, share in zip(outs, lses, shares, strict=True):
        weight = (share / mass).transpose(1, 2)[..., None]  # [B, S, H, 1]
        empty = (x_lse == -torch.inf).transpose(1, 2)[..., None]
        o = o + weight * x.to(mass.dtype).masked_fill(empty, 0)
    lse = torch.where(most.isinf(), most, most + mass.log())
    return o.to(outs[0].dtype), lse


def _check(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    for name, parts in (("outs", outs), ("lses", lses)):
        if not isinstance(parts, (list, tuple)):
            fail(TypeError, _OP, name, describe(parts), "a list of tensors", "Put it into a list.")
    if not outs or len(outs) != len(lses):
        fail(
            ValueError,
            _OP,
            "the number of outs and lses",
            (len(outs), len(lses)),
            "the same number, at least 1",
            "Every part has both.",
        )
    named_outs = {f"outs[{n}]": x for n, x in enumerate(outs)}
    named_lses = {f"lses[{n}]": x for n, x in enumerate(lses)}
    require_tensors(_OP, **named_outs, **named_lses)
    first = outs[0]
    require_rank(_OP, 4, "[B, S, H, D]", **named_outs)
    require_one_dtype(_OP, ACCUMULATION, **named_outs)
    require_same_device(_OP, "outs[0]", first, **named_outs, **named_lses)
    batch, tokens, heads, _ = first.shape
    for name, x in named_outs.items():
        require_sizes(_OP, "the shape of outs[0]", name, x, tuple(first.shape))
    for name, x in named_lses.items():
        require_sizes(_OP, "[B, H, S]", name, x, (batch, heads, tokens))
        if x.dtype != ACCUMULATION[first.dtype]:
            fail(
                TypeError,
                _OP,
                name,
                x.dtype,
                f"{ACCUMULATION[first.dtype]} for outs of {first.dtype}",
                "Log-sum-exps stay in fp32 (fp64 for fp64); do not cast them with the model.",
            )
