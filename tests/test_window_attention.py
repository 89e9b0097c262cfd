# SPDX-License-Identifier: Apache-2.0
"""Window attention: the definition window by window, degenerate cases, the table, bad input."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

import headworks as hw
from headworks.testing import assert_same_bits, compare
from identities import Refused, allocates_nothing, randn
from routing_checks import cases_of, check_example, check_reference, on_both_backends
from specs import window_attention as spec

pytestmark = pytest.mark.operator

F64, F32 = torch.float64, torch.float32
attend = functools.partial(hw.window_attention, backend="reference")
on_both = on_both_backends(globals(), attend=hw.window_attention)


@pytest.mark.parametrize("case, dtype", cases_of(spec.SPEC))
def test_reference(case, dtype):
    check_reference(spec.SPEC, case, dtype)


def inputs(y=9, x=10, h=2, d=4, dv=3, b=1, hk=None):
    q = randn(b, y, x, h, d)
    k = randn(b, y, x, hk or h, d, seed=1)
    return q, k, randn(b, y, x, hk or h, dv, seed=2)


def partitioned(q, k, v, window, table, scale):
    """The usual way: images of whole windows, cut by view and permute, torch's attention with a
    bias [H, N, N] that an index over all pairs of offsets makes, as LeViT's code does."""
    size = window**2

    def cut(x):  # [B, Y, X, H, D] -> [B windows, H, N, D]
        parts = x.unflatten(1, (-1, window)).unflatten(3, (-1, window))
        return parts.permute(0, 1, 3, 5, 2, 4, 6).flatten(0, 2).flatten(2, 3)

    offsets, numbers = {}, []
    points = [(y, x) for y in range(window) for x in range(window)]
    for one in points:
        for other in points:
            offset = abs(one[0] - other[0]), abs(one[1] - other[1])
            numbers.append(offsets.setdefault(offset, len(offsets)))
    order = [dy * window + dx for dy, dx in offsets]
    bias = table[:, torch.tensor(order)][:, torch.tensor(numbers)].view(-1, size, size)
    o = F.scaled_dot_product_attention(cut(q), cut(k), cut(v), attn_mask=bias, scale=scale)
    rows, columns = q.shape[1] // window, q.shape[2] // window
    o = o.unflatten(2, (window, window)).unflatten(0, (-1, rows, columns))
    return o.permute(0, 1, 4, 2, 5, 3, 6).flatten(1, 2).flatten(2, 3)


@pytest.mark.parametrize("window", (1, 2, 7))
@pytest.mark.usefixtures("on_both")
def test_is_the_usual_way_of_whole_windows(window):
    q, k, v = inputs(2 * window, 3 * window, h=3, d=16, dv=8, b=2)
    table = randn(3, window**2, seed=3)
    given = [x.requires_grad_() for x in (q, k, v, table)]
    o = attend(q, k, v, window=window, bias_table=table, scale=0.3)
    want = partitioned(q, k, v, window, table, 0.3)
    compare(o.detach(), want.detach(), F64)
    d_o = randn(*o.shape, seed=4)
    made, wanted = (torch.autograd.grad(x, given, d_o) for x in (o, want))
    for actual, expected in zip(made, wanted, strict=True):
        compare(actual, expected, F64)


