from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import simfluence as sf
from simfluence.errors import InvalidInput, StoreError
from simfluence.recording import session
from simfluence.recording.engines import loop
from simfluence.recording.engines.base import Training, TrainingSetup
from simfluence.recording.plan import plan

RECIPES = {
    "sgd": sf.Recipe(lr=0.3),
    "momentum": sf.Recipe(lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": sf.Recipe(optimizer="adam", lr=0.01),
    "adamw": sf.Recipe(
        optimizer="adamw", lr=0.02, weight_decay=0.1, schedule="cosine", horizon=12, warmup=3, clip_norm=0.5
    ),
    "double": sf.Recipe(lr=0.3, dtype="float64"),
}


def by_hand(task, recipe, curriculum):
    """The same training as a person would write it."""
    model = task.build_model(recipe.seed).to(recipe.torch_dtype)
    optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer](
        model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay,
        **({"momentum": recipe.momentum} if recipe.momentum else {}),
    )  # fmt: skip
    (X, y), (X_test, y_test) = task.train_data, task.test_data
    X, X_test = X.to(recipe.torch_dtype), X_test.to(recipe.torch_dtype)
    losses = []

    def measure():
        with torch.no_grad():
            losses.append(nn.functional.cross_entropy(model(X_test), y_test, reduction="none").numpy())

    measure()
    for t, batch in enumerate(curriculum):
        if len(batch):
            optimizer.param_groups[0]["lr"] = recipe.learning_rates(len(curriculum))[t]
            rows = torch.tensor(batch).long()
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X[rows]), y[rows]).backward()
            if recipe.clip_norm:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            optimizer.step()
        measure()
    return np.stack(losses)


