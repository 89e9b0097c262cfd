# SPDX-License-Identifier: Apache-2.0
"""hw.explain: which backend a call would use, and why not the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import _library
from ._native import NATIVE_CALLS


@dataclass(frozen=True)
class Explanation:
    """The answer of hw.explain.

    function  the native function, for example "linear_attention.forward"
    asked     the backend that was asked for
    backend   the backend that the call uses; None if the one asked for (or every one) cannot
    instance  what of that backend was compiled for such calls: "bfloat16, dim 64" (the width of
              its tiles), "float32, avx2" (the instruction set); "" of the reference and of none
    reasons   for each compiled backend why it cannot take the call, "" where it can
    """

    function: str
    asked: str
    backend: str | None
    instance: str
    reasons: dict[str, str]

    def __repr__(self) -> str:
        refusal = "no backend" if self.asked == "auto" else f"'{self.asked}' is not one that"
        lines = [f"{self.function}: {self.backend or refusal + ' can take this call'}"]
        for name, reason in {"reference": "", **self.reasons}.items():
            if name == self.backend:
                verdict = f"chosen ({self.instance})" if self.instance else "chosen"
            elif reason:
                verdict = f"cannot: {reason}"
            elif name == "reference":
                verdict = "can, when asked for by name"
            else:
                verdict = "can"
            lines.append(f"  {name:<14}{verdict}")
        return "\n".join(lines)


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which backend `function(*args, **kwargs)` would use, and why the others would not do.

    The arguments are validated as in the call itself; nothing is computed.

    Example:
        >>> import torch, headworks as hw
        >>> q = torch.randn(1, 8, 2, 16)
        >>> hw.explain(hw.linear_attention, q, q, q).backend
        'cpu'
    """
    native_call = NATIVE_CALLS.get(function)
    if native_call is None:
        raise TypeError(
            f"explain: function is {function!r}; expected a function of headworks that has "
            "backends, such as hw.linear_attention. Pass the function itself, then its arguments."
        )
    name, asked, tensors, scalars = native_call(*args, **kwargs)
    number = _library.function(name)
    reasons = dict(_library.reasons(number, tensors, scalars))
    if asked == "reference":
        return Explanation(name, asked, "reference", "", reasons)
    able = [b for b, reason in reasons.items() if not reason and asked in (b, "auto")]
    if not able:
        return Explanation(name, asked, None, "", reasons)
    instance = _library.instance(number, able[0], tensors, scalars)
    return Explanation(name, asked, able[0], instance, reasons)
