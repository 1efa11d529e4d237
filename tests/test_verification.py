from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import simfluence as sf
from simfluence.errors import InvalidInput
from simfluence.evaluation.metrics import hit_rate, relative_error, seed_share


@pytest.fixture(scope="module")
def linear(runs):
    return sf.LinearSimulator(l2=1.0).fit(runs[:4])


def test_verify_retrains(linear, runs, task, recipe):
    forecast = sf.what_if(linear, runs[5], sf.Remove(runs[5].curriculum[0]), task=task)
    verified = forecast.verify(recipe)
    truth = sf.record(task, recipe, [forecast.curriculum])[0].losses
    assert np.array_equal(verified.actual, truth)
    assert np.allclose(verified.actual_change, truth[-1] - runs[5].losses[-1])
    assert verified.delta_correlation == pytest.approx(np.corrcoef(forecast.change, verified.actual_change)[0, 1])
    assert verified.final_mse == pytest.approx(np.mean((forecast.what_if[-1] - truth[-1]) ** 2))
    assert list(verified.frame.columns)[5:] == ["actual_base", "actual", "actual_change"]
    row = verified.frame.iloc[-1]
    assert row["actual_change"] == pytest.approx(row["actual"] - row["actual_base"])
    assert row["actual"] == truth[-1, -1]
    assert np.array_equal(forecast.verify().actual, truth)  # the base run knows its recipe


def test_several_simulators_are_judged_by_one_retraining(linear, runs, task):
    other = sf.AdditiveSimulator().fit(runs[:4])
    edit = sf.Remove("label == 1")
    verified = sf.what_if(linear, runs[5], edit, task=task).verify()
    forecast = sf.what_if(other, runs[5], edit, task=task)
    assert forecast.against(verified).actual is verified.actual
    assert forecast.against(verified).final_mse == forecast.verify().final_mse
    for run, question in ((runs[4], edit), (runs[5], sf.Remove([0]))):
        with pytest.raises(InvalidInput, match="verify this one"):
            sf.what_if(other, run, question, task=task).against(verified)
    many = sf.what_if(linear, runs[4:], QUERIES, task=task).verify()
    forecasts = sf.what_if(other, runs[4:], QUERIES, task=task)
    assert forecasts.against(many).table.equals(forecasts.verify().table)
    with pytest.raises(InvalidInput, match="verify these"):
        sf.what_if(other, runs[4:], {"one": edit}, task=task).against(many)


def test_old_columns_warn(linear, runs, task):
    verified = sf.what_if(linear, runs[5], sf.Remove([0]), task=task).verify()
    with pytest.warns(DeprecationWarning, match="'delta' was renamed to 'change'"):
        assert verified.forecast.frame["delta"].equals(verified.forecast.frame["change"])
    with pytest.warns(DeprecationWarning, match="'actual_delta' was renamed"):
        assert verified.frame["actual_delta"].equals(verified.frame["actual_change"])
    assert type(verified.frame[["step", "change"]]) is type(verified.frame.head()) is pd.DataFrame


def test_an_edit_that_changes_nothing_is_confirmed(linear, runs, task):
    unseen = [i for i in range(12) if i not in runs[5].curriculum.indices][:1]
    verified = sf.what_if(linear, runs[5], sf.Remove(unseen), task=task).verify()
    assert (verified.forecast.change == 0).all()
    assert (verified.actual_change == 0).all()
    assert np.isnan(verified.delta_correlation)


QUERIES = {
    "one": sf.Remove("group == 'a'"),
    "label": sf.Remove("label == 1"),
    "longer": sf.Concatenate([[0, 1, 2], [3]]),
}


def test_many_are_retrained_like_one(linear, runs, task):
    forecasts = sf.what_if(linear, runs[4:], QUERIES, task=task)
    verified = forecasts.verify()
    assert verified.final.shape == (3, 2, 5)
    assert len(verified) == 6
    for number, forecast in enumerate(forecasts):
        one = forecast.verify()
        again = verified[number]
        assert np.allclose(again.actual, one.actual, atol=1e-6)
        assert np.allclose(verified.actual_change.reshape(6, 5)[number], one.actual_change, atol=1e-6)
    change, actual = forecasts.change, verified.actual_change
    table = verified.table
    assert list(table.index) == [*QUERIES, "all"]
    assert table.loc["label", "relative_error"] == pytest.approx(
        ((change - actual)[1] ** 2).sum() / (actual[1] ** 2).sum()
    )
    assert table.loc["all", "relative_error"] == pytest.approx(((change - actual) ** 2).sum() / (actual**2).sum())
    pairs = [np.corrcoef(change[1, run], actual[1, run])[0, 1] for run in range(2)]
    assert table.loc["label", "delta_correlation"] == pytest.approx(np.mean(pairs))
    assert table.loc["one", "retrained"] == pytest.approx(actual[0].mean())
    assert table["seed_share"].isna().all()
    assert np.allclose(verified.frame["actual_change"], actual.ravel())
    assert "delta correlation" in verified.summary()
    assert [len(each.actual) for each in verified[4:]] == [13, 13]


