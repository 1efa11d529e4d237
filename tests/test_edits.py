from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import simfluence as sf
from simfluence.edits import FILLS, Edit, apply_all
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


fills = st.sampled_from(FILLS)
seeds = st.integers(0, 3)


def build(kind, *parts):
    return st.tuples(st.just(kind), *parts)


arguments = st.one_of(  # built in the tests: the type checker draws at random, which strategies must not
    build(sf.Remove, targets, fills, seeds),
    build(sf.Keep, targets, fills, seeds),
    build(sf.Repeat, targets, st.integers(1, 4), fills, seeds),
    build(sf.Insert, targets, st.integers(-8, 8), fills, seeds),
    build(sf.Move, targets, st.integers(-8, 8), st.sampled_from(FILLS[:2])),
    build(sf.Reorder, targets, st.none() | targets),
    build(sf.Swap, targets, targets),
    build(sf.Shuffle, seeds),
    build(sf.Truncate, st.integers(1, 9)),
    build(sf.Concatenate, st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), min_size=1, max_size=3)),
)


def applied(edit, curriculum):
    """None where the edit is refused."""
    try:
        return edit.apply(curriculum)
    except InvalidInput:
        return None


def without(curriculum, target):
    return [index for index in curriculum.indices.tolist() if index not in target]


@given(curricula, st.lists(arguments, min_size=1, max_size=3))
def test_any_edits(curriculum, several):
    """The original stays, indices stay in range, and an edit does the same each time."""
    before = curriculum.tolist()
    several = [kind(*parts) for kind, *parts in several]
    edited: sf.Curriculum | None = curriculum
    for edit in several:
        edited = applied(edit, edited)
        if edited is None:
            return
        assert edited.n_train == 10
        assert edited.indices.min() >= 0
        assert edited.indices.max() < 10
    assert curriculum.tolist() == before
    assert apply_all(several, curriculum) == edited


@given(arguments)
def test_edits_through_yaml_and_equality(parts):
    edit = parts[0](*parts[1:])
    again = Edit.from_dict(yaml.safe_load(yaml.safe_dump(edit.to_dict())))
    assert again == edit
    assert hash(again) == hash(edit)
    assert str(again) == str(edit)
    assert not str(edit).endswith(" ")


@given(curricula, st.integers(0, 9), st.integers(0, 7))
def test_remove_then_insert_gives_back_the_same_multiset(curriculum, index, at):
    times = int((curriculum.indices == index).sum())
    removed = applied(sf.Remove([index]), curriculum)
    if removed is None or times == 0 or at >= len(curriculum):
        return
    for fill in ("shrink", "repack"):
        inserted = sf.Insert([index] * times, at, fill).apply(removed)
        assert sorted(inserted.indices) == sorted(curriculum.indices)
        assert without(inserted, [index]) == without(curriculum, [index])
        assert sf.Move([index], at, fill).apply(curriculum).indices.tolist() == inserted.indices.tolist()


@given(curricula, targets, targets, st.integers(1, 3))
def test_edits_of_disjoint_targets_commute(curriculum, one, other, times):
    other = [index for index in other if index not in one]
    if not other:
        return
    pairs = [(sf.Remove(one), sf.Repeat(other, times)), (sf.Repeat(one, 2), sf.Repeat(other, times))]
    pairs += [(sf.Remove(one, fill), sf.Remove(other, fill)) for fill in ("shrink", "repack")]
    for pair in pairs:
        try:
            assert apply_all(pair, curriculum).tolist() == apply_all(pair[::-1], curriculum).tolist()
        except InvalidInput:
            assert not without(curriculum, [*one, *other])


@given(curricula, targets)
def test_repack_keeps_the_order_of_the_rest(curriculum, target):
    rest = without(curriculum, target)
    usual = curriculum.sizes.tolist()
    removed = applied(sf.Remove(target, "repack"), curriculum)
    if removed is not None:
        assert removed.indices.tolist() == rest
        assert removed.sizes.tolist()[:-1] == usual[: len(removed) - 1]
        assert removed.sizes[-1] <= usual[len(removed) - 1]
        assert removed.sizes[-1] > 0 or removed == curriculum
    repeated = sf.Repeat(target, 3, "repack").apply(curriculum)
    assert without(repeated, target) == rest
    if repeated != curriculum:
        assert repeated.sizes.tolist()[: len(curriculum)] == usual
    assert repeated.sizes[:-1].max(initial=1) <= max(usual)


