from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import simfluence as sf
from simfluence.errors import FilterError, InvalidInput


@pytest.fixture
def examples():
    return sf.Examples(["x", "y", "z"], pd.DataFrame({"label": [3, 1, 3]}, index=[9, 9, 9]))


def test_select(examples):
    assert examples.select("label == 3").tolist() == [0, 2]
    assert examples.select([2, 0]).tolist() == [2, 0]
    assert examples.select(np.array([1])).tolist() == [1]
    assert examples.select(["z", "x"]).tolist() == [2, 0]
    assert examples.select("id == 'y'").tolist() == [1]
    assert len(examples) == 3
    assert examples.ids == ["x", "y", "z"]


def test_numbered():
    assert sf.Examples.numbered(2).ids == ["0", "1"]


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ([3], "indices go from 0 to 2"),
        ([-1], "no example -1"),
        (["w"], "no example 'w'"),
        ([], "expected"),
        ([0.5], "expected"),
    ],
)
def test_bad_target(examples, target, said):
    with pytest.raises(InvalidInput, match=said):
        examples.select(target)


def test_a_filter_that_matches_nothing_shows_columns_and_values(examples):
    with pytest.raises(FilterError, match=r"matches none of the 3 examples\. Columns: id \(x, y, z\); label \(3, 1\)"):
        examples.select("label == 7")


def test_bad_tables():
    with pytest.raises(InvalidInput, match="'a' appears twice"):
        sf.Examples(["a", "a"])
    with pytest.raises(InvalidInput, match="2 ids, but 1 rows"):
        sf.Examples(["a", "b"], pd.DataFrame({"x": [1]}))
    with pytest.raises(InvalidInput, match="column 'id'"):
        sf.Examples(["a"], pd.DataFrame({"id": [1]}))


def test_features_and_targets(examples):
    with_both = examples.with_features([[1, 2], [3, 4], [5, 6]], [0, 1, 0])
    assert with_both.features.dtype == np.float32
    assert with_both.features.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert with_both.with_features(np.zeros((3, 1))).targets.tolist() == [0, 1, 0]
    assert with_both.table.equals(examples.table)


def test_bad_features(examples):
    with pytest.raises(InvalidInput, match="features have 2 rows for 3 examples"):
        examples.with_features(np.zeros((2, 4)))
    with pytest.raises(InvalidInput, match="features of example 1 are NaN, infinite"):
        examples.with_features([[0.0], [np.nan], [1.0]])
    with pytest.raises(InvalidInput, match="features must be numbers with one row per example"):
        examples.with_features([["a"], ["b"], ["c"]])
    with pytest.raises(InvalidInput, match="targets have 1 rows"):
        examples.with_features(np.zeros((3, 1)), [1])
