# SPDX-License-Identifier: Apache-2.0
"""The layers: parallel form, recurrent form and states agree; names are the official ones."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from headworks import nn
from headworks.nn import functional
from headworks.nn.rotary import apply_rotary, rotary_tables

WIDTH = 32

LAYERS = {
    "linear": lambda: nn.BasedLinearAttention(WIDTH, 4),
    "linear_g_norm": lambda: nn.BasedLinearAttention(
        WIDTH, 4, feature_dim=8, head_dim=12, g_norm=True, bias=True
    ),
    "linear_elu1": lambda: nn.BasedLinearAttention(WIDTH, 4, feature_map="elu1", eps=1e-6),
    "window_0": lambda: nn.SlidingWindowAttention(WIDTH, 4, window=0),
    "window_3": lambda: nn.SlidingWindowAttention(WIDTH, 4, window=3, rotary_dim=8),
    "window_64": lambda: nn.SlidingWindowAttention(WIDTH, 2, window=64, rotary_dim=6, bias=True),
    "window_100": lambda: nn.SlidingWindowAttention(WIDTH, 4, window=100),
    "conv": lambda: nn.GatedShortConv(WIDTH),
    "conv_5": lambda: nn.GatedShortConv(WIDTH, conv_width=5, conv_bias=True, expand=2),
    "conv_1": lambda: nn.GatedShortConv(WIDTH, conv_width=1, bias=False),
}
LENGTHS = (1, 2, 65, 130)

# Deprecations of torch's own making.
INSIDE_TORCH = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _one_thread(_deterministic_start):
    """The layers here are tiny: threads cost more than they give."""
    torch.set_num_threads(1)


@pytest.fixture(params=LAYERS)
def layer(request):
    made = LAYERS[request.param]()
    with torch.no_grad():  # weights of size 1 / sqrt(width) say little about the scores
        for p in made.parameters():
            p.mul_(2)
    return made


@pytest.mark.parametrize("tokens", LENGTHS)
def test_steps_equal_the_parallel_form(layer, tokens):
    x = torch.randn(2, tokens, WIDTH)
    state = layer.init_state(2)
    stepped = torch.stack([layer.step(x[:, t], state) for t in range(tokens)], dim=1)
    torch.testing.assert_close(stepped, layer(x).detach(), rtol=1e-4, atol=2e-5)


def test_pieces_equal_the_whole(layer):
    x = torch.randn(2, 330, WIDTH)
    whole, whole_state = layer(x, return_state=True)
    state, pieces = None, []
    for piece in x.split([1, 2, 70, 0, 5, 129, 123], dim=1):
        y, state = layer(piece, state, return_state=True)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=2e-5)
    for got, expected in zip(_tensors(state), _tensors(whole_state), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_step_after_the_parallel_form(layer):
    x = torch.randn(2, 140, WIDTH)
    expected = layer(x).detach()
    for cut in (0, 1, 2, 64, 65, 139):
        _, state = layer(x[:, :cut], return_state=True)
        for t in range(cut, min(cut + 3, 140)):
            y = layer.step(x[:, t], state)
            torch.testing.assert_close(y, expected[:, t], rtol=1e-4, atol=2e-5)


def test_the_state_given_is_not_modified(layer):
    _, state = layer(torch.randn(1, 5, WIDTH), return_state=True)
    before = [t.clone() for t in _tensors(state)]
    layer(torch.randn(1, 7, WIDTH), state, return_state=True)
    for t, kept in zip(_tensors(state), before, strict=True):
        assert torch.equal(t, kept)


@pytest.mark.parametrize("offsets", [[0, 200], [0, 1, 1, 4, 70, 199, 200], [0, 64, 128, 200]])
def test_packed_sequences_do_not_see_each_other(layer, offsets):
    x = torch.randn(1, 200, WIDTH)
    packed = layer(x, cu_seqlens=torch.tensor(offsets))
    alone = [layer(x[:, a:b]) for a, b in pairwise(offsets) if b > a]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-4, atol=2e-5)


def test_packed_gradients(layer):
    x = torch.randn(1, 90, WIDTH, requires_grad=True)
    cotangent = torch.randn(1, 90, WIDTH)
    offsets = [0, 1, 30, 90]
    packed = layer(x, cu_seqlens=torch.tensor(offsets))
    (together,) = torch.autograd.grad(packed, x, cotangent)
    alone = torch.cat([layer(x[:, a:b]) for a, b in pairwise(offsets)], dim=1)
    (apart,) = torch.autograd.grad(alone, x, cotangent)
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-4)


def test_every_parameter_gets_a_gradient(layer):
    x = torch.randn(2, 70, WIDTH, requires_grad=True)
    y = layer(x)
    y.backward(torch.randn_like(y))
    for name, p in [("x", x), *layer.named_parameters()]:
        if name == "Wqkv.weight" and getattr(layer, "window", None) == 0:
            p.grad[: 2 * WIDTH] = 1  # one visible key: the scores have no influence
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
        assert (p.grad != 0).float().mean() > 0.9, name


def test_gradients_through_a_state(layer):
    x = torch.randn(1, 40, WIDTH, requires_grad=True)
    cotangent = torch.randn(1, 40, WIDTH)
    (whole,) = torch.autograd.grad(layer(x), x, cotangent)
    first, state = layer(x[:, :15], return_state=True)
    second = layer(x[:, 15:], state)
    (pieces,) = torch.autograd.grad(torch.cat([first, second], dim=1), x, cotangent)
    torch.testing.assert_close(pieces, whole, rtol=1e-3, atol=1e-4)


def test_bfloat16_is_close_to_float32(layer):
    x = torch.randn(2, 70, WIDTH).bfloat16()
    layer.bfloat16()
    half = layer(x)
    state = layer.init_state(2)
    stepped = torch.stack([layer.step(x[:, t], state) for t in range(70)], dim=1)
    full = layer.float()(x.float())
    assert half.dtype == stepped.dtype == torch.bfloat16
    size = full.abs().max().item()
    for y in (half, stepped):
        assert (y.float() - full).abs().max().item() < 0.03 * size


def test_float64_works_throughout(layer):
    layer.double()
    x = torch.randn(1, 70, WIDTH, dtype=torch.float64)
    state = layer.init_state(1)
    stepped = torch.stack([layer.step(x[:, t], state) for t in range(70)], dim=1)
    torch.testing.assert_close(stepped, layer(x).detach(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_empty_inputs_give_empty_outputs(layer, shape):
    assert layer(torch.randn(*shape, WIDTH)).shape == (*shape, WIDTH)


def test_the_state_keeps_its_size(layer):
    state = layer.init_state(1)
    size = [t.shape for t in _tensors(state)]
    places = [t.data_ptr() for t in _tensors(state)]
    for _ in range(150):
        layer.step(torch.randn(1, WIDTH), state)
    assert [t.shape for t in _tensors(state)] == size
    assert [t.data_ptr() for t in _tensors(state)] == places


def test_parameter_names_and_shapes():
    expected = {
        "linear_g_norm": {
            "proj_q.weight": (32, 32), "proj_k.weight": (32, 32), "proj_v.weight": (48, 32),
            "out_proj.weight": (32, 48), "g_norm.weight": (12,),
            "proj_q.bias": (32,), "proj_k.bias": (32,), "proj_v.bias": (48,),
            "out_proj.bias": (32,),
        },
        "window_3": {"Wqkv.weight": (96, 32), "out_proj.weight": (32, 32)},
        "conv": {
            "in_proj.weight": (128, 32), "in_proj.bias": (128,), "conv.conv.weight": (64, 1, 3),
            "out_proj.weight": (32, 64), "out_proj.bias": (32,),
        },
    }  # fmt: skip
    for name, shapes in expected.items():
        assert {k: tuple(v.shape) for k, v in LAYERS[name]().state_dict().items()} == shapes, name


def test_linear_attention_equals_its_formula():
    layer = nn.BasedLinearAttention(WIDTH, 2).double()
    x = torch.randn(1, 20, WIDTH, dtype=torch.float64)
    q, k = (p(x).view(20, 2, 16) for p in (layer.proj_q, layer.proj_k))
    v = layer.proj_v(x).view(20, 2, 16)
    s = torch.einsum("ihd,jhd->hij", q, k) / 4
    w = (1 + s + s**2 / 2).tril()
    o = torch.einsum("hij,jhd->ihd", w / w.sum(-1, keepdim=True), v)
    torch.testing.assert_close(layer(x)[0], layer.out_proj(o.flatten(1)))


def window_by_formula(layer, x, past, starts=(0,)):
    """The layer by its definition: every score in fp64, a mask, a softmax. x [1, past + S, d_model]
    with sequences from ``starts`` on -> y [1, S, d_model] of the tokens after ``past``."""
    count, heads, width = x.shape[1], layer.num_heads, layer.head_dim
    token, starts = torch.arange(count), torch.tensor(starts)
    start = starts[torch.searchsorted(starts, token, right=True) - 1]
    weight, out = layer.Wqkv.weight.double(), layer.out_proj.weight.double()
    q, k, v = (x.double() @ weight.T).view(count, 3, heads, width).unbind(1)  # [past + S, H, D]
    if layer.rotary_dim:
        pair = torch.arange(layer.rotary_dim // 2, dtype=torch.float64)
        angle = (token - start)[:, None] * layer.rotary_base ** (-2 * pair / layer.rotary_dim)
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]  # [past + S, 1, R / 2]
        q, k = (_turned(t, turn) for t in (q, k))
    distance = token[:, None] - token
    seen = (distance >= 0) & (distance <= layer.window) & (token >= start[:, None])
    score = torch.einsum("ihd,jhd->hij", q, k) / width**0.5
    p = score.masked_fill(~seen, -torch.inf).softmax(-1)  # [H, past + S, past + S]
    o = torch.einsum("hij,jhd->ihd", p, v).flatten(1)
    return (o @ out.T)[None, past:]


def _turned(t, turn):
    # t [S, H, D]: the channels (i, i + R / 2) as the complex number that `turn` [S, 1, R/2] turns.
    half = turn.shape[-1]
    z = torch.complex(t[..., :half], t[..., half : 2 * half]) * turn
    return torch.cat([z.real, z.imag, t[..., 2 * half :]], dim=-1)


WINDOWS = pytest.mark.parametrize("window", [0, 1, 3, 63, 64, 65, 128, 500])


def window_layer(window, rotary_dim=4, **options):
    layer = nn.SlidingWindowAttention(WIDTH, 4, window=window, rotary_dim=rotary_dim, **options)
    with torch.no_grad():
        layer.Wqkv.weight.mul_(2)
    return layer


@WINDOWS
@pytest.mark.parametrize("tokens", [1, 64, 65, 129, 300])
def test_window_attention_equals_its_formula(window, tokens):
    layer, x = window_layer(window), torch.randn(1, tokens, WIDTH)
    compare(layer(x), window_by_formula(layer, x, 0))


@WINDOWS
@pytest.mark.parametrize("past", [1, 63, 130])
def test_window_attention_after_a_past_equals_its_formula(window, past):
    layer, x = window_layer(window), torch.randn(1, past + 70, WIDTH)
    expected = window_by_formula(layer, x, past)
    _, state = layer(x[:, :past], return_state=True)
    compare(layer(x[:, past:], state), expected)
    stepped = torch.stack([layer.step(x[:, t], state) for t in range(past, past + 70)], dim=1)
    compare(stepped, expected)


@WINDOWS
def test_packed_window_attention_equals_its_formula(window):
    layer, x = window_layer(window), torch.randn(1, 200, WIDTH)
    for dtype in (torch.int32, torch.int64):
        offsets = torch.tensor([0, 1, 1, 4, 70, 199, 200], dtype=dtype)
        expected = window_by_formula(layer, x, 0, (0, 1, 4, 70, 199))
        compare(layer(x, cu_seqlens=offsets), expected)


@pytest.mark.parametrize("window", [0, 3, 64, 100])
@pytest.mark.parametrize("packed", [False, True])
def test_window_gradients_equal_those_of_the_formula(window, packed):
    layer, x = window_layer(window), torch.randn(1, 150, WIDTH, requires_grad=True)
    offsets = torch.tensor([0, 20, 150]) if packed else None
    cotangent = torch.randn(1, 150, WIDTH)
    inputs = (x, layer.Wqkv.weight, layer.out_proj.weight)
    got = torch.autograd.grad(layer(x, cu_seqlens=offsets), inputs, cotangent)
    formula = window_by_formula(layer, x, 0, (0, 20) if packed else (0,))
    expected = torch.autograd.grad(formula, inputs, cotangent.double())
    for a, b in zip(got, expected, strict=True):
        compare(a, b)


def compare(got, expected):
    """fp32 against fp64: within 1e-5 of the largest number."""
    assert got.shape == expected.shape and got.numel() > 0
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("train", [False, True])
def test_window_attention_never_makes_a_square(train):
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor):
                    Largest.numbers = max(Largest.numbers, t.numel())
            return out

    tokens = 4096
    layer = nn.SlidingWindowAttention(WIDTH, 2, window=64, rotary_dim=16)
    x = torch.randn(1, tokens, WIDTH, requires_grad=train)
    with Largest(), torch.set_grad_enabled(train):
        y = layer(x)
        if train:
            y.backward(torch.ones_like(y))
    assert tokens * WIDTH <= Largest.numbers <= tokens * 3 * WIDTH < tokens * tokens


@INSIDE_TORCH
@pytest.mark.parametrize("dynamic", [False, True])
def test_window_attention_compiles(dynamic):
    layer = window_layer(20)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (50, 70):
        x = torch.randn(1, tokens, WIDTH, requires_grad=True)
        cotangent = torch.randn(1, tokens, WIDTH)
        y = compiled(x)
        compare(y, window_by_formula(layer, x, 0))
        inputs = (x, *layer.parameters())
        got = torch.autograd.grad(y, inputs, cotangent)
        expected = torch.autograd.grad(layer(x), inputs, cotangent)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@INSIDE_TORCH
def test_window_attention_exports():
    layer, x = window_layer(20).eval(), torch.randn(1, 50, WIDTH)
    program = torch.export.export(layer, (x,))
    compare(program.module()(x), window_by_formula(layer, x, 0))


def test_window_attention_under_autocast():
    layer, x = window_layer(20), torch.randn(2, 50, WIDTH)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, state = layer(x[:, :30], return_state=True)
        second, state = layer(x[:, 30:40], state, return_state=True)
        stepped = torch.stack([layer.step(x[:, t], state) for t in range(40, 50)], dim=1)
    got = torch.cat([first, second, stepped], dim=1)
    assert got.dtype == torch.bfloat16 and state.k.dtype == torch.float32
    assert (got - expected).abs().max() < 0.03 * expected.abs().max()


def test_the_backend_of_window_attention_is_passed_on():
    x = torch.randn(1, 9, WIDTH)
    layer, other = window_layer(3), window_layer(3, backend="reference")
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), other(x), rtol=1e-4, atol=1e-5)
    refused = window_layer(3, backend="simt")
    for call in (
        lambda: refused(x),
        lambda: refused(x, cu_seqlens=torch.tensor([0, 4, 9])),
        lambda: refused.step(x[:, 0], refused.init_state(1)),
    ):
        with pytest.raises(RuntimeError, match=r'backend="simt"'):
            call()


def test_window_attention_ignores_what_is_outside():
    layer = nn.SlidingWindowAttention(WIDTH, 4, window=5)
    x = torch.randn(1, 150, WIDTH)
    other = x.clone()
    other[:, 100] += 1
    changed = (layer(x) != layer(other)).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == list(range(100, 106))


def test_rotary_scores_depend_on_the_distance_alone():
    q = k = torch.ones(1, 1, 1, 16)

    def score(i, j):
        turned = [
            apply_rotary(x, *rotary_tables(torch.tensor([p]), 16)) for x, p in ((q, i), (k, j))
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(7, 3), score(2_000_007, 2_000_003), rtol=1e-4, atol=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_partial_rotary_leaves_the_rest():
    x = torch.randn(1, 5, 2, 16)
    turned = apply_rotary(x, *rotary_tables(torch.arange(5), 6))
    assert torch.equal(turned[..., 6:], x[..., 6:])
    assert torch.equal(turned[:, 0], x[:, 0])
    assert (turned[:, 1:, :, :6] != x[:, 1:, :, :6]).all()


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_gated_short_conv_gradients(width):
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 1, width, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(functional.gated_short_conv, (x, weight, bias))
    a, b = x.chunk(2, -1)
    conv = F.conv1d(a.transpose(1, 2), weight, bias, padding=width - 1, groups=3)[..., :4]
    torch.testing.assert_close(
        functional.gated_short_conv(x, weight, bias), F.silu(conv.transpose(1, 2)) * b
    )


def test_swiglu_gradients():
    x = torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(functional.swiglu, (x,))
    a, b = x.chunk(2, -1)
    torch.testing.assert_close(functional.swiglu(x), a * F.silu(b))


def test_rms_norm_gradients():
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(functional.rms_norm, (x, weight))
    torch.testing.assert_close(
        functional.rms_norm(x, weight, 1e-5), F.rms_norm(x, (5,), weight, 1e-5)
    )


BAD = {
    "rank": (ValueError, "x has shape", lambda a: a(torch.zeros(5, WIDTH))),
    "width": (ValueError, r"expected \[B, S, 32\]", lambda a: a(torch.zeros(1, 5, 31))),
    "step_rank": (
        ValueError, "x_t has shape", lambda a: a.step(torch.zeros(1, 5, WIDTH), a.init_state(1)),
    ),
    "step_batch": (
        ValueError, "state|sequences", lambda a: a.step(torch.zeros(3, WIDTH), a.init_state(2)),
    ),
    "state_batch": (
        ValueError, "state|sequences", lambda a: a(torch.zeros(3, 4, WIDTH), _after(a, 2)),
    ),
    "packed_batch": (
        ValueError, "cu_seqlens",
        lambda a: a(torch.zeros(2, 4, WIDTH), cu_seqlens=torch.tensor([0, 4])),
    ),
    "packed_total": (
        ValueError, "cu_seqlens",
        lambda a: a(torch.zeros(1, 4, WIDTH), cu_seqlens=torch.tensor([0, 3])),
    ),
    "packed_order": (
        ValueError, "cu_seqlens",
        lambda a: a(torch.zeros(1, 4, WIDTH), cu_seqlens=torch.tensor([0, 3, 1, 4])),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(layer, name):
    error, message, call = BAD[name]
    with pytest.raises(error, match=message):
        call(layer)


def test_packed_linear_attention_takes_and_gives_states():
    layer = LAYERS["linear"]()
    x, y = torch.randn(1, 30, WIDTH), torch.randn(1, 20, WIDTH)
    _, states = layer(x, return_state=True, cu_seqlens=torch.tensor([0, 12, 30]))
    packed = layer(y, states, cu_seqlens=torch.tensor([0, 15, 20]))
    assert states.kv.shape[0] == 2
    for (a, b), (c, d) in (((0, 12), (0, 15)), ((12, 30), (15, 20))):
        alone = layer(torch.cat([x[:, a:b], y[:, c:d]], dim=1))[:, b - a :]
        torch.testing.assert_close(packed[:, c:d], alone, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("layer_name", ["conv", "window_3"])
def test_packed_with_a_state_is_refused(layer_name):
    layer = LAYERS[layer_name]()
    with pytest.raises(NotImplementedError, match="one by one"):
        layer(torch.zeros(1, 4, WIDTH), return_state=True, cu_seqlens=torch.tensor([0, 4]))


BAD_LAYERS = {
    "heads": lambda: nn.BasedLinearAttention(30, 4),
    "window_heads": lambda: nn.SlidingWindowAttention(30, 4),
    "window": lambda: nn.SlidingWindowAttention(32, 4, window=-1),
    "rotary_odd": lambda: nn.SlidingWindowAttention(32, 4, rotary_dim=3),
    "rotary_wide": lambda: nn.SlidingWindowAttention(32, 4, rotary_dim=10),
    "conv_width": lambda: nn.GatedShortConv(32, conv_width=0),
    "conv_odd": lambda: nn.GatedShortConv(5, expand=3),
}


@pytest.mark.parametrize("name", BAD_LAYERS)
def test_bad_layers(name):
    with pytest.raises(ValueError, match=r"(Attention|Conv): "):
        BAD_LAYERS[name]()


def _after(layer, batch):
    return layer(torch.zeros(batch, 3, WIDTH), return_state=True)[1]


def _tensors(state):
    if isinstance(state, torch.Tensor):
        return [state]
    return list(state) if isinstance(state, tuple) else state.tensors()
