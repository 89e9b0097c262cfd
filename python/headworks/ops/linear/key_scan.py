# SPDX-License-Identifier: Apache-2.0
"""hw.key_scan: attention whose scores depend on the key alone, as one scan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..._autograd import Saved, apart, first_order
from ..._errors import (
    STRIDED,
    describe,
    fail,
    require_flag,
    require_one_dtype,
    require_rank,
    require_same_device,
    require_sizes,
    require_tensors,
)
from ..._functions import Maybe, NativeFunction
from ..._native import (
    ACCUMULATION,
    NATIVE_CALLS,
    NativeCall,
    as_written,
    autocast,
    autocasts,
    backend_for,
    define,
    described,
    empties,
    fixed_arity,
    is_direct,
    route,
    widen,
)
from ..._repeated import Ready, Repeated
from ..._trees import saved_by_name
from ...reference import key_scan as reference
from .._operands import check_operands, require, require_given

_OP = "key_scan"


@saved_by_name
class KeyScanState(NamedTuple):
    """What key_scan keeps of the tokens it has seen: their average and its weight.

    o    [B, H, Dv]   sum_j e^{s_j} v_j / sum_j e^{s_j}, 0 before any token
    lse  [B, H]       log sum_j e^{s_j}, -inf before any token

    float32, or float64 for float64 inputs.
    """

    o: Tensor
    lse: Tensor

    @classmethod
    def initial(
        cls,
        batch: int,
        heads: int,
        value_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> KeyScanState:
        """The state before any token."""
        o = torch.zeros(batch, heads, value_dim, dtype=dtype, device=device)
        return cls(o, torch.full((batch, heads), -torch.inf, dtype=dtype, device=device))


def key_scan(
    s: Tensor,
    v: Tensor,
    *,
    initial_state: KeyScanState | tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, KeyScanState]:
    r"""A running softmax average, with scores that depend on the key alone.

    .. math::
        o_i = \frac{\sum_{j \le i} e^{s_j} v_j}{\sum_{j \le i} e^{s_j}}

    computed as :math:`o_i = e^{L_{i-1} - L_i} o_{i-1} + e^{s_i - L_i} v_i` with the running
    log-sum L: no exponent is positive, so scores of any size are safe. Where L_i is -inf (every
    score so far is -inf), o_i is 0 with zero gradients.

    Args:
        s: [B, S, H], the scores. float64, float32, bfloat16 or float16; any strides.
        v: [B, S, H, Dv], of the same dtype.
        initial_state: KeyScanState(o [B, H, Dv], lse [B, H]) over earlier tokens; it acts as one
            more key with score lse and value o. Differentiable.
        output_final_state: also return the state after the last token. Differentiable.
        backend: "auto", "reference", "cpu", "simt" or "emulate:simt"; see hw.explain.

    Returns:
        o [B, S, H, Dv] in the dtype of the inputs, or (o, KeyScanState). Feeding a sequence in
        pieces through the state gives what feeding it whole gives; one token at a time decodes.

    Under ``torch.autocast`` s and v are cast to the autocast dtype. Gradients flow to s, v and the
    initial state, once (the reference backend: any number of times).

    Raises:
        ValueError, TypeError, RuntimeError, NotImplementedError: as hw.linear_attention.

    Source: "Deconstructing Attention", arXiv 2510.11602, its "non-approximate" operator.

    Example:
        >>> import torch, headworks as hw
        >>> s, v = torch.randn(1, 100, 4), torch.randn(1, 100, 4, 64)
        >>> o, state = hw.key_scan(s, v, output_final_state=True)
        >>> o.shape, state.lse.shape
        (torch.Size([1, 100, 4, 64]), torch.Size([1, 4]))
    """
    key = None
    if initial_state is None and output_final_state is False:
        key = _repeated.key((s, v), backend)
        if (ready := _repeated.get(key)) is not None:
            return ready(s, v)
    s, v, o0, lse0 = _checked(s, v, initial_state)
    if type(output_final_state) is not bool:
        require_flag(_OP, "output_final_state", output_final_state)  # type: ignore[unreachable]
    backend = backend_for(_OP, backend, s)
    if backend == "reference" or not v.shape[3]:
        return _other_ways(s, v, o0, lse0, output_final_state, backend)

    inputs = (s, v, o0, lse0)
    way = route(_OP, inputs)
    o1: Any
    lse1: Any
    if way == "direct":
        _repeated.offer(key, _ready, inputs, backend)
        o, _, o1, lse1, _ = _forward(*inputs, output_final_state, False, backend)
    elif way == "operator":
        o, _, o1, lse1, _ = torch.ops.headworks.key_scan_fwd(
            *inputs, output_final_state, False, backend
        )
    else:
        o, o1, lse1 = _differentiable(*apart(*inputs, output_final_state, backend))
    return (o, KeyScanState(o1, lse1)) if output_final_state else o


_repeated: Repeated[Ready] = Repeated(_OP)


def _other_ways(
    s: Tensor, v: Tensor, o0: Maybe, lse0: Maybe, output_final_state: bool, backend: str
) -> Tensor | tuple[Tensor, KeyScanState]:
    """The reference, and values of width 0."""
    start = None if o0 is None or lse0 is None else KeyScanState(o0, lse0)
    if backend == "reference":
        with as_written(s):
            o, state = reference.key_scan(s, v, initial_state=start)
        return (o, KeyScanState(*state)) if output_final_state else o
    if start is not None:
        start = KeyScanState(widen(start.o), start.lse)
    o, end = key_scan(s, widen(v), initial_state=start, output_final_state=True, backend=backend)
    o, end = o[..., :0], KeyScanState(end.o[..., :0], end.lse)
    return (o, end) if output_final_state else o


def _checked(s: Tensor, v: Tensor, initial_state: object) -> tuple[Tensor, Tensor, Maybe, Maybe]:
    """The arguments cast and validated: s v o0 lse0. Nothing is allocated before."""
    if not (isinstance(s, Tensor) and isinstance(v, Tensor)):
        _reject(s, v)
    if autocasts(s):
        s, v = autocast(s, v)
    dtype, device = s.dtype, s.device
    try:
        fits = (
            s.layout is v.layout is STRIDED
            and s.dim() == 3
            and v.dim() == 4
            and v.shape[:3] == s.shape
            and dtype == v.dtype
            and dtype in ACCUMULATION
            and device == v.device
        )
    except RuntimeError:  # a nested tensor has no shape
        fits = False
    if not fits:
        _reject(s, v)
    if initial_state is None:
        return s, v, None, None
    return s, v, *_checked_state(initial_state, s, v)


def _reject(s: Tensor, v: Tensor) -> NoReturn:
    require_tensors(_OP, s=s, v=v)
    require_rank(_OP, 3, "[B, S, H]", s=s)
    require_rank(_OP, 4, "[B, S, H, Dv]", v=v)
    require_one_dtype(_OP, ACCUMULATION, s=s, v=v)
    require_same_device(_OP, "s", s, v=v)
    require_sizes(_OP, "[B, S, H, Dv]", "v", v, (*s.shape, v.shape[-1]))
    raise AssertionError("inputs were rejected without a reason")


def _checked_state(state: object, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(state, (tuple, list)) or len(state) != 2:
        fail(
            TypeError,
            _OP,
            "initial_state",
            describe(state),
            "KeyScanState(o, lse)",
            "Pass the state that output_final_state=True returned.",
        )
    names = ("initial_state.o", "initial_state.lse")
    batch, _, heads, value_dim = v.shape
    sizes, layouts = ((batch, heads, value_dim), (batch, heads)), ("[B, H, Dv]", "[B, H]")
    require_tensors(_OP, **dict(zip(names, state, strict=True)))
    for name, x, want, layout in zip(names, state, sizes, layouts, strict=True):
        require_sizes(_OP, layout, name, x, want)
        if x.dtype != ACCUMULATION[s.dtype]:
            fail(
                TypeError,
                _OP,
                name,
                x.dtype,
                f"{ACCUMULATION[s.dtype]} for {s.dtype} inputs",
                "States stay in fp32 (fp64 for fp64 inputs); do not cast them with the model.",
            )
        require_same_device(_OP, "s", s, **{name: x})
    return state[0], state[1]


FORWARD = NativeFunction("key_scan.forward")
BACKWARD = NativeFunction("key_scan.backward")
FORWARD.begins_with(("s", "v", "o0", "lse0"), ())


def _outputs(s: Tensor, v: Tensor, final_state: bool, wide: bool) -> Any:
    """Outputs of FORWARD, unfilled, None for what is not asked for: lse is [2, B, S, H]; with
    `wide` o in the accumulation dtype too, where that is another."""
    dtype, device = ACCUMULATION[s.dtype], s.device
    made = {
        "o": torch.empty(v.shape, dtype=v.dtype, device=device),
        "lse": torch.empty((2, *s.shape), dtype=dtype, device=device),
    }
    if final_state:
        batch, _, heads, value_dim = v.shape
        made["o1"] = torch.empty((batch, heads, value_dim), dtype=dtype, device=device)
        made["lse1"] = torch.empty((batch, heads), dtype=dtype, device=device)
    if wide and dtype != v.dtype:
        made["o_wide"] = torch.empty(v.shape, dtype=dtype, device=device)
    return FORWARD.Outputs(**made)


def _ready(inputs: tuple[Maybe, ...], backend: str) -> Ready:
    """`_forward` for o alone, without states, as a function of s and v."""
    s, v, *_ = inputs
    assert s is not None and v is not None
    return Ready(FORWARD, backend, inputs, _outputs(s, v, False, False), (), (s, v))


def _forward(
    s: Tensor, v: Tensor, o0: Maybe, lse0: Maybe, final_state: bool, wide: bool, backend: str
) -> Any:
    made = _outputs(s, v, final_state, wide)
    FORWARD.run(backend, (s, v, o0, lse0), made)
    return made


def _forward_operator(
    s: Tensor, v: Tensor, o0: Maybe, lse0: Maybe, final_state: bool, wide: bool, backend: str
) -> tuple[Tensor, ...]:
    op = "key_scan_fwd"
    sizes = check_operands(op, FORWARD.inputs, (s, v, o0, lse0))
    require(op, "v", "width 0", sizes["Dv"] > 0, "a width of at least 1")
    require_given(op, lse0=(lse0, o0 is not None))
    return fixed_arity(_forward(s, v, o0, lse0, final_state, wide, backend), s)


def _forward_fake(
    s: Tensor, v: Tensor, o0: Maybe, lse0: Maybe, final_state: bool, wide: bool, backend: str
) -> tuple[Tensor, ...]:
    return fixed_arity(_outputs(s, v, final_state, wide), s)


def _gradients(s: Tensor, v: Tensor, o0: Maybe, lse0: Maybe, state_grad: bool) -> Any:
    """Outputs of BACKWARD, unfilled."""
    return BACKWARD.Outputs(*empties(s, v, *((o0, lse0) if state_grad else (None, None))))


def _backward(*arguments: Any) -> Any:
    inputs, _, (state_grad, backend) = BACKWARD.split(arguments)
    s, v, _o, _lse, o0, lse0, *_ = inputs
    made = _gradients(s, v, o0, lse0, state_grad)
    BACKWARD.run(backend, inputs, made)
    return made


def _backward_operator(*arguments: Any) -> tuple[Tensor, ...]:
    op = "key_scan_bwd"
    inputs, _, (state_grad, _backend) = BACKWARD.split(arguments)
    s, _v, _o, _lse, o0, lse0, o1, _d_o, d_o1, d_lse1 = inputs
    sizes = check_operands(op, BACKWARD.inputs, inputs)
    require(op, "v", "width 0", sizes["Dv"] > 0, "a width of at least 1")
    require_given(op, lse0=(lse0, o0 is not None), d_lse1=(d_lse1, d_o1 is not None))
    require(op, "o1", "None", o1 is not None or d_o1 is None, "a tensor with d_o1")
    require(op, "state_grad", state_grad, o0 is not None or not state_grad, "False without o0")
    return fixed_arity(_backward(*arguments), s)


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    (s, v, _o, _lse, o0, lse0, *_), _, (state_grad, _backend) = BACKWARD.split(arguments)
    return fixed_arity(_gradients(s, v, o0, lse0, state_grad), s)


define(
    FORWARD.schema("key_scan_fwd", "bool final_state, bool wide"), _forward_operator, _forward_fake
)
define(BACKWARD.schema("key_scan_bwd", "bool state_grad"), _backward_operator, _backward_fake)


class _KeyScan(torch.autograd.Function):
    """Saves the inputs, o unrounded, the running log-sum and the final state."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        s, v, o0, lse0, final_state, backend = arguments
        call = _forward if is_direct((s, v, o0, lse0)) else torch.ops.headworks.key_scan_fwd
        o, lse, o1, lse1, wide = call(s, v, o0, lse0, final_state, True, backend)
        wide = o if o.dtype == lse.dtype else wide
        ctx.save_for_backward(s, v, wide, lse, o0, lse0, o1 if final_state else None)
        ctx.final_state, ctx.backend = final_state, backend
        ctx.set_materialize_grads(False)
        if not final_state and o1 is not None:
            ctx.mark_non_differentiable(o1, lse1)
        return o, o1, lse1

    @staticmethod
    @first_order(_OP)
    def backward(
        ctx: Any, saved: Saved, d_o: Maybe, d_o1: Maybe, d_lse1: Maybe
    ) -> tuple[Maybe, ...]:
        s, v, o, lse, o0, lse0, o1 = saved
        state_grad = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        if d_o is None:
            d_o = v.new_zeros(()).expand(v.shape)
        if not ctx.final_state:
            d_o1 = d_lse1 = None
        elif d_o1 is not None or d_lse1 is not None:
            zero = lse.new_zeros(())
            d_o1 = zero.expand(o1.shape) if d_o1 is None else d_o1
            d_lse1 = zero.expand(o1.shape[:2]) if d_lse1 is None else d_lse1
        inputs = BACKWARD.tensors(
            s=s, v=v, o=o, lse=lse, o0=o0, lse0=lse0, o1=o1, d_o=d_o, d_o1=d_o1, d_lse1=d_lse1
        )
        call = _backward if is_direct(inputs) else torch.ops.headworks.key_scan_bwd
        d_s, d_v, d_o0, d_lse0 = call(*inputs, state_grad, ctx.backend)
        if not state_grad:
            d_o0 = d_lse0 = None
        return d_s, d_v, d_o0, d_lse0, None, None


_differentiable: Callable[..., tuple[Tensor, Tensor, Tensor]] = _KeyScan.apply


def _native_call(
    s: Tensor,
    v: Tensor,
    *,
    initial_state: KeyScanState | tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    backend: str = "auto",
) -> NativeCall:
    s, v, o0, lse0 = _checked(s, v, initial_state)
    made = _outputs(s, v, output_final_state, False)
    return described(FORWARD, backend_for(_OP, backend, s), (s, v, o0, lse0), made)


NATIVE_CALLS[key_scan] = _native_call
