# SPDX-License-Identifier: Apache-2.0
"""What every function refuses: flags that are none, tensors that are not numbers in memory; in the
second call as in the first."""

from __future__ import annotations

import inspect

import pytest
import torch

import headworks as hw
from backends import native_info
from headworks import _library
from headworks._repeated import Repeated
from identities import randn
from specs import SPECS

pytestmark = [
    pytest.mark.operator,
    pytest.mark.no_comparison,
    # Layouts that torch calls beta, and quantization that it calls old.
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning"),
]

Q, K, V = (randn(1, 6, 2, 8, dtype=torch.float32, seed=seed) for seed in range(3))
IMAGES = [x.view(1, 3, 2, 2, 8) for x in (Q, K, V)]
INDEX = torch.arange(6).view(1, 1, 2, 3).expand(1, 2, 2, 3)
CALLS = {
    "attention": (Q, K, V),
    "attention_lse": (Q, K),
    "attention_transpose": (Q, K, V),
    "attention_probs": (Q, K),
    "column_stats": (Q, K),
    "linear_attention": (Q, K, V),
    "linear_attention_step": (Q[:, 0], K[:, 0], V[:, 0], hw.LinearState.initial(1, 2, 8, 8)),
    "key_scan": (Q[..., 0], V),
    "select_topk": (Q, 2),
    "bilevel_route": IMAGES[:2],
    "bilevel_routing_attention": IMAGES,
    "kmeans_route": (Q, randn(2, 3, 8, dtype=torch.float32)),
    "kmeans_routing_attention": (Q, K, V),
    "moh_attention": (Q, K, V, Q[..., 0]),
    "window_attention": IMAGES,
    "na2d_av": (randn(1, 3, 2, 2, 3, dtype=torch.float32), IMAGES[2]),
    "contmix": (IMAGES[0][..., :1, :], randn(4, 8, dtype=torch.float32), None, IMAGES[2]),
    "cascaded_group_attention": (IMAGES[0][:, :, :, 0], hw.CascadeWeights.of_heads(
        [(Q.flatten()[:56].view(14, 4), Q.flatten()[:14])] * 2,
        [(Q.flatten()[:45].view(5, 1, 3, 3), Q.flatten()[:5])] * 2,
        Q.flatten()[:18].view(2, 9),
        (Q.flatten()[:64].view(8, 8), Q.flatten()[:8]),
    )),
}  # fmt: skip
NEEDED = {
    "attention_probs": {"keys": torch.tensor([0])},
    "bilevel_route": {"num_regions": (1, 2), "topk": 1},
    "bilevel_routing_attention": {"num_regions": (1, 2), "topk": 1},
    "kmeans_route": {"window": 2},
    "kmeans_routing_attention": {"q_index": INDEX},
    "window_attention": {"window": 2},
    "na2d_av": {"kernel_size": (3, 1)},
    "contmix": {"kernel_size": (3, 1), "small_kernel_size": 1},
}


def flags_of(name):
    parameters = inspect.signature(getattr(hw, name)).parameters.values()
    found = {p.name for p in parameters if isinstance(p.default, bool)}
    if "options" in inspect.signature(getattr(hw, name)).parameters:
        found.add("is_causal")  # of the score
    return sorted(found)


FLAGS = [(name, flag) for name in CALLS for flag in flags_of(name)]


def test_all_functions_are_here():
    assert set(CALLS) == {spec.name for spec in SPECS}
    assert len(FLAGS) > 15


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name, flag", FLAGS)
def test_flags(name, flag, backend):
    call, options = getattr(hw, name), {**NEEDED.get(name, {}), "backend": backend}
    for right in (False, True):
        call(*CALLS[name], **{**options, flag: right})
        for wrong in ("False", 0, 1, None, 0.0, torch.tensor(True), []):
            with pytest.raises(TypeError, match=f"{name}: {flag} is .*expected True or False"):
                call(*CALLS[name], **{**options, flag: wrong})


@pytest.mark.parametrize("read_out", ["lse", "entropy", "p_max", "sq_norm"])
def test_read_outs(read_out):
    aux = hw.Aux(**{read_out: "no"})
    with pytest.raises(TypeError, match=f"return_aux.{read_out} is 'no'"):
        hw.attention(Q, K, V, return_aux=aux)
    with pytest.raises(TypeError, match=f"return_aux.{read_out} is 'no'"):
        hw.bilevel_routing_attention(*IMAGES, num_regions=(1, 1), topk=1, return_aux=aux)


