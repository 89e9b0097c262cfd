# SPDX-License-Identifier: Apache-2.0
"""hw.attention inside Hugging Face's models: the same numbers as their own attention on the same
weights, nothing of the size of a square, and what is refused; how it is registered."""

from __future__ import annotations

import doctest
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from transformers import masking_utils

from headworks.integrations import transformers as integration
from headworks.integrations.transformers import register

VOCAB = 64
TINY = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
GPT2 = {
    "vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
T5 = {
    "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "pad_token_id": 0, "dropout_rate": 0.0,
}  # fmt: skip
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
LATENT = {  # keys wider than values
    "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 12, "first_k_dense_replace": 2,
}  # fmt: skip

# name: (config, head, its reference)
DECODERS = {
    "llama": (lambda: hf.LlamaConfig(**TINY), "sdpa"),
    "mistral": (lambda: hf.MistralConfig(**TINY, sliding_window=4), "sdpa"),
    "gemma2": (
        lambda: hf.Gemma2Config(
            **TINY, sliding_window=4, attn_logit_softcapping=2.0, query_pre_attn_scalar=5
        ),
        "eager",  # sdpa cannot cap
    ),
    "gpt2": (lambda: hf.GPT2Config(**GPT2, **GPT2_DROPOUT), "sdpa"),
    # Its attention layers are not told of the window, which is in the mask alone.
    "phimoe": (lambda: hf.PhimoeConfig(**TINY, **EXPERTS, sliding_window=4), "sdpa"),
    "deepseek_v3": (lambda: hf.DeepseekV3Config(**{**TINY, **LATENT}), "sdpa"),
    # Learned sinks; sdpa and flex have none.
    "gpt_oss": (lambda: hf.GptOssConfig(**TINY, **EXPERTS, sliding_window=4), "eager"),
    # Chunks have no pattern: a mask of pairs.
    "llama4": (
        lambda: hf.Llama4TextConfig(
            **TINY, **EXPERTS, attention_chunk_size=4, intermediate_size_mlp=64
        ),
        "sdpa",
    ),
}
ENCODERS = {
    "bert": (lambda: hf.BertConfig(**TINY, **NO_DROPOUT), "sdpa"),
    "modernbert": (lambda: hf.ModernBertConfig(**TINY, local_attention=4), "sdpa"),
}
SEQ2SEQ = {"t5": (lambda: hf.T5Config(**T5), "sdpa")}
KINDS = (
    (DECODERS, hf.AutoModelForCausalLM),
    (ENCODERS, hf.AutoModelForMaskedLM),
    (SEQ2SEQ, hf.AutoModelForSeq2SeqLM),
)
MODELS = [name for kind, _ in KINDS for name in kind]


@pytest.fixture(autouse=True)
def _registered(_deterministic_start):
    torch.set_num_threads(1)
    register()


def made(name, implementation, dtype=torch.float32, **changes):
    """The model, with weights that do not depend on the implementation."""
    for kind, auto in KINDS:
        if name in kind:
            config = kind[name][0]()
            for key, value in changes.items():
                setattr(config, key, value)
            torch.manual_seed(0)
            model = auto.from_config(config, attn_implementation=implementation)
            return model.to(dtype).eval()
    raise KeyError(name)


def pair(name, dtype=torch.float32, **changes):
    """(headworks', the reference)"""
    reference = next(kind[name][1] for kind, _ in KINDS if name in kind)
    ours, theirs = (
        made(name, "headworks", dtype, **changes),
        made(name, reference, dtype, **changes),
    )
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    return ours, theirs


def batch(padding="none", rows=2, tokens=11):
    """input_ids, attention_mask (None without padding), and where there is no padding."""
    ids = torch.randint(3, VOCAB, (rows, tokens))
    real = torch.ones_like(ids)
    if padding == "left":
        real[0, :3] = 0
    elif padding == "right":
        real[1, 7:] = 0
    return ids, None if padding == "none" else real, real.bool()


def logits(model, ids, mask, **options):
    if model.config.is_encoder_decoder:
        options["decoder_input_ids"] = ids.flip(1)
    return model(input_ids=ids, attention_mask=mask, **options).logits


def close(got, expected, relative):
    """Within `relative` of the largest number."""
    assert got.shape == expected.shape and got.numel() > 0
    assert expected.isfinite().all()
    assert (got - expected).abs().max() <= relative * expected.abs().max().clamp(min=1e-3)


class Squares:
    """Counts the masks of pairs that transformers makes."""

    def __init__(self, monkeypatch):
        self.count = 0
        make = masking_utils.sdpa_mask

        def counted(*args, **kwargs):
            self.count += 1
            return make(*args, **kwargs)

        monkeypatch.setattr(masking_utils, "sdpa_mask", counted)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_equal_those_of_the_models_own_attention(name, padding):
    ours, theirs = pair(name)
    ids, mask, real = batch(padding)
    seen = torch.ones_like(real) if ours.config.is_encoder_decoder else real
    results = []
    cotangent = torch.randn(*ids.shape, VOCAB) * seen[..., None]
    for model in (ours, theirs):
        model.train()
        y = logits(model, ids, mask)
        y.backward(cotangent)
        results.append((y.detach(), {n: p.grad for n, p in model.named_parameters()}))
    (y, grads), (expected, expected_grads) = results
    close(y[seen], expected[seen], 1e-5)
    assert y.isfinite().all()
    assert y[seen].std() > 0.1  # the numbers say something
    largest = max(g.abs().max() for g in expected_grads.values() if g is not None)
    for parameter, grad in grads.items():
        if expected_grads[parameter] is None:
            assert grad is None or not grad.any(), parameter
        else:
            assert (grad - expected_grads[parameter]).abs().max() <= 1e-5 * largest, parameter


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "phimoe", "bert", "modernbert"])
def test_no_square_is_made_for_what_is_a_pattern(name, padding, monkeypatch):
    model, (ids, mask, _) = made(name, "headworks"), batch(padding)
    squares = Squares(monkeypatch)
    model(input_ids=ids, attention_mask=mask)
    assert squares.count == 0


