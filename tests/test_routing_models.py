# SPDX-License-Identifier: Apache-2.0
"""The models of the routing operators: official names of BiFormer, decoding of RoutingLM."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from headworks import models
from headworks.models import (
    ByteTokenizer,
    RoutingConfig,
    RoutingLM,
    biformer,
    load_checkpoint,
    save_checkpoint,
)
from headworks.nn import BiLevelRoutingAttention

# Names of the official checkpoints, by part.
STEM = (
    "0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var",
    "1.num_batches_tracked", "3.weight", "3.bias", "4.weight", "4.bias", "4.running_mean",
    "4.running_var", "4.num_batches_tracked",
)  # fmt: skip
HALVE = STEM[:7]
BLOCK = (
    "pos_embed.weight", "pos_embed.bias", "norm1.weight", "norm1.bias", "attn.lepe.weight",
    "attn.lepe.bias", "attn.qkv.qkv.weight", "attn.qkv.qkv.bias", "attn.wo.weight", "attn.wo.bias",
    "norm2.weight", "norm2.bias", "mlp.0.weight", "mlp.0.bias", "mlp.3.weight", "mlp.3.bias",
)  # fmt: skip
LAST_BLOCK = (
    "pos_embed.weight", "pos_embed.bias", "norm1.weight", "norm1.bias", "attn.qkv.weight",
    "attn.proj.weight", "attn.proj.bias", "attn.lepe.weight", "attn.lepe.bias", "norm2.weight",
    "norm2.bias", "mlp.0.weight", "mlp.0.bias", "mlp.3.weight", "mlp.3.bias",
)  # fmt: skip
END = (
    "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked",
    "head.weight", "head.bias",
)  # fmt: skip
DEPTHS = {"tiny": (2, 2, 8, 2), "small": (4, 4, 18, 4), "base": (4, 4, 18, 4)}


def official_names(depths):
    names = [f"downsample_layers.0.{n}" for n in STEM]
    names += [f"downsample_layers.{i}.{n}" for i in (1, 2, 3) for n in HALVE]
    for stage, depth in enumerate(depths):
        block = LAST_BLOCK if stage == 3 else BLOCK
        names += [f"stages.{stage}.{i}.{n}" for i in range(depth) for n in block]
    return [*names, *END]


@pytest.mark.parametrize(("size", "millions"), [("tiny", 13.1), ("small", 25.5), ("base", 56.8)])
def test_biformer_names_and_sizes(size, millions):
    model = getattr(models, f"biformer_{size}")(device="meta")
    assert list(model.state_dict()) == official_names(DEPTHS[size])
    count = sum(p.numel() for p in model.parameters())
    assert round(count / 1e6, 1) == millions


def test_biformer_shapes():
    """One weight of each kind, as in the official checkpoints."""
    shapes = {
        n: tuple(p.shape) for n, p in models.biformer_tiny(device="meta").state_dict().items()
    }
    expected = {
        "downsample_layers.0.0.weight": (32, 3, 3, 3),
        "downsample_layers.0.3.weight": (64, 32, 3, 3),
        "downsample_layers.3.0.weight": (512, 256, 3, 3),
        "stages.0.0.pos_embed.weight": (64, 1, 3, 3),
        "stages.0.0.attn.lepe.weight": (64, 1, 5, 5),
        "stages.0.0.attn.qkv.qkv.weight": (192, 64),
        "stages.0.0.attn.wo.weight": (64, 64),
        "stages.2.7.mlp.0.weight": (768, 256),
        "stages.3.1.attn.qkv.weight": (1536, 512),
        "stages.3.1.attn.proj.weight": (512, 512),
        "stages.3.1.attn.lepe.weight": (512, 1, 5, 5),
        "norm.running_mean": (512,),
        "head.weight": (1000, 512),
    }
    assert {n: shapes[n] for n in expected} == expected


def small(**options):
    """Stages of 16, 8, 4 and 2 tokens a side for 64 x 64 images."""
    return models.BiFormer(
        (1, 1, 1, 1), (16, 32, 32, 64), (1, 2, 4, -2),
        **{"num_classes": 3, "n_win": 2, "head_dim": 16, "backend": "reference", **options},
    )  # fmt: skip


@pytest.mark.parametrize("kind", ("routing", "full"))
def test_biformer_block_is_the_definition(kind):
    """Residuals, norms and both kinds of attention; with one region that one is full too."""
    if kind == "full":
        attn = biformer.LePEAttention(32, 4, backend="reference")
    else:
        attn = BiLevelRoutingAttention(32, 4, 1, topk=1, side_dwconv=5, backend="reference")
    block = biformer.BiFormerBlock(32, attn).double()
    x = torch.randn(2, 32, 5, 6, dtype=torch.float64)

    def attend(y):  # [B, Y, X, C]
        project, out = (attn.qkv, attn.proj) if kind == "full" else (attn.qkv.qkv, attn.wo)
        qkv = project(y)
        q, k, v = qkv.flatten(1, 2).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        scale = (8 if kind == "full" else 32) ** -0.5
        o = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).reshape(y.shape)
        beside = y if kind == "full" else qkv[..., 64:]
        return out(o + attn.lepe(beside.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))

    y = (x + block.pos_embed(x)).permute(0, 2, 3, 1)
    y = y + attend(F.layer_norm(y, (32,), block.norm1.weight, block.norm1.bias, 1e-6))
    z = F.layer_norm(y, (32,), block.norm2.weight, block.norm2.bias, 1e-6)
    y = y + block.mlp[3](F.gelu(block.mlp[0](z)))
    torch.testing.assert_close(block(x), y.permute(0, 3, 1, 2))


def test_biformer_runs():
    model = small().eval()
    x = torch.randn(2, 3, 64, 64)
    y = model(x)
    assert y.shape == (2, 3) and model.forward_features(x).shape == (2, 64, 2, 2)
    torch.testing.assert_close(model(x[1:]), y[1:])
    assert small(num_classes=0)(x).shape == (2, 64)
    with pytest.raises(ValueError, match=r"expected multiples of n_win"):
        model(torch.randn(1, 3, 72, 64))
    assert small(auto_pad=True).eval()(torch.randn(1, 3, 72, 60)).shape == (1, 3)
    with pytest.raises(ValueError, match=r"topks is \(1, 2\), expected 4"):
        models.BiFormer((1, 1, 1, 1), (16, 32, 32, 64), (1, 2))


def test_biformer_learns():
    """Where the bright corner is: three classes, a few steps."""
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    x, label = 0.3 * torch.randn(24, 3, 64, 64), torch.arange(24) % 3
    for image, corner in zip(x, label.tolist(), strict=True):
        image[:, 40 * (corner == 1) :, 40 * (corner == 2) :][:, :24, :24] += 1
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(model(x), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None for p in model.parameters())


def test_stochastic_depth():
    model = small(drop_path_rate=0.9)
    block = model.stages[3][0]
    assert block.drop_path == pytest.approx(0.9) and model.stages[0][0].drop_path == 0
    x = torch.ones(1000, 1, 1, 1)
    kept = block.train()._kept(x)
    assert set(kept.unique().round(decimals=3).tolist()) == {0.0, 10.0}
    assert 0.05 < (kept > 0).float().mean() < 0.15
    assert torch.equal(block.eval()._kept(x), x)


CONFIG = RoutingConfig(
    vocab_size=61, d_model=32, num_layers=2, num_heads=4, local_heads=2, num_clusters=4, window=12,
    local_window=5, mlp_hidden=48,
)  # fmt: skip


def language_model(**options):
    fields = {**CONFIG.to_dict(), "init_std": 0.2, **options}
    return RoutingLM(RoutingConfig.from_dict(fields), backend="reference").eval()


@pytest.mark.parametrize("options", ({}, {"shared_qk": False}, {"norm": "layer"}), ids=str)
def test_routing_lm_decodes(options):
    """Prefill and steps equal the parallel form."""
    model = language_model(**options)
    tokens = torch.randint(61, (2, 48))
    with torch.no_grad():
        whole = model(tokens)
    logits, state = model.prefill(tokens[:, :20])
    torch.testing.assert_close(logits, whole[:, 19], rtol=1e-4, atol=1e-4)
    for t in range(20, 48):
        logits = model.step(tokens[:, t], state)
        torch.testing.assert_close(logits, whole[:, t], rtol=1e-4, atol=1e-4)
    assert model.generate(tokens[:, :9], 5, temperature=0).shape == (2, 5)
    assert state.nbytes > 0 and len(state.clone().layers) == 2


def test_routing_lm_by_the_whole_sequence_does_not_decode():
    model = language_model(is_causal_prefix=False)
    assert model(torch.randint(61, (1, 30))).shape == (1, 30, 64)
    with pytest.raises(NotImplementedError, match="is_causal_prefix=True"):
        model.prefill(torch.randint(61, (1, 30)))


@pytest.mark.parametrize("prefix", (True, False))
def test_routing_lm_learns(prefix):
    """Which of the tokens there are, and moves its centroids on the way."""
    model = language_model(is_causal_prefix=prefix, init_std=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(25):
        tokens = torch.randint(8, (8, 24))
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        (loss + model.pop_loss()).backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]
    assert all(bool(block.mixer.initialized) for block in model.blocks)
    assert model.pop_loss() == 0


@pytest.mark.parametrize("options", ({}, {"shared_qk": False, "tie_embeddings": False}), ids=str)
def test_routing_lm_checkpoint_round_trip(options, tmp_path):
    """Centroids that have moved are weights too: without them other tokens would be members."""
    model, tokens = language_model(**options).train(), torch.randint(61, (2, 40))
    model(tokens)
    save_checkpoint(tmp_path / "model.pt", model.eval(), tokenizer=ByteTokenizer())
    loaded = load_checkpoint(tmp_path / "model.pt", backend="reference")
    other = loaded.model.eval()
    assert type(other) is RoutingLM and other.config == model.config
    assert other.num_parameters() == model.num_parameters()
    assert all(p.requires_grad for p in other.parameters())
    assert isinstance(loaded.tokenizer, ByteTokenizer)
    with torch.no_grad():
        expected = model(tokens)
        assert torch.equal(other(tokens), expected)
        for block in other.blocks:
            block.mixer.centroids.copy_(-block.mixer.centroids)
        assert not torch.equal(other(tokens), expected)


def test_a_loaded_routing_lm_keeps_its_centroids_in_training(tmp_path):
    """They are not set anew from the first batch, and go on from where they were."""
    model, tokens = language_model().train(), torch.randint(61, (2, 40))
    model(tokens)
    save_checkpoint(tmp_path / "model.pt", model)
    other = load_checkpoint(tmp_path / "model.pt", backend="reference").model.train()
    for each in (model, other):
        each(tokens.flip(1))
    for a, b in zip(model.blocks, other.blocks, strict=True):
        assert b.mixer.initialized and torch.equal(a.mixer.centroids, b.mixer.centroids)


def test_routing_config():
    assert RoutingConfig.from_dict(CONFIG.to_dict()) == CONFIG
    for size, least, most in (("tiny", 0.4e6, 2e6), ("small", 3e6, 9e6)):
        model = RoutingLM(RoutingConfig.byte_level(size), device="meta")
        assert least < model.num_parameters() < most
    with pytest.raises(ValueError, match="expected one of"):
        RoutingConfig.byte_level("huge")
    with pytest.raises(ValueError, match="unknown fields"):
        RoutingConfig.from_dict({"feature_dim": 3})
