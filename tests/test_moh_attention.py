# SPDX-License-Identifier: Apache-2.0
"""Mixture of heads: equal to gated attention but for what was not chosen; the layer; bad input."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

import headworks as hw
from backends import native_info
from headworks import nn
from headworks.ops.routing._moh_route_native import chosen_rows
from headworks.testing import assert_same_bits, compare
from identities import Refused, allocates_nothing, randn
from routing_checks import cases_of, check_example, check_reference, on_both_backends
from specs import moh_attention as spec

pytestmark = pytest.mark.operator

F64, F32 = torch.float64, torch.float32
attend = functools.partial(hw.moh_attention, backend="reference")
BACKENDS = ["reference", "cpu"]
BACKENDS += ["emulate:simt", "emulate:sm80"] if native_info().get("emulator") else []
on_both = on_both_backends(globals(), attend=hw.moh_attention)


@pytest.mark.parametrize("case, dtype", cases_of(spec.SPEC))
def test_reference(case, dtype):
    check_reference(spec.SPEC, case, dtype)


def inputs(s=20, h=4, d=4, dv=3, b=2, hk=2):
    k = randn(b, s, hk, d, seed=1)
    gate = randn(b, s, h, seed=3)
    gate[:, ::3] = 0
    gate[:, :, 1] = 0
    return randn(b, s, h, d), k, randn(*k.shape[:3], dv, seed=2), gate


OPTIONS = (
    {},
    {"is_causal": True, "window_size": (5, 0), "scale": 0.3},
    {"softcap": 2.0, "bias": randn(4, 20, 20, seed=7), "key_bias": randn(2, 1, 20, seed=8)},
    {"row_temperature": randn(1, 20, 4, seed=9)},
)


@pytest.mark.parametrize("backend", ("reference", "cpu"))
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.usefixtures("on_both")
def test_equals_gated_attention(options, backend):
    """The value, and every gradient but the gate's where it is 0."""
    *tensors, gate = inputs()
    tensors = [t.requires_grad_() for t in (*tensors, gate)]
    o = attend(*tensors, **options)
    dense = hw.attention(*tensors[:3], head_gate=tensors[3], backend=backend, **options)
    compare(o, dense.detach(), F64)
    cotangent = randn(*o.shape, seed=5)
    grads = [torch.autograd.grad(x, tensors, cotangent) for x in (o, dense)]
    for actual, expected in zip(grads[0][:3], grads[1][:3], strict=True):
        compare(actual, expected, F64)
    compare(grads[0][3], torch.where(gate == 0, 0, grads[1][3]), F64)
    assert (grads[1][3][gate == 0] != 0).any()


@pytest.mark.usefixtures("on_both")
def test_what_was_not_chosen_is_not_looked_at():
    q, k, v, gate = inputs(hk=4)
    o = attend(q, k, v, gate)
    poisoned = torch.where(gate[..., None] == 0, torch.nan, q)
    assert_same_bits(attend(poisoned, k, v, gate), o)
    assert (o[gate == 0] == 0).all() and (o[gate != 0] != 0).all()
    # head 1 was chosen by no token: its keys and values matter to nobody
    k[:, :, 1], v[:, :, 1] = torch.nan, torch.nan
    assert_same_bits(attend(q, k, v, gate), o)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", ((1, 1, 40, 40), (2, 4, 1, 40), (1, 4, 40, 1)), ids=str)
def test_gradient_of_a_shared_bias_does_not_look_at_it_either(backend, shape):
    dtype = torch.bfloat16 if backend == "emulate:sm80" else F32
    q, k, v, gate = (x.to(dtype) for x in inputs(b=2, s=40, hk=4))
    tau, bias = torch.ones(gate.shape), torch.randn(shape, dtype=dtype, requires_grad=True)
    g = torch.randn(q.shape[:3] + v.shape[3:], dtype=dtype)

    def gradient(q, tau, g):
        o = hw.moh_attention(q, k, v, gate, bias=bias, row_temperature=tau, backend=backend)
        return torch.autograd.grad(o, bias, g)[0]

    unchosen = gate == 0
    whole = gradient(q, tau, g)
    assert unchosen.any() and whole.isfinite().all()
    q, g = (x.masked_fill(unchosen[..., None], torch.nan) for x in (q, g))
    assert_same_bits(gradient(q, tau.masked_fill(unchosen, torch.inf), g), whole)


@pytest.mark.parametrize("width", (64, 20))  # rows of whole cache lines, and others
def test_rows_of_a_large_output(width):
    """What was not chosen is written past the caches where o is large."""
    q, k, v = (randn(4, n, 16, d, dtype=F32) for n, d in ((1000, 4), (8, 4), (8, width)))
    gate = (randn(4, 1000, 16, dtype=F32, seed=3) > 0).float()
    assert q.numel() // 4 * width * 4 > 4 << 20
    compare(hw.moh_attention(q, k, v, gate, backend="cpu"), attend(q, k, v, gate), F32)


