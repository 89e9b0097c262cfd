# SPDX-License-Identifier: Apache-2.0
"""One module per operator; `SPECS` is what the generic tests and the GPU gate run."""

from . import (
    attention,
    attention_lse,
    attention_probs,
    attention_transpose,
    bilevel_route,
    column_stats,
    key_scan,
    kmeans_route,
    linear_attention,
    linear_attention_step,
    select_topk,
)

SPECS = (
    linear_attention.SPEC,
    linear_attention_step.SPEC,
    key_scan.SPEC,
    attention.SPEC,
    attention_lse.SPEC,
    attention_transpose.SPEC,
    column_stats.SPEC,
    attention_probs.SPEC,
    select_topk.SPEC,
    bilevel_route.SPEC,
    kmeans_route.SPEC,
)
