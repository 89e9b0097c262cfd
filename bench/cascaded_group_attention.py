# SPDX-License-Identifier: Apache-2.0
"""The suite of hw.cascaded_group_attention: modules and whole models of EfficientViT.

Peers are timm's, eager and compiled, each in both memory layouts; without timm a module of torch's
layers, which computes the same, stands for it. Models are timm's before and after
headworks.integrations.timm.optimize.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import headworks as hw
from bench.parts import no_grad
from bench.suite import Case, Result, Target
from bench.timing import Call
from headworks.cost import cost

BATCH, MODEL_BATCH, IMAGE = 64, 16, 224
# Of a stage: (channels, heads, kernels), side of its map and of its windows.
STAGES = {
    "M0 stage 1": (64, 4, (5, 5, 5, 5), 14, 7),
    "M5 stage 1": (192, 3, (7, 5, 3), 14, 7),
    "M4 stage 3": (384, 4, (7, 5, 3, 3), 4, 4),
}
MODELS = ("m0", "m2", "m5")
THRESHOLDS = {"M0 stage 1": 2.5, "M5 stage 1": 1.8}
MODEL_THRESHOLD = 1.3
PEERS = ("eager", "eager, channels last", "compiled", "compiled, channels last")


def cases(device: str, quick: bool) -> list[Case]:
    """Modules at one batch and at 1; whole models where timm is installed."""
    names = list(STAGES)[:1] if quick else list(STAGES)
    made = [_module_case(device, name, BATCH, quick) for name in names]
    made += [_module_case(device, name, 1, quick) for name in names[:2]]
    if has_timm():
        made += [_model_case(device, name, quick) for name in (MODELS[:1] if quick else MODELS)]
    return made


def gpu_cases(device: str, tiny: bool) -> list[Case]:
    """Modules, large batches and single images."""
    if tiny:
        return [_module_case(device, "M0 stage 1", 1, True)]
    return [_module_case(device, name, b, False) for name in STAGES for b in (BATCH, 1)]


def targets(results: Mapping[str, Result], device: str) -> list[Target]:
    """The thresholds of the design, set for a CPU."""
    if device != "cpu":
        return []
    made = [
        Target(f"{name}: the best peer", _speedup(results, _name(name, BATCH)), threshold)
        for name, threshold in THRESHOLDS.items()
    ]
    return made + [
        Target(f"model {name}: the best peer", _speedup(results, f"model {name}"), MODEL_THRESHOLD)
        for name in MODELS
    ]


def has_timm() -> bool:
    return importlib.util.find_spec("timm") is not None


def randomized(module: nn.Module) -> nn.Module:
    """Weights, and statistics of batch norms, that are not those of a fresh module."""
    generator = torch.Generator().manual_seed(0)

    def draw(x: Tensor) -> Tensor:
        return torch.rand(x.shape, generator=generator).to(x.device)

    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_mean.copy_(draw(m.running_mean) / 5)
                m.running_var.copy_(0.5 + draw(m.running_var))
                m.weight.copy_(0.5 + draw(m.weight))
                m.bias.copy_(draw(m.bias) / 5)
            elif hasattr(m, "attention_biases"):
                m.attention_biases.copy_(draw(m.attention_biases))
    return module.eval().requires_grad_(False)


def _name(stage: str, batch: int) -> str:
    return f"{stage} B {batch}"


def _speedup(results: Mapping[str, Result], name: str) -> float | None:
    if name not in results:
        return None
    ours = min(results[name].median(n) for n in results[name].seconds if n not in PEERS)
    best = results[name].best(*PEERS)
    return None if best is None else best / ours


class _OfTorch(nn.Module):
    """The layers of the module, where timm is not there."""

    def __init__(self, layer: hw.nn.CascadedGroupAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer._train(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _layers(stage: str) -> tuple[nn.Module, hw.nn.CascadedGroupAttention]:
    """The peer and ours, of the same weights."""
    channels, heads, kernels, side, window = STAGES[stage]
    layer = hw.nn.CascadedGroupAttention(
        channels, 16, heads, resolution=window, kernels=kernels
    )  # fmt: skip
    randomized(layer)
    if not has_timm():
        return _OfTorch(copy.deepcopy(layer)), layer
    from timm.models.efficientvit_msra import LocalWindowAttention

    peer = LocalWindowAttention(
        channels, 16, heads, attn_ratio=channels / (16 * heads), resolution=side,
        window_resolution=window, kernels=kernels,
    )  # fmt: skip
    peer.attn.load_state_dict(layer.state_dict())
    peer.eval()
    return peer.requires_grad_(False), layer


def _contenders(
    peer: Callable[..., Any], ours: Callable[..., Any], x: Tensor, compiled: bool
) -> dict[str, Call]:
    last = x.to(memory_format=torch.channels_last)
    made = {
        "headworks": no_grad(ours, x),
        "headworks, channels last": no_grad(ours, last),
        "eager": no_grad(peer, x),
        "eager, channels last": no_grad(peer, last),
    }
    if compiled:
        graph = torch.compile(peer, dynamic=False)
        made |= {"compiled": no_grad(graph, x), "compiled, channels last": no_grad(graph, last)}
    return made


def _module_case(device: str, stage: str, batch: int, quick: bool) -> Case:
    channels, heads, kernels, side, window = STAGES[stage]

    def contenders() -> dict[str, Call]:
        peer, layer = _layers(stage)
        x = torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(1))
        return _contenders(
            peer.to(device), layer.fuse().to(device), x.to(device), compiled=not quick
        )

    shape = {"B": batch, "Y": side, "X": side, "H": heads, "d": channels // heads}
    total = cost("cascaded_group_attention", **shape, window=window, kernels=kernels)
    facts = {**shape, "window": window, "dtype": "float32"}
    return Case(_name(stage, batch), facts, contenders, total)


def _model_case(device: str, name: str, quick: bool) -> Case:
    def contenders() -> dict[str, Call]:
        import timm

        from headworks.integrations import timm as hw_timm

        model = randomized(timm.create_model(f"efficientvit_{name}"))
        models = [model, copy.deepcopy(model)]
        x = torch.randn(MODEL_BATCH, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(1))
        hw_timm.optimize(models[1])
        made = _contenders(*(m.to(device) for m in models), x.to(device), compiled=not quick)
        if not quick:
            graph = torch.compile(models[1], dynamic=False)
            made["headworks, compiled"] = no_grad(graph, x.to(device))
        return made

    facts = {"B": MODEL_BATCH, "image": IMAGE, "dtype": "float32"}
    return Case(f"model {name}", facts, contenders)
