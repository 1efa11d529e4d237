from __future__ import annotations

import jaxtyping
import numpy as np
import pytest

import simfluence as sf
from simfluence.errors import InvalidInput


def test_sequence(runs, curricula):
    assert len(runs) == 6
    assert isinstance(runs[0], sf.Run)
    assert isinstance(runs[:2], sf.Runs)
    assert runs.curricula == curricula
    assert runs.losses.shape == (6, 11, 5)
    assert np.array_equal(runs.initial_losses, runs.losses[:, 0])
    assert [run.id for run in runs] == runs.ids


def test_split_does_not_depend_on_the_order(runs):
    fit, held = runs.split(held_out=2, seed=0)
    backwards = runs[::-1].split(held_out=2, seed=0)
    assert (len(fit), len(held)) == (4, 2)
    assert (fit.ids, held.ids) == (backwards[0].ids, backwards[1].ids)
    assert sorted(fit.ids + held.ids) == sorted(runs.ids)
    assert any(runs.split(2, seed)[1].ids != held.ids for seed in range(1, 9))
    assert len(runs.split(held_out=0.5)[1]) == 3


def test_split_keeps_copies_of_a_run_on_one_side(runs):
    fit, held = sf.Runs([*runs, *runs]).split(held_out=2)
    assert not set(fit.ids) & set(held.ids)
    assert (len(fit), len(held)) == (8, 4)


@pytest.mark.parametrize("held_out", [0, 6, -1, 0.0, 1.0])
def test_bad_split(runs, held_out):
    with pytest.raises(InvalidInput, match="leave at least one"):
        runs.split(held_out)


def test_from_arrays_takes_plain_batches():
    runs = sf.Runs.from_arrays([[[0], [1]], [[2], []]], np.arange(12).reshape(2, 3, 2))
    assert runs.n_train == 3
    assert runs.losses.dtype == np.float64
    assert runs[1].curriculum == sf.Curriculum([[2], []], n_train=3)
    assert runs.ids == sf.Runs.from_arrays([[[0], [1]], [[2], []]], np.arange(12).reshape(2, 3, 2)).ids


def test_shorter_runs_are_padded_with_nan():
    runs = sf.Runs.from_arrays([[[0], [1]], [[1]]], [np.zeros((3, 2)), np.ones((2, 2))])
    assert np.isnan(runs.losses[1, 2]).all()
    assert runs.losses[1, 1].tolist() == [1, 1]
    assert not any(run.diverged for run in runs)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"learning_rates": np.ones(3)}, r"learning_rates must have the shape \[2\]"),
        ({"recorded": np.ones(2, bool)}, r"recorded must have the shape \[3\]"),
        ({"measures": {"margin": np.ones((3, 4))}}, r"measure 'margin' must have the shape \[3, 5\]"),
    ],
)
def test_arrays_of_other_shapes_than_the_losses(wrong, said, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the tests' own check of shapes
    with pytest.raises(InvalidInput, match=said):
        sf.Run("a", sf.Curriculum([[0], [1]]), np.ones((3, 5)), **wrong)


def test_bad_arrays():
    with pytest.raises(InvalidInput, match="2 steps need 3 rows"):
        sf.Runs.from_arrays([[[0], [1]]], np.zeros((1, 2, 2)))
    with pytest.raises(InvalidInput, match="1 curricula, but losses of 2 runs"):
        sf.Runs.from_arrays([[[0]]], np.zeros((2, 2, 2)))
    with pytest.raises(InvalidInput, match="must be numbers of shape"):
        sf.Runs.from_arrays([[[0]]], np.zeros((1, 2)))
    with pytest.raises(InvalidInput, match="batch 0 names training example 5"):
        sf.Runs.from_arrays([[[5]]], np.zeros((1, 2, 2)), n_train=3)


def test_runs_of_different_examples_do_not_go_together(runs, known):
    with pytest.raises(InvalidInput, match="12 training and 5 test examples"):
        sf.Runs([runs[0], known.runs[0]])


def test_runs_of_different_tasks_do_not_go_together(runs):
    other = sf.record(sf.tasks.digits(n_train=12, n_test=5), sf.Recipe(lr=0.3), runs.curricula[:1])
    with pytest.raises(InvalidInput, match="runs must be of one task"):
        sf.Runs([runs[0], other[0]])


def test_frames_and_arrays(task, recipe, curricula):
    runs = sf.record(task, recipe, curricula, observe=sf.Observe(every=4))
    frame = runs.to_frame()
    assert list(frame.columns) == ["run", "step", "test", "loss"]
    assert len(frame) == 6 * 4 * 5  # times 0, 4, 8, 10
    row = frame[(frame["run"] == runs[2].id) & (frame["step"] == 8) & (frame["test"] == 3)]
    assert row["loss"].item() == runs[2].losses[8, 3]
    again, losses = runs.to_arrays()
    assert again == curricula
    assert np.array_equal(losses, runs.losses, equal_nan=True)


def test_where_speaks_of_the_table(runs):
    assert list(runs.table["id"]) == runs.ids
    assert len(runs.where("steps == 10 and optimizer == 'sgd' and seed == 0")) == 6
    assert runs.where(f"id == '{runs[3].id}'").ids == [runs[3].id]
    assert len(runs.where("diverged == true")) == 0
    assert len(runs[:0].where("steps == 1")) == 0
