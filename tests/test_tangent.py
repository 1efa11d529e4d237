from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import sklearn.base
import torch
from torch import nn

import simfluence as sf
from simfluence._internal.progress import bar
from simfluence.errors import BeyondReferenceWarning, InvalidInput, NotFittedError
from simfluence.simulators.tangent import simulator as tangent
from simfluence.simulators.tangent.head import Head
from simfluence.simulators.tangent.reference_run import factors_of
from simfluence.simulators.tangent.reference_weights import reference_weights
from simfluence.simulators.tangent.simulator import _Correction
from simfluence.tasks.losses import token_cross_entropy

RECIPES = {
    "sgd": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.8, "optimizer_args": {"nesterov": True}},
    "dampening": {"momentum": 0.8, "optimizer_args": {"dampening": 0.3}},
    "weight decay": {"momentum": 0.5, "weight_decay": 0.1},
    "schedule": {"schedule": "cosine", "horizon": 80, "warmup": 5},
    "clipping": {"clip_norm": 0.2},
    "adam": {"optimizer": "adam", "optimizer_args": {"betas": [0.8, 0.99]}},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1},
    "rmsprop": {"optimizer": "rmsprop", "optimizer_args": {"alpha": 0.95}},
    "clipping, momentum, decay": {"clip_norm": 0.3, "momentum": 0.5, "weight_decay": 0.05},
}


