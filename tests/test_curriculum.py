from __future__ import annotations

import pickle

import numpy as np
import pytest
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
        ([[0], [-1]], "batch 1 names training example -1"),
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


@pytest.mark.parametrize("subset", [0, 0.0, 1.5, 11, -1, float("nan")])
def test_bad_subset(subset):
    with pytest.raises(InvalidInput, match="fraction"):
        sf.random_curricula(n_train=10, runs=1, steps=1, batch_size=1, subset=subset)


def test_bad_sizes_are_all_named():
    with pytest.raises(InvalidInput, match="runs=0, steps=-1"):
        sf.random_curricula(n_train=10, runs=0, steps=-1, batch_size=1)


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
        ({"stages": [[0], []]}, "expected"),
        ({"stages": [[0]] * 4}, "4 stages for 3 steps"),
        ({"stages": [[0]], "subset": 1, "seed": 1}, "stage 0 has no example in the subset of run"),
    ],
)
def test_bad_orders(arguments, said):
    with pytest.raises(InvalidInput, match=said):
        sf.random_curricula(**({"n_train": 10, "runs": 9, "steps": 3, "batch_size": 2} | arguments))
