# SPDX-License-Identifier: Apache-2.0
"""What bench.train_routing trains: models, data, and the baselines that learning is judged by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headworks.cli.demo_checks import read_text, split_text
from headworks.cli.demo_train import Recipe, Trainer
from headworks.cli.training import Loop, Schedule
from headworks.models import BiFormer, LanguageModel, RoutingConfig, RoutingLM
from headworks.models.config import rotary_dim
from headworks.nn import SlidingWindowAttention

# Language model. Clusters reach over the whole window of 256 bytes, local heads 32 back.
LM_RECIPE = Recipe(steps=900, batch=4, length=256, learning_rate=4e-3)
LM_CONFIG = RoutingConfig(
    vocab_size=256, d_model=128, num_layers=4, num_heads=4, local_heads=2, num_clusters=8,
    window=32, local_window=32, mlp_hidden=256, init_std=128**-0.5,
)  # fmt: skip

# Digits. 64 x 64 images give stages of 16, 8, 4 and 2 tokens a side; with 4 x 4 regions and topk
# 1, 4, 16 every token of the routing stages has 16 keys, the paper's constant number made smaller.
DIGITS_SCHEDULE = Schedule(steps=400, batch=32, learning_rate=2e-3, weight_decay=0.05)
DIGITS_SIDE = 64
DIGITS_SIZES: dict[str, Any] = {
    "depth": (1, 1, 2, 1), "embed_dim": (32, 48, 64, 96), "topks": (1, 4, 16, -2), "n_win": 4,
    "head_dim": 16, "in_chans": 1, "num_classes": 10,
}  # fmt: skip
_HELD_OUT = 0.2
_SHIFT = 6  # pixels that training images are moved by at most
_VALIDATION_BATCH = 128


def text() -> tuple[str, Tensor, Tensor]:
    """Name of the demo's text, its bytes but the last tenth, and that tenth; [n] uint8."""
    name, content = read_text(None)
    return name, *split_text(name, content, LM_RECIPE.length)


def routing_lm(backend: str, device: torch.device, config: RoutingConfig = LM_CONFIG) -> RoutingLM:
    """The model whose heads are half local, half routing."""
    return RoutingLM(config, backend=backend, device=device)


def local_lm(device: torch.device, config: RoutingConfig = LM_CONFIG) -> LanguageModel:
    """The same model with local heads alone, on hw.attention."""
    mixers: list[nn.Module] = [
        SlidingWindowAttention(
            config.d_model, config.num_heads, window=config.local_window,
            rotary_dim=rotary_dim(config), device=device,
        )
        for _ in range(config.num_layers)
    ]  # fmt: skip
    return LanguageModel(config, mixers, device=device)


def text_loop(
    model: LanguageModel, train: Tensor, held_out: Tensor, steps: int, seed: int,
    recipe: Recipe = LM_RECIPE,
) -> Trainer:  # fmt: skip
    """Its training; figures are bits per byte."""
    return Trainer(model, train, held_out, recipe, steps, seed)


@torch.no_grad()
def without_routing(loop: Trainer) -> float:
    """The held-out figure of the trained RoutingLM with what its routing heads say made 0."""
    layers = [block.mixer for block in loop.model.blocks]
    before = [layer.out_proj.weight.clone() for layer in layers]
    for layer in layers:
        layer.out_proj.weight[:, layer.local_heads * layer.head_dim :] = 0
    figure = loop.validate()
    for layer, weight in zip(layers, before, strict=True):
        layer.out_proj.weight.copy_(weight)
    return figure


def byte_entropies(train: Tensor, held_out: Tensor) -> dict[str, float]:
    """Bits per byte of the held-out text by counts of the other part, one added to each count."""
    train, held_out = train.long(), held_out.long()
    single = torch.bincount(train, minlength=256).double() + 1
    pairs = torch.bincount(256 * train[:-1] + train[1:], minlength=256**2).double() + 1
    pairs = pairs.reshape(256, 256)
    alone = (single / single.sum()).log2()[held_out[1:]]
    after = (pairs / pairs.sum(1, keepdim=True)).log2()[held_out[:-1], held_out[1:]]
    return {"frequency of bytes": -alone.mean().item(), "previous byte": -after.mean().item()}


