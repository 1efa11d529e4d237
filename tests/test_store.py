from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import simfluence as sf
from simfluence.errors import InvalidInput, StoreError
from simfluence.storage.run_file import read_run, read_table, to_bytes


def as_an_older_version(store):
    """Rewrite store.json as versions without checksums wrote it."""
    described = json.loads((store.path / "store.json").read_text())
    plain = {name: described[name] for name in ("task", "n_train", "n_test")}
    (store.path / "store.json").write_text(json.dumps({"format": 2, **plain}))


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


def test_learning_rates_that_are_not_known_stay_so(store, runs):
    run = dataclasses.replace(runs[0], id="without", learning_rates=None)
    store.write(run)
    assert store.read("without").learning_rates is None


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


@pytest.fixture
def one_run(task, recipe, curricula, tmp_path):
    sf.record(task, recipe, curricula[:1], tmp_path / "one")
    return sf.RunStore(tmp_path / "one")


def test_every_flipped_bit_is_found(one_run):
    store = one_run
    file = store.path / f"run-{store.ids()[0]}.parquet"
    content = file.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(8 * len(content), size=100):
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
    with pytest.raises(StoreError, match="belongs to another task: move it elsewhere"):
        store.load()
    (store.path / foreign.name).rename(store.path / "run-abc.parquet")
    with pytest.raises(StoreError, match="has another id"):
        store.load()


@pytest.mark.parametrize("name", ["stranger.parquet", "run-0123456789abcdef.parquet"])
def test_foreign_files_are_named(store, name):
    (store.path / name).write_bytes(b"PAR1 not really")
    with pytest.raises(StoreError, match=name):
        store.load()


def test_a_parquet_file_of_somebody_else(store, task):
    task.train.table.to_parquet(store.path / "run-x.parquet")
    with pytest.raises(StoreError, match=r"run-x\.parquet is damaged .* or was not written by simfluence"):
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