@given(curricula, targets, seeds)
def test_resample_keeps_every_batch_as_large(curriculum, target, seed):
    removed = applied(sf.Remove(target, "resample", seed), curriculum)
    rest = without(curriculum, target)
    assert (removed is None) == (not rest)
    if removed is not None:
        assert removed.sizes.tolist() == curriculum.sizes.tolist()
        stayed = ~np.isin(curriculum.indices, target)
        assert removed.indices[stayed].tolist() == rest
        filled = np.bincount(removed.indices[~stayed], minlength=10)[np.unique(rest)]
        assert np.ptp(filled) <= 1  # in passes over what remains
        assert sf.Keep([i for i in range(10) if i not in target], "resample", seed).apply(curriculum) == removed
    repeated = applied(sf.Repeat(target, 2, "resample", seed), curriculum)
    marked = int(np.isin(curriculum.indices, target).sum())
    assert (repeated is None) == (marked > len(rest))
    if repeated is not None:
        assert repeated.sizes.tolist() == curriculum.sizes.tolist()
        assert int(np.isin(repeated.indices, target).sum()) == 2 * marked


def test_slots_that_replace_others():
    curriculum = sf.Curriculum([[0, 1], [2, 3]], n_train=10)
    inserted = sf.Insert([7, 8], 1, "resample").apply(curriculum).tolist()
    assert [inserted[0], sorted(inserted[1])] == [[0, 1], [7, 8]]
    assert sf.Keep("label == 0", "resample").apply(curriculum, EXAMPLES).counts.toarray()[:, 1:3].sum() == 0
    seeds = {str(sf.Remove([0], "resample", seed).apply(curriculum).tolist()) for seed in range(9)}
    assert len(seeds) == 3  # 1, 2 or 3 in its place


def test_swap_shuffle_truncate_concatenate():
    curriculum = sf.Curriculum([[0, 1, 2], [], [3, 0]], n_train=10)
    assert sf.Swap([0, 1, 2], by=[8, 9]).apply(curriculum).tolist() == [[8, 9, 8], [], [3, 8]]
    shuffled = sf.Shuffle(4).apply(curriculum)
    assert shuffled != curriculum
    assert sorted(shuffled.indices) == sorted(curriculum.indices)
    assert shuffled.sizes.tolist() == curriculum.sizes.tolist()
    assert sf.Truncate(2).apply(curriculum).tolist() == [[0, 1, 2], []]
    assert sf.Concatenate([[5], [6, 7]]).apply(curriculum).tolist() == [[0, 1, 2], [], [3, 0], [5], [6, 7]]
    assert sf.Concatenate(curriculum) == sf.Concatenate(curriculum.tolist())


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
    assert str(sf.Remove([3], "repack")) == "remove examples 3 (1), and re-batch the stream"
    filled = "keep only examples a (1), filling their slots from the rest (seed 2)"
    assert str(sf.Keep(["a"], "resample", 2)) == filled
    assert str(sf.Repeat([1], 3, "resample")) == "show examples 1 (1) 3 times as often, replacing others (seed 0)"
    assert str(sf.Insert([1], -1)) == "show examples 1 (1) once more in the last batch"
    assert str(sf.Move("label == 1", 4)) == "move examples where label == 1 to batch 4"
    assert str(sf.Swap([1], [2])) == "swap examples 1 (1) for examples 2 (1)"
    assert str(sf.Truncate(5)) == "stop after 5 steps"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (sf.Remove([10]), "no example 10"),
        (sf.Remove([-1]), "no example -1"),
        (sf.Remove(["z"]), "no example 'z'"),
        (sf.Remove("label == 7"), "matches none"),
        (sf.Remove("lable == 1"), "did you mean 'label'"),
        (sf.Remove(list(range(10))), "would leave no example"),
        (sf.Keep([7]), "would leave no example"),
        (sf.Reorder([0], [0, 1]), "example 0 is in both targets"),
        (sf.Swap([0, 1], [1]), "example 1 is in both targets"),
        (sf.Insert([5], 1), "batches go from 0 to 0"),
        (sf.Insert([5], -2), "batches go from 0 to 0"),
        (sf.Insert([5, 6, 7, 8], 0, "resample"), "4 examples do not fit a batch of 3"),
        (sf.Move([0], 9), "batches go from 0 to 0"),
        (sf.Truncate(2), "the curriculum has 1 steps"),
        (sf.Repeat([0], 9, "resample"), "needs 8 more slots, but other examples have only 2"),
        (sf.Concatenate([[10]]), "names training example 10"),
    ],
)
def test_bad_edits(edit, said):
    with pytest.raises(InvalidInput, match=said):
        edit.apply(sf.Curriculum([[0, 1, 2]], n_train=10), EXAMPLES)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"edit": "remov", "target": [1]}, "did you mean 'remove'"),
        ({"target": [1]}, "unknown edit"),
        ({"edit": "remove"}, "edit 'remove' needs target"),
        ({"edit": "remove", "target": [1], "fil": "shrink"}, "did you mean 'fill'"),
        ({"edit": "remove", "target": [1], "fill": "squeeze"}, "unknown fill 'squeeze'"),
        ({"edit": "remove", "target": 3}, "must be a filter"),
        ({"edit": "remove", "target": [1], "seed": -1}, "seed must be a whole number from 0 up"),
        ({"edit": "repeat", "target": [1], "times": 0}, "times must be a whole number from 1 up"),
        ({"edit": "repeat", "target": [1], "times": 1.5}, "times must be a whole number from 1 up"),
        ({"edit": "insert", "target": [1], "at": "first"}, "at must be a whole number"),
        ({"edit": "move", "target": [1], "to": 0, "fill": "resample"}, "fill='shrink' or 'repack'"),
        ({"edit": "truncate", "steps": 0}, "steps must be a whole number from 1 up"),
        ({"edit": "concatenate", "batches": 3}, "batches must be an iterable, got 3"),
        ({"edit": "concatenate", "batches": [["a"]]}, "integer training indices"),
    ],
)
def test_bad_content(content, said):
    with pytest.raises(InvalidInput, match=said):
        Edit.from_dict(content)


