# SPDX-License-Identifier: Apache-2.0
"""hw.attention: softmax attention with everything that can ride in its one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._autograd import apart
from ..._errors import describe, fail, require_dense, require_flag
from ..._native import (
    NATIVE_CALLS,
    Maybe,
    NativeCall,
    as_written,
    backend_for,
    route,
    widen,
)
from ..._repeated import Ready, Repeated
from ..._trees import saved_by_name
from ...reference import attention as reference
from . import _native as native
from . import _operators as operators
from ._autograd import differentiable
from ._bounds import Bounds, check_rows_have_values
from ._checks import (
    Rows,
    broadcast,
    cast,
    check_index,
    check_index_values,
    check_inputs,
    check_values,
    require_softmax,
)
from ._native import Want
from ._score import Score, reference_options, score_of, shape_of

OP = "attention"


@dataclass(frozen=True, eq=False)
class Aux:
    """Which read-outs of the rows hw.attention returns beside o; they ride in the same pass.

    lse      L, the log-sum-exp of the scores, base e. Differentiable.
    entropy  -sum_j p ln p, in nats
    p_max    the largest weight
    sq_norm  sum_j p^2
    mass     sum of p over a set of keys: int64 indices [n] or [B, n] (a key named twice counts
             once), or a mask of booleans [Sk], [B, Sk] or [B, H, Sk]
    """

    lse: bool = False
    entropy: bool = False
    p_max: bool = False
    sq_norm: bool = False
    mass: Tensor | None = None


def check_flags(op: str, aux: Aux) -> None:
    """The read-outs asked for by True or False."""
    for name in ("lse", "entropy", "p_max", "sq_norm"):
        require_flag(op, f"return_aux.{name}", getattr(aux, name))


@saved_by_name
class AuxResult(NamedTuple):
    """The read-outs asked for, [B, H, Sq] in float32 (float64 for float64); None for the others."""

    lse: Tensor | None = None
    entropy: Tensor | None = None
    p_max: Tensor | None = None
    sq_norm: Tensor | None = None
    mass: Tensor | None = None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    window_size: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    cu_seqlens_q: Bounds | None = None,
    cu_seqlens_k: Bounds | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    key_gain: Tensor | None = None,
    gain_rows: Rows | None = None,
    row_temperature: Tensor | None = None,
    sink: Tensor | None = None,
    activation: str = "softmax",
    normalizer: str | None = None,
    head_gate: Tensor | None = None,
    identity_mix: Tensor | None = None,
    return_aux: Aux | None = None,
    backend: str = "auto",
    **unknown: Any,
) -> Tensor | tuple[Tensor, AuxResult]:
    r"""Softmax attention and its relatives, in one pass over the scores and memory linear in S.

    .. math::
        x_{ij} &= \mathrm{scale} \, \tau_i \langle q_i, k_j \rangle \qquad
        y = \mathrm{cap} \tanh(x / \mathrm{cap}) \qquad
        s_{ij} = y_{ij} + \gamma_j |y_{ij}| + b_{ij} + \beta_j

        p_{ij} &= e^{s_{ij} - L_i}, \quad L_i = \log \sum_j e^{s_{ij}} \qquad
        o_i = g_i \, \big( (1 - u) \sum_j p_{ij} v_j + u \, v_i \big)

    over the keys j that row i sees. A row that sees none, or none with a finite score, gives 0
    with L = -inf (with a sink L = z) and zero gradients.

    Args:
        q: [B, Sq, Hq, D]. float64, float32, bfloat16 or float16; any strides, zero too.
        k: [B, Sk, H, D], with Hq a multiple of H (grouped and multi-query attention).
        v: [B, Sk, H, Dv], any Dv.
        is_causal: row i sees the keys up to i + Sk - Sq: aligned at the lower right corner.
        window_size: (left, right), how many neighbours before and after its own key i + Sk - Sq a
            row sees; None for all. With is_causal right is 0 or None.
        scale: of the scores; ``D ** -0.5`` by default.
        softcap: cap of the scores, 0.0 for none.
        cu_seqlens_q, cu_seqlens_k: [N + 1], int32 or int64, or lists: N sequences packed into
            q [1, total, Hq, D] and k, v [1, total_k, H, D]; sequence n is rows cu_seqlens[n] to
            cu_seqlens[n + 1]. Their values are checked only where they lie on the CPU.
        max_seqlen_q, max_seqlen_k: the longest of these sequences. May be left out where
            cu_seqlens are lists or on the CPU; they are never read from a GPU.
        bias: b, broadcastable to [B, Hq, Sq, Sk] with any strides, of the dtype of q; -inf hides
            a key. Its gradient has its own shape. Not with packed sequences.
        key_bias: beta [B|1, H|1, Sk]. This and the following may have any floating dtype.
        key_gain: gamma [B|1, H|1, Sk].
        gain_rows: (start, stop), the rows of a sequence that key_gain is for, as in a slice:
            (-1, None) is the last one (negative numbers not with packed sequences).
        row_temperature: tau [B|1, Sq, H|1].
        sink: z [Hq] or [B|1, Hq], the logit of a key more, whose value is 0 (the learned sinks of
            gpt-oss): L = log(e^z + sum_j e^s). With activation="softmax" only.
        activation: "softmax"; "softmax1", with 1 added to the denominator (L = log(1 + ...)); or
            p = a(s) / n with a = "sigmoid", "relu" or "relu2" (its square).
        normalizer: n of the last three: None for 1, "length" for the number of keys that the row
            sees, "sum" for the sum of a(s), where 0 gives p = 0.
        head_gate: g [B, Sq, Hq]. Where whole tiles are 0 no work is done, if nothing asks for the
            rows' read-outs or the gate's gradient.
        identity_mix: u [Hq] or [B, Hq]; needs Sq = Sk, of every sequence. u = 1 skips the head,
            likewise.
        return_aux: read-outs of the rows (softmaxes only); see hw.Aux.
        backend: "auto", "reference", "cpu", "simt", "sm80" or "emulate:<one of the last two>";
            see hw.explain.

    Returns:
        o [B, Sq, Hq, Dv] in the dtype of the inputs, or (o, AuxResult).

    Gradients flow, once (the reference backend: any number of times), to q, k, v, bias, key_bias,
    key_gain, row_temperature, sink, head_gate, identity_mix, and from o and the lse; the other
    read-outs have none. Under ``torch.autocast`` q, k, v and bias are cast to the autocast dtype.
    Dropout of the weights is not offered: replaying them would need the state of the random
    numbers.

    Raises:
        ValueError: shapes that do not fit, a number out of range, options that contradict each
            other, read-outs of an activation that has none, cu_seqlens on a GPU without
            max_seqlen.
        TypeError: unsupported or mixed dtypes, unknown arguments.
        RuntimeError: tensors on different devices, or a backend of another device.
        NotImplementedError: a backend that cannot take the call, with its reason; dropout;
            forward-mode differentiation and functorch transforms on a compiled backend.

    Source: Dao, "FlashAttention-2", 2023, arXiv 2307.08691, for the loop; docs/ops/attention.md
    names the papers of the options.

    Example:
        >>> import torch, headworks as hw
        >>> q = torch.randn(2, 100, 8, 64)
        >>> k, v = torch.randn(2, 2, 100, 2, 64)
        >>> o, aux = hw.attention(q, k, v, is_causal=True, return_aux=hw.Aux(lse=True))
        >>> o.shape, aux.lse.shape
        (torch.Size([2, 100, 8, 64]), torch.Size([2, 8, 100]))
    """
    key = None
    if (
        bias is None and key_bias is None and key_gain is None and gain_rows is None
        and row_temperature is None and sink is None and head_gate is None and identity_mix is None
        and return_aux is None and normalizer is None and activation == "softmax"
        and cu_seqlens_q is None and cu_seqlens_k is None
        and max_seqlen_q is None and max_seqlen_k is None and not unknown
    ):  # fmt: skip
        key = _repeated.key((q, k, v), is_causal, window_size, scale, softcap, backend)
        if (ready := _repeated.get(key)) is not None:
            return ready(q, k, v)
    q, k, v = _checked(q, k, v)
    if key is not None and q.numel() and k.shape[1] and v.shape[3]:
        shape = shape_of(OP, q, is_causal, window_size, scale, softcap)
        if (name := backend_for(OP, backend, q)) != "reference":
            _repeated.offer(key, native.ready, q, k, v, shape, name)
            return native.output(q, k, v, shape, name)
    score = score_of(
        OP, q, k, is_causal=is_causal, window_size=window_size, scale=scale, softcap=softcap,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k, bias=bias, key_bias=key_bias, key_gain=key_gain,
        gain_rows=gain_rows, row_temperature=row_temperature, sink=sink, activation=activation,
        normalizer=normalizer, **unknown,
    )  # fmt: skip
    gate, mix, aux, mass_keys = None, None, _NO_AUX, None
    if head_gate is not None or identity_mix is not None or return_aux is not None:
        gate, mix, aux, mass_keys = _checked_rest(score, head_gate, identity_mix, return_aux)
    backend = backend_for(OP, backend, score.q)
    o: Any
    made: Any
    if backend == "reference":
        with as_written(score.q):
            o, statistics = reference.attention(
                score.q, score.k, v, head_gate=gate, identity_mix=mix, mass=mass_keys,
                **reference_options(OP, score),
            )  # fmt: skip
        return o if return_aux is None else (o, _result(aux, *(statistics or ())))

    values = v if v.shape[3] else widen(v)
    way = route(OP, (*score.tensors, values, gate, mix))
    if way == "autograd":
        o, *made = differentiable(*apart(
            *score.tensors, values, gate, mix, mass_keys, *score.numbers,
            aux.lse, aux.entropy, aux.p_max, aux.sq_norm, backend,
        ))  # fmt: skip
    else:
        want = _PLAIN if return_aux is None else _wanted(aux)
        call = native.forward if way == "direct" else operators.forward
        o, _, row, *made = call(score, values, gate, mix, mass_keys, want, backend)
        made = [row[0] if want.row and row is not None else None, *made]
    if values is not v:
        o = o[..., :0]
    return o if return_aux is None else (o, _result(aux, *made))


def _checked(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = cast(q, k, v)
    check_inputs(OP, q, k)
    check_values(OP, "v", v, "[B, Sk, Hkv, Dv]", k.shape[:3], q)
    return q, k, v


_repeated: Repeated[Ready] = Repeated(OP)


def _checked_rest(
    score: Score, head_gate: Maybe, identity_mix: Maybe, return_aux: Aux | None
) -> tuple[Maybe, Maybe, Aux, Maybe]:
    """What is beside the score, validated and in full shapes: gate mix aux mass_keys."""
    q, k = score.q, score.k
    gate, mix, aux, mass_keys = None, None, _NO_AUX, None
    if head_gate is not None:
        gate = broadcast(OP, "head_gate", head_gate, "[B, Sq, Hq]", q.shape[:3], 0, q)
    if identity_mix is not None:
        mix = _check_mix(identity_mix, q, k)
        check_rows_have_values(OP, score.cu_seqlens_q, score.cu_seqlens_k)
    if return_aux is not None:
        aux = _check_aux(return_aux, score)
        if aux.mass is not None:
            mass_keys = _mass_keys(aux.mass, score)
    return gate, mix, aux, mass_keys


def _check_mix(identity_mix: object, q: Tensor, k: Tensor) -> Tensor:
    """u [B, Hq], expanded."""
    if q.shape[1] != k.shape[1]:
        fail(
            ValueError,
            OP,
            "identity_mix with Sq, Sk",
            (q.shape[1], k.shape[1]),
            "Sq = Sk",
            "It mixes v_i into o_i, so every row needs a value of its own.",
        )
    if isinstance(identity_mix, Tensor) and identity_mix.dim() == 1:
        identity_mix = identity_mix[None]
    sizes = (q.shape[0], q.shape[2])
    return broadcast(OP, "identity_mix", identity_mix, "[Hq] or [B, Hq]", sizes, 0b01, q)


def _check_aux(return_aux: object, score: Score) -> Aux:
    if not isinstance(return_aux, Aux):
        fail(
            TypeError,
            OP,
            "return_aux",
            describe(return_aux),
            "headworks.Aux(...)",
            "Name the read-outs, for example return_aux=headworks.Aux(lse=True).",
        )
    check_flags(OP, return_aux)
    require_softmax(OP, "return_aux", return_aux, score.activation)
    return return_aux


def _mass_keys(mass: object, score: Score) -> Tensor:
    """m [B, Hq, Sk]: 1 for the keys of the set, 0 for the others."""
    q, (batch, heads, keys) = score.q, score.key_shape
    if not isinstance(mass, Tensor) or mass.dtype not in (torch.int64, torch.bool):
        fail(
            TypeError,
            OP,
            "return_aux.mass",
            describe(mass),
            "int64 indices [n] or [B, n], or booleans [Sk], [B, Sk] or [B, H, Sk]",
            "Convert it with .long() or .bool().",
        )
    require_dense(OP, "return_aux.mass", mass)
    if mass.dtype == torch.int64:
        index = check_index(OP, "return_aux.mass", mass, q)
        check_index_values(OP, "return_aux.mass", index, keys)
        # An index that is no key, unseen on a GPU, falls into a column that is cut off.
        index = torch.where((index >= 0) & (index < keys), index, keys)
        chosen = torch.zeros((batch, keys + 1), dtype=torch.bool, device=q.device)
        mass = chosen.scatter(1, index, 1)[:, None, :keys]
    elif mass.dim() < 3:
        mass = mass[None, None] if mass.dim() == 1 else mass[:, None]
    m = mass.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    return broadcast(OP, "return_aux.mass", m, "[B|1, H|1, Sk]", (batch, heads, keys), 0b011, q)


_NO_AUX = Aux()
_PLAIN = Want()


def _wanted(aux: Aux) -> Want:
    asked = aux.lse or aux.entropy or aux.p_max or aux.sq_norm or aux.mass is not None
    return Want(False, aux.lse, aux.entropy, aux.p_max, aux.sq_norm, not asked)


def _result(aux: Aux, lse: Maybe, *made: Maybe) -> AuxResult:
    asked = (aux.entropy, aux.p_max, aux.sq_norm, aux.mass is not None)
    others = (x if yes else None for yes, x in zip(asked, made, strict=True))
    return AuxResult(lse if aux.lse else None, *others)


def _native_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    head_gate: Maybe = None,
    identity_mix: Maybe = None,
    return_aux: Aux | None = None,
    backend: str = "auto",
    **options: Any,
) -> NativeCall:
    q, k, v = _checked(q, k, v)
    score = score_of(OP, q, k, **options)
    gate, mix, aux, mass_keys = _checked_rest(score, head_gate, identity_mix, return_aux)
    backend = backend_for(OP, backend, score.q)
    return native.forward_call(score, v, gate, mix, mass_keys, _wanted(aux), backend)


NATIVE_CALLS[attention] = _native_call
