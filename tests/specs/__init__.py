# SPDX-License-Identifier: Apache-2.0
"""One module per operator; `SPECS` is what the generic tests and the GPU gate run."""

from . import key_scan, linear_attention, linear_attention_step

SPECS = (linear_attention.SPEC, linear_attention_step.SPEC, key_scan.SPEC)
