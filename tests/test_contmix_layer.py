# SPDX-License-Identifier: Apache-2.0
"""hw.nn.ContMix: the official block's names and numbers, small maps, fused branches."""

from __future__ import annotations

import pytest
import torch

import headworks as hw
from backends import native_info
from headworks.testing import assert_same_bits, compare
from identities import randn

F64, F32 = torch.float64, torch.float32
BACKENDS = ["cpu"] + (["emulate:simt"] if native_info().get("emulator") else [])

# Of the official ContMixBlock(dim=16, kernel_size=7, smk_size=5, num_heads=2): what its state dict
# holds beside the running statistics of norms.
OFFICIAL = {
    "rpb1": (4, 9, 9), "rpb2": (4, 13, 13),
    "dwconv1.weight": (16, 1, 3, 3), "dwconv1.bias": (16,),
    "norm1.weight": (16,), "norm1.bias": (16,),
    "weight_query.0.weight": (8, 16, 1, 1), "weight_query.1.weight": (8,),
    "weight_query.1.bias": (8,),
    "weight_key.1.weight": (8, 16, 1, 1), "weight_key.2.weight": (8,), "weight_key.2.bias": (8,),
    "weight_value.0.weight": (16, 16, 1, 1), "weight_value.1.weight": (16,),
    "weight_value.1.bias": (16,),
    "weight_proj.weight": (74, 49, 1, 1), "weight_proj.bias": (74,),
    "fusion_proj.0.weight": (16, 16, 1, 1), "fusion_proj.1.weight": (16,),
    "fusion_proj.1.bias": (16,),
    "lepe.0.lk_origin.weight": (16, 1, 7, 7),
    "lepe.0.origin_bn.weight": (16,), "lepe.0.origin_bn.bias": (16,),
    **{
        f"lepe.0.dil_{kind}_{name}.{part}": size
        for name, width in (("k5_1", 5), ("k3_1", 3), ("k3_2", 3), ("k3_3", 3))
        for kind, part, size in (
            ("conv", "weight", (16, 1, width, width)),
            ("bn", "weight", (16,)),
            ("bn", "bias", (16,)),
        )
    },
    "lepe.1.weight": (16,), "lepe.1.bias": (16,),
    "se_layer.proj.1.weight": (16, 16, 1, 1), "se_layer.proj.1.bias": (16,),
    "se_layer.proj.3.weight": (16, 16, 1, 1), "se_layer.proj.3.bias": (16,),
    "gate.0.weight": (16, 16, 1, 1), "gate.1.weight": (16,), "gate.1.bias": (16,),
    "proj.0.weight": (16,), "proj.0.bias": (16,),
    "proj.1.weight": (16, 16, 1, 1), "proj.1.bias": (16,),
    "dwconv2.weight": (16, 1, 3, 3), "dwconv2.bias": (16,),
    "norm2.weight": (16,), "norm2.bias": (16,),
    "mlp.0.weight": (64, 16, 1, 1), "mlp.0.bias": (64,),
    "mlp.2.weight": (64, 1, 3, 3), "mlp.2.bias": (64,),
    "mlp.3.gamma": (1, 64, 1, 1), "mlp.3.beta": (1, 64, 1, 1),
    "mlp.4.weight": (16, 64, 1, 1), "mlp.4.bias": (16,),
}  # fmt: skip
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def settled(layer):
    """Weights and statistics that anyone can make again, by their order."""
    for i, (name, x) in enumerate(layer.state_dict().items()):
        if x.is_floating_point():
            wave = torch.sin(0.7 * torch.arange(x.numel(), dtype=x.dtype) + i).view(x.shape)
            scales = "var" in name or (x.dim() == 1 and name.endswith("weight"))
            x.copy_(1 + 0.3 * wave if scales else 0.3 * wave)
    return layer.eval()


def image(dim, height, width):
    x = torch.cos(0.3 * torch.arange(2 * dim * height * width, dtype=F64))
    return x.view(2, dim, height, width)


def test_names_and_shapes_are_the_official_ones():
    state = hw.nn.ContMix(16, 7, 5, 2).state_dict()
    named = {n: tuple(x.shape) for n, x in state.items() if not n.endswith(STATISTICS)}
    assert named == OFFICIAL
    norms = {n.rpartition(".")[0] for n in state if n.endswith("running_mean")}
    assert len(state) == len(OFFICIAL) + 3 * len(norms) == 96


