# SPDX-License-Identifier: Apache-2.0
"""The routing operators' specifications, not in SPECS as long as no compiled backend has them.

TO SWITCH ON: in tests/specs/__init__.py import `routing` and end SPECS with `*routing.SPECS`. Until
then tests/test_select_topk.py and its siblings run the cases on the reference.
"""

from __future__ import annotations

from . import (
    bilevel_routing_attention,
    kmeans_routing_attention,
    moh_attention,
)

SPECS = (
    bilevel_routing_attention.SPEC,
    kmeans_routing_attention.SPEC,
    moh_attention.SPEC,
)
