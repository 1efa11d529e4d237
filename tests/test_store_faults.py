"""Stores when things go wrong: wrong or damaged files, files of strangers, broken-off writes, many processes."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import stat
import threading

import numpy as np
import pyarrow as pa
import pytest

import simfluence as sf
from simfluence._internal import files
from simfluence.errors import InvalidInput, StoreError
from simfluence.storage import run_file
from simfluence.storage import store as store_module
from simfluence.storage.run_file import read_run, read_table, to_bytes


@pytest.fixture
def small(tmp_path):
    """A store of four runs with as many training as test examples, so that its tables can take each other's place."""
    store = sf.RunStore(tmp_path / "small")
    for number in range(4):
        with store.recorder(f"r{number}", train=["a", "b"], test=["x", "y"]) as recorder:
            recorder.read([1.0, 2.0])
            recorder.step(["a"], losses=[0.5 + number, 0.25])
    return store


def edited(store, run_id, change):
    """Change the header of a run file and sign it again."""
    file = store.path / f"run-{run_id}.parquet"
    table, metadata = read_table(file)
    about = json.loads(metadata[b"simfluence"])
    change(about)
    file.write_bytes(to_bytes(table.replace_schema_metadata({b"simfluence": json.dumps(about)})))
    return file


def test_swapped_or_foreign_tables_are_refused(small):
    train, test = small.path / "train.parquet", small.path / "test.parquet"
    first, second = train.read_bytes(), test.read_bytes()
    shorter, renamed = pa.table({"id": ["a"]}), pa.table({"id": ["a", "c"]})
    for left, right in ((second, first), (first, first), (to_bytes(shorter), second), (to_bytes(renamed), second)):
        train.write_bytes(left)
        test.write_bytes(right)
        with pytest.raises(StoreError, match=r"t.*\.parquet is not the table that was written with"):
            small.load()
    train.write_bytes(first)
    test.write_bytes(second)
    assert len(small.load()) == 4


def test_a_shortened_table_of_an_older_store_is_refused(small):
    described = json.loads((small.path / "store.json").read_text())
    plain = {"format": 2, **{name: described[name] for name in ("task", "n_train", "n_test")}}
    (small.path / "store.json").write_text(json.dumps(plain))
    before = {path: path.read_bytes() for path in small.path.iterdir()}
    assert len(small.load()) == 4
    assert {path: path.read_bytes() for path in small.path.iterdir()} == before  # reading rewrites nothing
    (small.path / "train.parquet").write_bytes(to_bytes(pa.table({"id": ["a"]})))
    with pytest.raises(StoreError, match=r"train\.parquet has 1 examples, but .*store\.json says 2"):
        small.load()


WRONG = (None, True, -1, 0, 1.5, "", "x", [], {}, 10**30)


@pytest.mark.parametrize("format_", [2, 3])
def test_every_wrong_value_in_store_json_is_refused(small, format_):
    file = small.path / "store.json"
    content = json.loads(file.read_text())
    if format_ == 2:
        content = {"format": 2, **{name: content[name] for name in ("task", "n_train", "n_test")}}
    places = [(name,) for name in content] + [("task", name) for name in content["task"]]
    accepted = []
    for place in places:
        for value in WRONG:
            changed = copy.deepcopy(content)
            parent = changed if len(place) == 1 else changed["task"]
            if (place[-1], value) in (("arguments", {}),) or parent[place[-1]] == value:
                continue
            parent[place[-1]] = value
            file.write_text(json.dumps(changed))
            try:
                small.load()
                accepted.append((*place, value))
            except StoreError:
                continue
    # without checksums the name of the task can be any text
    assert accepted == ([] if format_ == 3 else [("task", "name", ""), ("task", "name", "x")])


def test_a_copy_that_is_broken_off_is_no_store(small, tmp_path, monkeypatch):
    real, written = store_module.write_whole, []

    def broken_off(path, *arguments, **options):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(path)
        real(path, *arguments, **options)

    with monkeypatch.context() as broken:
        broken.setattr(store_module, "write_whole", broken_off)
        with pytest.raises(KeyboardInterrupt):
            small.copy(tmp_path / "copy")
    with pytest.raises(StoreError, match=r"store\.json is missing"):
        sf.RunStore(tmp_path / "copy").load()
    assert len(small.copy(tmp_path / "copy").load()) == 4
    (tmp_path / "copy" / "store.json").unlink()  # as if killed just before the end
    (tmp_path / "copy" / "run-r0.parquet").unlink()
    with pytest.raises(StoreError, match="a copy was interrupted here"):
        sf.RunStore(tmp_path / "copy").load()
    with pytest.raises(StoreError, match="has other files"):
        small.copy(tmp_path / "copy")


