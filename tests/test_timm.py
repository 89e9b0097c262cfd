# SPDX-License-Identifier: Apache-2.0
"""EfficientViT of timm, before and after: modules, whole models, a picture, export.

timm needs torchvision; ci/vision.sh makes an environment that has both.
"""

from __future__ import annotations

import copy
import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import headworks as hw
from headworks.integrations import timm as hw_timm
from headworks.testing import assert_same_bits, compare

timm = pytest.importorskip("timm")
efficientvit = pytest.importorskip("timm.models.efficientvit_msra")

pytestmark = pytest.mark.operator

MODELS = tuple(f"efficientvit_m{i}" for i in range(6))
F64, F32 = torch.float64, torch.float32


def randomize(module, seed=0):
    """Weights, and statistics of batch norms, that are not those of a new module."""
    generator = torch.Generator().manual_seed(seed)

    def draw(x, low, high):
        drawn = torch.rand(x.shape, generator=generator, dtype=F64)
        x.data.copy_(low + (high - low) * drawn)

    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            draw(m.running_mean, -0.3, 0.3)
            draw(m.running_var, 0.5, 2.0)
            draw(m.weight, 0.5, 1.5)
            draw(m.bias, -0.3, 0.3)
        elif hasattr(m, "attention_biases"):
            draw(m.attention_biases, -1.0, 1.0)
    return module


def model_of(name, **options):
    torch.manual_seed(1)
    model = randomize(timm.create_model(name, num_classes=100, **options))
    model.eval()
    return model


def close(actual, expected):
    """fp32, to 1e-4 of each element and 1e-5 of the largest."""
    largest = expected.abs().max()
    assert largest > 0.05, "nothing to compare with"
    compare(actual / largest, expected.double() / largest, F32)


def optimized(model):
    done = hw_timm.optimize(model)
    assert not done.left_alone
    attentions = [m for m in model.modules() if isinstance(m, hw.nn.CascadedGroupAttention)]
    assert len(attentions) == len(done.replaced) == sum(len(s.blocks) for s in model.stages)
    assert all(m.is_fused for m in attentions)
    assert not any(isinstance(m, efficientvit.CascadedGroupAttention) for m in model.modules())
    return done


@pytest.mark.parametrize("name", MODELS)
def test_model_before_and_after(name):
    model = model_of(name)
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        before = model(images)
        features = model.forward_features(images)
        done = optimized(model)
        close(model(images), before)
        close(model.forward_features(images), features)
        close(model(images.to(memory_format=torch.channels_last)), before)
        model.to(memory_format=torch.channels_last)
        close(model(images.to(memory_format=torch.channels_last)), before)
        model.to(memory_format=torch.contiguous_format)
        assert done.restore() is model
        assert_same_bits(model(images), before)


@pytest.mark.parametrize("size", [160, 232, 96, (224, 160), (250, 330)])
@pytest.mark.parametrize("name", ["efficientvit_m0", "efficientvit_m5"])
def test_other_input_sizes(name, size):
    """Maps that windows do not divide, narrower ones, and windows smaller than 7."""
    model = model_of(name)
    model.set_input_size(size)
    images = torch.randn(1, 3, *((size, size) if isinstance(size, int) else size))
    with torch.inference_mode():
        before = model(images)
        optimized(model)
        close(model(images), before)


@pytest.mark.parametrize("shape", [(192, 200), (224, 96), (300, 224)])
def test_images_of_other_sizes_than_the_model_is_of(shape):
    model = model_of("efficientvit_m3")
    images = torch.randn(1, 3, *shape)
    with torch.inference_mode():
        before = model(images)
        optimized(model)
        close(model(images), before)


