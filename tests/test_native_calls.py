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
from headworks._functions import NativeFunction
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


def named(function, given, numbers):
    """A call's tensors and scalars, from those given by name; the others are absent."""
    f = NativeFunction(function)
    tensors = [given.get(a.name) for a in (*f.inputs, *f.outputs)]
    return f.number, tensors, [numbers[a.name] for a in f.scalars]


def places(function):
    """Where each argument of a call is, by name."""
    f = NativeFunction(function)
    tensors = {a.name: i for i, a in enumerate((*f.inputs, *f.outputs))}
    return tensors, {a.name: i for i, a in enumerate(f.scalars)}


NUMBERS = {
    "scale": 1.0, "softcap": 0.0, "causal": 0, "left": -1, "right": -1, "activation": 0,
    "normalizer": 0, "gain_begin": 0, "gain_end": 0, "max_q": 8, "max_k": 8, "skip_dead": 1,
}  # fmt: skip


def calls_of(function="attention.forward", more=None, **sizes):
    """A call of attention.forward, or of one that has its arguments and more."""
    n = {"B": 2, "S": 3, "K": 4, "Q": 4, "H": 2, "D": 8, "V": 8} | sizes
    q = torch.zeros(n["B"], n["S"], n["Q"], n["D"])
    k = torch.zeros(n["B"], n["K"], n["H"], n["D"])
    v = torch.zeros(n["B"], n["K"], n["H"], n["V"])
    given = {"q": q, "k": k, "v": v, "o": torch.empty((*q.shape[:3], n["V"]))}
    tensors, numbers = more or ({}, {})
    return named(function, given | tensors, NUMBERS | numbers)


TENSORS, SCALARS = places("attention.forward")
COUNT = len(TENSORS)


def spoilt(name, value):
    """A change of a call: an argument by name."""

    def change(tensors, scalars):
        if name in TENSORS:
            x = tensors[TENSORS[name]]
            tensors[TENSORS[name]] = value(x) if callable(value) else value
        else:
            scalars[SCALARS[name]] = value

    return change


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda t, s: t.pop(), ValueError, f"got {COUNT - 1} tensors, expected {COUNT}"),
        (lambda t, s: t.append(None), ValueError, f"got {COUNT + 1} tensors, expected {COUNT}"),
        (lambda t, s: s.pop(), ValueError, f"got {len(SCALARS) - 1} scalars, expected "),
        (spoilt("q", None), ValueError, "q is missing"),
        (spoilt("k", None), ValueError, "k is missing"),
        (spoilt("k", torch.Tensor.double), TypeError, "k is of float64, expected"),
        (spoilt("v", lambda v: v[:, :3]), ValueError, r"v \[B Sk H Dv\] has size 3"),
        (spoilt("v", lambda v: v[0]), ValueError, "v has 3 dimensions, expected 4"),
        (spoilt("o", None), ValueError, "v and o go together"),
        (spoilt("bias", torch.zeros(1, 3, 1, 4)), ValueError, r"bias .* has size 3 at dimension 1"),
        (spoilt("left", 0.5), TypeError, "left is a float, expected an integer"),
        (spoilt("causal", 2), ValueError, "causal is 2, expected 0 or 1"),
        (spoilt("activation", 5), ValueError, "there is no activation 5"),
    ],
)
def test_what_is_said_of_a_wrong_call(change, error, message):
    fn, tensors, scalars = calls_of("attention.forward")
    change(tensors, scalars)
    with pytest.raises(error, match=message):
        _library.call(fn, "cpu", tensors, scalars)


@pytest.mark.parametrize("wanted", ["w", "row", "entropy", "p_max", "sq_norm", "mass"])
def test_what_is_wanted_of_all_rows_does_not_go_with_skip_dead(wanted):
    rows = torch.empty(2, 4, 3)  # [B, Hq, Sq]
    results = {"w": torch.empty(2, 3, 4, 8), "row": torch.empty(2, *rows.shape)}
    given = {wanted: results.get(wanted, rows)}
    if wanted == "mass":
        given["mass_keys"] = torch.ones(2, 4, 4)
    with pytest.raises(ValueError, match="skip_dead leaves out rows"):
        _library.call(*with_backend(calls_of(more=(given, {}))))
    _library.call(*with_backend(calls_of(more=(given, {"skip_dead": 0}))))


