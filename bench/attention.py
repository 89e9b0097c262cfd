# SPDX-License-Identifier: Apache-2.0
"""The suite of hw.attention and its companions, and their speed targets.

The peer everywhere is torch's scaled_dot_product_attention; of options that it does not have, ours
without the option, and compiled flex_attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import headworks as hw
from bench import peers, predictions
from bench.parts import call_of, cost_of, empty_op, exponent, no_grad, overhead, speedup
from bench.suite import Case, Result, Target
from bench.timing import Call, graphed
from headworks.cost import cost

D = 64
CPU_SHAPE = {"B": 1, "H": 8, "D": D}
GPU_SHAPE = {"B": 4, "H": 16, "D": D}
WINDOW = (128, 0)
LENGTHS = tuple(64 + (37 * i) % 449 for i in range(64))  # 64 .. 512, mixed
OPTIONS_TOKENS = 2048


def cases(device: str, quick: bool) -> list[Case]:
    """Forward, forward + backward, window, options, columns, packed, memory, overhead."""
    if device == "cuda":
        dense = gpu_cases(device, tiny=False)
    else:
        lengths = (1024,) if quick else (1024, 4096)
        both = [*((s, torch.float32) for s in lengths), (2048, torch.bfloat16)]
        dense = [
            _case(device, mode, s, causal, dtype)
            for mode in ("forward", "train")
            for s, dtype in both
            for causal in (False, True)
        ]
    return [
        *dense,
        _window_case(device, 4096 if quick else 16384),
        _options_case(device, quick),
        _columns_case(device),
        _packed_case(device),
        _decode_case(device),
        _growth_case(device, tuple(1024 << i for i in range(4 if quick else 5))),
        *([] if quick else [_memory_case(device)]),
        _overhead_case(),
    ]


def targets(results: Mapping[str, Result], device: str) -> list[Target]:
    """The thresholds of the design, judged on this run."""
    if device == "cuda":
        return predictions.targets("attention", results)
    rows = []
    for name, result in results.items():
        if result.shape["mode"] in ("forward", "train") and "sdpa" in result.seconds:
            rows.append(Target(f"{name}: SDPA", result.speedup("sdpa"), 1.0))
    name = "window 128 S 16384"
    rows.append(Target(f"{name}: causal SDPA", speedup(results, name, "sdpa"), 20.0))
    for option in ("bias", "temperature", "gain", "gate", "mix", "statistics"):
        rows.append(Target(f"with {option}", _over(results, "options", option), 1.15, "x", True))
    rows.append(Target("column sums", _over(results, "columns", "column sums"), 0.6, "x", True))
    rows.append(Target("transpose", _over(results, "columns", "transpose"), 1.6, "x", True))
    name = "packed 64 lengths"
    rows.append(Target(f"{name}: padded SDPA", speedup(results, name, "sdpa, padded"), 1.5))
    rows.append(Target("S 65536 beyond its tensors", _memory(results), 200.0, "MB", True))
    rows.append(Target("growth exponent, window", exponent(results), 1.05, "", True))
    rows.append(Target("call overhead", overhead(results), 10.0, "us", True))
    return rows


def inputs(
    shape: Mapping[str, int], s: int, dtype: torch.dtype, device: str, *, grad: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q [B, S, H, D] and k, v [B, S, Hkv, D], of as many heads where there is no Hkv."""
    generator = torch.Generator(device).manual_seed(0)

    def tensor(heads: int) -> Tensor:
        size = (shape["B"], s, heads, shape["D"])
        x = torch.randn(size, generator=generator, device=device).to(dtype)
        return x.requires_grad_(grad)

    keys = shape.get("Hkv", shape["H"])
    return tensor(shape["H"]), tensor(keys), tensor(keys)


def _shape(device: str) -> dict[str, int]:
    return CPU_SHAPE if device == "cpu" else GPU_SHAPE


def _facts(device: str, dtype: torch.dtype, mode: str, **more: Any) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    return {**_shape(device), **more, "dtype": name, "mode": mode}


def _case(device: str, mode: str, s: int, causal: bool, dtype: torch.dtype) -> Case:
    short = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    name = f"{mode} {_mask(causal)} S {s} {short}"
    return dense_case(device, name, _shape(device), mode, s, causal, dtype)


def _mask(causal: bool) -> str:
    return "causal" if causal else "full"


def dense_case(
    device: str,
    name: str,
    shape: Mapping[str, int],
    mode: str,
    s: int,
    causal: bool,
    dtype: torch.dtype,
    *,
    written: bool = False,
) -> Case:
    """Ours beside SDPA. `written`: beside torch code too, and flex_attention without gradient."""

    def contenders() -> dict[str, Call]:
        qkv = inputs(shape, s, dtype, device, grad=mode == "train")

        def ours(q: Tensor, k: Tensor, v: Tensor) -> Any:
            return hw.attention(q, k, v, is_causal=causal)

        grouped = shape.get("Hkv", shape["H"]) != shape["H"]
        functions = {
            "headworks": ours,
            **peers.softmax_peers(device, causal=causal, grouped=grouped),
        }
        if written:
            functions |= peers.reference_peers(causal=causal)
        if written and mode == "forward":
            functions["flex"] = peers.flex(s, device, causal=causal)
        return {name: call_of(function, qkv, mode) for name, function in functions.items()}

    total = cost_of("attention", mode, **shape, S=s, dtype=dtype, is_causal=causal)
    facts = {**_facts(device, dtype, mode, S=s, is_causal=causal), **shape}
    return Case(name, facts, contenders, total, memory=s == 4096)


