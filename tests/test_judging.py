from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.stats

import simfluence as sf
from simfluence.errors import InvalidInput
from simfluence.evaluation.groups import Groups, groups_of
from simfluence.evaluation.metrics import harmful_hit_rate


def test_lds_is_the_mean_spearman_over_runs(runs):
    scores = np.random.default_rng(0).normal(size=(5, 12))
    found = sf.lds(scores, runs, bootstrap=200)
    shown = np.array([[i in run.curriculum.indices for i in range(12)] for run in runs])
    predicted = np.array([[-scores[z, shown[r]].sum() for z in range(5)] for r in range(6)])
    each = [scipy.stats.spearmanr(predicted[:, z], runs.losses[:, -1, z])[0] for z in range(5)]
    assert found.value == pytest.approx(np.mean(each))
    assert found.low <= found.value <= found.high
    assert (found.runs, found.test_examples) == (6, 5)
    assert sf.lds(3.0 * scores, runs, bootstrap=200) == found  # any unit
    assert sf.lds(-scores, runs).value == pytest.approx(-found.value)
    assert str(found).startswith(f"{found.value:.3f} [")


def test_lds_refuses(runs):
    for bad in (np.zeros((5, 11)), np.full((5, 12), np.inf)):
        with pytest.raises(InvalidInput, match=r"scores must be|NaN or infinite"):
            sf.lds(bad, runs)
    with pytest.raises(InvalidInput, match="2 runs are too few"):
        sf.lds(np.zeros((5, 12)), runs[:2])
    same = sf.Runs.from_arrays([runs[0].curriculum] * 3, np.random.default_rng(0).normal(size=(3, 11, 5)))
    with pytest.raises(InvalidInput, match="all runs show the same"):
        sf.lds(np.zeros((5, 12)), same)


def test_brittleness_retrains_without_the_most_helpful(task, runs, tmp_path, monkeypatch):
    run = runs[0]
    scores = np.random.default_rng(3).normal(size=(5, 12))
    table = sf.brittleness(scores, task, run, k=[1, 2], test=[0, 3], store=tmp_path / "store")
    shown = np.unique(run.curriculum.indices)
    for k in (1, 2):
        rises = []
        for z in (0, 3):
            best = sorted(shown, key=lambda i: -scores[z, i])[:k]
            edited = sf.Remove([int(i) for i in best]).apply(run.curriculum)
            rises.append(sf.record(task, run.recipe, [edited])[0].losses[-1, z] - run.losses[-1, z])
        assert table.loc[k, "rise"] == pytest.approx(np.mean(rises), abs=1e-5)
        assert table.loc[k, "rise_se"] == pytest.approx(np.std(rises, ddof=1) / np.sqrt(2), abs=1e-5)
    assert table["test_examples"].tolist() == [2, 2]
    monkeypatch.setattr("simfluence.recording.session._Session._record", None)  # nothing is trained again
    again = sf.brittleness(scores, task, run, k=[1, 2], test=[0, 3], store=tmp_path / "store")
    pd.testing.assert_frame_equal(again, table)


def test_brittleness_refuses(task, runs):
    for k in ([0], [6]):
        with pytest.raises(InvalidInput, match=r"the run shows 6 examples|k\[0\] must be at least 1"):
            sf.brittleness(np.zeros((5, 12)), task, runs[0], k=k)
    digits = sf.tasks.digits(n_train=12, n_test=5)
    with pytest.raises(InvalidInput, match="another task"):
        sf.brittleness(np.zeros((5, 12)), digits, runs[0])


def test_agreement():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(4, 9))
    scores = truth / 2 + 0.3 * rng.normal(size=(4, 9))
    found = sf.agreement(scores, truth)
    assert found["pearson"] == pytest.approx(
        np.mean([np.corrcoef(*pair)[0, 1] for pair in zip(scores, truth, strict=True)])
    )
    ranks = [scipy.stats.spearmanr(*pair)[0] for pair in zip(scores, truth, strict=True)]
    assert found["spearman"] == pytest.approx(np.mean(ranks))
    assert found["pooled"] == pytest.approx(np.corrcoef(scores.ravel(), truth.ravel())[0, 1])
    assert sf.agreement(truth / 2, truth)["size"] == pytest.approx(2)
    with pytest.raises(InvalidInput, match="scores must be"):
        sf.agreement(scores[:3], truth)
    with pytest.raises(InvalidInput, match="3 training examples or more"):
        sf.agreement(scores[:, :2], truth[:, :2])


def test_agreement_beside_the_same_class():
    rng = np.random.default_rng(0)
    train, test = rng.integers(3, size=30), np.array([0, 1, 2, 2])
    groups = Groups("label", test, train)
    same = test[:, None] == train
    truth = same + 0.1 * rng.normal(size=(4, 30))
    scores = same + 0.1 * rng.normal(size=(4, 30))
    found = sf.agreement(scores, truth, groups=groups)
    alone = np.mean([np.corrcoef(*pair)[0, 1] for pair in zip(same, truth, strict=True)])
    rest = []
    for values in (scores, truth):
        means = np.stack([values[:, train == label].mean(1) for label in range(3)], 1)  # [test, 3]
        rest.append(values - means[:, train])
    within = np.mean([np.corrcoef(*pair)[0, 1] for pair in zip(*rest, strict=True)])
    assert found["same_group"] == pytest.approx(alone)
    assert found["within"] == pytest.approx(within)
    assert found["pearson"] > 0.9
    assert abs(found["within"]) < 0.4  # the scores know the classes and nothing more
    assert sf.agreement(groups.same, truth)["pearson"] == pytest.approx(alone)
    assert np.isnan(sf.agreement(groups.same, truth, groups=groups)["within"])
    assert found["harmful"] == harmful_hit_rate(scores, truth)
    assert sf.agreement(truth, truth, groups=groups)[["within", "harmful"]].tolist() == pytest.approx([1, 1])
    with pytest.raises(InvalidInput, match=r"groups are of \[test, train\] \[4, 29\]"):
        sf.agreement(scores, truth, groups=Groups("label", test, train[1:]))
    with pytest.raises(InvalidInput, match="of the training examples is not known"):
        sf.agreement(scores, truth, groups=Groups("label", test))


def test_groups_are_labels_or_classes():
    def examples(values, targets=None, name="label"):
        return sf.Examples.numbered(3, None if values is None else pd.DataFrame({name: values}), targets=targets)

    pairs = [(["x", "y", "x"], ["y", "y", "z"]), ([1, 2, 1], [2.0, 2.0, None]), ([[1], [2], [1]], [[2], [2], [3]])]
    for train, test in pairs:
        found = groups_of(examples(train), examples(test))
        assert found.name == "label"
        assert found.same.tolist() == [[False, True, False], [False, True, False], [False] * 3]
    classes, numbers = np.array([0, 1, 0]), np.array([0.0, 1.0, 0.0])
    assert groups_of(examples(None, classes), examples(None, classes)).same[0].tolist() == [True, False, True]
    assert groups_of(examples(None, numbers), examples(None, numbers)) is None
    assert groups_of(None, None) is None
    named = groups_of(examples([1, 2, 3]), examples(["a", "a", "b"], name="source"), "source")
    assert (named.name, named.test.tolist(), named.train) == ("source", [0, 0, 1], None)
    with pytest.raises(InvalidInput, match="no column 'sauce'"):
        groups_of(None, examples([1, 2, 3]), "sauce")