def test_a_square_is_made_once_for_what_is_none(monkeypatch):
    model, (ids, mask, _) = made("llama4", "headworks"), batch("left")
    squares = Squares(monkeypatch)
    model(input_ids=ids, attention_mask=mask)
    assert squares.count == 1  # for both layers


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", [*DECODERS, "t5"])
def test_generation(name, padding):
    """Token by token with a cache: what the reference generates, and what a full pass says."""
    ours, theirs = pair(name)
    ids, mask, _ = batch(padding)
    mask = torch.ones_like(ids) if mask is None else mask
    options = {
        "max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
        "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    made_by = [m.generate(ids, attention_mask=mask, **options) for m in (ours, theirs)]
    assert torch.equal(made_by[0].sequences, made_by[1].sequences)
    stepped = torch.stack(made_by[0].logits, dim=1)
    close(stepped, torch.stack(made_by[1].logits, dim=1), 1e-5)
    text = made_by[0].sequences
    if name == "t5":
        whole = ours(input_ids=ids, attention_mask=mask, decoder_input_ids=text).logits[:, :-1]
    else:
        mask = torch.cat([mask, torch.ones(2, 10, dtype=mask.dtype)], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # as generate() counts them
        whole = ours(input_ids=text, attention_mask=mask, position_ids=positions).logits[:, 10:-1]
    close(stepped, whole, 1e-5)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2"])
def test_pieces_through_a_cache_equal_the_whole(name, padding, monkeypatch):
    model, (ids, mask, real) = made(name, "headworks"), batch(padding)
    whole = model(input_ids=ids, attention_mask=mask).logits
    cache = hf.DynamicCache(config=model.config)
    parameters = inspect.signature(model.forward).parameters
    argument = "cache" if "cache" in parameters else "past_key_values"
    squares, pieces, end = Squares(monkeypatch), [], 0
    for piece in ids.split([3, 1, 5, 2], dim=1):
        end += piece.shape[1]
        seen = None if mask is None else mask[:, :end]
        options = {argument: cache, "use_cache": True}
        pieces.append(model(input_ids=piece, attention_mask=seen, **options).logits)
    close(torch.cat(pieces, dim=1)[real], whole[real], 1e-5)
    assert squares.count == 0


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("how", ["positions", "positions and a cache", "cu_seq_lens", "both"])
def test_packed_sequences(name, how, monkeypatch):
    model, theirs = pair(name)
    ids = torch.randint(3, VOCAB, (1, 16))
    lengths = [3, 8, 1, 4]
    bounds = torch.tensor([0, 3, 11, 12, 16], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    apart = torch.cat([model(input_ids=x).logits for x in ids.split(lengths, 1)], 1)
    options = {"use_cache": how == "positions and a cache", "position_ids": positions}
    if how in ("cu_seq_lens", "both"):
        options |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        options |= {"max_length_q": 8, "max_length_k": 8}
    if how == "cu_seq_lens":
        options["use_cache"] = True
    squares = Squares(monkeypatch)
    packed = model(input_ids=ids, **options).logits
    close(packed, apart, 1e-5)
    assert squares.count == 0
    monkeypatch.undo()
    if how == "positions":
        close(packed, theirs(input_ids=ids, **options).logits, 1e-5)


def test_packed_sequences_in_several_rows():
    ours, theirs = pair("mistral")
    ids, _, _ = batch()
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 0], [*range(9), 0, 1]])
    options = {"position_ids": positions, "use_cache": False}
    close(*(m(input_ids=ids, **options).logits for m in (ours, theirs)), 1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "bert"])
def test_bfloat16(name):
    """No further from fp32 than the reference is, twice over."""
    ids, mask, real = batch("left")
    exact = logits(made(name, "headworks"), ids, mask)[real]
    ours, theirs = (logits(m, ids, mask)[real] for m in pair(name, torch.bfloat16))
    assert ours.dtype == torch.bfloat16
    errors = [(y.float() - exact).abs().max() / exact.abs().max() for y in (ours, theirs)]
    assert errors[0] < 2 * errors[1] + 0.01 < 0.2