def gpu_cases(device: str, tiny: bool) -> list[Case]:
    """What a GPU is judged by: head dims of 64 and 128, grouped heads, decoding."""
    half = torch.bfloat16
    batch, heads, lengths = (1, 2, (64,)) if tiny else (4, 16, (2048, 8192))
    rows = []
    for mode in ("forward", "train"):
        for d in (64, 128):
            for s in lengths:
                for causal in (True, False):
                    name = f"{mode} {_mask(causal)} D {d} S {s} bf16"
                    shape = {"B": batch, "H": heads, "D": d}
                    small = s <= 2048 and d == 64 and not tiny
                    rows.append(
                        dense_case(device, name, shape, mode, s, causal, half, written=small)
                    )
        s, shape = (
            lengths[-1],
            {"B": batch, "H": 8 if tiny else 32, "Hkv": 1 if tiny else 4, "D": 128},
        )
        rows.append(
            dense_case(device, f"{mode} causal GQA 8:1 S {s} bf16", shape, mode, s, True, half)
        )
    for sequences in (1, 8, 64):
        for label, kv_heads in (("MHA", None), ("GQA 8:1", 1 if tiny else 4)):
            shape = {"B": sequences, "H": 8 if tiny else 32, "D": 128}
            shape |= {"H": heads} if kv_heads is None else {"Hkv": kv_heads}
            rows.append(
                decode_case(device, f"decode {label} B {sequences}", shape, 64 if tiny else 8192)
            )
    return rows


def gpu_options(device: str) -> list[Case]:
    """Options, columns and packed sequences, beside flex_attention and ours without them."""
    return [_options_case(device, quick=False), _columns_case(device), _packed_case(device)]


def decode_case(device: str, name: str, shape: Mapping[str, int], keys: int) -> Case:
    """One query of each sequence over `keys` keys: calls as they are, and as graphs."""
    dtype = torch.bfloat16

    def contenders() -> dict[str, Call]:
        q = inputs(shape, 1, dtype, device)[0]
        _, k, v = inputs(shape, keys, dtype, device)
        grouped = shape.get("Hkv", shape["H"]) != shape["H"]
        calls = {"headworks": no_grad(hw.attention, q, k, v)}
        for peer, function in peers.softmax_peers(device, causal=False, grouped=grouped).items():
            calls[peer] = no_grad(function, q, k, v)
        calls |= {f"{peer}, graph": graphed(calls[peer]) for peer in ("headworks", "sdpa")}
        return calls

    total = cost("attention", **shape, S=1, Sk=keys, dtype=dtype)
    facts = {**_facts(device, dtype, "decode", S=1, Sk=keys), **shape}
    return Case(name, facts, contenders, total)


def _window_case(device: str, s: int) -> Case:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def contenders() -> dict[str, Call]:
        qkv = inputs(_shape(device), s, dtype, device)
        return {
            "headworks": no_grad(hw.attention, *qkv, is_causal=True, window_size=WINDOW),
            "sdpa": no_grad(peers.softmax_peers(device, causal=True)["sdpa"], *qkv),
        }

    total = cost(
        "attention", **_shape(device), S=s, dtype=dtype, is_causal=True, window_size=WINDOW
    )
    return Case(f"window 128 S {s}", _facts(device, dtype, "window", S=s), contenders, total)


