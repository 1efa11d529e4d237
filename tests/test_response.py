from __future__ import annotations

import numpy as np
import pytest
import sklearn.base
import sklearn.datasets
import torch
from torch import nn

import simfluence as sf
from simfluence.errors import BeyondReferenceWarning, InvalidInput
from simfluence.simulators import check_simulator
from simfluence.simulators.base import Simulator
from simfluence.simulators.response.optimizers import Memory, Optimizer, preconditioners
from simfluence.simulators.response.simulator import ResponseSimulator

EXACT = {
    "sgd": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.8, "optimizer_args": {"nesterov": True}},
    "dampening": {"momentum": 0.8, "optimizer_args": {"dampening": 0.3}},
    "weight decay": {"momentum": 0.5, "weight_decay": 0.1},
    "schedule": {"schedule": "cosine", "horizon": 30, "warmup": 5},
    "clipping": {"clip_norm": 0.3, "momentum": 0.5, "weight_decay": 0.05},
}


def linear_task(loss: str, dtype: type = np.float64) -> sf.Task:
    """A task whose model is linear in its parameters."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(30, 4)).astype(dtype)
    y = rng.integers(3, size=30) if loss == "cross_entropy" else rng.normal(size=(30, 3)).astype(dtype)
    return sf.tasks.from_arrays(
        lambda: nn.Linear(4, 3), X[:20], y[:20], loss, test=(X[20:], y[20:]), name="linear in its parameters"
    )


def curricula_of(task: sf.Task, steps: int, count: int = 5) -> list[sf.Curriculum]:
    """Random halves; in the second, one batch is smaller than the others."""
    curricula = sf.random_curricula(n_train=len(task.train), runs=count, steps=steps, batch_size=4, subset=0.5, seed=0)
    batches = curricula[1].tolist()
    batches[7] = batches[7][:2]
    return [curricula[0], sf.Curriculum(batches, len(task.train)), *curricula[2:]]


@pytest.mark.parametrize("loss", ["squared_error", "cross_entropy"])
@pytest.mark.parametrize("name", EXACT)
def test_a_linear_model_is_simulated_exactly(name, loss):
    task = linear_task(loss)
    runs = sf.record(task, sf.Recipe(lr=0.1, dtype="float64", **EXACT[name]), curricula_of(task, 30))
    fitted = ResponseSimulator(task, n_checkpoints=2).fit(runs[:3])
    errors = fitted.simulate(runs.curricula, runs.initial_losses) - runs.losses
    assert np.abs(errors).max() < 1e-8
    assert np.allclose(fitted.scale_[1:], 1, atol=1e-6)


def test_an_empty_batch_is_no_update():
    task = linear_task("squared_error")
    curricula = curricula_of(task, 20)
    batches = curricula[2].tolist()
    batches[3] = []
    runs = sf.record(task, sf.Recipe(momentum=0.5, dtype="float64"), [*curricula, sf.Curriculum(batches, 20)])
    fitted = ResponseSimulator(task).fit(runs[:4])
    assert np.abs(fitted.simulate(runs.curricula, runs.initial_losses) - runs.losses).max() < 1e-8


@pytest.fixture(scope="module")
def bent() -> tuple[sf.Task, sf.Runs]:
    """A network with a hidden layer, in double precision."""
    rng = np.random.default_rng(1)
    X, y = rng.normal(size=(12, 3)), rng.integers(2, size=12)
    task = sf.tasks.from_arrays(
        lambda: nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 2)),
        X[:8], y[:8], "cross_entropy", test=(X[8:], y[8:]), name="bent",
    )  # fmt: skip
    return task, sf.record(task, sf.Recipe(lr=0.3, dtype="float64"), curricula_of(task, 12))


def test_derivatives_are_those_of_autograd_at_the_mean_weights(bent):
    task, runs = bent
    fitted = ResponseSimulator(task, n_checkpoints=2, n_directions=1000).fit(runs[:3])
    mean: dict[str, torch.Tensor] = {}
    for run in runs[:3]:
        for training in sf.recording.follow(task, run):
            if training.step == fitted.times_[-1]:
                for name, value in training.model.named_parameters():
                    mean[name] = mean.get(name, 0) + value.detach() / 3
    model = task.build_model(0).double()
    model.load_state_dict(mean)
    rows = []
    for x in torch.cat([task.train_data[0], task.test_data[0]]):
        for output in model(x):
            rows.append(
                torch.cat(
                    [g.flatten() for g in torch.autograd.grad(output, list(model.parameters()), retain_graph=True)]
                )
            )
    expected = torch.stack(rows) @ torch.stack(rows).T
    found = torch.from_numpy(fitted.reads_[-1]).flatten(0, 1)
    assert torch.allclose(found @ found.T, expected, rtol=1e-10, atol=1e-12)


def test_directions_that_span_all_derivatives_lose_nothing(bent):
    task, runs = bent  # 12 examples with 2 outputs at 2 checkpoints: 48 rows of 242 numbers
    arguments = runs.curricula, runs.initial_losses
    whole = ResponseSimulator(task, n_checkpoints=2, n_directions=1000).fit(runs[:4])
    part = ResponseSimulator(task, n_checkpoints=2, n_directions=60).fit(runs[:4])
    assert whole.reads_.shape[-1] == 242
    assert part.reads_.shape[-1] <= 48
    assert np.allclose(part.kept_, 1)
    assert np.allclose(whole.simulate(*arguments), part.simulate(*arguments), rtol=0, atol=1e-10)


def test_forecasts_do_not_depend_on_the_order_or_number_of_curricula(bent):
    task, runs = bent
    fitted = ResponseSimulator(task, n_directions=20).fit(runs[:4])
    together = fitted.simulate(runs.curricula, runs.initial_losses)
    backwards = fitted.simulate(runs.curricula[::-1], runs.initial_losses[::-1])[::-1]
    alone = fitted.simulate(runs.curricula[4:], runs.initial_losses[4:])
    assert np.allclose(together, backwards, atol=1e-12)
    assert np.allclose(together[4:], alone, atol=1e-12)
    assert 0.1 < fitted.kept_.min() < fitted.kept_.max() < 1


def test_the_memory_of_derivatives_formed_at_a_time_changes_nothing(bent, monkeypatch):
    task, runs = bent
    whole = ResponseSimulator(task, n_checkpoints=2).fit(runs[:3])
    monkeypatch.setattr("simfluence.simulators.response.projections._FORMED", 1)
    single = ResponseSimulator(task, n_checkpoints=2).fit(runs[:3])
    assert np.allclose(whole.reads_, single.reads_, atol=1e-12)


def test_derivatives_averaged_over_one_run_are_those_at_its_weights(bent):
    task, runs = bent
    one, mean = (ResponseSimulator(task, n_checkpoints=2, n_samples=n).fit(runs[:1]) for n in (5, 0))
    assert np.allclose(one.reads_, mean.reads_, atol=1e-12)
    averaged, at_mean = (ResponseSimulator(task, n_checkpoints=2, n_samples=n).fit(runs[:3]) for n in (5, 0))
    assert np.allclose(averaged.reads_[0], at_mean.reads_[0], atol=1e-12)  # all runs start from the same weights
    assert not np.allclose(averaged.reads_[1], at_mean.reads_[1], atol=1e-3)


def test_the_fitting_runs_keep_their_mean(bent):
    task, runs = bent
    fitted = ResponseSimulator(task, n_directions=20).fit(runs)
    simulated = fitted.simulate(runs.curricula, runs.initial_losses)
    assert np.allclose(simulated.mean(0), runs.losses.mean(0), atol=1e-12)


def small_digits(steps: int, runs: int, **recipe: object) -> tuple[sf.Task, sf.Runs]:
    """A narrow network on a few digits."""
    X, y = sklearn.datasets.load_digits(return_X_y=True)
    X = (X / 16).astype(np.float32)
    task = sf.tasks.from_arrays(
        lambda: nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)),
        X[:40], y[:40], "cross_entropy", test=(X[40:60], y[40:60]), name="small digits",
    )  # fmt: skip
    curricula = sf.random_curricula(n_train=40, runs=runs, steps=steps, batch_size=4, subset=0.5, seed=0)
    return task, sf.record(task, sf.Recipe(**recipe), curricula)


@pytest.mark.parametrize(
    "recipe",
    [
        {"optimizer": "adam", "lr": 0.003},
        {"optimizer": "adamw", "lr": 0.003, "weight_decay": 0.1},
        {"optimizer": "nadam", "lr": 0.003, "weight_decay": 0.01},
        {"optimizer": "rmsprop", "lr": 0.001, "momentum": 0.3},
        {"optimizer": "adagrad", "lr": 0.02},
    ],
    ids=lambda recipe: recipe["optimizer"],
)
def test_optimizers_that_scale_gradients_are_forecast(recipe):
    task, runs = small_digits(20, 8, **recipe)
    skill = ResponseSimulator(task, n_checkpoints=3, n_directions=80).fit(runs[:6]).score(runs[6:])
    assert skill > 0.8


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adam", {}), ("nadam", {}), ("rmsprop", {"momentum": 0.3}), ("adagrad", {}),
        ("sgd", {"momentum": 0.9, "nesterov": True}), ("sgd", {"momentum": 0.9, "dampening": 0.5}),
    ],
)  # fmt: skip
def test_steps_are_torchs_where_all_gradients_are_alike(name, options):
    """With one gradient all the time, second moments are its squares, however they are averaged."""
    gradient = torch.tensor([0.5, -2.0, 0.1], dtype=torch.float64)
    plain = {key: value for key, value in options.items() if key != "momentum"}
    recipe = sf.Recipe(optimizer=name, lr=0.1, momentum=options.get("momentum", 0.0), optimizer_args=plain)
    optimizer = Optimizer.of(recipe)
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    torchs = recipe.build_optimizer([parameter])
    diagonals = preconditioners(optimizer, [gradient**2] * 2, np.array([0, 4])) if optimizer.scales else [1.0]
    state, memory, active = torch.zeros(1, 3).double(), Memory.empty(torch.zeros(1, 3).double()), torch.tensor([[True]])
    for _ in range(5):
        parameter.grad = gradient.clone()
        torchs.step()
        memory, moves = optimizer.step(memory, gradient[None] * diagonals[0], active)
        state = state - 0.1 * moves
    assert torch.allclose(state[0], parameter.detach(), rtol=1e-5)


def test_second_moments_average_along_the_path_and_wait_for_a_gradient():
    optimizer = Optimizer("adam", 0.9, decay=0.5, eps=0.0)
    squares = [torch.tensor([1.0, 0.0, 0.0]), torch.tensor([9.0, 4.0, 0.0])]
    first, second = preconditioners(optimizer, squares, np.array([0, 2]))  # at step 1: 5 and 2
    means = torch.tensor([(0.125 * 1 + 0.25 * 5 + 0.5 * 9) / 0.875, (0.25 * 2 + 0.5 * 4) / 0.875])
    assert torch.allclose(second[:2], means.rsqrt())
    assert torch.allclose(first, torch.tensor([1.0, float(means[1].rsqrt()), 0.0]))
    assert second[2] == 0


def test_it_beats_the_boosted_simulator_on_digits():
    task = sf.tasks.digits(n_train=60, n_test=30)
    curricula = sf.random_curricula(n_train=60, runs=10, steps=40, batch_size=6, subset=0.5, seed=0)
    runs = sf.record(task, sf.Recipe(lr=0.05, momentum=0.9), curricula)
    response = ResponseSimulator(task, n_checkpoints=4, n_directions=100).fit(runs[:7]).score(runs[7:])
    assert response > sf.BoostedSimulator().fit(runs[:7]).score(runs[7:]) + 0.02
    assert response > 0.8


@pytest.mark.filterwarnings("ignore::simfluence.errors.UnseenWarning")
def test_it_keeps_the_promises_of_simulators():
    check_simulator(ResponseSimulator)


def test_a_file_gives_the_same_forecasts_without_the_task(bent, tmp_path):
    task, runs = bent
    fitted = ResponseSimulator(task, n_directions=20).fit(runs[:4])
    fitted.save(tmp_path / "fitted.safetensors")
    loaded = Simulator.load(tmp_path / "fitted.safetensors")
    arguments = runs.curricula, runs.initial_losses
    assert loaded.task is None
    assert np.array_equal(loaded.simulate(*arguments), fitted.simulate(*arguments))


def test_runs_of_unequal_length_and_gaps_in_readings(bent):
    task, _ = bent
    curricula = curricula_of(task, 12)
    shorter = sf.Curriculum(curricula[0].tolist()[:8], 8)
    recipe = sf.Recipe(lr=0.1, dtype="float64")
    runs = sf.record(task, recipe, [shorter, *curricula[1:]], observe=sf.Observe(every=3))
    fitted = ResponseSimulator(task).fit(runs[:4])
    assert fitted.score(runs[4:]) > 0.9
    longer = sf.Curriculum(curricula[4].tolist() * 2, 8)
    true = sf.record(task, recipe, [longer])[0].losses
    with pytest.warns(BeyondReferenceWarning):
        simulated = fitted.simulate([longer], true[0])[0]
    assert np.abs(simulated[-1] - true[-1]).mean() < 0.5 * np.abs(simulated[12] - true[-1]).mean()


def test_running_statistics_and_dropout_are_those_of_evaluation():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 5)).astype(np.float32)
    y = (X[:, 0] > 0).astype(np.int64)
    task = sf.tasks.from_arrays(
        lambda: nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2)),
        X[:40], y[:40], "cross_entropy", test=(X[40:], y[40:]), name="with statistics",
    )  # fmt: skip
    runs = sf.record(task, sf.Recipe(lr=0.1), curricula_of(task, 25, 9))
    assert ResponseSimulator(task, n_checkpoints=4).fit(runs[:7]).score(runs[7:]) > 0.3


def test_recorded_checkpoints_of_a_large_model_are_read_instead_of_training_again(bent, tmp_path, monkeypatch):
    task, runs = bent
    monkeypatch.setattr("simfluence.simulators.response.mean_path._SMALL", 0)
    replayed = ResponseSimulator(task, n_checkpoints=3, n_directions=30).fit(runs[:3])
    observe = sf.Observe(checkpoints=(*replayed.times_.tolist(), 12))
    stored = sf.record(task, runs[0].recipe, runs.curricula[:3], tmp_path / "store", observe=observe)
    monkeypatch.setattr("simfluence.simulators.response.mean_path.follow", None)
    read = ResponseSimulator(task, n_checkpoints=3, n_directions=30).fit(stored)
    arguments = runs.curricula, runs.initial_losses
    assert np.allclose(read.simulate(*arguments), replayed.simulate(*arguments), atol=1e-9)


def test_what_it_cannot_do_is_refused_by_name(bent):
    task, runs = bent
    with pytest.raises(InvalidInput, match="task is required"):
        ResponseSimulator().fit(runs)
    with pytest.raises(InvalidInput, match="does not cover optimizer 'rprop'"):
        ResponseSimulator(task, recipe=sf.Recipe(optimizer="rprop", lr=0.01)).fit(runs)
    with pytest.raises(InvalidInput, match="does not cover amsgrad=True"):
        ResponseSimulator(task, recipe=sf.Recipe(optimizer="adam", optimizer_args={"amsgrad": True})).fit(runs)
    with pytest.raises(InvalidInput, match=r"more than memory=1e-06: lower n_directions="):
        ResponseSimulator(task, memory=1e-6).fit(runs)
    with pytest.raises(InvalidInput, match="n_directions must be a whole number from 1 up"):
        ResponseSimulator(task, n_directions=0).fit(runs)


def test_it_is_cloned_with_its_task(bent):
    task, _ = bent
    cloned = sklearn.base.clone(ResponseSimulator(task, n_directions=7))
    assert cloned.task is task
    assert cloned.n_directions == 7


def test_outputs_without_end_are_refused():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(10, 3)).astype(np.float32), rng.normal(size=(10, 100)).astype(np.float32)
    task = sf.tasks.from_arrays(
        lambda: nn.Linear(3, 100), X[:6], y[:6], "squared_error", test=(X[6:], y[6:]), name="wide"
    )
    runs = sf.record(task, sf.Recipe(lr=0.1), curricula_of(task, 8, 2))
    with pytest.raises(InvalidInput, match="100 outputs per example, but the response follows at most 64"):
        ResponseSimulator(task).fit(runs)
