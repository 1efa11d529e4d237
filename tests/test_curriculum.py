from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import simfluence as sf
from simfluence.errors import InvalidInput

batches = st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=8).filter(lambda b: any(b))


@given(batches)
def test_holds_what_was_given(given_batches):
    curriculum = sf.Curriculum(given_batches, n_train=10)
    assert curriculum.tolist() == given_batches
    assert [curriculum[t].tolist() for t in range(len(curriculum))] == given_batches
    assert curriculum[-1].tolist() == given_batches[-1]
    assert curriculum.sizes.tolist() == [len(batch) for batch in given_batches]


@given(batches)
def test_counts(given_batches):
    expected = [np.bincount(np.array(batch, int), minlength=10) for batch in given_batches]
    assert np.array_equal(sf.Curriculum(given_batches, n_train=10).counts.toarray(), expected)


@given(batches, batches)
def test_equal_by_content(left, right):
    one, two = sf.Curriculum(left, 10), sf.Curriculum(right, 10)
    assert (one == two) == (left == right)
    assert one == sf.Curriculum(left, 10)
    assert hash(one) == hash(pickle.loads(pickle.dumps(one)))  # noqa: S301 (our own bytes)
    assert one != sf.Curriculum(left, 11)


def test_same_flat_content_in_other_batches_differs():
    assert sf.Curriculum([[0, 1], [2]]) != sf.Curriculum([[0], [1, 2]])


def test_digest_is_the_same_everywhere():
    digest = sf.Curriculum([[0, 2], [], [1]], n_train=3).digest
    assert digest == "dd93ef05c76e3ca3842eabf5d76fb634f7dec5cecf85ee96d10e73c38d571c35"


def test_frozen():
    curriculum = sf.Curriculum([[0, 1]])
    with pytest.raises(ValueError, match="read-only"):
        curriculum[0][0] = 1
    with pytest.raises(AttributeError, match="frozen"):
        curriculum.n_train = 7


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ([], "curriculum is empty"),
        ([[], []], "curriculum is empty"),
        ([[0], [-1]], "batch 1 has -1"),
        ([[0], [], [1, 5]], "batch 2 names training example 5: indices go from 0 to 4"),
        ([[0.5]], "integer"),
        ([["a"]], "integer"),
        ([0, 1], "sequence"),
    ],
)
def test_bad_batches(bad, said):
    with pytest.raises(InvalidInput, match=said):
        sf.Curriculum(bad, n_train=5)


def test_step_out_of_range():
    with pytest.raises(IndexError, match="step 1 is out of range: the curriculum has 1 steps"):
        sf.Curriculum([[0]])[1]


def test_random_curricula_show_a_subset_equally_often():
    for curriculum in sf.random_curricula(n_train=20, runs=5, steps=21, batch_size=4, subset=0.5, seed=3):
        counts = np.bincount(curriculum.indices, minlength=20)
        assert (counts > 0).sum() == 10
        assert set(counts[counts > 0]) == {8, 9}  # 84 slots over 10 examples
        assert set(curriculum.sizes) == {4}


def test_random_curricula_are_reshuffled_every_epoch():
    curriculum = sf.random_curricula(n_train=12, runs=1, steps=6, batch_size=4, seed=0)[0]
    first, second = curriculum.indices[:12], curriculum.indices[12:]
    assert sorted(first) == sorted(second) == list(range(12))
    assert first.tolist() != second.tolist()


def test_random_curricula_depend_on_seed_and_run_alone():
    few = sf.random_curricula(n_train=20, runs=3, steps=5, batch_size=2, seed=4)
    many = sf.random_curricula(n_train=20, runs=8, steps=5, batch_size=2, seed=4)
    assert few == many[:3]
    assert len(set(many)) == 8
    assert few[0] != sf.random_curricula(n_train=20, runs=1, steps=5, batch_size=2, seed=5)[0]


def test_subset_is_a_number_or_a_fraction():
    def seen(subset):
        return len(np.unique(sf.random_curricula(10, 1, 50, 2, subset=subset)[0].indices))

    assert (seen(1), seen(1.0), seen(3), seen(0.3)) == (1, 10, 3, 3)


