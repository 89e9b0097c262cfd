# SPDX-License-Identifier: Apache-2.0
"""hw.moh_attention: attention of the heads that a gate chose for each token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..._native import NATIVE_CALLS, NativeCall, as_written, backend_for
from ..._repeated import Repeated
from ...reference import moh_attention as reference
from ..attention._checks import broadcast, cast, check_inputs, check_values
from ..attention._score import Score, reference_options, score_of
from . import _native as native

OP = "moh_attention"


def moh_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    is_causal: bool = False,
    window_size: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    row_temperature: Tensor | None = None,
    sink: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Mixture of heads: softmax attention where the gate of token and head is not 0.

    .. math:: o_{ih} = g_{ih} \sum_j \mathrm{softmax}_j (s_{ijh}) \, v_{jh}

    The result is that of ``hw.attention(..., head_gate=gate)``. Queries whose gate is 0 are left
    out, head by head, while keys and values stay: that is exact, and the work is that of the
    chosen pairs. Two things follow, and differ: such a row gives 0 even where its attention would
    be NaN, and a gate of 0 has the gradient 0, for what was not chosen is not computed.

    Args:
        q: [B, Sq, Hq, D]. float64, float32, bfloat16 or float16; any strides.
        k: [B, Sk, H, D], with Hq a multiple of H.
        v: [B, Sk, H, Dv], any Dv.
        gate: g [B, Sq, Hq], any floating dtype.
        is_causal, window_size, scale, softcap, bias, key_bias, row_temperature, sink: as in
            :func:`headworks.attention`.
        backend: "auto", "reference", or a compiled one by name.

    Returns:
        o [B, Sq, Hq, Dv] in the dtype of the inputs.

    Gradients flow to q, k, v, gate, bias, key_bias, row_temperature and sink. Under
    ``torch.autocast`` q, k, v and bias are cast to the autocast dtype.

    Raises:
        ValueError, TypeError, RuntimeError, NotImplementedError: as hw.attention.

    Source: Jin et al., "MoH: Multi-Head Attention as Mixture-of-Head Attention", ICML 2025, arXiv
    2410.11842. The official code computes all heads and multiplies.

    Example:
        >>> import torch, headworks as hw
        >>> q, k, v = torch.randn(3, 1, 100, 8, 64)
        >>> gate = torch.rand(1, 100, 8)
        >>> gate[:, :, 4:] = 0
        >>> o = hw.moh_attention(q, k, v, gate, is_causal=True)
        >>> o[:, :, 4:].count_nonzero()
        tensor(0)
    """
    key = None
    if bias is None and key_bias is None and row_temperature is None and sink is None:
        options = is_causal, window_size, scale, softcap, backend
        key = _repeated.key((q, k, v, gate), *options)
        if (ready := _repeated.get(key)) is not None:
            return ready(q, k, v, gate)
    given = gate
    score, v, gate, backend = _checked(
        q, k, v, gate, is_causal=is_causal, window_size=window_size, scale=scale, softcap=softcap,
        bias=bias, key_bias=key_bias, row_temperature=row_temperature, sink=sink, backend=backend,
    )  # fmt: skip
    if backend == "reference":
        with as_written(q):
            written: dict[str, Any] = reference_options(OP, score)
            return reference.moh_attention(score.q, score.k, v, gate, **written)
    _repeated.offer(key, native.moh_prepared, score, v, gate, given, backend)
    return native.moh_attention(score, v, gate, backend)


_repeated: Repeated[Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = Repeated(OP)


def _checked(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *, backend: str = "auto", **options: Any
) -> tuple[Score, Tensor, Tensor, str]:
    """score v gate, the backend."""
    q, k, v = cast(q, k, v)
    check_inputs(OP, q, k)
    check_values(OP, "v", v, "[B, Sk, Hkv, Dv]", k.shape[:3], q)
    score = score_of(OP, q, k, **options)
    gate = broadcast(OP, "gate", gate, "[B, Sq, Hq]", q.shape[:3], 0, q)
    return score, v, gate, backend_for(OP, backend, score.q)


def _native_call(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, **options: Any) -> NativeCall:
    score, v, gate, backend = _checked(q, k, v, gate, **options)
    return native.moh_call(score, v, gate, backend)


NATIVE_CALLS[moh_attention] = _native_call
