# SPDX-License-Identifier: Apache-2.0
"""hw.attention in transformers with every cache, in pieces of any size, at every length around a
window: the numbers of the model's own attention. What is given is not read after it has changed."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers as hf
from torch import nn
from transformers import masking_utils

from headworks.integrations import _transformers_mask as masks
from headworks.integrations.transformers import attention, register
from test_integrations import DECODERS, ENCODERS, TINY, VOCAB, batch, close, pair


@pytest.fixture(autouse=True)
def _registered(_deterministic_start):
    torch.set_num_threads(1)
    register()


CACHES = {
    "dynamic": lambda config: hf.DynamicCache(config=config),
    "without windows": lambda config: hf.DynamicCache(),
    "static": lambda config: hf.StaticCache(config=config, max_cache_len=24),
    "static, full": lambda config: hf.StaticCache(config=config, max_cache_len=13),
}


def continued(model, ids, mask, cache, pieces):
    """The logits of a sequence given in pieces through a cache."""
    parameters = inspect.signature(model.forward).parameters
    argument = "cache" if "cache" in parameters else "past_key_values"
    made, end = [], 0
    for piece in ids.split(pieces, dim=1):
        end += piece.shape[1]
        seen = None if mask is None else mask[:, :end]
        options = {argument: cache, "use_cache": True}
        made.append(model(input_ids=piece, attention_mask=seen, **options).logits)
    return torch.cat(made, dim=1)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_pieces_through_every_cache(name, cache, padding):
    models = pair(name)
    ids, mask, real = batch(padding, tokens=13)
    for pieces in ([5, 8], [3, 1, 1, 8]):
        ours, theirs = (
            continued(m, ids, mask, CACHES[cache](m.config), pieces)[real] for m in models
        )
        close(ours, theirs, 1e-5)


@torch.no_grad()
def test_a_quantized_cache():
    models = pair("llama")
    ids, mask, real = batch("left", tokens=13)
    caches = [hf.QuantizedCache("fp8", config=m.config) for m in models]
    ours, theirs = (
        continued(m, ids, mask, c, [5, 8])[real] for m, c in zip(models, caches, strict=True)
    )
    close(ours, theirs, 1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["llama", "mistral"])
@torch.no_grad()
def test_compiled_with_a_static_cache(name):
    ours, theirs = pair(name)
    ids, mask, real = batch("left", tokens=13)
    expected = continued(theirs, ids, mask, CACHES["static"](theirs.config), [5, 8])
    cache = CACHES["static"](ours.config)
    given = {"cache": cache, "use_cache": True}
    ours(input_ids=ids[:, :5], attention_mask=mask[:, :5], **given)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    made = compiled(input_ids=ids[:, 5:], attention_mask=mask, **given).logits
    close(made[real[:, 5:]], expected[:, 5:][real[:, 5:]], 1e-5)


@pytest.mark.parametrize("name", [*DECODERS, "t5"])
@torch.no_grad()
def test_generation_with_a_static_cache(name):
    ours, theirs = pair(name)
    ids, mask, _ = batch("left")
    options = {
        "max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
        "return_dict_in_generate": True, "output_logits": True, "cache_implementation": "static",
    }  # fmt: skip
    made_by = [m.generate(ids, attention_mask=mask, **options) for m in (ours, theirs)]
    assert torch.equal(made_by[0].sequences, made_by[1].sequences)
    close(*(torch.stack(m.logits, dim=1) for m in made_by), 1e-5)


WINDOWED = {
    **{name: (name, {}) for name in ("mistral", "gemma2", "phimoe", "modernbert")},
    **{f"{name}, both ways": (name, {"is_causal": False}) for name in ("llama", "mistral")},
}
MASKS = ("none", "left", "right", "packed", "packed rows", "shared positions")


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", WINDOWED)
@torch.no_grad()
def test_every_length_around_the_window(name, kind):
    """A window of 4 in sequences of 1 to 10 tokens: where it hides nothing, the first key, more."""
    name, changes = WINDOWED[name]
    models = pair(name, **changes)
    for tokens in range(1, 11):
        ids = torch.randint(3, VOCAB, (1 if kind == "packed" else 2, tokens))
        real, options = torch.ones_like(ids), {}
        if kind == "left":
            real[0, : tokens // 3] = 0
        elif kind == "right":
            real[1, tokens - tokens // 3 :] = 0
        if kind in ("left", "right"):
            options["attention_mask"] = real
        elif kind != "none":
            rows = 1 if kind == "shared positions" else len(ids)
            starts = torch.randint(1, 4, (rows, 1))
            options = {"position_ids": (torch.arange(tokens) - starts) % 5, "use_cache": False}
        if "use_cache" in options and name in ENCODERS:
            del options["use_cache"]
        seen = real.bool()
        ours, theirs = (m(input_ids=ids, **options).logits[seen] for m in models)
        close(ours, theirs, 1e-5)


def test_a_window_in_the_config_that_the_mask_does_not_know():
    """OLMoE tells its layers of config.sliding_window and makes masks without."""
    experts = {"num_experts": 2, "num_experts_per_tok": 1}
    config = hf.OlmoeConfig(**TINY, **experts)
    config.sliding_window = 4
    ids, _, _ = batch()
    results = []
    for implementation in ("headworks", "sdpa"):
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
        results.append(model.eval()(input_ids=ids).logits)
    close(*results, 1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_rows_that_share_positions_which_start_again(name, use_cache):
    ours, theirs = pair(name)
    ids, _, _ = batch(tokens=9)
    options = {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0]]), "use_cache": use_cache}
    close(*(m(input_ids=ids, **options).logits for m in (ours, theirs)), 1e-5)


@pytest.mark.parametrize("name", ["causal", "both ways", "window", "packed", "other"])
def test_what_was_given_is_not_read_again(name):
    """Counters, padding and positions change after the mask is made and before it is used."""
    counter = torch.tensor(0)
    real = torch.arange(9)[None] >= torch.tensor([[0], [2]])
    sequence = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2]])
    causal = masking_utils.causal_mask_function
    function, changes = {
        "causal": (causal, {"q_length": 3, "q_offset": counter}),
        "both ways": (masking_utils.bidirectional_mask_function, {"q_offset": counter}),
        "window": (masking_utils.sliding_window_causal_mask_function(4), {"local_size": 4}),
        "packed": (
            masking_utils.and_masks(causal, masking_utils.packed_sequence_mask_function(sequence)),
            {"batch_size": 1, "attention_mask": None},
        ),
        "other": (masking_utils.and_masks(causal, lambda b, h, q, k: (q + k) % 3 > 0), {}),
    }[name]
    given = {
        "batch_size": 2, "q_length": 9, "kv_length": 9, "mask_function": function,
        "attention_mask": real, "allow_is_causal_skip": False, **changes,
    }  # fmt: skip
    mask, expected = masks.attention_mask(**given), masking_utils.sdpa_mask(**given)
    q = torch.randn(given["batch_size"], 4, given["q_length"], 8)
    k, v = torch.randn(2, given["batch_size"], 4, 9, 8)
    first, _ = attention(Layer(), q, k, v, mask)
    counter.add_(5), real.logical_not_(), sequence.zero_()
    assert torch.equal(attention(Layer(), q, k, v, mask)[0], first)
    assert torch.equal(mask & True, expected)


class Layer(nn.Module):
    is_causal = True
