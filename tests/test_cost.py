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
    assert cost("key_scan", B=2, S=5, H=3, Dv=7) == Cost(30 * 21, 30 * 4 * 15, 1, 30)
    back = cost("key_scan", B=2, S=5, H=3, Dv=7, backward=True)
    assert back == Cost(30 * 49, 30 * (4 * 30 + 4), 1, 30)


# BiFormer's first three stages: 64 keys for every query whatever the stage.
BILEVEL = [(56, 1, 2), (28, 4, 4), (14, 16, 8)]


@pytest.mark.parametrize(("side", "topk", "heads"), BILEVEL)
def test_bilevel_routing_attention_of_whole_regions(side, topk, heads):
    shape = {"B": 3, "Y": side, "X": side, "H": heads, "D": 32, "topk": topk}
    n = 3 * side**2 * heads
    graph = 3 * 49 * topk * 8
    total = cost("bilevel_routing_attention", **shape)
    assert total == Cost(n * 64 * 2 * 64, n * 4 * 4 * 32 + graph, 1, n * 64)
    back = cost("bilevel_routing_attention", **shape, backward=True)
    assert back == Cost(n * 64 * 2 * 160, n * 4 * (8 * 32 + 1) + graph, 2, n * 64)


def test_bilevel_routing_attention_of_unequal_images():
    # 9 x 10 in regions of 3 x 3: 3 x 4 of them. Keys: 7 x 5 in regions of 3 x 2.
    shape = {"Y": 9, "X": 10, "Yk": 7, "Xk": 5, "num_regions": (3, 3), "kv_num_regions": (2, 2)}
    shape |= {"H": 4, "Hkv": 2, "D": 8, "Dv": 6, "dtype": "bf16"}
    total = cost("bilevel_routing_attention", **shape, topk=2, per_head=True)
    assert total.flops == 4 * 90 * (2 * 6) * 2 * 14
    assert total.bytes == 2 * (90 * 4 + 35 * 2) * 14 + 8 * 4 * 12 * 2
    # 9 regions of 6 tokens reach beyond the image: there are no more keys than its 35 tokens
    most = cost("bilevel_routing_attention", **shape, topk=9)
    assert most.flops == 4 * 90 * 35 * 2 * 14


def test_bilevel_route():
    total = cost("bilevel_route", B=2, Y=28, X=28, H=4, D=32, topk=4)
    assert total.flops == 2 * 32 * 4 * (2 * 784 + 2 * 49 * 49)
    assert total.bytes == 2 * (2 * 784 * 128 * 4 + 49 * 4 * 8)
    heads = cost("bilevel_route", B=2, Y=28, X=28, H=4, D=32, topk=4, per_head=True)
    assert heads == Cost(total.flops, total.bytes + 2 * 3 * 49 * 4 * 8, 1)


def test_kmeans_routing_attention():
    shape = {"B": 2, "S": 100, "K": 4, "W": 30, "H": 3, "D": 16, "Dv": 24}
    lists = 6 * 4 * 30 * 8
    total = cost("kmeans_routing_attention", **shape)
    assert total == Cost(6 * 4 * 900 * 2 * 40, 600 * 4 * 2 * 40 + lists, 1, 6 * 4 * 900)
    causal = cost("kmeans_routing_attention", **shape, is_causal=True)
    assert causal == Cost(6 * 4 * 465 * 2 * 40, total.bytes, 1, 6 * 4 * 465)
    back = cost("kmeans_routing_attention", **shape, is_causal=True, backward=True)
    # q dq do k dk v dv of tokens, the lse of slots
    assert back.bytes == 600 * 4 * (2 * 16 + 24 + 2 * 40) + 6 * 4 * 30 * 4 + lists
    assert (back.flops, back.passes) == (6 * 4 * 465 * 2 * (3 * 16 + 2 * 24), 2)