def test_double_precision_is_exact():
    model = model_of("efficientvit_m1").double()
    images = torch.randn(1, 3, 224, 224, dtype=F64)
    with torch.inference_mode():
        before = model(images)
        optimized(model)
        compare(model(images), before, F64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """No farther from fp32 than twice what timm is, and autocast the same."""
    model = model_of("efficientvit_m2")
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        exact = model(images)
        half = copy.deepcopy(model).to(dtype)
        own = (half(images.to(dtype)) - exact).norm()
        optimized(half)
        assert (half(images.to(dtype)) - exact).norm() <= 2 * own + 1e-3 * exact.norm()
        if dtype == torch.bfloat16:
            optimized(model)
            with torch.autocast("cpu", dtype=dtype):
                assert (model(images) - exact).norm() <= 2 * own + 1e-3 * exact.norm()
        compare(exact, exact.double(), F32)


@pytest.mark.parametrize("picture", ["china.jpg", "flower.jpg"])
def test_picture(picture):
    """The five best classes of a real picture, in order."""
    datasets = pytest.importorskip("sklearn.datasets")
    image = torch.tensor(datasets.load_sample_image(picture)).permute(2, 0, 1)[None] / 255
    image = torch.nn.functional.interpolate(image, (224, 224), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406),
                                                         (0.229, 0.224, 0.225)))  # fmt: skip
    model = model_of("efficientvit_m4")
    with torch.inference_mode():
        before = model((image - mean) / std)
        optimized(model)
        after = model((image - mean) / std)
    close(after, before)
    assert after.topk(5).indices.tolist() == before.topk(5).indices.tolist()


def test_export_of_an_optimized_model(tmp_path):
    model = model_of("efficientvit_m0")
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        before = model(images)
    optimized(model)
    model.requires_grad_(False)
    with torch.no_grad():
        program = torch.export.export(model, (images,))
    calls = [n for n in program.graph.nodes if "cascaded_group_attention" in str(n.target)]
    assert len(calls) == 6
    close(program.module()(images), before)
    torch.export.save(program, tmp_path / "model.pt2")
    close(torch.export.load(tmp_path / "model.pt2").module()(images), before)


def test_compiled_model_has_no_graph_breaks():
    model = model_of("efficientvit_m0")
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        before = model(images)
        optimized(model)
        close(torch.compile(model, fullgraph=True, backend="aot_eager")(images), before)


def module_of(name="efficientvit_m5", stage=0):
    return model_of(name).stages[stage].blocks[0].mixer.m


@pytest.mark.parametrize("training", [False, True])
def test_layer_of_a_module(training):
    """Outputs, gradients and moved statistics, in training and in evaluation."""
    module = copy.deepcopy(module_of()).double()
    layer = hw.nn.CascadedGroupAttention.from_timm(module)
    module.train(training), layer.train(training)
    x = torch.randn(2, 192, 15, 10, dtype=F64, requires_grad=True)
    y, expected = layer(x), module(x)
    compare(y.detach(), expected.detach(), F64)
    cotangent = torch.randn_like(y)
    inputs = [(x, *m.parameters()) for m in (layer, module)]
    names = ["x", *(n for n, _ in layer.named_parameters())]
    assert names[1:] == [n.removeprefix("attn.") for n, _ in module.named_parameters()]
    grads = [
        torch.autograd.grad(o, i, cotangent) for o, i in ((y, inputs[0]), (expected, inputs[1]))
    ]
    for name, a, b in zip(names, *grads, strict=True):
        compare(a, b, F64, name=name)
    for a, b in zip(layer.state_dict().values(), module.state_dict().values(), strict=True):
        if a.is_floating_point():
            compare(a, b, F64)


@pytest.mark.parametrize("inner", [False, True])
def test_state_dict_loads(inner):
    module = module_of("efficientvit_m2", 1)
    layer = hw.nn.CascadedGroupAttention(192, 16, 3, resolution=7, kernels=(7, 5, 3, 3)).eval()
    layer.load_state_dict((module.attn if inner else module).state_dict())
    x = torch.randn(2, 192, 7, 7)
    with torch.no_grad():
        close(layer(x), module(x))


def test_norms_that_timm_has_folded():
    """`reparameterize_model` leaves convolutions alone: the layer is a fused one."""
    module = module_of("efficientvit_m0")
    x = torch.randn(2, 64, 14, 14)
    with torch.no_grad():
        expected = module(x)
        plain = timm.utils.model.reparameterize_model(module)
        layer = hw.nn.CascadedGroupAttention.from_timm(plain)
        assert layer.is_fused
        close(layer(x), expected)
        model = timm.utils.model.reparameterize_model(model_of("efficientvit_m0"))
        images = torch.randn(1, 3, 224, 224)
        before = model(images)
        optimized(model)
        close(model(images), before)


