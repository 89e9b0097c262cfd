# SPDX-License-Identifier: Apache-2.0
"""Sizes of the models."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

VOCAB_MULTIPLE = 8


@dataclass(frozen=True)
class BasedConfig:
    """Sizes of a :class:`BasedLM`; the defaults are the 360M model of the paper.

    Layers listed in ``linear_layers`` mix tokens by linear attention, those in ``window_layers`` by
    sliding-window attention, all others by the gated short convolution.
    """

    vocab_size: int = 50257  # rows of the embedding: rounded up to a multiple of 8
    d_model: int = 1024
    num_layers: int = 27
    linear_layers: tuple[int, ...] = (1, 6, 11, 16, 21)
    window_layers: tuple[int, ...] = (2, 7, 12, 17, 22)
    num_heads: int = 16
    feature_dim: int = 16  # width of a query or key head of the linear layers
    head_dim: int | None = None  # width of a value head there; default d_model / num_heads
    feature_map: str = "taylor2"
    g_norm: bool = False  # RMS norm on the output heads of the linear layers
    window: int = 128  # earlier tokens a window layer sees; upstream configs state twice this
    rotary_fraction: float = 1.0  # part of a head that is rotated, window layers only
    conv_width: int = 3
    conv_bias: bool = False
    mlp_hidden: int | None = None  # default 2 * d_model, rounded up to a multiple of 256
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("linear_layers", "window_layers"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _check_sizes(self)
        both = set(self.linear_layers) & set(self.window_layers)
        if both:
            raise ValueError(f"BasedConfig: layers {sorted(both)} are both linear and window")
        listed = self.linear_layers + self.window_layers
        outside = sorted(i for i in listed if not 0 <= i < self.num_layers)
        if outside:
            raise ValueError(
                f"BasedConfig: layers {outside} do not exist, num_layers is {self.num_layers}"
            )

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """'conv', 'linear' or 'window' for every layer."""
        kinds = dict.fromkeys(self.linear_layers, "linear")
        kinds.update(dict.fromkeys(self.window_layers, "window"))
        return tuple(kinds.get(i, "conv") for i in range(self.num_layers))

    @classmethod
    def based_360m(cls) -> BasedConfig:
        """The 360M model (hazyresearch/based-360m)."""
        return cls()

    @classmethod
    def based_1b(cls) -> BasedConfig:
        """The 1.4B model (hazyresearch/based-1b-50b): value and window heads of 112."""
        return cls(
            d_model=1792,
            num_layers=36,
            linear_layers=(1, 6, 11, 16, 21, 27, 33),
            window_layers=(2, 7, 12, 17, 22, 28, 34),
        )

    @classmethod
    def byte_level(cls, size: str = "tiny") -> BasedConfig:
        """Byte-level models for ``headworks demo``: "tiny", "small" or "base".

        Narrow models learn faster from larger weights than the default: 1 / sqrt(d_model).
        """
        if size not in _BYTE_LEVEL:
            raise ValueError(f"size is {size!r}, expected one of {sorted(_BYTE_LEVEL)}")
        sizes = _BYTE_LEVEL[size]
        return cls(vocab_size=256, init_std=sizes["d_model"] ** -0.5, **sizes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BasedConfig:
        return _from_dict(cls, values)


# About 1, 6 and 25 million parameters.
_BYTE_LEVEL: dict[str, dict[str, Any]] = {
    "tiny": {
        "d_model": 128, "num_layers": 5, "linear_layers": (1, 3), "window_layers": (2,),
        "num_heads": 4, "window": 64, "mlp_hidden": 256,
    },
    "small": {
        "d_model": 256, "num_layers": 9, "linear_layers": (1, 4, 7), "window_layers": (2, 5),
        "num_heads": 4, "window": 64, "mlp_hidden": 512,
    },
    "base": {
        "d_model": 512, "num_layers": 10, "linear_layers": (1, 4, 7), "window_layers": (2, 5, 8),
        "num_heads": 8, "window": 128, "mlp_hidden": 1024,
    },
}  # fmt: skip


@dataclass(frozen=True)
class SoftmaxConfig:
    """Sizes of a :class:`SoftmaxLM`."""

    vocab_size: int = 50257
    d_model: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    rotary_fraction: float = 1.0
    mlp_hidden: int | None = None
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    init_std: float = 0.02

    def __post_init__(self) -> None:
        _check_sizes(self)

    @classmethod
    def like(cls, config: BasedConfig) -> SoftmaxConfig:
        """The softmax model of the same width, depth, heads and MLP."""
        shared = {f.name for f in fields(cls)} & {f.name for f in fields(config)}
        return cls(**{name: getattr(config, name) for name in shared})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SoftmaxConfig:
        return _from_dict(cls, values)


_Config = TypeVar("_Config", BasedConfig, SoftmaxConfig)


def padded_vocab(config: BasedConfig | SoftmaxConfig) -> int:
    """Rows of the embedding."""
    return -(-config.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def mlp_hidden(config: BasedConfig | SoftmaxConfig) -> int:
    """Hidden channels of the gated MLP."""
    if config.mlp_hidden is not None:
        return config.mlp_hidden
    return -(-2 * config.d_model // 256) * 256


def rotary_dim(config: BasedConfig | SoftmaxConfig) -> int:
    """Rotated channels of a head, an even number."""
    return int(config.rotary_fraction * (config.d_model // config.num_heads)) // 2 * 2


def _check_sizes(config: BasedConfig | SoftmaxConfig) -> None:
    name = type(config).__name__
    for size in ("vocab_size", "d_model", "num_layers", "num_heads"):
        if getattr(config, size) < 1:
            raise ValueError(f"{name}: {size} is {getattr(config, size)}, expected at least 1")
    if config.d_model % config.num_heads:
        raise ValueError(
            f"{name}: d_model {config.d_model} is not a multiple of num_heads {config.num_heads}"
        )


def _from_dict(cls: type[_Config], values: dict[str, Any]) -> _Config:
    unknown = sorted(set(values) - {f.name for f in fields(cls)})
    if unknown:
        raise ValueError(f"{cls.__name__}: unknown fields {unknown}")
    return cls(**values)
