from __future__ import annotations

import numpy as np
import pytest
import torch
from comparing import relative
from torch import nn

import simfluence as sf
from simfluence.errors import EngineWarning, InvalidInput
from simfluence.recording.engines.batched import obstacle
from simfluence.recording.plan import GROUP_RUNS, plan
from simfluence.recording.session import run_id

RECIPES = {
    "sgd": {"lr": 0.1},
    "momentum": {"lr": 0.05, "momentum": 0.9},
    "adamw": {"optimizer": "adamw", "lr": 0.003},
    "adam": {"optimizer": "adam", "lr": 0.003},
    "rmsprop": {"optimizer": "rmsprop", "lr": 0.001},
    "adagrad": {"optimizer": "adagrad", "lr": 0.02},
}
REGULARISED = {"weight_decay": 0.05, "schedule": "cosine", "horizon": 60, "warmup": 5, "clip_norm": 0.3}


def both(task, recipe, curricula):
    return (sf.record(task, recipe, curricula, engine=engine).losses for engine in ("loop", "batched"))


@pytest.mark.parametrize(("name", "model"), [*((name, "mlp") for name in RECIPES), ("adamw", "cnn")])
def test_agrees_with_the_loop_in_single_precision(name, model):
    task = sf.tasks.digits(n_train=60, n_test=15, model=model)
    curricula = sf.random_curricula(60, runs=3, steps=30, batch_size=8, subset=0.5, seed=1)
    loop, batched = both(task, sf.Recipe(**RECIPES[name], **REGULARISED), curricula)
    assert relative(loop, batched) <= 2e-5


@pytest.mark.parametrize(("name", "model"), [("sgd", "mlp"), ("momentum", "cnn"), ("adamw", "mlp")])
def test_agrees_with_the_loop_in_double_precision(name, model):
    task = sf.tasks.digits(n_train=60, n_test=15, model=model)
    curricula = sf.random_curricula(60, runs=3, steps=60, batch_size=8, subset=0.5, seed=1)
    recipe = sf.Recipe(**RECIPES[name], **REGULARISED, dtype="float64")
    loop, batched = both(task, recipe, curricula)
    assert np.abs(loop - batched).max() <= 1e-9


def test_clipping_is_of_each_run_by_itself(task):
    recipe = sf.Recipe(lr=5.0, clip_norm=0.01, dtype="float64")
    curricula = sf.random_curricula(12, runs=4, steps=9, batch_size=2, seed=0)
    loop, batched = both(task, recipe, curricula)
    assert np.abs(loop - batched).max() <= 1e-12
    unclipped = sf.record(task, recipe.replace(clip_norm=None), curricula).losses
    assert np.abs(loop - unclipped).max() > 1e-3


def test_batches_of_different_sizes(task):
    rng = np.random.default_rng(0)
    curricula = [sf.Curriculum([rng.integers(12, size=rng.integers(1, 6)) for _ in range(8)], 12) for _ in range(5)]
    loop, batched = both(task, sf.Recipe(lr=0.2, momentum=0.5, dtype="float64"), curricula)
    assert np.abs(loop - batched).max() <= 1e-12


def test_a_penalty_of_the_objective(task):
    curricula = sf.random_curricula(40, runs=3, steps=30, batch_size=4)
    loop, batched = both(sf.tasks.synthetic(l2=0.5), sf.Recipe(lr=0.05, dtype="float64"), curricula)
    none = sf.record(sf.tasks.synthetic(l2=0.0), sf.Recipe(lr=0.05, dtype="float64"), curricula).losses
    assert np.abs(loop - batched).max() <= 1e-12
    assert np.abs(loop - none).max() > 1e-2


def test_shared_and_frozen_parameters():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(5, 5)
            self.two = nn.Linear(5, 5)
            self.two.weight = self.one.weight
            self.out = nn.Linear(5, 1)
            self.out.bias.requires_grad_(False)

        def forward(self, x):
            return self.out(torch.tanh(self.two(torch.tanh(self.one(x)))))

    base = sf.tasks.synthetic()
    task = sf.tasks.from_arrays(Tied, *base.train_data, "squared_error", test=base.test_data)
    loop, batched = both(task, sf.Recipe(lr=0.05, dtype="float64"), sf.random_curricula(40, 3, 20, 4))
    assert np.abs(loop - batched).max() <= 1e-12


