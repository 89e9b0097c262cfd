# SPDX-License-Identifier: Apache-2.0
"""Cascaded group attention: identities, the layer, bad input. The rest is in test_ops.py, and what
needs timm in test_timm.py."""

from __future__ import annotations

import doctest
import importlib
import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

import headworks as hw
from backends import native_info
from headworks.nn import cascaded_group_attention as layers
from headworks.testing import assert_same_bits, compare
from identities import Refused, allocates_nothing, randn
from specs import cascaded_group_attention as spec

pytestmark = pytest.mark.operator

F64, F32 = torch.float64, torch.float32
Layer = hw.nn.CascadedGroupAttention
BACKENDS = ["cpu"] + (["emulate:simt"] if native_info().get("emulator") else [])


EMULATED_HALF = ["emulate:sm80"] if len(BACKENDS) > 1 else []


def inputs(dtype=F64, **sizes):
    tensors = spec.make(spec.case(**sizes), dtype)
    return tensors["x"], spec.weights_of(tensors)


def layer_of(dim=24, key_dim=8, num_heads=3, *, dtype=F64, **options):
    """With weights and statistics that are not those of a new one."""
    layer = Layer(dim, key_dim, num_heads, kernels=(5, 3, 7), dtype=dtype, **options)
    for i, x in enumerate(itertools.chain(layer.parameters(), layer.buffers())):
        if x.is_floating_point():
            x.data.copy_(0.5 * randn(*x.shape, seed=i))
    for m in layer.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_var.abs_().add_(0.5)
    return layer


