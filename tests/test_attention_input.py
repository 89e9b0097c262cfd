# SPDX-License-Identifier: Apache-2.0
"""Bad input of attention and its companions: refused before anything is allocated, with the
argument, what came, what was expected and the remedy."""

from __future__ import annotations

import pytest
import torch

import headworks as hw
from identities import Refused, allocates_nothing

pytestmark = [pytest.mark.operator, pytest.mark.no_comparison]

F64, F32 = torch.float64, torch.float32


def zeros(*shape, dtype=F32, device=None):
    return torch.zeros(shape, dtype=dtype, device=device)


def good(sq=6, sk=7):
    return {"q": zeros(1, sq, 4, 8), "k": zeros(1, sk, 2, 8), "v": zeros(1, sk, 2, 5)}


def bounds(*values):
    return torch.tensor(values)


def packed(q=(0, 2, 6), k=(0, 3, 7), **more):
    return {"cu_seqlens_q": bounds(*q), "cu_seqlens_k": bounds(*k), **more}


NAN = float("nan")

INPUTS = (
    Refused(ValueError, "q", "[6, 4, 8]", "[B, S, H, D]", q=zeros(6, 4, 8)),
    Refused(ValueError, "v", "[1, 7, 2, 5, 1]", v=zeros(1, 7, 2, 5, 1)),
    Refused(ValueError, "k", "[1, 7, 2, 9]", "[1, 7, 2, 8]", k=zeros(1, 7, 2, 9)),
    Refused(ValueError, "k", "[2, 7, 2, 8]", k=zeros(2, 7, 2, 8)),
    Refused(ValueError, "v", "[1, 6, 2, 5]", "[1, 7, 2, 5]", v=zeros(1, 6, 2, 5)),
    Refused(ValueError, "v", "[1, 7, 4, 5]", "Hkv", v=zeros(1, 7, 4, 5)),
    Refused(ValueError, "heads", "3", "multiple", q=zeros(1, 6, 3, 8)),
    Refused(ValueError, "heads", k=zeros(1, 7, 0, 8), v=zeros(1, 7, 0, 5)),
    Refused(ValueError, "dimension D", "0", q=zeros(1, 6, 4, 0), k=zeros(1, 7, 2, 0)),
    Refused(TypeError, "k", "float64", "float32", "autocast", k=zeros(1, 7, 2, 8, dtype=F64)),
    Refused(TypeError, "v", "bfloat16", v=zeros(1, 7, 2, 5, dtype=torch.bfloat16)),
    Refused(TypeError, "q", "int64", q=zeros(1, 6, 4, 8, dtype=torch.int64)),
    Refused(TypeError, "q", "a list", "torch.Tensor", q=[1.0]),
    Refused(TypeError, "v", "NoneType", v=None),
    Refused(RuntimeError, "k", "meta", "cpu", ".to(", k=zeros(1, 7, 2, 8, device="meta")),
    Refused(ValueError, "backend", "'gpu'", "one of", backend="gpu"),
    Refused(RuntimeError, "sm80", "cpu", "emulate:sm80", backend="sm80"),
)