def test_asking_twice_trains_nothing(linear, runs, task, tmp_path, monkeypatch):
    forecasts = sf.what_if(linear, runs[4:], QUERIES, task=task)
    first = forecasts.verify(store=tmp_path / "store", seeds=2)
    assert len(sf.RunStore(tmp_path / "store").ids()) == 2 * 6 + 2  # every query; the bases under the other seed
    assert len(sf.RunStore(tmp_path / "store").load()) == 0  # marked as verifications

    def trained(*_):
        raise AssertionError("it trained")

    monkeypatch.setattr("simfluence.recording.session._Session._record", trained)
    again = forecasts.verify(store=tmp_path / "store", seeds=2)
    assert np.array_equal(first.final, again.final)
    assert np.array_equal(first.seed_changes, again.seed_changes)
    with pytest.raises(AssertionError, match="it trained"):
        forecasts.verify(store=tmp_path / "store", seeds=3)


def test_how_much_is_the_seeds(linear, runs, task, recipe):
    forecast = sf.what_if(linear, runs[5], sf.Remove("label == 1"), task=task)
    verified = forecast.verify(seeds=3)
    expected = []
    for seed in range(3):
        other = recipe.replace(seed=seed)
        base, edited = sf.record(task, other, [runs[5].curriculum, forecast.curriculum])
        expected.append(edited.losses[-1] - base.losses[-1])
    assert np.allclose(verified.seed_changes, expected, atol=1e-5)
    share = np.var(expected, axis=0, ddof=1).mean() / np.mean(np.square(expected))
    assert verified.seed_share == pytest.approx(share, rel=1e-3)
    assert 0 < verified.seed_share < 1.5
    assert f"{verified.seed_share:.1%} of the change is the seed's (3 seeds)" in verified.summary()
    many = sf.what_if(linear, runs[5], {"a": sf.Remove("label == 1")}, task=task).verify(seeds=3)
    assert many.table.loc["a", "seed_share"] == pytest.approx(share, rel=1e-3)
    assert many[0].seed_share == pytest.approx(share, rel=1e-3)


def test_metrics():
    actual = np.array([3.0, 0.0, -2.0, 0.1])
    assert relative_error(actual, actual) == 0
    assert relative_error(np.zeros(4), actual) == 1
    assert np.isnan(relative_error(actual, np.zeros(4)))
    assert hit_rate(np.array([1.0, 0.9, 0.0, 0.0]), actual, 2) == 0.5
    assert hit_rate(np.array([1.0, 0.0, -0.2, 0.0]), actual, 2) == 1
    assert hit_rate(actual, actual, 99) == 1
    assert np.isnan(hit_rate(np.zeros(4), actual))
    assert seed_share(np.array([[1.0, 2.0], [1.0, 2.0]])) == 0
    assert seed_share(np.array([[1.0], [-1.0]])) == 2  # nothing but noise
    assert np.isnan(seed_share(np.zeros((2, 3))))


def test_bad_verifications(linear, runs, task):
    forecast = sf.what_if(linear, runs[5], sf.Remove([0]))
    with pytest.raises(InvalidInput, match="pass task="):
        forecast.verify()
    with pytest.raises(InvalidInput, match="another task than 'digits'"):
        forecast.verify(task=sf.tasks.digits(n_train=12, n_test=5))
    with pytest.raises(InvalidInput, match="trained by another recipe"):
        forecast.verify(sf.Recipe(lr=9.0), task=task)
    with pytest.raises(InvalidInput, match="seeds must be at least 1"):
        forecast.verify(task=task, seeds=0)
    bare = sf.Runs.from_arrays(runs.curricula, runs.losses)[0]
    with pytest.raises(InvalidInput, match="pass recipe="):
        sf.what_if(linear, bare, sf.Remove([0])).verify(task=task)
