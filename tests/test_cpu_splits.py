# SPDX-License-Identifier: Apache-2.0
"""Calls so long and of so few heads that the CPU cuts them: values, and bits at any thread count.

Attention cuts keys from 2048 on, linear attention tokens from 1024 on, key scan from 1025 on; the
cases of the specs are shorter.
"""

from __future__ import annotations

import pytest
import torch

from headworks.testing import assert_same_bits, check_case, evaluate
from specs import (
    attention,
    attention_lse,
    attention_probs,
    attention_transpose,
    bilevel_routing_attention,
    column_stats,
    key_scan,
    kmeans_routing_attention,
    linear_attention,
    moh_attention,
)

pytestmark = pytest.mark.operator

THREADS = (1, 2, 3, 4, 8, 16)
A, L, K = attention.case, linear_attention.case, key_scan.case
C, M, R = kmeans_routing_attention.case, moh_attention.case, bilevel_routing_attention.case
ALL = attention.STATISTICS

CUT = (
    (attention, A(Sq=3, Sk=2600, H=1, Hq=2, Dv=16, causal=True, aux=ALL)),
    (attention, A(Sq=70, Sk=3100, H=1, Dv=16, softcap=3.0, key_bias="11k", aux=ALL)),
    (attention, A(Sq=5, Sk=2100, B=16, H=1, D=8, Dv=8)),  # cut, but not into tasks
    (attention, A(B=2, Sq=66, Sk=2100, H=1, Dv=8, weights=("sigmoid", "length"), causal=True)),
    (attention, A(lengths=((5, 66), (2100, 70)), H=2, Dv=8, weights=("softmax1", None))),
    (attention, A(Sq=70, Sk=2100, B=2, D=8, Dv=8, bias="11qk")),  # of which all have a gradient
    (attention_lse, A(Sq=70, Sk=2100, H=1, causal=True)),
    (attention_transpose, attention_transpose.case(Sq=2100, Sk=66, H=1, Dv=8)),
    (column_stats, column_stats.case(Sq=2100, Sk=66, H=1)),
    (attention_probs, attention_probs.case(Sq=5, Sk=2100, H=1)),
    (linear_attention, L(S=1100, D=8, Dv=20, H=1, Hq=2, state_in=True, state_out=True)),
    (linear_attention, L(S=2100, D=4, Dv=16, H=1, causal=False, state_out=True)),
    (linear_attention, L(lengths=(1200, 5, 1030), D=8, Dv=16, H=1, feature_map="elu1")),
    (key_scan, K(S=1100, B=3, H=2, Dv=12, state_in=True, state_out=True)),
    (key_scan, K(S=1100, B=1, H=1, Dv=70, state_in=True, state_out=True)),
    (moh_attention, M(Sq=1100, Sk=5, H=1, Hq=16, D=4, Dv=64)),  # o is out of the caches
    # Parts that are no tasks, with sums of their own for all tokens.
    (kmeans_routing_attention, C(Sq=1500, K=3, Wq=20, B=8, H=1, D=12, Dv=12, lists="shuffled")),
    # Heads with lists in common, of which a task takes 10 of 12, 2 of 4, or one.
    (bilevel_routing_attention, R(regions=(2, 2), topk=2, H=12, D=8, Dv=8, graph="shared")),
    *(
        (
            bilevel_routing_attention,
            R(Y=32, regions=(2, 1), topk=1, H=2, Hq=hq, D=8, Dv=8, graph="shared"),
        )
        for hq in (4, 6)
    ),
    (key_scan, K(S=2100, B=2, H=1, Dv=8, state_in=True, state_out=True)),
)


def identify(x):
    return x.SPEC.name if hasattr(x, "SPEC") else x.name


@pytest.mark.parametrize("module, case", CUT, ids=identify)
def test_cut_calls(module, case):
    spec = module.SPEC
    check_case(spec, case, "cpu", torch.float32)
    tensors = spec.make(case, torch.float32)
    expected = evaluate(spec, case, "cpu", tensors)
    for threads in THREADS:
        torch.set_num_threads(threads)
        for name, x in evaluate(spec, case, "cpu", tensors).items():
            assert_same_bits(x, expected[name], f"{name} with {threads} threads")
