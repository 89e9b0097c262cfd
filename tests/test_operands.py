# SPDX-License-Identifier: Apache-2.0
"""The registered torch operators, called by hand or from a graph with tensors that do not belong
together: an error, before native code reads them."""

from __future__ import annotations

import pytest
import torch

import headworks as hw
from headworks.ops._operands import check_operands, operands
from identities import randn
from specs import SPECS

pytestmark = [pytest.mark.operator, pytest.mark.no_comparison]


def calls():
    for spec in SPECS:
        for case in spec.sample_cases:
            tensors = spec.make(case, torch.float32)
            for operator, arguments in spec.operators(tensors, case):
                yield pytest.param(operator, arguments, id=f"{operator}-{case}"[10:90])


def mangled(x):
    """(axis or None, what was done, the tensor)"""
    for axis in range(x.dim()):
        if x.shape[axis] > 1:
            yield axis, "shrunk", x.narrow(axis, 0, x.shape[axis] - 1)
            yield axis, "cut to 1", x.narrow(axis, 0, 1)
        yield axis, "grown", torch.cat((x, x, x), axis)
    yield None, "with an axis more", x[None]
    yield None, "with an axis less", x[0]
    if x.dim() > 1 and x.shape[-1] != x.shape[-2]:
        yield None, "transposed", x.transpose(-1, -2)
    yield None, "in int32", x.to(torch.int32)
    yield None, "in bool", x.to(torch.bool)
    yield None, "in double", x.to(torch.float64)
    yield None, "in bfloat16", x.to(torch.bfloat16)
    yield None, "on meta", x.to("meta")


# Axes whose size no other tensor has, in some of the calls: a call with another is another call.
FREE = {
    "attention_fwd": "q1 q2 k1 k2 v3 bias0 bias1 bias2 bias3 mass_keys",
    "attention_columns": "q1 q2 k1 k2 x3 bias0 bias1 bias2 bias3",
    "attention_probs": "q2 k1 k2 keys1 rows1 offsets0 bias0 bias1 bias2 bias3",
    "attention_bwd": "bias0 bias1 bias2 bias3",
    "routing_attention_fwd": "v3 rows3 keys3 k1 bias0 bias1 bias2 bias3",
    "routing_attention_bwd": "rows3 keys3 bias0 bias1 bias2 bias3",
    "linear_attention_fwd": "q2 v3",
    "linear_attention_step": "q1",
    "key_scan_fwd": "v3",
    "window_attention_fwd": "q2 v3",
    "na2d_av_fwd": "v4",
    "contmix_fwd": "v4",
    "kmeans_route": "x0 x1 centroids1",
    "bilevel_route": "q1 q2 q3 k1 k2 k3",
    "cascaded_group_attention": "x0 x1 x2",
}
# A log-sum-exp that is given has no rest.
BARE = {
    ("attention_bwd", "row"), ("routing_attention_bwd", "row"), ("key_scan_bwd", "lse"),
    ("window_attention_bwd", "row"),
}  # fmt: skip
ALONE = ("select_topk", "moh_route")  # one tensor: there is nothing that it could not belong to


@pytest.mark.parametrize("operator, arguments", list(calls()))
def test_mangled_tensors(operator, arguments):
    schema = operator._schema
    op = schema.name.removeprefix("headworks::")
    free = FREE.get(op, "").split()
    for position, (argument, x) in enumerate(zip(schema.arguments, arguments, strict=True)):
        if not isinstance(x, torch.Tensor) or not x.numel():
            continue
        for axis, what, y in mangled(x):
            given = [z.clone() if isinstance(z, torch.Tensor) else z for z in arguments]
            given[position] = y
            try:
                made = operator(*given)
            except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
                assert "INTERNAL ASSERT" not in str(error)
                continue
            if op in ALONE or (axis is not None and f"{argument.name}{axis}" in free):
                shapes = operator(*(z.to("meta") if isinstance(z, torch.Tensor) else z
                                    for z in given))  # fmt: skip
                made, shapes = ((z,) if isinstance(z, torch.Tensor) else z for z in (made, shapes))
                assert [z.shape for z in made] == [z.shape for z in shapes]
                continue
            if (op, argument.name) in BARE and what == "with an axis less":
                continue
            if (op, argument.name, what) == ("kmeans_route", "x", "in bfloat16"):
                continue  # beside centroids in fp32, as that of fp32
            name = f"{argument.name} {what}" + ("" if axis is None else f" along {axis}")
            pytest.fail(f"{op} takes {name}")


