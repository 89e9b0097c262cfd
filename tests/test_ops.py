# SPDX-License-Identifier: Apache-2.0
"""What every operator computes, on every backend that is there, driven by tests/specs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from backends import SAMPLE, every_case, identify, native_info, samples, targets
from headworks import _library
from headworks.testing import (
    LAYOUTS,
    assert_same_bits,
    check_case,
    compare,
    evaluate,
    restride_empty,
)
from specs import SPECS

pytestmark = pytest.mark.operator

COPIES = ("late", "early")
ORDERS = ("forward", "reverse", "shuffled")


@pytest.mark.parametrize(SAMPLE, list(every_case()))
def test_matches_reference(spec, case, backend, device, dtype):
    """Every output and gradient against the reference in fp64; or the stated limit of a backend."""
    if limit := spec.limit(backend, case):
        with pytest.raises(NotImplementedError, match=limit):
            spec.run(spec.make(case, dtype, device), case, backend)
        backend = "reference"
    check_case(spec, case, backend, dtype, device=device)


EMULATED = "spec, backend, dtype"
ONE = {"emulate:simt": (torch.float32,), "emulate:sm80": (torch.bfloat16,)}
EITHER = dict.fromkeys(ONE, (torch.float32, torch.bfloat16))


def emulated(dtypes):
    for spec in SPECS:
        for backend, _, dtype in targets(spec, emulated=True):
            if dtype in dtypes[backend]:
                yield pytest.param(spec, backend, dtype, id=identify(spec, backend, dtype))


def emulator_schedules():
    for target in emulated(ONE):
        for copies in COPIES:
            for order in ORDERS:
                name = identify(target.id, copies, order)
                yield pytest.param(*target.values, copies, order, id=name)


@pytest.mark.parametrize("spec, backend, dtype, copies, order", list(emulator_schedules()))
def test_emulated_schedules(spec, backend, dtype, copies, order):
    """Late and early landing of async copies, three thread orders: the same bits."""
    for case in spec.emulator_cases[:3]:
        check_case(spec, case, backend, dtype)
        tensors = spec.make(case, dtype)
        expected = evaluate(spec, case, backend, tensors)
        try:
            _library.configure_emulator(seed=7, order=order, copies=copies)
            actual = evaluate(spec, case, backend, tensors)
        finally:
            _library.configure_emulator()
        for name, x in expected.items():
            assert_same_bits(actual[name], x, f"{name} with {copies} copies, {order} threads")


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize(SAMPLE, samples((torch.float32, torch.bfloat16)))
def test_layouts(spec, case, backend, device, dtype, layout):
    """Inputs, states and cotangents of unusual strides; the memory between elements is NaN."""
    check_case(spec, case, backend, dtype, device=device, layout=layout)


# Of these some results are only steps to others, which native code refuses unless contiguous.
CONTIGUOUS = ("kmeans_route", "bilevel_route", "bilevel_routing_attention")


@pytest.mark.parametrize("layout", ("strided", "padded"))
@pytest.mark.parametrize(
    SAMPLE,
    [s for s in samples((torch.float32, torch.bfloat16)) if s.values[0].name not in CONTIGUOUS],
)
def test_layouts_of_outputs(spec, case, backend, device, dtype, layout):
    """As whoever calls native code may hand them over."""
    with restride_empty(layout):
        check_case(spec, case, backend, dtype, device=device)


@pytest.mark.parametrize(EMULATED, list(emulated(EITHER)))
def test_emulated_layouts(spec, backend, dtype):
    for case in spec.emulator_cases[:3]:
        for layout in LAYOUTS[1:]:
            check_case(spec, case, backend, dtype, layout=layout)


@pytest.mark.parametrize(EMULATED, list(emulated(ONE)))
def test_emulated_forward_alone(spec, backend, dtype):
    """Without gradients, for which a call keeps less and may skip more."""
    for case in spec.emulator_cases:
        if not spec.limit(backend, case):
            check_case(spec, case, backend, dtype, gradients=False)


@pytest.mark.parametrize(EMULATED, list(emulated(ONE)))
def test_emulated_gradient_alone(spec, backend, dtype):
    """That of the first input: those of the others are not made."""
    for case in spec.emulator_cases[:3]:
        tensors = spec.make(case, dtype)
        every = evaluate(spec, case, backend, tensors)
        one = evaluate(_only(spec, *spec.differentiable[:1]), case, backend, tensors)
        for name, x in one.items():
            assert_same_bits(x, every[name], f"{name} alone")


@pytest.mark.parametrize(SAMPLE, samples(gradients=True))
def test_zero_stride_gradient(spec, case, backend, device, dtype):
    """out.sum().backward() hands over a gradient of strides (0, 0, ...)."""
    grads = []
    for which in (backend, "reference"):
        tensors = spec.make(case, torch.float64 if which == "reference" else dtype, device)
        inputs = [tensors[n].requires_grad_() for n in spec.differentiable if n in tensors]
        outputs = [x for x in spec.run(tensors, case, which).values() if x.requires_grad]
        grads.append(torch.autograd.grad([x.sum() for x in outputs], inputs))
    for actual, oracle in zip(*grads, strict=True):
        compare(actual, oracle, dtype)


@pytest.mark.parametrize(SAMPLE, samples(gradients=True))
def test_each_output_alone(spec, case, backend, device, dtype):
    """A loss on one output only: the other cotangents are missing, not zero tensors."""
    names = spec.run(spec.make(case, dtype, device), case, backend).keys()
    for name in names:
        grads = []
        for which in (backend, "reference"):
            tensors = spec.make(case, torch.float64 if which == "reference" else dtype, device)
            wanted = [n for n in spec.differentiable if n in tensors]
            inputs = [tensors[n].requires_grad_() for n in wanted]
            x = spec.run(tensors, case, which)[name]
            if not x.requires_grad:  # without gradient on every backend
                continue
            weight = torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=device).view(x.shape)
            got = torch.autograd.grad((x * weight).sum(), inputs, allow_unused=True)
            grads.append([torch.zeros_like(i) if g is None else g
                          for g, i in zip(got, inputs, strict=True)])  # fmt: skip
        assert len(grads) in (0, 2)
        for n, actual, oracle in zip(wanted, *grads, strict=True) if grads else ():
            compare(actual, oracle, dtype, name=f"d_{n} of {name}")


@pytest.mark.parametrize(SAMPLE, samples(gradients=True))
def test_each_gradient_alone(spec, case, backend, device, dtype):
    """One input that requires grad at a time gives the gradient that all together give."""
    tensors = spec.make(case, dtype, device)
    every = evaluate(spec, case, backend, tensors)
    for name in [n for n in spec.differentiable if n in tensors]:
        one = evaluate(_only(spec, name), case, backend, tensors)
        assert_same_bits(one[f"d_{name}"], every[f"d_{name}"], f"d_{name} alone")


def _only(spec, *names):
    return type(spec)(**{**vars(spec), "differentiable": names})


@pytest.mark.parametrize(SAMPLE, samples((torch.float32, torch.bfloat16)))
def test_deterministic(spec, case, backend, device, dtype):
    """The same bits in every run and with any number of threads."""
    tensors = spec.make(case, dtype, device)
    expected = evaluate(spec, case, backend, tensors)
    for threads in (2, 1, 3, 4, 7, 8, 16):
        torch.set_num_threads(threads)
        actual = evaluate(spec, case, backend, tensors)
        for name, x in expected.items():
            assert_same_bits(actual[name], x, f"{name} with {threads} threads")


@pytest.mark.parametrize(SAMPLE, samples((torch.float32, torch.bfloat16), batched=True))
def test_batch_invariant(spec, case, backend, device, dtype):
    """A batch element has the same bits alone and among others, in any order."""
    tensors = spec.make(case, dtype, device)
    every = evaluate(spec, case, backend, tensors, gradients=False)
    flipped = {n: x.flip(0) for n, x in tensors.items()}
    for name, x in evaluate(spec, case, backend, flipped, gradients=False).items():
        assert_same_bits(x.flip(0), every[name], f"{name} in reverse order")
    for b in range(case.sizes["B"]):
        alone = {n: x[b : b + 1] for n, x in tensors.items()}
        for name, x in evaluate(spec, case, backend, alone, gradients=False).items():
            assert_same_bits(x, every[name][b : b + 1], f"{name} of batch element {b}")


@pytest.mark.parametrize(SAMPLE, samples((torch.float32, torch.bfloat16), gradients=True,
                                         batched=True))  # fmt: skip
def test_gradients_batch_invariant(spec, case, backend, device, dtype):
    """So are its gradients, with the cotangents that it has among others."""
    tensors = spec.make(case, dtype, device)
    names = [n for n in spec.differentiable if n in tensors]
    batch = case.sizes["B"]

    def gradients(tensors, cotangents=None):
        inputs = {n: x.detach().requires_grad_(n in names) for n, x in tensors.items()}
        outputs = {n: x for n, x in spec.run(inputs, case, backend).items() if x.requires_grad}
        if cotangents is None:
            cotangents = {n: torch.randn_like(x) for n, x in outputs.items()}
        wanted = [inputs[n] for n in names]
        return cotangents, torch.autograd.grad(
            list(outputs.values()), wanted, [cotangents[n] for n in outputs]
        )

    cotangents, every = gradients(tensors)
    _, flipped = gradients(*({n: x.flip(0) for n, x in d.items()} for d in (tensors, cotangents)))
    for name, x, y in zip(names, flipped, every, strict=True):
        assert_same_bits(x.flip(0), y, f"d_{name} in reverse order")
    for b in range(batch):
        one = ({n: x[b : b + 1] for n, x in d.items()} for d in (tensors, cotangents))
        for name, x, y in zip(names, gradients(*one)[1], every, strict=True):
            assert_same_bits(x, y[b : b + 1], f"d_{name} of batch element {b}")


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_instruction_set(spec):
    """Each CPU instruction set that this machine has, chosen in the process."""
    names = native_info()["cpu"]["available"]
    assert names
    try:
        for name in names:
            _library.set_cpu_isa(name)
            for dtype in spec.dtypes["cpu"]:
                for case in spec.sample_cases:
                    check_case(spec, case, "cpu", dtype)
    finally:
        _library.set_cpu_isa()


def test_instruction_set_from_environment():
    """HEADWORKS_CPU_ISA chooses, and an unknown name is refused with the known ones."""
    code = (
        "import torch, headworks as hw; q = torch.ones(1, 3, 1, 4);"
        "print(hw.linear_attention(q, q, q).sum().item(), hw._library.info()['cpu']['isa'])"
    )
    runs = {}
    for name in ("baseline", "no-such-thing"):
        environment = {**os.environ, "HEADWORKS_CPU_ISA": name}
        runs[name] = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
    assert runs["baseline"].stdout.split() == ["12.0", "baseline"], runs["baseline"].stderr
    assert runs["no-such-thing"].returncode and "no-such-thing" in runs["no-such-thing"].stderr
    compare(torch.tensor(12.0), torch.tensor(12.0, dtype=torch.float64), torch.float32)