def test_bounds_of_packed_sequences_are_looked_at():
    good = torch.tensor([0, 2, 6])
    for wrong in ([0, 7, 6], [0, 4, 7], [-1, 2, 6], [0, -(2**62), 6], []):
        bounds = {"cu_seqlens_q": torch.tensor(wrong, dtype=torch.int64)}
        bounds["cu_seqlens_k"] = good[: len(wrong)]
        fn, tensors, scalars = calls_of(more=(bounds, {}), B=1, S=6, K=6)
        with pytest.raises(ValueError, match="cu_seqlens"):
            _library.call(fn, "cpu", tensors, scalars)
    both = {"cu_seqlens_q": good, "cu_seqlens_k": good}
    fn, tensors, scalars = calls_of(more=(both, {"max_q": -1}), B=1, S=6, K=6)
    with pytest.raises(ValueError, match="longest sequences have -1 and 6 tokens"):
        _library.call(fn, "cpu", tensors, scalars)
    fn, tensors, scalars = calls_of(more=(both, {}), B=1, S=6, K=6)
    _library.call(fn, "cpu", tensors, scalars)


def routing_call(rows, keys, tensors=(), **numbers):
    """routing_attention.forward of one head of 4 tokens, whose regions are tokens."""
    grid = {"columns": 4, "height": 1, "width": 1, "image_height": 1, "image_width": 4}
    grids = {f"{side}_{name}": n for side in ("row", "key") for name, n in grid.items()}
    flags = {"by_slot": 0, "pad_keys": 0, "mask_self": 0, "mean_eps": 0.0}
    given = {"rows": rows, "keys": keys, **dict(tensors)}
    return calls_of(
        "routing_attention.forward", (given, grids | flags | numbers), B=1, S=4, K=4, Q=1, H=1
    )


def test_lists_that_go_with_nothing_else():
    rows = torch.arange(4)[None, None, None]  # [B, Hq, G, N]
    _library.call(*with_backend(routing_call(rows, rows)))
    with pytest.raises(ValueError, match="go with no window to the left"):
        _library.call(*with_backend(routing_call(rows, rows, pad_keys=1, left=2)))
    with pytest.raises(ValueError, match="mask_self is of listed keys"):
        _library.call(*with_backend(routing_call(rows, None, mask_self=1)))
    with pytest.raises(ValueError, match="by slot w and row are made"):
        _library.call(*with_backend(routing_call(rows, rows, by_slot=1)))
    with pytest.raises(ValueError, match="all keys go with one list of rows"):
        _library.call(*with_backend(routing_call(rows.expand(1, 1, 2, 4), None)))


def with_backend(call, backend="cpu"):
    fn, tensors, scalars = call
    return fn, backend, tensors, scalars


EMULATED = ["emulate:simt", "emulate:sm80"] if native_info().get("emulator") else []


@pytest.mark.parametrize("backend", ["cpu", *EMULATED])
def test_what_is_mixed_in_lies_where_the_row_does(backend):
    """On a GPU nobody looks at bounds: whatever they are, no value beyond the tensor is read."""
    dtype = torch.bfloat16 if backend.endswith("sm80") else torch.float32
    q, k, v = torch.zeros(1, 6, 4, 16), torch.zeros(1, 6, 2, 16), torch.randn(1, 6, 2, 16)
    q, k, v, o = (x.to(dtype) for x in (q, k, v, torch.empty(1, 6, 4, 16)))
    bounds = {"cu_seqlens_q": torch.tensor([0, 2, 6]), "cu_seqlens_k": torch.tensor([0, 4, 6])}
    given = {"q": q, "k": k, "v": v, "o": o, "identity_mix": torch.ones(1, 4), **bounds}
    fn, tensors, scalars = named("attention.forward", given, NUMBERS)
    _library.call(fn, backend, tensors, scalars)
    assert torch.equal(o, v.repeat_interleave(2, 2))


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
    numbers = {name: _library.function(name) for name in _library._functions}
    missing = [name for name, n in numbers.items() if n not in seen]
    assert len(SPECS) > 10 and not missing, missing
