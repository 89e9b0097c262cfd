# SPDX-License-Identifier: Apache-2.0
"""Inner products of rows with rows, which backward passes are made of: attention.row_dot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headworks._native import ACCUMULATION
from headworks.ops.attention import _native as native
from headworks.ops.attention._operators import row_dot

BACKENDS = ("cpu", "emulate:simt", "emulate:sm80")
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *HALVES)

# How rows lie in memory, of [2, 75, 3, width]: more than a block of a kernel, a task of the CPU.
LAYOUTS = {
    "contiguous": lambda x: x,
    "heads before tokens": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "columns apart": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "an element off": lambda x: torch.cat([x[..., :1], x], -1)[..., 1:],
    "one for all": lambda x: x[:1, :1, :1, :1].expand(x.shape),
    "one row": lambda x: x[:, :1].expand(x.shape),
}


def rows(width: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(2, 75, 3, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(b, d) for b in BACKENDS for d in DTYPES if d in HALVES or b != "emulate:sm80"],
)
@pytest.mark.parametrize("width", [1, 7, 8, 64, 72, 130])
def test_products_of_rows(width, backend, dtype):
    y = rows(width, dtype, 1)
    for name, lay in LAYOUTS.items():
        x = lay(rows(width, dtype, 0))
        for left, right in ((x, y), (y, x)):
            got = row_dot(left, right, backend)
            assert got.shape == y.shape[:3] and got.dtype == ACCUMULATION[dtype], name
            terms = left.double() * right.double()
            error = (got.double() - terms.sum(-1)).abs()
            most = width * torch.finfo(got.dtype).eps * terms.abs().sum(-1)
            assert (error <= most).all(), f"{name}: {error.max():.3g}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5, 3, 8), (2, 0, 3, 8), (2, 5, 0, 8), (2, 5, 3, 0)])
def test_nothing_to_multiply(shape, backend):
    x = torch.ones(shape)
    assert torch.equal(row_dot(x, x, backend), torch.zeros(shape[:3]))


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_the_same_bits_in_any_number_of_threads(threads):
    x, y = torch.randn(2, 3, 300, 4, 33)
    before = torch.get_num_threads()
    alone = row_dot(x, y, "cpu")
    torch.set_num_threads(threads)
    try:
        assert torch.equal(row_dot(x, y, "cpu"), alone)
    finally:
        torch.set_num_threads(before)


def test_delta_lies_as_the_backward_pass_reads_it():
    x = torch.randn(2, 5, 3, 8)
    assert native.row_dot(x, x, "cpu").is_contiguous()


def test_the_operator_checks_its_tensors():
    x = torch.ones(2, 5, 3, 8)
    for y, error in ((x[:, :4], ValueError), (x.double(), TypeError), (x[0], ValueError)):
        with pytest.raises(error, match="attention_row_dot: y"):
            torch.ops.headworks.attention_row_dot(x, y, "cpu")


def test_the_operator_in_a_graph():
    x, y = torch.randn(2, 2, 5, 3, 8)
    compiled = torch.compile(lambda x, y: row_dot(x, y, "cpu"), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, y), row_dot(x, y, "cpu"))
