# SPDX-License-Identifier: Apache-2.0
"""How every operator behaves inside torch: compile, export, autocast, transforms, CUDA graphs, and
what it says of its backends; driven by tests/specs."""

from __future__ import annotations

import doctest
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad

import headworks as hw
from backends import SAMPLE, identify, samples
from headworks import _library
from headworks.testing import HALF, assert_same_bits, check_case, compare, evaluate
from specs import SPECS

pytestmark = pytest.mark.operator

# Deprecations of torch's own making.
INSIDE_TORCH = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


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


AUTOCAST = ("q", "k", "v", "s", "x", "bias", "w", "affinity", "weight", "rpb", "small_rpb",
            *hw.CascadeWeights._fields)  # fmt: skip


@pytest.mark.parametrize("half", HALF, ids=identify)
@pytest.mark.parametrize(
    "spec", [s for s in SPECS if s.name not in ("select_topk", "kmeans_route")], ids=str
)
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
@pytest.mark.parametrize("spec", [s for s in SPECS if s.differentiable], ids=str)
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


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_inference_mode(spec):
    case = spec.sample_cases[0]
    tensors = spec.make(case, torch.float32)
    expected = evaluate(spec, case, "cpu", tensors, gradients=False)
    with torch.inference_mode():
        actual = spec.run(tensors, case, "cpu")
    for name, x in expected.items():
        assert_same_bits(actual[name].clone(), x, name)


@pytest.mark.parametrize(
    SAMPLE, [p for p in samples((torch.float32, torch.bfloat16)) if p.values[3] == "cuda"]
)
def test_cuda_graph(spec, case, backend, device, dtype):
    """Forward and backward captured once, replayed on other data."""
    first, second = (spec.make(case, dtype, device, seed) for seed in (0, 1))
    held = {n: x.clone() for n, x in first.items()}
    inputs = [held[n].requires_grad_() for n in spec.differentiable if n in held]

    def run():
        outputs = list(spec.run(held, case, backend).values())
        wanted = [x.sum() for x in outputs if x.requires_grad]
        grads = torch.autograd.grad(wanted, inputs) if wanted else ()
        return [*outputs, *grads]

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for tensors in (second, first):
        with torch.no_grad():
            for name, x in tensors.items():
                held[name].copy_(x)
        graph.replay()
        replayed = [x.clone() for x in captured]
        with torch.no_grad():
            for name, x in tensors.items():
                held[name].copy_(x)  # a state may have been updated in place
        for x, y in zip(replayed, run(), strict=True):
            assert_same_bits(x, y)


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
