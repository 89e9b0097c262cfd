# SPDX-License-Identifier: Apache-2.0
"""The cases of hw.attention, and how a case of it and of its companions is written.

Sizes: B, Sq, Sk, Hq, H, D, Dv; what the case has of optional tensors, by shape ("1" or a symbol
per dimension); `lengths` of the queries and keys of packed sequences.
"""

from __future__ import annotations

from headworks.testing import Case

SOFTMAXES = ("softmax", "softmax1")
WEIGHTS = (
    *((a, None) for a in SOFTMAXES),
    *((a, n) for a in ("sigmoid", "relu", "relu2") for n in (None, "length", "sum")),
)
STATISTICS = ("lse", "entropy", "p_max", "sq_norm", "mass")
SCORE_TENSORS = (
    "bias", "key_bias", "key_gain", "row_temperature", "sink", "cu_seqlens_q", "cu_seqlens_k",
)  # fmt: skip
# Those of them that have a gradient.
SCORE_GRADIENTS = tuple(name for name in SCORE_TENSORS if not name.startswith("cu_seqlens"))


def case(
    Sq=65, Sk=None, D=16, Dv=24, B=1, H=2, Hq=None, *, causal=False, window=None, scale=None,
    softcap=0.0, bias=None, hidden=0.0, key_bias=None, key_gain=None, gain_rows=None,
    temperature=None, weights=("softmax", None), gate=None, mix=None, lengths=None, aux=(),
    spread=1.0, shared=False, sink=None, floor=2.0, label="", **more,
):  # fmt: skip
    """`hidden`: the share of -inf in the bias, and its row 3. `spread`: multiplies the scores.
    `gate`: the share of zeros. `mix`, `sink`: "h" or "bh". `shared`: q and k are those of all batch
    entries. `more`: options of a companion."""
    if lengths is not None:
        Sq, Sk, B = sum(lengths[0]), sum(lengths[1]), 1
    Sk = Sq if Sk is None else Sk
    sizes = {"B": B, "Sq": Sq, "Sk": Sk, "Hq": Hq or H, "H": H, "D": D, "Dv": Dv,
             "lengths": lengths, "bias": bias, "hidden": hidden, "key_bias": key_bias,
             "key_gain": key_gain, "temperature": temperature, "gate": gate, "mix": mix,
             "aux": aux, "spread": spread, "shared": shared, "sink": sink}  # fmt: skip
    activation, normalizer = weights
    options = {"is_causal": causal, "activation": activation, "normalizer": normalizer}
    options |= {} if window is None else {"window_size": window}
    options |= {} if scale is None else {"scale": scale}
    options |= {"softcap": softcap} if softcap else {}
    options |= {} if gain_rows is None else {"gain_rows": gain_rows}
    words = [f"S{Sq}:{Sk}", f"D{D}:{Dv}", f"B{B}", f"H{Hq or H}:{H}"]
    words += [activation] if activation != "softmax" else []
    words += [normalizer] if normalizer else []
    words += ["causal"] if causal else []
    words += [f"window{window[0]}:{window[1]}"] if window else []
    words += [f"{n}{v:g}" for n, v in (("scale", scale), ("cap", softcap)) if v]
    words += [f"{n}_{v}" for n, v in (("bias", bias), ("kbias", key_bias), ("gain", key_gain),
              ("temp", temperature), ("mix", mix), ("sink", sink)) if v]  # fmt: skip
    words += [f"hidden{hidden:g}"] if hidden else []
    words += [f"rows{gain_rows[0]}:{gain_rows[1]}"] if gain_rows else []
    words += [f"gate{gate:g}"] if gate is not None else []
    words += [f"spread{spread:g}"] if spread != 1.0 else []
    words += [f"packed{len(lengths[0])}"] if lengths is not None else []
    words += ["shared"] if shared else []
    words += ["aux" if len(aux) == len(STATISTICS) else "+".join(aux)] if aux else []
    words += [f"{n}_{v}" for n, v in more.items()]
    words += [label] if label else []
    return Case("-".join(words), sizes, options | more, floor)