NUMBERS = {
    "activation": (-1, 5, 99),
    "normalizer": (-1, 3, 99),
    "feature_map": (-1, 4, 99),
    "k": (-1, 10**6),
    "topk": (-1, 10**6),
    "window": (-1, 10**6),
    "row_height": (0, -1),
    "key_width": (0, -1),
    "row_image_width": (0, 10**6),
    "key_image_height": (0, 10**6),
    "q_rows": (0, 10**6),
    "k_height": (0, 10**6),
    **dict.fromkeys(("kernel_y", "kernel_x", "small_y", "small_x"), (-1, 0, 2, 10**6 + 1)),
    "window_height": (-1, 0, 10**6),
    "window_width": (-1, 0, 10**6),
}


@pytest.mark.parametrize("operator, arguments", list(calls()))
def test_mangled_numbers(operator, arguments):
    for position, argument in enumerate(operator._schema.arguments):
        for number in NUMBERS.get(argument.name, ()):
            if isinstance(arguments[position], torch.Tensor):
                continue
            given = [z.clone() if isinstance(z, torch.Tensor) else z for z in arguments]
            given[position] = number
            with pytest.raises(ValueError):
                operator(*given)


def test_a_small_state():
    q = randn(1, 2, 8, dtype=torch.float32)
    state = hw.LinearState.initial(1, 2, 8, 8)
    for kv, z in ((state.kv[:, :, :3], state.z), (state.kv, state.z[:, :1])):
        with pytest.raises(ValueError, match=r"linear_attention_step: .*expected \[B, H, F"):
            torch.ops.headworks.linear_attention_step(q, q, q, kv, z, 0, True, 1.0, 0.0, "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("spec", [s for s in SPECS if s.differentiable], ids=str)
def test_saved_tensors_of_another_dtype(spec, dtype):
    """Hooks that pack and do not unpack."""

    def packed(x):
        return x.to(dtype) if x.is_floating_point() else x

    for case in spec.sample_cases:
        tensors = spec.make(case, torch.float32)
        given = [tensors[n].requires_grad_() for n in spec.differentiable if n in tensors]
        with torch.autograd.graph.saved_tensors_hooks(packed, lambda x: x):
            outputs = [x for x in spec.run(tensors, case, "cpu").values() if x.requires_grad]
        try:
            grads = torch.autograd.grad(sum(x.sum() for x in outputs), given, allow_unused=True)
        except (TypeError, RuntimeError) as error:
            assert "INTERNAL ASSERT" not in str(error)
            continue
        # What needs no statistics runs in the dtype of the cotangent.
        outputs = [x for x in spec.run(tensors, case, "cpu").values() if x.requires_grad]
        expected = torch.autograd.grad(sum(x.sum() for x in outputs), given, allow_unused=True)
        for x, y in zip(grads, expected, strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                torch.testing.assert_close(x, y, rtol=0.1, atol=0.1 * y.abs().max().item())


def test_what_an_error_says():
    expected = operands(q="element B S D", index="index B n")
    q, index = torch.zeros(2, 3, 4), torch.zeros(2, 5, dtype=torch.int64)
    assert check_operands("op", expected, (q, index)) == {"B": 2, "S": 3, "D": 4, "n": 5}
    with pytest.raises(ValueError, match=r"op: index is int64 \[1, 5\].*\[B, n\] with B = 2"):
        check_operands("op", expected, (q, index[:1]))
    with pytest.raises(TypeError, match=r"op: index is int32 .*expected torch.int64"):
        check_operands("op", expected, (q, index.int()))
    with pytest.raises(RuntimeError, match="op: index is on meta"):
        check_operands("op", expected, (q, index.to("meta")))
    with pytest.raises(TypeError, match="op: q is int64"):
        check_operands("op", expected, (q.long(), index))
