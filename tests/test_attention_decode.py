# SPDX-License-Identifier: Apache-2.0
"""One query whose heads share keys: heads that share a key head are rows of one call, and give what
they give with keys of their own."""

from __future__ import annotations

import pytest
import torch

import headworks as hw
from headworks.ops.attention import _native as native
from headworks.ops.attention._score import Score
from headworks.testing import compare
from identities import randn

pytestmark = pytest.mark.operator

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
BACKENDS = (
    ("cpu", F32),
    ("cpu", F64),
    ("cpu", BF16),
    ("emulate:simt", F32),
    ("emulate:sm80", BF16),
)
KEYS, HEADS = 150, 6

# Options of a call of 2 batch entries.
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window_size": (40, 3)},
    "window of one key": {"window_size": (0, None), "is_causal": True},
    "window beyond the keys": {"window_size": (500, 0)},
    "bias": {"bias": randn(2, HEADS, 1, KEYS, seed=3), "window_size": (70, None)},
    "bias of all heads": {"bias": randn(2, 1, 1, KEYS, seed=3), "window_size": (70, None)},
    "bias of keys": {"bias": randn(1, KEYS, seed=3), "softcap": 3.0},
    "temperature": {"row_temperature": 1 + 0.1 * randn(2, 1, HEADS, seed=4)},
    "gate": {"head_gate": randn(2, 1, HEADS, seed=5)},
    "relu": {"activation": "relu", "normalizer": "length", "window_size": (70, None)},
    "sigmoid": {"activation": "sigmoid", "normalizer": "sum"},
    "softmax1": {"activation": "softmax1"},
    "key bias of all heads": {"key_bias": randn(2, 1, KEYS, seed=6), "window_size": (70, None)},
    "key bias of heads": {"key_bias": randn(2, HEADS, KEYS, seed=6)},
    "gain of all heads": {"key_gain": randn(2, 1, KEYS, seed=7), "gain_rows": (-1, None)},
    "gain of no rows": {"key_gain": randn(2, 1, KEYS, seed=7), "gain_rows": (1, None)},
    "gain": {"key_gain": randn(1, HEADS, KEYS, seed=7), "gain_rows": (0, None)},
    "sink": {"sink": randn(HEADS, seed=8)},
    "gate and softcap": {"head_gate": randn(2, 1, HEADS, seed=5), "softcap": 2.0},
}


@pytest.mark.parametrize("groups", ((2, 3), (1, 6), (6, 1)), ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend, dtype", BACKENDS, ids=str)
def test_heads_are_rows(backend, dtype, name, groups):
    key_heads, group = groups
    q = randn(2, HEADS, 3, 24)[:, :, 1:2].transpose(1, 2).to(dtype)  # [2, 1, 6, 24], not contiguous
    k, v = (
        randn(2, KEYS, key_heads, 24, seed=1).to(dtype),
        randn(2, KEYS, key_heads, 16, seed=2).to(dtype),
    )
    given = {n: x.to(dtype) if torch.is_tensor(x) else x for n, x in OPTIONS[name].items()}
    if dtype == BF16:
        given = {
            n: x.float() if torch.is_tensor(x) and n != "bias" else x for n, x in given.items()
        }
    soft = given.get("activation", "softmax").startswith("softmax")
    want = hw.Aux(lse=True, entropy=True, p_max=True, sq_norm=True) if soft else None

    def attend(backend, dtype=None, repeat=1):
        options = {n: x.to(dtype) if dtype and torch.is_tensor(x) else x for n, x in given.items()}
        tensors = [x.to(dtype) if dtype else x for x in (q, k, v)]
        tensors[1:] = (x.repeat_interleave(repeat, 2) for x in tensors[1:])
        made = hw.attention(*tensors, backend=backend, return_aux=want, **options)
        if want is None:
            return {"o": made}
        return {
            "o": made[0],
            **{n: getattr(made[1], n) for n in ("lse", "entropy", "p_max", "sq_norm")},
        }

    made, ideal = attend(backend), attend("reference", F64, group)
    plain = attend("reference", None, group)
    for part, x in ideal.items():
        compare(made[part], x, dtype, reference=plain[part], name=part)


@pytest.mark.parametrize("backend, dtype", BACKENDS, ids=str)
def test_a_bias_of_the_native_call(backend, dtype):
    """The public function makes a key_bias of a bias of one row; the native call takes either."""
    q = randn(2, 1, HEADS, 24).to(dtype)
    k, v = (randn(2, KEYS, 2, 24, seed=n).to(dtype) for n in (1, 2))
    bias = randn(2, HEADS, 1, KEYS, seed=3).to(dtype)
    score = Score(q, k, bias=bias, scale=0.2, left=70)
    o = native.forward(score, v, None, None, None, native.Want(), backend).o
    options = {"scale": 0.2, "window_size": (70, None), "backend": "reference"}
    ideal = hw.attention(q.double(), k.double(), v.double(), bias=bias.double(), **options)
    compare(o, ideal, dtype, reference=hw.attention(q, k, v, bias=bias, **options))