@pytest.mark.usefixtures("on_both")
def test_is_the_formula_pair_by_pair():
    q, k = randn(2, 1, 4, 6, 2, 3)
    v, table = randn(1, 4, 6, 2, 5, seed=1), randn(2, 4, seed=2)
    o = attend(q, k, v, window=2, bias_table=table)
    for y, x, h in itertools.product(range(4), range(6), range(2)):
        keys = [(y // 2 * 2 + i, x // 2 * 2 + j) for i in range(2) for j in range(2)]
        s = torch.stack([
            3**-0.5 * q[0, y, x, h] @ k[0, a, b, h] + table[h, abs(a - y) * 2 + abs(b - x)]
            for a, b in keys
        ])  # fmt: skip
        want = s.softmax(0) @ torch.stack([v[0, a, b, h] for a, b in keys])
        compare(o[0, y, x, h], want, F64)


@pytest.mark.parametrize("sizes", ((9, 11), (4, 3), (1, 1)), ids=str)
@pytest.mark.usefixtures("on_both")
def test_a_window_over_the_image_is_full_attention(sizes):
    q, k, v = inputs(*sizes, h=4, hk=2, b=2)
    flat = [x.flatten(1, 2) for x in (q, k, v)]
    full = hw.attention(*flat, backend="reference").unflatten(1, sizes)
    for window in (sizes, (sizes[0] + 5, sizes[1]), 20):
        compare(attend(q, k, v, window=window), full, F64)


@pytest.mark.usefixtures("on_both")
def test_windows_of_one_token_give_its_value():
    q, k, v = inputs()
    compare(attend(q, k, v, window=1, bias_table=randn(2, 1, seed=3)), v, F64)


@pytest.mark.usefixtures("on_both")
def test_a_window_knows_nothing_of_the_others():
    """What stands outside a window changes no bit inside it."""
    q, k, v = inputs(9, 10, b=2)
    table = randn(2, 20, seed=3)
    o = attend(q, k, v, window=(4, 5), bias_table=table)
    others = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    for y, x in ((0, 0), (4, 5), (8, 5)):
        part = (slice(1, 2), slice(y, y + 4), slice(x, x + 5))
        for nan, given in zip(others, (q, k, v), strict=True):
            nan[part] = given[part]
        alone = attend(*others, window=(4, 5), bias_table=table)[part]
        assert_same_bits(alone.contiguous(), o[part].contiguous())


@pytest.mark.usefixtures("on_both")
def test_the_table_is_of_distances():
    """A row and column of scores where one distance alone has a bias that decides."""
    q, k, v = (torch.zeros(1, 4, 5, 1, n, dtype=F64) for n in (2, 2, 20))
    v[0] = torch.eye(20, dtype=F64).view(4, 5, 1, 20)
    for dy, dx in ((0, 0), (0, 3), (2, 0), (1, 4), (3, 2)):
        table = torch.full((1, 20), -1e4, dtype=F64)
        table[0, dy * 5 + dx] = 0
        p = attend(q, k, v, window=(4, 5), bias_table=table).view(4, 5, 4, 5)
        for y, x in ((0, 0), (1, 2), (3, 4)):
            at = [(y + a, x + b) for a in {dy, -dy} for b in {dx, -dx}]
            seen = [(a, b) for a, b in at if 0 <= a < 4 and 0 <= b < 5]
            want = torch.zeros(4, 5, dtype=F64)
            for a, b in seen:
                want[a, b] = 1 / len(seen)
            if seen:  # otherwise all distances are as unlikely
                compare(p[y, x], want, F64)


def test_the_gradient_of_the_table_is_the_same_however_many_threads_there_are():
    """The bits of the sum depend on shapes alone."""
    q, k, v = (x.float() for x in inputs(21, 25, h=4, d=16, dv=16, b=3))
    table = randn(4, 49, dtype=F32, seed=3).requires_grad_()
    threads = torch.get_num_threads()
    made = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            o = hw.window_attention(q, k, v, window=7, bias_table=table)
            made.append(torch.autograd.grad(o, table, randn(*o.shape, dtype=F32, seed=4))[0])
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(made[0], made[1])
    assert_same_bits(made[0], made[2])


@pytest.mark.parametrize("dtype", (F32, torch.bfloat16), ids=str)
def test_batch_neighbours_change_no_bit_beside_a_table(dtype):
    q, k, v = (x.to(dtype) for x in inputs(9, 10, h=4, hk=2, d=16, dv=16, b=3))
    table = randn(4, 20, dtype=dtype, seed=3)

    def call(*images):
        given = [x.detach().requires_grad_() for x in images[:3]]
        o = hw.window_attention(*given, window=(4, 5), bias_table=table)
        return o.detach(), *torch.autograd.grad(o, given, images[3])

    d_o = randn(*q.shape, dtype=dtype, seed=4)
    every = call(q, k, v, d_o)
    for b in range(3):
        for x, y in zip(call(*(x[b : b + 1] for x in (q, k, v, d_o))), every, strict=True):
            assert_same_bits(x, y[b : b + 1].contiguous())


def test_a_table_of_another_dtype_is_rounded():
    q, k, v = (x.to(torch.bfloat16) for x in inputs())
    table = randn(2, 20, dtype=F32, seed=3).requires_grad_()
    o = hw.window_attention(q, k, v, window=(4, 5), bias_table=table)
    rounded = table.detach().to(torch.bfloat16)
    assert_same_bits(o.detach(), hw.window_attention(q, k, v, window=(4, 5), bias_table=rounded))
    (d_table,) = torch.autograd.grad(o.sum(), table)
    assert d_table.dtype == F32


def test_autocast():
    q, k, v = (x.float() for x in inputs())
    table = randn(2, 20, dtype=F32, seed=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = hw.window_attention(q, k, v, window=(4, 5), bias_table=table)
    rounded = [x.to(torch.bfloat16) for x in (q, k, v, table)]
    expected = hw.window_attention(*rounded[:3], window=(4, 5), bias_table=rounded[3])
    assert_same_bits(o, expected)


@pytest.mark.no_comparison
def test_example():
    check_example(hw.window_attention)


Q, K, V = (randn(2, 6, 8, 4, 8, dtype=F32, seed=seed) for seed in range(3))
TABLE = randn(4, 12, dtype=F32)
CASES = [
    Refused(TypeError, "v", "a list", v=[1.0]),
    Refused(ValueError, "q", "[6, 8, 4, 8]", "[B, Y, X, H, D]", q=Q[0]),
    Refused(ValueError, "k", "[2, 5, 8, 4, 8]", "[2, 6, 8, 4, 8]", k=K[:, :5], v=V[:, :5]),
    Refused(ValueError, "v", "[2, 6, 7, 4, 8]", v=V[:, :, 1:]),
    Refused(ValueError, "k", "[2, 6, 8, 4, 4]", k=K[..., :4]),
    Refused(ValueError, "heads of q", "4", "multiple of k's 3", k=K[:, :, :, :3],
            v=V[:, :, :, :3]),
    Refused(ValueError, "head dimension D of q", "0", q=Q[..., :0], k=K[..., :0]),
    Refused(TypeError, "k", "float64", k=K.double()),
    Refused(TypeError, "q", "int64", q=Q.long(), k=K.long(), v=V.long()),
    Refused(RuntimeError, "k", "meta", k=K.to("meta")),
    Refused(ValueError, "window", "(0, 4)", "from 1 to 32767", window=(0, 4)),
    Refused(ValueError, "window", "(-7, -7)", window=-7),
    Refused(ValueError, "window", "32768", window=(4, 2**15)),
    Refused(TypeError, "window", "(3, 4, 5)", window=(3, 4, 5)),
    Refused(TypeError, "window", "3.0", window=(3.0, 4)),
    Refused(TypeError, "window", "None", window=None),
    Refused(TypeError, "window", "True", window=True),
    Refused(ValueError, "bias_table", "[4, 9]", "[4, 12]", bias_table=TABLE[:, :9]),
    Refused(ValueError, "bias_table", "[2, 12]", bias_table=TABLE[:2]),
    Refused(ValueError, "bias_table", "[4, 3, 4]", bias_table=TABLE.view(4, 3, 4)),
    Refused(TypeError, "bias_table", "int64", bias_table=TABLE.long()),
    Refused(TypeError, "bias_table", "int", bias_table=3),
    Refused(RuntimeError, "bias_table", "meta", bias_table=TABLE.to("meta")),
    Refused(TypeError, "scale", "str", scale="big"),
    Refused(ValueError, "scale", "inf", scale=float("inf")),
    Refused(ValueError, "backend", "'gpu'", backend="gpu"),
    Refused(RuntimeError, "device", "cpu", backend="simt"),
]  # fmt: skip


@pytest.mark.no_comparison
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_bad_input(case, monkeypatch):
    arguments = {"q": Q, "k": K, "v": V, "window": (3, 4), "bias_table": TABLE} | case.arguments
    allocates_nothing(monkeypatch)
    case.check(lambda: hw.window_attention(**arguments))


OPERATOR_CASES = [
    ("columns", r"windows is 1 windows of 3 x 4 side by side", {"columns": 1}),
    ("width", "windows is", {"width": 0}),
    ("image", "sizes is an image of 5 x 8", {"image_height": 5}),
    ("table", "bias_table is 12 columns; expected 6", {"height": 2, "width": 3, "columns": 3}),
]


@pytest.mark.no_comparison
@pytest.mark.parametrize("name, words, change", OPERATOR_CASES, ids=lambda x: str(x)[:9])
def test_operators_refuse_windows_that_do_not_fit(name, words, change):
    q, k, v = (x.flatten(1, 2) for x in (Q, K, V))
    numbers = {"scale": 1.0, "columns": 2, "height": 3, "width": 4, "image_height": 6,
               "image_width": 8} | change  # fmt: skip
    with pytest.raises(ValueError, match=words):
        torch.ops.headworks.window_attention_fwd(q, k, TABLE, v, **numbers, want_row=False,
                                                 backend="cpu")  # fmt: skip