def test_metadata_must_be_there_and_fit():
    curriculum = sf.Curriculum([[0, 1]], n_train=2)
    for target in ("label == 0", ["a"]):
        with pytest.raises(InvalidInput, match="give the training examples"):
            sf.Remove(target).apply(curriculum)
    with pytest.raises(InvalidInput, match="metadata has 10"):
        sf.Remove([0]).apply(curriculum, EXAMPLES)
    with pytest.raises(FilterError):
        sf.Remove("label.max()").apply(sf.Curriculum([[0]], n_train=10), EXAMPLES)


def test_rows_and_ids_by_name():
    """Where ids are numbers, an edit says which of the two it means; files and sentences keep it."""
    examples = sf.Examples([3, 1, 2, 0])
    curriculum = sf.Curriculum([[0, 1], [2, 3]])
    with pytest.raises(InvalidInput, match=r"write ids=\[…\] or rows=\[…\]"):
        sf.Remove([3]).apply(curriculum, examples)
    for edit, expected in (
        (sf.Remove(ids=[3]), [[1], [2, 3]]),
        (sf.Remove(rows=np.array([3])), [[0, 1], [2]]),
        (sf.Keep(ids=["3", "1"]), [[0, 1], []]),
        (sf.Move(rows=[0], to=-1), [[1], [0, 2, 3]]),
        (sf.Insert(ids=[0], at=0), [[3, 0, 1], [2, 3]]),
        (sf.Swap({"ids": [3]}, by={"rows": [3]}), [[3, 1], [2, 3]]),
        (sf.Reorder(first={"rows": [3]}), [[3, 0], [1, 2]]),
    ):
        assert edit.apply(curriculum, examples).tolist() == expected
        again = sf.Edit.from_dict(edit.to_dict())
        assert again == edit
        assert again.apply(curriculum, examples).tolist() == expected
    assert sf.Remove(ids=[3]).to_dict() == {"edit": "remove", "target": {"ids": ["3"]}}
    assert sf.Edit.from_dict({"edit": "remove", "ids": [3]}) == sf.Remove(ids=[3])
    assert str(sf.Remove(ids=[3, 1])) == "remove examples 3, 1 (2)"
    with pytest.raises(InvalidInput, match="got target and ids"):
        sf.Remove([1], ids=[2])
    with pytest.raises(InvalidInput, match="got none"):
        sf.Remove()


def test_a_mask_is_counted_and_not_printed():
    mask = np.arange(1000) % 2 == 0
    curriculum = sf.Curriculum([[0, 1], [2, 999]], n_train=1000)
    edit = sf.Remove(mask)
    assert edit.apply(curriculum).tolist() == [[1], [999]]
    assert str(edit) == "remove examples 0, 2, 4, 6, 8, … (500)"
    with pytest.raises(InvalidInput, match="the mask has 1000 entries for 3 examples"):
        edit.apply(sf.Curriculum([[0, 1, 2]]))


def test_edits_are_named():
    edit = sf.Remove("label == 3", name="no threes")
    assert str(edit) == "no threes"
    assert edit == sf.Remove("label == 3")
    assert edit.to_dict() == {"edit": "remove", "target": "label == 3", "name": "no threes"}
    assert str(sf.Edit.from_dict(edit.to_dict())) == "no threes"
    with pytest.raises(InvalidInput, match="name must be a text"):
        sf.Shuffle(name=" ")
