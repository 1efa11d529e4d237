"""Inner products of gradients, at the end and over checkpoints, against plain loops."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from attribution_cases import CASES, Case, mlp, relative
from torch import nn

import simfluence as sf
from simfluence.attribution import Adam, GradientCosine, GradientDot, TracInCP, tracin
from simfluence.attribution import exact as reference
from simfluence.errors import InvalidInput
from simfluence.recording.checkpoints import Checkpoint


def both(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    test, train = (reference.gradients(case.model, data, case.loss) for data in (case.test, case.train))
    return test, train


@pytest.mark.parametrize("name", CASES)
def test_dot_and_cosine(name):
    case = CASES[name]()
    test, train = both(case)
    dot = GradientDot(batch_size=4).fit(case.model, case.train, case.loss)
    assert relative(dot.scores(case.test), test @ train.T) < 1e-10
    assert relative(dot.self_influence(), (train**2).sum(1)) < 1e-10
    cosine = GradientCosine(batch_size=4).fit(case.model, case.train, case.loss)
    expected = (test @ train.T) / test.norm(dim=1)[:, None] / train.norm(dim=1)
    assert relative(cosine.scores(case.test), expected) < 1e-10
    assert relative(cosine.self_influence(), torch.ones(len(train))) < 1e-10
    by_layer = np.asarray(cosine.scores(case.test, by_layer=True))
    assert relative(by_layer.sum(0), expected) < 1e-10


def test_the_cosine_of_no_gradient_is_zero():
    model = nn.Sequential(nn.Linear(2, 1, bias=False)).double()
    X, y = torch.eye(2, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    X[1] = 0
    cosine = GradientCosine().fit(model, (X, y), sf.tasks.losses.squared_error)
    assert np.allclose(cosine.scores((X, y)), [[1, 0], [0, 0]], atol=1e-12)


def trained(case: Case) -> list[nn.Module]:
    models = [copy.deepcopy(case.model)]
    for _ in range(2):
        model = copy.deepcopy(models[-1])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        case.loss(model(case.train[0]), case.train[1]).mean().backward()
        optimizer.step()
        model.zero_grad()
        models.append(model)
    return models


def test_checkpoints_are_added_up_with_their_learning_rates(monkeypatch):
    case = mlp()
    models, rates = trained(case), [0.5, 0.2, 0.1]
    expected, own = 0, 0
    for model, rate in zip(models, rates, strict=True):
        test, train = both(Case(model, case.loss, case.train, case.test))
        expected, own = expected + rate * test @ train.T, own + rate * (train**2).sum(1)
    states = [(model.state_dict(), rate) for model, rate in zip(models, rates, strict=True)]
    before = copy.deepcopy(case.model.state_dict())
    tracer = TracInCP(states, batch_size=5).fit(case.model, case.train, case.loss)
    assert relative(tracer.scores(case.test), expected) < 1e-10
    assert relative(tracer.scores(case.test), expected) < 1e-10  # and again
    assert relative(tracer.self_influence(), own) < 1e-10
    order = np.argsort(-expected.numpy(), 1)[:, :3]
    for numbers, widths in ((1000, [13]), (30, [6, 6, 1]), (1, [5, 5, 3])):  # the matrix is never whole
        monkeypatch.setattr(tracin, "FORMED", numbers)
        assert [columns.stop - columns.start for _, columns, _ in tracer._sums(case.test)] == widths
        top = tracer.top_k(3, case.test)
        assert np.array_equal(top.indices, order)
        assert relative(top.values, np.take_along_axis(expected.numpy(), order, 1)) < 1e-10
    assert all(torch.equal(before[name], value) for name, value in case.model.state_dict().items())


def test_adams_step_is_taken_on_the_training_side():
    case = mlp()
    optimizer = torch.optim.Adam(case.model.parameters(), lr=0.01, betas=(0.9, 0.9))
    for _ in range(3):
        optimizer.zero_grad()
        case.loss(case.model(case.train[0]), case.train[1]).mean().backward()
        optimizer.step()
    case.model.zero_grad()
    moments = torch.cat([optimizer.state[p]["exp_avg_sq"].flatten() for p in case.model.parameters()])
    step = 1 / ((moments / (1 - 0.9**3)).sqrt() + 1e-8)
    test, train = both(case)
    checkpoint = Checkpoint(3, case.model.state_dict(), optimizer.state_dict()["state"], {})
    tracer = TracInCP([(checkpoint, 0.01)], adam=Adam(beta2=0.9)).fit(case.model, case.train, case.loss)
    assert relative(tracer.scores(case.test), 0.01 * (test * step) @ train.T) < 1e-10
    plain = TracInCP([(checkpoint, 0.01)]).fit(case.model, case.train, case.loss)
    assert relative(plain.scores(case.test), 0.01 * test @ train.T) < 1e-10
    without = TracInCP([(case.model.state_dict(), 0.01)], adam=Adam()).fit(case.model, case.train, case.loss)
    with pytest.raises(InvalidInput, match=r"no second moments of '0.weight'"):
        without.scores(case.test)


def test_the_checkpoints_of_a_recorded_run(task, curricula, tmp_path):
    recipe = sf.Recipe(lr=0.3, dtype="float64", schedule="linear", horizon=10)
    runs = sf.record(task, recipe, curricula[:1], tmp_path / "store", observe=sf.Observe(checkpoints=(0, 5, 10)))
    run = runs[0]
    assert sorted(run.checkpoints) == [0, 5, 10]
    model = task.build_model(0).double()
    tracer = TracInCP.from_run(run, batch_size=3).fit(model, task)
    expected = 0
    for step, rate in ((0, 0.3), (5, 0.15), (10, run.learning_rates[-1])):
        Checkpoint.load(run.checkpoints[step]).restore(model)
        test, train = both(Case(model, task.loss, task.train_data, task.test_data))
        expected = expected + rate * test @ train.T
    assert relative(tracer.scores(), expected) < 1e-10
    with pytest.raises(InvalidInput, match="has no checkpoints with learning rates"):
        TracInCP.from_run(sf.Run("bare", run.curriculum, run.losses))


def test_checkpoints_of_another_architecture():
    case = mlp()
    with pytest.raises(InvalidInput, match="no checkpoints to trace"):
        TracInCP().fit(case.model, case.train, case.loss)
    state = case.model.state_dict()
    for other, said in (
        ({n: v for n, v in state.items() if n != "2.bias"}, "'2.bias' is missing"),
        (state | {"4.bias": state["2.bias"]}, "'4.bias' is not in the model"),
        (state | {"2.bias": torch.zeros(4)}, r"'2.bias' has shape \(4,\), not \(3,\)"),
    ):
        with pytest.raises(InvalidInput, match=f"checkpoint 1 is of another architecture: {said}"):
            TracInCP([(state, 1.0), (other, 1.0)]).fit(case.model, case.train, case.loss)
