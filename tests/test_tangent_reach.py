"""Where kernels reach: deviations from the reference are bounded, and so are the steps of Adam's head."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import simfluence as sf
from simfluence.simulators.tangent import function_space
from simfluence.simulators.tangent.adjoint import _before_shrinking
from simfluence.simulators.tangent.function_space import Moments, Position, State, _share_within, _shrunk

N_TRAIN, STEPS = 40, 60


def fast_task() -> sf.Task:
    rng = np.random.default_rng(0)
    y = np.arange(60) % 4
    X = (rng.normal(size=(4, 8))[y] + rng.normal(size=(60, 8))).astype(np.float32)
    return sf.tasks.from_arrays(
        lambda: nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)),
        X[:N_TRAIN], y[:N_TRAIN], "cross_entropy", test=(X[N_TRAIN:], y[N_TRAIN:]), name="fast",
    )  # fmt: skip


def by_class(curriculum: sf.Curriculum) -> sf.Curriculum:
    order = np.argsort(curriculum.indices % 4, kind="stable")
    return sf.Curriculum.from_flat(curriculum.indices[order], curriculum.sizes, N_TRAIN)


@pytest.fixture(scope="module")
def fast():
    """A simulator of one run at a high rate with momentum, that run, and its batches by class, retrained."""
    task = fast_task()
    curricula = sf.random_curricula(n_train=N_TRAIN, runs=1, steps=STEPS, batch_size=4, seed=0)
    runs = sf.record(task, sf.Recipe(lr=0.05, momentum=0.9), [*curricula, by_class(curricula[0])])
    return sf.TangentKernelSimulator(task, n_checkpoints=4).fit(runs[:1]), runs


def space_of(fitted):
    return fitted._space(0, fitted._reference_curricula()[0])


def rolled(fitted, run):
    return space_of(fitted).roll([run.curriculum], STEPS)[0]


def test_a_curriculum_that_kernels_cannot_follow_does_not_run_away(fast, monkeypatch):
    fitted, runs = fast
    bounded = rolled(fitted, runs[1])
    assert bounded.max() < 10 * max(run.losses.max() for run in runs)
    for name in ("REACH_OF_HEAD", "REACH_OF_FEATURES"):
        monkeypatch.setattr(function_space, name, np.inf)
    free = rolled(fitted, runs[1])
    assert free.max() > 10 * bounded.max()


def test_every_deviation_is_within_reach_and_the_reference_is_left_alone(fast):
    fitted, runs = fast
    space = space_of(fitted)
    reach, shrunk = space._reach(), 0
    for step, position in enumerate(space.path([runs[1].curriculum, runs[0].curriculum], STEPS)):
        heads = position.state.head - space.heads[step]
        for deviation, most in zip((heads, position.state.features), reach, strict=True):
            assert (deviation.square().mean((1, 2)).sqrt() <= most * (1 + 1e-5)).all()
        shrunk += sum(int((share[0] < 1).sum()) for share in position.kept)
        assert all((share[1:] == 1).all() for share in position.kept)
    assert shrunk > 5
    assert np.allclose(rolled(fitted, runs[0]), runs[0].losses, atol=1e-4)


def test_shares_and_their_derivatives():
    rng = torch.Generator().manual_seed(0)
    part, reference = torch.randn(3, 4, 5, generator=rng).double(), torch.randn(4, 5, generator=rng).double()
    part[1] = reference + 1e-3
    share = _share_within(part, reference, torch.tensor(0.5).double())
    shrunk = _shrunk(part, reference, share)
    assert np.allclose((shrunk - reference).square().mean((1, 2)).sqrt(), [0.5, 1e-3, 0.5])
    assert torch.equal(shrunk[1], part[1])
    kept = State(torch.tensor([[[0.5]]]), torch.tensor([[[0.25]]]))
    zeros = State(torch.zeros(1), torch.zeros(1))
    position = Position(zeros, Moments(zeros, torch.zeros(1)), None, kept)
    gradients = _before_shrinking(position, [torch.ones(2, 1, 1)] * 5)
    assert [float(gradient[0, 0, 0]) for gradient in gradients] == [0.5, 0.25, 0.5, 0.25, 1.0]


def test_under_adam_a_run_of_its_own_has_derivatives(monkeypatch):
    """Units that are dead along the reference have no gradient; what simulation gives them must not become a step."""
    task = fast_task()
    curricula = sf.random_curricula(n_train=N_TRAIN, runs=1, steps=STEPS, batch_size=4, seed=0)
    run = sf.record(task, sf.Recipe(optimizer="adamw", lr=0.02), curricula)
    fitted = sf.TangentKernelSimulator(task, n_checkpoints=4).fit(run)
    floored = sf.leave_one_out(fitted, run[0], "derivative").values
    monkeypatch.setattr(function_space, "LEAST_SQUARE", 0.0)
    free = sf.leave_one_out(fitted, run[0], "derivative").values
    assert np.isfinite(floored).all()
    assert not np.isfinite(free).all() or np.abs(free).max() > 1000 * np.abs(floored).max()