ALL = {"softcap": 3.0, "key_bias": "bhk", "key_gain": "b1k", "temperature": "bq1", "gate": 0.3}
# With a large spread: scores of +-1e7, whose sums of weights are lost beside them.
SAME = {"scale": 1e9, "softcap": 1e7, "label": "many the same"}
LENGTHS = ((0, 5, 64, 1, 70, 3), (4, 5, 70, 0, 64, 3))

MASKS = (
    case(causal=True),
    case(label="plain"),
    *(
        case(Sq=sq, Sk=sk, causal=c, aux=("lse",))
        for sq, sk in ((1, 130), (40, 65), (130, 63), (65, 1))
        for c in (True, False)
    ),
    *(case(Sq=s, causal=True) for s in (1, 2, 63, 64, 130)),
    *(case(Sq=s) for s in (63, 64, 130)),
    *(case(Sq=130, window=w) for w in ((0, 0), (5, None), (None, 7), (64, 3), (200, 200))),
    *(
        case(Sq=s, Sk=130, window=w, causal=True)
        for s in (40, 130, 150)
        for w in ((5, 0), (70, None))
    ),
    case(Sq=200, Sk=20, window=(3, 2), aux=("lse",), label="rows without keys"),
)

SHAPES = (
    *(case(Sq=66, D=d, Dv=20, causal=True) for d in (1, 8, 40, 64, 96, 128)),
    *(case(Sq=66, D=8, Dv=dv) for dv in (0, 1, 8, 40, 64, 96, 128, 200)),
    *(case(Sq=66, B=2, H=h, Hq=hq, causal=True) for hq, h in ((4, 2), (6, 1), (3, 3))),
    *(
        case(Sq=sq, Sk=sk, B=b, H=h, aux=STATISTICS, weights=(a, None))
        for b, sq, sk, h in ((0, 5, 5, 2), (2, 0, 5, 2), (2, 5, 0, 2), (2, 5, 5, 0))
        for a in SOFTMAXES
    ),
    case(Sq=0, B=2, mix="bh", **ALL),
    case(lengths=((), ()), causal=True),
    case(lengths=((0,), (0,)), aux=STATISTICS),
)

SCORES = (
    *(case(softcap=c, scale=1.0, causal=True, aux=("lse",)) for c in (0.5, 30.0)),
    case(scale=-0.7),
    case(scale=0.0),
    *(
        case(Sq=70, Sk=65, B=2, bias=b, causal=c)
        for b in ("bhqk", "11qk", "b11k", "1h1k", "b1qk")
        for c in (False, True)
    ),
    # Gradients that are 0: a sum of a row's numbers that cancel, and one of thousands.
    *(case(Sq=40, Sk=65, B=2, bias="1hq1", causal=c, floor=6.0) for c in (False, True)),
    case(Sq=40, Sk=65, B=2, bias="1111", floor=32.0),
    case(bias="11qk", hidden=0.4, aux=STATISTICS),
    case(bias="b1qk", B=2, hidden=0.9, causal=True, aux=STATISTICS, weights=("softmax1", None)),
    case(bias="bhqk", hidden=1.0, aux=STATISTICS, label="all hidden"),
    *(case(B=2, Hq=4, key_bias=b, causal=True) for b in ("bhk", "11k", "1hk")),
    case(B=2, bias="b11k", key_bias="1hk"),
    *(
        case(B=2, Hq=4, key_gain=g, gain_rows=r)
        for g in ("bhk", "11k")
        for r in (None, (-1, None), (10, 64), (5, -3))
    ),
    *(case(B=2, Hq=4, temperature=t, causal=True) for t in ("bqh", "1q1")),
    case(
        B=2,
        softcap=2.0,
        bias="11qk",
        key_bias="1hk",
        key_gain="11k",
        temperature="1qh",
        aux=STATISTICS,
    ),
    case(spread=20.0, D=16, aux=STATISTICS, label="large scores"),
    case(
        spread=20.0,
        D=16,
        aux=STATISTICS,
        causal=True,
        weights=("softmax1", None),
        label="large scores",
    ),
    case(spread=20.0, D=16, key_gain="11k", aux=STATISTICS),
)

