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
    with pytest.raises(FilterError, match=r"matches none of 3 examples\. Columns: id \(x, y, z\); label \(3, 1\)"):
        examples.select("label == 7")


def test_bad_tables():
    with pytest.raises(InvalidInput, match="'a' stands twice"):
        sf.Examples(["a", "a"])
    with pytest.raises(InvalidInput, match="2 ids, but 1 rows"):
        sf.Examples(["a", "b"], pd.DataFrame({"x": [1]}))
    with pytest.raises(InvalidInput, match="column 'id'"):
        sf.Examples(["a"], pd.DataFrame({"id": [1]}))