def test_five_hundred_damages_are_all_found(store, runs):
    files = [store.path / f"run-{run.id}.parquet" for run in runs]
    rng = np.random.default_rng(1)
    for number in range(500):
        file = files[number % len(files)]
        content = file.read_bytes()
        damaged = bytearray(content)
        if number % 5 == 0:
            damaged = damaged[: rng.integers(len(content))]
        else:
            position = rng.integers(8 * len(content))
            damaged[position // 8] ^= 1 << (position % 8)
        file.write_bytes(damaged)
        with pytest.raises(StoreError, match=file.name):
            read_run(file)
        file.write_bytes(content)
    assert np.array_equal(sf.Runs(sorted(runs, key=lambda run: run.id)).losses, store.load().losses)


def test_an_older_format_is_read(tmp_path):
    old = Path(__file__).parent / "data" / "format-1"
    runs = sf.RunStore(old).load()
    assert np.allclose(runs.losses[:, -1, 0], [0.99810505, 1.0284586])
    assert {run.engine for run in runs} == {"loop"}
    assert not any(run.verification for run in runs)
    store = sf.RunStore(old).copy(tmp_path / "copy")
    task = sf.tasks.rebuild(store.info)
    again = sf.record(task, runs[0].recipe, runs.curricula, store, observe=sf.Observe(measures=["margin"]))
    assert np.array_equal(store.load().losses, runs.losses)  # what was recorded stays, to the bit
    assert np.isfinite(again[0].measures["margin"]).all()
    assert json.loads(pq.read_schema(store.path / f"run-{runs[0].id}.parquet").metadata[b"simfluence"])["format"] == 2


def test_a_newer_format_is_refused(store):
    described = json.loads((store.path / "store.json").read_text())
    (store.path / "store.json").write_text(json.dumps(described | {"format": 4}))
    with pytest.raises(StoreError, match="a newer version of simfluence wrote"):
        store.load()


def test_merge(task, recipe, curricula, runs, tmp_path):
    left, right = sf.RunStore(tmp_path / "left"), sf.RunStore(tmp_path / "right")
    sf.record(task, recipe, curricula[:4], left, observe=sf.Observe(every=5))
    sf.record(task, recipe, curricula[2:], right, observe=sf.Observe(every=2, checkpoints=[3]))
    assert left.merge(right) == 2
    merged = left.load()
    assert len(merged) == 6
    for run in merged:
        position = runs.ids.index(run.id)
        expected = {0: [0, 5, 10], 1: [0, 5, 10], 4: [0, 2, 4, 6, 8, 10], 5: [0, 2, 4, 6, 8, 10]}
        assert run.times.tolist() == expected.get(position, [0, 2, 4, 5, 6, 8, 10])
        assert list(run.checkpoints) == ([3] if position >= 2 else [])
        assert np.allclose(run.losses[run.times], runs[position].losses[run.times], atol=1e-6)
    assert left.merge(right) == 0
    assert not (left.path / "partial").exists()


def test_merging_other_losses_or_tasks_is_refused(task, recipe, curricula, runs, store, tmp_path):
    other = sf.RunStore(tmp_path / "other")
    other.open_for(task)
    other.write(dataclasses.replace(runs[0], losses=runs[0].losses + 1))
    before = store.load()
    with pytest.raises(StoreError, match="differs from the recorded values"):
        store.merge(other)
    assert np.array_equal(store.load().losses, before.losses)
    digits = sf.tasks.digits(n_train=12, n_test=5)
    sf.record(digits, recipe, curricula[:1], tmp_path / "digits")
    with pytest.raises(StoreError, match="another task"):
        store.merge(sf.RunStore(tmp_path / "digits"))


def test_copy_all_or_some(store, task, recipe, curricula, tmp_path):
    sf.record(task, recipe.replace(lr=0.01), curricula[:2], store, observe=sf.Observe(checkpoints=[1]))
    whole = store.copy(tmp_path / "whole")
    for path in store.path.rglob("*"):
        if path.is_file():
            assert (whole.path / path.relative_to(store.path)).read_bytes() == path.read_bytes()
    some = store.copy(tmp_path / "some", where="lr < 0.1")
    assert len(some.load()) == 2
    with pytest.raises(StoreError, match="is already a run store"):
        store.copy(tmp_path / "some")


def test_load_where(store, task, recipe, curricula):
    sf.record(task, recipe.replace(lr=0.1), [sf.Curriculum([[0], [1]], 12), *curricula[:2]], store)
    assert len(store.load(where="steps == 2")) == 1
    assert len(store.load(where="lr > 0.2 and diverged == false")) == 6
    assert len(store.load(where="engine == 'batched' and lr < 0.2")) == 2
    assert len(store.load(where="lr == 7")) == 0
    with pytest.raises(InvalidInput, match="did you mean 'steps'"):
        store.load(where="step == 2")


def test_runs_of_different_lengths_live_together(store, task, recipe):
    sf.record(task, recipe, [sf.Curriculum([[0], [1]], 12)], store)
    runs = store.load()
    assert sorted({run.steps for run in runs}) == [2, 10]
    assert runs.losses.shape == (7, 11, 5)
    assert sf.LinearSimulator().fit(runs).simulate(runs.curricula, runs.initial_losses).shape == (7, 11, 5)


def test_verification_runs_are_marked_and_stay_out(store, task, recipe, curricula, monkeypatch):
    run = store.load()[0]
    simulator = sf.LinearSimulator().fit(store.load())
    forecast = sf.what_if(simulator, run, sf.Remove(run.curriculum[0][:1]), task=task)
    verified = forecast.verify(store=store.path)
    assert len(store.load()) == 6
    marked = [run for run in store.load(verification=True) if run.verification]
    assert [run.curriculum for run in marked] == [forecast.curriculum]
    assert np.array_equal(marked[0].losses, verified.actual)
    monkeypatch.setattr("simfluence.recording.engines.base.Training.advance", lambda self: pytest.fail("trained again"))
    assert np.array_equal(forecast.verify(store=store.path).actual, verified.actual)
    assert len(store.load()) == 6
    sf.record(task, recipe, [forecast.curriculum], store)  # now wanted for itself
    assert len(store.load()) == 7


def failing(number):
    def fail(*arguments):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_a_full_disk_or_a_read_only_store(store, task, recipe, number, engine, monkeypatch):
    more = sf.random_curricula(n_train=12, runs=4, steps=6, batch_size=2, seed=9)
    before = {path: path.read_bytes() for path in store.path.iterdir()}
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync" if number == errno.ENOSPC else "replace", failing(number))
        with pytest.raises(StoreError, match=f"cannot write .*{os.strerror(number)}.*run the same command again"):
            sf.record(task, recipe, more, store, engine=engine)
    assert {path: path.read_bytes() for path in store.path.iterdir() if path.is_file()} == before
    sf.record(task, recipe, more, store, engine=engine)
    assert len(store.load()) == 10
    assert not (store.path / "partial").exists()


def test_a_store_that_cannot_be_written_is_read(store, task, recipe, curricula, monkeypatch):
    for name in ("open", "replace", "mkdir", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, failing(errno.EROFS))
    assert len(store.load()) == 6
    assert len(sf.record(task, recipe, curricula, store)) == 6


@pytest.fixture(scope="module")
def tiny_task():
    return sf.tasks.synthetic(n_train=5, n_test=2)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_store_survives_copy_and_merge(data, tiny_task, tmp_path_factory):
    task = tiny_task
    store = sf.RunStore(tmp_path_factory.mktemp("any") / "store")
    store.open_for(task)
    batches = st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4).filter(any)
    numbers = st.floats(allow_nan=True, allow_infinity=True, width=32)
    for number in range(data.draw(st.integers(0, 3))):
        curriculum = sf.Curriculum(data.draw(batches), n_train=5)
        shape = len(curriculum) + 1, 2
        readings = [
            np.array(data.draw(st.lists(numbers, min_size=2 * shape[0], max_size=2 * shape[0])), np.float32)
            for _ in range(2)
        ]
        recorded = np.array(data.draw(st.lists(st.booleans(), min_size=shape[0], max_size=shape[0])))
        losses, margins = (np.where(recorded[:, None], values.reshape(shape), np.nan) for values in readings)
        store.write(
            sf.Run(
                f"r{number}",
                curriculum,
                losses.astype(np.float32),
                np.ones(len(curriculum)),
                sf.Recipe(lr=data.draw(st.floats(0, 9))),
                task.fingerprint,
                recorded=None if recorded.all() else recorded,
                measures={"margin": margins.astype(np.float32)},
                verification=data.draw(st.booleans()),
                engine="loop",
            )
        )
    copied = store.copy(store.path.parent / "copied")
    merged = sf.RunStore(store.path.parent / "merged")
    merged.open_for(task)
    merged.merge(store)
    merged.merge(copied)
    for other in (copied, merged):
        for one, two in zip(store.all_runs(), other.all_runs(), strict=True):
            assert (one.id, one.curriculum, one.recipe, one.verification) == (
                two.id,
                two.curriculum,
                two.recipe,
                two.verification,
            )
            assert one.times.tolist() == two.times.tolist()
            assert np.array_equal(one.losses, two.losses, equal_nan=True)
            assert np.array_equal(one.measures["margin"], two.measures["margin"], equal_nan=True)


