# SPDX-License-Identifier: Apache-2.0
"""What every layer and model can do at any moment: be copied, pickled, averaged, made on the meta
device and started anew; and what bad input leaves behind in those that keep something."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import headworks as hw
from headworks import models, nn
from headworks.models import base, biformer, softmax

WIDTH = 32
LIKE = {"d_model": WIDTH, "num_layers": 3, "num_heads": 4, "vocab_size": 61, "mlp_hidden": 32}
ROUTING = models.RoutingConfig(
    **{**LIKE, "num_layers": 2},
    local_heads=2,
    num_clusters=4,
    window=6,
    local_window=5,
    commitment=0.5,
)
BASED = models.BasedConfig(
    **LIKE, linear_layers=(1,), window_layers=(2,), window=5, conv_bias=True, g_norm=True
)
SOFTMAX = models.SoftmaxConfig(**LIKE)

MODULES = {
    "RMSNorm": lambda **o: nn.RMSNorm(WIDTH, **o),
    "GatedShortConv": lambda **o: nn.GatedShortConv(WIDTH, conv_bias=True, **o),
    "BasedLinearAttention": lambda **o: nn.BasedLinearAttention(
        WIDTH, 4, g_norm=True, bias=True, **o
    ),
    "SlidingWindowAttention": lambda **o: nn.SlidingWindowAttention(WIDTH, 4, bias=True, **o),
    "KMeansRoutingAttention": lambda **o: nn.KMeansRoutingAttention(
        WIDTH, 4, local_heads=2, num_clusters=4, window=6, shared_qk=False, commitment=0.5, **o
    ),
    "BiLevelRoutingAttention": lambda **o: nn.BiLevelRoutingAttention(WIDTH, 4, 2, topk=2, **o),
    "BiLevelRoutingAttention NCHW": lambda **o: nn.BiLevelRoutingAttention(
        WIDTH, 4, 2, topk=2, layout="NCHW", **o
    ),
    "MixtureOfHeads": lambda **o: nn.MixtureOfHeads(
        WIDTH, 4, shared_heads=2, routed_heads=1, qkv_bias=True, **o
    ),
    "CascadedGroupAttention": lambda **o: nn.CascadedGroupAttention(
        WIDTH, 8, 2, resolution=3, kernels=(3, 5), **o
    ),
    "ContMix": lambda **o: nn.ContMix(WIDTH, 7, 3, 2, ls_init_value=0.5, **o),
    "GatedMLP": lambda **o: base.GatedMLP(WIDTH, 48, **o),
    "Block": lambda **o: base.Block(BASED, nn.GatedShortConv(WIDTH, **o), **o),
    "SoftmaxAttention": lambda **o: softmax.SoftmaxAttention(WIDTH, 4, 4, **o),
    "LePEAttention": lambda **o: biformer.LePEAttention(WIDTH, 4, **o),
    "BiFormerBlock": lambda **o: biformer.BiFormerBlock(
        WIDTH, biformer.LePEAttention(WIDTH, 4, **o), **o
    ),
    "BasedLM": lambda **o: models.BasedLM(BASED, **o),
    "RoutingLM": lambda **o: models.RoutingLM(ROUTING, **o),
    "SoftmaxLM": lambda **o: models.SoftmaxLM(SOFTMAX, **o),
    "BiFormer": lambda **o: models.BiFormer(
        (1, 1, 1, 1), (16, 16, 16, 16), (1, 2, 4, -2), num_classes=3, n_win=2, head_dim=8, **o
    ),
}
TEXT = ("BasedLM", "RoutingLM", "SoftmaxLM")
LOSSES = ("KMeansRoutingAttention", "MixtureOfHeads", "RoutingLM")


@pytest.fixture(autouse=True)
def _one_thread(_deterministic_start):
    torch.set_num_threads(1)


def example(name):
    if name in TEXT:
        return torch.randint(61, (2, 16))
    if name == "BiFormer":
        return torch.randn(2, 3, 64, 64)
    if name in ("BiFormerBlock", "CascadedGroupAttention", "ContMix") or name.endswith("NCHW"):
        return torch.randn(2, WIDTH, 4, 4)
    if name in ("BiLevelRoutingAttention", "LePEAttention"):
        return torch.randn(2, 4, 4, WIDTH)
    return torch.randn(2, 16, WIDTH)


def applied(name, module, x):
    if name == "Block":
        return module(x, None, False, None)[0]
    y = module(x)
    return y[0] if isinstance(y, tuple) else y


def test_every_module_is_listed():
    kinds = {type(MODULES[name](device="meta")) for name in MODULES}
    public = [getattr(part, name) for part in (nn, models) for name in part.__all__]
    missing = {x for x in public if isinstance(x, type) and issubclass(x, torch.nn.Module)} - kinds
    assert missing == {models.LanguageModel}  # the others' base


@pytest.mark.parametrize("name", MODULES)
def test_a_module_from_the_meta_device(name):
    """Memory full of NaN becomes what a new module is."""
    torch.manual_seed(0)
    fresh = MODULES[name]()
    made = MODULES[name](device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for t in (*made.parameters(), *made.buffers()):
            t.fill_(math.nan if t.is_floating_point() else 7)
    made.reset_parameters()
    assert list(made.state_dict()) == list(fresh.state_dict())
    assert len(list(made.parameters())) == len(list(fresh.parameters()))  # tied ones are
    for key, expected in fresh.state_dict().items():
        got = made.state_dict()[key]
        assert got.dtype == expected.dtype and got.isfinite().all(), key
        expected, got = expected.double(), got.double()
        if expected.unique().numel() == 1:  # a constant
            assert torch.equal(got, expected), key
        else:
            wide = expected.square().mean().sqrt()
            tolerance = 5 * wide / expected.numel() ** 0.5
            assert (got.square().mean().sqrt() - wide).abs() < tolerance, key
            assert (got.mean() - expected.mean()).abs() < tolerance, key
            assert not torch.equal(got, expected), key
    with torch.no_grad():
        assert applied(name, made.train(), example(name)).isfinite().all()


@pytest.mark.parametrize("moment", ["new", "after a forward", "after backward", "no gradients"])
@pytest.mark.parametrize("name", MODULES)
def test_modules_are_copied_at_any_moment(name, moment):
    module, x = MODULES[name]().train(), example(name)
    if moment == "no gradients":
        with torch.no_grad():
            applied(name, module, x)
    elif moment != "new":
        y = applied(name, module, x)
        if moment == "after backward":
            y.square().sum().backward()
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies.append(torch.load(file, weights_only=False))
    expected = applied(name, module.eval(), x)
    for each in copies:
        assert torch.equal(applied(name, each.eval(), x), expected)
        if name in LOSSES:
            assert each.pop_loss() == 0
        applied(name, each.train(), x).square().sum().backward()


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.5)], ids=["mean", "moving"])
@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("name", ["RoutingLM", "MixtureOfHeads", "BiFormer"])
def test_models_are_averaged(name, use_buffers, average):
    module, x = MODULES[name]().train(), example(name)
    applied(name, module, x)
    averaged = AveragedModel(module, multi_avg_fn=average, use_buffers=use_buffers)
    for _ in range(3):
        applied(name, module, x).square().sum().backward()
        with torch.no_grad():
            for p in module.parameters():
                p.sub_(0.01 * p.grad)
        averaged.update_parameters(module)
    assert applied(name, averaged.eval(), x).isfinite().all()
    if name == "RoutingLM":
        assert all(bool(block.mixer.initialized) for block in averaged.module.blocks)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_that_of_the_latest_forward(name):
    module, x = MODULES[name]().train(), example(name)
    applied(name, module, x)
    applied(name, module.eval(), x)
    assert module.pop_loss() == 0  # that was no training
    applied(name, module.train(), x)
    assert module.pop_loss() > 0 and module.pop_loss() == 0
    for empty in (x[:0], x[:, :0]):
        y = applied(name, module, empty)
        loss = module.pop_loss()
        assert loss == 0
        (y.sum() + loss).backward()
    with torch.no_grad():
        applied(name, module, x)
        assert module.pop_loss().item() > 0


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_a_bad_token_moves_no_centroid(bad, with_index):
    """It counts for no cluster; the others' tokens count as if it were not there."""
    x = torch.nn.functional.normalize(torch.randn(1, 12, 2, 8), dim=-1)
    mu = torch.nn.functional.normalize(torch.randn(2, 3, 8), dim=-1)
    index = hw.kmeans_route(x, mu, window=12) if with_index else None  # all are members of all
    spoilt = x.clone()
    spoilt[0, 11, 0] = bad
    moved = hw.kmeans_update(mu, spoilt, index, decay=0.5)
    assert moved.isfinite().all()
    assert torch.equal(moved[1], hw.kmeans_update(mu, x, index, decay=0.5)[1])  # the other head
    if bad != 3e38:
        others = x[:, :11]
        index = hw.kmeans_route(others, mu, window=11) if with_index else None
        torch.testing.assert_close(moved[0], hw.kmeans_update(mu, others, index, decay=0.5)[0])


def test_bad_tokens_leave_a_layer_that_learns():
    """In the first forward, which sets the centroids, and later."""
    layer, x = MODULES["KMeansRoutingAttention"]().train(), torch.randn(2, 16, WIDTH)
    layer(torch.full_like(x, math.nan))
    assert not bool(layer.initialized) and layer.centroids.isfinite().all()
    spoilt = x.clone()
    spoilt[0, 3] = math.nan
    for _ in range(2):
        layer(spoilt)
        assert bool(layer.initialized) and layer.centroids.isfinite().all()
    assert (layer.centroids.norm(dim=-1) > 0.9).all()
    assert layer.eval()(x).isfinite().all()


def test_booleans_of_earlier_checkpoints():
    layer = MODULES["KMeansRoutingAttention"]()
    state = {**layer.state_dict(), "initialized": torch.tensor(True)}
    for assign in (False, True):
        other = MODULES["KMeansRoutingAttention"]()
        other.load_state_dict(state, assign=assign)
        assert other.initialized.dtype == torch.int64 and bool(other.initialized)
        assert state["initialized"].dtype == torch.bool
        other.train()(torch.randn(2, 16, WIDTH))
        torch.testing.assert_close(other.centroids, layer.centroids, rtol=0, atol=0.01)
