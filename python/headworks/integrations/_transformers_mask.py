# SPDX-License-Identifier: Apache-2.0
"""Masks of Hugging Face's transformers as what hw.attention takes instead of Sq x Sk numbers.

transformers describes a mask by a function of (batch, head, query, key) and a mask [B, S] of the
tokens that are no padding. A function that is one of transformers' own (causal, bidirectional, a
window of either, each alone or within packed sequences) is recognized and becomes a `Pattern`: a
few numbers, a bias per key, bounds of sequences. Of any other function booleans are made.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .._errors import fail

OP = "headworks.integrations.transformers"
Window = tuple[int, int] | None


class Pattern(NamedTuple):
    """Which keys a row sees, row i standing at key i + Sk - Sq."""

    is_causal: bool
    window: Window = None  # (left, right)
    key_bias: Tensor | None = None  # [B, 1, Sk] fp32: -inf for padding, 0 for the others
    cu_seqlens: Tensor | None = None  # [N + 1] int64: sequences packed into one row of the batch
    longest: int | None = None  # of these sequences

    @property
    def is_plain(self) -> bool:
        """Whether causality, or none, is all there is."""
        return self.window is None and self.key_bias is None and self.cu_seqlens is None

    def options(self) -> dict[str, Any]:
        """As arguments of hw.attention."""
        return {
            "is_causal": self.is_causal,
            "window_size": self.window,
            "key_bias": self.key_bias,
            "cu_seqlens_q": self.cu_seqlens,
            "cu_seqlens_k": self.cu_seqlens,
            "max_seqlen_q": self.longest,
            "max_seqlen_k": self.longest,
        }


class PatternMask(Tensor):
    """Booleans [B, 1, Sq, Sk], True for a key that is seen, which exist only once somebody looks.

    A model hands the mask from layer to layer, and as long as it does no more than that, the
    pattern stands for the booleans. Any operation on the mask makes the booleans and works on
    them; from then on they are the mask, whatever is written into them.
    """

    _pattern: Pattern | None
    _make: Callable[[], Tensor]
    _booleans: Tensor | None
    _bias: Tensor | None

    @staticmethod
    def __new__(
        cls: type[PatternMask],
        size: tuple[int, int, int, int],
        device: torch.device | str,
        pattern: Pattern | None,
        make: Callable[[], Tensor],
    ) -> PatternMask:
        mask: PatternMask = Tensor._make_wrapper_subclass(
            cls, size, dtype=torch.bool, device=torch.device(device)
        )
        mask._pattern, mask._make, mask._booleans, mask._bias = pattern, make, None, None
        return mask

    @property
    def pattern(self) -> Pattern | None:
        """None where only the booleans tell which keys are seen."""
        return self._pattern

    def bias(self, dtype: torch.dtype) -> Tensor:
        """0 for the keys that are seen and -inf for the others [B, 1, Sq, Sk]; made once for all
        layers, unless somebody holds the booleans and may change them."""
        if self._booleans is not None:
            return additive(self._booleans, dtype)
        if self._bias is None or self._bias.dtype != dtype:
            self._bias = additive(self._make(), dtype)
        return self._bias

    def look(self) -> Tensor:
        """The booleans, which are the mask from now on."""
        if self._booleans is None:
            self._booleans = self._make()
            self._pattern = self._bias = None
        return self._booleans

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(PatternMask, PatternMask.look, (args, kwargs or {}))
        return function(*args, **kwargs)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers to add to the scores: booleans become 0 and -inf."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, float("-inf"))


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **others: Any,
) -> Tensor | None:
    """The mask of one forward pass, for queries from position q_offset and keys from kv_offset on.

    None where the layers' own causality says it all, else a PatternMask [B, 1, Sq, Sk]. While a
    graph is traced, where values cannot be read, None or booleans. Nothing that is given is read
    after the return.
    """
    from transformers import masking_utils

    if mask_function is None:
        mask_function = masking_utils.causal_mask_function

    def made(function: Callable[..., Any], **skip: bool) -> Any:
        return masking_utils.sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
            kv_offset=kv_offset, mask_function=function, attention_mask=attention_mask,
            local_size=local_size, device=device, config=config, **skip, **others,
        )  # fmt: skip

    _require_interface(type(config))
    is_aligned = q_length in (1, kv_length)  # whichever corner is meant
    may_be_none = _layers_see_all(config, local_size, kv_length)
    allow_is_causal_skip = allow_is_causal_skip and is_aligned and may_be_none
    allow_is_bidirectional_skip = allow_is_bidirectional_skip and may_be_none
    if torch.compiler.is_compiling():
        traced: Tensor | None = made(
            mask_function,
            allow_is_causal_skip=allow_is_causal_skip,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        )
        return traced
    never: Any = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    size = (batch_size, 1, q_length, kv_length)
    known = _pattern_of(mask_function, q_length, kv_length, q_offset, kv_offset, local_size)
    if known is None:
        booleans = made(mask_function, **never)
        return PatternMask(size, device, None, lambda: booleans)
    pattern, function = known
    if attention_mask is not None:
        pattern = pattern._replace(key_bias=_key_bias(attention_mask, kv_length, kv_offset))
    skip = allow_is_causal_skip if pattern.is_causal else allow_is_bidirectional_skip
    if skip and pattern.is_plain:
        return None
    # The booleans may be made later, when the model has moved on: of copies.
    attention_mask, q_offset = _kept(attention_mask), _kept(q_offset)
    return PatternMask(size, device, pattern, functools.partial(made, function, **never))


def _layers_see_all(config: Any, local_size: int | None, kv_length: int) -> bool:
    """Whether a layer without a mask sees all keys: it may be told of a window, by an argument,
    and counts it otherwise than masks do: itself and w - 1 tokens on either side."""
    windows = (local_size, getattr(config, "sliding_window", None))
    return all(w is None or (isinstance(w, int) and w >= kv_length) for w in windows)


def _kept(x: Any) -> Any:
    """x as it is now: caches advance their counters in place."""
    return x.clone() if isinstance(x, Tensor) else x


def _pattern_of(
    mask_function: Callable[..., Any],
    q_length: int,
    kv_length: int,
    q_offset: Any,
    kv_offset: int,
    local_size: int | None,
) -> tuple[Pattern, Callable[..., Any]] | None:
    """The pattern of a mask function, padding aside, and a function equal to it that holds no
    tensor of the caller's; None if it has no pattern."""
    from transformers import masking_utils as utils

    aligned = isinstance(q_offset, int) and q_offset - kv_offset == kv_length - q_length
    for is_causal, window, plain in _known(local_size):
        if not aligned and (is_causal or window is not None):
            continue
        if window is not None and max(window) >= kv_length - 1:
            window = None
        if same_function(mask_function, plain, []):
            return Pattern(is_causal, window), plain
        if q_length != kv_length:
            continue
        for packed in _packed(plain):
            found: list[Tensor] = []
            if same_function(mask_function, packed, found) and len(found[-1]) == 1:
                within = utils.packed_sequence_mask_function(found[-1].clone())
                pattern = Pattern(is_causal, window, None, *bounds_of(found[-1][0]))
                return pattern, utils.and_masks(plain, within)
    return None