def linear_task(loss: str = "cross_entropy", outputs: int = 3) -> sf.Task:
    """A task whose model is linear in its parameters."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(30, 4)).astype(np.float64)
    y = rng.integers(3, size=30) if loss == "cross_entropy" else rng.normal(size=(30, outputs))
    return sf.tasks.from_arrays(
        lambda: nn.Linear(4, outputs), X[:20], y[:20], loss, test=(X[20:], y[20:]), name="linear in its parameters"
    )


def runs_of(task: sf.Task, recipe: sf.Recipe, steps: int, count: int = 3) -> sf.Runs:
    curricula = sf.random_curricula(n_train=len(task.train), runs=count, steps=steps, batch_size=4, subset=0.5, seed=0)
    batches = curricula[1].tolist()
    batches[3], batches[7] = [], batches[7][:2]  # an empty batch, and a smaller one
    return sf.record(task, recipe, [curricula[0], sf.Curriculum(batches, len(task.train)), *curricula[2:]])


@pytest.mark.parametrize("name", RECIPES)
def test_a_linear_model_is_simulated_exactly(name):
    recipe = sf.Recipe(lr=0.05, dtype="float64", **RECIPES[name])
    task = linear_task()
    runs = runs_of(task, recipe, steps=60)
    fitted = sf.TangentKernelSimulator(task, n_checkpoints=3).fit(runs[:1])
    simulated = fitted.simulate(runs.curricula, runs.initial_losses)
    assert np.abs(simulated - runs.losses).max() < 1e-6
    backwards = sf.TangentKernelSimulator(task, n_checkpoints=3).fit(runs[1:2])  # with the empty batch
    assert np.abs(backwards.simulate(runs.curricula, runs.initial_losses) - runs.losses).max() < 1e-6


def test_squared_error_and_an_objective_with_l2():
    task = dataclasses.replace(linear_task("squared_error", outputs=2), l2=0.2)
    runs = runs_of(task, sf.Recipe(lr=0.05, dtype="float64"), steps=30)
    fitted = sf.TangentKernelSimulator(task, n_checkpoints=2).fit(runs[:1])
    assert np.abs(fitted.simulate(runs.curricula, runs.initial_losses) - runs.losses).max() < 1e-6


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
def test_the_loss_sees_outputs_of_the_models_shape(shape):
    """Outputs [batch] beside targets [batch] would broadcast to [batch, batch] if they came as [batch, 1]."""

    def squares(outputs, targets):
        assert outputs.shape == targets.shape
        return ((outputs - targets) ** 2).flatten(1).sum(1) if outputs.ndim > 1 else (outputs - targets) ** 2

    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(30, 4)), rng.normal(size=(30, *shape))
    size = int(np.prod(shape))
    task = sf.tasks.from_arrays(
        lambda: nn.Sequential(nn.Linear(4, size), nn.Unflatten(1, shape) if shape else nn.Flatten(0)),
        X[:20], y[:20], squares, test=(X[20:], y[20:]), name="shaped",
    )  # fmt: skip
    runs = runs_of(task, sf.Recipe(lr=0.02, dtype="float64"), steps=15)
    fitted = sf.TangentKernelSimulator(task, n_checkpoints=2).fit(runs[:1])
    assert np.abs(fitted.simulate(runs.curricula, runs.initial_losses) - runs.losses).max() < 1e-6


@pytest.fixture(scope="module")
def short_and_long():
    """A linear task, and runs of 20 and of 45 steps."""
    task, recipe = linear_task(), sf.Recipe(lr=0.05, momentum=0.5, dtype="float64")
    return task, runs_of(task, recipe, steps=20), runs_of(task, recipe, steps=45)


def test_beyond_the_reference_a_linear_model_is_exact_too(short_and_long):
    task, short, long = short_and_long
    fitted = sf.TangentKernelSimulator(task, n_checkpoints=2).fit(short[:1])
    with pytest.warns(BeyondReferenceWarning, match="45 steps, but no reference has more than 20: .* record a run"):
        simulated = fitted.simulate(long.curricula[2:], long.initial_losses[2:])
    assert np.abs(simulated - long.losses[2:]).max() < 1e-6


def test_intervals_widen_where_the_members_differ(task, runs, tmp_path):
    simulator = sf.TangentKernelSimulator(task, n_checkpoints=2, n_references=1, n_features=0)
    fitted = sf.ConformalSimulator(simulator, members=2, folds=2).fit(runs)
    low, high = fitted.interval(runs.curricula, runs.initial_losses)
    forecast = fitted.fitted_[0].simulate(runs.curricula, runs.initial_losses)
    assert np.allclose((low + high) / 2, forecast)
    fitted.save(tmp_path / "fitted.safetensors")
    loaded = sf.ConformalSimulator.load(tmp_path / "fitted.safetensors")
    assert np.array_equal(loaded.interval(runs.curricula, runs.initial_losses)[0], low)
    spread = np.std([member.simulate(runs.curricula, runs.initial_losses) for member in fitted.fitted_[1:]], 0, ddof=1)
    assert spread[:, -1].max() > 1e-4
    usual = fitted._widened(fitted.variance_[None], forecast)
    for time in (4, 10):
        half, scale = ((high - low) / 2)[:, time], np.sqrt(usual[:, time] + spread[:, time] ** 2)
        assert np.allclose(half / scale, (half / scale)[0, 0], rtol=1e-3)


def test_references_of_different_length(short_and_long):
    task, short, long = short_and_long
    fitted = sf.TangentKernelSimulator(task, n_checkpoints=4, n_references=2).fit([short[0], long[1]])
    assert np.abs(fitted.simulate(long.curricula[2:], long.initial_losses[2:])[0] - long[2].losses).max() < 1e-6


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
def test_the_references_own_curriculum_gives_its_own_losses(task, curricula, optimizer):
    recipe = sf.Recipe(optimizer=optimizer, lr=0.3 if optimizer == "sgd" else 0.02)
    runs = sf.record(task, recipe, curricula)
    for references in (1, 2):
        fitted = sf.TangentKernelSimulator(task, n_checkpoints=4, n_references=references).fit(runs[:references])
        simulated = fitted.simulate([run.curriculum for run in runs[:references]], runs[:references].initial_losses)
        assert np.allclose(simulated, runs[:references].losses, atol=1e-4)


def test_landmarks_are_exact_when_they_are_all_and_near_when_many(task, recipe, runs):
    def simulated(landmarks):
        fitted = sf.TangentKernelSimulator(task, n_checkpoints=3, landmarks=landmarks).fit(runs[:1])
        return fitted.simulate(runs.curricula, runs.initial_losses)

    whole = simulated(None)
    errors = [np.abs(simulated(count) - whole).max() for count in (1, 2, len(task.train))]
    assert errors[2] < 1e-4 < errors[1] < errors[0]
    assert np.allclose(simulated(2)[0], runs[0].losses, atol=1e-4)  # the reference stays what it was


def test_nystroms_factors():
    rng = np.random.default_rng(0)
    gradients = torch.from_numpy(rng.normal(size=(7, 2, 5)))  # seven examples, two outputs, five parameters
    kernel = torch.einsum("iop,xqp->ioxq", gradients, gradients)
    few = torch.tensor([4, 1])
    factors = factors_of(kernel[few], few)
    again = torch.einsum("iok,xqk->ioxq", factors, factors)
    assert torch.allclose(again[few], kernel[few], atol=1e-10)
    enough = torch.tensor([6, 0, 2])  # six gradients span the five parameters
    factors = factors_of(kernel[enough], enough)
    assert torch.allclose(torch.einsum("iok,xqk->ioxq", factors, factors), kernel, atol=1e-10)


class Twice(nn.Module):
    """A model whose last layer is used twice, so it has no head."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(torch.relu(self.layer(x)))