REST = (
    *(
        case(Sq=66, weights=w, causal=c)
        for w in WEIGHTS
        for c in (True, False)
        if w[1] != "sum" or not c
    ),
    *(
        case(
            Sq=50,
            Sk=66,
            B=2,
            Hq=4,
            weights=w,
            softcap=2.0,
            bias="11qk",
            key_bias="1hk",
            key_gain="11k",
            gain_rows=(20, None),
            temperature="bqh",
            gate=0.2,
        )
        for w in WEIGHTS
    ),
    *(case(Sq=66, weights=w, window=(9, 4), bias="11qk", hidden=0.3) for w in WEIGHTS),
    *(
        case(Sq=130, B=2, H=1, Hq=3, gate=g, mix=m, causal=True)
        for g, m in ((0.9, None), (1.0, None), (None, "bh"), (None, "h"), (0.3, "bh"))
    ),
    case(Sq=66, B=2, H=2, Hq=4, mix="bh", gate=0.2, weights=("sigmoid", "length"), aux=()),
    *(case(aux=(a,), causal=True) for a in STATISTICS),
    *(
        case(Sq=130, Sk=66, B=2, Hq=4, aux=STATISTICS, weights=(a, None), causal=c)
        for a in SOFTMAXES
        for c in (True, False)
    ),
    *(
        case(lengths=LENGTHS, Hq=4, aux=("lse", "entropy"), causal=c, window=w)
        for c, w in ((False, None), (True, None), (False, (9, 2)))
    ),
    case(
        lengths=LENGTHS,
        key_bias="11k",
        key_gain="1hk",
        gain_rows=(2, 40),
        temperature="1qh",
        gate=0.3,
        weights=("softmax1", None),
    ),
    case(lengths=LENGTHS, weights=("relu", "length"), causal=True),
    case(lengths=((70, 5), (70, 5)), mix="h", gate=0.2, causal=True),
    case(lengths=((300,), (300,)), causal=True, aux=STATISTICS),
    *(
        case(Sq=66, Sk=sk, B=2, Hq=4, causal=True, sink=z, aux=STATISTICS)
        for z, sk in (("h", 66), ("bh", 130))
    ),
    case(Sq=70, B=2, Hq=4, sink="bh", softcap=2.0, bias="b1qk", temperature="1qh", gate=0.2),
    case(Sq=130, Sk=20, window=(3, 2), sink="h", aux=STATISTICS, label="rows without keys"),
    case(Sq=66, bias="11qk", hidden=0.6, sink="h", aux=STATISTICS),
    case(Sq=1, Sk=300, Hq=4, sink="h", aux=("lse",)),
    case(Sq=3, Sk=0, B=2, sink="bh", aux=STATISTICS),
    case(lengths=LENGTHS, Hq=4, sink="h", causal=True, aux=("lse", "entropy")),
    case(Sq=66, spread=20.0, D=16, sink="h", aux=STATISTICS, label="large scores"),
    case(Sq=5, B=10, H=1, Hq=2, D=8, Dv=8, sink="bh", shared=True, aux=("lse",)),
    # What all batch entries share the CPU computes once for 8 of them.
    case(Sq=70, B=10, H=1, Hq=2, D=8, Dv=8, causal=True, key_bias="11k", shared=True),
    case(
        Sq=3,
        Sk=20,
        B=10,
        H=1,
        D=8,
        Dv=16,
        bias="11qk",
        key_bias="1hk",
        key_gain="11k",
        aux=STATISTICS,
        shared=True,
    ),
    # Few rows, some of which have no weight.
    case(Sq=4, H=2, Hq=4, weights=("relu", None), causal=True),
)

CASES = (*MASKS, *SHAPES, *SCORES, *REST)