@pytest.mark.parametrize("subset", [0, 0.0, 1.5, 11, -1])
def test_bad_subset(subset):
    with pytest.raises(InvalidInput, match="fraction"):
        sf.random_curricula(n_train=10, runs=1, steps=1, batch_size=1, subset=subset)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"runs": 0}, "runs must be at least 1, got 0"),
        ({"steps": -1}, "steps must be at least 1, got -1"),
        ({"steps": 2.0}, "steps must be a whole number, got 2.0"),
        ({"batch_size": True}, "batch_size must be a whole number"),
        ({"n_train": 10.5}, "n_train must be a whole number"),
        ({"n_train": 2**31}, "n_train must be at least 1 and at most 2147483647"),
        ({"n_train": float("nan")}, "n_train must be a whole number, got nan"),
        ({"steps": 2**31}, "2,147,483,648 slots"),
        ({"runs": 2**12, "steps": 2**12, "batch_size": 2**12}, "slots, which do not fit into memory"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"seed": 0.5}, "seed must be a whole number"),
        ({"subset": float("nan")}, "subset must be .* got nan"),
        ({"subset": True}, "subset must be .* got True"),
        ({"subset": "0.5"}, "subset must be .* got '0.5'"),
        ({"stages": 3}, "stages must be a sequence"),
        ({"stages": [0, 1]}, "stage 0 must be a sequence"),
        ({"stages": [[0], [True, 2]]}, "stage 1 must be a sequence"),
        ({"stages": [[0.5]]}, "stage 0 must be a sequence"),
        ({"stages": [[0], [2**40]]}, "stage 1 has 1099511627776"),
        ({"stages": [[-1]]}, "stage 0 has -1"),
        ({"stages": [[[0], [1, 2]]]}, "stage 0 must be a sequence"),
    ],
)
def test_bad_numbers_are_named(arguments, said):
    with pytest.raises(InvalidInput, match=said):
        sf.random_curricula(**({"n_train": 10, "runs": 1, "steps": 3, "batch_size": 1} | arguments))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1.0, float("nan"), 2.0], "no value .* for training example 1"),
        ([1, None, 2], "no value .* for training example 1"),
        (pd.Series([1, 2, None], dtype="Int64"), "no value .* for training example 2"),
        (np.array(["2020-01-01", "NaT", "2020-01-02"], "datetime64[D]"), "no value .* for training example 1"),
        ([1, "a", 2], "cannot be sorted .*int, str"),
        (["3", 20, "100"], "cannot be sorted"),
        ([1j, 2j, 3j], "complex"),
        ([[1], [2], [3]], "cannot be sorted"),
        (np.ones((3, 1)), "sort_by must be a list or an array"),
        ("abc", "sort_by must be a list or an array"),
        ({"a": 1, "b": 2, "c": 3}, "sort_by must be a list or an array"),
        (5, "sort_by must be a list or an array"),
    ],
)
def test_values_that_have_no_order(values, said):
    with pytest.raises(InvalidInput, match=said):
        sf.random_curricula(3, 1, 1, 3, sort_by=values)


@pytest.mark.parametrize(
    "values",
    [
        [30, 10, 20],
        (2**63 + 2, 2**63, 2**63 + 1),
        np.array([3, 1, 2], ">f4"),
        np.array([3, 1, 2], np.uint8)[::-1][::-1],
        pd.Series([3, 1, 2], index=[2, 1, 0], dtype="Int64"),
        pd.Series(pd.Categorical(["high", "low", "mid"], ["low", "mid", "high"], ordered=True)),
        pd.to_datetime(["2020-03-01", "2020-01-01", "2020-02-01"]),
        torch.tensor([3.0, 1.0, 2.0]),
        [float("inf"), -float("inf"), 0.0],
    ],
)
def test_values_of_any_kind_that_has_an_order(values):
    assert sf.random_curricula(3, 1, 1, 3, sort_by=values)[0].tolist() == [[1, 2, 0]]


@pytest.mark.parametrize(
    ("batches", "n_train", "said"),
    [
        ([[2**33]], 2**40, "n_train must be at least 1 and at most 2147483647"),
        ([[2**33]], None, "batch 0 has 8589934592"),
        ([[0], [2**70]], None, "batch 1 must be a sequence"),
        (np.array([[2**63]], np.uint64), None, "batch 0 has 9223372036854775808"),
        ([[0]], 3.7, "n_train must be a whole number"),
        ([[0]], 3.0, "n_train must be a whole number"),
        ([[0]], True, "n_train must be a whole number"),
        ([[0]], float("nan"), "n_train must be a whole number"),
        ([[0]], 0, "n_train must be at least 1"),
        ([[True, False]], 3, "batch 0 must be a sequence"),
        ([[0, True]], 3, "batch 0 must be a sequence"),
        ([[0.0, 1.0]], 3, "batch 0 must be a sequence"),
        ([[float("nan")]], 3, "batch 0 must be a sequence"),
        ([[[0], [1, 2]]], 3, "batch 0 must be a sequence"),
        ([[[]]], 3, "batch 0 must be a sequence"),
        ([{0, 1}], 3, "batch 0 must be a sequence"),
        ([None], 3, "batch 0 must be a sequence"),
        ("01", 3, "batches must be an iterable"),
        (None, 3, "batches must be an iterable"),
        (np.zeros((2, 2)), 3, "batch 0 must be a sequence"),
    ],
)
def test_batches_that_are_none(batches, n_train, said):
    with pytest.raises(InvalidInput, match=said):
        sf.Curriculum(batches, n_train)


