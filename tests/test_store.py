from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

import simfluence as sf
from simfluence.errors import InvalidInput, StoreError


def test_a_run_survives_unchanged(store, runs, recipe, task):
    for run in runs:
        read = store.read(run.id)
        assert np.array_equal(read.losses, run.losses)
        assert read.losses.dtype == run.losses.dtype
        assert read.curriculum == run.curriculum
        assert read.recipe == recipe
        assert read.fingerprint == task.fingerprint
        assert read.learning_rates.tolist() == run.learning_rates.tolist()
    loaded = store.load()
    assert loaded.train.table.equals(task.train.table)
    assert loaded.test.ids == task.test.ids


def test_ragged_double_precision_and_nan_survive(store, task, recipe):
    curriculum = sf.Curriculum([[], [3, 3, 1], [0]], n_train=12)
    losses = np.array([[0.1] * 5, [np.nan] * 5, [np.inf] * 5, [-1 / 3] * 5])
    store.write(sf.Run("ragged", curriculum, losses, np.array([1e-300, 0.1, 2.0]), recipe, task.fingerprint))
    read = store.read("ragged")
    assert read.curriculum == curriculum
    assert np.array_equal(read.losses, losses, equal_nan=True)
    assert read.learning_rates.tolist() == [1e-300, 0.1, 2.0]


def test_any_tool_that_reads_parquet_reads_a_run(store, runs):
    file = store.path / f"run-{runs[0].id}.parquet"
    table = pq.read_table(file)
    assert [f"{field.name} {field.type}" for field in table.schema] == [
        "step int32", "batch list<element: int32>", "lr double", "losses fixed_size_list<element: float>[5]",
    ]  # fmt: skip
    rows = table.to_pylist()
    assert [row["step"] for row in rows] == list(range(11))
    assert [row["batch"] for row in rows] == [[], *runs[0].curriculum.tolist()]
    assert [row["lr"] for row in rows] == [None] + [0.3] * 10
    assert np.allclose([row["losses"] for row in rows], runs[0].losses)
    about = json.loads(table.schema.metadata[b"simfluence"])
    assert about["id"] == runs[0].id
    assert about["recipe"]["lr"] == 0.3
    assert about["library"] == sf.__version__


def test_every_flipped_bit_is_found(store, runs):
    file = store.path / f"run-{runs[0].id}.parquet"
    content = file.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(8 * len(content), size=300):
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << (position % 8)
        file.write_bytes(damaged)
        with pytest.raises(StoreError, match=file.name):
            store.load()
    for length in (0, 1, 4, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(StoreError, match=file.name):
            store.load()
    file.write_bytes(content)
    store.load()


def test_recording_again_changes_no_byte(store, task, recipe, curricula):
    def contents():
        return {path.name: path.read_bytes() for path in store.path.iterdir()}

    before = contents()
    sf.record(task, recipe, curricula, store.path)
    assert contents() == before


def test_another_task_is_refused(store, recipe, curricula):
    other = sf.tasks.digits(n_train=12, n_test=5)
    with pytest.raises(StoreError, match="holds runs of another task"):
        sf.record(other, recipe, curricula, store)


def test_a_run_of_another_task_or_name_is_refused(store, runs, recipe, curricula, tmp_path):
    other = sf.record(sf.tasks.digits(n_train=12, n_test=5), recipe, curricula[:1], tmp_path / "other")
    foreign = tmp_path / "other" / f"run-{other[0].id}.parquet"
    shutil.copy(foreign, store.path)
    with pytest.raises(StoreError, match="does not belong here"):
        store.load()
    (store.path / foreign.name).rename(store.path / "run-abc.parquet")
    with pytest.raises(StoreError, match="does not belong here"):
        store.load()


@pytest.mark.parametrize("name", ["stranger.parquet", "run-0123456789abcdef.parquet"])
def test_foreign_files_are_named(store, name):
    (store.path / name).write_bytes(b"PAR1 not really")
    with pytest.raises(StoreError, match=name):
        store.load()


def test_a_parquet_file_of_somebody_else(store, task):
    task.train.table.to_parquet(store.path / "run-x.parquet")
    with pytest.raises(StoreError, match=r"run-x.parquet was not written by simfluence"):
        store.load()


def test_files_that_are_not_parquet_are_left_alone(store):
    (store.path / "README.txt").write_text("notes")
    assert len(store.load()) == 6


def test_several_recipes(store, task, recipe, curricula):
    sf.record(task, recipe.replace(lr=0.1), curricula[:2], store)
    with pytest.raises(StoreError, match="holds runs of 2 recipes"):
        store.load()
    assert len(store.load(recipe)) == 6
    assert len(store.load(recipe.replace(lr=0.1))) == 2


def test_no_store(tmp_path):
    with pytest.raises(StoreError, match="no run store at"):
        sf.RunStore(tmp_path / "nowhere").load()
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"format": 1}', '{"format": 99}'])
def test_damaged_store_json(store, content):
    (store.path / "store.json").write_text(content)
    with pytest.raises(StoreError):
        store.load()


def test_unknown_run(store):
    with pytest.raises(InvalidInput, match="no run 'abc'"):
        store.read("abc")


def test_paths_with_spaces_and_unicode(task, recipe, curricula, tmp_path):
    path = tmp_path / "läufe und mehr"
    assert len(sf.record(task, recipe, curricula, path)) == len(sf.RunStore(path).load())


def test_arguments_that_are_not_plain_are_refused(task, recipe, curricula, tmp_path):
    odd = dataclasses.replace(task, arguments={"f": print})
    with pytest.raises(InvalidInput, match="plain JSON"):
        sf.record(odd, recipe, curricula, tmp_path / "s")
