# SPDX-License-Identifier: Apache-2.0
"""What holds for every operator, on every backend that is there, driven by tests/specs."""

from __future__ import annotations

import doctest
import functools
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad

import headworks as hw
from headworks import _library
from headworks.testing import (
    HALF,
    LAYOUTS,
    assert_same_bits,
    check_case,
    compare,
    evaluate,
)
from specs import SPECS

pytestmark = pytest.mark.operator

# Deprecations of torch's own making.
INSIDE_TORCH = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

COPIES = ("late", "early")
ORDERS = ("forward", "reverse", "shuffled")


@functools.cache
def native_info():
    """What the native library contains; nothing if it is missing, where the cpu tests fail."""
    try:
        return _library.info()
    except ImportError:
        return {}


def targets(spec, *, emulated=None):
    """(backend, device, dtype) of every compiled backend that can run here."""
    found = []
    for backend, dtypes in spec.dtypes.items():
        if backend == "cpu":
            places = [("cpu", "cpu", False)]
        else:
            places = [(f"emulate:{backend}", "cpu", True)] if native_info().get("emulator") else []
            needed = {"simt": (7, 5), "sm80": (8, 0), "sm90": (9, 0)}[backend]
            if torch.cuda.is_available() and torch.cuda.get_device_capability() >= needed:
                places.append((backend, "cuda", False))
        found += [
            (name, device, dtype)
            for name, device, is_emulated in places
            if emulated is None or emulated == is_emulated
            for dtype in dtypes
        ]
    return found


def identify(*parts):
    return "-".join(str(p).removeprefix("torch.") for p in parts)


def every_case():
    for spec in SPECS:
        for emulated, cases in ((False, spec.cases), (True, spec.emulator_cases)):
            for target in targets(spec, emulated=emulated):
                for case in cases:
                    yield pytest.param(spec, case, *target, id=identify(spec, *target[::2], case))


def samples(dtypes=(torch.float32,), *, gradients=False, batched=False):
    """(spec, case, backend, device, dtype) of sample cases on real hardware."""
    return list(_samples(dtypes, gradients, batched))


def _samples(dtypes, gradients, batched):
    for spec in SPECS:
        if gradients and not spec.differentiable:
            continue
        for target in targets(spec, emulated=False):
            for case in spec.sample_cases if target[2] in dtypes else ():
                if spec.limit(target[0], case) or (batched and case.sizes.get("lengths")):
                    continue
                yield pytest.param(spec, case, *target, id=identify(spec, *target[::2], case))


SAMPLE = "spec, case, backend, device, dtype"


@pytest.mark.parametrize(SAMPLE, list(every_case()))
def test_matches_reference(spec, case, backend, device, dtype):
    """Every output and gradient against the reference in fp64; or the stated limit of a backend."""
    if limit := spec.limit(backend, case):
        with pytest.raises(NotImplementedError, match=limit):
            spec.run(spec.make(case, dtype, device), case, backend)
        backend = "reference"
    check_case(spec, case, backend, dtype, device=device)


def emulator_schedules():
    for spec in SPECS:
        for backend, _, dtype in targets(spec, emulated=True):
            if dtype != (torch.float32 if backend == "emulate:simt" else torch.bfloat16):
                continue
            for copies in COPIES:
                for order in ORDERS:
                    name = identify(spec, backend, dtype, copies, order)
                    yield pytest.param(spec, backend, dtype, copies, order, id=name)


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


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_emulated_layouts(spec):
    ran = targets(spec, emulated=True)
    if not ran:
        pytest.skip("the emulator is not built (preset emu)")
    for backend, _, dtype in ran:
        if dtype in (torch.float32, torch.bfloat16):
            for case in spec.emulator_cases[:3]:
                for layout in LAYOUTS[1:]:
                    check_case(spec, case, backend, dtype, layout=layout)


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


def _only(spec, name):
    return type(spec)(**{**vars(spec), "differentiable": (name,)})


@pytest.mark.parametrize(SAMPLE, samples((torch.float32, torch.bfloat16)))
def test_deterministic(spec, case, backend, device, dtype):
    """The same bits in every run and with 1, 2 and 3 threads."""
    tensors = spec.make(case, dtype, device)
    expected = evaluate(spec, case, backend, tensors)
    for threads in (2, 1, 3):
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


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=identify)
def test_opcheck(spec, dtype):
    """Schema, fake kernel and AOT dispatch of every torch operator."""
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for case in spec.sample_cases:
        tensors = spec.make(case, dtype)
        for operator, arguments in spec.operators(tensors, case):
            torch.library.opcheck(operator, arguments, test_utils=tests)
        check_case(spec, case, "cpu", dtype)


def _runner(spec, case, names, backend="cpu"):
    def run(*tensors):
        outputs = spec.run(dict(zip(names, tensors, strict=True)), case, backend)
        return tuple(outputs.values())

    return run


