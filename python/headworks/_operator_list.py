# SPDX-License-Identifier: Apache-2.0
"""The public operators, one line each.

The specifications (tests/specs/), the suites (bench/) and the checks of the documentation read this
list. What must be written out elsewhere is compared with it by tests/test_operator_list.py: the
exports of headworks/__init__.py, which type checkers read, and the formulas of headworks/cost.py.

Nothing here imports anything of the package: a check may load this file alone.
"""

from __future__ import annotations

from typing import NamedTuple


class Operator(NamedTuple):
    """A public function, and where its parts are."""

    name: str  # headworks.<name>
    module: str  # headworks.ops.<family>.<module>
    page: str  # docs/ops/<page>.md
    suite: str = ""  # bench/<suite>.py times it; "": nothing does
    has_spec: bool = True  # has backends to choose from, and tests/specs/<name>.py compares them
    has_cost: bool = True  # headworks.cost knows its operations and bytes

    @property
    def family(self) -> str:
        """The folder under headworks/ops/."""
        return self.module.partition(".")[0]


_LINEAR, _BILEVEL, _KMEANS = "linear_attention", "bilevel_routing", "kmeans_routing"
_WINDOW = "window_attention"
_CASCADE = "cascaded_group_attention"

# In the order in which tables and test reports name them.
OPERATORS = (
    Operator("linear_attention", "linear.linear_attention", _LINEAR, _LINEAR),
    Operator("linear_attention_step", "linear.linear_attention_step", _LINEAR, _LINEAR),
    Operator("attention", "attention.attention", "attention", "attention"),
    Operator("attention_lse", "attention.attention_lse", "attention", "attention", has_cost=False),
    Operator("attention_transpose", "attention.attention_transpose", "attention", "attention"),
    Operator("column_stats", "attention.column_stats", "attention", "attention"),
    Operator("attention_probs", "attention.attention_probs", "attention", has_cost=False),
    Operator(
        "merge_attention",
        "attention.merge_attention",
        "attention",
        has_spec=False,
        has_cost=False,
    ),
    Operator("key_scan", "linear.key_scan", "key_scan", "key_scan"),
    Operator("select_topk", "routing.select_topk", "select_topk", "select_topk"),
    Operator("bilevel_route", "routing.bilevel_routing", _BILEVEL, _BILEVEL),
    Operator("bilevel_routing_attention", "routing.bilevel_routing", _BILEVEL, _BILEVEL),
    Operator("kmeans_route", "routing.kmeans_routing", "kmeans_route", _KMEANS),
    Operator("kmeans_routing_attention", "routing.kmeans_routing", _KMEANS, _KMEANS),
    Operator("kmeans_update", "routing.kmeans_routing", _KMEANS, has_spec=False, has_cost=False),
    Operator("moh_attention", "routing.moh_attention", "moh_attention", "moh_attention"),
    Operator("window_attention", "windows.window_attention", _WINDOW, _WINDOW),
    Operator("na2d_av", "windows.na2d_av", "contmix", "contmix"),
    Operator("contmix", "windows.contmix", "contmix", "contmix"),
    Operator("cascaded_group_attention", "windows.cascaded_group_attention", _CASCADE, _CASCADE),
)