def test_measures_recorded_apart_are_merged_with_their_own_gaps(task, recipe, curricula, tmp_path):
    def size(outputs, targets):
        return outputs.norm(dim=1)

    measured = dataclasses.replace(task, measures={"size": size})
    left, right = sf.RunStore(tmp_path / "left"), sf.RunStore(tmp_path / "right")
    sf.record(measured, recipe, curricula, left, observe=sf.Observe(every=5, measures=["size"]))
    sf.record(measured, recipe, curricula, right)
    left.merge(right)
    run = left.load()[0]
    assert run.times.tolist() == list(range(11))
    assert run.times_of("size").tolist() == [0, 5, 10]
    assert not left.load().select("size")[0].diverged
    assert sf.MeanTrajectorySimulator().fit(left.load().select("size")).mean_.shape == (11, 5)
    whole = sf.record(measured, recipe, curricula, left, observe=sf.Observe(measures=["size"]))
    assert whole[0].times_of("size").tolist() == list(range(11))
    assert np.isfinite(whole.select("size").losses).all()


def test_adding_combines_with_what_is_there_by_now(store, runs):
    fewer = dataclasses.replace(runs[0], measures={"one": runs[0].losses}, id=runs[0].id)
    more = dataclasses.replace(runs[0], measures={"two": runs[0].losses})
    store.add(fewer)
    store.add(more)
    assert set(store.read(runs[0].id).measures) == {"one", "two"}
    assert not (store.path / "partial").exists()


def test_merging_leaves_a_recording_under_way_alone(store, task, recipe, curricula, tmp_path):
    other = store.copy(tmp_path / "other")
    run_id = store.ids()[0]
    with store.claim(run_id) as first:
        unfinished = store.partial(run_id) / "training.safetensors"
        unfinished.parent.mkdir(parents=True)
        unfinished.write_bytes(b"x")
        store.merge(other)
        with store.claim(run_id) as second:
            assert (first, second, unfinished.exists()) == (True, False, True)


def test_metadata_that_cannot_be_kept(task, recipe, curricula, tmp_path):
    odd = dataclasses.replace(task, test=sf.Examples.numbered(5, pd.DataFrame({"x": [1, "a", 2.0, None, print]})))
    with pytest.raises(InvalidInput, match="test metadata: a column mixes types"):
        sf.record(odd, recipe, curricula, tmp_path / "s")


def test_runs_may_stay_on_disk(store):
    loaded, mapped = store.load(), store.load(mapped=True)
    for one, other in zip(loaded, mapped, strict=True):
        assert isinstance(other.losses, np.memmap)
        assert np.array_equal(one.losses, other.losses)
        assert one.id == other.id
    fits = [sf.LinearSimulator(around="mean").fit(runs) for runs in (loaded, mapped)]
    assert np.array_equal(fits[0].A_, fits[1].A_)


def test_features_and_targets_are_kept(store, task):
    runs = store.load()
    assert np.array_equal(runs.train.features, task.train_data[0].numpy())
    assert np.array_equal(runs.test.targets, task.test_data[1].numpy())
    assert runs.train.table.equals(task.train.table)


def test_a_store_without_features_gets_them_when_it_is_recorded_into(store, task, recipe, curricula):
    for side in ("train", "test"):
        file = store.path / f"{side}.parquet"
        table = read_table(file)[0].drop_columns(["simfluence.features", "simfluence.targets"])
        file.write_bytes(to_bytes(table.replace_schema_metadata()))
    as_an_older_version(store)
    assert store.load().train.features is None
    sf.record(task, recipe, curricula, store.path)
    assert np.array_equal(store.load().train.features, task.train_data[0].numpy())


def test_metadata_cannot_take_the_place_of_features(task, recipe, curricula, tmp_path):
    table = pd.DataFrame({"simfluence.features": range(12)})
    named = dataclasses.replace(task, train=sf.Examples(task.train.ids, table))
    with pytest.raises(InvalidInput, match=r"a column cannot be called 'simfluence.features'"):
        sf.record(named, recipe, curricula, tmp_path / "named")