def foreign(x):
    """(what it is, the same tensor as something else)"""
    yield "sparse_coo", x.to_sparse()
    if x.dtype == torch.float32:
        yield "mkldnn", x.to_mkldnn()
    if x.dim() > 1:
        yield "nested", torch.nested.nested_tensor([*x])
        yield "nested", torch.nested.nested_tensor([*x], layout=torch.jagged)


# What the specs index or copy before the call; below by hand.
PREPARED = {("linear_attention_step", "kv"), ("linear_attention_step", "z"),
            ("kmeans_route", "centroids"),
            *(("cascaded_group_attention", n) for n in hw.CascadeWeights._fields)}  # fmt: skip


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_layouts_of_states_and_centroids(backend):
    for layout, y in foreign(CALLS["kmeans_route"][1]):
        with pytest.raises(TypeError, match=f"kmeans_route: centroids is .*{layout}"):
            hw.kmeans_route(Q, y, window=2, backend=backend)
    *arguments, state = CALLS["linear_attention_step"]
    for name in ("kv", "z"):
        for layout, y in foreign(getattr(state, name)):
            with pytest.raises(TypeError, match=rf"state\.{name} is .*{layout}"):
                hw.linear_attention_step(*arguments, state._replace(**{name: y}), backend=backend)


def test_nested_numbers_in_place_of_an_index():
    """A nested tensor has no shape that a message could tell."""
    x = torch.nested.nested_tensor([torch.ones(2), torch.ones(2)])
    calls = {
        "q_index": lambda: hw.kmeans_routing_attention(Q, K, V, q_index=x),
        "rows": lambda: hw.attention_probs(Q, K, rows=x),
        "cu_seqlens": lambda: hw.linear_attention(Q, K, V, cu_seqlens=x),
        "return_aux.mass": lambda: hw.attention(Q, K, V, return_aux=hw.Aux(mass=x)),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=f": {name} is float32 without a shape"):
            call()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_layouts(spec, backend):
    for case in spec.sample_cases:
        tensors = spec.make(case, torch.float32)
        for name, x in tensors.items():
            if (spec.name, name) in PREPARED:
                continue
            for layout, y in foreign(x):
                with pytest.raises(
                    TypeError, match=rf"{spec.name}: .*of layout {layout}; expected a"
                ):
                    spec.run({**tensors, name: y}, case, backend)


@pytest.mark.parametrize("name", CALLS)
def test_other_dtypes(name):
    options = NEEDED.get(name, {})
    for other in (
        torch.quantize_per_tensor(CALLS[name][0].contiguous(), 0.1, 0, torch.quint8),
        CALLS[name][0].to(torch.complex64),
        CALLS[name][0].to(torch.int8),
    ):
        with pytest.raises(TypeError, match=f"{name}: .* is torch.*; expected float64, float32"):
            getattr(hw, name)(other, *CALLS[name][1:], **options)


# ---- the second call -----------------------------------------------------------------------------


def outcomes(name):
    """What becomes of calls with one tensor replaced by what may not belong there."""
    call, arguments, options = getattr(hw, name), list(CALLS[name]), NEEDED.get(name, {})
    found = {}
    for position, x in enumerate(arguments):
        for what, change in CHANGES.items() if isinstance(x, torch.Tensor) else ():
            given = [*arguments[:position], change(x), *arguments[position + 1 :]]
            try:
                call(*given, **options)
                found[position, what] = None
            except (TypeError, ValueError, RuntimeError) as error:
                found[position, what] = str(error)
    for backend in ("fast", "simt"):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            call(*arguments, **options, backend=backend)
        found[backend] = str(caught.value)
    return found


