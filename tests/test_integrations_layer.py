# SPDX-License-Identifier: Apache-2.0
"""What transformers' attention layers call: the arguments of a layer, masks, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import masking_utils

from headworks.integrations import _transformers_mask as masks
from headworks.integrations.transformers import attention
from test_integrations import close


@pytest.fixture(autouse=True)
def _one_thread(_deterministic_start):
    """The layers here are tiny: threads cost more than they give."""
    torch.set_num_threads(1)


def test_a_row_that_sees_no_key_gives_zero():
    layer, (q, k, v) = Layer(), torch.randn(3, 1, 4, 6, 8)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    mask[..., 0] = False
    o, weights = attention(layer, q, k, v, mask)
    assert weights is None and not o[:, 0].any() and o[:, 1:].any(dim=-1).all()


class Layer(nn.Module):
    def __init__(self, is_causal=True):
        super().__init__()
        self.is_causal = is_causal


def by_formula(q, k, v, seen, scaling=None, softcap=None, bias=0.0):
    """[B, H, S, D] in, [B, Sq, H, Dv] out, in fp64."""
    q, k, v = (t.double() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    s = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scaling is None else scaling)
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    return ((s + bias).masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("rows", [1, 9])
def test_the_arguments_of_a_layer_without_a_mask(is_causal, rows):
    q, k, v = torch.randn(2, 4, rows, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 5)
    distance = torch.arange(9 - rows, 9)[:, None] - torch.arange(9)
    causal = distance >= 0 if is_causal else torch.ones_like(distance, dtype=torch.bool)
    options = {"scaling": 0.7, "softcap": 1.5}
    for layer, told in ((Layer(is_causal), None), (Layer(not is_causal), is_causal)):
        got, _ = attention(layer, q, k, v, None, is_causal=told, **options)
        close(got, by_formula(q, k, v, causal, **options), 1e-5)
        if is_causal or rows == 9:
            got, _ = attention(layer, q, k, v, None, is_causal=told, sliding_window=3, **options)
            window = causal & (distance.abs() < 3)
            close(got, by_formula(q, k, v, window, **options), 1e-5)
    bias = torch.randn(1, 4, rows, 9, requires_grad=True)
    got, _ = attention(Layer(is_causal), q, k, v, None, position_bias=bias)
    expected = by_formula(q, k, v, causal, bias=bias)
    close(got, expected, 1e-5)
    cotangent = torch.randn_like(got)
    grad, expected = (
        torch.autograd.grad(y, bias, cotangent.to(y.dtype))[0] for y in (got, expected)
    )
    close(grad, expected, 1e-5)


@pytest.mark.parametrize(
    ("positions", "bounds"),
    [
        ([0, 1, 0, 1, 2, 3], (0, 2)),
        ([0, 1, 2, 3, 4, 5], (0,)),
        ([3, 4, 5, 6, 7, 8], (0,)),
        ([0, 1, 3, 0, 1, 2], (0,)),  # counts nothing
        ([1, 2, 0, 1, 2, 3], (0,)),
    ],
)
@pytest.mark.parametrize("is_causal", [True, False])
def test_positions_that_start_again_are_sequences(positions, bounds, is_causal):
    q, k, v = torch.randn(3, 1, 4, 6, 8)
    token = torch.arange(6)
    sequence = torch.bucketize(token, torch.tensor(bounds), right=True)
    seen = sequence[:, None] == sequence
    seen &= (token[:, None] >= token) | (not is_causal)
    ids = torch.tensor([positions])
    got, _ = attention(Layer(is_causal), q, k, v, None, position_ids=ids)
    close(got, by_formula(q, k, v, seen), 1e-5)
    everything = torch.ones(1, 1, 6, 6, dtype=torch.bool)  # a mask is all there is
    got, _ = attention(Layer(is_causal), q, k, v, everything, position_ids=ids)
    close(got, by_formula(q, k, v, everything), 1e-5)


def test_a_bias_of_positions_beside_a_mask():
    q, k, v = torch.randn(3, 2, 4, 9, 8)
    seen = (torch.rand(2, 1, 9, 9) < 0.5) | torch.eye(9, dtype=torch.bool)
    bias = torch.randn(1, 4, 9, 9)
    got, _ = attention(Layer(), q, k, v, seen, position_bias=bias)
    close(got, by_formula(q, k, v, seen, bias=bias), 1e-5)


# Masks.

CAUSAL = masking_utils.causal_mask_function
BOTH_WAYS = masking_utils.bidirectional_mask_function
OTHER = masking_utils.and_masks(CAUSAL, lambda b, h, q, k: (q + k) % 3 > 0)
LOCAL = masking_utils.sliding_window_causal_mask_function(4)
LOCAL_BOTH_WAYS = masking_utils.sliding_window_bidirectional_mask_function(3)
FUNCTIONS = {
    "causal": (CAUSAL, {}, masks.Pattern(True)),
    "both ways": (BOTH_WAYS, {}, masks.Pattern(False)),
    "window": (LOCAL, {"local_size": 4}, masks.Pattern(True, (3, 0))),
    "window both ways": (LOCAL_BOTH_WAYS, {"local_size": 3}, masks.Pattern(False, (3, 3))),
    "chunks": (
        masking_utils.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int64)),
        {"local_size": 4}, None,
    ),
    "another window": (LOCAL, {"local_size": 5}, None),
    "other": (OTHER, {}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "sizes", [(9, 9, 0, 0), (3, 9, 6, 0), (3, 9, 11, 5), (1, 9, 8, 0), (4, 9, 2, 0), (9, 9, 3, 0)]
)
def test_a_mask_looks_like_that_of_sdpa(name, padded, sizes):
    function, options, expected = FUNCTIONS[name]
    rows, keys, q_offset, kv_offset = sizes
    real = torch.ones(2, keys + kv_offset, dtype=torch.int64)
    real[0, : kv_offset + 2] = 0
    arguments = {
        "batch_size": 2, "q_length": rows, "kv_length": keys, "q_offset": q_offset,
        "kv_offset": kv_offset, "mask_function": function,
        "attention_mask": real.bool() if padded else None, **options,
    }  # fmt: skip
    never = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask = masks.attention_mask(**arguments, **never)
    theirs = masking_utils.sdpa_mask(**arguments, **never)
    assert mask.shape == theirs.shape and mask.dtype == theirs.dtype
    pattern = mask.pattern
    if q_offset + rows != kv_offset + keys and name != "both ways":
        expected = None  # not aligned at the lower right corner
    assert (pattern is None) == (expected is None)
    if pattern is not None:
        assert pattern[:2] == expected[:2] and (pattern.key_bias is not None) == padded
    # What attention does with it is what it looks like; before and after somebody looked.
    q, k, v = torch.randn(2, 4, rows, 8), *torch.randn(2, 2, 4, keys, 8)
    o, _ = attention(Layer(), q, k, v, mask)
    some = theirs.any(-1).expand(2, 4, rows).transpose(1, 2)  # [B, Sq, H]
    close(o[some], by_formula(q, k, v, theirs)[some], 1e-5)
    assert not o[~some].any()
    assert torch.equal(mask & True, theirs)
    assert mask.pattern is None
    torch.testing.assert_close(attention(Layer(), q, k, v, mask)[0], o, rtol=1e-5, atol=1e-6)


def test_what_a_layers_causality_says_is_none():
    for rows, keys, q_offset in ((9, 9, 0), (1, 9, 8)):
        sizes = {"batch_size": 2, "q_length": rows, "kv_length": keys, "q_offset": q_offset}
        assert masks.attention_mask(**sizes) is None
        everything = torch.ones(2, keys, dtype=torch.bool)
        assert masks.attention_mask(**sizes, attention_mask=everything) is None
        options = {"mask_function": BOTH_WAYS, "allow_is_causal_skip": False}
        assert masks.attention_mask(**sizes, **options) is not None
        options["allow_is_bidirectional_skip"] = True
        assert masks.attention_mask(**sizes, **options) is None
    assert masks.attention_mask(batch_size=1, q_length=3, kv_length=9, q_offset=6) is not None
    packed = masking_utils.packed_sequence_mask_function(torch.tensor([[0, 0, 0, 1]]))
    packed = masking_utils.and_masks(CAUSAL, packed)
    pattern = masks.attention_mask(1, 4, 4, mask_function=packed).pattern
    assert pattern.cu_seqlens.tolist() == [0, 3, 4] and pattern.longest == 3
    assert pattern.options()["max_seqlen_q"] == pattern.options()["max_seqlen_k"] == 3
    wide = masking_utils.sliding_window_causal_mask_function(9)
    sizes = {"batch_size": 2, "q_length": 9, "kv_length": 9, "mask_function": wide}
    assert masks.attention_mask(**sizes, local_size=9) is None


def test_what_is_written_into_a_mask_holds():
    """Between two layers, too."""
    sizes = {"batch_size": 2, "q_length": 9, "kv_length": 9, "allow_is_causal_skip": False}
    sizes |= {"attention_mask": torch.arange(9)[None] > torch.tensor([[2], [-1]])}
    mask, seen = masks.attention_mask(**sizes), masking_utils.sdpa_mask(**sizes)
    q, k, v = torch.randn(3, 2, 4, 9, 8)
    for column in (0, 2):
        for each in (mask, seen):
            each[:, :, :, column] = True
        close(attention(Layer(), q, k, v, mask)[0], by_formula(q, k, v, seen), 1e-5)
    assert "True" in repr(mask)


def test_one_mask_serves_layers_of_several_dtypes():
    mask = masks.attention_mask(2, 9, 9, mask_function=OTHER)
    for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.float64):
        q, k, v = torch.randn(3, 2, 4, 9, 8, dtype=dtype)
        assert attention(Layer(), q, k, v, mask)[0].dtype == dtype


def test_equal_closures_are_the_same_function():
    def window(n, then=None):
        return lambda q, k: q - k < n and then(q, k)

    same = masks.same_function
    assert same(window(3, CAUSAL), window(3, CAUSAL), [])
    assert not same(window(3, CAUSAL), window(4, CAUSAL), [])
    assert not same(window(3, CAUSAL), window(3, BOTH_WAYS), [])
    assert not same(window(3, CAUSAL), window(True, CAUSAL), [])
    assert not same(window(torch.tensor(3)), window(torch.tensor(3)), [])
    assert not same(CAUSAL, BOTH_WAYS, [])
    found = []
    assert same(window(torch.tensor(3)), window(masks.ANY_TENSOR), found) and found == [3]


# Refusals.

QKV = torch.zeros(3, 1, 2, 4, 8)
BOUNDS = torch.tensor([0, 2, 4])
PLAIN = {"batch_size": 1, "q_length": 4, "kv_length": 4, "allow_is_causal_skip": False}
REFUSED = {
    "dropout": (None, {"dropout": 0.1}, r"dropout of the attention weights is 0\.1.*eval\(\)"),
    "head_mask": (None, {"head_mask": torch.ones(2)}, r"head_mask is float32 \[2\].*Leave"),
    "layer_head_mask": (None, {"layer_head_mask": torch.ones(2)}, "layer_head_mask is"),
    "output_attentions": (
        None, {"output_attentions": True}, "output_attentions is True.*attention_probs",
    ),
    "indices": (None, {"indices": torch.zeros(2)}, "indices is .*does not know.*eager"),
    "block_table": (None, {"block_table": 3}, "block_table is 3.*does not know"),
    "corner": (None, {"is_causal": True, "rows": 2}, "None for 2 queries and 4 keys.*corner"),
    "cu_seq_lens and pairs": (
        torch.ones(1, 1, 4, 4, dtype=torch.bool), {"cu_seq_lens_q": BOUNDS},
        "cu_seq_lens_q is given beside a mask of pairs of tokens",
    ),
    "cu_seq_lens and padding": (
        lambda: masks.attention_mask(**PLAIN, attention_mask=torch.arange(4)[None] > 1),
        {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS}, "beside a mask of padding",
    ),
    "cu_seq_lens and others": (
        lambda: masks.attention_mask(
            **PLAIN, mask_function=masking_utils.and_masks(
                CAUSAL, masking_utils.packed_sequence_mask_function(torch.tensor([[0, 0, 0, 1]]))
            ),
        ),
        {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS}, "beside a mask of other sequences",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    mask, options, message = REFUSED[name]
    q, k, v = QKV
    rows = options.get("rows", 4)
    options = {key: value for key, value in options.items() if key != "rows"}
    mask = mask() if callable(mask) else mask
    with pytest.raises(NotImplementedError, match=f"(?s){message}"):
        attention(Layer(), q[:, :, :rows], k, v, mask, **options)


def test_what_does_not_change_the_result_is_taken():
    q, k, v = torch.randn(3, 1, 2, 4, 8)
    expected, _ = attention(Layer(), q, k, v, None)
    options = {
        "use_cache": True, "deterministic": True, "output_hidden_states": True, "s_aux": None,
        "output_attentions": False, "position_ids": torch.arange(4)[None], "num_items_in_batch": 7,
        "dropout": 0.0, "softcap": None, "head_mask": None,
    }  # fmt: skip
    assert torch.equal(attention(Layer(), q, k, v, None, **options)[0], expected)


@pytest.mark.parametrize("shape", [(4, 4), (1, 4), (1, 4, 4)])
def test_masks_of_other_forms(shape):
    for mask in (torch.ones(shape, dtype=torch.bool), torch.ones(1, 1, 4, 4, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"attention_mask is .*expected \[B or 1"):
            attention(Layer(), *QKV, mask)
