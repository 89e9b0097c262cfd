# SPDX-License-Identifier: Apache-2.0
"""Layers and models as graphs: torch.compile(fullgraph=True) in training, torch.export with dynamic
batch and length; and second derivatives of the pieces between the operators."""

from __future__ import annotations

import pytest
import torch

from headworks.nn import functional
from test_modules import LOSSES, MODULES, applied, example

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

TRAINED = (
    "GatedShortConv", "KMeansRoutingAttention", "MixtureOfHeads", "BasedLM", "RoutingLM",
    "SoftmaxLM", "BiFormer",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread(_deterministic_start):
    torch.set_num_threads(1)
    yield
    torch._dynamo.reset()


def two(name):
    """The same module twice."""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(MODULES[name]().train())
    return made


def steps(name, module, call, x):
    """Outputs, losses, gradients and buffers of two steps, the first forward among them."""
    torch.manual_seed(1)
    results = []
    for _ in range(2):
        y = applied(name, call, x)
        side = module.pop_loss() if name in LOSSES else torch.zeros(())
        (y.square().sum() + side).backward()
        results += [y.detach(), side.detach()]
    return [*results, *(p.grad for p in module.parameters()), *module.buffers()]


@pytest.mark.parametrize("name", TRAINED)
def test_training_in_one_graph(name):
    module, other = two(name)
    x = example(name)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    expected = steps(name, module, module, x)
    for got, wanted in zip(steps(name, other, compiled, x), expected, strict=True):
        if wanted is None:
            assert got is None
        else:
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_training_in_one_graph_by_inductor():
    module, other = two("GatedShortConv")
    x = example("GatedShortConv")
    compiled = torch.compile(other, fullgraph=True)
    expected = steps("GatedShortConv", module, module, x)
    for got, wanted in zip(steps("GatedShortConv", other, compiled, x), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_loaded_layer_needs_no_second_graph():
    """Centroids that are set already are not asked for in the graph."""
    module, other = two("KMeansRoutingAttention")
    x = example("KMeansRoutingAttention")
    module(x)
    other.load_state_dict(module.state_dict())
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(other, fullgraph=True, backend=count)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


def test_a_useless_first_batch_starts_nothing_in_a_graph():
    """Centroids are set by the first batch that has finite tokens, compiled or not."""
    module, other = two("KMeansRoutingAttention")
    x = example("KMeansRoutingAttention")
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for batch in (torch.full_like(x, torch.nan), x):
        for call in (module, compiled):
            torch.manual_seed(1)
            call(batch.detach())
        assert int(other.initialized) == int(module.initialized)
    assert int(other.initialized) == 1
    torch.testing.assert_close(other.centroids, module.centroids, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "gated_short_conv"])
def test_second_derivatives(name):
    """Also where the first cotangent is a constant, as that of a sum is."""
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    taps = torch.randn(3, 1, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    function, inputs = {
        "rms_norm": (functional.rms_norm, (x, weight)),
        "swiglu": (functional.swiglu, (x,)),
        "gated_short_conv": (functional.gated_short_conv, (x, taps, bias)),
    }[name]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)

    def penalty(x):
        (g,) = torch.autograd.grad(function(x, *inputs[1:]).sum(), x, create_graph=True)
        return g.square().sum()

    assert torch.autograd.gradcheck(penalty, (x,))


# ---- export --------------------------------------------------------------------------------------

# The lengths that the module takes whatever its sizes are; of images the batch alone is dynamic.
LENGTHS = {"KMeansRoutingAttention": (7, 512), "RoutingLM": (2, 24)}
EXPORTED = (
    "GatedShortConv", "BasedLinearAttention", "SlidingWindowAttention", "KMeansRoutingAttention",
    "BiLevelRoutingAttention", "MixtureOfHeads", "BasedLM", "SoftmaxLM", "RoutingLM", "BiFormer",
)  # fmt: skip
# Those made of operators of headworks.
MODELS = ("BasedLM", "RoutingLM", "BiFormer")


@pytest.mark.parametrize("name", EXPORTED)
def test_export_with_any_batch_and_length(name):
    module, x = MODULES[name]().eval(), example(name)
    sizes, others = {0: torch.export.Dim("b", max=64)}, [x, x[:1], torch.cat([x, x[:1]])]
    if x.dim() < 4:
        least, most = LENGTHS.get(name, (2, 512))
        sizes[1] = torch.export.Dim("s", min=least, max=most)
        others += [others[2][:, :9], torch.cat([x, x[:, :7]], 1)]
    exported = torch.export.export(module, (x,), dynamic_shapes=(sizes,)).module()
    for other in others:
        got, wanted = (applied(name, m, other) for m in (exported, module))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_models_ahead_of_time(name, tmp_path):
    """AOTInductor compiles the program of a whole model; the operators are those of the process."""
    module, x = MODULES[name]().eval(), example(name)
    program = torch.export.export(module, (x,))
    file = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "m.pt2"))
    loaded = torch._inductor.aoti_load_package(file)
    got, wanted = (applied(name, m, x) for m in (loaded, module))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_onnx_says_what_a_model_has_not(name, tmp_path):
    module, x = MODULES[name]().eval(), example(name)
    with pytest.raises(Exception, match=r"headworks::\w+|linear_attention: "):
        torch.onnx.export(module, (x,), str(tmp_path / "m.onnx"), dynamo=False)