def test_a_merge_that_is_broken_off_is_said_and_gone_on_with(small, tmp_path, monkeypatch):
    target = small.copy(tmp_path / "target")
    for run_id in ("r1", "r2", "r3"):
        (target.path / f"run-{run_id}.parquet").unlink()
    added, real = [], sf.RunStore.add

    def broken_off(self, run):
        if len(added) == 2:
            raise KeyboardInterrupt
        added.append(run)
        return real(self, run)

    with monkeypatch.context() as broken:
        broken.setattr(sf.RunStore, "add", broken_off)
        with pytest.raises(KeyboardInterrupt):
            target.merge(small)
    with pytest.warns(UserWarning, match="merge again"):
        assert len(target.load()) == 2
    assert target.merge(small) == 2
    assert len(target.load()) == 4


def test_text_in_place_of_the_recipe_is_the_filter(small):
    assert small.load("steps > 0").ids == small.load(where="steps > 0").ids == ["r0", "r1", "r2", "r3"]
    assert len(small.load("steps > 1")) == 0
    with pytest.raises(InvalidInput, match="two filters"):
        small.load("steps > 1", where="steps > 0")
    with pytest.raises(InvalidInput, match="recipe must be a Recipe"):
        small.load(recipe={"lr": 0.1})


BAD_NAMES = ["a/b", "../../x", "..", ".", "", " ", "a\0b", "a\nb", "C:\\x", "x" * 300, ".hidden", "a.lock", "con*"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_ids_that_are_no_file_names_are_refused(small, name):
    run = small.read("r0")
    before = sorted(small.path.parent.rglob("*"))
    calls = (
        lambda: small.write(dataclasses.replace(run, id=name)),
        lambda: small.add(dataclasses.replace(run, id=name)),
        lambda: small.read(name),
        lambda: small.partial(name),
        lambda: small.drop_partial(name),
        lambda: small.checkpoint(name, 1),
        lambda: small.claim(name).__enter__(),
    )
    for call in calls:
        with pytest.raises(InvalidInput, match="cannot be used as the name of a file"):
            call()
    assert [path for path in sorted(small.path.parent.rglob("*")) if path.name != ".lock"] == [
        path for path in before if path.name != ".lock"
    ]
    edited(small, "r0", lambda about: about.update(id=name))
    with pytest.raises(StoreError, match=r"run-r0\.parquet"):
        small.load()


def test_a_folder_that_is_not_a_store_is_left_alone(small, tmp_path, task, recipe, curricula):
    for name in ("train.parquet", "run-1.parquet", "notes.txt", "store.yaml"):
        folder = tmp_path / f"of {name}"
        folder.mkdir()
        (folder / name).write_bytes(b"my own data")
        for call in (
            lambda folder=folder: sf.record(task, recipe, curricula[:1], folder),
            lambda folder=folder: sf.RunStore(folder).recorder("r", train=["a"], test=["x"]),
            lambda folder=folder: small.copy(folder),
        ):
            with pytest.raises(StoreError, match="is not a run store, and has other files"):
                call()
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {name: b"my own data"}
    with pytest.raises(StoreError, match="is a file"):
        sf.record(task, recipe, curricula[:1], tmp_path / "of notes.txt" / "notes.txt")
    for path in ("", " "):
        with pytest.raises(InvalidInput, match="path must name a folder"):
            sf.RunStore(path)


def test_links_are_not_followed_when_writing_and_copying(small, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (small.path / "partial").mkdir(exist_ok=True)
    (small.path / "partial" / "mine").symlink_to(outside)
    with pytest.raises(StoreError, match="mine is a symbolic link"), small.recorder("mine"):
        pass
    with pytest.raises(StoreError, match="symbolic link"):
        small.drop_partial("mine")
    (small.path / "checkpoints").symlink_to(outside)
    with pytest.raises(StoreError, match="checkpoints is a symbolic link"):
        small.checkpoint("r0", 4)
    (small.path / "checkpoints").unlink()
    (small.path / "checkpoints" / "r0").mkdir(parents=True)
    (small.path / "checkpoints" / "r0" / "step-4.safetensors").symlink_to(outside / "secret")
    target = sf.RunStore(tmp_path / "target")
    with pytest.raises(StoreError, match="symbolic link"):
        small.copy(target.path)
    assert not target.exists
    assert [path.name for path in outside.iterdir()] == ["secret"]


def test_an_error_of_syncing_a_folder_is_one_of_writing(tmp_path, monkeypatch):
    real = os.fsync

    def broken(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(5, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(StoreError, match=r"cannot write .*Input/output error"):
        files.write_whole(tmp_path / "x", b"1")


def test_leftovers_of_dead_processes_go_and_those_being_written_stay(tmp_path):
    leftover = tmp_path / ".x.123.unfinished"
    leftover.write_bytes(b"half")
    with files.whole_file(tmp_path / "x") as file:
        file.write(b"slow")
        assert not leftover.exists()
        files.write_whole(tmp_path / "x", b"fast")
    assert (tmp_path / "x").read_bytes() == b"slow"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_many_threads_write_one_file_whole(tmp_path):
    contents = [bytes([number]) * 5000 for number in range(8)]
    threads = [threading.Thread(target=files.write_whole, args=(tmp_path / "a" / "x", each)) for each in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a" / "x").read_bytes() in contents
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_nothing_is_lost_when_many_add_to_one_run(small):
    run, errors = small.read("r0"), []

    def add(number):
        try:
            measured = {f"m{number}": np.full_like(run.losses, number)}
            sf.RunStore(small.path).add(dataclasses.replace(run, measures=measured))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=add, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(small.read("r0").measures) == [f"m{number}" for number in range(6)]


@pytest.mark.parametrize(
    "change",
    [
        lambda about: about.pop("recipe"),
        lambda about: about.update(recipe={"optimizer": "zzz"}),
        lambda about: about.update(recipe=[1]),
        lambda about: about.update(n_train="x"),
        lambda about: about.update(n_train=3),
        lambda about: about.update(n_train=1),
        lambda about: about.update(n_train=True),
        lambda about: about.update(verification=1),
        lambda about: about.update(engine=5),
        lambda about: about.update(fingerprint=None),
        lambda about: about.update(format=2.0),
        lambda about: about.clear(),
    ],
)
def test_a_run_file_that_does_not_fit_is_named_and_can_be_left_out(small, change):
    file = edited(small, "r2", change)
    with pytest.raises(StoreError, match=file.name):
        small.load()
    with pytest.warns(UserWarning, match=file.name):
        assert small.load(skip_damaged=True).ids == ["r0", "r1", "r3"]


def test_columns_of_a_run_file_are_checked(small):
    file = small.path / "run-r0.parquet"
    table, metadata = read_table(file)
    wrong = [
        table.drop_columns(["lr"]),
        table.set_column(0, "step", pa.array([1, 2], pa.int32())),
        table.set_column(0, "step", pa.array([0, None], pa.int32())),
        table.set_column(1, "batch", pa.array([[0], [0]], pa.list_(pa.int32()))),
        table.set_column(1, "batch", pa.array([[], None], pa.list_(pa.int32()))),
        table.set_column(1, "batch", pa.array([[], [7]], pa.list_(pa.int32()))),
        table.set_column(3, "losses", pa.array([[1.0], [2.0]], pa.list_(pa.float32(), 1))),
        table.set_column(3, "losses", pa.array([[1.0, None], [2.0, 1.0]], pa.list_(pa.float32(), 2))),
        table.set_column(3, "losses", pa.array(["a", "b"])),
        table.append_column("more", pa.array([1, 2])),
        table.slice(0, 0),
        table.slice(0, 1),
    ]
    for each in wrong:
        file.write_bytes(to_bytes(each.replace_schema_metadata(metadata)))
        with pytest.raises(StoreError, match=file.name):
            small.load()


@pytest.mark.parametrize("kind", ["numbers", "text", "text in lists", "missing lists"])
def test_small_files_that_would_fill_the_memory_are_refused_unread(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(run_file, "_LEAST_LIMIT", 2**24)
    monkeypatch.setattr(run_file, "_LARGEST_RATIO", 400)
    many = 20_000
    column = {
        "numbers": lambda: pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(400 * many, np.float32)), 400),
        "text": lambda: pa.DictionaryArray.from_arrays(np.zeros(many, np.int32), pa.array(["x" * 50_000])),
        "text in lists": lambda: pa.ListArray.from_arrays(
            pa.array([0, many], pa.int32()),
            pa.DictionaryArray.from_arrays(np.zeros(many, np.int32), pa.array(["x" * 50_000])),
        ),
        "missing lists": lambda: pa.nulls(many, pa.list_(pa.float32(), 1000)),
    }[kind]()
    file = tmp_path / "bomb.parquet"
    file.write_bytes(to_bytes(pa.table({"id": column})))
    assert file.stat().st_size < 60_000
    before = pa.total_allocated_bytes()
    with pytest.raises(StoreError, match=r"bomb\.parquet .*of memory"):
        read_table(file)
    assert pa.total_allocated_bytes() - before < 2**22
    with pytest.raises(StoreError, match=r"bomb\.parquet"):
        read_run(file)
