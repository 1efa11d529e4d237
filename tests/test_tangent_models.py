"""The tangent kernel simulator on models that compute their examples together, or go on behind their last layer."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from comparing import relative
from torch import Tensor, nn

import simfluence as sf
from simfluence.errors import PlainGradientsWarning
from simfluence.simulators.tangent.head import Head


class Words(nn.Module):
    """Words, a layer, the mean over the real words, and a layer; the batch may be sorted by length inside."""

    def __init__(self, sorts: bool) -> None:
        super().__init__()
        self.sorts = sorts
        self.words, self.mix, self.out = nn.Embedding(20, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        lengths = (ids > 0).sum(1)
        order = lengths.argsort(descending=True, stable=True) if self.sorts else torch.arange(len(ids))
        hidden = torch.tanh(self.mix(self.words(ids[order]))) * (ids[order] > 0)[..., None]
        return self.out(hidden.sum(1) / lengths[order, None])[order.argsort()]


def words(count: int) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 9, (count,), generator=rng)
    return torch.randint(1, 20, (count, 8), generator=rng) * (torch.arange(8) < lengths[:, None])


def test_a_model_that_sorts_its_batch_is_simulated_as_the_one_that_does_not():
    x = words(17)
    y = x[:, 0] % 3
    curricula = sf.random_curricula(12, runs=3, steps=6, batch_size=3, subset=0.5)
    found = []
    for sorts in (False, True):
        task = sf.tasks.from_arrays(lambda s=sorts: Words(s), x[:12], y[:12], "cross_entropy", test=(x[12:], y[12:]))
        runs = sf.record(task, sf.Recipe(lr=0.5), curricula, engine="loop")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PlainGradientsWarning)
            simulator = sf.TangentKernelSimulator(task, n_checkpoints=2).fit(runs[:1])
        true = np.stack([run.losses for run in runs[1:]])
        found.append(simulator.simulate(curricula[1:], true[:, 0]))
    assert relative(found[1], found[0]) < 1e-5
    assert relative(found[0], true) < 0.1


class Scaled(nn.Module):
    """A layer whose outputs a learned number scales, by 1 at first."""

    def __init__(self, learned: bool = True) -> None:
        super().__init__()
        self.last = nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.tensor(1.0), requires_grad=learned)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x) * self.scale


def test_a_layer_with_something_learned_behind_it_is_no_head():
    x = torch.randn(6, 8)
    assert Head.of(Scaled(), x) == Head(None)
    assert Head.of(Scaled(learned=False), x) == Head("last", bias=True)
    assert Head.of(nn.Sequential(nn.Linear(8, 3), nn.ReLU()), x.abs()) == Head(None)
    assert Head.of(Words(sorts=False), words(10)) == Head("out", bias=True)
    assert Head.of(Words(sorts=True), words(10)) == Head("out", bias=True, alone=True)


def test_a_scale_behind_a_bare_head_is_simulated():
    x = torch.randn(26, 8)
    y = (x[:, 0] > 0).long()
    task = sf.tasks.from_arrays(Scaled, x[:20], y[:20], "cross_entropy", test=(x[20:], y[20:]))
    curricula = sf.random_curricula(20, runs=3, steps=12, batch_size=4, subset=0.5)
    runs = sf.record(task, sf.Recipe(lr=0.05), curricula, engine="loop")
    with pytest.warns(PlainGradientsWarning, match=r"gradients of model\.scale"):
        simulator = sf.TangentKernelSimulator(task).fit(runs[:1])
    true = np.stack([run.losses for run in runs[1:]])
    assert relative(simulator.simulate(curricula[1:], true[:, 0]), true) < 0.02