@pytest.mark.parametrize("engine", ["loop", "batched"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_equals_training_by_hand(task, recipe, curricula, engine):
    ragged = sf.Curriculum([[0, 1, 2], [1], [5], [5, 5, 7, 8, 9], [3, 4]] * 2, n_train=12)
    for run in sf.record(task, recipe, [*curricula[:2], ragged], engine=engine):
        assert run.engine == engine
        expected = by_hand(task, recipe, run.curriculum)
        assert np.allclose(run.losses, expected, rtol=1e-5, atol=1e-6)
        assert run.losses.dtype == np.dtype(recipe.dtype)
        assert run.learning_rates.tolist() == recipe.learning_rates(run.steps).tolist()


def test_an_empty_batch_is_a_step_without_an_update(task):
    recipe = sf.Recipe(lr=0.3, momentum=0.9, schedule="linear", horizon=3)
    run = sf.record(task, recipe, [sf.Curriculum([[0], [], [1]], n_train=12)])[0]
    assert np.array_equal(run.losses[1], run.losses[2])
    assert not np.array_equal(run.losses[2], run.losses[3])
    assert run.learning_rates.tolist() == pytest.approx([0.3, 0.2, 0.1])


def test_all_runs_start_from_the_same_losses(runs, task, curricula):
    assert np.ptp(runs.initial_losses, axis=0).max() == 0
    other = sf.record(task, sf.Recipe(lr=0.3, seed=1), curricula[:1])
    assert not np.array_equal(other.initial_losses[0], runs.initial_losses[0])


def test_returned_in_the_order_of_the_curricula(task, recipe, curricula, store):
    backwards = sf.record(task, recipe, [*curricula[::-1], curricula[0]], store)
    assert backwards.curricula == [*curricula[::-1], curricula[0]]
    assert np.array_equal(backwards[0].losses, sf.record(task, recipe, curricula)[-1].losses)
    assert store.load().ids == sorted(store.load().ids)


def test_recorded_runs_are_read_not_made_again(task, recipe, curricula, store, monkeypatch):
    monkeypatch.setattr(Training, "advance", lambda self: pytest.fail("trained again"))
    again = sf.record(task, recipe, curricula, store)
    assert len(again) == len(curricula)


def test_the_global_seed_is_left_alone(task, recipe, curricula):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    sf.record(task, recipe, curricula[:1])
    assert torch.equal(before, torch.get_rng_state())


def noisy_task(task):
    def model():
        return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))

    (X, y), test = task.train_data, task.test_data
    return sf.tasks.from_arrays(model, X, y, "cross_entropy", test=test, name="noisy")


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in ("loop", "batched") for name in ("sgd", "momentum", "adamw")] + [("dropout", "adamw")],
)
def test_an_interrupted_run_goes_on_bit_for_bit(task, kind, name, tmp_path, monkeypatch):
    task, recipe = noisy_task(task) if kind == "dropout" else task, RECIPES[name]
    engine = "batched" if kind == "batched" else "loop"
    curricula = sf.random_curricula(n_train=12, runs=2, steps=12, batch_size=4, seed=0)
    whole = sf.record(task, recipe, curricula, tmp_path / "whole", engine=engine)
    monkeypatch.setattr(session, "SECONDS_BETWEEN_SAVES", -1.0)  # keep every step
    advance, made = Training.advance, []

    def interrupted(self):
        if len(made) == 7:
            made.append("interrupted")
            raise KeyboardInterrupt
        made.append(self.step)
        advance(self)

    monkeypatch.setattr(Training, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sf.record(task, recipe, curricula, tmp_path / "broken", engine=engine)
    assert sf.RunStore(tmp_path / "broken").ids() == []
    resumed = sf.record(task, recipe, curricula, tmp_path / "broken", engine=engine)
    rest = [] if engine == "batched" else [*range(12)]  # both runs are in step, or the second comes after
    assert made == [*range(7), "interrupted", *range(7, 12), *rest]  # nothing trained twice
    assert np.array_equal(resumed.losses, whole.losses)
    assert np.array_equal(sf.RunStore(tmp_path / "broken").load().losses, sf.RunStore(tmp_path / "whole").load().losses)
    assert not (tmp_path / "broken" / "partial").exists()


def test_a_damaged_unfinished_run_is_started_again(task, recipe, curricula, runs, tmp_path):
    store = sf.RunStore(tmp_path / "s")
    store.open_for(task)
    group = plan(task, recipe, {run.id: run.curriculum for run in runs})[0]
    file = store.partial(group.name) / "training.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"half a file")
    with pytest.warns(UserWarning, match="made again from the start"):
        assert np.array_equal(sf.record(task, recipe, curricula, store).losses, runs.losses)
    assert not (tmp_path / "s" / "partial").exists()


@pytest.mark.parametrize(
    "more", [{}, {"every": 1}, {"every": 5, "checkpoints": [3]}], ids=["as before", "all", "checkpoint"]
)
def test_an_unfinished_run_is_gone_on_with_only_if_it_has_all_that_is_wanted(task, recipe, tmp_path, monkeypatch, more):
    curricula = sf.random_curricula(n_train=12, runs=1, steps=12, batch_size=4)
    monkeypatch.setattr(session, "SECONDS_BETWEEN_SAVES", -1.0)
    advance = Training.advance

    def interrupted(self):
        if self.step == 7:
            raise KeyboardInterrupt
        advance(self)

    monkeypatch.setattr(Training, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sf.record(task, recipe, curricula, tmp_path, observe=sf.Observe(every=5))
    made = []

    def counted(self):
        made.append(self.step)
        advance(self)

    monkeypatch.setattr(Training, "advance", counted)
    observe = sf.Observe(**(more or {"every": 5}))
    run = sf.record(task, recipe, curricula, tmp_path, observe=observe)[0]
    assert made == list(range(0 if more else 7, 12))
    assert np.isfinite(run.losses[observe.times(12)]).all()
    assert tuple(run.checkpoints) == observe.checkpoints


@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_checkpoints_hold_parameters_and_optimizer_state(task, curricula, tmp_path, engine):
    recipe, observe = RECIPES["adamw"], sf.Observe(checkpoints=[0, 4, 10])
    runs = sf.record(task, recipe, curricula[:3], tmp_path, observe=observe, engine=engine)
    run = sf.RunStore(tmp_path).read(runs[1].id)
    assert list(run.checkpoints) == [0, 4, 10]
    for step, file in run.checkpoints.items():
        checkpoint = sf.Checkpoint.load(file)
        model = task.build_model(1)
        optimizer = recipe.build_optimizer(model.parameters())
        checkpoint.restore(model, optimizer)
        model.eval()
        assert checkpoint.step == step
        assert np.allclose(task.evaluate(model, task.test_data)["loss"].numpy(), run.losses[step], atol=1e-6)
        if step:
            assert optimizer.state_dict()["state"][0]["step"] == step
            assert optimizer.state_dict()["state"][0]["exp_avg_sq"].abs().sum() > 0


def test_asking_later_for_checkpoints_replays_the_run(task, recipe, curricula, store):
    before = store.load()
    sf.record(task, recipe, curricula[:2], store, observe=sf.Observe(checkpoints=[5]))
    assert sum(len(run.checkpoints) for run in store.load()) == 2
    assert np.array_equal(store.load().losses, before.losses)


def test_a_replay_that_differs_is_refused(task, recipe, curricula, store, monkeypatch):
    recorded = Training.recorded
    monkeypatch.setattr(Training, "recorded", lambda self: [{"loss": run["loss"] + 0.1} for run in recorded(self)])
    before = store.load()
    with pytest.raises(StoreError, match="differs from the recorded values"):
        sf.record(task, recipe, curricula[:1], store, observe=sf.Observe(checkpoints=[5]))
    assert np.array_equal(store.load().losses, before.losses)


def test_a_diverged_run_is_kept_and_marked(task, curricula, tmp_path):
    recipe = sf.Recipe(lr=1e38, momentum=0.9)
    runs = sf.record(task, recipe, curricula[:1], tmp_path)
    assert runs[0].diverged
    assert sf.RunStore(tmp_path).load()[0].diverged
    assert np.isfinite(runs[0].losses[0]).all()


def one_step(task, recipe):
    training = loop.LoopTraining(TrainingSetup.of(task, recipe), sf.Curriculum([[0, 1]], 12), np.ones(2, bool))
    training.advance()
    return training


def test_modules_with_their_own_train_get_it_called(task, recipe):
    class Frozen(nn.BatchNorm1d):
        def train(self, mode=True):
            return super().train(False)

    (X, y), test = task.train_data, task.test_data
    frozen = sf.tasks.from_arrays(lambda: nn.Sequential(Frozen(3), nn.Linear(3, 2)), X, y, "cross_entropy", test=test)
    training = one_step(frozen, recipe)
    assert training.model[0].running_mean.abs().sum() == 0


def test_parameters_without_gradient_are_left_alone(task, recipe):
    def model():
        net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        net[0].requires_grad_(False)
        return net

    (X, y), test = task.train_data, task.test_data
    partly = sf.tasks.from_arrays(model, X, y, "cross_entropy", test=test)
    training = one_step(partly, recipe)
    assert torch.equal(training.model[0].weight, partly.build_model(0)[0].weight)
    assert not torch.equal(training.model[1].weight, partly.build_model(0)[1].weight)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"curricula": []}, "no curriculum"),
        ({"curricula": [sf.Curriculum([[0]], n_train=13)]}, "curriculum 0 is for 13 training examples"),
        ({"observe": sf.Observe(checkpoints=[0])}, "pass store="),
        (
            {"observe": sf.Observe(checkpoints=[11]), "store": "s"},
            r"checkpoints=\[11\]: steps go from 0 to 10",
        ),
        ({"observe": sf.Observe(checkpoints=[-1]), "store": "s"}, "steps go from 0"),
        ({"observe": sf.Observe(every=11)}, "every=11 is more than the 10 steps"),
        ({"observe": sf.Observe(measures=["margn"])}, "has no measure 'margn'"),
        ({"engine": "batch"}, "did you mean 'batched'"),
    ],
)
def test_bad_requests(task, recipe, curricula, change, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInput, match=said):
        sf.record(**{"task": task, "recipe": recipe, "curricula": curricula, **change})
    assert not (tmp_path / "s").exists()
