# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-call"
"""Centroids that online k-means moves while a layer trains."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

from .._native import define
from ..ops.routing.kmeans_routing import kmeans_update
from ._recompute import may_repeat, recomputing, unrecorded
from ._side_loss import SideLoss
from ._types import Device

_INITIAL_ITERATIONS = 10


@dataclass
class Past:
    """A forward in training, as its recomputation has to know it."""

    centroids: Tensor  # [Hr, K, D] by which it routed
    drew: bool  # whether it drew random tokens to start from
    stand_in: Tensor | None = None  # of its loss, where it was made without gradients


class Group:
    """A process group, or None. Copies share it; a pickle holds its name."""

    def __init__(self, group: Any) -> None:
        self.group = group

    @property
    def name(self) -> str | None:
        return None if self.group is None else self.group.group_name

    def __deepcopy__(self, memo: Any) -> Group:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return group_of_name, (self.name,)


def group_of_name(name: str | None) -> Group:
    """The group of that name in this process; none, with a warning, if there is no such group."""
    if name is None:
        return Group(None)
    try:
        known: Any = torch.distributed.distributed_c10d
        return Group(known._resolve_process_group(name))
    except (AttributeError, RuntimeError, ValueError):
        warnings.warn(
            f"headworks: a layer was saved with the process group {name!r}, which does not exist "
            "here; its centroids are those of this process alone",
            stacklevel=2,
        )
        return Group(None)


class Centroids(SideLoss):
    """The buffers ``centroids`` [Hr, K, D] and ``initialized``, and how training moves them."""

    centroids: Tensor
    initialized: Tensor

    def __init__(self, decay: float, group: Any) -> None:
        super().__init__()
        self.decay, self._group = decay, Group(group)
        self._ready = False  # what `initialized` says, once it has been asked

    @property
    def group(self) -> Any:
        """The process group over which the centroids are kept equal, or None."""
        return self._group.group

    def reset_parameters(self) -> None:
        """Draws all weights as for a new layer; the next forward in training sets centroids."""
        super().reset_parameters()
        with torch.no_grad():
            self.centroids.copy_(F.normalize(torch.randn_like(self.centroids), dim=-1))
            self.initialized.zero_()
        self._ready, self._loss = False, None

    @torch.no_grad()
    def initialize(self, routed: Tensor) -> None:
        """Centroids of the routing vectors [B, S, Hr, D]: random tokens, then k-means."""
        self._set(*_from_tokens(routed, self.centroids, self._group.name))

    def _add_buffers(self, heads: int, clusters: int, width: int, device: Device) -> None:
        start = torch.randn(heads, clusters, width, device=device)
        self.register_buffer("centroids", F.normalize(start, dim=-1))
        # A number, as averages of models subtract buffers.
        self.register_buffer("initialized", torch.zeros((), dtype=torch.int64, device=device))

    def _begin(self, routed: Tensor) -> Past:
        """The centroids by which this forward in training routes the vectors [B, S, Hr, D]."""
        if recomputing():
            past: Past | None = self._memory.recall(routed)
            if past is None:
                raise RuntimeError(
                    f"{type(self).__name__}: a forward in training inside a backward pass repeats "
                    "none that is remembered: the centroids by which it routed are not known. "
                    "Recompute with the input of the first run, within 64 forwards; for another "
                    "forward inside a backward pass call eval() first"
                )
            if past.drew:
                with unrecorded():  # so that what follows draws the same random numbers
                    _random_order(routed.flatten(0, 1))
            return past
        drew = self._start(routed)
        return Past(self.centroids.clone() if may_repeat() else self.centroids, drew)

    def _start(self, routed: Tensor) -> bool:
        """The first forward in training sets the centroids; whether this one did."""
        if self._ready:
            return False
        if torch.compiler.is_compiling():  # where the flag cannot be read
            with torch.no_grad():
                given = (routed.detach(), self.centroids, self.initialized, self._group.name)
                made, done = torch.ops.headworks.kmeans_start(*given)
                self.centroids.copy_(made)
                self.initialized.copy_(done)
            return False
        self._ready = bool(self.initialized)
        if self._ready:
            return False
        with unrecorded():
            self.initialize(routed)
        return True

    def _move(self, routed: Tensor) -> None:
        """The step of k-means that follows a forward in training."""
        with unrecorded():
            moved = kmeans_update(self.centroids, routed, decay=self.decay, group=self.group)
            self.centroids.copy_(moved)

    def _set(self, centroids: Tensor, initialized: Tensor) -> None:
        self.centroids.copy_(centroids)
        self.initialized.copy_(initialized)
        self._ready = bool(initialized)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        name = f"{prefix}initialized"
        if name in state_dict:  # earlier versions wrote booleans
            state_dict[name] = state_dict[name].to(torch.int64)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._ready = False
        if not self.initialized.is_meta:
            self._ready = bool(self.initialized)


def _random_order(tokens: Tensor) -> Tensor:
    return torch.randperm(len(tokens), device=tokens.device)


def _from_tokens(routed: Tensor, centroids: Tensor, group: str | None) -> tuple[Tensor, Tensor]:
    """Centroids [H, K, D] of the vectors [B, S, H, D], and 1 if there were any, else 0.

    Vectors that are not finite take no part. A head without vectors keeps its centroids.
    """
    start, has_tokens = _chosen(routed.detach().flatten(0, 1), centroids)
    processes = group_of_name(group).group
    if processes is not None:  # every rank starts from the tokens of the first
        start = start.contiguous()
        first = torch.distributed.get_global_rank(processes, 0)
        torch.distributed.broadcast(start, first, group=processes)
        torch.distributed.all_reduce(has_tokens, torch.distributed.ReduceOp.MAX, group=processes)
    for _ in range(_INITIAL_ITERATIONS):
        start = kmeans_update(start, routed, decay=0.0, group=processes)
    return start, has_tokens


def _chosen(tokens: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """K random tokens of [N, H, D] for each head, [H, K, D], and 1 if every head has some."""
    if not len(tokens):
        return centroids.clone(), centroids.new_zeros((), dtype=torch.int64)
    tokens = tokens[_random_order(tokens)]
    is_finite = tokens.isfinite().all(-1)  # [N, H]
    order = is_finite.logical_not().byte().argsort(dim=0, stable=True)  # the finite ones first
    place = torch.arange(centroids.shape[1], device=tokens.device)[:, None]  # [K, 1]
    place = order.gather(0, place % is_finite.sum(0).clamp(min=1))  # [K, H]
    head = torch.arange(tokens.shape[1], device=tokens.device)
    start = F.normalize(tokens[place, head].transpose(0, 1).to(centroids.dtype), dim=-1)
    has_tokens = is_finite.any(0)
    start = torch.where(has_tokens[:, None, None], start, centroids)
    return start, has_tokens.all().long()


def _start_once(
    routed: Tensor, centroids: Tensor, initialized: Tensor, group: str | None
) -> tuple[Tensor, Tensor]:
    if bool(initialized):
        return centroids.clone(), initialized.clone()
    return _from_tokens(routed, centroids, group)


def _start_fake(
    routed: Tensor, centroids: Tensor, initialized: Tensor, group: str | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(centroids), torch.empty_like(initialized)


define(
    "kmeans_start(Tensor routed, Tensor centroids, Tensor initialized, str? group) "
    "-> (Tensor, Tensor)",
    _start_once,
    _start_fake,
)