@dataclass(frozen=True)
class Images:
    """Labelled images [n, C, Y, X], in part held out."""

    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor


def digits(seed: int, side: int = DIGITS_SIDE) -> Images:
    """scikit-learn's 1797 digits of 8 x 8 pixels, enlarged; a fifth, drawn by seed, is held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.from_numpy(data.images).float()[:, None] / 16
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, labels = x[order], torch.from_numpy(data.target).long()[order]
    held_out = math.ceil(_HELD_OUT * len(x))
    x = (x - x[held_out:].mean()) / x[held_out:].std()
    x = F.interpolate(x, size=(side, side), mode="bilinear")
    return Images(x[held_out:], labels[held_out:], x[:held_out], labels[:held_out])


def digit_classifier(backend: str, device: torch.device, **changes: Any) -> BiFormer:
    """A narrow BiFormer with all four of its stages."""
    return BiFormer(**{**DIGITS_SIZES, **changes}, backend=backend, device=device)


def digit_baselines(images: Images) -> dict[str, float]:
    """Held-out accuracy, in percent, of guessing and of a linear classifier of the 8 x 8 pixels."""
    from sklearn.linear_model import LogisticRegression

    common = images.train_labels.mode().values
    guessed = (images.held_out_labels == common).float().mean().item()
    pixels = [F.adaptive_avg_pool2d(x, 8).flatten(1) for x in (images.train, images.held_out)]
    linear = LogisticRegression(max_iter=5000).fit(pixels[0].numpy(), images.train_labels.numpy())
    right = linear.score(pixels[1].numpy(), images.held_out_labels.numpy())
    return {"most frequent digit": 100 * guessed, "logistic regression": 100 * float(right)}


class ImageLoop(Loop):
    """Trains a classifier of images; the loss is in nats, the held-out figure accuracy in %."""

    validation_text = "held out {:.1f} %"
    quick_examples = None  # few enough to take all each time

    def __init__(
        self, model: nn.Module, images: Images, schedule: Schedule, steps: int, seed: int
    ) -> None:
        super().__init__(model, schedule, steps, seed)
        self.device = next(model.parameters()).device
        self.images = images

    def loss(self) -> Tensor:
        """Cross entropy of images drawn at random, each moved a little."""
        draw, batch = self.draw(), self.schedule.batch
        chosen = torch.randint(len(self.images.train), (batch,), generator=draw)
        moves = torch.randint(-_SHIFT, _SHIFT + 1, (batch, 2), generator=draw)
        x = _moved(self.images.train[chosen], moves).to(self.device)
        return F.cross_entropy(self.model(x), self.images.train_labels[chosen].to(self.device))

    @torch.no_grad()
    def validate(self, examples: int | None = None) -> float:
        """Percent of the held-out images that are named right: of the first so many, or all."""
        self.model.eval()
        x, labels = self.images.held_out[:examples], self.images.held_out_labels[:examples]
        parts = [self.model(some.to(self.device)).argmax(1) for some in x.split(_VALIDATION_BATCH)]
        self.model.train()
        return 100 * (torch.cat(parts).cpu() == labels).float().mean().item()


def _moved(x: Tensor, moves: Tensor) -> Tensor:
    """Images [n, C, Y, X], each moved by its (down, right) pixels; the border is repeated."""
    padded = F.pad(x, (_SHIFT,) * 4, mode="replicate")
    height, width = x.shape[2:]
    rows = _SHIFT - moves[:, :1] + torch.arange(height)  # [n, Y]
    columns = _SHIFT - moves[:, 1:] + torch.arange(width)
    n = torch.arange(len(x))[:, None, None]
    return padded[n, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