CHANGES = {
    "double": torch.Tensor.double,
    "bfloat16": torch.Tensor.bfloat16,
    "int64": torch.Tensor.long,
    "narrower": lambda x: x[..., :-1],
    "shorter": lambda x: x[:, :-1],
    "deeper": lambda x: x[None],
    "meta": lambda x: x.to("meta"),
    "sparse": torch.Tensor.to_sparse,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_warm_call_refuses_what_a_cold_one_does(name, monkeypatch):
    """A decision that is kept must not forget what it was made for."""
    monkeypatch.setattr("headworks.ops.routing.bilevel_routing._repeated", Repeated(name))
    cold = outcomes(name)
    assert sum(text is not None for text in cold.values()) > 3
    for _ in range(3):
        getattr(hw, name)(*CALLS[name], **NEEDED.get(name, {}))
        assert outcomes(name) == cold


# ---- the chosen instance -------------------------------------------------------------------------


def test_the_order_of_backends():
    """auto is the first that can take the call, in the order that is documented."""
    assert _library.BACKENDS == ("cpu", "sm90", "sm80", "simt", "emulate:sm80", "emulate:simt")
    explanation = hw.explain(hw.attention, Q, K, V)
    assert explanation.asked == "cpu" or explanation.backend == "cpu"
    able = [name for name, reason in explanation.reasons.items() if not reason]
    assert able[0] == "cpu"


def test_the_instruction_set_is_the_best_there_is():
    order = ("baseline", "neon", "avx2", "avx512", "avx512bf16")
    cpu = _library.info()["cpu"]
    assert cpu["isa"] == max(cpu["available"], key=order.index)
    assert set(cpu["available"]) <= set(cpu["built"])


@pytest.mark.parametrize("isa", _library.info()["cpu"]["available"] if native_info() else [])
def test_the_instance_of_an_instruction_set(isa):
    """The strongest up to the one in use that is built for the dtype."""
    built = {
        (i["dtype"], i["isa"])
        for op in _library.info()["operators"]
        for i in op["instances"]
        if op["name"] == "attention" and i["backend"] == "cpu"
    }
    order = _library.info()["cpu"]["built"]
    try:
        _library.set_cpu_isa(isa)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            name = str(dtype).removeprefix("torch.")
            known = [i for i in order[: order.index(isa) + 1] if (name, i) in built]
            explanation = hw.explain(hw.attention, *(x.to(dtype) for x in (Q, K, V)))
            assert explanation.instance == f"{name}, {known[-1]}"
            assert f"chosen ({name}, {known[-1]})" in repr(explanation)
    finally:
        _library.set_cpu_isa()


@pytest.mark.parametrize(
    "function, widths, d, dv, expected",
    [
        (hw.attention, (32, 64, 96, 128, 256), d, dv, expected)
        for d, dv, expected in (
            (8, 8, 32), (32, 32, 32), (33, 8, 64), (8, 65, 96), (96, 97, 128), (130, 8, 256),
        )
    ]
    + [
        (hw.linear_attention, (64, 128), 16, dv, expected)
        for dv, expected in ((8, 64), (64, 64), (65, 128), (200, 128))
    ],
)  # fmt: skip
def test_the_narrowest_tile_that_holds_the_call(function, widths, d, dv, expected):
    """Of those that are built: a minimal build may lack it."""
    if not native_info().get("emulator"):
        pytest.skip("the emulator is not built (preset emu)")
    built = {
        i["dim"]
        for op in _library.info()["emulator"]["operators"]
        for i in op["instances"]
        if op["name"] == function.__name__ and i["backend"] == "sm80" and i["dtype"] == "bfloat16"
    }
    assert built <= set(widths)
    q = torch.zeros(1, 6, 2, d, dtype=torch.bfloat16)
    v = torch.zeros(1, 6, 2, dv, dtype=torch.bfloat16)
    explanation = hw.explain(function, q, q, v, backend="emulate:sm80")
    least = min(w for w in built if w >= expected)
    assert explanation.instance == f"bfloat16, dim {least}"
    refused = hw.explain(function, q.double(), q.double(), v.double(), backend="emulate:sm80")
    assert refused.backend is None and refused.instance == ""


LAYERS = {
    "BasedLinearAttention": ({}, ("normalize", "g_norm")),
    "BiLevelRoutingAttention": ({}, ("auto_pad", "mask_padding")),
    "KMeansRoutingAttention": (
        {"local_heads": 1, "num_clusters": 2, "window": 4},
        ("is_causal", "is_causal_prefix", "shared_qk"),
    ),
    "MixtureOfHeads": ({"shared_heads": 1, "routed_heads": 1}, ("is_causal",)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_flags_of_layers(name):
    """When the layer is made: a decoder with is_causal_prefix="False" would look like any other."""
    options, flags = LAYERS[name]
    for flag in flags:
        for value in ("False", 1, None):
            with pytest.raises(TypeError, match=f"{name}: {flag} is .*; expected True or False"):
                getattr(hw.nn, name)(32, 4, **options, **{flag: value})


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_identity_mix_of_sequences_with_fewer_keys_than_rows(backend):
    """The value of a row beyond the last key would be one beyond the tensor."""
    mix = torch.full((2,), 0.5)
    for bounds in ([0, 4, 6], torch.tensor([0, 0, 6])):
        x = Q.clone().requires_grad_()
        for q in (Q, x):
            with pytest.raises(ValueError, match="cu_seqlens_k with identity_mix is other bounds"):
                hw.attention(
                    q, K, V, identity_mix=mix, cu_seqlens_q=[0, 2, 6], cu_seqlens_k=bounds,
                    backend=backend,
                )  # fmt: skip