def test_autocast():
    """fp32 weights, bf16 inside: as far from fp32 as the reference is, twice over."""
    ids, mask, real = batch("left")
    ours, theirs = pair("mistral")
    exact = logits(ours, ids, mask)[real]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        errors = [(logits(m, ids, mask)[real].float() - exact).abs().max() for m in (ours, theirs)]
    assert 0 < errors[0] < 2 * errors[1] + 0.01 * exact.abs().max()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model, (ids, mask, _) = made("mistral", "headworks").train(), batch("left")
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_a_model_changes_its_implementation():
    ours, theirs = pair("mistral")
    ids, mask, real = batch("left")
    expected = logits(ours, ids, mask)[real]
    theirs.set_attn_implementation("headworks")
    assert torch.equal(logits(theirs, ids, mask)[real], expected)


def test_float64():
    ids, mask, real = batch("left")
    ours, theirs = (logits(m, ids, mask)[real] for m in pair("mistral", torch.float64))
    close(ours, theirs, 1e-12)


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("kind", ["booleans", "numbers"])
def test_a_mask_of_four_dimensions_is_all_there_is(name, kind):
    """A prefix that sees itself both ways: neither causal nor a window is added to it."""
    ours, theirs = pair(name)
    ids, _, _ = batch()
    mask = torch.ones(11, 11, dtype=torch.bool).tril()
    mask[:5, :5] = True
    if kind == "numbers":
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    mask = mask.expand(2, 1, 11, 11)
    close(logits(ours, ids, mask), logits(theirs, ids, mask), 1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("padding", ["none", "left"])
def test_compile(padding):
    model, (ids, mask, real) = made("mistral", "headworks"), batch(padding)
    expected = model(input_ids=ids, attention_mask=mask).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(input_ids=ids, attention_mask=mask).logits[real], expected[real], 1e-5)
    torch._dynamo.reset()


def test_models_refuse_as_their_layers_do():
    ids, mask, _ = batch("left")
    gpt2 = made("gpt2", "headworks", attn_pdrop=0.1)
    for block in gpt2.transformer.h:
        block.attn.attn_dropout.p = 0.1
    gpt2(input_ids=ids, attention_mask=mask)  # in eval mode there is no dropout
    with pytest.raises(NotImplementedError, match=r"dropout .*is 0\.1"):
        gpt2.train()(input_ids=ids, attention_mask=mask)
    with pytest.raises(NotImplementedError, match="output_attentions is True"):
        made("llama", "headworks")(input_ids=ids, attention_mask=mask, output_attentions=True)


def test_a_model_that_would_ignore_the_request_is_refused():
    config = hf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_head=4, n_layer=1)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="headworks")
    with pytest.raises(NotImplementedError, match="BloomAttention does not use"):
        model(input_ids=batch()[0])


# Registration.


def test_the_backend_is_passed_on():
    ids, mask, real = batch("left")
    model = made("mistral", "headworks")
    expected = logits(model, ids, mask)[real]
    register(backend="reference")  # models made before follow
    close(logits(model, ids, mask)[real], expected, 1e-5)
    register(backend="simt")
    with pytest.raises(RuntimeError, match=r'backend="simt"'):
        logits(model, ids, mask)
    register("headworks_again", backend="cpu")
    assert torch.equal(
        logits(made("mistral", "headworks_again"), ids, mask)[real], expected
    )  # under another name, beside it


@pytest.mark.parametrize("name", ["", "sdpa", "eager", "flash_headworks", "a/b", "flex_attention"])
def test_bad_names(name):
    known = hf.AttentionInterface().get(name)
    with pytest.raises(ValueError, match=r"name is .*no other use"):
        register(name)
    assert hf.AttentionInterface().get(name) is known


def test_a_name_that_is_taken():
    hf.AttentionInterface.register("taken", lambda *args, **kwargs: None)
    with pytest.raises(ValueError, match="name is 'taken'"):
        register("taken")


def test_bad_backend():
    with pytest.raises(ValueError, match="backend is 'fast'; expected one of auto"):
        register(backend="fast")


def test_an_older_transformers_is_refused(monkeypatch):
    monkeypatch.setattr(masking_utils, "sdpa_mask", lambda batch_size, cache_position: None)
    with pytest.raises(ImportError, match=r"transformers is \d.*pip install 'transformers>="):
        register()


def test_transformers_is_imported_when_it_is_used():
    code = (
        "import sys, headworks, headworks.integrations.transformers as t\n"
        "assert 'transformers' not in sys.modules\n"
        "sys.modules['transformers'] = None\n"
        "try:\n    t.register()\n"
        "except ImportError as error:\n    print(error)\n"
    )
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert re.fullmatch(r".*transformers is not installed; pip install transformers\n", said)


def test_examples_of_the_docstring():
    failed, tried = doctest.testmod(integration)
    assert tried >= 5 and not failed


def test_examples_of_the_page():
    page = Path(__file__).resolve().parents[1] / "docs/integrations.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    names = {}
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)
