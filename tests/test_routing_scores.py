# SPDX-License-Identifier: Apache-2.0
"""The axes of the engine are independent: lists of keys with every option of a score, on every
backend, and with the keys cut into spans. No public function combines these yet: the native calls
are compared with the formulas of csrc/softmax/params.h, written out pair by pair in fp64."""

from __future__ import annotations

import pytest
import torch

import headworks as hw
from headworks import _library
from headworks.ops.attention._native import Want, WantGrad
from headworks.ops.attention._score import Score
from headworks.ops.routing import _routing_attention_native as native
from headworks.ops.routing._grid import Grid
from headworks.ops.routing._routing_attention_native import Routing, image_grid, sequence_grid
from headworks.testing import assert_same_bits, compare
from identities import randn

pytestmark = pytest.mark.operator

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
BACKENDS = (
    ("cpu", F32),
    ("cpu", BF16),
    ("cpu", F64),
    ("emulate:simt", F32),
    ("emulate:sm80", BF16),
)
OPTIONS = ("bias", "key_bias", "key_gain", "row_temperature", "softcap", "sink", "all")
SELF = -5e4


def scored(option, q, k):
    """A Score with one of its options, or all of them; of the dtypes that native calls want."""
    batch, rows, heads, _ = q.shape
    keys, wide = k.shape[1], F32 if q.dtype == BF16 else q.dtype
    given = {
        "bias": randn(1, heads, rows, keys, seed=11).to(q.dtype),
        "key_bias": randn(batch, heads, keys, seed=12).to(wide),
        "key_gain": 0.3 * randn(batch, heads, keys, seed=13).to(wide),
        "row_temperature": 1 + 0.2 * randn(batch, rows, heads, seed=14).to(wide),
        "sink": randn(batch, heads, seed=15).to(wide),
        "softcap": 2.0,
    }
    chosen = given if option == "all" else {option: given[option]}
    if "bias" in chosen:
        chosen["bias"] = chosen["bias"].expand(batch, heads, rows, keys)
    return Score(q, k, scale=0.4, gain_end=rows - 2, **chosen)


def token(grid, region, t):
    """Token t of a region; -1: none."""
    columns, height, width, rows, tokens = grid
    y = region // columns * height + t // width
    x = region % columns * width + t % width
    inside = region >= 0 and 0 <= y < rows and 0 <= x < tokens
    return y * tokens + x if inside else -1


def tokens_of(lists, grid):
    """[.., slots] from [.., regions]."""
    size = grid[1] * grid[2]
    made = [
        [token(grid, r, t) for r in row for t in range(size)]
        for row in lists.flatten(0, -2).tolist()
    ]
    return torch.tensor(made).reshape(*lists.shape[:-1], -1)


