from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pandas as pd
import pytest

import simfluence as sf
from simfluence.errors import InvalidInput
from simfluence.evaluation.metrics import hit_rate, relative_error, seed_share, within_correlation
from simfluence.queries.tables import taken_by

#: One of the queries is longer than the fitting runs.
pytestmark = pytest.mark.filterwarnings("ignore::simfluence.errors.BeyondReferenceWarning")


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


def test_what_an_edit_takes():
    base = sf.Curriculum([[0, 1], [2, 0], [1, 3]], n_train=5)
    cases = [
        (sf.Remove([0]), [2, 0, 0, 0, 0]),
        (sf.Remove([0, 3], "repack"), [2, 0, 0, 1, 0]),
        (sf.Repeat([2], 3), [0, 0, -2, 0, 0]),
        (sf.Swap([3], by=[2]), [0, 0, -1, 1, 0]),
        (sf.Truncate(1), [1, 1, 1, 1, 0]),
        (sf.Move([1], to=0), [0, 2, 0, 0, 0]),  # no showing less, but one two steps earlier
        (sf.Reorder([3]), [-1, -1, 0, 2, 0]),  # [3, 0], [1, 2], [0, 1]
        (sf.Reorder([0]), [1, -1, 0, 0, 0]),  # [0, 0], [1, 2], [1, 3]
        (sf.Remove([4]), [0, 0, 0, 0, 0]),
    ]
    for edit, expected in cases:
        assert taken_by(edit.apply(base), base).tolist() == expected, edit


LABELS = np.array([0, 1, 1, 0, 2])


def labelled(runs, name="label"):
    """The runs, with labels of their test examples: five of one class have no groups."""
    test = sf.Examples.numbered(5, pd.DataFrame({name: LABELS}))
    return [dataclasses.replace(run, test=test) for run in runs]


def test_beside_a_delta_correlation_stands_what_the_label_alone_has(linear, runs, task):
    (run,) = labelled(runs[5:])
    verified = sf.what_if(linear, run, sf.Remove("label == 1"), task=task).verify()
    labels, actual = LABELS, verified.actual_change
    alone = abs(np.corrcoef(labels == 1, actual)[0, 1])
    rest = [change - np.array([change[labels == label].mean() for label in labels]) for change in (
        verified.forecast.change, actual)]  # fmt: skip
    within = np.corrcoef(*rest)[0, 1]
    assert verified.group_correlation == pytest.approx(alone)
    assert verified.within_correlation == pytest.approx(within)
    said = f"(the edited label alone has {alone:.3f}, within each label {within:.3f})"
    assert said in verified.summary()
    assert said in verified._repr_html_()
    bare = dataclasses.replace(verified, groups=None)
    assert np.isnan([bare.group_correlation, bare.within_correlation]).all()
    assert "alone" not in bare.summary()


def test_groups_of_a_column_and_of_many_queries(linear, runs, task):
    verified = sf.what_if(linear, labelled(runs[4:]), QUERIES, task=task).verify()
    for number, name in enumerate(QUERIES):
        pair = [verified[2 * number], verified[2 * number + 1]]
        for column in ("group_correlation", "within_correlation"):
            assert verified.table.loc[name, column] == pytest.approx(np.mean([getattr(each, column) for each in pair]))
    every = [within_correlation(each.forecast.change, each.actual_change, each.groups.test) for each in verified]
    assert verified.table.loc["all", "within_correlation"] == pytest.approx(np.mean(every))
    assert f"within each label {np.mean(every):.3f})" in verified.summary()
    named = sf.what_if(linear, labelled(runs[4:], "kind"), QUERIES, task=task).verify(group="kind")
    assert named.table.loc["all", "within_correlation"] == pytest.approx(np.mean(every))
    assert named.table["group_correlation"].isna().all()  # of which kind training examples are is not known
    with pytest.raises(InvalidInput, match="no column 'kin'"):
        named.forecasts.verify(group="kin")
    with pytest.raises(InvalidInput, match="no column 'kin'"):
        named.forecasts[0].verify(group="kin")


def test_when_the_simulator_pays_off(linear, runs, task):
    forecast = sf.what_if(linear, runs[5], sf.Remove([0]), task=task)
    assert 0 < forecast.simulate_seconds < 10
    timed = dataclasses.replace(forecast, simulate_seconds=0.5, fit_seconds=3.0)
    assert timed.break_even(retrain_seconds=2.0) == 2
    assert timed.break_even(retrain_seconds=0.1) == np.inf
    forecasts = sf.what_if(linear, runs[4:], QUERIES, task=task)
    fitted = copy.copy(linear)
    fitted.fit_seconds_ = 3.0
    many = dataclasses.replace(forecasts, simulator=fitted, simulate_seconds=0.5)
    assert many.fit_seconds == 3
    assert many[0].fit_seconds == 3
    assert many.break_even(retrain_seconds=2.0) == 2
    assert np.isnan(dataclasses.replace(many, simulate_seconds=None).break_even(2.0))


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
