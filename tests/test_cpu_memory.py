# SPDX-License-Identifier: Apache-2.0
"""CPU kernels stay inside their tensors, and reach every place of large ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from headworks.testing import compare, evaluate
from specs import SPECS

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
BEYOND = 2**31  # elements


def guarded(what):
    """tests/guarded.py in a process of its own, which an access beyond a tensor kills."""
    folders = [str(TESTS), str(TESTS.parent / "python"), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, str(TESTS / "guarded.py"), what],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@pytest.mark.parametrize("side", ("before", "behind"))
def test_the_guard_is_noticed(side):
    done = guarded(side)
    assert done.returncode == -signal.SIGSEGV, done.stdout + done.stderr
    assert "inside" in done.stdout and "outside" not in done.stdout


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_no_access_beyond_a_tensor(spec):
    """Sample cases with every dtype and instruction set, pages out of bounds on either side."""
    done = guarded(spec.name)
    last = "\n".join(done.stdout.splitlines()[-2:])
    assert done.returncode == 0, f"{done.returncode} in {last}\n{done.stderr[-3000:]}"
    assert last.endswith("done")


def far(x, dim, folder, name):
    """The values of x, neighbours along `dim` so far apart that the last is 2^31 elements away.

    The file behind it is sparse: pages that nobody touches take no room.
    """
    rest = x.numel() // x.shape[dim]
    step = max(-(-BEYOND // (x.shape[dim] - 1)), rest)
    stride, strides = 1, []
    for i in reversed(range(x.dim())):
        strides.insert(0, step if i == dim else stride)
        stride *= 1 if i == dim else x.shape[i]
    size = step * (x.shape[dim] - 1) + rest
    storage = torch.from_file(str(folder / name), shared=True, size=size, dtype=x.dtype)
    return storage.as_strided(x.shape, strides).copy_(x)


def spreads():
    """Spec, case, dimension, names of the tensors with neighbours along it. Along the sequence
    every place touches a page of its own, and the case is a short one."""
    for spec in SPECS:
        for dim in range(3):
            case = spec.emulator_cases[0] if dim == 1 else spec.sample_cases[0]
            tensors = spec.make(case, torch.float32)
            names = [n for n, x in tensors.items() if x.dim() > dim + 1 and x.shape[dim] > 1]
            if names:
                yield pytest.param(spec, case, dim, names, id=f"{spec}-{dim}")


@pytest.mark.operator
@pytest.mark.parametrize("spec, case, dim, names", list(spreads()))
def test_offsets_beyond_2_31(spec, case, dim, names, tmp_path):
    """Along each dimension, values and gradients as for compact tensors."""
    tensors = spec.make(case, torch.float32)
    expected = evaluate(spec, case, "cpu", tensors)
    spread = {n: far(x, dim, tmp_path, n) if n in names else x for n, x in tensors.items()}
    assert all((spread[n].shape[dim] - 1) * spread[n].stride(dim) >= BEYOND for n in names)
    for name, x in evaluate(spec, case, "cpu", spread).items():
        compare(x, expected[name], torch.float32, name=f"{spec}: {name}")
