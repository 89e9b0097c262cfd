# SPDX-License-Identifier: Apache-2.0
"""headworks: attention kernels with forward and backward, on CUDA and on the CPU.

    import headworks as hw
    o = hw.linear_attention(q, k, v)
"""

from __future__ import annotations

from ._build_info import build_info
from ._explain import explain
from .ops.key_scan import KeyScanState, key_scan
from .ops.linear_attention import LinearState, linear_attention
from .ops.linear_attention_step import linear_attention_step

__all__ = [
    "KeyScanState",
    "LinearState",
    "build_info",
    "explain",
    "key_scan",
    "linear_attention",
    "linear_attention_step",
]