def test_which_layer_is_the_head():
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    deep = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2, bias=False), nn.Identity())
    assert Head.of(deep, x) == Head("2", bias=False)
    assert Head.of(nn.Sequential(nn.Linear(4, 6), nn.Tanh()), x) == Head(None)
    assert Head.of(Twice(), x) == Head(None)
    deep[2].weight.requires_grad_(False)
    assert Head.of(deep, x) == Head(None)


def test_the_basis_is_a_rotation_that_begins_with_what_the_outputs_read():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).double()
    head = Head.of(model, x)
    features, weight = head.read(model, x)
    basis = head.basis(features[None], weight)
    assert torch.allclose(basis @ basis.T, torch.eye(7).double(), atol=1e-10)
    assert (weight @ basis.T)[:, 2:6].abs().max() < 1e-10
    left = (features @ basis.T)[:, 2:6].square().sum(0)
    assert (left.diff() < 0).all()
    assert torch.allclose(features @ basis.T @ (weight @ basis.T).T, model(x), atol=1e-10)


@pytest.mark.parametrize("model", [lambda: nn.Sequential(nn.Linear(64, 5), nn.Tanh()), Twice])
def test_a_model_without_a_head(model):
    """Without a head, the outputs are the features."""
    rng = np.random.default_rng(0)
    width = 4 if model is Twice else 64
    X, y = rng.normal(size=(30, width)), rng.integers(4, size=30)
    task = sf.tasks.from_arrays(model, X[:20], y[:20], "cross_entropy", test=(X[20:], y[20:]), name="no head")
    runs = runs_of(task, sf.Recipe(lr=0.02, momentum=0.5), steps=25)
    fitted = sf.TangentKernelSimulator(task).fit(runs[:1])
    simulated = fitted.simulate(runs.curricula, runs.initial_losses)
    errors = ((simulated - runs.losses) ** 2)[1:].mean(), ((runs[0].losses - runs.losses) ** 2)[1:].mean()
    assert errors[0] < 0.2 * errors[1]


@pytest.fixture(scope="module")
def corrected(task, runs):
    """Fitted on all runs: one is the reference, the others give the correction."""
    return sf.TangentKernelSimulator(task, n_checkpoints=4, n_references=1).fit(runs)


def test_more_runs_never_hurt_on_those_that_correct(task, runs, corrected):
    alone = sf.TangentKernelSimulator(task, n_checkpoints=4, n_references=1).fit(runs[:1])
    others = runs[1:]
    errors = [
        ((simulator.simulate(others.curricula, others.initial_losses) - others.losses) ** 2).sum()
        for simulator in (alone, corrected)
    ]
    assert errors[1] <= errors[0]
    assert corrected.correction_.shape == corrected.centre_.shape == (11, 5)
    assert corrected.scale_.shape == (11,)


def test_the_correction_is_the_least_squares_one():
    rng = np.random.default_rng(0)
    simulated = rng.normal(size=(9, 4, 3))
    true = 1.5 * simulated + rng.normal(size=(4, 3)) + 0.01 * rng.normal(size=(9, 4, 3))
    correction = _Correction.of(simulated, true, 1.0, True)
    assert np.abs(correction.applied(simulated) - true).max() < 0.05
    assert np.allclose(correction.scale, 1.5, atol=0.02)
    shifted = _Correction.of(simulated, true, 1.0, False).applied(simulated)
    assert np.allclose(shifted.mean(0), true.mean(0))
    assert np.array_equal(_Correction.of(simulated, true, 0.0, False).applied(simulated), simulated)


def test_runs_with_gaps_and_of_different_length_correct_too(task, recipe, runs, corrected):
    gaps = sf.record(task, recipe, runs.curricula, observe=sf.Observe(every=4))
    fitted = sf.TangentKernelSimulator(task, n_checkpoints=4, n_references=1).fit(gaps)
    read = gaps[0].times
    simulated = fitted.simulate(runs.curricula, runs.initial_losses)
    assert np.isfinite(simulated).all()
    assert np.abs(simulated - corrected.simulate(runs.curricula, runs.initial_losses))[:, read].mean() < 0.02
    shorter = sf.record(task, recipe, [*runs.curricula[:5], sf.Truncate(6).apply(runs[5].curriculum)])
    several = sf.TangentKernelSimulator(task, n_checkpoints=4, n_references=1).fit(shorter)
    assert np.isfinite(several.simulate(runs.curricula, runs.initial_losses)).all()