SAMPLE_CASES = (
    case(Sq=70, B=2, Hq=4, causal=True, window=(20, 0), sink="bh", aux=("lse", "p_max")),
    case(
        Sq=70,
        B=3,
        H=1,
        Hq=2,
        D=24,
        Dv=20,
        causal=True,
        window=(40, 0),
        bias="b1qk",
        mix="bh",
        gain_rows=(-20, -5),
        aux=STATISTICS,
        **ALL,
    ),
    case(Sq=300, Sk=362, B=2, H=2, causal=True),
    case(Sq=70, Sk=90, B=2, Hq=4, weights=("relu2", "sum"), key_bias="bhk", gate=0.5),
    case(Sq=66, B=2, weights=("sigmoid", "length"), temperature="bqh", causal=True),
    case(lengths=LENGTHS, H=1, Hq=2, Dv=16, causal=True, key_gain="11k", aux=("lse", "p_max")),
)

EMULATOR_CASES = (
    case(Sq=40, B=2, H=1, Hq=2, D=16, Dv=16, causal=True, sink="bh", aux=STATISTICS),
    case(Sq=2, Sk=300, H=1, D=16, Dv=8, sink="h", aux=("lse",)),
    case(
        Sq=70,
        B=1,
        H=1,
        Hq=2,
        D=16,
        Dv=16,
        causal=True,
        bias="1hqk",
        mix="bh",
        aux=STATISTICS,
        gain_rows=(9, 50),
        **ALL,
    ),
    case(Sq=40, Sk=130, H=1, D=16, Dv=8, causal=True, aux=("lse",)),
    case(lengths=((0, 7, 66, 1), (3, 9, 66, 0)), H=1, D=8, Dv=8, aux=("lse",)),
    case(
        lengths=((70, 7), (3, 9)),
        H=1,
        D=8,
        Dv=8,
        causal=True,
        key_gain="1hk",
        gain_rows=(2, 60),
        temperature="1qh",
    ),
    case(
        lengths=((5, 7), (0, 9)),
        H=1,
        D=8,
        Dv=8,
        temperature="1qh",
        key_bias="11k",
        label="without keys",
    ),
    case(Sq=130, Sk=20, H=1, D=8, Dv=8, window=(3, 2), temperature="1qh", label="without keys"),
    case(Sq=0, H=1, aux=("lse",)),
    case(Sq=5, Sk=0, H=1, aux=("lse",)),
    *(case(Sq=s, H=1, Dv=8, causal=True) for s in (1, 63, 64, 65)),
    *(
        case(Sq=20, H=1, D=d, Dv=dv)
        for d, dv in ((1, 1), (13, 21), (40, 8), (8, 40), (64, 64), (96, 20), (128, 128))
    ),
    case(Sq=70, H=1, Hq=2, D=100, Dv=128, causal=True),
    case(Sq=40, H=1, D=200, Dv=150, causal=True),
    case(Sq=40, H=1, D=200, Dv=150, causal=True, key_bias="11k"),
    case(Sq=1, Sk=200, H=1, Hq=4, causal=True, label="decode"),
    case(Sq=70, H=1, window=(9, 3)),
    case(Sq=20, H=1, D=8, Dv=8, window=(0, 2)),
    case(Sq=33, Sk=70, B=2, H=1, Hq=2, bias="11qk"),
    case(Sq=70, Sk=66, H=1, Hq=2, bias="11q1", weights=("sigmoid", "length")),
    *(case(Sq=20, B=2, H=h, D=8, Dv=8, bias="1hqk") for h in (1, 2)),
    case(Sq=100, B=2, H=2, D=8, Dv=8, bias="bhq1", window=(3, None), weights=("sigmoid", None)),
    case(Sq=20, H=1, D=8, Dv=8, softcap=1.0),
    case(Sq=20, Sk=70, H=1, D=8, Dv=70),
    case(Sq=33, H=1, bias="11qk", hidden=0.4, aux=STATISTICS),
    case(Sq=33, Sk=20, H=1, bias="b11k", key_bias="1hk", causal=True),
    case(Sq=33, H=1, softcap=2.0, temperature="1qh", key_gain="11k", gain_rows=(-1, None)),
    *(case(Sq=33, Sk=40, H=1, Hq=2, weights=w) for w in WEIGHTS),
    case(Sq=33, Sk=30, H=1, D=8, Dv=8, causal=True, weights=("sigmoid", "length")),
    case(lengths=((7, 20), (9, 20)), H=1, D=8, Dv=8, causal=True, weights=("relu", "length")),
    case(Sq=64, H=1, D=8, Dv=64, weights=("sigmoid", None)),
    case(Sq=70, H=2, gate=0.4, mix="h"),
    case(Sq=20, H=2, Hq=4, Dv=8, mix="bh"),
    *(case(Sq=33, H=1, D=13, Dv=dv, gate=0.4, mix="h") for dv in (21, 45)),
    case(Sq=20, H=1, D=130, Dv=101, gate=0.4, mix="h"),
    case(Sq=33, H=1, spread=20.0, aux=STATISTICS),
    case(Sq=20, Sk=33, H=1, D=8, Dv=8, spread=20.0, aux=STATISTICS, **SAME),
    # Plain scores whose maxima move from tile to tile, some of them and all of them beyond 2^24.
    *(
        case(
            Sq=20, Sk=200, H=1, D=8, Dv=8, spread=20.0, scale=x, aux=("lse",), label="large scores"
        )
        for x in (0.4, 5e4, 1.1e6, 1e7)
    ),
    # Options that meet in pairs: groups of heads, scales of any sign, masks of packed sequences,
    # three splits and more, slices of the values.
    case(Sq=33, Sk=40, B=2, H=2, Hq=4, D=8, Dv=8, causal=True, scale=-0.7, key_bias="bhk"),
    case(Sq=20, H=2, Hq=6, D=8, Dv=8, scale=0.0, key_gain="11k", temperature="bqh"),
    case(
        lengths=((0, 7, 66, 1), (3, 9, 66, 0)),
        H=2,
        Hq=4,
        D=8,
        Dv=8,
        causal=True,
        window=(9, 0),
        gate=0.3,
        temperature="1qh",
    ),
    case(Sq=2, Sk=700, H=2, Hq=4, D=8, Dv=8, aux=STATISTICS, label="splits"),
    case(Sq=130, Sk=257, H=1, D=8, Dv=8, causal=True, label="splits"),
    case(Sq=2, Sk=130, H=1, D=8, Dv=8, bias="11qk", hidden=1.0),
    case(Sq=2, Sk=300, H=1, D=8, Dv=1, weights=("softmax1", None)),
    case(Sq=2, Sk=300, H=1, D=8, Dv=150, weights=("relu", "sum")),
    case(lengths=((1, 3), (400, 300)), H=1, Hq=2, D=8, Dv=8, causal=True, aux=("lse",)),
    case(Sq=1, Sk=300, H=1, Hq=2, D=16, Dv=150, window=(280, None), label="splits of slices"),
    case(Sq=33, H=1, Hq=2, D=200, Dv=8, bias="11qk"),
    # One option each, and otherwise what the tensor-core kernels call plain.
    *(
        case(Sq=20, H=3, D=8, Dv=5, **option)
        for option in (
            *({"aux": (a,)} for a in STATISTICS),
            {"mix": "h"},
            {"gate": 0.3},
            {"softcap": 2.0},
            {"key_bias": "11k"},
            {"key_gain": "11k"},
            {"temperature": "1q1"},
        )
    ),
)

# The speed table: B1 H8 D64.
BENCHMARK_CASES = (
    *(case(Sq=s, H=8, D=64, Dv=64, causal=c) for s in (1024, 2048, 4096) for c in (False, True)),
    case(Sq=16384, H=8, D=64, Dv=64, window=(128, 0), causal=True),
    *(
        case(Sq=2048, H=8, D=64, Dv=64, **option)
        for option in (
            {"bias": "11qk"},
            {"bias": "1hqk"},
            {"key_bias": "11k"},
            {"key_gain": "11k"},
            {"temperature": "1q1"},
            {"gate": 0.0},
            {"mix": "h"},
            {"softcap": 30.0},
            {"aux": STATISTICS},
        )
    ),
    case(Sq=65536, H=1, D=64, Dv=64, causal=True, label="memory"),
    case(lengths=(tuple(range(16, 1040, 16)),) * 2, H=8, D=64, Dv=64, causal=True),
)