def test_evaluation_in_pieces_changes_nothing(task, curricula, runs, monkeypatch):
    monkeypatch.setattr("simfluence.recording.engines.batched.EVALUATION_BATCH", 12)
    again = sf.record(task, sf.Recipe(lr=0.3), curricula, engine="batched")
    assert np.allclose(again.losses, runs.losses, atol=1e-6)


def dropout():
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2))


def batch_norm():
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def item():
    class Item(nn.Linear):
        def forward(self, x):
            return super().forward(x) * float(x.abs().max().item() > -1)

    return Item(3, 2)


@pytest.mark.parametrize(
    ("model", "recipe", "said"),
    [
        (dropout, {}, "cannot be mapped"),
        (batch_norm, {}, "keeps state beside its parameters"),
        (item, {}, "cannot be mapped"),
        (None, {"optimizer": "nadam"}, "'nadam' does not work element by element"),
    ],
)
def test_what_cannot_be_batched_goes_to_the_loop_and_is_said(task, curricula, model, recipe, said):
    (X, y), test = task.train_data, task.test_data
    other = sf.tasks.from_arrays(model, X, y, "cross_entropy", test=test) if model else task
    recipe = sf.Recipe(lr=0.01, **recipe)
    assert said in obstacle(other, recipe)
    with pytest.warns(EngineWarning, match=said):
        asked = sf.record(other, recipe, curricula, engine="batched")
    automatic = sf.record(other, recipe, curricula)  # without a warning
    loop = sf.record(other, recipe, curricula, engine="loop")
    assert {run.engine for run in [*asked, *automatic]} == {"loop"}
    assert np.array_equal(asked.losses, loop.losses)
    assert np.array_equal(automatic.losses, loop.losses)


def test_curricula_with_an_empty_batch_go_to_the_loop(task, recipe, curricula):
    hole = sf.Curriculum([[0, 1], []] * 5, 12)
    with pytest.warns(EngineWarning, match="1 curricula with an empty batch use the loop"):
        found = sf.record(task, recipe, [*curricula, hole], engine="batched")
    assert [run.engine for run in found] == ["batched"] * 6 + ["loop"]


def test_the_plan_depends_on_the_curricula_alone(task, recipe):
    curricula = sf.random_curricula(12, runs=GROUP_RUNS + 3, steps=5, batch_size=2)
    longer = sf.random_curricula(12, runs=2, steps=7, batch_size=2)
    wanted = {run_id(task, recipe, c): c for c in [*curricula[:4], *longer, *curricula[4:]]}
    groups = plan(task, recipe, wanted)
    assert [(g.engine, len(g.curricula), g.steps) for g in groups] == [
        ("batched", 32, 5), ("batched", 2, 7), ("batched", 3, 5),
    ]  # fmt: skip
    assert [name for g in groups for name in g.curricula if g.steps == 5] == [
        n for n, c in wanted.items() if len(c) == 5
    ]
    assert [(g.engine, len(g.curricula)) for g in plan(task, recipe, wanted, "loop")] == [("loop", 1)] * 37


def test_a_single_run_is_left_to_the_loop(task, recipe, curricula):
    assert sf.record(task, recipe, curricula[:1])[0].engine == "loop"


def test_a_large_model_is_left_to_the_loop(recipe, curricula, task):
    (X, y), test = task.train_data, task.test_data
    large = sf.tasks.from_arrays(
        lambda: nn.Sequential(nn.Linear(3, 300_000), nn.Linear(300_000, 2)), X, y, "cross_entropy", test=test
    )
    assert {group.engine for group in plan(large, recipe, dict(zip("abcdef", curricula, strict=True)))} == {"loop"}


def test_a_part_recorded_before_changes_nothing(task, recipe, curricula, runs, tmp_path):
    store = sf.RunStore(tmp_path)
    store.open_for(task)
    for run in runs[1:4]:
        store.write(run)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("run-*")}
    assert np.array_equal(sf.record(task, recipe, curricula, store).losses, runs.losses)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # what was there is not written again


def with_padding_row():
    return nn.Sequential(nn.Embedding(7, 4, padding_idx=0), nn.Flatten(), nn.Linear(20, 3))


def with_sparse_gradients():
    return nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten(), nn.Linear(20, 3))


