# SPDX-License-Identifier: Apache-2.0
"""Models of timm on headworks' operators, for inference.

    from headworks.integrations import timm as hw_timm
    model = timm.create_model("efficientvit_m0", pretrained=True).eval()
    optimized = hw_timm.optimize(model)   # in place; print(optimized) says what was replaced
    with torch.inference_mode():
        model(images)
    optimized.restore()                   # the model's own modules again

timm is not imported: modules are known by the names of their classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from torch import nn

from .._errors import describe, fail
from ..nn.cascaded_group_attention import CascadedGroupAttention

OP = "headworks.integrations.timm.optimize"

_FILE = "timm.models.efficientvit_msra"
_SUPPORTED = ("LocalWindowAttention", "CascadedGroupAttention")


class Optimized:
    """What `optimize` did to a model, and the way back.

    Attributes:
        model: the model, changed in place.
        replaced: names of the modules that were replaced.
        left_alone: attention modules that were not, by name, with the reason.
    """

    def __init__(
        self, model: nn.Module, originals: Mapping[str, nn.Module], left_alone: Mapping[str, str]
    ) -> None:
        self.model = model
        self.replaced = tuple(originals)
        self.left_alone = dict(left_alone)
        self._originals: dict[str, nn.Module] | None = dict(originals)

    def restore(self) -> nn.Module:
        """Puts the modules back that the model had, untouched since, and returns the model. They
        are where and of what dtype they were: a model that was moved meanwhile has to be moved
        again. May be called more than once."""
        if self._originals is not None:
            for name, module in self._originals.items():
                _put(self.model, name, module)
            self._originals = None
        return self.model

    def __enter__(self) -> Optimized:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} attention modules replaced, batch norms folded"]
        lines += [f"  {name}" for name in self.replaced]
        if self.left_alone:
            lines.append(f"{len(self.left_alone)} left alone")
            lines += [f"  {name}: {why}" for name, why in self.left_alone.items()]
        return "\n".join(lines)

    __repr__ = __str__


def optimize(model: nn.Module, *, backend: str = "auto") -> Optimized:
    """Replaces the attention of a timm model by headworks' modules, in place, for inference.

    Supported are the ``efficientvit_m*`` models: every ``LocalWindowAttention`` (and every
    ``CascadedGroupAttention`` that stands alone) becomes a fused
    :class:`headworks.nn.CascadedGroupAttention`. Their batch norms are folded with the statistics
    that they have now. Weights are copied: change them, or the input size, before this call, or
    restore the model first. What is not supported is left as it is, and named in the result.

    The model must be in evaluation mode, and called without gradient.

    Args:
        model: a model of timm, or a module that contains such.
        backend: of the replacements, as in :func:`headworks.cascaded_group_attention`.

    Returns:
        :class:`Optimized`: ``print`` it, and ``restore()`` the model. As a context manager it
        restores at the end.

    Raises:
        TypeError: not a module.
        RuntimeError: a model in training mode.

    Example:
        >>> import timm, torch
        >>> from headworks.integrations import timm as hw_timm
        >>> model = timm.create_model("efficientvit_m0").eval()
        >>> optimized = hw_timm.optimize(model)
        >>> len(optimized.replaced)
        6
        >>> with torch.inference_mode():
        ...     y = model(torch.randn(1, 3, 224, 224))
    """
    if not isinstance(model, nn.Module):
        fail(TypeError, OP, "model", describe(model), "a torch.nn.Module", "Make it with timm.")
    originals: dict[str, nn.Module] = {}
    left_alone: dict[str, str] = {}
    made: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if any(name.startswith(f"{done}.") for done in made):
            continue
        why = _why_not(module, name)
        if why == "":
            try:
                made[name] = CascadedGroupAttention.from_timm(module, backend=backend).fuse()
                originals[name] = module
            except (TypeError, ValueError) as error:
                why = str(error)
        if why:
            left_alone[name or type(module).__name__] = why
    if "" in made:
        fail(
            ValueError, OP, "model", f"itself a {type(model).__name__}", "a model that contains it",
            "Use hw.nn.CascadedGroupAttention.from_timm(module).fuse().",
        )  # fmt: skip
    training = [name for name, module in originals.items() if module.training]
    if training:
        fail(
            RuntimeError, OP, "model", f"in training mode ({training[0]})", "evaluation mode",
            "Call model.eval() first: batch norms are folded with their running statistics.",
        )  # fmt: skip
    for name, module in made.items():
        _put(model, name, module)
    return Optimized(model, originals, left_alone)


def _why_not(module: nn.Module, name: str) -> str | None:
    """Empty: to be replaced; None: no attention; else why it is left alone."""
    kind = type(module)
    if kind.__module__ == _FILE and kind.__name__ in _SUPPORTED:
        return ""
    if not kind.__name__.endswith(("Attention", "Attn")) or isinstance(
        module, CascadedGroupAttention
    ):
        return None
    known = ", ".join(_SUPPORTED)
    return f"{kind.__module__}.{kind.__name__} is not supported; {known} of {_FILE} are"


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
