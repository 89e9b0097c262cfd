# SPDX-License-Identifier: Apache-2.0
"""The training runs of bench.train_routing, a few steps each: the models learn, and by attention.

A whole model learns something without the gradient of attention, by its embeddings, convolutions
and MLPs. So the bounds that say that attention learns are set on models of which the projections
before attention alone are trained, where no bound is reached once that gradient is made zero.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import statistics
import sys
from pathlib import Path

import pytest
import torch

from headworks.cli.training import Schedule
from headworks.nn import bilevel_routing, kmeans_routing

sys.path.insert(0, str(Path(__file__).parents[1]))

tasks = importlib.import_module("bench.train_tasks")
train_routing = importlib.import_module("bench.train_routing")

CPU = torch.device("cpu")
SMALL_LM = dataclasses.replace(
    tasks.LM_CONFIG, d_model=32, num_layers=2, num_heads=2, local_heads=1, num_clusters=2,
    window=16, local_window=8, mlp_hidden=64, init_std=32**-0.5, commitment=0.0,
)  # fmt: skip
SMALL_BIFORMER = {
    "depth": (1, 1, 1, 1), "embed_dim": (16, 16, 16, 32), "topks": (1, 2, 4, -2), "n_win": 2,
}  # fmt: skip
LAYERS = {
    "kmeans_routing_attention": kmeans_routing,
    "bilevel_routing_attention": bilevel_routing,
}


@pytest.fixture(autouse=True)
def _one_thread(_deterministic_start):
    """The models here are tiny: threads cost more than they give."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def text():
    _, train, held_out = tasks.text()
    return train, held_out[:4000]


@pytest.fixture(scope="module")
def images():
    pytest.importorskip("sklearn", reason="scikit-learn has the digits")
    data = tasks.digits(0, side=32)
    return dataclasses.replace(
        data, held_out=data.held_out[:100], held_out_labels=data.held_out_labels[:100]
    )


def lm_loop(text, steps, learning_rate, learnt=""):
    """Training of a small RoutingLM, of the parameters with `learnt` in their name."""
    model = tasks.routing_lm("reference", CPU, SMALL_LM)
    _keep_fixed(model, learnt)
    recipe = dataclasses.replace(tasks.LM_RECIPE, length=32, learning_rate=learning_rate, warmup=5)
    return tasks.text_loop(model, *text, steps, 0, recipe)


def digit_loop(images, steps, learning_rate, learnt="", **options):
    """Training of a small BiFormer, of the parameters with `learnt` in their name."""
    model = tasks.digit_classifier("reference", CPU, **SMALL_BIFORMER, **options)
    _keep_fixed(model, learnt)
    schedule = Schedule(
        steps=steps, batch=32, learning_rate=learning_rate, warmup=5, weight_decay=0.0
    )
    return tasks.ImageLoop(model, images, schedule, steps, 0)


def _keep_fixed(model, learnt):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learnt in name)


def _without_gradient(monkeypatch, operator):
    """The operator as it is, its incoming gradient made 0."""
    attend = getattr(LAYERS[operator], operator)

    def broken(*args, **options):
        o = attend(*args, **options)
        if o.requires_grad:
            o.register_hook(torch.zeros_like)
        return o

    monkeypatch.setattr(LAYERS[operator], operator, broken)


def test_the_language_model_learns(text):
    """More than the frequencies of bytes."""
    bound = tasks.byte_entropies(*text)["frequency of bytes"]
    loop = lm_loop(text, 60, 2e-2)
    assert 4.4 < bound < 5 and loop.validate() > 8
    run = train_routing.train_loop(loop)
    assert run["held_out"] < bound - 0.1
    assert [step for step, _ in run["train_curve"]] == list(range(1, 61))
    assert run["validation_curve"][-1] == [60, run["held_out"]]
    assert all(bool(block.mixer.initialized) for block in loop.model.blocks)
    assert tasks.without_routing(loop) > run["held_out"] == loop.validate()


# Held-out bits per byte: 8.66 untrained or without gradient, 7.08 and 8.58 trained.
@pytest.mark.parametrize(
    ("learnt", "rate", "bound"), [("to_v", 0.2, 7.6), ("to_q", 0.4, 8.63)], ids=("v", "q and k")
)
def test_the_language_model_learns_by_attention(text, learnt, rate, bound, monkeypatch):
    loop = lm_loop(text, 30, rate, learnt)
    assert loop.validate() > bound
    assert train_routing.train_loop(loop)["held_out"] < bound
    _without_gradient(monkeypatch, "kmeans_routing_attention")
    torch.manual_seed(0)
    broken = lm_loop(text, 30, rate, learnt)
    assert train_routing.train_loop(broken)["held_out"] > bound