SCORES = (
    Refused(ValueError, "scale", "nan", "finite", scale=NAN),
    Refused(TypeError, "scale", "float32", "Python number", scale=torch.ones(())),
    Refused(ValueError, "softcap", "-1.0", ">= 0", softcap=-1.0),
    Refused(ValueError, "softcap", "inf", softcap=float("inf")),
    Refused(TypeError, "softcap", "NoneType", softcap=None),
    Refused(TypeError, "window_size", "128", "(left, right)", window_size=128),
    Refused(TypeError, "window_size", "(1, 2, 3)", window_size=(1, 2, 3)),
    Refused(ValueError, "window_size (left)", "-1", "None", window_size=(-1, 0)),
    Refused(TypeError, "window_size (right)", "0.5", window_size=(1, 0.5)),
    Refused(ValueError, "window_size (right)", "3", "is_causal", is_causal=True,
            window_size=(1, 3)),
    Refused(ValueError, "activation", "'gelu'", "softmax1", activation="gelu"),
    Refused(ValueError, "activation", "None", activation=None),
    Refused(ValueError, "normalizer", "'mean'", "length", activation="relu", normalizer="mean"),
    Refused(ValueError, "normalizer", "'length'", "softmax", normalizer="length"),
    Refused(TypeError, "bias", "bool", "torch.where", bias=zeros(6, 7, dtype=torch.bool)),
    Refused(TypeError, "bias", "float64", "float32", bias=zeros(6, 7, dtype=F64)),
    Refused(ValueError, "bias", "[7, 6]", "[1, 4, 6, 7]", bias=zeros(7, 6)),
    Refused(ValueError, "bias", "[1, 2, 6, 7]", "Heads are those of q", bias=zeros(1, 2, 6, 7)),
    Refused(ValueError, "bias", "[1, 1, 1, 6, 7]", bias=zeros(1, 1, 1, 6, 7)),
    Refused(RuntimeError, "bias", "meta", bias=zeros(6, 7, device="meta")),
    Refused(ValueError, "key_bias", "[4, 7]", "[B|1, H|1, Sk]", key_bias=zeros(4, 7)),
    Refused(ValueError, "key_bias", "[1, 2, 7]", "[1, 4, 7]", key_bias=zeros(1, 2, 7)),
    Refused(ValueError, "key_bias", "[1, 1, 1]", key_bias=zeros(1, 1, 1)),
    Refused(TypeError, "key_bias", "int64", key_bias=zeros(1, 1, 7, dtype=torch.int64)),
    Refused(TypeError, "key_bias", "a float", key_bias=0.5),
    Refused(ValueError, "key_gain", "[1, 1, 6]", key_gain=zeros(1, 1, 6)),
    Refused(RuntimeError, "key_gain", "meta", key_gain=zeros(1, 1, 7, device="meta")),
    Refused(ValueError, "gain_rows", "(0, 3)", "without key_gain", gain_rows=(0, 3)),
    Refused(TypeError, "gain_rows", "3", "(start, stop)", gain_rows=3, key_gain=zeros(1, 1, 7)),
    Refused(TypeError, "gain_rows", "0.5", gain_rows=(0.5, 3), key_gain=zeros(1, 1, 7)),
    Refused(ValueError, "row_temperature", "[1, 4, 6]", "[1, 6, 4]",
            row_temperature=zeros(1, 4, 6)),
    Refused(ValueError, "sink", "[3]", "[1, 4]", sink=zeros(3)),
    Refused(ValueError, "sink", "[2, 4]", "[Hq]", sink=zeros(2, 4)),
    Refused(TypeError, "sink", "a float", sink=0.5),
    Refused(ValueError, "sink", "softmax1", "denominator", sink=zeros(4), activation="softmax1"),
    Refused(ValueError, "sink", "relu", sink=zeros(4), activation="relu"),
    Refused(NotImplementedError, "dropout_p", "0.1", "Philox", "replay", dropout_p=0.1),
    Refused(TypeError, "'attn_mask'", "bias", attn_mask=zeros(6, 7)),
    Refused(TypeError, "'is_casual'", is_casual=True),
)  # fmt: skip

PACKED = (
    Refused(ValueError, "cu_seqlens_k", "None", cu_seqlens_q=bounds(0, 6)),
    Refused(ValueError, "cu_seqlens_q", "None", cu_seqlens_k=bounds(0, 7)),
    Refused(ValueError, "max_seqlen_q", "6", "without", max_seqlen_q=6),
    Refused(TypeError, "cu_seqlens_q", "float32", "int32",
            **{**packed(), "cu_seqlens_q": zeros(2)}),
    Refused(TypeError, "cu_seqlens_k", "integers", **{**packed(), "cu_seqlens_k": [0, 3.5, 7]}),
    Refused(ValueError, "cu_seqlens_k", "[1, 2]", "[N + 1]",
            **{**packed(), "cu_seqlens_k": bounds([0, 7])}),
    Refused(ValueError, "cu_seqlens_k", "[2]", "[3]", **packed(k=(0, 7))),
    Refused(ValueError, "cu_seqlens_q[2]", "1", "2", **packed(q=(0, 2, 1))),
    Refused(ValueError, "cu_seqlens_k", "from 0 to 9", "7", **packed(k=(0, 3, 9))),
    Refused(ValueError, "cu_seqlens_q", "from 1", **packed(q=(1, 2, 6))),
    Refused(ValueError, "cu_seqlens_q", "from 0 to 5", **{**packed(), "cu_seqlens_q": [0, 2, 5]}),
    Refused(ValueError, "max_seqlen_k", "2", "at least 4", **packed(max_seqlen_k=2)),
    Refused(TypeError, "max_seqlen_q", "a Python integer",
            **packed(max_seqlen_q=torch.tensor(4))),
    Refused(ValueError, "max_seqlen_q", "-4", **packed(max_seqlen_q=-4)),
    Refused(TypeError, "max_seqlen_q", "a str", "a Python integer", **packed(max_seqlen_q="4")),
    Refused(TypeError, "max_seqlen_k", "a list", "a Python integer", **packed(max_seqlen_k=[4])),
    Refused(TypeError, "max_seqlen_q", "a float", "a Python integer", **packed(max_seqlen_q=0.5)),
    Refused(RuntimeError, "cu_seqlens_q", "meta",
            **{**packed(), "cu_seqlens_q": bounds(0, 2, 6).to("meta")}),
    Refused(ValueError, "batch", "2", "1", q=zeros(2, 6, 4, 8), k=zeros(2, 7, 2, 8),
            v=zeros(2, 7, 2, 5), **packed()),
    Refused(ValueError, "bias", "key_bias", **packed(bias=zeros(6, 7))),
    Refused(ValueError, "gain_rows", "(-1, None)", **packed(key_gain=zeros(1, 1, 7),
            gain_rows=(-1, None))),
)  # fmt: skip