@pytest.mark.no_comparison
def test_what_is_not_supported_is_named_and_left_alone():
    model = timm.create_model("efficientvit_m0").eval()
    odd = efficientvit.CascadedGroupAttention(64, 16, 2, attn_ratio=1, resolution=7)
    odd.eval()
    vit = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
    both = nn.ModuleDict({"model": model, "odd": odd, "vit": vit})
    odd.training = False
    done = hw_timm.optimize(both)
    assert len(done.replaced) == 6 and all(n.startswith("model.stages") for n in done.replaced)
    assert set(done.left_alone) == {"odd", "vit.blocks.0.attn", "vit.blocks.1.attn"}
    assert "val_dim" in done.left_alone["odd"] and both["odd"] is odd
    assert (
        "timm.layers.attention.Attention is not supported" in done.left_alone["vit.blocks.0.attn"]
    )
    text = str(done)
    assert "6 attention modules replaced" in text and "3 left alone" in text
    assert all(name in text for name in (*done.replaced, *done.left_alone))
    again = hw_timm.optimize(model)
    assert not again.replaced and "0 attention modules" in str(again)


def test_restored_by_with():
    model = model_of("efficientvit_m0")
    images = torch.randn(1, 3, 224, 224)
    names = list(model.state_dict())
    with torch.inference_mode():
        before = model(images)
        with hw_timm.optimize(model) as done:
            close(model(images), before)
            assert list(model.state_dict()) != names
        assert list(model.state_dict()) == names
        assert_same_bits(model(images), before)
    assert done.restore() is model


@pytest.mark.no_comparison
def test_refusals():
    with pytest.raises(TypeError, match=r"model is a dict; expected a torch\.nn\.Module"):
        hw_timm.optimize({})
    model = timm.create_model("efficientvit_m0").train()
    before = dict(model.named_modules())
    with pytest.raises(RuntimeError, match=r"training mode .*model\.eval\(\)"):
        hw_timm.optimize(model)
    assert dict(model.named_modules()) == before
    module = model.stages[0].blocks[0].mixer.m
    with pytest.raises(ValueError, match="from_timm"):
        hw_timm.optimize(module)
    model.eval()
    hw_timm.optimize(model)
    with pytest.raises(NotImplementedError, match=r"requires grad.*inference_mode"):
        model(torch.zeros(1, 3, 224, 224))
    with pytest.raises(RuntimeError, match="restore"):
        model.set_input_size(160)
    model.train()
    with pytest.raises(RuntimeError, match="cannot train"):
        model(torch.zeros(1, 3, 224, 224))
    with pytest.raises(TypeError, match="not folded"):
        hw.cascaded_group_attention(torch.zeros(1, 7, 7, 64), module)


def test_contenders_of_the_suite_compute_the_same(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    suite = importlib.import_module("bench.cascaded_group_attention")
    monkeypatch.setattr(suite, "BATCH", 2)
    monkeypatch.setattr(suite, "MODEL_BATCH", 1)
    cases = suite.cases("cpu", True)
    assert [case.name for case in cases][-1] == "model m0"
    for case in cases:
        results = {name: call() for name, call in case.contenders().items()}
        for y in results.values():
            close(y, results["eager"])


@pytest.mark.no_comparison
def test_examples():
    """Of the page and of the docstrings."""
    page = Path(__file__).resolve().parents[1] / "docs/integrations.md"
    (block,) = re.findall(r"^```python skip\n(.*?)^```", page.read_text(), re.M | re.S)
    assert "pretrained=True" in block  # a download
    exec(compile(block.replace("pretrained=True", ""), page.name, "exec"), {})
    for function in (hw_timm.optimize, hw.nn.CascadedGroupAttention.from_timm):
        names = {"torch": torch, "CascadedGroupAttention": hw.nn.CascadedGroupAttention}
        example = doctest.DocTestParser().get_doctest(function.__doc__, names, "", None, None)
        assert example.examples and not doctest.DocTestRunner().run(example).failed
