# SPDX-License-Identifier: Apache-2.0
"""Validation shared by linear_attention and linear_attention_step. Nothing is allocated here."""

from __future__ import annotations

import math
from typing import NoReturn

from torch import Tensor

from ..._errors import (
    STRIDED,
    describe,
    fail,
    require_number,
    require_one_dtype,
    require_rank,
    require_same_device,
    require_sizes,
    require_tensors,
)
from ..._native import ACCUMULATION

OP = "linear_attention"

# Numbers as in csrc/ops/linear_attention/linear_attention.h.
FEATURE_MAPS = {"taylor2": 0, "identity": 1, "elu1": 2, "relu": 3}
MAX_TAYLOR_DIM = 32


def num_features(feature_map: str | int, d: int) -> int:
    """F, the rows of a state, for a map or its number."""
    return 1 + d + d * (d + 1) // 2 if feature_map in ("taylor2", 0) else d


def check_options(
    op: str, feature_map: object, scale: object, eps: object, d: int
) -> tuple[int, float]:
    """(number of the map, scale as a float)."""
    number = FEATURE_MAPS.get(feature_map) if isinstance(feature_map, str) else None
    if number is None:
        fail(
            ValueError,
            op,
            "feature_map",
            repr(feature_map),
            f"one of {', '.join(FEATURE_MAPS)}, or a callable",
            "Choose one.",
        )
    if number == 0 and d > MAX_TAYLOR_DIM:
        fail(
            ValueError,
            op,
            "the head dimension D of q and k",
            d,
            f'at most {MAX_TAYLOR_DIM} with feature_map="taylor2"',
            "Project q and k to fewer features (the paper uses 16), or choose another feature_map.",
        )
    if type(eps) is not float or not 0.0 <= eps < math.inf:
        eps = require_number(op, "eps", eps)
        if eps < 0:
            fail(ValueError, op, "eps", eps, "a number >= 0", "Use 0.0 for none.")
    if scale is None:
        return number, float(d**-0.5)
    if type(scale) is not float or not -math.inf < scale < math.inf:
        return number, require_number(op, "scale", scale)
    return number, scale


def reject_inputs(op: str, layout: str, q: Tensor, k: Tensor, v: Tensor) -> NoReturn:
    """Say what is wrong with q, k, v of [B, S, H, D] or, in a step, [B, H, D]."""
    require_tensors(op, q=q, k=k, v=v)
    require_rank(op, layout.count(",") + 1, layout, q=q, k=k, v=v)
    require_one_dtype(op, ACCUMULATION, q=q, k=k, v=v)
    require_same_device(op, "q", q, k=k, v=v)
    hq, h, d = q.shape[-2], k.shape[-2], q.shape[-1]
    if d == 0:
        fail(ValueError, op, "the head dimension D of q", 0, "at least 1", "Check the last axis.")
    lead = tuple(q.shape[:-2])
    require_sizes(op, layout.replace("H", "Hkv"), "k", k, (*lead, h, d))
    require_sizes(
        op, layout.replace("H", "Hkv").replace("D]", "Dv]"), "v", v, (*lead, h, v.shape[-1])
    )
    fail(
        ValueError,
        op,
        "the number of heads of q",
        hq,
        f"a positive multiple of k's {h}",
        "Each key head serves Hq / Hkv query heads.",
    )


def check_state(
    op: str,
    name: str,
    state: object,
    q: Tensor,
    feature_map: object,
    sizes: tuple[int, int, int, int],  # N, H, F, Dv
) -> tuple[Tensor, Tensor]:
    """The two tensors of a state, found to belong to this call."""
    if not isinstance(state, (tuple, list)) or len(state) != 2:
        fail(
            TypeError,
            op,
            name,
            describe(state),
            "LinearState(kv, z)",
            "Pass the state that output_final_state=True returned, or hw.LinearState.initial().",
        )
    kv, z = state
    dtype = ACCUMULATION[q.dtype]
    try:
        fits = (
            isinstance(kv, Tensor)
            and isinstance(z, Tensor)
            and kv.layout is z.layout is STRIDED
            and kv.shape == sizes
            and z.shape == sizes[:3]
            and kv.dtype == dtype
            and z.dtype == dtype
            and kv.device == q.device
            and z.device == q.device
        )
    except RuntimeError:  # a nested tensor has no shape
        fits = False
    if not fits:
        _reject_state(op, name, kv, z, q, feature_map, sizes)
    return kv, z


def _reject_state(
    op: str,
    name: str,
    kv: Tensor,
    z: Tensor,
    q: Tensor,
    feature_map: object,
    sizes: tuple[int, int, int, int],
) -> NoReturn:
    names = (f"{name}.kv", f"{name}.z")
    require_tensors(op, **dict(zip(names, (kv, z), strict=True)))
    for part, x, want, layout in zip(
        names, (kv, z), (sizes, sizes[:3]), ("[N, H, F, Dv]", "[N, H, F]"), strict=True
    ):
        if x.shape != want:
            fail(
                ValueError,
                op,
                part,
                f"of shape {list(x.shape)}",
                f"{layout} = {list(want)}",
                f'F is {sizes[2]} for feature_map="{feature_map}" at D = {q.shape[-1]}, N counts '
                "sequences, H key heads; use a state that was made with the same arguments.",
            )
        if x.dtype != ACCUMULATION[q.dtype]:
            fail(
                TypeError,
                op,
                part,
                x.dtype,
                f"{ACCUMULATION[q.dtype]} for {q.dtype} inputs",
                "States stay in fp32 (fp64 for fp64 inputs); do not cast them with the model.",
            )
        require_same_device(op, "q", q, **{part: x})
    raise AssertionError("a state was rejected without a reason")
