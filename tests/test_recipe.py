from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import simfluence as sf
from simfluence.errors import InvalidInput


@pytest.mark.parametrize("name", ["sgd", "SGD", "adam", "AdamW", "RMSprop", "adagrad", "nadam", "adafactor"])
def test_any_optimizer_by_name(name):
    optimizer = sf.Recipe(optimizer=name, lr=0.01).build_optimizer([torch.nn.Parameter(torch.ones(2, 2))])
    assert type(optimizer).__name__.lower() == name.lower()
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_weight_decay_is_what_the_recipe_says():
    def of(**fields):
        return sf.Recipe(optimizer="adamw", **fields).build_optimizer([torch.nn.Parameter(torch.ones(1))])

    assert of().param_groups[0]["weight_decay"] == 0.0  # torch's own default is 0.01
    assert of(weight_decay=0.1).param_groups[0]["weight_decay"] == 0.1
    assert of(optimizer_args={"betas": [0.8, 0.9]}).param_groups[0]["betas"] == (0.8, 0.9)


def test_schedules():
    def rates(steps=10, **fields):
        return sf.Recipe(lr=2.0, **fields).learning_rates(steps)

    assert rates(3).tolist() == [2, 2, 2]
    assert np.allclose(rates(6, schedule="linear", horizon=4), [2, 1.5, 1, 0.5, 0, 0])
    assert np.allclose(rates(4, schedule="linear", horizon=8), [2, 1.75, 1.5, 1.25])  # the horizon rules, not the run
    assert np.allclose(rates(5, schedule="cosine", horizon=4), [1 + math.cos(math.pi * t / 4) for t in range(5)])
    assert np.allclose(rates(4, warmup=4), [0.5, 1, 1.5, 2])
    assert np.allclose(rates(6, warmup=2, schedule="linear", horizon=6), [1, 2, 2, 1.5, 1, 0.5])


def test_equal_and_hashed_by_content():
    one = sf.Recipe(optimizer="Adam", optimizer_args={"betas": (0.8, 0.9)})
    two = sf.Recipe(optimizer="adam", optimizer_args={"betas": [0.8, 0.9]})
    assert one == two
    assert hash(one) == hash(two)
    assert one == sf.Recipe(**one.model_dump())
    assert one != one.replace(seed=1)
    assert one.replace(seed=1).optimizer_args == {"betas": (0.8, 0.9)}


def test_canonical_text_is_stable():
    assert sf.Recipe().canonical() == "{}"
    assert sf.Recipe(lr=0.5, optimizer="AdamW").canonical() == '{"lr": 0.5, "optimizer": "adamw"}'


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"optimizer": "adamm"}, "unknown optimizer 'adamm', did you mean 'adam"),
        ({"optimizer": "lbfgs"}, "re-evaluates the loss"),
        ({"lr": -1, "warmup": -2}, "lr: .*warmup: "),
        ({"lr": float("nan")}, "finite"),
        ({"learning_rate": 1}, "learning_rate: unknown field"),
        ({"optimizer": "adam", "momentum": 0.9}, "takes no 'momentum'"),
        ({"optimizer_args": {"beta": 1}}, "takes no 'beta'"),
        ({"optimizer_args": {"lr": 1}}, "takes no 'lr'"),
        ({"schedule": "cosine"}, "needs its number of steps"),
        ({"schedule": "cosin", "horizon": 3}, "schedule"),
        ({"warmup": 5, "horizon": 5}, "below horizon"),
        ({"clip_norm": 0}, "clip_norm"),
        ({"optimizer_args": {"nesterov": True}}, "torch refuses these arguments of 'sgd'"),
        ({"optimizer": "adam", "optimizer_args": {"betas": (2, 3)}}, "torch refuses"),
    ],
)
def test_bad_recipes(fields, said):
    with pytest.raises(InvalidInput, match=said):
        sf.Recipe(**fields)


def test_frozen():
    with pytest.raises(Exception, match="frozen"):
        sf.Recipe().lr = 1.0
