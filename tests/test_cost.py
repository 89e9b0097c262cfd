# SPDX-License-Identifier: Apache-2.0
"""hw.cost against numbers computed by hand from the formulas of the operators' notes."""

from __future__ import annotations

import pytest
import torch

import headworks as hw
from headworks.cost import Cost, cost

TOKENS = 4096


# Per token and head at D = 16, 16-bit elements, 64-token chunks: the value dim, bytes, FLOPs.
@pytest.mark.parametrize(
    ("dv", "nbytes", "flops"), [(64, 320, 49408), (112, 512, 84928), (128, 576, 96768)]
)
def test_linear_attention_per_token_and_head(dv, nbytes, flops):
    total = cost("linear_attention", S=TOKENS, H=1, D=16, Dv=dv, dtype=torch.bfloat16)
    assert total == Cost(TOKENS * flops, TOKENS * nbytes, 1)


def test_linear_attention_of_a_large_call():
    total = cost("linear_attention", B=16, S=8192, H=16, D=16, Dv=64, dtype="bf16")
    assert total.bytes == 671_088_640
    assert total.flops == 103_616_086_016
    assert total.intensity == pytest.approx(154.4)
    assert total.seconds(1e15, 3.35e12) == pytest.approx(0.2003e-3, rel=1e-3)


def test_short_sequences_take_the_direct_form():
    # S = 10: 55 pairs of 2 (16 + 64) = 160 flops
    assert cost("linear_attention", S=10, H=1, D=16, Dv=64).flops == 55 * 160
    # both directions: 100 pairs
    assert cost("linear_attention", S=10, H=1, D=16, Dv=64, is_causal=False).flops == 100 * 160
    # 2 F Dv + 2 F Dv per token and no square tile in the state form without causality
    long = cost("linear_attention", S=TOKENS, H=1, D=16, Dv=64, is_causal=False)
    assert long.flops == TOKENS * 4 * 153 * 64


def test_the_crossover_of_the_two_forms_is_near_600_tokens():
    def per_token(s):
        return cost("linear_attention", S=s, H=1, D=16, Dv=64).flops / s

    assert per_token(616) < 49408 == per_token(617) == per_token(10_000)


def test_backward():
    total = cost("linear_attention", S=TOKENS, H=1, D=16, Dv=64, backward=True)
    assert total.flops == TOKENS * (10 * 153 * 64 + 64 * (6 * 16 + 4 * 64))
    # q dq o do and k dk v dv in fp32, and z
    assert total.bytes == TOKENS * 4 * (2 * (2 * 16 + 2 * 64) + 1)
    assert total.passes == 2
    short = cost("linear_attention", S=10, H=1, D=16, Dv=64, backward=True)
    assert short.flops == 55 * (6 * 16 + 4 * 64)


def test_maps_without_products_have_a_narrow_state():
    total = cost("linear_attention", S=TOKENS, H=1, D=16, Dv=64, feature_map="elu1")
    assert total.flops == TOKENS * (4 * 16 * 64 + 2 * 64 * 80)


def test_shared_key_heads_share_state_work_and_bytes():
    total = cost("linear_attention", S=TOKENS, H=8, Hkv=2, D=16, Dv=64)
    query, key = 2 * 153 * 64 + 2 * 64 * 80, 2 * 153 * 64
    assert total.flops == TOKENS * (8 * query + 2 * key)
    assert total.bytes == TOKENS * 4 * 80 * (8 + 2)


def test_states_add_their_bytes():
    plain = cost("linear_attention", S=TOKENS, H=2, D=16, Dv=64, dtype="fp16")
    states = cost(
        "linear_attention",
        S=TOKENS,
        H=2,
        D=16,
        Dv=64,
        dtype="fp16",
        initial_state=True,
        output_final_state=True,
    )
    assert states.bytes - plain.bytes == 2 * (2 * 153 * 65 * 4)


def test_step_reads_and_writes_the_state_once():
    total = cost("linear_attention_step", B=64, H=16, D=16, Dv=64, dtype="bf16")
    assert total.bytes == 64 * 16 * (2 * 4 * 153 * 65 + 2 * 2 * 80)
    assert total.flops == 64 * 16 * 4 * 153 * 64


def test_key_scan():
    assert cost("key_scan", B=2, S=5, H=3, Dv=7) == Cost(30 * 21, 30 * 4 * 15, 1)
    back = cost("key_scan", B=2, S=5, H=3, Dv=7, backward=True)
    assert back == Cost(30 * 49, 30 * (4 * 30 + 4), 1)


def test_kmeans_route():
    total = cost("kmeans_route", B=2, S=100, H=3, K=5, D=8, W=7, dtype="bf16")
    tokens, centroids, members = 2 * 100 * 3 * 8, 3 * 5 * 8, 2 * 3 * 5 * 7
    assert total == Cost(2 * tokens * 5, 2 * tokens + 4 * centroids + 8 * members, 1)
    # 2 n k d per head, as in the notes on routing: 16.8 MFLOP
    assert cost(hw.kmeans_route, S=8192, H=1, K=16, D=64, W=512).flops == 16_777_216
    wide = cost("kmeans_route", S=1, H=1, K=1, D=1, W=0, dtype="fp64")
    assert wide == Cost(2, 16, 1)


def test_empty_shapes_cost_nothing():
    assert cost("linear_attention", S=0, H=8, D=16) == Cost(0, 0, 1)
    assert cost("linear_attention", S=0, H=8, D=16).intensity == 0.0


def test_a_function_names_its_operator():
    assert hw.cost(hw.key_scan, S=5, H=3, Dv=7) == cost("key_scan", S=5, H=3, Dv=7)


@pytest.mark.parametrize(
    ("op", "shape", "error", "words"),
    [
        ("conv", {"S": 1}, ValueError, "conv"),
        ("linear_attention", {"S": -1, "H": 1, "D": 1}, ValueError, "S is -1"),
        ("linear_attention", {"S": 1, "H": 1, "D": 1, "dtype": "int8"}, ValueError, "int8"),
        ("linear_attention", {"H": 1, "D": 1}, TypeError, "S"),
        ("key_scan", {"S": 1, "H": 1, "Dv": 1, "D": 3}, TypeError, "D"),
    ],
)
def test_bad_input(op, shape, error, words):
    with pytest.raises(error, match=words):
        cost(op, **shape)
