# SPDX-License-Identifier: Apache-2.0
"""Layers that change as they train, under torch.utils.checkpoint: gradients, losses and buffers are
those of the layer without it, in every mode and however forwards and backward passes follow."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from headworks import models, nn

WIDTH = 32


@pytest.fixture(autouse=True)
def _one_thread(_deterministic_start):
    torch.set_num_threads(1)


def kmeans(**options):
    sizes = {"local_heads": 2, "num_clusters": 4, "window": 6, "commitment": 0.5, "decay": 0.5}
    return nn.KMeansRoutingAttention(WIDTH, 4, **{**sizes, **options})


LAYERS = {
    "kmeans": kmeans,
    "kmeans of two": lambda: kmeans(shared_qk=False, norm="layer"),
    "mixture of heads": lambda: nn.MixtureOfHeads(WIDTH, 8, shared_heads=2, routed_heads=3),
}


def save_products(_context, operator, *_args, **_options):
    name = str(operator)
    kept = "mm" in name or "headworks" in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


SELECTIVE = functools.partial(create_selective_checkpoint_contexts, save_products)
MODES = {
    "none": lambda f, x: f(x),
    "reentrant": lambda f, x: checkpoint(f, x, use_reentrant=True),
    "not reentrant": lambda f, x: checkpoint(f, x, use_reentrant=False),
    "selective": lambda f, x: checkpoint(f, x, use_reentrant=False, context_fn=SELECTIVE),
    "nested": lambda f, x: checkpoint(
        lambda y: checkpoint(f, y, use_reentrant=False), x, use_reentrant=False
    ),
    "without its random numbers": lambda f, x: checkpoint(
        f, x, use_reentrant=False, preserve_rng_state=False
    ),
}


def trained(make, mode, order, dropout=0.3):
    """Gradients and buffers after two steps of two layers, each given two inputs."""
    torch.manual_seed(0)
    first, second = make().double().train(), make().double().train()
    inputs = [torch.randn(2, 24, WIDTH).double().requires_grad_() for _ in range(2)]

    def both(x):
        return F.dropout(second(x + F.dropout(first(x), dropout)), dropout)

    for _ in range(2):
        losses = []
        for x in inputs:
            y = MODES[mode](both, x)
            losses.append(20 * y.square().sum() + 3 * first.pop_loss() + second.pop_loss())
            if order == "in turns":
                losses.pop().backward()
        if order == "joined":
            sum(losses).backward()
        for loss in losses if order == "one by one" else ():
            loss.backward()
    weights = [*first.parameters(), *second.parameters()]
    return [p.grad for p in (*weights, *inputs)], [*first.buffers(), *second.buffers()]


@pytest.mark.parametrize("order", ["in turns", "joined", "one by one"])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "none"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_checkpointed_layer_is_the_layer(name, mode, order):
    dropout = 0.0 if "without" in mode else 0.3
    grads, buffers = trained(LAYERS[name], mode, order, dropout)
    expected_grads, expected_buffers = trained(LAYERS[name], "none", order, dropout)
    for got, expected in zip(grads, expected_grads, strict=True):
        assert expected.abs().sum() > 0
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for got, expected in zip(buffers, expected_buffers, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("mode", ["reentrant", "not reentrant"])
def test_the_same_input_twice(mode):
    """Nothing but the order tells the two forwards apart; backward goes from late to early."""
    grads = []
    for each in ("none", mode):
        torch.manual_seed(0)
        layer, x = kmeans().double().train(), torch.randn(1, 24, WIDTH).double()
        x.requires_grad_()
        layer(torch.randn(1, 24, WIDTH).double())  # clusters of other tokens
        sum(MODES[each](layer, x).square().sum() for _ in range(2)).backward()
        grads.append((x.grad, layer.centroids))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_backward_pass_twice():
    layer, x = kmeans().double().train(), torch.randn(1, 24, WIDTH).double().requires_grad_()
    y = checkpoint(layer, x, use_reentrant=False)
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_repetition_of_nothing_is_refused():
    """A layer that moves on while a forward elsewhere is repeated routes by what nobody knows."""
    layer, x = kmeans().train(), torch.randn(1, 24, WIDTH, requires_grad=True)
    y = x * 1
    y.register_hook(lambda grad: layer(grad.detach() + 1).detach())
    with pytest.raises(RuntimeError, match="repeats none that is remembered"):
        y.sum().backward()
    layer.eval()
    y.sum().backward()


def test_what_is_remembered_is_bounded():
    layer, x = kmeans().train(), torch.randn(100, 1, 8, WIDTH)
    with torch.no_grad():
        for some in x:
            layer(some)
    assert len(layer._memory.entries) == 64
    layer = kmeans().train()
    for some in x[:3]:
        layer(some)
    assert not layer._memory.entries  # nobody will repeat them


@pytest.mark.parametrize("mode", ["reentrant", "not reentrant"])
def test_statistics_of_biformer(mode):
    """Those of its norms count an image once."""
    results = []
    for each in ("none", mode):
        torch.manual_seed(0)
        model = models.BiFormer(
            (1, 1, 1, 1), (8, 16, 16, 16), (1, 2, 4, -2), num_classes=3, n_win=2, head_dim=8,
        ).double().train()  # fmt: skip
        x = torch.randn(2, 3, 64, 64).double().requires_grad_()
        for _ in range(2):
            MODES[each](model, x).square().sum().backward()
        results.append([x.grad, *(p.grad for p in model.parameters()), *model.buffers()])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["reentrant", "not reentrant"])
def test_a_model_of_checkpointed_blocks(mode):
    config = models.RoutingConfig(
        vocab_size=61, d_model=32, num_layers=2, num_heads=4, local_heads=2, num_clusters=4,
        window=8, local_window=5, mlp_hidden=48, commitment=0.5, decay=0.9,
    )  # fmt: skip
    results = []
    for each in ("none", mode):
        torch.manual_seed(0)
        model = models.RoutingLM(config).double().train()
        tokens = torch.randint(61, (2, 24))
        for _ in range(2):
            x = model.transformer.embeddings.word_embeddings(tokens)
            for block in model.blocks:
                x = MODES[each](lambda y, b=block: b(y, None, False, None)[0], x)
            (model.lm_head(x).square().sum() + model.pop_loss()).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([*grads, *model.buffers()])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