def test_the_classifier_learns(images):
    """Chance is 10 %."""
    loop = digit_loop(images, 60, 5e-3)
    assert loop.validate() < 25
    run = train_routing.train_loop(loop)
    assert run["held_out"] > 60
    assert _end(run["train_curve"]) < 0.7 * run["train_curve"][0][1]


# Loss of the last five steps: 3.29 untrained or without gradient, 2.96 and 2.24 trained.
@pytest.mark.parametrize(("part", "bound"), [("q and k", 3.1), ("v", 2.7)])
def test_the_classifier_learns_by_attention(images, part, bound, monkeypatch):
    def run():
        torch.manual_seed(0)
        loop = digit_loop(images, 25, 0.1, "qkv.qkv.weight", side_dwconv=0)
        for name, parameter in loop.model.named_parameters():
            if name.endswith(
                ("qkv.qkv.weight", "wo.weight", "head.weight")
            ):  # so that attention matters
                torch.nn.init.normal_(parameter, std=0.3)
            if parameter.requires_grad:
                keep = torch.ones(len(parameter), 1)
                rows = len(keep) // 3 * 2  # of q and k
                keep[slice(rows, None) if part == "q and k" else slice(rows)] = 0
                parameter.register_hook(lambda g, keep=keep: g * keep)
        return _end(train_routing.train_loop(loop)["train_curve"])

    assert run() < bound
    _without_gradient(monkeypatch, "bilevel_routing_attention")
    assert run() > bound


def _end(curve):
    return statistics.fmean(value for _, value in curve[-5:])


def test_images_move_and_keep_their_sides():
    x = torch.zeros(2, 1, 20, 20)
    x[:, :, 10, 10] = 1
    moved = tasks._moved(x, torch.tensor([[3, -2], [0, 6]]))
    assert moved.shape == x.shape
    assert moved.nonzero().tolist() == [[0, 0, 13, 8], [1, 0, 10, 16]]


def test_entropies_of_counts():
    """Of a text in which a byte says which one follows, and of one of equal bytes."""
    train = torch.arange(4, dtype=torch.uint8).repeat(5000)
    found = tasks.byte_entropies(train, train[:400])
    assert found["frequency of bytes"] == pytest.approx(2, abs=0.03)
    assert found["previous byte"] < 0.1


@pytest.mark.parametrize("task", train_routing.TASKS)
def test_files_of_a_run(task, tmp_path, monkeypatch, capsys):
    """The command, on small models; its result file and its picture."""
    pytest.importorskip("matplotlib")
    if task == "digits":
        pytest.importorskip("sklearn", reason="scikit-learn has the digits")
    name, train, held_out = tasks.text()
    monkeypatch.setattr(tasks, "text", lambda: (name, train, held_out[:2000]))
    config = dataclasses.replace(SMALL_LM, window=128)  # two clusters of 128: windows of 256
    monkeypatch.setattr(tasks.routing_lm, "__defaults__", (config,))
    monkeypatch.setattr(tasks.local_lm, "__defaults__", (config,))
    monkeypatch.setattr(tasks.digits, "__defaults__", (32,))
    monkeypatch.setattr(tasks, "DIGITS_SIZES", {**tasks.DIGITS_SIZES, **SMALL_BIFORMER})
    options = ["--results", str(tmp_path), "--images", str(tmp_path), "--steps", "2", "--quiet"]
    assert train_routing.main([task, "--backend", "reference", *options]) == 0
    printed = capsys.readouterr().out
    data = json.loads((tmp_path / f"train_routing_{task}.json").read_text())
    assert data["backend"] == "reference" and len(data["baselines"]) == 2
    for name, run in data["runs"].items():
        assert run["steps"] == 2 and len(run["train_curve"]) == 2
        assert f"{run['held_out']:.3f}  {name}" in printed
    picture = tmp_path / train_routing.TASKS[task][2]
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("steps", "0", "expected at least 1"), ("device", "toaster", "expected auto, cpu, cuda")],
)
def test_bad_requests(option, value, message, capsys):
    with pytest.raises(SystemExit):
        train_routing.main(["lm", f"--{option}", value])
    assert message in capsys.readouterr().err


def test_a_backend_that_cannot_is_named(monkeypatch, capsys):
    def cannot(_):
        raise NotImplementedError("no kernel for this")

    monkeypatch.setitem(train_routing.TASKS, "lm", (cannot, None, ""))
    assert train_routing.main(["lm"]) == 2
    assert "no kernel for this" in capsys.readouterr().err
