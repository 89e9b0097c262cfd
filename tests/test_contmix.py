# SPDX-License-Identifier: Apache-2.0
"""ContMix: identities, gradients, what is kept, bad input. The rest is in test_ops.py."""

from __future__ import annotations

import pytest
import torch

import headworks as hw
from backends import native_info
from headworks.testing import assert_same_bits, compare
from identities import Refused, allocates_nothing, randn
from specs import contmix as cases

pytestmark = pytest.mark.operator

F64, F32 = torch.float64, torch.float32
BACKENDS = ["cpu"] + (["emulate:simt"] if native_info().get("emulator") else [])


def inputs(dtype=F64, **sizes):
    """The case, and its tensors by name."""
    case = cases.case(**sizes)
    return case, cases.make(case, dtype)


def call(tensors, case, backend="cpu"):
    return cases.run(tensors, case, backend)["o"]


def from_parts(tensors, case):
    """The weights written out, and hw.na2d_av's reference for each half."""
    scores = tensors["affinity"] @ tensors["weight"].T + tensors["bias"]
    (s, k), v = (case.options[n] for n in ("small_kernel_size", "kernel_size")), tensors["v"]
    y, x = v.shape[1:3]
    halves = []
    for size, part, table, half in (
        (s, scores[..., : s * s], tensors["small_rpb"], v[..., : v.shape[3] // 2, :]),
        (k, scores[..., s * s :], tensors["rpb"], v[..., v.shape[3] // 2 :, :]),
    ):
        part = part.clone().unflatten(-1, (size, size))  # [B, Y, X, G, K, K]
        for i in range(y):
            for j in range(x):
                a = min(max(i - size // 2, 0), y - size) - i + size - 1
                c = min(max(j - size // 2, 0), x - size) - j + size - 1
                part[:, i, j] += table[:, a : a + size, c : c + size]
        p = part.flatten(-2).softmax(-1)
        halves.append(hw.na2d_av(p, half, kernel_size=size, backend="reference"))
    return torch.cat(halves, 3)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_equals_its_parts(backend):
    """Tables at key - query, the small window first, both softmaxes apart."""
    case, tensors = inputs(Y=7, X=9, K=7, S=3)
    tensors = {n: t.requires_grad_() for n, t in tensors.items()}
    o, want = call(tensors, case, backend), from_parts(tensors, case)
    compare(o, want, F64)
    d_o, given = randn(*o.shape, seed=7), list(tensors.values())
    for a, e in zip(*(torch.autograd.grad(z, given, d_o) for z in (o, want)), strict=True):
        compare(a, e, F64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_in_the_scores_of_a_window_cancels(backend):
    case, tensors = inputs()
    o = call(tensors, case, backend)
    other = dict(tensors, bias=tensors["bias"].clone(), rpb=tensors["rpb"] + 3)
    other["bias"][:9] += 700
    compare(call(other, case, backend), o, F64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_is_a_convex_combination(backend):
    case, tensors = inputs(F32, spread=10.0)
    ones = dict(tensors, v=torch.ones_like(tensors["v"]))
    compare(call(ones, case, backend), torch.ones_like(ones["v"]).double(), F32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_scores_windows_are_averaged(backend):
    case, tensors = inputs(rpb=False, small_rpb=False, bias=False)
    tensors["weight"] = torch.zeros_like(tensors["weight"])
    want = [
        hw.na2d_av(torch.full((*half.shape[:-1], k * k), 1 / k**2, dtype=F64), half, kernel_size=k)
        for k, half in zip((3, 5), tensors["v"].chunk(2, 3), strict=True)
    ]
    compare(call(tensors, case, backend), torch.cat(want, 3), F64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_of_any_size(backend):
    case, tensors = inputs(F32, spread=1e4)
    wide = {n: x.double() for n, x in tensors.items()}
    o = call(tensors, case, backend)
    assert o.isfinite().all()
    # One key outweighs the others: what is left of rounding is the choice among near ties.
    near = (o - call(wide, case, "reference")).abs() > 1e-2
    assert near.sum() <= 0.02 * near.numel()
    compare(o.isfinite().double(), torch.ones_like(o).double(), F32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_entries_have_the_same_bits_alone(backend):
    """And their gradients; those of the map and the tables are sums over the batch."""
    case, tensors = inputs(F32, B=3)
    shared = {n: tensors[n] for n in ("weight", "bias", "rpb", "small_rpb")}
    d_o = randn(*tensors["v"].shape, seed=7, dtype=F32)

    def results(some):
        own = {n: tensors[n][some].clone().requires_grad_() for n in ("affinity", "v")}
        o = call({**shared, **own}, case, backend)
        return o.detach(), *torch.autograd.grad(o, list(own.values()), d_o[some])

    every = results(slice(None))
    for some in (slice(0, 1), slice(1, 3)):
        for n, (x, y) in enumerate(zip(results(some), every, strict=True)):
            assert_same_bits(x, y[some], f"result {n} of {some}")


def test_channels_first_maps_need_no_copy():
    """The official layout: channels are (half, group, channel)."""
    case, tensors = inputs(F32)
    v = tensors["v"]  # [B, Y, X, 2 G, D]
    image = v.permute(0, 3, 4, 1, 2).flatten(1, 2).contiguous()  # [B, C, Y, X]
    view = image.unflatten(1, v.shape[3:]).permute(0, 3, 4, 1, 2)
    assert view.data_ptr() == image.data_ptr() and not view.is_contiguous()
    assert_same_bits(call({**tensors, "v": view}, case), call(tensors, case))


def test_calls_that_come_again():
    """With other numbers, and without what another call of these sizes has."""
    results = {}
    for seed in (0, 1, 0, 1):
        for absent in ((), ("bias",), ("rpb",), ("small_rpb",), ("rpb", "bias")):
            case = cases.case(**dict.fromkeys(absent, False))
            o = call(cases.make(case, F32, seed=seed), case)
            expected = results.setdefault((seed, absent), o)
            assert_same_bits(o, expected, f"without {absent}, seed {seed}")
            compare(o, call(cases.make(case, F64, seed=seed), case, "reference"), F32)
    assert len({x.sum().item() for x in results.values()}) == len(results)


@pytest.mark.no_comparison
def test_only_the_inputs_are_kept():
    case, tensors = inputs(F32)
    given = {n: x.requires_grad_() for n, x in tensors.items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        call(given, case)
    assert sorted(x.data_ptr() for x in kept) == sorted(x.data_ptr() for x in given.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_in_parts(backend):
    """More images and groups than a part of the backward pass has, in both ways to cut them."""
    for sizes in ({"B": 5, "G": 1}, {"B": 1, "G": 9}, {"B": 18, "G": 2}):
        case, tensors = inputs(F32, Y=5, X=5, K=3, S=1, A=3, D=2, **sizes)
        grads = []
        for dtype, which in ((F32, backend), (F64, "reference")):
            given = [x.to(dtype).requires_grad_() for x in tensors.values()]
            o = call(dict(zip(tensors, given, strict=True)), case, which)
            grads.append(torch.autograd.grad(o, given, randn(*o.shape, seed=7, dtype=dtype)))
        for name, x, y in zip(tensors, *grads, strict=True):
            compare(x, y, F32, floor=8.0, name=f"d_{name}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_gradient_alone(backend):
    """What the others need is left out."""
    case, tensors = inputs(F32)
    d_o = randn(*tensors["v"].shape, seed=7, dtype=F32)

    def gradients(*names):
        given = {n: x.detach().requires_grad_(n in names) for n, x in tensors.items()}
        return torch.autograd.grad(call(given, case, backend), [given[n] for n in names], d_o)

    for name, x in zip(tensors, gradients(*tensors), strict=True):
        assert_same_bits(gradients(name)[0], x, f"d_{name} alone")


@pytest.mark.parametrize("sizes", [{"rpb": False}, {"bias": False, "K": (1, 5), "Y": 1, "S": 1}])
def test_gradcheck(sizes):
    case, tensors = inputs(**{"Y": 5, "X": 5, "K": 5, "S": 3, "G": 2, "A": 2, "D": 2, "B": 1,
                              **sizes})  # fmt: skip
    given = [x.requires_grad_() for x in tensors.values()]

    def f(*given):
        return call(dict(zip(tensors, given, strict=True)), case)

    assert torch.autograd.gradcheck(f, given)
    compare(f(*given), call(tensors, case, "reference"), F64)


@pytest.mark.no_comparison
def test_more_than_two_to_the_31_elements():
    def empty(*shape):
        return torch.empty(shape, device="meta", requires_grad=True)

    affinity, v = empty(64, 512, 512, 4, 49), empty(64, 512, 512, 8, 32)
    given = (affinity, empty(25 + 169, 49), None, v)
    o = hw.contmix(*given, kernel_size=13, small_kernel_size=5)
    grads = torch.autograd.grad(o.sum(), (affinity, v))
    assert o.numel() > 2**31 and [x.shape for x in grads] == [affinity.shape, v.shape]


def zeros(*shape, dtype=F32, device=None):
    return torch.zeros(shape, dtype=dtype, device=device)


IMAGE = (1, 6, 7)
GOOD = {
    "affinity": zeros(*IMAGE, 2, 4), "weight": zeros(34, 4), "bias": zeros(34),
    "v": zeros(*IMAGE, 4, 5), "kernel_size": 5, "small_kernel_size": 3,
}  # fmt: skip
BAD = (
    Refused(ValueError, "affinity", "[6, 7, 2, 4]", "[B, Y, X, G, A]", affinity=zeros(6, 7, 2, 4)),
    Refused(ValueError, "v", "[1, 6, 7, 2, 5]", "[1, 6, 7, 4, 5]", v=zeros(*IMAGE, 2, 5)),
    Refused(ValueError, "v", "[1, 7, 6, 4, 5]", v=zeros(1, 7, 6, 4, 5)),
    Refused(ValueError, "A", "0", "at least 1", affinity=zeros(*IMAGE, 2, 0), weight=zeros(34, 0)),
    Refused(ValueError, "weight", "[25, 4]", "[34, 4]", weight=zeros(25, 4)),
    Refused(ValueError, "weight", "[34, 4]", "[34, 3]", affinity=zeros(*IMAGE, 2, 3)),
    Refused(ValueError, "bias", "[25]", "[34]", bias=zeros(25)),
    Refused(ValueError, "rpb", "[2, 5, 5]", "[2, 9, 9]", rpb=zeros(2, 5, 5)),
    Refused(ValueError, "rpb", "[4, 9, 9]", "[2, 9, 9]", rpb=zeros(4, 9, 9)),
    Refused(ValueError, "rpb", "[2, 81]", "[2, 9, 9]", rpb=zeros(2, 81)),
    Refused(ValueError, "small_rpb", "[2, 9, 9]", "[2, 5, 5]", small_rpb=zeros(2, 9, 9)),
    Refused(ValueError, "kernel_size", "6", "odd", kernel_size=6),
    Refused(ValueError, "small_kernel_size", "2", "odd", small_kernel_size=2),
    Refused(ValueError, "kernel_size", "7 along Y", "6 tokens", "hw.nn.ContMix",
            kernel_size=7, weight=zeros(58, 4), bias=None),
    Refused(TypeError, "small_kernel_size", "None", small_kernel_size=None),
    Refused(TypeError, "weight", "float64", "float32", "autocast", weight=zeros(34, 4, dtype=F64)),
    Refused(TypeError, "rpb", "bfloat16", rpb=zeros(2, 9, 9, dtype=torch.bfloat16)),
    Refused(TypeError, "affinity", "int64", affinity=zeros(*IMAGE, 2, 4, dtype=torch.int64)),
    Refused(TypeError, "weight", "a NoneType", weight=None),
    Refused(RuntimeError, "bias", "meta", "cpu", bias=zeros(34, device="meta")),
    Refused(ValueError, "backend", "'sm70'", backend="sm70"),
    Refused(RuntimeError, "simt", "cpu", "emulate:simt", backend="simt"),
)  # fmt: skip


@pytest.mark.no_comparison
@pytest.mark.parametrize("case", BAD, ids=repr)
def test_bad_input(case, monkeypatch):
    allocates_nothing(monkeypatch)
    case.check(lambda: hw.contmix(**(GOOD | case.arguments)))


@pytest.mark.no_comparison
@pytest.mark.skipif(len(BACKENDS) == 1, reason="no emulator")
def test_what_a_backend_declines_is_said_in_words():
    large = {**GOOD, "affinity": zeros(1, 1, 12001, 1, 1), "v": zeros(1, 1, 12001, 2, 1)}
    large |= {"weight": zeros(12002, 1), "bias": None, "kernel_size": (1, 12001)}
    with pytest.raises(NotImplementedError, match="12002 weights of a token do not fit"):
        hw.contmix(**{**large, "small_kernel_size": 1}, backend="emulate:simt")
