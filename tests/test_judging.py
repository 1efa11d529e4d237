from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.stats

import simfluence as sf
from simfluence.errors import InvalidInput


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
