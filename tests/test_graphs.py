# SPDX-License-Identifier: Apache-2.0
"""Graphs of calls: what torch.compile(fullgraph=True) follows, and exports that other sizes run."""

from __future__ import annotations

import dataclasses
import io

import pytest
import torch

import headworks as hw
from headworks.testing import assert_same_bits, compare
from headworks.testing.inputs import LAYOUTS, restride
from identities import randn
from specs import SPECS

pytestmark = [
    pytest.mark.operator,
    # Deprecations of torch's own making.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

F32 = torch.float32


def inputs(*shape, n=3):
    return [randn(*(shape or (1, 6, 2, 8)), dtype=F32, seed=seed) for seed in range(n)]


def check(function, *tensors, dynamic=None):
    """Values and gradients of the compiled function are those of the function."""
    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager",
                                         dynamic=dynamic)):  # fmt: skip
        given = [x.clone().requires_grad_() if x.is_floating_point() else x for x in tensors]
        o = call(*given)
        wanted = [x for x in given if x.requires_grad]
        results.append((o.detach(), *torch.autograd.grad(o.square().sum(), wanted)))
    for x, y in zip(*results, strict=True):
        compare(x, y, F32)


# ---- compile -------------------------------------------------------------------------------------

INDEX = torch.arange(6).view(1, 1, 2, 3).expand(1, 2, 2, 3)
TWICE = {
    "attention": lambda x: hw.attention(x, x, x),
    "attention_lse": lambda x: hw.attention_lse(x, x),
    "attention_transpose": lambda x: hw.attention_transpose(x, x, x),
    "column_stats": lambda x: hw.column_stats(x, x),
    "linear_attention": lambda x: hw.linear_attention(x, x, x),
    "kmeans_routing_attention": lambda x: hw.kmeans_routing_attention(x, x, x, q_index=INDEX),
    "moh_attention": lambda x: hw.moh_attention(x, x, x, x[..., 0]),
    "bilevel_routing_attention": lambda x: hw.bilevel_routing_attention(
        *[x.view(1, 3, 2, 2, 8)] * 3, num_regions=(1, 2), topk=1
    ),
    "window_attention": lambda x: hw.window_attention(*[x.view(1, 3, 2, 2, 8)] * 3, window=2),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", TWICE)
def test_one_tensor_twice(name, dynamic):
    check(TWICE[name], inputs()[0], dynamic=dynamic)


def test_one_argument_twice():
    """Two arguments of the compiled function that are one tensor."""
    q, x = inputs(n=2)

    def run(q, k, v):
        return hw.attention(q, k, v, is_causal=True)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    grads = []
    for call in (run, compiled):
        y = x.clone().requires_grad_()
        grads += torch.autograd.grad(call(q, y, y).square().sum(), y)
    compare(grads[1], grads[0], F32)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_bounds_that_are_shared(dtype):
    bounds = torch.tensor([0, 2, 6], dtype=dtype)

    def run(q, k, v, c):
        longest = {"max_seqlen_q": 4, "max_seqlen_k": 4}
        return hw.attention(q, k, v, cu_seqlens_q=c, cu_seqlens_k=c, **longest)

    check(run, *inputs(), bounds)


@pytest.mark.parametrize("dynamic", [None, True])
def test_bounds_in_a_list(dynamic):
    def run(q, k, v, bounds):
        return hw.attention(q, k, v, cu_seqlens_q=bounds, cu_seqlens_k=bounds)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for bounds in ([0, 2, 6], [0, 3, 6], (0, 5, 6), [0, 3, 4, 6]):
        assert_same_bits(compiled(*inputs(), bounds), run(*inputs(), bounds))
    check(lambda q, k, v: run(q, k, v, [0, 2, 6]), *inputs(), dynamic=dynamic)
    with pytest.raises(ValueError, match=r"cu_seqlens_q.* is from 0 to 5"):
        run(*inputs(), [0, 2, 5])


NUMBERS = {
    "scale": lambda q, k, v, x: hw.attention(q, k, v, scale=x),
    "softcap": lambda q, k, v, x: hw.attention(q, k, v, softcap=x),
    "scale of linear attention": lambda q, k, v, x: hw.linear_attention(q, k, v, scale=x),
    "eps": lambda q, k, v, x: hw.linear_attention(q, k, v, feature_map="elu1", eps=x),
    "mean_eps": lambda q, k, v, x: hw.kmeans_routing_attention(
        q, k, v, q_index=INDEX, mean_eps=x, scale=x
    ),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_change(name):
    run = NUMBERS[name]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for number in (0.3, 0.4, 0.5, 1, 2):
        compare(compiled(*inputs(), number), run(*inputs(), number), F32)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_generated_code_and_layouts(spec, tmp_path, monkeypatch):
    """Inductor's code, from an empty cache, hands over tensors of any strides as they are."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    case = spec.sample_cases[0]
    drawn = spec.make(case, F32)
    written = {n for n in ("kv", "z") if spec.name == "linear_attention_step" and n in drawn}
    given = {
        layout: {n: x.clone() if n in written else restride(x, layout) for n, x in drawn.items()}
        for layout in LAYOUTS
    }

    def run(given):
        return {n: spec.run(tensors, case, "cpu") for n, tensors in given.items()}

    def fresh():
        return {
            layout: {n: x.clone() if n in written else x for n, x in tensors.items()}
            for layout, tensors in given.items()
        }

    with torch.no_grad():
        made, expected = torch.compile(run, fullgraph=True)(fresh()), run(fresh())
    for layout, outputs in expected.items():
        for name, x in outputs.items():
            assert_same_bits(made[layout][name], x, f"{name}, {layout}")


# ---- export --------------------------------------------------------------------------------------


def longer(case):
    """The case with another batch and other lengths."""
    more = {"B": 1, "S": 7, "Sq": 7, "Sk": 7}
    sizes = {n: x + more[n] if n in more else x for n, x in case.sizes.items()}
    if sizes.get("rows"):
        sizes["rows"] = tuple(n + 1 for n in sizes["rows"])
    return dataclasses.replace(case, sizes=sizes)


@pytest.mark.parametrize("strict", [False, True], ids=("non-strict", "strict"))
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_export_with_dynamic_sizes(spec, strict):
    case = spec.sample_cases[0]
    first, second = spec.make(case, F32), spec.make(longer(case), F32)
    names = tuple(first)

    class Module(torch.nn.Module):
        def forward(self, tensors):
            return tuple(spec.run(tensors, case, "cpu").values())

    dynamic = {
        n: {i: torch.export.Dim.AUTO for i in range(x.dim()) if second[n].shape[i] != x.shape[i]}
        for n, x in first.items()
    }
    assert any(dynamic.values()), "nothing to be dynamic"
    with torch.no_grad():
        program = torch.export.export(
            Module(), ({n: x.clone() for n, x in first.items()},),
            dynamic_shapes=(dynamic,), strict=strict,
        ).module()  # fmt: skip
        for tensors in (first, second):
            copies = [{n: tensors[n].clone() for n in names} for _ in range(2)]
            for x, y in zip(program(copies[0]), Module()(copies[1]), strict=True):
                assert_same_bits(x, y)


class WithStates(torch.nn.Module):
    def forward(self, q, k, v, state):
        o, state = hw.linear_attention(q, k, v, initial_state=state, output_final_state=True)
        o, aux = hw.attention(q, k, o, return_aux=hw.Aux(lse=True))
        return o, state, aux, hw.key_scan(q[..., 0], v, output_final_state=True)[1]


def test_export_is_saved_with_its_states():
    arguments = (*inputs(), hw.LinearState.initial(1, 2, 8, 8))
    file = io.BytesIO()
    torch.export.save(torch.export.export(WithStates(), arguments), file)
    file.seek(0)
    made, expected = torch.export.load(file).module()(*arguments), WithStates()(*arguments)
    assert [type(x) for x in made[1:]] == [hw.LinearState, hw.AuxResult, hw.KeyScanState]
    for x, y in zip(*map(torch.utils._pytree.tree_leaves, (made, expected)), strict=True):
        if y is not None:
            assert_same_bits(x, y)


class Attention(torch.nn.Module):
    def forward(self, q, k, v):
        return hw.attention(q, k, v, is_causal=True)


def test_ahead_of_time(tmp_path):
    """AOTInductor calls the operators of this process."""
    arguments = inputs()
    program = torch.export.export(Attention(), tuple(arguments))
    file = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "m.pt2"))
    assert_same_bits(torch._inductor.aoti_load_package(file)(*arguments), Attention()(*arguments))


@pytest.mark.no_comparison
def test_onnx_says_what_it_has_not(tmp_path):
    with pytest.raises(Exception, match="headworks::attention_fwd"):
        torch.onnx.export(Attention(), tuple(inputs()), str(tmp_path / "m.onnx"), dynamo=False)
