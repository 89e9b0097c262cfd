# SPDX-License-Identifier: Apache-2.0
"""K-means layers on two processes: centroids equal on both, and those of the joined batch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.utils.checkpoint import checkpoint

from headworks.nn import KMeansRoutingAttention

WIDTH, RANKS, STEPS = 16, 2, 3


def layer(group=None):
    torch.manual_seed(0)
    return KMeansRoutingAttention(
        WIDTH, 2, local_heads=1, num_clusters=4, window=6, decay=0.5, group=group,
    ).double().train()  # fmt: skip


def batches(rank):
    """Each rank has another number of sequences; in the second step the first one has none."""
    draw = torch.Generator().manual_seed(3)
    for step in range(STEPS):
        x = torch.randn(3, 12, WIDTH, generator=draw, dtype=torch.float64)
        cut = 0 if step == 1 else 1
        yield (x[:cut], x[cut:])[rank] if rank is not None else x


def train(rank, made, forward):
    for x in batches(rank):
        y = forward(made, x.requires_grad_())
        (y.square().sum() + made.pop_loss()).backward()
    return made.centroids.clone()


MODES = {
    "plain": lambda made, x: made(x),
    "reentrant": lambda made, x: checkpoint(made, x, use_reentrant=True),
    "not reentrant": lambda made, x: checkpoint(made, x, use_reentrant=False),
}


def work(rank, file, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=RANKS)
    found = {}
    for mode, forward in MODES.items():
        for start in ("given", "from tokens"):
            made = layer(dist.group.WORLD)
            if start == "given":
                made.initialized.fill_(1)
            else:
                torch.manual_seed(rank)  # the first rank's tokens count
            found[mode, start] = train(rank, made, forward)
    made = copy.deepcopy(layer(dist.group.WORLD))
    found["copied"] = made.group is dist.group.WORLD
    torch.save(found, f"{results}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_ranks(tmp_path):
    multiprocessing.spawn(work, (tmp_path / "meeting", tmp_path), nprocs=RANKS)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS))
    alone = layer()
    alone.initialized.fill_(1)
    expected = train(None, alone, MODES["plain"])
    assert first.pop("copied") and second.pop("copied")
    assert len(first) == 6
    for key, got in first.items():
        assert torch.equal(got, second[key]), key
        assert got.isfinite().all()
        if "given" in key:
            torch.testing.assert_close(got, expected)
        assert not torch.equal(got, layer().centroids)


def test_a_pickle_without_its_group_warns(tmp_path):
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'alone'}", rank=0, world_size=1
    )
    try:
        torch.save(layer(dist.group.WORLD), tmp_path / "layer.pt")
        same = torch.load(tmp_path / "layer.pt", weights_only=False)
        assert same.group is dist.group.WORLD
    finally:
        dist.destroy_process_group()
    with pytest.warns(UserWarning, match="does not exist here"):
        other = torch.load(tmp_path / "layer.pt", weights_only=False)
    assert other.group is None
