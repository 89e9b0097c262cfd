# SPDX-License-Identifier: Apache-2.0
"""headworks: attention kernels with forward and backward, on CUDA and on the CPU.

    import headworks as hw
    o = hw.linear_attention(q, k, v)

Functions
    attention                                 softmax attention with all that rides in its one pass
    attention_lse, attention_probs            log-sum-exp of its rows; chosen weights
    attention_transpose, column_stats         what the keys receive
    merge_attention                           results over parts of the keys made one
    Aux, AuxResult                            read-outs of attention's rows
    linear_attention, linear_attention_step   linear attention with Taylor and other feature maps
    key_scan                                  running softmax average, scores from the key alone
    bilevel_route, bilevel_routing_attention  regions choose regions (BiFormer)
    kmeans_route, kmeans_routing_attention,   attention within clusters (Routing Transformer)
    kmeans_update
    window_attention                          inside the windows of an image, with a bias table
    moh_attention                             heads chosen for each token (mixture of heads)
    cascaded_group_attention, CascadeWeights  heads of a window one after another (EfficientViT)
    select_topk                               the k largest, deterministic, in order
    na2d_av, contmix                          windows of given weights, of weights made (OverLoCK)
    LinearState, KeyScanState                 what they keep of the tokens they have seen
Modules
    nn, models                                layers and small language models made of them
Tools
    explain       which backend a call uses, and why not the others
    build_info    what this installation contains
    cost          operations and bytes of a call
"""

from __future__ import annotations

from ._build_info import build_info
from ._explain import Explanation, explain
from .cost import Cost, cost
from .ops.attention.attention import Aux, AuxResult, attention
from .ops.attention.attention_lse import attention_lse
from .ops.attention.attention_probs import attention_probs
from .ops.attention.attention_transpose import attention_transpose
from .ops.attention.column_stats import column_stats
from .ops.attention.merge_attention import merge_attention
from .ops.linear.key_scan import KeyScanState, key_scan
from .ops.linear.linear_attention import LinearState, linear_attention
from .ops.linear.linear_attention_step import linear_attention_step
from .ops.routing.bilevel_routing import bilevel_route, bilevel_routing_attention
from .ops.routing.kmeans_routing import kmeans_route, kmeans_routing_attention, kmeans_update
from .ops.routing.moh_attention import moh_attention
from .ops.routing.select_topk import select_topk
from .ops.windows._cascade_weights import CascadeWeights
from .ops.windows.cascaded_group_attention import cascaded_group_attention
from .ops.windows.contmix import contmix
from .ops.windows.na2d_av import na2d_av
from .ops.windows.window_attention import window_attention

from . import models, nn  # isort: skip

__all__ = [
    "Aux",
    "AuxResult",
    "CascadeWeights",
    "Cost",
    "Explanation",
    "KeyScanState",
    "LinearState",
    "attention",
    "attention_lse",
    "attention_probs",
    "attention_transpose",
    "bilevel_route",
    "bilevel_routing_attention",
    "build_info",
    "cascaded_group_attention",
    "column_stats",
    "contmix",
    "cost",
    "explain",
    "key_scan",
    "kmeans_route",
    "kmeans_routing_attention",
    "kmeans_update",
    "linear_attention",
    "linear_attention_step",
    "merge_attention",
    "models",
    "moh_attention",
    "na2d_av",
    "nn",
    "select_topk",
    "window_attention",
]


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version

        return version("headworks")
    raise AttributeError(f"module 'headworks' has no attribute '{name}'")