@pytest.mark.parametrize(
    "batches",
    [
        np.array([[0, 2], [1, 2]], np.uint64),
        np.array([[0, 2], [1, 2]], ">i4"),
        np.array([[2, 0], [2, 1]], np.int8)[:, ::-1],
        [np.array([0, 2], np.uint64), np.array([1, 2], np.int64)],
        torch.tensor([[0, 2], [1, 2]]),
        pd.Series([[0, 2], [1, 2]], index=[5, 3]),
        (batch for batch in ([0, 2], range(1, 3))),
    ],
)
def test_whole_numbers_of_any_type(batches):
    assert sf.Curriculum(batches, n_train=np.int64(4)) == sf.Curriculum([[0, 2], [1, 2]], n_train=4)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.uint64, ">i2"])
def test_flat_curricula_of_any_integers(dtype):
    flat = sf.Curriculum.from_flat(np.array([0, 2, 1], dtype), np.array([2, 0, 1], dtype), 3)
    assert flat == sf.Curriculum([[0, 2], [], [1]], n_train=3)
    assert flat.indices.dtype == np.int32


@pytest.mark.parametrize(
    ("indices", "sizes", "n_train", "said"),
    [
        ([0, 1], [1.0, 1.0], 3, "sizes must be a sequence"),
        ([0, 1], [1.5, 1], 3, "sizes must be a sequence"),
        ([0.0, 1.0], [1, 1], 3, "indices must be a sequence"),
        ([[0], [1]], [1, 1], 3, "indices must be a sequence"),
        ([0, 1], [3, -1], 3, "sizes has -1"),
        ([0, 1], [2**62, 2**62, 2**62, 2**62, 2], 3, "do not add up"),
        ([0, 1], [1], 3, "do not add up"),
        ([0, 2**32], [1, 1], 3, "indices has 4294967296"),
        ([0, 3], [1, 1], 3, "batch 1 names training example 3"),
        ([0, 1], [1, 1], 2**31, "n_train must be"),
        ([0, 1], [1, 1], None, "n_train must be"),
    ],
)
def test_bad_flat_curricula(indices, sizes, n_train, said):
    with pytest.raises(InvalidInput, match=said):
        sf.Curriculum.from_flat(np.array(indices), np.array(sizes), n_train)


def test_with_replacement():
    curriculum = sf.random_curricula(20, 1, 400, 5, subset=0.5, replacement=True)[0]
    counts = np.bincount(curriculum.indices, minlength=20)
    assert (counts > 0).sum() == 10
    assert counts[counts > 0].std() > 5  # an epoch would show each equally often


def test_sorted_epochs():
    values = np.array([3, 1, 2, 1, 3, 2, 0, 0])
    for sign, descending in ((1, False), (-1, True)):
        curriculum = sf.random_curricula(8, 1, 6, 4, sort_by=values, descending=descending)[0]
        epochs = curriculum.indices.reshape(3, 8)
        assert (np.diff(sign * values[epochs], axis=1) >= 0).all()
        assert len({tuple(epoch) for epoch in epochs}) > 1  # equal ones are shuffled
        assert [sorted(epoch) for epoch in epochs] == [list(range(8))] * 3
    words = sf.random_curricula(3, 1, 1, 3, sort_by=["pear", "apple", "fig"])[0]
    assert words.tolist() == [[1, 2, 0]]


def test_stages_share_the_steps():
    curriculum = sf.random_curricula(9, 1, 7, 2, stages=[[0, 1, 2], [3, 4, 5], [6, 7]])[0]
    stage_of = np.array([0, 0, 0, 1, 1, 1, 2, 2, 9])
    assert [set(stage_of[batch]) for batch in curriculum] == [{0}] * 3 + [{1}] * 2 + [{2}] * 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"sort_by": [1, 2]}, "one value for each of 10"),
        ({"sort_by": range(10), "replacement": True}, "choose one"),
        ({"stages": []}, "0 stages for 3 steps"),
        ({"stages": [[0], [10]]}, "no example 10"),
        ({"stages": [[0], []]}, "stage 1 has no example"),
        ({"stages": [[0]] * 4}, "4 stages for 3 steps"),
        ({"stages": [[0]], "subset": 1, "seed": 1}, "stage 0 has no example in the subset of run"),
    ],
)
def test_bad_orders(arguments, said):
    with pytest.raises(InvalidInput, match=said):
        sf.random_curricula(**({"n_train": 10, "runs": 9, "steps": 3, "batch_size": 2} | arguments))
