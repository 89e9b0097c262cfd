# SPDX-License-Identifier: Apache-2.0
"""What native code makes of arguments that no Python function would give it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from backends import native_info
from headworks import _library
from specs import SPECS

TESTS = Path(__file__).parent
MUTATIONS = 1000


@pytest.mark.parametrize("seed", [0, 1])
def test_mangled_calls_never_crash(seed):
    """Mutations of real calls raise a Python exception or compute something."""
    path = os.pathsep.join([str(TESTS), *sys.path])
    ran = subprocess.run(
        [sys.executable, str(TESTS / "mangle.py"), str(seed), str(MUTATIONS)],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    last = [line for line in ran.stdout.splitlines() if line][-3:]
    assert ran.returncode == 0, (ran.returncode, last, ran.stderr[-2000:])
    refused = re.fullmatch(rf"lived: {MUTATIONS} calls, (\d+) refused", last[-1])
    assert refused is not None and int(refused[1]) > MUTATIONS / 3


def calls_of(function, **sizes):
    """Tensors of a call of attention.forward."""
    n = {"B": 2, "S": 3, "K": 4, "Q": 4, "H": 2, "D": 8, "V": 8} | sizes
    q = torch.zeros(n["B"], n["S"], n["Q"], n["D"])
    k = torch.zeros(n["B"], n["K"], n["H"], n["D"])
    v = torch.zeros(n["B"], n["K"], n["H"], n["V"])
    tensors = [q, k, *[None] * 6, v, None, None, None, torch.empty((*q.shape[:3], n["V"])),
               *[None] * 7]  # fmt: skip
    scalars = [1.0, 0.0, 0, -1, -1, 0, 0, 0, n["S"], n["S"], n["K"], 1]
    return _library.function(function), tensors, scalars


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda t, s: (t.pop(), t.pop()), ValueError, "got 18 tensors, expected 19, or 20"),
        (lambda t, s: s.pop(), ValueError, "got 11 scalars, expected 12"),
        (lambda t, s: t.__setitem__(0, None), ValueError, "at least its first tensor"),
        (lambda t, s: t.__setitem__(1, None), ValueError, "k is missing"),
        (lambda t, s: t.__setitem__(1, t[1].double()), TypeError, "k is of float64, expected"),
        (lambda t, s: t.__setitem__(8, t[8][:, :3]), ValueError, r"v \[BKHV\] has size 3"),
        (lambda t, s: t.__setitem__(8, t[8][0]), ValueError, "v has 3 dimensions, expected 4"),
        (lambda t, s: t.__setitem__(12, None), ValueError, "v and o go together"),
        (lambda t, s: s.__setitem__(9, 4), ValueError, "longest sequences"),
        (lambda t, s: s.__setitem__(3, 0.5), ValueError, "expected an integer"),
        (lambda t, s: s.__setitem__(3, float("nan")), ValueError, "expected an integer"),
        (lambda t, s: s.__setitem__(2, 2), ValueError, "expected 0 or 1"),
        (lambda t, s: s.__setitem__(5, 5), ValueError, "no activation 5"),
    ],
)
def test_what_is_said_of_a_wrong_call(change, error, message):
    fn, tensors, scalars = calls_of("attention.forward")
    change(tensors, scalars)
    with pytest.raises(error, match=message):
        _library.call(fn, "cpu", tensors, scalars)


def test_bounds_of_packed_sequences_are_looked_at():
    fn, tensors, scalars = calls_of("attention.forward", B=1, S=6, K=6)
    good = torch.tensor([0, 2, 6])
    for wrong in ([0, 7, 6], [0, 4, 7], [-1, 2, 6], [0, -(2**62), 6], []):
        tensors[6], tensors[7] = torch.tensor(wrong, dtype=torch.int64), good[: len(wrong)]
        with pytest.raises(ValueError, match="cu_seqlens"):
            _library.call(fn, "cpu", tensors, scalars)
    tensors[6] = tensors[7] = good
    _library.call(fn, "cpu", tensors, scalars)


def routing_call(rows, keys, **changes):
    """routing_attention.forward of one head of 4 tokens, whose cells are tokens."""
    _, tensors, scalars = calls_of("attention.forward", B=1, S=4, K=4, Q=1, H=1)
    for i, x in changes.items():
        tensors[int(i[1:])] = x
    cells = [4, 1, 1, 1, 4]
    fn = _library.function("routing_attention.forward")
    return fn, [rows, keys, *tensors], [*cells, *cells, 0, 0, 0, 0.0, *scalars]


def test_lists_that_go_with_nothing_else():
    rows = torch.arange(4)[None, None, None]  # [B, Hq, G, N]
    fn, tensors, scalars = routing_call(rows, rows)
    _library.call(fn, "cpu", tensors, scalars)
    for softcap in (0.5, 1.0, 2.0):
        capped = list(scalars)
        capped[15] = softcap
        with pytest.raises(ValueError, match="listed keys go with plain scores"):
            _library.call(fn, "cpu", tensors, capped)
    shapes = {"t2": (1, 1, 4, 4), "t3": (1, 1, 4), "t4": (1, 1, 4), "t5": (1, 4, 1)}
    for i, shape in shapes.items():
        fn, tensors, scalars = routing_call(rows, rows, **{i: torch.zeros(shape)})
        with pytest.raises(ValueError, match="listed keys go with plain scores"):
            _library.call(fn, "cpu", tensors, scalars)
        fn, tensors, scalars = routing_call(rows, None, **{i: torch.zeros(shape)})
        _library.call(fn, "cpu", tensors, scalars)
    two = rows.expand(1, 1, 2, 4)
    fn, tensors, scalars = routing_call(two, None)
    with pytest.raises(ValueError, match="all keys go with one list of rows"):
        _library.call(fn, "cpu", tensors, scalars)


EMULATED = ["emulate:simt", "emulate:sm80"] if native_info().get("emulator") else []


@pytest.mark.parametrize("backend", ["cpu", *EMULATED])
def test_what_is_mixed_in_lies_where_the_row_does(backend):
    """On a GPU nobody looks at bounds: whatever they are, no value beyond the tensor is read."""
    fn, tensors, scalars = calls_of("attention.forward", B=1, S=6, K=6, D=16, V=16)
    dtype = torch.bfloat16 if backend.endswith("sm80") else torch.float32
    tensors[:2], v = (x.to(dtype) for x in tensors[:2]), torch.randn(1, 6, 2, 16).to(dtype)
    tensors[6], tensors[7] = torch.tensor([0, 2, 6]), torch.tensor([0, 4, 6])
    tensors[8], tensors[10] = v, torch.ones(1, 4)
    tensors[12] = torch.empty(1, 6, 4, 16, dtype=dtype)
    _library.call(fn, backend, tensors, scalars)
    assert torch.equal(tensors[12], v.repeat_interleave(2, 2))


def test_means_of_regions_lie_together():
    """What the means and the scores of bilevel_route step through without strides."""
    means, image = torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 4, 2, 8)
    apart, scores = torch.zeros(1, 4, 8, 2).transpose(2, 3), torch.zeros(1, 1, 4, 4)
    calls = [("means", [image, apart], [2, 2, 2, 4, 4])]
    calls += [("scores", [*pair, scores], []) for pair in ((apart, means), (means, apart))]
    for name, tensors, scalars in calls:
        with pytest.raises(ValueError, match="contiguous"):
            _library.call(_library.function(f"bilevel_route.{name}"), "cpu", tensors, scalars)


def test_every_spec_was_mangled():
    """The recorder sees every native function."""
    from mangle import recorded

    seen = {call[0] for call in recorded()}
    numbers = {name: _library.function(name) for name in _library._numbers}
    missing = [name for name, n in numbers.items() if n not in seen]
    assert len(SPECS) > 10 and not missing, missing
