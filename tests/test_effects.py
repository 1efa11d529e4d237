from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import sklearn.base

import simfluence as sf
from simfluence.errors import InvalidInput, NotFittedError

LEFT_OUT = [
    sf.AdditiveSimulator(l2=0.5),
    sf.MultiplicativeSimulator(l2=0.5),
    sf.LinearSimulator(l2=0.5, prior="zero"),
    sf.LinearSimulator(l2=0.5, around="mean"),
    sf.LinearSimulator(l2=0.5, around="mean", order=3, varying=True),
    sf.LinearSimulator(l2=0.5, order=2, varying=True, guard=True),
    sf.MeanTrajectorySimulator(),
    sf.BoostedSimulator(rounds=5),
]


@pytest.mark.parametrize("simulator", LEFT_OUT, ids=str)
def test_all_at_once_is_one_at_a_time(runs, task, simulator):
    """Repeated examples, batches that shrink to nothing, and examples that the base never saw."""
    fitted = sklearn.base.clone(simulator).fit(runs)
    odd = sf.Curriculum([[0, 1, 2], [], [5], [5, 5, 7], [3, 3, 4, 8], [5], [0, 1], [5, 5]], n_train=12)
    for run in (runs[0], dataclasses.replace(runs[0], curriculum=odd, losses=runs[0].losses[:9], learning_rates=None)):
        cases = [
            (sf.leave_one_out(fitted, run), lambda index: sf.Remove([index])),
            (sf.move_each(fitted, run), lambda index: sf.Move([index], 0)),
            (sf.move_each(fitted, run, to=-1), lambda index: sf.Move([index], -1)),
            (sf.show_again(fitted, run), lambda index: sf.Insert([index], -1)),
            (sf.show_again(fitted, run, at=2), lambda index: sf.Insert([index], 2)),
        ]
        for changes, edit in cases:
            assert changes.shape == (5, 12)
            for index in range(12):
                expected = sf.what_if(fitted, run, edit(index), task=task).change
                assert np.allclose(changes[:, index], expected, rtol=1e-9, atol=1e-12)
        groups = {"even": [0, 2, 4], "overlapping": [4, 5], "by filter": "group == 'c'", "unseen": [11]}
        table = sf.leave_group_out(fitted, run, groups)
        for name, target in groups.items():
            expected = sf.what_if(fitted, run, sf.Remove(target), task=task).change
            assert np.allclose(table[name], expected, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def fitted(runs):
    return sf.LinearSimulator(l2=1.0).fit(runs)


def test_groups_of_a_column(fitted, runs):
    table = sf.leave_group_out(fitted, runs[0], "group")
    assert list(table.columns) == ["a", "b", "c"]
    assert table.index.name == "test"
    alone = sf.what_if(fitted, runs[0], sf.Remove("group == 'b'")).change
    assert np.allclose(table["b"], alone)
    with pytest.raises(InvalidInput, match="did you mean 'group'"):
        sf.leave_group_out(fitted, runs[0], "grup")
    with pytest.raises(InvalidInput, match="a group holds every example that the base shows"):
        sf.leave_group_out(fitted, runs[0], {"all": list(range(12))})


def test_suspects_of_a_simulator(fitted, runs):
    changes = sf.leave_one_out(fitted, runs[0])
    table = sf.rank_suspects(fitted, runs[0])
    assert list(table.columns)[:3] == ["gain", "shown", "id"]
    assert table["gain"].is_monotonic_decreasing
    assert np.allclose(table["gain"].sort_index(), -changes.values.mean(0))
    assert table["shown"].sort_index().tolist() == runs[0].curriculum.counts.toarray().sum(0).tolist()
    one = sf.rank_suspects(fitted, runs[0], test=[3])
    assert np.allclose(one["gain"].sort_index(), -changes[3])
    both = [sf.leave_one_out(fitted, run).values.mean(0) for run in runs[:2]]
    shown = np.array([run.curriculum.counts.toarray().sum(0) > 0 for run in runs[:2]])
    expected = -np.sum(both, axis=0) / np.maximum(shown.sum(0), 1)  # over the runs that show it
    assert np.allclose(sf.rank_suspects(fitted, runs[:2])["gain"].sort_index(), expected)


def test_suspects_by_group(fitted, runs):
    each = sf.rank_suspects(fitted, runs[:3])
    table = sf.rank_suspects(fitted, runs[:3], by="group")
    assert table["gain"].is_monotonic_decreasing
    assert np.allclose(table["gain"].sort_index(), each.groupby("group")["gain"].sum())
    assert (table["examples"] == 4).all()
    together = np.mean([-sf.leave_group_out(fitted, run, "group").mean() for run in runs[:3]], axis=0)
    assert np.allclose(table["together"].sort_index(), together)


def test_suspects_of_scores(runs):
    scores = np.arange(24.0).reshape(2, 12)
    examples = runs[0].train
    table = sf.rank_suspects(scores, examples=examples, test=[1])
    assert table["gain"].tolist() == list(-np.arange(12.0, 24.0))
    assert table["id"].tolist() == examples.ids
    totals = sf.rank_suspects(scores, examples=examples, by="group")
    assert list(totals.columns) == ["gain", "examples", "mean_gain"]
    assert totals.loc["a", "gain"] == -(scores.mean(0)[::3].sum())
    for wrong in (np.zeros((2, 5)), np.zeros(12)):
        with pytest.raises(InvalidInput, match=r"must be \[test, train\]"):
            sf.rank_suspects(wrong, examples=examples)
    with pytest.raises(InvalidInput, match="no column"):
        sf.rank_suspects(scores, examples=examples, by="nothing")
    with pytest.raises(InvalidInput, match="no example 9"):
        sf.rank_suspects(scores, test=[9])


def test_bad_questions(fitted, runs):
    with pytest.raises(NotFittedError):
        sf.leave_one_out(sf.LinearSimulator(), runs[0])
    with pytest.raises(InvalidInput, match="give base="):
        sf.rank_suspects(fitted)
    other = dataclasses.replace(runs[0], fingerprint="0" * 64)
    for ask in (sf.leave_one_out, sf.move_each, sf.show_again, lambda *two: sf.leave_group_out(*two, "group")):
        with pytest.raises(InvalidInput, match="another task"):
            ask(fitted, other)
    with pytest.raises(InvalidInput, match="batches go from 0 to 9"):
        sf.show_again(fitted, runs[0], at=10)
    alone = dataclasses.replace(runs[0], curriculum=sf.Curriculum([[3]] * 10, n_train=12))
    for simulator in (fitted, sf.MeanTrajectorySimulator().fit(runs)):
        with pytest.raises(InvalidInput, match=r"would leave no(ne| example)"):
            sf.leave_one_out(simulator, alone)


def test_effects_are_scores(fitted, runs):
    """They have ids, a unit and axes, as those of an attributor; an array's attributes still answer, with a warning."""
    changes = sf.leave_one_out(fitted, runs[0])
    assert (changes.unit, changes.method, sf.show_again(fitted, runs[0]).unit) == ("loss", "linear", "change")
    frame = changes.to_frame()
    assert frame.iloc[13].tolist() == [runs[0].test.ids[1], runs[0].train.ids[1], changes.values[1, 1]]
    assert np.array_equal(changes - 1, changes.values - 1)
    assert np.array_equal(changes < changes, np.zeros((5, 12), bool))
    assert len(changes) == 5
    with pytest.warns(DeprecationWarning, match=r"scores\.mean was renamed to scores\.values\.mean"):
        assert changes.mean() == changes.values.mean()
    with pytest.raises(AttributeError, match="Scores have no 'average_of_all'"):
        changes.average_of_all  # noqa: B018