def normalising_over_the_batch():
    return nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3))


def plain():
    return nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))


def loss_over_the_batch(outputs, targets):
    losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
    return losses / losses.detach().mean()


class Scaled(nn.Module):
    """A parameter without axes."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(5, 3), nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return self.layer(x) * self.scale


class Masked(nn.Module):
    """Takes another path in evaluation mode, which cannot be mapped."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.embed, self.encode, self.out = nn.Embedding(7, 4), nn.TransformerEncoder(layer, 1), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.encode(self.embed(x), src_key_padding_mask=x == 0)[:, 0])


@pytest.mark.parametrize(
    ("model", "loss", "whole_numbers", "engine"),
    [
        (with_padding_row, "cross_entropy", True, "loop"),
        (with_sparse_gradients, "cross_entropy", True, "loop"),
        (Masked, "cross_entropy", True, "loop"),
        (Scaled, "cross_entropy", False, "batched"),
        (plain, "cross_entropy", False, "batched"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_automatic_engine_gives_the_losses_of_the_loop(model, loss, whole_numbers, engine):
    rng = np.random.default_rng(0)
    X = rng.integers(1, 7, size=(24, 5)) if whole_numbers else rng.normal(size=(24, 5)).astype(np.float32)
    if whole_numbers:
        X[::2, 3:] = 0
    task = sf.tasks.from_arrays(model, X, rng.integers(3, size=24), loss)
    recipe = sf.Recipe(lr=0.1, clip_norm=1.0) if model is not with_sparse_gradients else sf.Recipe(lr=0.1)
    curricula = [sf.Remove([0, 1, 2]).apply(c) for c in sf.random_curricula(18, 3, 6, 6)]
    automatic, loop = (sf.record(task, recipe, curricula, engine=each) for each in ("auto", "loop"))
    assert {run.engine for run in automatic} == {engine}
    assert relative(automatic.losses, loop.losses) < 1e-5


@pytest.mark.parametrize(
    ("model", "loss"), [(normalising_over_the_batch, "cross_entropy"), (plain, loss_over_the_batch)]
)
def test_examples_that_interact_are_neither_batched_nor_recorded(model, loss):
    rng = np.random.default_rng(0)
    task = sf.tasks.from_arrays(model, rng.normal(size=(24, 5)).astype(np.float32), rng.integers(3, size=24), loss)
    assert "do examples interact?" in obstacle(task, sf.Recipe())
    with pytest.raises(InvalidInput, match="depends on the other examples of the batch"):
        sf.record(task, sf.Recipe(), sf.random_curricula(18, 3, 6, 6))


def test_checkpoints_of_tied_weights(tmp_path):
    def tied():
        embed, head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        head.weight = embed.weight
        return nn.Sequential(embed, nn.Flatten(), nn.Linear(20, 4), head)

    rng = np.random.default_rng(0)
    task = sf.tasks.from_arrays(tied, rng.integers(7, size=(24, 5)), rng.integers(7, size=24), "cross_entropy")
    curricula = sf.random_curricula(18, 3, 6, 4)
    runs = sf.record(
        task, sf.Recipe(lr=0.5), curricula, tmp_path, observe=sf.Observe(checkpoints=[6]), engine="batched"
    )
    for run in runs:
        model = task.build_model(1)
        sf.Checkpoint.load(sf.RunStore(tmp_path).read(run.id).checkpoints[6]).restore(model)
        assert np.allclose(task.evaluate(model, task.test_data)["loss"], run.losses[-1], atol=1e-5)


def test_a_diverging_run_leaves_its_group_alone(task, curricula):
    X, y = task.train_data[0].clone(), task.train_data[1]
    X[11] = 1e30  # whoever is shown this one diverges
    wild = sf.tasks.from_arrays(task.model, X, y, lambda o, t: ((o - t[:, None]) ** 2).mean(1), test=task.test_data)
    mixed = [c for c in curricula if 11 in c.indices][:1] + [c for c in curricula if 11 not in c.indices]
    batched, loop = (sf.record(wild, sf.Recipe(lr=1e-2), mixed, engine=e) for e in ("batched", "loop"))
    assert [run.engine for run in batched] == ["batched"] * len(mixed)
    assert np.allclose(batched.losses[1:], loop.losses[1:], rtol=1e-4)
