# SPDX-License-Identifier: Apache-2.0
"""One module per operator; `SPECS` is what the generic tests and the GPU gate run."""

from . import (
    attention,
    attention_lse,
    attention_probs,
    attention_transpose,
    bilevel_route,
    bilevel_routing_attention,
    column_stats,
    key_scan,
    kmeans_route,
    kmeans_routing_attention,
    linear_attention,
    linear_attention_step,
    moh_attention,
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
    bilevel_routing_attention.SPEC,
    kmeans_routing_attention.SPEC,
    moh_attention.SPEC,
    kmeans_route.SPEC,
)
