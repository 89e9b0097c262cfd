# SPDX-License-Identifier: Apache-2.0
"""The language models: parallel, prefill and step agree; memory is constant; checkpoints."""

from __future__ import annotations

import pickle

import pytest
import torch

from headworks.models import (
    BasedConfig,
    BasedLM,
    ByteTokenizer,
    SoftmaxConfig,
    SoftmaxLM,
    load_checkpoint,
    sample,
    save_checkpoint,
)

VOCAB = 61  # not a multiple of 8: the embedding is padded
SMALL = BasedConfig(
    vocab_size=VOCAB, d_model=32, num_layers=4, linear_layers=(1,), window_layers=(2,),
    num_heads=2, window=20, mlp_hidden=64, init_std=0.2,
)  # fmt: skip


def based(**changes):
    return BasedLM(BasedConfig.from_dict({**SMALL.to_dict(), **changes}))


def softmax():
    return SoftmaxLM(SoftmaxConfig.like(SMALL))


MODELS = {
    "based": based,
    "based_untied": lambda: based(tie_embeddings=False, g_norm=True, rotary_fraction=0.0),
    "softmax": softmax,
}


@pytest.fixture(autouse=True)
def _one_thread(_deterministic_start):
    """The models here are tiny: threads cost more than they give."""
    torch.set_num_threads(1)


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def tokens(batch, length):
    return torch.randint(VOCAB, (batch, length))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_step_equals_the_parallel_forward(model, dtype):
    model.to(dtype)
    text = tokens(2, 90)
    logits = model(text).detach().float()
    first, state = model.prefill(text[:, :30])
    stepped = [first] + [model.step(text[:, t], state) for t in range(30, 90)]
    stepped = torch.stack(stepped, dim=1).float()
    size = logits.abs().max().item()
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-6, torch.bfloat16: 0.06}[dtype]
    assert (stepped - logits[:, 29:]).abs().max().item() < tolerance * size


def test_greedy_tokens_equal_the_parallel_forward(model):
    prompt = tokens(3, 7)
    made = model.generate(prompt, 60, temperature=0)
    text = torch.cat([prompt, made], dim=1)
    expected = model(text)[:, 6:-1, :VOCAB].argmax(-1)
    assert torch.equal(made, expected)
    assert len(made.unique()) > 3


def test_prefill_in_pieces():
    model, text = based(), tokens(2, 100)
    whole = model.prefill(text)[0]
    state = None
    for piece in text.split([1, 40, 2, 57], dim=1):
        logits, state = model.prefill(piece, state)
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
    logits, _ = model(text[:, 50:], model.prefill(text[:, :50])[1], return_state=True)
    torch.testing.assert_close(logits, model(text)[:, 50:], rtol=1e-4, atol=1e-4)