def test_kmeans_routing_attention_with_lists_of_keys():
    shape = {"S": 10, "Sk": 20, "K": 2, "W": 5, "Wk": 8, "H": 4, "Hkv": 2, "D": 16}
    total = cost("kmeans_routing_attention", **shape)
    assert total.flops == 4 * 2 * 5 * 8 * 64
    assert total.bytes == 4 * (10 * 4 + 20 * 2) * 32 + 4 * 2 * 13 * 8
    # of 200 pairs the mask leaves 11 + 12 + .. + 20 = 155
    causal = cost("kmeans_routing_attention", **shape, is_causal=True)
    assert causal.flops == 4 * (80 * 155 // 200) * 64
    empty = cost("kmeans_routing_attention", **shape | {"S": 0, "Sk": 0, "W": 0}, is_causal=True)
    assert empty.flops == 0


def test_moh_attention_costs_its_share_of_attention():
    shape = {"B": 2, "S": 64, "H": 4, "D": 16, "Dv": 24, "is_causal": True}
    rows, keys = 2 * 64 * 4, 2 * 64 * 4 * 40
    total = cost("moh_attention", **shape, active=0.75)
    assert total.flops == cost("attention", **shape).flops * 3 // 4
    assert total.bytes == 4 * (rows * (12 + 24 + 1) + keys)
    back = cost("moh_attention", **shape, active=0.75, backward=True)
    assert back.flops == cost("attention", **shape, backward=True).flops * 3 // 4
    # of 3 in 4 rows q, do, o and lse; of all dq, the gate and its gradient
    assert back.bytes == 4 * (rows * 3 * (16 + 2 * 24 + 1) // 4 + rows * (16 + 2) + 2 * keys)
    assert cost("moh_attention", **shape).flops == cost("attention", **shape).flops
    assert total.exponentials == cost("attention", **shape).exponentials * 3 // 4


def test_window_attention():
    shape = {"B": 2, "Y": 10, "X": 7, "H": 4, "Hkv": 2, "D": 16, "Dv": 24}
    # windows of 4 rows: 4, 4 and 2; of 7 columns: one
    pairs = 2 * 4 * (16 + 16 + 4) * 49
    total = cost("window_attention", **shape, window=(4, 7))
    moved = 4 * 2 * 70 * (4 + 2) * 40
    assert total == Cost(2 * 40 * pairs, moved + 4 * 4 * 28, 1, pairs)
    back = cost("window_attention", **shape, window=(4, 7), backward=True)
    assert back.bytes == 2 * moved + 2 * 70 * 4 * 4 + 8 * 4 * 28
    assert (back.flops, back.passes) == (2 * (3 * 16 + 2 * 24) * pairs, 2)
    assert cost("window_attention", **shape, window=10, bias_table=False).bytes == moved
    # one window over the image is attention
    whole = cost("window_attention", **shape, window=12, bias_table=False)
    assert whole == cost("attention", B=2, S=70, H=4, Hkv=2, D=16, Dv=24)
    with pytest.raises(ValueError, match="window is 0"):
        cost("window_attention", **shape, window=0)


def test_kmeans_route():
    total = cost("kmeans_route", B=2, S=100, H=3, K=5, D=8, W=7, dtype="bf16")
    tokens, centroids, members = 2 * 100 * 3 * 8, 3 * 5 * 8, 2 * 3 * 5 * 7
    assert total == Cost(2 * tokens * 5, 2 * tokens + 4 * centroids + 8 * members, 1)
    # 2 n k d per head, as in the notes on routing: 16.8 MFLOP
    assert cost(hw.kmeans_route, S=8192, H=1, K=16, D=64, W=512).flops == 16_777_216
    wide = cost("kmeans_route", S=1, H=1, K=1, D=1, W=0, dtype="fp64")
    assert wide == Cost(2, 16, 1)


def test_every_pair_of_a_softmax_is_an_exponential():
    shape = {"B": 2, "S": 10, "Sk": 20, "H": 4, "Hkv": 2, "D": 16}
    assert cost("attention", **shape).exponentials == 2 * 4 * 10 * 20
    whole = cost("attention", **shape) + cost("attention", **shape, backward=True)
    assert whole.exponentials == 2 * 2 * 4 * 10 * 20
    assert cost("column_stats", **shape).exponentials == 2 * 4 * 10 * 20
    assert cost("linear_attention", S=64, H=2, D=16).exponentials == 0


def test_empty_shapes_cost_nothing():
    assert cost("linear_attention", S=0, H=8, D=16) == Cost(0, 0, 1)
    assert cost("linear_attention", S=0, H=8, D=16).intensity == 0.0


def test_windows():
    shape = {"B": 2, "Y": 5, "X": 6, "H": 3, "D": 7, "kernel_size": (1, 3)}
    assert cost("na2d_av", **shape) == Cost(180 * 42, 180 * 4 * 17, 1)
    assert cost("na2d_av", **shape, backward=True) == Cost(180 * 84, 180 * 4 * 27, 1)
    del shape["H"]
    shape |= {"G": 3, "A": 4, "small_kernel_size": 1, "dtype": "bf16"}
    once = 4 * 5 + 3 * (5 + 1)
    assert cost("contmix", **shape) == Cost(180 * 4 * 22, 2 * (180 * 32 + once), 1, 180 * 4)
    assert cost("contmix", **shape, backward=True) == Cost(
        180 * 4 * 52, 2 * (180 * 50 + 2 * once), 1, 180 * 4
    )


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
        ("moh_attention", {"S": 1, "H": 1, "D": 1, "active": 1.5}, ValueError, "active is 1.5"),
        (
            "bilevel_route",
            {"Y": 6, "X": 7, "H": 1, "D": 1, "topk": 1},
            ValueError,
            r"\(7, 7\) regions of a 6 x 7",
        ),
    ],
)
def test_bad_input(op, shape, error, words):
    with pytest.raises(error, match=words):
        cost(op, **shape)
