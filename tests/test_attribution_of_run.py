from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from comparing import relative

import simfluence as sf
from simfluence.attribution import METHODS, Adam, TracInCP, attributor_from_run
from simfluence.errors import InvalidInput


@pytest.mark.parametrize("method", METHODS)
def test_every_method_by_name(method, task, runs):
    damping = {"exact", "arnoldi", "cg", "lissa"} & {method}
    scores = attributor_from_run(method, task, runs[0], checkpoints=3, **({"damping": 0.3} if damping else {})).scores()
    assert scores.shape == (5, 12)
    assert np.isfinite(scores.values).all()
    assert np.ptp(scores.values) > 0
    assert list(scores.train) == task.train.ids


def test_it_is_the_trained_model_and_the_recorded_rates(task, runs):
    model = sf.trained_model(task, runs[0])
    found = attributor_from_run("dot", task, runs[0]).scores().values
    assert relative(found, sf.attribution.GradientDot().fit(model, task).scores().values) < 1e-6
    traced = attributor_from_run("tracin", task, runs[0], checkpoints=5)
    assert [state.step for state, _ in traced.checkpoints] == [0, 2, 4, 6, 8]
    assert {rate for _, rate in traced.checkpoints} == {0.3}


def test_adam_brings_its_second_moments(task, curricula):
    betas = {"betas": (0.9, 0.95), "eps": 1e-6}
    recipe = sf.Recipe(optimizer="adamw", lr=0.01, optimizer_args=betas, schedule="linear", horizon=10)
    run = sf.record(task, recipe, curricula[:1])[0]
    traced = attributor_from_run("tracin", task, run, checkpoints=5)
    assert traced.adam == Adam(0.95, 1e-6)
    assert [state.step for state, _ in traced.checkpoints] == [2, 4, 6, 8]  # before the first step there are none
    assert np.allclose([rate for _, rate in traced.checkpoints], recipe.learning_rates(10)[[2, 4, 6, 8]])
    state, rate = traced.checkpoints[-1]
    model = task.build_model(0)
    state.restore(model)
    flat = [[], []]
    for side, (X, y) in enumerate((task.test_data, task.train_data)):
        for x, target in zip(X, y, strict=True):
            loss = task.loss(model(x[None]), target[None]).sum()
            flat[side].append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    moments = torch.cat([state.optimizer[i]["exp_avg_sq"].flatten() for i in range(4)]) / (1 - 0.95**8)
    expected = rate * (torch.stack(flat[0]) / (moments.sqrt() + 1e-6)) @ torch.stack(flat[1]).T
    one = TracInCP([(state, rate)], traced.adam).fit(task.build_model(0), task).scores().values
    assert relative(one, expected) < 1e-4


def test_bad_questions(task, runs):
    with pytest.raises(InvalidInput, match="did you mean 'ekfac'"):
        attributor_from_run("ekfca", task, runs[0])
    with pytest.raises(InvalidInput, match="did you mean 'damping'"):
        attributor_from_run("ekfac", task, runs[0], dampnig=1)
    for count in (0, 11):
        with pytest.raises(InvalidInput, match=f"got {count}"):
            attributor_from_run("tracin", task, runs[0], checkpoints=count)
    with pytest.raises(InvalidInput, match="has no recipe"):
        attributor_from_run("tracin", task, dataclasses.replace(runs[0], recipe=None))