# Every n-th number of what the official code (LMMMEng/OverLoCK, models/contmix.py, with unfold)
# gives in fp64 with such weights, and the mean of all their sizes.
CASES = (
    ((16, 7, 5, 2), {}, (9, 8),
     [0.141728744, 0.9265620321, -1.3186676634, 2.8695327325, -2.2931389957, -1.4292536285,
      -0.898971973], 1.5918191538809248),
    ((24, 9, 3, 3), {"res_scale": True, "ls_init_value": 0.5}, (5, 7),
     [-1.5502393439, -3.2993082437, -1.7662459764, 1.2328394938, -3.5225687998, 0.6744129858,
      1.1015846231], 2.4276318054283985),
)  # fmt: skip


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("sizes, options, shape, some, mean", CASES, ids=["large", "small map"])
def test_numbers_are_the_official_ones(sizes, options, shape, some, mean, backend):
    layer = settled(hw.nn.ContMix(*sizes, **options, backend=backend, dtype=F64))
    with torch.no_grad():
        y = layer(image(sizes[0], *shape))
    assert y.shape == (2, sizes[0], *shape)
    flat = y.flatten()
    got = flat[:: flat.numel() // 7][:7]
    assert (got - torch.tensor(some, dtype=F64)).abs().max() < 1e-9
    compare(y.abs().mean(), torch.tensor(mean, dtype=F64), F64)


@pytest.mark.parametrize("height, width", [(3, 5), (7, 6), (1, 1), (6, 20), (7, 7)])
def test_small_maps(height, width):
    """Enlarged for the windows, and averaged back: gradients too."""
    layer = settled(hw.nn.ContMix(16, 7, 5, 1, dtype=F64))
    results = []
    for backend in ("cpu", "reference"):
        layer.backend = backend
        x = image(16, height, width).requires_grad_()
        y = layer(x)
        results.append((y, *torch.autograd.grad(y, (x, layer.rpb2), randn(*y.shape, seed=1))))
    for a, e in zip(*results, strict=True):
        assert a.shape == e.shape
        compare(a, e, F64, floor=8.0)


def test_fused_branches_give_the_same():
    layer, x = settled(hw.nn.ContMix(16, 9, 5, 2, dtype=F64)), image(16, 9, 11)
    with torch.no_grad():
        want = layer(x)
        assert layer.fuse() is layer and layer.fuse() is layer
        compare(layer(x), want, F64)
        other = hw.nn.ContMix(16, 9, 5, 2, deploy=True, dtype=F64).eval()
        other.load_state_dict(layer.state_dict(), strict=True)
        assert_same_bits(other(x), layer(x))


@pytest.mark.no_comparison
def test_training_reaches_every_weight():
    torch.manual_seed(0)
    layer = hw.nn.ContMix(16, 7, 5, 2, ls_init_value=1.0, drop_path=0.1)
    with torch.no_grad():
        layer.mlp[3].gamma.fill_(0.1)
    layer(torch.randn(4, 16, 9, 9)).square().sum().backward()
    assert [n for n, p in layer.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.no_comparison
def test_a_dropped_branch_leaves_the_other():
    layer = hw.nn.ContMix(16, 7, 5, 1, drop_path=1 - 1e-9)
    x = torch.randn(3, 16, 7, 7)
    assert torch.equal(layer(x), layer.dwconv2(layer.dwconv1(x)))
    assert not torch.equal(layer.eval()(x), layer.dwconv2(layer.dwconv1(x)))


def test_channels_last_and_autocast():
    layer = hw.nn.ContMix(16, 7, 5, 2).eval()
    x = torch.randn(2, 16, 9, 10)
    with torch.no_grad():
        y = layer(x)
        last = layer(x.contiguous(memory_format=torch.channels_last))
        compare(last, y.double(), F32)
        with torch.autocast("cpu", torch.bfloat16):
            half = layer(x)
    assert (half.float() - y).norm() < 0.02 * y.norm()


@pytest.mark.no_comparison
@pytest.mark.parametrize(
    "options, words",
    [
        ({"dim": 20}, "dim is 20, expected a multiple of 4 num_heads = 8"),
        ({"kernel_size": 8}, "kernel_size is 8, expected one of"),
        ({"small_kernel_size": 4}, "small_kernel_size is 4, expected an odd number"),
        ({"small_kernel_size": 9}, "small_kernel_size is 9, expected an odd number up to"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        hw.nn.ContMix(**{"dim": 16, **options})


@pytest.mark.no_comparison
def test_bad_input():
    layer = hw.nn.ContMix(16)
    with pytest.raises(ValueError, match=r"x has shape \[2, 8, 9, 9\], expected \[B, 16, Y, X\]"):
        layer(torch.randn(2, 8, 9, 9))
    with pytest.raises(TypeError, match="ContMix: deploy is 1"):
        hw.nn.ContMix(16, deploy=1)