REST = (
    Refused(ValueError, "head_gate", "[1, 6, 2]", "[1, 6, 4]", head_gate=zeros(1, 6, 2)),
    Refused(ValueError, "head_gate", "[1, 6, 1]", head_gate=zeros(1, 6, 1)),
    Refused(TypeError, "head_gate", "bool", head_gate=zeros(1, 6, 4, dtype=torch.bool)),
    Refused(ValueError, "identity_mix", "(6, 7)", "Sq = Sk", identity_mix=zeros(4)),
    Refused(ValueError, "identity_mix", "[1, 2]", k=zeros(1, 6, 2, 8), v=zeros(1, 6, 2, 5),
            identity_mix=zeros(2)),
    Refused(ValueError, "identity_mix", "[3, 4]", k=zeros(1, 6, 2, 8), v=zeros(1, 6, 2, 5),
            identity_mix=zeros(3, 4)),
    Refused(TypeError, "return_aux", "a bool", "Aux", return_aux=True),
    Refused(ValueError, "return_aux", "relu", "softmax", return_aux=hw.Aux(lse=True),
            activation="relu"),
    Refused(TypeError, "return_aux.mass", "float32", return_aux=hw.Aux(mass=zeros(7))),
    Refused(TypeError, "return_aux.mass", "a list", return_aux=hw.Aux(mass=[0])),
    Refused(ValueError, "return_aux.mass", "from 0 to 7", "to 6",
            return_aux=hw.Aux(mass=bounds(0, 7))),
    Refused(ValueError, "return_aux.mass", "from -1", return_aux=hw.Aux(mass=bounds(-1))),
    Refused(ValueError, "return_aux.mass", "[3, 2]",
            return_aux=hw.Aux(mass=bounds([0, 1], [1, 2], [2, 3]))),
    Refused(ValueError, "return_aux.mass", "[1, 1, 6]",
            return_aux=hw.Aux(mass=zeros(6, dtype=torch.bool))),
)  # fmt: skip


def check(case, function, arguments, monkeypatch):
    allocates_nothing(monkeypatch)
    case.check(lambda: function(**arguments, **case.arguments))


def merged(case, arguments):
    """The good arguments where the case has none of its own."""
    return {n: x for n, x in arguments.items() if n not in case.arguments}


@pytest.mark.parametrize("backend", ("auto", "reference"))
@pytest.mark.parametrize("case", INPUTS + SCORES + PACKED + REST, ids=repr)
def test_attention(case, backend, monkeypatch):
    if backend == "reference" and "backend" in case.arguments:
        pytest.skip("about the backend itself")
    arguments = merged(case, {**good(), "backend": backend})
    check(case, hw.attention, arguments, monkeypatch)


COMPANIONS = {
    "attention_lse": {},
    "attention_transpose": {"x": zeros(1, 6, 4, 5)},
    "column_stats": {},
    "attention_probs": {"keys": bounds(0)},
}


@pytest.mark.parametrize("name", COMPANIONS)
@pytest.mark.parametrize("case", [c for c in SCORES + PACKED if "v" not in c.arguments], ids=repr)
def test_companions_refuse_what_attention_refuses(case, name, monkeypatch):
    arguments = merged(case, {"q": good()["q"], "k": good()["k"], **COMPANIONS[name]})
    check(case, getattr(hw, name), arguments, monkeypatch)