def test_packed_sequences():
    model, text = based(), tokens(1, 80)
    packed = model(text, cu_seqlens=torch.tensor([0, 3, 50, 80]))
    alone = torch.cat([model(t) for t in text.split([3, 47, 30], dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


def test_every_parameter_gets_a_gradient(model):
    logits = model(tokens(2, 50))
    logits.backward(torch.randn_like(logits))
    for name, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
        assert p.grad.abs().sum() > 0, name


def test_the_state_of_based_does_not_grow():
    model = based(d_model=16, num_layers=3)
    state = model.init_state(1)
    size, storages = {}, {}
    token = tokens(1, 1)[:, 0]
    for step in range(1, 5001):
        model.step(token, state)
        if step in (1, 100, 5000):
            size[step] = state.nbytes
            storages[step] = sum(t.untyped_storage().nbytes() for t in state.tensors())
    assert size[1] == size[100] == size[5000] > 0
    assert storages[1] == storages[100] == storages[5000] == size[1]
    assert model.prefill(tokens(1, 300))[1].nbytes == size[1]


def test_the_cache_of_softmax_grows():
    model = softmax()
    state = model.prefill(tokens(1, 10))[1]
    per_token = state.nbytes / 10
    assert per_token == 2 * 4 * 32 * 4  # k and v, layers, width, bytes
    for _ in range(300):
        model.step(tokens(1, 1)[:, 0], state)
    assert state.nbytes == 310 * per_token


def test_states_can_be_cloned():
    model = based()
    state = model.prefill(tokens(1, 30))[1]
    copy = state.clone()
    token = tokens(1, 1)[:, 0]
    first = model.step(token, state)
    model.step(token, state)
    assert torch.equal(model.step(token, copy), first)


def test_presets_have_the_sizes_of_the_paper():
    sizes = {
        "based_360m": (360e6, 0.02), "based_1b": (1.4e9, 0.04),
    }  # fmt: skip
    for name, (nominal, tolerance) in sizes.items():
        model = BasedLM(getattr(BasedConfig, name)(), device="meta")
        assert abs(model.num_parameters() / nominal - 1) < tolerance, name


def test_preset_names_and_shapes_are_the_official_ones():
    weights = BasedLM(BasedConfig.based_1b(), device="meta").state_dict()
    expected = {
        "transformer.embeddings.word_embeddings.weight": (50264, 1792),
        "transformer.layers.0.norm1.weight": (1792,),
        "transformer.layers.0.norm2.weight": (1792,),
        "transformer.layers.0.mixer.in_proj.weight": (7168, 1792),
        "transformer.layers.0.mixer.in_proj.bias": (7168,),
        "transformer.layers.0.mixer.conv.conv.weight": (3584, 1, 3),
        "transformer.layers.0.mixer.out_proj.weight": (1792, 3584),
        "transformer.layers.0.mixer.out_proj.bias": (1792,),
        "transformer.layers.1.mixer.proj_q.weight": (256, 1792),
        "transformer.layers.1.mixer.proj_k.weight": (256, 1792),
        "transformer.layers.1.mixer.proj_v.weight": (1792, 1792),
        "transformer.layers.1.mixer.out_proj.weight": (1792, 1792),
        "transformer.layers.2.mixer.Wqkv.weight": (5376, 1792),
        "transformer.layers.2.mixer.out_proj.weight": (1792, 1792),
        "transformer.layers.0.mlp.fc1.weight": (7168, 1792),
        "transformer.layers.0.mlp.fc2.weight": (1792, 3584),
        "transformer.ln_f.weight": (1792,),
        "lm_head.weight": (50264, 1792),
    }
    for name, shape in expected.items():
        assert tuple(weights[name].shape) == shape, name
    kinds = {".".join(n.split(".")[3:]) for n in weights if n.startswith("transformer.layers")}
    listed = {".".join(n.split(".")[3:]) for n in expected if n.startswith("transformer.layers")}
    assert kinds == listed


def test_hybrid_layout_of_the_presets():
    kinds = BasedConfig.based_1b().layer_kinds
    assert len(kinds) == 36
    assert [i for i, kind in enumerate(kinds) if kind == "linear"] == [1, 6, 11, 16, 21, 27, 33]
    assert all(kinds[i + 1] == "window" for i, kind in enumerate(kinds) if kind == "linear")
    assert BasedLM(BasedConfig.based_1b(), device="meta").blocks[1].mixer.head_dim == 112


def test_generation_streams_and_repeats(model):
    prompt = tokens(2, 5)
    options = {"temperature": 0.9, "top_k": 7, "seed": 3}
    made = model.generate(prompt, 12, **options)
    assert made.shape == (2, 12) and made.max() < VOCAB
    assert torch.equal(model.generate(prompt, 12, **options), made)
    streamed = model.generate(prompt, 12, **options, stream=True)
    assert torch.equal(torch.stack(list(streamed), dim=1), made)
    assert not torch.equal(model.generate(prompt, 12, **{**options, "seed": 4}), made)
    assert model.generate(prompt, 0).shape == (2, 0)
    greedy = model.generate(prompt, 12, temperature=0)
    assert torch.equal(model.generate(prompt, 12, top_k=1, seed=0), greedy)


def test_sampling_follows_the_logits():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).expand(20000, 4)
    generator = torch.Generator().manual_seed(0)
    counts = sample(logits, 0.5, 3, generator).bincount(minlength=4) / 20000
    expected = (logits[0, :3] / 0.5).softmax(0)
    torch.testing.assert_close(counts[:3], expected, rtol=0, atol=0.02)
    assert counts[3] == 0


def test_checkpoint_round_trip(model, tmp_path):
    path = tmp_path / "model.pt"
    extra = {"step": 7, "curve": [[1, 2.5]], "moments": {"a": torch.ones(3)}}
    save_checkpoint(path, model, tokenizer=ByteTokenizer(), extra=extra)
    loaded = load_checkpoint(path)
    text = tokens(1, 40)
    assert torch.equal(loaded.model(text), model(text))
    assert loaded.model.config == model.config and type(loaded.model) is type(model)
    assert loaded.model.num_parameters() == model.num_parameters()
    assert all(p.requires_grad for p in loaded.model.parameters())
    assert isinstance(loaded.tokenizer, ByteTokenizer)
    assert loaded.extra["step"] == 7 and torch.equal(loaded.extra["moments"]["a"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


def test_a_checkpoint_replaces_an_older_one(tmp_path):
    path = tmp_path / "model.pt"
    first, second = based(), based()
    save_checkpoint(path, first)
    save_checkpoint(path, second)
    text = tokens(1, 10)
    assert torch.equal(load_checkpoint(path).model(text), second(text))


class _Evil:
    def __reduce__(self):
        return (print, ("code from the file ran",))


@pytest.mark.parametrize("content", ["text", "other", "pickle", "empty"])
def test_what_is_no_checkpoint_is_refused(tmp_path, content, capsys):
    path = tmp_path / "model.pt"
    if content == "text":
        path.write_text("not a checkpoint")
    elif content == "other":
        torch.save({"weights": torch.ones(2)}, path)
    elif content == "pickle":
        path.write_bytes(pickle.dumps(_Evil()))
    else:
        path.touch()
    with pytest.raises(ValueError, match="is not a headworks checkpoint"):
        load_checkpoint(path)
    assert "ran" not in capsys.readouterr().out


def test_missing_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "none.pt")


def test_bytes_tokenizer():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("café ∞")) == "café ∞"
    assert tokenizer.decode(torch.tensor([0x41, 0xE2, 0x88])) == "A\ufffd"


BAD_CONFIGS = {
    "heads": ({"num_heads": 3}, "not a multiple"),
    "both": ({"linear_layers": (1, 2)}, r"layers \[2\] are both"),
    "outside": ({"window_layers": (9,)}, r"layers \[9\] do not exist"),
    "empty": ({"num_layers": 0, "linear_layers": (), "window_layers": ()}, "num_layers is 0"),
    "unknown": ({"colour": 1}, "unknown fields"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_configs(name):
    changes, message = BAD_CONFIGS[name]
    with pytest.raises(ValueError, match=message):
        BasedConfig.from_dict({**SMALL.to_dict(), **changes})
    with pytest.raises(ValueError, match="expected one of"):
        BasedConfig.byte_level("huge")


BAD_CALLS = {
    "tokens_rank": ("tokens has shape", lambda m: m(tokens(1, 5)[0])),
    "step_rank": ("token has shape", lambda m: m.step(tokens(1, 5), m.init_state(1))),
    "step_layers": (
        "state has 0 layers", lambda m: m.step(tokens(1, 1)[0], type(m.init_state(1))([])),
    ),
    "prompt_empty": ("prompt has shape", lambda m: m.generate(tokens(1, 0), 3)),
    "prompt_values": ("holds tokens from", lambda m: m.generate(tokens(1, 3) + VOCAB, 3)),
    "n": ("n is -1", lambda m: m.generate(tokens(1, 3), -1)),
    "temperature": ("temperature is nan", lambda m: m.generate(
        tokens(1, 3), 3, temperature=float("nan"))),
    "top_k": ("top_k is 0", lambda m: m.generate(tokens(1, 3), 3, top_k=0)),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(name):
    message, call = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call(based())


def test_the_softmax_baseline_refuses_what_it_cannot():
    model = softmax()
    _, state = model.prefill(tokens(1, 5))
    with pytest.raises(NotImplementedError, match="baseline"):
        model.prefill(tokens(1, 5), state)