@pytest.mark.parametrize("backend", ("cpu", "emulate:simt"))
@pytest.mark.parametrize("size", ((2, 20, 3), (1, 600, 9), (3, 1, 17), (1, 256, 8)), ids=str)
@pytest.mark.parametrize("dtype", (F64, F32), ids=str)
def test_rows_of_a_gate(size, backend, dtype):
    """Those that are not 0, by position, then -1; of every stride, NaN included."""
    gate = randn(*size, seed=1).to(dtype)
    gate[randn(*size, seed=2) < 0.3] = 0
    gate[:, :, 0] = 0
    gate[:, -1, -1] = torch.nan
    for g in (gate, gate.transpose(1, 2).contiguous().transpose(1, 2)):
        rows = chosen_rows(g, backend)
        for b, h in itertools.product(range(size[0]), range(size[2])):
            expected = gate[b, :, h].nonzero()[:, 0]
            assert_same_bits(rows[b, h, : len(expected)], expected)
            assert (rows[b, h, len(expected) :] == -1).all()
    assert chosen_rows(gate[:, :0], backend).shape == (size[0], size[2], 0)


@pytest.mark.no_comparison
@pytest.mark.usefixtures("on_both")
def test_gradcheck():
    tensors = [t.requires_grad_() for t in inputs(s=5, d=2, dv=2, b=1)]
    chosen = (tensors[3].detach() != 0).double()
    call = lambda q, k, v, g: attend(q, k, v, g * chosen, is_causal=True)  # noqa: E731
    assert torch.autograd.gradcheck(call, tensors)


@pytest.mark.usefixtures("on_both")
def test_autocast_and_compile():
    q, k, v, gate = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = attend(q.float(), k.float(), v.float(), gate.float())
    half = [t.bfloat16() for t in (q, k, v)]
    assert_same_bits(o, attend(*half, gate.float()))
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    compare(compiled(q, k, v, gate, is_causal=True), attend(q, k, v, gate, is_causal=True), F64)


@pytest.mark.no_comparison
def test_example():
    check_example(hw.moh_attention)


def zeros(*shape, dtype=F32, device=None):
    return torch.zeros(shape, dtype=dtype, device=device)


BAD = (
    Refused(ValueError, "q", "[6, 4, 8]", "[B, S, H, D]", q=zeros(6, 4, 8)),
    Refused(ValueError, "k", "[1, 7, 2, 9]", k=zeros(1, 7, 2, 9)),
    Refused(ValueError, "v", "[1, 6, 2, 5]", v=zeros(1, 6, 2, 5)),
    Refused(TypeError, "v", "float64", v=zeros(1, 7, 2, 5, dtype=F64)),
    Refused(ValueError, "heads", "multiple", q=zeros(1, 6, 3, 8)),
    Refused(TypeError, "gate", "bool", "floating", gate=zeros(1, 6, 4, dtype=torch.bool)),
    Refused(TypeError, "gate", "NoneType", gate=None),
    Refused(ValueError, "gate", "[1, 4, 6]", "[1, 6, 4]", gate=zeros(1, 4, 6)),
    Refused(ValueError, "gate", "[1, 6, 1]", gate=zeros(1, 6, 1)),
    Refused(RuntimeError, "gate", "meta", gate=zeros(1, 6, 4, device="meta")),
    Refused(ValueError, "scale", "nan", scale=float("nan")),
    Refused(ValueError, "window_size (right)", "is_causal", is_causal=True, window_size=(1, 3)),
    Refused(ValueError, "key_bias", "[1, 2, 7]", key_bias=zeros(1, 2, 7)),
    Refused(ValueError, "backend", "'gpu'", backend="gpu"),
    Refused(RuntimeError, "sm80", "emulate:sm80", backend="sm80"),
)


@pytest.mark.no_comparison
@pytest.mark.parametrize("case", BAD, ids=repr)
def test_bad_input(case, monkeypatch):
    arguments = {"q": zeros(1, 6, 4, 8), "k": zeros(1, 7, 2, 8), "v": zeros(1, 7, 2, 5),
                 "gate": zeros(1, 6, 4)} | case.arguments  # fmt: skip
    allocates_nothing(monkeypatch)
    case.check(lambda: hw.moh_attention(**arguments))