# ---- Identities ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_do_not_see_each_other(backend):
    x, weights = inputs(B=1, Y=8, X=12, window=4, d=8)
    y = hw.cascaded_group_attention(x, weights, window=4, backend=backend)
    for i, j in itertools.product(range(2), range(3)):
        part = (slice(None), slice(4 * i, 4 * i + 4), slice(4 * j, 4 * j + 4))
        alone = hw.cascaded_group_attention(x[part], weights, backend=backend)
        assert_same_bits(y[part], alone, f"window {i}, {j}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_zeros_before_the_projection(backend):
    """Tokens beyond the image have the bias as key and value, and are not masked."""
    x, weights = inputs(B=2, Y=5, X=6, window=4, d=8)
    y = hw.cascaded_group_attention(x, weights, window=4, backend=backend)
    filled = torch.nn.functional.pad(x, (0, 0, 0, 2, 0, 3))
    whole = hw.cascaded_group_attention(filled, weights, window=4, backend=backend)
    assert_same_bits(y, whole[:, :5, :6])


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernel_filled_with_zeros_is_the_smaller_one(backend):
    x, weights = inputs(B=1, Y=5, X=5, window=None, d=8, kernels=(3, 3))
    wider = weights._replace(
        conv_weight=torch.nn.functional.pad(weights.conv_weight, (0, 0, 2, 2, 2, 2))
    )
    y = hw.cascaded_group_attention(x, weights, backend=backend)
    assert_same_bits(hw.cascaded_group_attention(x, wider, backend=backend), y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_values_pass_unchanged(backend):
    """Weights of a softmax add up to 1: where every v is the bias, o_i is it."""
    x, weights = inputs(B=1, Y=6, X=6, window=3, d=8, H=1)
    qkv = weights.qkv_weight.clone()
    qkv[:, :, 32:] = 0
    value = weights.qkv_bias[0, 32:].relu() @ weights.out_weight + weights.out_bias
    y = hw.cascaded_group_attention(x, weights._replace(qkv_weight=qkv), window=3, backend=backend)
    compare(y, value.expand_as(y), F64)


def test_symmetric_image_gives_symmetric_result():
    """The bias knows |dy| and |dx| alone: with kernels that are mirrored too, so is everything."""
    x, weights = inputs(B=1, Y=7, X=7, window=None, d=8)
    mirrored = weights._replace(conv_weight=weights.conv_weight.flip(1))
    y = hw.cascaded_group_attention(x, weights)
    compare(hw.cascaded_group_attention(x.flip(1), mirrored), y.flip(1), F64)


def test_result_lies_in_memory_as_the_image_does():
    x, weights = inputs(F32, B=2, Y=6, X=9, window=3, d=16)
    first = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    y, z = (hw.cascaded_group_attention(t, weights, window=3) for t in (x, first))
    assert y.is_contiguous() and z.permute(0, 3, 1, 2).is_contiguous()
    assert_same_bits(y, z.contiguous())
    for t in (x, first):  # once more, and again: calls that come again
        for _ in range(3):
            again = hw.cascaded_group_attention(t, weights, window=3)
            assert again.stride() == hw.cascaded_group_attention(t, weights, window=3).stride()
            assert_same_bits(again.contiguous(), y)


def test_huge_scores():
    x, weights = inputs(B=2, Y=4, X=4, window=None, d=8)
    loud = weights._replace(conv_weight=1e4 * weights.conv_weight)
    y = hw.cascaded_group_attention(x, loud)
    compare(y, hw.cascaded_group_attention(x, loud, backend="reference"), F32)
    assert hw.cascaded_group_attention(x.float(), loud.to(F32)).isfinite().all()


@pytest.mark.parametrize("backend", [*BACKENDS, *EMULATED_HALF])
@pytest.mark.parametrize("side", [3, 4, 5, 7])
def test_what_is_not_a_number_stays_in_its_window(backend, side):
    """Also where several windows share a block."""
    dtype = torch.bfloat16 if backend in EMULATED_HALF else F32
    x, weights = inputs(dtype, B=3, Y=side, X=side, window=None, d=8)
    expected = hw.cascaded_group_attention(x, weights, backend=backend)
    x[1, 1, 2, 3] = torch.nan
    y = hw.cascaded_group_attention(x, weights, backend=backend)
    assert y[1].isnan().all()
    assert_same_bits(y[::2], expected[::2])


@pytest.mark.no_comparison
def test_more_than_two_to_the_31_elements():
    weights = hw.CascadeWeights(
        *(w.to("meta") for w in inputs(F32, B=1, Y=1, X=1, window=7, H=4)[1])
    )
    x = torch.empty(2**19, 14, 14, 64, device="meta")
    y = hw.cascaded_group_attention(x, weights, window=7)
    assert y.shape == x.shape and y.numel() > 2**31


def test_autocast_casts_image_and_weights():
    x, weights = inputs(F32, B=1, Y=7, X=7, window=None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = hw.cascaded_group_attention(x, weights)
    half = hw.cascaded_group_attention(x.bfloat16(), weights.to(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert_same_bits(y, half)


# ---- The layer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(7, 7), (14, 14), (15, 9), (3, 5), (5, 20)])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_fused_layer_is_the_layer(size, layout):
    layer = layer_of(layout=layout).eval()
    shape = (2, 24, *size) if layout == "NCHW" else (2, *size, 24)
    x = randn(*shape)
    y = layer(x)  # wants a gradient: layers of torch
    assert y.requires_grad and y.shape == x.shape
    with torch.no_grad():
        compare(layer(x), y.detach(), F64)
    folded, fused = layer.folded(), layer.fuse()
    assert fused is layer and layer.is_fused and not list(layer.parameters())
    for a, b in zip(folded, layer.folded(), strict=True):
        assert_same_bits(a, b)
    compare(layer(x), y.detach(), F64)


def test_layer_trains():
    """Gradients of every parameter by finite differences; statistics move."""
    layer = layer_of(6, 2, 3, resolution=3)
    x = randn(1, 6, 4, 5, seed=9).requires_grad_()
    names = [n for n, _ in layer.named_parameters()]

    def call(x, *parameters):
        values = dict(zip(names, parameters, strict=True))
        values |= {n: b.clone() for n, b in layer.named_buffers()}
        return torch.func.functional_call(layer, values, (x,))

    assert torch.autograd.gradcheck(call, (x, *layer.parameters()), atol=1e-4, fast_mode=True)
    before = layer.qkvs[0].bn.running_mean.clone()
    layer(x)
    assert not torch.equal(layer.qkvs[0].bn.running_mean, before)
    compare(call(x, *layer.parameters()).detach(), call(x, *layer.parameters()).detach(), F64)


@pytest.mark.no_comparison
def test_layer_refuses():
    for options, words in (
        ({"dim": 25}, "multiple of num_heads 3"),
        ({"kernels": (5, 3)}, "kernels"),
        ({"kernels": (5, 4, 3)}, "odd"),
        ({"resolution": 0}, "resolution"),
        ({"layout": "CHWN"}, "layout"),
    ):
        with pytest.raises(ValueError, match=words):
            Layer(**{"dim": 24, "key_dim": 8, "num_heads": 3, "kernels": (3, 3, 3)} | options)
    layer = layer_of()
    with pytest.raises(ValueError, match=r"\[B, 24, Y, X\]"):
        layer(torch.zeros(1, 4, 4, 24))
    layer.fuse()
    with pytest.raises(RuntimeError, match="fused module cannot train"):
        layer.train()(torch.zeros(1, 24, 7, 7, dtype=F64))
    with pytest.raises(RuntimeError, match="fused"):
        layer.reset_parameters()
    with pytest.raises(TypeError, match="LocalWindowAttention"):
        Layer.from_timm(nn.Linear(2, 2))


@pytest.mark.no_comparison
def test_statistics_that_do_not_run_cannot_be_folded():
    layer = layer_of().eval()
    layer.dws[1][1] = nn.BatchNorm2d(8, track_running_stats=False, dtype=F64)
    with pytest.raises(ValueError, match=r"track_running_stats=True\. "):
        layer.fuse()


def test_state_dict_of_the_wrapped_module_loads():
    layer = layer_of()
    other = Layer(24, 8, 3, kernels=(5, 3, 7), dtype=F64)
    other.load_state_dict({f"attn.{n}": x for n, x in layer.state_dict().items()})
    for a, b in zip(layer.state_dict().values(), other.state_dict().values(), strict=True):
        assert_same_bits(a, b)


def test_half_precision_and_export():
    layer = layer_of(dtype=F32).eval().fuse()
    x = randn(2, 24, 9, 7, dtype=F32)
    y = layer(x)
    program = torch.export.export(layer, (x,))
    assert_same_bits(program.module()(x), y)
    assert_same_bits(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), y)
    half = layer.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and (half - y).norm() < 0.05 * y.norm()


def test_contenders_of_the_suite_compute_the_same(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    suite = importlib.import_module("bench.cascaded_group_attention")
    monkeypatch.setattr(suite, "has_timm", lambda: False)
    monkeypatch.setattr(suite, "BATCH", 2)
    cases = suite.cases("cpu", True)
    assert len(cases) == 2 and suite.gpu_cases("cpu", True)
    for case in cases:
        results = {name: call() for name, call in case.contenders().items()}
        assert len(results) == 4
        for y in results.values():
            compare(y, results["eager"].double(), F32)
    assert [t.verdict for t in suite.targets({}, "cpu")] == ["not measured"] * 5


@pytest.mark.no_comparison
def test_examples_of_docstrings():
    for thing in (Layer, hw.CascadeWeights.of_heads):
        names = {"torch": torch, "CascadedGroupAttention": Layer}
        example = doctest.DocTestParser().get_doctest(thing.__doc__, names, "", None, None)
        assert example.examples and not doctest.DocTestRunner().run(example).failed


# ---- Bad input -----------------------------------------------------------------------------------


def zeros(*shape, dtype=F32, device=None):
    return torch.zeros(shape, dtype=dtype, device=device)


def weights(**fields):
    """Of 2 heads, d = 4, K = 3, 5 x 5 taps, windows of 4 x 4."""
    made = hw.CascadeWeights(
        zeros(2, 4, 10), zeros(2, 10), zeros(2, 5, 5, 3), zeros(2, 3), zeros(2, 16), zeros(8, 8),
        zeros(8),
    )  # fmt: skip
    return made._replace(**fields)


BAD = (
    Refused(ValueError, "x", "[6, 8, 8]", "[B, Y, X, C]", x=zeros(6, 8, 8)),
    Refused(TypeError, "x", "a float", x=1.0),
    Refused(TypeError, "x", "int64", x=zeros(1, 8, 8, 8, dtype=torch.int64)),
    Refused(ValueError, "channels of x", "9", "2 heads", x=zeros(1, 8, 8, 9)),
    Refused(ValueError, "channels of x", "0", x=zeros(1, 8, 8, 0)),
    Refused(ValueError, "weights.qkv_weight", "[2, 6, 10]", x=zeros(1, 8, 8, 12)),
    Refused(TypeError, "weights.qkv_weight", "float64", "float32", "autocast",
            weights=weights(qkv_weight=zeros(2, 4, 10, dtype=F64))),
    Refused(ValueError, "weights.qkv_weight", "[2, 4, 9]", "[2, 4, 10]",
            weights=weights(qkv_weight=zeros(2, 4, 9))),
    Refused(ValueError, "weights.qkv_bias", "[2, 9]", weights=weights(qkv_bias=zeros(2, 9))),
    Refused(ValueError, "weights.conv_weight", "[2, 4, 4, 3]", "4 x 4", "odd size", "Pad it",
            weights=weights(conv_weight=zeros(2, 4, 4, 3))),
    Refused(ValueError, "weights.conv_weight", "[2, 5, 3, 3]",
            weights=weights(conv_weight=zeros(2, 5, 3, 3))),
    Refused(ValueError, "weights.conv_weight", "[2, 3, 5, 5]",
            weights=weights(conv_weight=zeros(2, 3, 5, 5))),
    Refused(ValueError, "weights.conv_bias", "[3]", weights=weights(conv_bias=zeros(3))),
    Refused(ValueError, "weights.bias_table", "[2, 15]", "[2, 9]",
            weights=weights(bias_table=zeros(2, 15))),
    Refused(ValueError, "weights.bias_table", "4 x 4", "7 x 7", "set_input_size", window=7),
    Refused(ValueError, "weights.bias_table", "4 x 4", "8 x 8, the image", window=None),
    Refused(ValueError, "weights.bias_table", "4 x 4", "8 x 8, the image", window=9),
    Refused(ValueError, "weights.out_weight", "[8, 9]", weights=weights(out_weight=zeros(8, 9))),
    Refused(ValueError, "weights.out_bias", "[8, 1]", weights=weights(out_bias=zeros(8, 1))),
    Refused(TypeError, "weights", "a dict", "CascadeWeights", "of_heads", weights={}),
    Refused(TypeError, "weights", "a tuple", weights=(zeros(1),)),
    Refused(TypeError, "weights", "CascadedGroupAttention", "not folded", ".folded()",
            weights=Layer(8, 3, 2)),
    Refused(TypeError, "weights.qkv_weight", "Sequential", "batch norm", "sqrt(var + eps)",
            weights=weights(qkv_weight=layers.conv_norm(4, 10, 1))),
    Refused(TypeError, "weights.out_bias", "a float", weights=weights(out_bias=0.0)),
    Refused(RuntimeError, "weights.out_bias", "meta", "cpu",
            weights=weights(out_bias=zeros(8, device="meta"))),
    Refused(TypeError, "window", "4.0", window=4.0),
    Refused(TypeError, "window", "True", window=True),
    Refused(ValueError, "window", "0", "at least 1", window=0),
    Refused(NotImplementedError, "x", "requires grad", "torch.no_grad()", "hw.window_attention",
            x=zeros(1, 8, 8, 8).requires_grad_()),
    Refused(NotImplementedError, "weights.out_bias", "requires grad",
            "hw.nn.CascadedGroupAttention", weights=weights(out_bias=zeros(8).requires_grad_())),
    Refused(ValueError, "backend", "'sm70'", backend="sm70"),
    Refused(RuntimeError, "simt", "cpu", "emulate:simt", backend="simt"),
)  # fmt: skip


@pytest.mark.no_comparison
@pytest.mark.parametrize("case", BAD, ids=repr)
def test_bad_input(case, monkeypatch):
    arguments = {"x": zeros(1, 8, 8, 8), "weights": weights(), "window": 4} | case.arguments
    allocates_nothing(monkeypatch)
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.empty)
    case.check(lambda: hw.cascaded_group_attention(**arguments))


@pytest.mark.no_comparison
def test_even_kernels_of_heads_are_refused():
    convs = [(zeros(3, 1, 4, 4), zeros(3))]
    with pytest.raises(ValueError, match=r"convs\[0\] .* 4 x 4; expected .* odd"):
        hw.CascadeWeights.of_heads(
            [(zeros(10, 4), zeros(10))], convs, zeros(1, 16), (zeros(4, 4), zeros(4))
        )


def test_what_needs_no_gradient_is_not_refused():
    x, w = inputs(F32, B=1, Y=4, X=4, window=None)
    y = hw.cascaded_group_attention(x, w)
    with torch.no_grad():
        assert_same_bits(hw.cascaded_group_attention(x.requires_grad_(), w), y)
    assert hw.cascaded_group_attention(x, w, backend="reference").requires_grad
