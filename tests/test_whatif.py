from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest

import simfluence as sf
from simfluence.errors import InvalidInput
from simfluence.simulators.markov import dynamics


@pytest.fixture(scope="module")
def linear(runs):
    return sf.LinearSimulator(l2=1.0).fit(runs[:4])


def test_both_sides_are_simulated(linear, runs, task):
    forecast = sf.what_if(linear, runs[5], [sf.Remove("label == 1"), sf.Repeat([0], 3)], task=task)
    edited = sf.Repeat([0], 3).apply(sf.Remove("label == 1").apply(runs[5].curriculum, task.train))
    assert forecast.curriculum == edited
    base, changed = linear.simulate([runs[5].curriculum, edited], runs[5].initial_losses)
    assert np.array_equal(forecast.base, base)
    assert np.array_equal(forecast.what_if, changed)
    assert np.allclose(forecast.change, changed[-1] - base[-1])
    assert str(forecast).startswith("What if we remove examples where label == 1 and show examples 0 (1) 3 times")


def test_frame_is_tidy(linear, runs, task):
    forecast = sf.what_if(linear, runs[5], sf.Remove([0, 1]), task=task)
    frame = forecast.frame
    assert list(frame.columns) == ["step", "test", "base", "what_if", "change"]
    assert len(frame) == 11 * 5
    row = frame[(frame["step"] == 7) & (frame["test"] == 3)].iloc[0]
    assert row["base"] == forecast.base[7, 3]
    assert row["what_if"] == forecast.what_if[7, 3]
    assert row["change"] == forecast.what_if[7, 3] - forecast.base[7, 3]


def test_a_run_carries_its_metadata(linear, store):
    run = store.load()[0]
    assert sf.what_if(linear, run, sf.Remove("group == 'a'")).curriculum.counts.toarray()[:, ::3].sum() == 0


def test_bad_questions(linear, runs, task, known):
    with pytest.raises(InvalidInput, match="edits must be"):
        sf.what_if(linear, runs[5], [])
    with pytest.raises(InvalidInput, match="fitted on 12"):
        sf.what_if(linear, known.runs[0], sf.Remove([0]))
    digits = sf.tasks.digits(n_train=12, n_test=5)
    with pytest.raises(InvalidInput, match="another task than 'digits'"):
        sf.what_if(linear, runs[5], sf.Remove([0]), task=digits)
    other = dataclasses.replace(runs[5], fingerprint="0" * 64)
    with pytest.raises(InvalidInput, match="another task than the runs that the simulator was fitted on"):
        sf.what_if(linear, other, sf.Remove([0]))
    for nothing in ({}, [[]], {"none": []}):
        with pytest.raises(InvalidInput, match=r"edits must be|no query"):
            sf.what_if(linear, runs[5], nothing)
    with pytest.raises(InvalidInput, match="query 'all' of base run"):
        sf.what_if(linear, runs[5], {"all": sf.Keep([i for i in range(12) if i not in runs[5].curriculum.indices])})
    with pytest.raises(InvalidInput, match="base has no run"):
        sf.what_if(linear, [], {"one": sf.Remove([0])})


def test_a_base_run_that_the_simulator_knows_is_named(linear, runs, task):
    known = sf.what_if(linear, runs[0], sf.Remove([0]), task=task)
    other = sf.what_if(linear, runs[5], sf.Remove([0]), task=task)
    assert (known.seen, other.seen) == (True, False)
    said = "The simulator was fitted on this base run"
    assert said in known.summary()
    assert said in known.verify().summary()
    assert said not in other.summary() + other.verify().summary()
    assert "fitted on 1 of these base runs" in sf.what_if(linear, runs[3:5], {"a": sf.Remove([0])}).summary()


def test_many_queries_of_many_runs(linear, runs, task):
    queries = {"gone": sf.Remove("label == 1"), "twice": [sf.Repeat([0]), sf.Remove([1])], "short": sf.Truncate(6)}
    forecasts = sf.what_if(linear, runs[4:6], queries, task=task)
    assert len(forecasts) == 6
    assert forecasts.change.shape == (3, 2, 5)
    for number, (name, query) in enumerate(queries.items()):
        for place, run in enumerate(runs[4:6]):
            one = sf.what_if(linear, run, query, task=task)
            assert np.allclose(forecasts.change[number, place], one.change, rtol=1e-9, atol=1e-12)
            again = forecasts[number * 2 + place]
            assert np.array_equal(again.what_if, one.what_if)
            rows = forecasts.frame[(forecasts.frame["query"] == name) & (forecasts.frame["run"] == run.id)]
            assert np.allclose(rows["what_if"], one.what_if[-1])
            assert np.allclose(rows["base"], one.base[-1])
    assert [len(forecast.what_if) for forecast in forecasts] == [11, 11, 11, 11, 7, 7]
    assert forecasts.ranking()["change"].is_monotonic_decreasing
    assert set(forecasts.ranking().index) == set(queries)
    assert "gone: " in forecasts.summary()
    assert forecasts[-1].curriculum == forecasts[5].curriculum
    assert len(forecasts[1:3]) == 2
    with pytest.raises(IndexError):
        forecasts[6]