def score_of(s, b, h, i, j):
    """s_ij of tokens i, j; of a zero key (j = -1) 0."""
    if j < 0:
        return s.q.new_zeros(())
    group = s.q.shape[2] // s.k.shape[2]
    x = s.scale * s.q[b, i, h] @ s.k[b, j, h // group]
    if s.row_temperature is not None:
        x = x * s.row_temperature[b, i, h]
    y = s.softcap * torch.tanh(x / s.softcap) if s.softcap else x
    if s.key_gain is not None and s.gain_begin <= i < s.gain_end:
        y = y + s.key_gain[b, h, j] * y.abs()
    if s.bias is not None:
        y = y + s.bias[b, h, i, j]
    if s.key_bias is not None:
        y = y + s.key_bias[b, h, j]
    return y


def written_out(s, v, routing):
    """o [B, Sq, Hq, Dv] of the groups' rows, each in one group; in the dtype of v."""
    batch, rows, heads, _ = s.q.shape
    o = v.new_zeros(batch, rows, heads, v.shape[3])
    row_tokens = tokens_of(routing.rows, routing.row_grid)
    key_tokens = tokens_of(routing.keys, routing.key_grid)
    group = heads // v.shape[2]
    shift = s.k.shape[1] - rows
    parts = {}
    for b, h, g in torch.cartesian_prod(*map(torch.arange, row_tokens.shape[:3])).tolist():
        for i in row_tokens[b, h, g].tolist():
            if i < 0:
                continue
            scores, values = [], []
            for j in key_tokens[b, h, g].tolist():
                if (j < 0 and not routing.pad_keys) or (s.causal and j > i + shift):
                    continue
                own = routing.mask_self and j >= 0 and j == i + shift
                scores.append(s.q.new_tensor(SELF) if own else score_of(s, b, h, i, j))
                values.append(v.new_zeros(v.shape[3]) if j < 0 else v[b, j, h // group])
            if not scores:
                continue
            logits = torch.stack(scores)
            total = logits if s.sink is None else torch.cat([logits, s.sink[b, h][None]])
            p = (logits - total.logsumexp(0)).exp()
            parts[b, i, h] = p @ torch.stack(values)
    index = tuple(torch.tensor(list(parts)).T)
    return o.index_put(index, torch.stack(list(parts.values())))


def bilevel(dtype, pad):
    """Regions of an image that reach beyond it."""
    grid = Grid(3, 4, 2, 2)
    image, batch, heads = (5, 7), 2, 2
    q = randn(batch, 35, heads, 8).to(dtype)
    k, v = randn(batch, 35, 1, 8, seed=1).to(dtype), randn(batch, 35, 1, 6, seed=2).to(dtype)
    regions = torch.arange(12)[:, None].expand(batch, heads, 12, 1)
    graph = torch.rand(batch, heads, 12, 12, generator=torch.Generator().manual_seed(3)).argsort(-1)
    both = image_grid(grid, image)
    return q, k, v, Routing(regions, graph[..., :5].contiguous(), both, both, pad_keys=pad)


def clusters(dtype, rows, keys, groups, own=False):
    """Every row in one list, keys in some."""
    batch, heads = 1, 2
    tokens = rows * groups
    g = torch.Generator().manual_seed(4)
    q = randn(batch, tokens, heads, 8).to(dtype)
    k, v = (
        randn(batch, tokens, heads, 8, seed=1).to(dtype),
        randn(batch, tokens, heads, 8, seed=2).to(dtype),
    )
    order = torch.rand(batch, heads, tokens, generator=g).argsort(-1)
    listed = torch.rand(batch, heads, groups, tokens, generator=g).argsort(-1)[..., :keys]
    grid = sequence_grid(tokens)
    return (
        q,
        k,
        v,
        Routing(
            order.reshape(batch, heads, groups, rows),
            listed.contiguous(),
            grid,
            grid,
            mask_self=own,
        ),
    )


def forward(score, v, routing, backend):
    want = Want(True, True, False, False, False, skip_dead=False)
    return native.forward(score, v, None, routing, want, backend)


def gradients(score, v, routing, made, d_o, backend):
    """By slot every row is in one, so that its share of d_o is all of it."""
    wide = score.sink.dtype if score.sink is not None else F32 if v.dtype == BF16 else v.dtype
    delta = (d_o.to(wide) * made.o.to(wide)).sum(-1).transpose(1, 2).contiguous()
    want = WantGrad(v=True, row_temperature=score.row_temperature is not None)
    delta, slots = (None, made.w) if routing.by_slot else (delta, None)
    given = {"d_w": d_o, "row": made.row, "delta": delta, "slots": slots, "factor": None}
    return native.backward(score, v, routing, want, backend, **given)


LEAVES = ("q", "k", "v", "row_temperature")


def oracle(score, v, routing, dtype, d_o=None):
    """o, and with d_o the gradients of what is there of LEAVES, all in dtype."""
    given = {**score._asdict(), "v": v}
    given = {n: x.detach().to(dtype) if torch.is_tensor(x) else x for n, x in given.items()}
    leaves = [given[n].requires_grad_() for n in LEAVES if given[n] is not None]
    v = given.pop("v")
    o = written_out(Score(**given), v, routing)
    if d_o is None:
        return o.detach()
    return o.detach(), *torch.autograd.grad(o, leaves, d_o.to(dtype))


def check(score, v, routing, dtype, backend):
    made = forward(score, v, routing, backend)
    d_o = randn(*made.o.shape, seed=21).to(dtype)
    got = gradients(score, v, routing, made, d_o, backend)
    names = ["o", *(f"d_{n}" for n in LEAVES if n == "v" or getattr(score, n) is not None)]
    results = [made.o, *(getattr(got, n) for n in names[1:])]
    ideal = oracle(score, v, routing, F64, d_o)
    plain = oracle(score, v, routing, dtype, d_o) if dtype == BF16 else ideal
    for name, x, y, z in zip(names, results, ideal, plain, strict=True):
        compare(x, y, dtype, reference=z, name=name)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("pad", (False, True), ids=("masked", "padded"))
@pytest.mark.parametrize("backend, dtype", BACKENDS, ids=str)
def test_regions_with_an_option(backend, dtype, pad, option):
    q, k, v, routing = bilevel(dtype, pad)
    check(scored(option, q, k), v, routing, dtype, backend)


@pytest.mark.parametrize("causal, by_slot", ((False, False), (True, False), (True, True)))
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("backend, dtype", BACKENDS, ids=str)
def test_clusters_with_an_option(backend, dtype, option, causal, by_slot):
    q, k, v, routing = clusters(dtype, 9, 21, 4, own=True)
    routing = routing._replace(by_slot=by_slot)
    check(scored(option, q, k)._replace(causal=causal), v, routing, dtype, backend)


@pytest.mark.no_comparison
@pytest.mark.parametrize("backend, dtype", BACKENDS, ids=str)
def test_gradients_of_numbers_of_listed_keys_are_refused(backend, dtype):
    q, k, v, routing = clusters(dtype, 4, 6, 2)
    score = scored("all", q, k)
    made = forward(score, v, routing, backend)
    delta = torch.zeros_like(made.row[0])
    for name in ("bias", "key_bias", "key_gain"):
        want = WantGrad(**{name: True})
        with pytest.raises(NotImplementedError, match=f"d_{name}.*listed"):
            native.backward(score, v, routing, want, backend, d_w=made.o, row=made.row, delta=delta)


@pytest.fixture
def many_multiprocessors():
    _library.configure_emulator(multiprocessors=132)
    yield
    _library.configure_emulator()


SPLIT = (("emulate:simt", F32), ("emulate:simt", F64), ("emulate:sm80", BF16))


@pytest.mark.parametrize("option", (None, "all"))
@pytest.mark.parametrize("backend, dtype", SPLIT, ids=str)
@pytest.mark.usefixtures("many_multiprocessors")
def test_lists_are_cut_into_spans(backend, dtype, option):
    q, k, v, routing = clusters(dtype, 300, 290, 1)
    rows = routing.rows[..., :5].contiguous()
    routing = routing._replace(rows=rows, covers=False)
    score = Score(q, k, scale=0.4) if option is None else scored(option, q, k)
    made = forward(score, v, routing, backend)
    compare(
        made.o, oracle(score, v, routing, F64), dtype, reference=oracle(score, v, routing, dtype)
    )


@pytest.mark.usefixtures("many_multiprocessors")
@pytest.mark.parametrize("backend, dtype", (*SPLIT, ("cpu", F32)), ids=str)
def test_mixture_of_heads_decodes_in_spans(backend, dtype):
    q = randn(1, 1, 4, 16).to(dtype)
    k, v = (randn(1, 3000, 2, 16, seed=n).to(dtype) for n in (1, 2))
    gate = torch.tensor([0.7, 0.0, 0.3, 0.0], dtype=F32 if dtype == BF16 else dtype)[None, None]
    o = hw.moh_attention(q, k, v, gate, backend=backend)
    ideal = hw.moh_attention(*(x.double() for x in (q, k, v, gate)), backend="reference")
    plain = hw.moh_attention(q, k, v, gate, backend="reference")
    compare(o, ideal, dtype, reference=plain)
    assert_same_bits(o, hw.moh_attention(q, k, v, gate, backend=backend))
