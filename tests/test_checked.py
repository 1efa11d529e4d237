"""Arguments checked against annotations: what passes, what is converted, and what a refusal says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import pytest
import torch
from annotated_types import Ge, Interval
from jaxtyping import Float

import simfluence as sf
from simfluence._internal.checked import checked, fitting
from simfluence.errors import InvalidInput

Count = Annotated[int, Ge(1)]
Share = Annotated[float, Interval(gt=0, lt=1)]


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (np.int64(3), int, 3),
        (np.float32(0.5), float, 0.5),
        (2, float, 2.0),
        (np.bool_(True), bool, True),
        (None, int | None, None),
        ("a", str | Sequence[Any], "a"),
        (np.int8(1), Count, 1),
        (0.5, Share, 0.5),
        ((1, np.int64(2)), Sequence[int], [1, 2]),
        (np.array([1, 2]), Sequence[int], [1, 2]),
        (pd.Series([0.5]), Sequence[float], [0.5]),
        ("b", Literal["a", "b"], "b"),
        ({"a": 1}, Mapping[str, int], {"a": 1}),
        (3, int | float, 3),
        (2.5, int | float, 2.5),
        (len, Callable[..., int], len),
        ([object], Any, [object]),
        (sf.Remove, type[sf.Edit], sf.Remove),
    ],
)
def test_what_passes(value, hint, expected):
    fitted = fitting("value", value, hint)
    assert fitted == expected
    assert type(fitted) is type(expected)


def test_arrays_are_made_of_lists():
    hint = Float[np.ndarray, "test train"]
    assert fitting("scores", [[1, 2]], hint).dtype == np.float64
    array = np.ones((2, 3), np.float32)
    assert fitting("scores", array, hint) is array
    for wrong in ([1, 2], [["a"]], [[1], [1, 2]], None, np.ones((2, 2), bool)):
        with pytest.raises(InvalidInput, match=r"scores must be an array of numbers \[test, train\], got"):
            fitting("scores", wrong, hint)


def test_runs_stay_runs():
    runs = sf.Runs.from_arrays([[[0], [1]]], np.zeros((1, 3, 2)))
    assert fitting("runs", runs, Sequence[sf.Run]) is runs


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        (2.0, int, "k must be a whole number, got 2.0"),
        (True, int, "k must be a whole number, got True"),
        (float("nan"), float, "k must be a number, got nan"),
        ("1", float, "k must be a number, got '1'"),
        (1, bool, "k must be True or False, got 1"),
        (3, str, "k must be a string, got 3"),
        (0, Count, "k must be at least 1, got 0"),
        (1.0, Share, "k must be above 0 and below 1, got 1.0"),
        (0, Count | None, "k must be at least 1, got 0"),
        ([1, 0], Count | Sequence[Count], r"k\[1\] must be at least 1, got 0"),
        ("x", int | None, "k must be a whole number or None, got 'x'"),
        ("ab", Sequence[str], "k must be a sequence of strings, got 'ab'"),
        ([1, "a"], Sequence[int], r"k\[1\] must be a"),
        ("ridge", Literal["a", "rigde"], "k='ridge' is unknown, did you mean 'rigde'"),
        (3, Callable[..., int], "a function"),
        (sf.Shuffle, sf.Edit, r"k must be an Edit, got the class Shuffle: did you mean Shuffle\(…\)\?"),
        (np.ones((5, 3)), sf.Edit, r"got an array \[5, 3\] of float64"),
        (pd.DataFrame({"a": [1]}), str, "a DataFrame of 1"),
        ({1: 2}, Sequence[int], "k must be a sequence of whole numbers"),
        (3, type[sf.Edit], "k must be a class, got 3"),
    ],
)
def test_what_a_refusal_says(value, hint, message):
    with pytest.raises(InvalidInput, match=message):
        fitting("k", value, hint)


@checked
def drawn(edit: sf.Edit, count: Count, *names: str, title: str = "", **sizes: float) -> tuple[Any, ...]:
    """What arrived."""
    return edit, count, names, title, sizes


def test_a_call_is_checked_and_swaps_are_named():
    edit = sf.Shuffle()
    assert drawn(edit, np.int64(2), "a", title="t", width=np.float32(2)) == (edit, 2, ("a",), "t", {"width": 2.0})
    assert drawn.__name__ == "drawn"
    with pytest.raises(InvalidInput, match=r"^drawn: edit must be an Edit, got 2; are edit and count swapped\?$"):
        drawn(2, edit)
    with pytest.raises(InvalidInput, match=r"^drawn: names must be a string, got 3$"):
        drawn(edit, 1, "a", 3)
    with pytest.raises(InvalidInput, match=r"^drawn: width must be a number, got 'wide'$"):
        drawn(edit, 1, width="wide")
    with pytest.raises(TypeError, match="missing a required argument: 'count'"):
        drawn(edit)


def test_an_array_of_one_number_is_no_iterable():
    @checked
    def counted(values: Iterable[int]) -> int:
        return len(list(values))

    assert counted(np.array([3, 4])) == 2
    for single in (np.array(3), torch.tensor(3)):
        with pytest.raises(InvalidInput, match="values must be an iterable"):
            counted(single)
