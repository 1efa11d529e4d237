"""The contract: every simulator goes through the same round trip."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.numpy
import sklearn.base
import sklearn.exceptions

import simfluence as sf
from simfluence.errors import DivergedWarning, InvalidInput, NotFittedError, StoreError
from simfluence.simulators import SIMULATORS, build
from simfluence.simulators.base import _checksum

VARIANTS = [
    *(
        (name, {})
        for name, kind in SIMULATORS.items()
        if not kind.needs_task and kind.__module__.startswith("simfluence")
    ),
    ("linear", {"prior": "zero"}),
    *((name, {"around": "mean"}) for name in ("additive", "multiplicative", "linear")),
    ("linear", {"around": "mean", "order": 2, "varying": True, "guard": True, "rollout": 3}),
    ("linear", {"l2": "auto"}),
    ("conformal", {}),
    ("conformal", {"simulator": sf.LinearSimulator(l2=2.0, around="mean", order=2), "members": 3}),
    *(("attributed", {"fit_scale": True, "around": around}) for around in (None, "mean")),
    ("tangent", {"n_checkpoints": 2, "n_references": 1, "n_features": 1}),
]
#: Simulators that learn from all test examples together, or know their scores, or the task.
SHARED = {"best", "boosted", "featurized", "attributed", "tangent"}
SINGLE = {"tangent"}  # in the recipe's precision
#: Parameters that are no data: no file holds them.
UNSAVED = {"attributed": ["attributor"], "best": ["task", "members"], "tangent": ["task", "recipe"]}
SCORES = np.random.default_rng(0).normal(size=(5, 12))


def unfitted(name, parameters, task):
    if name == "conformal":  # this one and the next wrap something, so they have no name on the command line
        return sklearn.base.clone(sf.ConformalSimulator(**parameters))
    if name == "attributed":
        return sf.AttributedSimulator(SCORES, **parameters)
    if name == "tangent":
        return sf.TangentKernelSimulator(task, **parameters)
    return build(name, **parameters)


@pytest.fixture(
    params=VARIANTS, ids=lambda variant: "-".join([variant[0], *map(str, variant[1].values())]), scope="module"
)
def fitted(request, runs, task):
    """A simulator fitted on five of the six runs; no test may change it."""
    simulator = unfitted(*request.param, task)
    assert simulator.fit(runs[:5]) is simulator
    return simulator


def test_fit_returns_itself_and_simulates(fitted, runs):
    losses = fitted.simulate(runs.curricula, runs.initial_losses)
    assert losses.shape == runs.losses.shape
    assert losses.dtype == np.float64
    assert np.array_equal(losses[:, 0], runs.initial_losses)
    assert np.isfinite(losses).all()


def test_runs_are_simulated_independently(fitted, runs):
    together = fitted.simulate(runs.curricula, runs.initial_losses)
    for index, run in enumerate(runs):
        alone = fitted.simulate([run.curriculum], run.initial_losses)[0]
        assert np.allclose(alone, together[index], rtol=1e-5 if fitted.name in SINGLE else 1e-12)


def test_test_examples_are_simulated_independently(fitted, runs):
    if fitted.name in SHARED or getattr(fitted, "rollout", 1) > 1:
        pytest.skip("learns from all test examples together, or stops when all are good enough")
    fewer = sklearn.base.clone(fitted).fit(sf.Runs.from_arrays(runs.curricula[:5], runs.losses[:5, :, [3, 1]]))
    whole = fitted.simulate(runs.curricula, runs.initial_losses)[:, :, [3, 1]]
    assert np.allclose(fewer.simulate(runs.curricula, runs.initial_losses[:, [3, 1]]), whole, rtol=1e-6, atol=1e-9)


def test_shorter_curricula_end_in_nan(fitted, runs):
    short = sf.Curriculum(runs[0].curriculum.tolist()[:4], n_train=12)
    losses = fitted.simulate([runs[0].curriculum, short], runs.initial_losses[:2])
    assert np.isnan(losses[1, 5:]).all()
    assert np.allclose(losses[1, :5], fitted.simulate([short], runs.initial_losses[0])[0])
    assert np.isfinite(losses[0]).all()


@pytest.mark.filterwarnings("ignore::simfluence.errors.BeyondReferenceWarning")
@pytest.mark.filterwarnings("ignore::simfluence.errors.RunawayWarning")
def test_longer_curricula_are_simulated(fitted, runs):
    longer = sf.Curriculum(runs[0].curriculum.tolist() * 3, n_train=12)
    losses = fitted.simulate([longer], runs.initial_losses[0])[0]
    assert losses.shape == (31, 5)
    assert np.isfinite(losses).all()
    usual = fitted.simulate(runs.curricula[:1], runs.initial_losses[:1])[0]
    assert np.allclose(losses[:11], usual)


def test_save_and_load(fitted, runs, tmp_path):
    fitted.save(tmp_path / "fitted.safetensors")
    expected = fitted.simulate(runs.curricula, runs.initial_losses)
    for loaded in (
        sf.Simulator.load(tmp_path / "fitted.safetensors"),
        type(fitted).load(str(tmp_path / "fitted.safetensors")),
    ):
        assert type(loaded) is type(fitted)
        saved = fitted.get_params() | dict.fromkeys(UNSAVED.get(fitted.name, ()))
        assert str(loaded.get_params()) == str(saved)  # compares the parameters of an inner simulator too
        assert np.array_equal(loaded.simulate(runs.curricula, runs.initial_losses), expected)


def test_scikit_learn_conventions(fitted, runs):
    copy = sklearn.base.clone(fitted)
    assert str(copy.get_params()) == str(fitted.get_params())
    with pytest.raises(NotFittedError, match="call fit"):
        copy.simulate(runs.curricula, runs.initial_losses)
    with pytest.raises(sklearn.exceptions.NotFittedError):
        copy.save("nowhere")
    learned = {name for name in vars(fitted) if name not in fitted.get_params()}
    assert all(name.endswith("_") for name in learned)
    with pytest.raises(InvalidInput, match="has no parameter 'l3'"):
        copy.with_parameters(l3=1.0)


def test_bad_input(fitted, runs, known):
    with pytest.raises(InvalidInput, match="no run to fit"):
        sklearn.base.clone(fitted).fit(runs[:0])
    with pytest.raises(InvalidInput, match="8 training examples, but this simulator was fitted on 12"):
        fitted.simulate(known.runs.curricula, runs.initial_losses)
    for initial in (runs.initial_losses[:, :4], runs.initial_losses[:2], 1.0):
        with pytest.raises(InvalidInput, match=r"initial.losses must be"):
            fitted.simulate(runs.curricula, initial)
    with pytest.raises(InvalidInput, match="no curriculum"):
        fitted.simulate([], runs.initial_losses)


def test_diverged_runs_are_left_out_with_a_warning(fitted, runs):
    simulator = sklearn.base.clone(fitted)
    losses = runs[5].losses.copy()
    losses[4:, 2] = np.inf
    diverged = sf.Run("broken", runs[5].curriculum, losses)
    with pytest.warns(DivergedWarning, match="left out 1 diverged run: broken"):
        simulator.fit(sf.Runs([*runs[:5], diverged]))
    args = runs.curricula, runs.initial_losses
    assert np.array_equal(simulator.simulate(*args), fitted.simulate(*args))
    with pytest.warns(DivergedWarning), pytest.raises(InvalidInput, match="all 1 diverged"):
        simulator.fit(sf.Runs([diverged]))


@pytest.fixture(scope="module")
def other(runs, task, recipe):
    """A run of another recipe."""
    return sf.record(task, recipe.replace(lr=0.1), runs.curricula[:1])


def test_runs_of_several_recipes_are_refused(fitted, runs, other):
    with pytest.raises(InvalidInput, match="several recipes"):
        sklearn.base.clone(fitted).fit(sf.Runs([*runs, *other]))


def test_unknown_names():
    with pytest.raises(InvalidInput, match="unknown simulator 'liner', did you mean 'linear'"):
        build("liner")


def test_files_that_are_no_simulators(runs, tmp_path):
    path = tmp_path / "file.safetensors"
    sf.AdditiveSimulator().fit(runs).save(path)
    with pytest.raises(StoreError, match="holds a simulator 'additive', not one of LinearSimulator"):
        sf.LinearSimulator.load(path)
    content = path.read_bytes()
    with pytest.raises(StoreError, match="no simulator at"):
        sf.Simulator.load(tmp_path / "none")
    for damaged in (
        b"",
        b"junk",
        content[:50],
        content[: len(content) // 2],
        content.replace(b"additive", b"os.syste"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(StoreError):
            sf.Simulator.load(path)
    about, arrays = sf.AdditiveSimulator().fit(runs)._state()
    crafted = json.dumps(about).replace("n_train_", "__dict__")
    for text, said in (
        (crafted, "it sets '__dict__'"),
        ('{"simulator": ' + "[" * 100_000, "damaged or holds no simulator"),
    ):
        signed = {"simfluence": text, "sha256": _checksum(text, arrays)}
        path.write_bytes(safetensors.numpy.save(arrays, signed))
        with pytest.raises(StoreError, match=said):
            sf.Simulator.load(path)


@pytest.mark.filterwarnings("ignore::simfluence.errors.BeyondReferenceWarning")
def test_mean_trajectory_is_the_mean_and_is_held(runs):
    fitted = sf.MeanTrajectorySimulator().fit(runs[:4])
    longer = sf.Curriculum(runs[0].curriculum.tolist() * 2, n_train=12)
    losses = fitted.simulate([longer], runs.initial_losses[0])[0]
    assert np.allclose(losses[1:11], runs[:4].losses.astype(np.float64).mean(0)[1:])
    assert (losses[11:] == losses[10]).all()


def test_persistence(runs):
    losses = sf.PersistenceSimulator().fit(runs).simulate(runs.curricula, runs.initial_losses)
    assert (losses == runs.initial_losses[:, None]).all()