def _known(local_size: int | None) -> Iterator[tuple[bool, Window, Callable[..., Any]]]:
    """(is_causal, window, the function that transformers uses for it)"""
    from transformers import masking_utils as utils

    yield True, None, utils.causal_mask_function
    yield False, None, utils.bidirectional_mask_function
    if local_size is not None:
        yield True, (local_size - 1, 0), utils.sliding_window_causal_mask_function(local_size)
        both = utils.sliding_window_bidirectional_mask_function(local_size)
        yield False, (local_size, local_size), both


def _packed(plain: Callable[..., Any]) -> Iterator[Any]:
    """The same within packed sequences. transformers counts positions from the start of a sequence
    or, in earlier versions, of the row: within a sequence there is no difference."""
    from transformers import masking_utils as utils

    within = utils.packed_sequence_mask_function(ANY_TENSOR)
    if hasattr(utils, "remap_positions_for_packed_sequence"):
        remapped = utils.remap_positions_for_packed_sequence(plain, ANY_TENSOR)
        yield utils.and_masks(remapped, within)
    yield utils.and_masks(plain, within)


ANY_TENSOR: Any = object()


def same_function(f: Any, g: Any, found: list[Tensor]) -> bool:
    """Whether f computes what g computes, as far as their code tells: the same code, closed over
    the same functions, numbers and tuples of such. Where g holds ANY_TENSOR, f may hold any
    tensor, which is added to `found`."""
    if f is g:
        return True
    if g is ANY_TENSOR:
        found.append(f)
        return isinstance(f, Tensor)
    if type(f) is not type(g):
        return False
    if isinstance(f, tuple):
        pairs = zip(f, g, strict=False)
        return len(f) == len(g) and all(same_function(a, b, found) for a, b in pairs)
    if isinstance(f, FunctionType):
        if f.__code__ is not g.__code__ or f.__defaults__ != g.__defaults__:
            return False
        inner, known = (tuple(c.cell_contents for c in h.__closure__ or ()) for h in (f, g))
        return same_function(inner, known, found)
    return isinstance(f, (bool, int, float, str)) and bool(f == g)


def bounds_of(sequence: Tensor) -> tuple[Tensor, int]:
    """cu_seqlens and the longest length, of the number [S] of every token's sequence."""
    starts = sequence.diff().nonzero().flatten() + 1
    ends = starts.new_tensor([0, len(sequence)])
    bounds = torch.cat([ends[:1], starts, ends[1:]])
    return bounds, int(bounds.diff().max())


def _key_bias(attention_mask: Tensor, kv_length: int, kv_offset: int) -> Tensor | None:
    """[B, 1, Sk] of a mask [B, total], tokens from kv_offset on; None if nothing is padding."""
    keys = attention_mask[:, kv_offset : kv_offset + kv_length].to(torch.bool)
    keys = nn.functional.pad(keys, (0, kv_length - keys.shape[1]))
    if bool(keys.all()):
        return None
    return additive(keys, torch.float32)[:, None]


def _require_interface(config: type) -> None:
    """The model must ask transformers' table for its attention; one that does not would ignore
    what was asked for. (A model that makes its masks itself does not come by here.)"""
    model = sys.modules.get(config.__module__.replace(".configuration_", ".modeling_"))
    if model is None or hasattr(model, "ALL_ATTENTION_FUNCTIONS"):
        return
    for name, x in vars(model).items():
        if not ("Attention" in name and isinstance(x, type) and issubclass(x, nn.Module)):
            continue
        if x.__module__ == model.__name__:
            fail(
                NotImplementedError,
                OP,
                "the model",
                f"of {config.__name__}, whose {name} does not use transformers' AttentionInterface",
                "one that does, as this one would go on with its own attention",
                'Choose attn_implementation="eager".',
            )