def test_the_contract(task, runs, tmp_path):
    fitted = sf.TangentKernelSimulator(task, n_checkpoints=2, n_references=2).fit(runs)
    expected = fitted.simulate(runs.curricula, runs.initial_losses)
    assert np.isfinite(expected).all()
    for number, run in enumerate(runs[:3]):  # two references, and a run that is none
        alone = fitted.simulate([run.curriculum], run.initial_losses)[0]
        assert np.allclose(alone, expected[number], atol=1e-5)
    fitted.save(tmp_path / "fitted.safetensors")
    loaded = sf.Simulator.load(tmp_path / "fitted.safetensors")
    assert loaded.task is None
    assert np.allclose(loaded.simulate(runs.curricula, runs.initial_losses), expected, atol=1e-6)
    again = sklearn.base.clone(fitted)
    assert again.task is task
    assert np.allclose(again.fit(runs).simulate(runs.curricula, runs.initial_losses), expected, atol=1e-6)
    shorter = fitted.simulate([runs[0].curriculum, sf.Truncate(4).apply(runs[0].curriculum)], runs.initial_losses[0])
    assert np.isnan(shorter[1, 5:]).all()
    assert np.allclose(shorter[1, :5], shorter[0, :5], atol=1e-6)
    changes = sf.leave_one_out(fitted, runs[0])
    index = int(runs[0].curriculum[0][0])
    assert np.allclose(changes[:, index], sf.what_if(fitted, runs[0], sf.Remove([index])).change, atol=1e-5)


def test_how_far_references_disagree(task, runs):
    fitted = sf.TangentKernelSimulator(task, n_checkpoints=2, n_references=2).fit(runs[:2])
    short = sf.Truncate(4).apply(runs[2].curriculum)
    curricula = [runs[2].curriculum, short, runs[0].curriculum]
    spread = fitted.disagreement(curricula)
    references = fitted._reference_curricula()
    forecasts = [fitted._space(number, reference).roll(curricula, 10) for number, reference in enumerate(references)]
    weights = reference_weights(curricula, references, 10)
    # two values with weights w and 1 − w have the standard deviation √(w (1 − w)) times their difference
    expected = np.sqrt(weights[:, 0] * weights[:, 1])[..., None] * np.abs(forecasts[0] - forecasts[1])
    assert np.allclose(spread[0], expected[0], rtol=1e-4, atol=1e-7)
    assert np.allclose(spread[1, :5], spread[0, :5], rtol=1e-4, atol=1e-7)
    assert np.isnan(spread[1, 5:]).all()
    assert spread[0, 1:].min() > 1e-6
    assert spread[2].max() < 1e-3 * spread[0].max()  # a reference's own curriculum is known
    fitted.scale_ = np.full(1, 0.5)
    fitted.correction_, fitted.centre_ = np.ones((2, 1, 5))
    assert np.allclose(fitted.disagreement(curricula[:1])[0], spread[0] / 2)
    with pytest.raises(InvalidInput, match="one reference cannot disagree"):
        sf.TangentKernelSimulator(task, n_checkpoints=2, n_references=1).fit(runs).disagreement(curricula)
    with pytest.raises(InvalidInput, match="no curriculum"):
        fitted.disagreement([])
    with pytest.raises(NotFittedError):
        sf.TangentKernelSimulator(task).disagreement(curricula)


def test_nearer_references_count_more(runs):
    a, b = runs[0].curriculum, runs[1].curriculum
    edited = sf.Remove([int(a[0][0])]).apply(a)
    weights = reference_weights([a, b, edited], [a, b], 10)
    assert np.allclose(weights.sum(1), 1)
    assert np.allclose(weights[:, :, 0], 0.5)  # nothing has been shown yet
    assert weights[0, 0, 1:].min() > 0.999
    assert weights[1, 1, 1:].min() > 0.999
    assert (weights[2, 0, 2:] > weights[2, 1, 2:]).all()
    short = reference_weights([sf.Truncate(4).apply(edited)], [a, b], 4)
    assert np.allclose(short[0], weights[2][:, :5])  # what comes later does not matter


