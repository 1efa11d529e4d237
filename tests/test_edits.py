from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import simfluence as sf
from simfluence.edits import apply_all
from simfluence.errors import FilterError, InvalidInput

EXAMPLES = sf.Examples(list("abcdefghij"), pd.DataFrame({"label": np.arange(10) % 3}))
curricula = (
    st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=8)
    .filter(any)
    .map(lambda batches: sf.Curriculum(batches, n_train=10))
)
targets = st.lists(st.integers(0, 9), min_size=1, max_size=5, unique=True)


@given(curricula, targets)
def test_remove(curriculum, target):
    expected = [[i for i in batch if i not in target] for batch in curriculum.tolist()]
    if not any(expected):
        with pytest.raises(InvalidInput, match="would leave no example"):
            sf.Remove(target).apply(curriculum)
        return
    assert sf.Remove(target).apply(curriculum).tolist() == expected


@given(curricula, targets, st.integers(1, 4))
def test_repeat(curriculum, target, times):
    expected = [[i for i in batch for _ in range(times if i in target else 1)] for batch in curriculum.tolist()]
    assert sf.Repeat(target, times).apply(curriculum).tolist() == expected


@given(curricula, targets, targets)
def test_reorder(curriculum, first, then):
    then = [i for i in then if i not in first]
    edited = sf.Reorder(first, then or None).apply(curriculum)
    stream = curriculum.indices.tolist()
    expected = [i for i in stream if i in first] + [i for i in stream if i in then]
    expected += [i for i in stream if i not in first and i not in then]
    assert edited.indices.tolist() == expected
    assert edited.sizes.tolist() == curriculum.sizes.tolist()


@given(curricula, targets)
def test_the_original_stays_and_indices_stay_in_range(curriculum, target):
    before = curriculum.tolist()
    for edit in (sf.Repeat(target), sf.Reorder(target)):
        edited = edit.apply(curriculum)
        assert edited.n_train == 10
        assert len(edited) == len(curriculum)
    assert curriculum.tolist() == before


def test_targets_by_filter_id_and_index():
    curriculum = sf.Curriculum([[0, 1, 2], [3, 4, 5]], n_train=10)
    for target in ("label == 0", ["a", "d", "g", "j"], [0, 3, 6, 9], np.array([0, 3, 6, 9])):
        assert sf.Remove(target).apply(curriculum, EXAMPLES).tolist() == [[1, 2], [4, 5]]


def test_edits_compose_in_order():
    curriculum = sf.Curriculum([[0, 1], [2, 0]], n_train=10)
    edits = [sf.Reorder([2]), sf.Remove([0]), sf.Repeat([1], 3)]
    assert apply_all(edits, curriculum).tolist() == [[2], [1, 1, 1]]


def test_sentences():
    assert str(sf.Remove("label == 3")) == "remove examples where label == 3"
    assert str(sf.Repeat([1, 2], 10)) == "show examples 1, 2 (2) 10 times as often"
    assert (
        str(sf.Reorder("label < 5", "label >= 5"))
        == "show examples where label < 5 first, then examples where label >= 5"
    )


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (sf.Remove([10]), "no example 10"),
        (sf.Remove([-1]), "no example -1"),
        (sf.Remove(["z"]), "no example 'z'"),
        (sf.Remove("label == 7"), "matches none"),
        (sf.Remove("lable == 1"), "did you mean 'label'"),
        (sf.Remove(list(range(10))), "would leave no example"),
        (sf.Reorder([0], [0, 1]), "example 0 is in both targets"),
    ],
)
def test_bad_edits(edit, said):
    with pytest.raises(InvalidInput, match=said):
        edit.apply(sf.Curriculum([[0, 1, 2]], n_train=10), EXAMPLES)


def test_repeat_zero_times():
    with pytest.raises(InvalidInput, match="times must be 1 or more"):
        sf.Repeat([0], 0)


def test_metadata_must_be_there_and_fit():
    curriculum = sf.Curriculum([[0, 1]], n_train=2)
    for target in ("label == 0", ["a"]):
        with pytest.raises(InvalidInput, match="give the training examples"):
            sf.Remove(target).apply(curriculum)
    with pytest.raises(InvalidInput, match="metadata of 10"):
        sf.Remove([0]).apply(curriculum, EXAMPLES)
    with pytest.raises(FilterError):
        sf.Remove("label.max()").apply(sf.Curriculum([[0]], n_train=10), EXAMPLES)