def _options_case(device: str, quick: bool) -> Case:
    """Ours with one option each, beside ours without any."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    s, shape = OPTIONS_TOKENS, _shape(device)

    def contenders() -> dict[str, Call]:
        qkv = inputs(shape, s, dtype, device)
        heads = shape["H"]
        bias = torch.randn(1, 1, s, s, device=device, dtype=dtype)
        per_row = torch.rand(shape["B"], s, heads, device=device)
        options: dict[str, dict[str, Any]] = {
            "headworks": {},
            "bias": {"bias": bias},
            "bias per head": {"bias": bias.expand(1, heads, s, s).contiguous()},
            "temperature": {"row_temperature": per_row},
            "gain": {"key_gain": torch.rand(1, heads, s, device=device)},
            "key bias": {"key_bias": torch.rand(1, heads, s, device=device)},
            "gate": {"head_gate": per_row},
            "mix": {"identity_mix": torch.rand(heads, device=device)},
            "softcap": {"softcap": 30.0},
            "statistics": {"return_aux": hw.Aux(True, True, True, True)},
            "half of the heads gated off": {
                "head_gate": (torch.arange(heads, device=device) % 2).expand_as(per_row).float()
            },
        }
        calls = {name: no_grad(hw.attention, *qkv, **kw) for name, kw in options.items()}
        calls["sdpa"] = no_grad(peers.softmax_peers(device, causal=False)["sdpa"], *qkv)
        if not quick:
            calls |= {n: no_grad(f, *qkv) for n, f in peers.flex_peers(bias[0, 0]).items()}
        return calls

    return Case("options", _facts(device, dtype, "options", S=s), contenders)


def _columns_case(device: str) -> Case:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    s = OPTIONS_TOKENS

    def contenders() -> dict[str, Call]:
        q, k, v = inputs(_shape(device), s, dtype, device)
        lse = hw.attention_lse(q, k)
        return {
            "headworks": no_grad(hw.attention, q, k, v),
            "lse": no_grad(hw.attention_lse, q, k),
            "column sums": no_grad(hw.column_stats, q, k, lse=lse),
            "transpose": no_grad(hw.attention_transpose, q, k, v),
            "transpose given lse": no_grad(hw.attention_transpose, q, k, v, lse=lse),
            "eager column sums": no_grad(peers.eager_column_sums, q, k),
            "eager transpose": no_grad(peers.eager_transpose, q, k, v),
        }

    return Case("columns", _facts(device, dtype, "columns", S=s), contenders)


def _packed_case(device: str) -> Case:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def contenders() -> dict[str, Call]:
        shape, longest = _shape(device), max(LENGTHS)
        q, k, v = inputs({**shape, "B": 1}, sum(LENGTHS), dtype, device)
        cut = torch.tensor([0, *LENGTHS], device=device).cumsum(0)
        lengths = {"cu_seqlens_q": cut, "cu_seqlens_k": cut}
        lengths |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
        padded = inputs({**shape, "B": len(LENGTHS)}, longest, dtype, device)
        seen = torch.arange(longest, device=device) < torch.tensor(LENGTHS, device=device)[:, None]
        return {
            "headworks": no_grad(hw.attention, q, k, v, **lengths),
            "sdpa, padded": no_grad(peers.sdpa_masked, *padded, seen[:, None, None]),
        }

    return Case("packed 64 lengths", _facts(device, dtype, "packed"), contenders)


def _decode_case(device: str) -> Case:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def contenders() -> dict[str, Call]:
        q = inputs(_shape(device), 1, dtype, device)[0]
        _, k, v = inputs(_shape(device), 8192, dtype, device)
        return {
            "headworks": no_grad(hw.attention, q, k, v),
            "sdpa": no_grad(peers.softmax_peers(device, causal=False)["sdpa"], q, k, v),
        }

    total = cost("attention", **_shape(device), S=1, Sk=8192, dtype=dtype)
    return Case("decode Sk 8192", _facts(device, dtype, "decode", S=1), contenders, total)


def _growth_case(device: str, sizes: tuple[int, ...]) -> Case:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def contenders() -> dict[str, Call]:
        return {
            str(s): no_grad(
                hw.attention,
                *inputs(_shape(device), s, dtype, device),
                is_causal=True,
                window_size=WINDOW,
            )
            for s in sizes
        }

    return Case("growth", _facts(device, dtype, "growth"), contenders)


def _memory_case(device: str) -> Case:
    """Peak memory at S 65536, one head; time is not the point."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    shape = {**_shape(device), "B": 1, "H": 1}

    def contenders() -> dict[str, Call]:
        qkv = inputs(shape, 65536, dtype, device)
        return {"headworks": no_grad(hw.attention, *qkv, is_causal=True)}

    facts = {**_facts(device, dtype, "memory", S=65536), **shape}
    return Case("memory S 65536", facts, contenders, memory=True)


def _overhead_case() -> Case:
    """Host time of a call with next to nothing to compute, beside an operator that does nothing."""
    shape = {"B": 1, "H": 1, "D": 16}

    def contenders() -> dict[str, Call]:
        plain = inputs(shape, 1, torch.float32, "cpu")
        graph = inputs(shape, 1, torch.float32, "cpu", grad=True)
        return {
            "empty op": no_grad(empty_op(), *plain),
            "headworks": no_grad(hw.attention, *plain),
            "headworks, grad": lambda: hw.attention(*graph),
        }

    return Case("overhead", {**shape, "S": 1, "dtype": "float32", "mode": "overhead"}, contenders)


def _over(results: Mapping[str, Result], case: str, contender: str) -> float | None:
    """Time of a contender over that of ours without any option."""
    if case not in results:
        return None
    return results[case].ratio(contender)


def _memory(results: Mapping[str, Result]) -> float | None:
    """Megabytes beyond the output."""
    name = "memory S 65536"
    if name not in results or "headworks" not in results[name].peak_bytes:
        return None
    size = 2 if results[name].shape["dtype"] == "bfloat16" else 4
    return (results[name].peak_bytes["headworks"] - 65536 * D * size) / 1e6