def test_fitting_shows_a_bar_unless_within_another(task, runs, capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    simulator = sf.TangentKernelSimulator(task, n_checkpoints=2, n_references=1)
    simulator.fit(runs[:1])
    assert "Kernels" in capfd.readouterr().err
    with bar("outer", 1, shown=True):
        simulator.fit(runs[:1])
    printed = capfd.readouterr().err
    assert "outer" in printed
    assert "Kernels" not in printed


def test_interrupted_while_fitting_it_is_what_it_was(task, runs, monkeypatch):
    fitted = sf.TangentKernelSimulator(task, n_checkpoints=2, n_references=2).fit(runs[:2])
    expected = fitted.simulate(runs.curricula, runs.initial_losses)
    fresh = sf.TangentKernelSimulator(task, n_checkpoints=2, n_references=2)
    first = iter([tangent.collect_reference])

    def interrupted(*args):
        for collect in first:
            return collect(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(tangent, "collect_reference", interrupted)
    for simulator in (fitted, fresh):
        with pytest.raises(KeyboardInterrupt):
            simulator.fit(runs[3:])
    assert np.array_equal(fitted.simulate(runs.curricula, runs.initial_losses), expected)
    with pytest.raises(NotFittedError):
        fresh.simulate(runs.curricula, runs.initial_losses)


class Pair(nn.Module):
    """A model whose outputs are two tensors."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x), x


class Normed(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.inner, self.layer, self.out = nn.Linear(3, 4), layer, nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.layer(self.inner(x)))


def test_bad_input(task, runs):
    simulator = sf.TangentKernelSimulator
    bare = sf.Runs.from_arrays(runs.curricula, runs.losses)
    for bad, message in (
        (simulator(), "task is required"),
        (simulator(task, sf.Recipe(optimizer="adagrad")), "does not cover optimizer 'adagrad'"),
        (simulator(task, sf.Recipe(optimizer="adam", weight_decay=0.1)), "Adam's or RMSprop's weight decay"),
        (simulator(task, sf.Recipe(optimizer="rmsprop", momentum=0.5)), "RMSprop's momentum or centred moments"),
        (simulator(task, sf.Recipe(optimizer="adamw", clip_norm=1.0)), "clipping together with"),
        (simulator(task, memory=1e-7), "GiB, but a reference may take"),
        (simulator(task, n_checkpoints=0), "n_checkpoints must be a whole number"),
        (simulator(task, memory=0), "memory must be a number"),
        (simulator(task, landmarks=0), "landmarks must be a whole number"),
        (simulator(task, n_features=-1), "n_features must be a whole number"),
    ):
        with pytest.raises(InvalidInput, match=message):
            bad.fit(runs)
    with pytest.raises(InvalidInput, match="does not cover language modelling"):
        simulator(dataclasses.replace(task, loss=token_cross_entropy)).fit(runs)
    with pytest.raises(InvalidInput, match="recorded without a recipe"):
        simulator(task).fit(bare)
    with pytest.raises(InvalidInput, match="another task"):
        simulator(sf.tasks.digits(n_train=12, n_test=5)).fit(runs)
    with pytest.raises(InvalidInput, match="outputs that are one tensor, not tuple"):
        simulator(dataclasses.replace(task, model=Pair)).fit(runs)
    for layer, message in (
        (nn.BatchNorm1d(4), "mixes the examples of a batch"),
        (nn.Dropout(0.5), "makes training random"),
    ):
        mixing = dataclasses.replace(task, model=lambda layer=layer: Normed(layer))
        with pytest.raises(InvalidInput, match=message):
            simulator(mixing).fit(runs)


def test_a_loss_of_ones_own(task, runs, tmp_path):
    def smoothed(outputs, targets):
        return nn.functional.cross_entropy(outputs, targets, reduction="none", label_smoothing=0.1)

    own = dataclasses.replace(task, loss=smoothed)
    mine = sf.record(own, runs[0].recipe, runs.curricula[:2])
    fitted = sf.TangentKernelSimulator(own, n_checkpoints=4).fit(mine[:1])
    assert np.allclose(fitted.simulate(mine.curricula[:1], mine.initial_losses[:1]), mine[:1].losses, atol=1e-5)
    fitted.save(tmp_path / "own.safetensors")
    loaded = sf.Simulator.load(tmp_path / "own.safetensors")
    with pytest.raises(InvalidInput, match=r"set simulator\.task"):
        loaded.simulate(mine.curricula, mine.initial_losses)
    loaded.task = own
    assert np.isfinite(loaded.simulate(mine.curricula, mine.initial_losses)).all()
    assert torch.is_tensor(own.train_data[0])