# The layer. Names and shapes of SkyworkAI/MoH, of width 32 and 8 heads.
NAMES = {
    (3, 2): {"qkv.weight": (96, 32), "proj.weight": (32, 32), "proj.bias": (32,),
             "wg.weight": (5, 32), "wg_0.weight": (2, 32), "wg_1.weight": (3, 32)},
    (1, 2): {"qkv.weight": (96, 32), "proj.weight": (32, 32), "proj.bias": (32,),
             "wg.weight": (7, 32), "wg_0.weight": (2, 32)},
    (0, 4): {"qkv.weight": (96, 32), "proj.weight": (32, 32), "proj.bias": (32,),
             "wg.weight": (8, 32)},
    (8, 0): {"qkv.weight": (96, 32), "proj.weight": (32, 32), "proj.bias": (32,),
             "wg_1.weight": (8, 32)},
}  # fmt: skip


def layer(shared, chosen, **options):
    options = {"backend": "reference", "dtype": F64, **options}
    made = nn.MixtureOfHeads(32, 8, shared_heads=shared, routed_heads=chosen, **options)
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(2)
    return made


@pytest.mark.no_comparison
@pytest.mark.parametrize("heads", NAMES, ids=str)
def test_layer_has_the_official_names(heads):
    assert {n: tuple(p.shape) for n, p in layer(*heads).state_dict().items()} == NAMES[heads]
    assert "qkv.bias" in layer(*heads, qkv_bias=True).state_dict()


def gate_of_token(made, x):
    """The two stages of routing, one token at a time. x [d]."""
    shared, chosen = made.shared_heads, made.routed_heads
    gate = x.new_zeros(8)
    gate[:shared] = 1.0 if shared == 1 else 0.0
    if shared > 1:
        gate[:shared] = shared * (made.wg_1.weight @ x).softmax(0)
    if chosen:
        p = (made.wg.weight @ x).softmax(0)
        best = p.topk(chosen).indices
        gate[shared + best] = chosen * p[best] / p[best].sum()
    if shared and chosen:
        alpha = 2 * (made.wg_0.weight @ x).softmax(0)
        gate[:shared] *= alpha[0]
        gate[shared:] *= alpha[1]
    return gate


@pytest.mark.parametrize("heads", NAMES, ids=str)
def test_layer_is_the_definition(heads):
    made, x = layer(*heads, is_causal=True), randn(2, 7, 32)
    with torch.no_grad():
        gate = torch.stack([gate_of_token(made, t) for t in x.flatten(0, 1)]).view(2, 7, 8)
        compare(made.route(x)[0], gate, F64)
        q, k, v = made.qkv(x).view(2, 7, 3, 8, 4).permute(2, 0, 3, 1, 4)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        compare(made(x), made.proj((gate[..., None] * o).flatten(2)), F64)
    assert ((gate != 0).sum(-1) == sum(heads)).all()


def test_balance_loss():
    """The official formula; K where all probabilities are equal; taken once, in training only."""
    made, x = layer(2, 2), randn(3, 50, 32)
    made(x)
    loss = made.pop_loss()
    p = (x @ made.wg.weight.T).softmax(-1).flatten(0, 1)
    chosen = torch.zeros_like(p).scatter(1, p.topk(2).indices, 1)
    compare(loss, 36 * (p.mean(0) * chosen.mean(0)).mean(), F64)
    (grad,) = torch.autograd.grad(loss, made.wg.weight)
    assert grad.abs().sum() > 0
    assert made.pop_loss() == 0  # taken once
    made.eval()(x)
    assert made.pop_loss() == 0
    with torch.no_grad():
        made.wg.weight.zero_()
    compare(made.route(x)[1], torch.tensor(2.0, dtype=F64), F64)


@pytest.mark.no_comparison
def test_layer_learns_where_to_look():
    """Every router has a gradient."""
    made = layer(2, 3)
    y = made(randn(2, 9, 32))
    loss = (y * randn(*y.shape, seed=3)).sum() + made.pop_loss()
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in made.parameters())


def test_layer_without_tokens():
    made = layer(2, 3)
    assert made(randn(2, 0, 32)).shape == (2, 0, 32)
    compare(made.pop_loss(), torch.zeros((), dtype=F64), F64)


@pytest.mark.no_comparison
def test_layer_refuses():
    for heads, words in (
        ((9, 0), "at most num_heads 8"),
        ((5, 4), "together"),
        ((3, 0), "no token could choose"),
        ((0, 0), "no token could choose"),
    ):
        with pytest.raises(ValueError, match=words):
            layer(*heads)
    with pytest.raises(ValueError, match="not a multiple of num_heads"):
        nn.MixtureOfHeads(30, 8, shared_heads=2, routed_heads=2)
    with pytest.raises(ValueError, match=r"expected \[B, S, 32\]"):
        layer(2, 2)(randn(9, 32))
