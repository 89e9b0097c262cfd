# SPDX-License-Identifier: Apache-2.0
"""hw.attention as an attention implementation of Hugging Face's transformers.

    from headworks.integrations import transformers as hw_transformers
    hw_transformers.register()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="headworks")

Two functions are registered. One makes masks, `_transformers_mask.attention_mask`, once per forward
pass of the model: causal masks, windows, padding and packed sequences stay descriptions of a few
numbers. The other is called by every attention layer, `attention` below. What would change the
result and cannot be done raises NotImplementedError; nothing is left out in silence.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import describe, fail
from .._native import BACKENDS
from ..ops.attention.attention import attention as hw_attention
from ._transformers_mask import Pattern, PatternMask, additive, attention_mask, bounds_of

OP = "headworks.integrations.transformers"

# A name with one of these parts means something else to transformers.
_RESERVED = ("flash", "sdpa", "flex", "eager", "paged", "/", "|", ":", "@")

# Arguments that reach an attention layer on their way to somewhere else.
_OF_NO_CONCERN = frozenset(
    {
        "cache_position",
        "deterministic",  # headworks always is
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",  # in q and k already
        "return_dict",
        "seq_idx",
        "use_cache",
    }
)

_EAGER = 'or choose attn_implementation="eager"'

# What is known and refused: (why, remedy).
_REFUSED = {
    "head_mask": ("weights of single heads are not masked", "Leave head_mask out, " + _EAGER),
    "layer_head_mask": ("weights of single heads are not masked", "Leave it out, " + _EAGER),
    "output_attentions": (
        "the weights are never all there at once",
        "Use headworks.attention_probs on the layer's q and k for chosen rows, " + _EAGER,
    ),
}


def register(name: str = "headworks", *, backend: str = "auto") -> None:
    """Makes hw.attention available to transformers as ``attn_implementation=name``.

    May be called again, to change the backend too; models that were made before follow. What is
    supported, and what is refused with a reason: docs/integrations.md.

    Args:
        name: for ``attn_implementation``. Not a name that transformers gives a meaning of its own.
        backend: of every call, as in :func:`headworks.attention`.

    Raises:
        ImportError: transformers is not installed, or too old.
        ValueError: a name that is taken, or an unknown backend.

    Example:
        >>> import torch
        >>> from headworks.integrations import transformers as hw_transformers
        >>> hw_transformers.register()
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> config = LlamaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...     num_attention_heads=4, num_key_value_heads=2,
        ... )
        >>> model = AutoModelForCausalLM.from_config(config, attn_implementation="headworks")
        >>> model(torch.arange(10)[None]).logits.shape
        torch.Size([1, 10, 64])
    """
    attentions, masks = _interfaces()
    if backend not in BACKENDS:
        fail(
            ValueError, OP, "backend", repr(backend), f"one of {', '.join(BACKENDS)}", "Choose one."
        )
    known = attentions().get(name)
    ours = isinstance(known, functools.partial) and known.func is attention
    if not name or any(part in name for part in _RESERVED) or (known is not None and not ours):
        fail(
            ValueError,
            OP,
            "name",
            repr(name),
            "a name that transformers has no other use for",
            'Choose another one, such as "headworks".',
        )
    attentions.register(name, functools.partial(attention, backend=backend))
    masks.register(name, attention_mask)


def _interfaces() -> tuple[Any, Any]:
    """transformers' tables of attention and of mask functions."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"{OP}: transformers is not installed; pip install transformers"
        ) from error
    known = getattr(getattr(transformers, "masking_utils", None), "sdpa_mask", None)
    if known is None or "q_length" not in inspect.signature(known).parameters:
        raise ImportError(
            f"{OP}: transformers is {transformers.__version__}, whose masks have another form; "
            "pip install 'transformers>=5.20'"
        )
    return transformers.AttentionInterface, transformers.AttentionMaskInterface


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    s_aux: Tensor | None = None,
    *,
    backend: str = "auto",
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention layer's call: query [B, Hq, Sq, D], key [B, H, Sk, D], value [B, H, Sk, Dv] ->
    (o [B, Sq, Hq, Dv], None).

    A mask says all about which keys a row sees. Without one, causality is that of ``is_causal`` or
    the layer, and ``sliding_window`` w leaves a row its own key and w - 1 before it (and after it
    if not causal). Sequences packed into one row of the batch are told by ``cu_seq_lens``, by the
    mask, or by ``position_ids`` that start at 0 again. ``s_aux`` [Hq]: learned sinks.
    """
    _refuse(dropout, options)
    if attention_mask is None:
        seen = _seen_by_layer(module, query, key, is_causal, sliding_window, cu_seq_lens_q)
        bias = None
    else:
        seen, bias = _seen_by_mask(attention_mask, query.dtype)
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        _check_packed(seen, bias, cu_seq_lens_q)
        seen |= {"cu_seqlens_q": cu_seq_lens_q, "cu_seqlens_k": cu_seq_lens_k}
        seen |= {"max_seqlen_q": _integer(max_length_q), "max_seqlen_k": _integer(max_length_k)}
    elif position_ids is not None and len(query) == 1 and query.shape[2] == key.shape[2]:
        seen |= _packed_by_positions(position_ids, seen, bias)
    if position_bias is not None:
        bias = (position_bias if bias is None else position_bias + bias).to(query.dtype)
    o: Any = hw_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        scale=scaling,
        softcap=softcap or 0.0,
        bias=bias,
        sink=s_aux,
        backend=backend,
        **seen,
    )
    return o, None


def _refuse(dropout: float, options: dict[str, Any]) -> None:
    """Raises for everything asked that would not be done."""
    if dropout:
        fail(
            NotImplementedError,
            OP,
            "dropout of the attention weights",
            dropout,
            "0.0, as the backward pass replays the weights without a state of random numbers",
            "Set it to 0 in the config (attention_dropout, attn_pdrop or "
            "attention_probs_dropout_prob), call model.eval(), " + _EAGER + ".",
        )
    for name, value in options.items():
        if value is None or value is False or name in _OF_NO_CONCERN:
            continue
        why, remedy = _REFUSED.get(
            name, ("headworks does not know what it does to the result", "Leave it out, " + _EAGER)
        )
        got = describe(value) if isinstance(value, Tensor) else repr(value)
        fail(NotImplementedError, OP, name, got, f"None, as {why}", f"{remedy}.")


def _seen_by_layer(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    is_causal: bool | None,
    sliding_window: int | None,
    cu_seq_lens: Tensor | None,
) -> dict[str, Any]:
    """Which keys a row sees where no mask says it, as arguments of hw.attention."""
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    rows, keys = query.shape[2], key.shape[2]
    if is_causal and cu_seq_lens is None and rows not in (1, keys):
        fail(
            NotImplementedError,
            OP,
            "attention_mask of a causal layer",
            f"None for {rows} queries and {keys} keys",
            "a mask, as it is not said at which corner the two are aligned",
            "Let the model make it by transformers.masking_utils.create_causal_mask, or pass "
            "is_causal=False.",
        )
    window = None
    if sliding_window is not None:
        before = sliding_window - 1
        window = (before, 0 if is_causal else before)
    return {"is_causal": is_causal, "window_size": window}


def _seen_by_mask(mask: Tensor, dtype: torch.dtype) -> tuple[dict[str, Any], Tensor | None]:
    """The same of a mask, and the bias to add where it takes one number per pair."""
    if isinstance(mask, PatternMask):
        pattern = mask.pattern
        if pattern is not None:
            return pattern.options(), None
        return {}, mask.bias(dtype)
    if mask.dim() != 4 or not (mask.dtype == torch.bool or mask.is_floating_point()):
        fail(
            ValueError,
            OP,
            "attention_mask",
            describe(mask),
            "[B or 1, H or 1, Sq, Sk], of booleans or of numbers to add to the scores",
            "Pass the model a mask [B, S] of ones and zeros, or one of four dimensions.",
        )
    return {}, additive(mask, dtype)


def _check_packed(seen: dict[str, Any], bias: Tensor | None, cu_seq_lens: Tensor | None) -> None:
    """cu_seq_lens beside a mask: only one that says no more, or the same."""
    says = None
    other = seen.get("cu_seqlens_q")
    if bias is not None:
        says = "pairs of tokens"
    elif seen.get("key_bias") is not None:
        says = "padding"
    elif other is not None and cu_seq_lens is not None and other.is_cpu:
        says = None if torch.equal(other, cu_seq_lens.to(other)) else "other sequences"
    if says is not None:
        fail(
            NotImplementedError,
            OP,
            "cu_seq_lens_q",
            f"given beside a mask of {says}",
            "a plain causal, windowed or bidirectional mask, or one of the same sequences",
            "Leave attention_mask out of the call, or cu_seq_lens.",
        )


def _packed_by_positions(
    position_ids: Tensor, seen: dict[str, Any], bias: Tensor | None
) -> dict[str, Any]:
    """Bounds of the sequences packed into the only row of a batch where nothing else tells them:
    positions [1, S] count from 0 several times. (transformers puts them into the mask only if no
    cache is in use. Of several rows that share their positions it says nothing: neither do we.)
    """
    told = bias is not None or any(seen.get(x) is not None for x in ("key_bias", "cu_seqlens_q"))
    if told or torch.compiler.is_compiling() or position_ids.dim() != 2 or len(position_ids) != 1:
        return {}
    starts = position_ids[0] == 0
    follows = starts[1:] | (position_ids[0].diff() == 1)
    if not bool(starts[:1].all() & follows.all() & starts[1:].any()):
        return {}
    bounds, longest = bounds_of(starts.cumsum(0))
    return Pattern(seen["is_causal"], seen["window_size"], None, bounds, longest).options()


def _integer(length: Any) -> int | None:
    return None if length is None else int(length)
