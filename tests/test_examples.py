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


NUMBERED = sf.Examples([3, 1, 2, 0, 4], pd.DataFrame({"source": list("aabbc")}))


def test_numbers_that_are_ids_are_not_taken_for_rows():
    """Bare numbers are refused where ids are numbers in another order, or are not 0 to n − 1."""
    for examples in (NUMBERED, sf.Examples([10, 11]), sf.Examples(["1", "2", "3"]), sf.Examples([-1, 0])):
        with pytest.raises(InvalidInput, match=r"write ids=\[…\] or rows=\[…\]"):
            examples.select([1])
        assert examples.select(rows=[1]).tolist() == [1]
        assert examples.select(ids=[examples.ids[1]]).tolist() == [1]
        assert examples.select(ids=[int(examples.ids[1])]).tolist() == [1]
    assert NUMBERED.select(["3", "0"]).tolist() == [0, 3]  # text is always an id
    for plain in (sf.Examples.numbered(3), sf.Examples(["a", "1", "2"])):
        assert plain.select([1]).tolist() == [1]


def test_masks_and_pandas_are_targets():
    mask = NUMBERED.table["source"] == "a"
    for target in (mask, mask.to_numpy(), mask.tolist(), mask.set_axis(list("vwxyz"))):
        assert NUMBERED.select(target).tolist() == [0, 1]
    plain = sf.Examples(list("abc"))
    for target in (pd.Series([2, 0]), pd.Index([2, 0]), np.array([2, 0], np.uint8), (2, 0), pd.Series(["c", "a"])):
        assert plain.select(target).tolist() == [2, 0]
    for wrong, message in (
        ([True, False], "2 entries for 3 examples"), ([False] * 3, "selects none"),
        ([1.5], "must be a filter"), ({"row": [1]}, "rows: "), ({"rows": ["a"]}, "rows must be whole numbers"),
        ({"ids": mask}, "not a mask"), ([0, "a"], "expected a filter"), ([[0]], "must be a filter"),
    ):  # fmt: skip
        with pytest.raises(InvalidInput, match=message):
            plain.select(wrong)
    with pytest.raises(InvalidInput, match="give one of target, rows= and ids=, got target and rows"):
        plain.select([0], rows=[1])
    with pytest.raises(InvalidInput, match="got none"):
        plain.select()


def test_columns_that_no_table_should_have():
    table = pd.DataFrame([[1, 2]], columns=["a", "a"])
    for metadata, message in (
        (table, "several columns called 'a'"), (pd.DataFrame({0: [1], "0": [2]}), "several columns called '0'"),
        (pd.DataFrame([[1]], columns=pd.MultiIndex.from_tuples([("a", "b")])), "several levels"),
        (pd.DataFrame({"z": [1j]}), "complex numbers"),
    ):  # fmt: skip
        with pytest.raises(InvalidInput, match=message):
            sf.Examples(["x"], metadata)
    assert sf.Examples(["x"], pd.DataFrame({0: [1]})).select("`0` == 1").tolist() == [0]