def test_queries_without_names_are_called_by_what_they_say(linear, runs):
    forecasts = sf.what_if(linear, runs[5], [[sf.Remove([0])], [sf.Repeat([1]), sf.Remove([2])]])
    assert list(forecasts.queries) == [
        "remove examples 0 (1)",
        "show examples 1 (1) 2 times as often and remove examples 2 (1)",
    ]
    several = sf.what_if(linear, runs[4:], sf.Remove([0]))
    assert several.change.shape == (1, 2, 5)


def test_thousands_of_queries_are_one_call(linear, runs):
    rng = np.random.default_rng(0)
    queries = {f"{k}": sf.Remove(rng.choice(12, size=3, replace=False)) for k in range(2000)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamics, "_CHANGES_ENTRIES", 20_000)  # in blocks of test examples
        forecasts = sf.what_if(linear, runs[5], queries)
    assert forecasts.change.shape == (2000, 1, 5)
    edited = [row[0] for row in forecasts.curricula]
    final = linear.simulate(edited, runs[5].initial_losses)[:, -1]
    assert np.allclose(forecasts.what_if[:, 0], final, rtol=1e-9, atol=1e-12)


def test_what_is_said_of_groups_and_ranking(linear, runs, task):
    table = pd.DataFrame({"kind": list("xxyyy"), "base": range(5)})
    test = sf.Examples(list("abcde"), table)
    run = dataclasses.replace(runs[5], test=test)
    forecast = sf.what_if(linear, run, sf.Remove([0, 1]))
    groups = forecast.by_group("kind")
    assert groups.loc["y", "change"] == pytest.approx(forecast.change[2:].mean())
    assert groups["test_examples"].tolist() == [2, 3]
    ranking = forecast.ranking()
    assert list(ranking.index) == list(np.argsort(-np.abs(forecast.change)))
    assert ranking["base_of_example"].loc[3] == 3  # the metadata's own column of that name
    assert f"({ranking['id'].iloc[0]})" in forecast.summary()
    many = sf.what_if(linear, [run], {"two": sf.Remove([0, 1])})
    assert many.by_group("kind").loc["two", "y"] == pytest.approx(groups.loc["y", "change"])
    with pytest.raises(InvalidInput, match="no column 'knd'"):
        forecast.by_group("knd")
    with pytest.raises(InvalidInput, match="no metadata for its test examples"):
        sf.what_if(linear, dataclasses.replace(run, test=None), sf.Remove([0])).by_group("kind")


def test_intervals_come_with_forecasts(runs, task):
    fitted = sf.ConformalSimulator(sf.LinearSimulator(l2=1.0), members=3, folds=2).fit(runs[:4])
    forecast = sf.what_if(fitted, runs[5], sf.Remove([0, 1]), confidence=0.8)
    low, high = fitted.interval([forecast.curriculum], runs[5].initial_losses, 0.8)
    assert np.array_equal(forecast.low, low[0])
    assert np.array_equal(forecast.high, high[0])
    assert list(forecast.frame.columns)[5:] == ["low", "high"]
    assert "interval" in forecast.summary()
    many = sf.what_if(fitted, runs[4:], {"a": sf.Remove([0, 1]), "b": sf.Truncate(4)}, confidence=0.8)
    assert np.array_equal(many.low[0, 1], low[0, -1])
    assert np.array_equal(many.high[0, 1], high[0, -1])
    assert (many.low < many.high).all()
    assert {"low", "high"} <= set(many.frame.columns)
    assert 0 <= forecast.verify(task=task).coverage <= 1


@pytest.mark.filterwarnings("ignore::simfluence.errors.BeyondReferenceWarning")
def test_an_edit_that_changes_the_number_of_steps(linear, runs, task):
    for edit in (sf.Truncate(4), sf.Concatenate([[0, 1, 2], [3]]), sf.Repeat(runs[5].curriculum[0], 4, "repack")):
        forecast = sf.what_if(linear, runs[5], edit, task=task)
        assert len(forecast.what_if) == len(forecast.curriculum) + 1 != 11
        simulated = linear.simulate([forecast.curriculum], runs[5].initial_losses)[0]
        assert np.array_equal(forecast.what_if, simulated)
        assert forecast.base.shape == (11, 5)
        verified = forecast.verify()
        assert len(verified.actual) == len(forecast.what_if)
        assert np.allclose(verified.actual_change, verified.actual[-1] - runs[5].losses[-1])
        frame = verified.frame
        assert len(frame) == 5 * max(11, len(forecast.what_if))
        last = frame[frame["step"] == len(forecast.curriculum)]
        assert np.allclose(last["actual"], verified.actual[-1])
        assert frame["actual_base"].notna().sum() == 55


def test_parquet(linear, runs, tmp_path):
    forecast = sf.what_if(linear, runs[5], sf.Remove([0]))
    forecast.to_parquet(tmp_path / "one.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "one.parquet"), forecast.frame, check_frame_type=False)
    many = sf.what_if(linear, runs, {"one": sf.Remove([0])})
    many.to_parquet(tmp_path / "many.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "many.parquet"), many.frame)


def test_of_examples_that_the_base_never_shows(linear, runs):
    unseen = [i for i in range(12) if i not in runs[5].curriculum.indices]
    assert unseen
    forecast = sf.what_if(linear, runs[5], sf.Remove(unseen))
    assert forecast.changes_nothing
    assert "nothing changes" in str(forecast)
    many = sf.what_if(linear, runs[5], {"none": sf.Remove(unseen)})
    assert (many.change == 0).all()
    assert "none: +0.000 (nothing changes)" in many.summary()