OWN = (
    ("attention_lse", Refused(ValueError, "log-sum-exp", "sigmoid", activation="sigmoid")),
    ("attention_transpose", Refused(ValueError, "x", "[1, 7, 4, 5]", "[1, 6, 4, 5]",
                                    x=zeros(1, 7, 4, 5))),
    ("attention_transpose", Refused(ValueError, "x", "[1, 6, 2, 5]", x=zeros(1, 6, 2, 5))),
    ("attention_transpose", Refused(TypeError, "x", "float64", x=zeros(1, 6, 4, 5, dtype=F64))),
    *((name, Refused(ValueError, "lse", "[1, 6, 4]", "[1, 4, 6]", lse=zeros(1, 6, 4)))
      for name in list(COMPANIONS)[1:]),
    *((name, Refused(TypeError, "lse", "float64", lse=zeros(1, 4, 6, dtype=F64)))
      for name in list(COMPANIONS)[1:]),
    *((name, Refused(ValueError, "lse", "relu", lse=zeros(1, 4, 6), activation="relu"))
      for name in list(COMPANIONS)[1:]),
    ("column_stats", Refused(ValueError, "kind", "'min'", "one of", kind="min")),
    ("column_stats", Refused(ValueError, "row_weight", "[1, 6, 4]", row_weight=zeros(1, 6, 4))),
    ("column_stats", Refused(ValueError, "row_weight", "max", kind="max",
                             row_weight=zeros(1, 4, 6))),
    ("column_stats", Refused(ValueError, "out", "[1, 4, 6]", "[1, 4, 7]", out=zeros(1, 4, 6))),
    ("column_stats", Refused(ValueError, "out", "[1, 4, 7]", "[1, 7]", out=zeros(1, 4, 7),
                             reduce_heads=True)),
    ("column_stats", Refused(TypeError, "out", "bfloat16",
                             out=zeros(1, 4, 7, dtype=torch.bfloat16))),
    ("attention_probs", Refused(ValueError, "None", "exactly one", keys=None)),
    ("attention_probs", Refused(ValueError, "keys and rows", rows=bounds(0))),
    ("attention_probs", Refused(TypeError, "keys", "float32", keys=zeros(2))),
    ("attention_probs", Refused(TypeError, "keys", "a list", keys=[0])),
    ("attention_probs", Refused(ValueError, "keys", "[2, 1]", keys=bounds([0], [1]))),
    ("attention_probs", Refused(ValueError, "keys", "from 0 to 7", "to 6", keys=bounds(0, 7))),
    ("attention_probs", Refused(ValueError, "rows", "from -1", keys=None, rows=bounds(-1))),
    ("attention_probs", Refused(ValueError, "offsets", "[1, 1]", keys=None, offsets=bounds([0]))),
    ("attention_probs", Refused(RuntimeError, "keys", "meta", keys=bounds(0).to("meta"))),
)  # fmt: skip


@pytest.mark.parametrize("backend", ("auto", "reference"))
@pytest.mark.parametrize("name, case", OWN, ids=str)
def test_companions(name, case, backend, monkeypatch):
    given = {"q": good()["q"], "k": good()["k"], **COMPANIONS[name], "backend": backend}
    check(case, getattr(hw, name), merged(case, given), monkeypatch)


def test_bounds_on_a_gpu_need_the_longest_length():
    """Asking the device would make the host wait. Shapes alone: no GPU is needed to say so."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(1, 6, 2, 8, device="cuda")
        ends = torch.empty(3, dtype=torch.int64, device="cuda")
        with pytest.raises(ValueError, match=r"max_seqlen_q is None; expected .*as a list"):
            hw.attention(q, q, q, cu_seqlens_q=ends, cu_seqlens_k=ends)
        lengths = {"max_seqlen_q": 4, "max_seqlen_k": 4}
        o = hw.attention(q, q, q, cu_seqlens_q=ends, cu_seqlens_k=ends, **lengths)
        assert o.shape == q.shape


MERGE = (
    Refused(TypeError, "outs", "list", outs=zeros(1, 3, 2, 8), lses=[zeros(1, 2, 3)]),
    Refused(ValueError, "number", "(0, 0)", outs=[], lses=[]),
    Refused(ValueError, "number", "(2, 1)", outs=[zeros(1, 3, 2, 8)] * 2, lses=[zeros(1, 2, 3)]),
    Refused(ValueError, "outs[1]", "[1, 4, 2, 8]", lses=[zeros(1, 2, 3)] * 2,
            outs=[zeros(1, 3, 2, 8), zeros(1, 4, 2, 8)]),
    Refused(ValueError, "lses[0]", "[1, 3, 2]", "[1, 2, 3]", outs=[zeros(1, 3, 2, 8)],
            lses=[zeros(1, 3, 2)]),
    Refused(TypeError, "lses[0]", "bfloat16", "float32",
            outs=[zeros(1, 3, 2, 8, dtype=torch.bfloat16)],
            lses=[zeros(1, 2, 3, dtype=torch.bfloat16)]),
    Refused(TypeError, "outs[1]", "float64", lses=[zeros(1, 2, 3)] * 2,
            outs=[zeros(1, 3, 2, 8), zeros(1, 3, 2, 8, dtype=F64)]),
)  # fmt: skip


@pytest.mark.parametrize("case", MERGE, ids=repr)
def test_merge_attention(case, monkeypatch):
    check(case, hw.merge_attention, {}, monkeypatch)