@INSIDE_TORCH
@pytest.mark.parametrize(SAMPLE, samples())
def test_compile(spec, case, backend, device, dtype):
    """torch.compile(fullgraph=True), forward and backward, with static and dynamic sizes."""
    tensors = spec.make(case, dtype, device)
    eager = evaluate(spec, case, backend, tensors)
    for dynamic in (False, True):
        compiled = torch.compile(spec.run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        graph = type(spec)(**{**vars(spec), "run": compiled})
        for name, x in evaluate(graph, case, backend, tensors).items():
            assert_same_bits(x, eager[name], f"{name}, compiled, dynamic={dynamic}")
        torch._dynamo.reset()


@INSIDE_TORCH
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_compile_inductor(spec):
    case = spec.sample_cases[0]
    tensors = spec.make(case, torch.float32)
    eager = evaluate(spec, case, "cpu", tensors)

    def around(tensors, case, backend):
        tensors = {n: x * 1 if x.is_floating_point() else x for n, x in tensors.items()}
        return {n: x * 1 for n, x in spec.run(tensors, case, backend).items()}

    compiled = torch.compile(around, fullgraph=True)
    graph = type(spec)(**{**vars(spec), "run": compiled})
    for name, x in evaluate(graph, case, "cpu", tensors).items():
        compare(x, eager[name], torch.float32, name=name)


@pytest.mark.parametrize("strict", (False, True), ids=("non-strict", "strict"))
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_export(spec, strict):
    for case in spec.sample_cases:
        tensors = spec.make(case, torch.float32)
        run = _runner(spec, case, tuple(tensors))

        class Module(torch.nn.Module):
            def forward(self, *tensors, run=run):
                return run(*tensors)

        with torch.no_grad():
            expected = run(*tensors.values())
            program = torch.export.export(Module(), tuple(tensors.values()), strict=strict)
            for x, y in zip(program.module()(*tensors.values()), expected, strict=True):
                assert_same_bits(x, y)


AUTOCAST = ("q", "k", "v", "s", "x", "bias")


@pytest.mark.parametrize("half", HALF, ids=identify)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_autocast(spec, half):
    """Mixed inputs are cast to the autocast dtype; gradients come back in each input's own."""
    case = spec.sample_cases[0]
    tensors = spec.make(case, torch.float32)
    second = list(tensors)[1]
    mixed = {**tensors, second: tensors[second].to(half)}
    cast = {n: x.to(half) if n in AUTOCAST else x for n, x in tensors.items()}
    expected = evaluate(spec, case, "cpu", cast)
    with torch.autocast("cpu", half):
        actual = evaluate(spec, case, "cpu", mixed)
    for name, x in expected.items():
        y = actual[name]
        if name.startswith("d_"):
            assert y.dtype == mixed[name[2:]].dtype
            y = y.to(x.dtype)
        assert_same_bits(y, x, name)
    with pytest.raises(TypeError, match=f"{second} is .*autocast"):
        evaluate(spec, case, "cpu", mixed)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_fake_and_meta(spec):
    """Shapes, dtypes and devices without data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for case in spec.sample_cases:
        tensors = spec.make(case, torch.bfloat16)
        real = evaluate(spec, case, "cpu", tensors, gradients=False)
        meta = {n: x.to("meta") for n, x in tensors.items()}
        found = [evaluate(spec, case, "auto", meta, gradients=False)]
        with FakeTensorMode() as mode:
            fake = {n: mode.from_tensor(x) for n, x in tensors.items()}
            found.append(evaluate(spec, case, "auto", fake, gradients=False))
        for outputs in found:
            for name, x in real.items():
                y = outputs[name]
                assert (y.shape, y.dtype, y.stride()) == (x.shape, x.dtype, x.stride()), name
        check_case(spec, case, "cpu", torch.bfloat16, gradients=False)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_negative_view(spec):
    """A lazily negated view is resolved, not read as its base."""
    case = spec.sample_cases[0]
    tensors = spec.make(case, torch.float32)
    name = next(iter(tensors))
    x = tensors[name]
    view = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert view.is_neg()
    expected = evaluate(spec, case, "cpu", tensors)
    for key, y in evaluate(spec, case, "cpu", {**tensors, name: view}, gradients=False).items():
        assert_same_bits(y, expected[key], key)


@INSIDE_TORCH
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_forward_mode_and_functorch(spec):
    """Refused by name on a compiled backend; never a silent zero tangent."""
    case = spec.sample_cases[0]
    tensors = spec.make(case, torch.float32)
    first = next(iter(tensors))

    def run(x):
        return spec.run({**tensors, first: x}, case, "cpu")["o"]

    x = tensors[first]
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        run(forward_ad.make_dual(x, torch.ones_like(x)))
    for call in (
        lambda: torch.func.jvp(run, (x,), (torch.ones_like(x),)),
        lambda: torch.func.grad(lambda y: run(y).sum())(x),
        lambda: torch.func.vmap(run)(x[None]),
    ):
        with pytest.raises(NotImplementedError, match=r"torch\.func.*reference"):
            call()
    compare(run(x), spec.run(tensors, case, "reference")["o"], torch.float32)


@INSIDE_TORCH
@pytest.mark.parametrize("spec", [s for s in SPECS if s.differentiable], ids=str)
def test_transforms_on_reference(spec):
    """What the error above promises: forward mode, vmap and double backward on the reference."""
    case = next(c for c in spec.sample_cases if c.sizes.get("lengths") is None)
    tensors = spec.make(case, torch.float64)
    first = next(iter(tensors))
    x = tensors[first]

    def run(x):
        return spec.run({**tensors, first: x}, case, "reference")["o"]

    tangent, step = torch.randn_like(x), 1e-6
    _, forward = torch.func.jvp(run, (x,), (tangent,))
    finite = (run(x + step * tangent) - run(x - step * tangent)) / (2 * step)
    compare(forward.float(), finite, torch.float32)
    compare(torch.func.vmap(run)(x[None])[0], run(x), torch.float64)
    y = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(run(y).square().sum(), y, create_graph=True)
    (gg,) = torch.autograd.grad(g.square().sum(), y)
    assert gg.abs().sum() > 0


@pytest.mark.parametrize("spec", [s for s in SPECS if s.differentiable], ids=str)
def test_double_backward_is_refused(spec):
    case = spec.sample_cases[0]
    tensors = spec.make(case, torch.float32)
    first = next(iter(tensors))
    x = tensors[first].requires_grad_()
    o = spec.run(tensors, case, "cpu")["o"]
    (g,) = torch.autograd.grad(o.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()
    compare(o, spec.run(tensors, case, "reference")["o"], torch.float32)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_inference_mode(spec):
    case = spec.sample_cases[0]
    tensors = spec.make(case, torch.float32)
    expected = evaluate(spec, case, "cpu", tensors, gradients=False)
    with torch.inference_mode():
        actual = spec.run(tensors, case, "cpu")
    for name, x in expected.items():
        assert_same_bits(actual[name].clone(), x, name)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_backend_that_cannot(spec):
    """An unknown name, a GPU backend on CPU tensors: refused with the remedy."""
    case = spec.sample_cases[0]
    tensors = spec.make(case, torch.float32)
    with pytest.raises(ValueError, match="backend is 'fast'; expected one of auto, reference, cpu"):
        spec.run(tensors, case, "fast")
    with pytest.raises(RuntimeError, match=r'expected cuda.*backend="emulate:simt"'):
        spec.run(tensors, case, "simt")
    check_case(spec, case, "cpu", torch.float32)


def test_backend_from_environment():
    """HEADWORKS_BACKEND stands in for "auto"; a wrong name is refused at the first call."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import torch; from specs import SPECS\n"
        "for spec in SPECS:\n"
        "    case = spec.sample_cases[0]; tensors = spec.make(case, torch.float64)\n"
        "    a, b = (spec.run(tensors, case, name) for name in ('auto', 'reference'))\n"
        "    print(all(torch.equal(a[n], b[n]) for n in b))"
    )
    done = {}
    for name in ("reference", "fast"):
        done[name] = subprocess.run(
            [sys.executable, "-c", code, str(Path(__file__).parent)],
            capture_output=True, text=True, env={**os.environ, "HEADWORKS_BACKEND": name},
        )  # fmt: skip
    assert "HEADWORKS_BACKEND is 'fast'" in done["fast"].stderr
    equal = done["reference"].stdout.split()
    assert equal == ["True"] * len(SPECS), done["reference"].stderr
    compare(torch.ones(len(equal)), torch.ones(len(SPECS)), torch.float32)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_docstring_example(spec):
    """The example of the public function gives what it says, with the seed of every test."""
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
    example = parser.get_doctest(inspect.getdoc(spec.function), {}, spec.name, None, None)
    assert example.examples
    runner.run(example)
    assert runner.summarize(verbose=False).failed == 0
    case = spec.sample_cases[0]
    check_case(spec, case, "cpu", torch.float32)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_explain(spec):
    """The backend that runs, and a reason for each that cannot."""
    case = spec.sample_cases[0]
    tensors = spec.make(case, torch.float32)
    seen = []

    def record(*args, **kwargs):
        seen.append(hw.explain(spec.function, *args, **kwargs))
        return spec.function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hw, spec.name, record)
        actual = spec.run(tensors, case, "auto")
        spec.run(tensors, case, "reference")
    assert [e.backend for e in seen] == ["cpu", "reference"]
    assert seen[0].reasons["cpu"] == "" and "cuda" in seen[0].reasons["simt"].lower()
    assert "cpu" in repr(seen[0]) and "chosen" in repr(seen[0])
    if _library.info()["emulator"]:
        wide = spec.make(case, torch.float64)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(NotImplementedError) as caught:
            patch.setattr(hw, spec.name, record)
            spec.run(wide, case, "emulate:sm80")
        assert seen[2].backend is None and seen[2].reasons["emulate:sm80"] in str(caught.value)
        assert "'emulate:sm80' is not one that can take this call" in repr(seen[2])
    with pytest.raises(TypeError, match=r"expected a function of headworks"):
        hw.explain(torch.add, 1, 2)
    for name, x in evaluate(spec, case, "cpu", tensors, gradients=False).items():
        assert_same_bits(actual[name], x)
