# SPDX-License-Identifier: Apache-2.0
"""What was predicted of a GPU before any was at hand: the one place where predictions stand.

`headworks bench --device cuda` judges them as targets, `python -m bench.fill_gpu` writes them into
bench/GPU.md beside what came.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from bench.parts import exponent, percent, speedup
from bench.suite import Result, Target

Results = Mapping[str, Result]

FLASH = ("sdpa flash",)
FLA = ("fla fused_chunk_based", "fla parallel_based", "fla chunk_linear_attn")
EAGER = ("eager", "eager, indexed")
COMPILED = ("compiled", "compiled, indexed")


@dataclass(frozen=True)
class Prediction:
    """A figure of a suite's results, and what it was said to be at least (or at most)."""

    suite: str
    text: str
    figure: Callable[[Results], float | None]
    threshold: float
    unit: str = "x"
    at_most: bool = False

    def target(self, results: Results) -> Target:
        """Judged on results by case name."""
        figure = self.figure(results)
        return Target(self.text, figure, self.threshold, self.unit, self.at_most)


def _over(case: str, *peers: str) -> Callable[[Results], float | None]:
    return lambda results: speedup(results, case, *peers)


def _roof(case: str, roof: str) -> Callable[[Results], float | None]:
    return lambda results: percent(results, case, roof)


def _ratio(case: str, contender: str, other: str) -> Callable[[Results], float | None]:
    return lambda results: results[case].ratio(contender, other) if case in results else None


def _per_token(split: str, single: str) -> Callable[[Results], float | None]:
    """Time per token of a case over that of another, by the batch of their shapes."""

    def figure(results: Results) -> float | None:
        rates = []
        for name in (split, single):
            if name not in results or "headworks" not in results[name].seconds:
                return None
            rates.append(results[name].median("headworks") / results[name].shape["B"])
        return rates[0] / rates[1]

    return figure


def _attention() -> Iterable[Prediction]:
    for mode in ("forward", "train"):
        for d in (64, 128):
            for s in (2048, 8192):
                for mask in ("causal", "full"):
                    case = f"{mode} {mask} D {d} S {s} bf16"
                    yield Prediction("attention", f"{case}: SDPA flash", _over(case, *FLASH), 1.0)


def _shares() -> Iterable[Prediction]:
    for mode in ("forward", "train"):
        for share, words in ((0.5, "50 %"), (0.75, "75 %")):
            for mask in ("full", "causal"):
                case = f"{mode} {mask} {words}"
                yield Prediction(
                    "moh_attention",
                    f"{case}: time over that of all heads",
                    _ratio(case, "headworks", "dense"),
                    1.1 * share,
                    at_most=True,
                )


LINEAR = "forward S 8192 bf16"
STEP = "step B 64 H 16"
OPTIONS = ("bias", "key bias", "temperature", "gain", "gate", "mix", "softcap", "statistics")

PREDICTIONS: tuple[Prediction, ...] = (
    *_attention(),
    *(
        Prediction(
            "attention",
            f"options: {option}, time over that of flex_attention with a bias",
            _ratio("options", option, "flex, bias"),
            1 / 1.3,
            at_most=True,
        )
        for option in OPTIONS
    ),
    Prediction(
        "attention",
        "column sums given lse: time over that of a forward",
        _ratio("columns", "column sums", "headworks"),
        0.6,
        at_most=True,
    ),
    *(
        Prediction("attention", f"{case}: copy", _roof(case, "copy"), 70.0, "%")
        for kind in ("MHA", "GQA 8:1")
        for case in (f"decode {kind} B 8", f"decode {kind} B 64")
    ),
    Prediction("linear_attention", f"{LINEAR}: best of fla", _over(LINEAR, *FLA), 2.0),
    Prediction("linear_attention", f"{LINEAR}: copy", _roof(LINEAR, "copy"), 40.0, "%"),
    Prediction("linear_attention", f"{STEP}: copy", _roof(STEP, "copy"), 70.0, "%"),
    Prediction(
        "linear_attention", "growth exponent, 1 k to 64 k tokens", exponent, 1.05, "", at_most=True
    ),
    Prediction(
        "linear_attention",
        "8 sequences (split): time per token over that of 64 (single)",
        _per_token("forward B 8 S 8192 bf16", "forward B 64 S 8192 bf16"),
        1.5,
        at_most=True,
    ),
    *(
        Prediction(
            "bilevel_routing", f"train {stage}: {words}", _over(f"train {stage}", *who), least
        )
        for stage in ("56x56 topk 1", "28x28 topk 4", "14x14 topk 16")
        for words, who, least in (("eager", EAGER, 5.0), ("compiled", COMPILED, 3.0))
    ),
    Prediction("kmeans_routing", "forward S 8192: eager", _over("forward S 8192", "eager"), 4.0),
    Prediction("kmeans_routing", "train S 8192: eager", _over("train S 8192", "eager"), 4.0),
    *_shares(),
)


def targets(suite: str, results: Results) -> list[Target]:
    """The predictions of a suite, judged."""
    return [p.target(results) for p in PREDICTIONS if p.suite == suite]
