"""Where runs live on disk: a folder of Parquet files, each whole or not there at all."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pyarrow as pa

from simfluence._internal.files import cannot_write, check_format, whole_file, write_whole
from simfluence.errors import InvalidInput, StoreError, did_you_mean
from simfluence.examples import Examples
from simfluence.recipe import Recipe
from simfluence.runs import Run, Runs, combined
from simfluence.storage.journal import JOURNAL_FILE
from simfluence.storage.recorder import Recorder
from simfluence.storage.run_file import (
    FORMAT,
    RunHeader,
    RunRows,
    read_run,
    read_table,
    to_bytes,
    write_rows,
    write_run,
)
from simfluence.task import ExternalTask, Task, TaskInfo

_FEATURES, _TARGETS = "simfluence.features", "simfluence.targets"  # columns beside the metadata


class RunStore:
    """A folder of recorded runs of one task.

        store.json            format version, task name, arguments and fingerprint, numbers of examples
        train.parquet         metadata and features of the training examples, in index order; test.parquet likewise
        run-<id>.parquet      one finished run, a row per step; any Parquet reader reads it
        partial/<id>/         a run under way, gone when the run is whole
        checkpoints/<id>/     step-<t>.safetensors

    Nothing is written until something is recorded.

    >>> RunStore("runs/digits").load()
    Runs(32: train=300, test=100)
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def exists(self) -> bool:
        return (self.path / "store.json").is_file()

    @property
    def info(self) -> TaskInfo:
        """The task that the runs here are of.

        Raises:
            StoreError: there is no store here, or it is of a format this version cannot read.
        """
        content = self._read_json()
        check_format(content.get("format"), FORMAT, self.path / "store.json", oldest=1)
        try:
            return TaskInfo(n_train=content["n_train"], n_test=content["n_test"], **content["task"])
        except (KeyError, TypeError) as error:
            raise StoreError(f"{self.path / 'store.json'} is damaged: {error!r}") from None

    def open_for(self, task: Task | ExternalTask) -> None:
        """Make the store, or check that it is of this very task.

        Raises:
            StoreError: the store is of another task.
        """
        if self.exists:
            if self.info.fingerprint != task.fingerprint:
                raise StoreError(
                    f"{self.path} holds runs of another task ({self.info.name!r}, fingerprint "
                    f"{self.info.fingerprint[:12]}…), not of {task.name!r} ({task.fingerprint[:12]}…): "
                    "record into another folder"
                )
            self._complete(task)
            return
        self._check_portable(task)
        for side, examples in (("train", task.train), ("test", task.test)):
            self._write_examples(side, examples)
        info = task.info
        described = {"name": info.name, "arguments": dict(info.arguments), "fingerprint": info.fingerprint}
        content = {"format": FORMAT, "task": described, "n_train": info.n_train, "n_test": info.n_test}
        write_whole(self.path / "store.json", json.dumps(content, indent=2).encode() + b"\n")

    def open_recording(self, train: Examples | None, test: Examples | None, task: Task | str | None) -> TaskInfo:
        """Make the store for a recording of a loop, or compare it with what is given.

        Args:
            train, test: the examples of both sides, where they are given.
            task: what is trained, or the name of what a new store is of.

        Raises:
            InvalidInput: the store is new and its examples were not given.
            StoreError: the store is of other examples, or of another task.
        """
        if isinstance(task, Task):
            train, test = train or task.train, test or task.test
            if train.ids != task.train.ids or test.ids != task.test.ids:
                raise InvalidInput(
                    f"train= and test= are other examples than those of task {task.name!r}: leave them out"
                )
            self.open_for(task)
        elif not self.exists:
            if train is None or test is None or not len(train) or not len(test):
                raise InvalidInput(
                    f"{self.path} is a new store: say of which examples with train= and test= (ids, or Examples with "
                    "metadata)"
                )
            self.open_for(ExternalTask(task or "recorded", train, test))
        for side, stored, given in zip(("train", "test"), self.sides(), (train, test), strict=True):
            if given is not None and given.ids != stored.ids:
                raise StoreError(
                    f"{self.path} is of other {side} examples (its ids differ): record into another folder"
                )
        return self.info

    def _complete(self, task: Task | ExternalTask) -> None:
        """Write down the features and targets that a store made before lacks."""
        for side, here, given in zip(("train", "test"), self.sides(), (task.train, task.test), strict=True):
            features = given.features if here.features is None else here.features
            targets = given.targets if here.targets is None else here.targets
            if features is not here.features or targets is not here.targets:
                self._write_examples(side, here.with_features(features, targets))

    def _write_examples(self, side: str, examples: Examples) -> None:
        try:
            table = pa.Table.from_pandas(examples.table, preserve_index=False).replace_schema_metadata()
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise InvalidInput(f"{side} metadata: a column mixes types or holds objects ({error})") from None
        for name, values in ((_FEATURES, examples.features), (_TARGETS, examples.targets)):
            if name in table.column_names:
                raise InvalidInput(f"{side} metadata: a column cannot be called {name!r}")
            table = table if values is None else table.append_column(name, _arrow(values))
        write_whole(self.path / f"{side}.parquet", to_bytes(table))

    def ids(self) -> list[str]:
        """Ids of the finished runs, sorted.

        Raises:
            StoreError: there is no store here, or it holds a Parquet file that is not of a store.
        """
        _ = self.info
        names = sorted(path.name for path in self.path.glob("*.parquet"))
        foreign = [n for n in names if not n.startswith("run-") and n not in ("train.parquet", "test.parquet")]
        if foreign:
            raise StoreError(f"{self.path / foreign[0]} does not belong into a run store: move it elsewhere")
        return [name.removeprefix("run-").removesuffix(".parquet") for name in names if name.startswith("run-")]

    def __contains__(self, run_id: str) -> bool:
        return self._file(run_id).is_file()

    def write(self, run: Run) -> None:
        """Write one finished run, whole, in place of what the store has of it.

        Raises:
            StoreError: the run's task is not this store's, or the system refuses the write.
        """
        if run.fingerprint != self.info.fingerprint:
            raise StoreError(f"run {run.id} is of another task than {self.path}")
        with whole_file(self._file(run.id), aside=self.partial(run.id)) as file:
            write_run(file, run)
        self._drop_folder(run.id)

    def write_rows(self, about: RunHeader, rows: Iterable[RunRows]) -> None:
        """Write one finished run block by block, so that it may be longer than memory holds.

        Raises:
            StoreError: the run's task is not this store's, or the system refuses the write.
        """
        if about.fingerprint != self.info.fingerprint:
            raise StoreError(f"run {about.id} is of another task than {self.path}")
        with whole_file(self._file(about.id), aside=self.partial(about.id)) as file:
            write_rows(file, about, rows)

    def add(self, run: Run) -> Run:
        """Write ``run``, combined with what the store has of it by now; other processes wait meanwhile.

        Returns:
            The run as the store has it.

        Raises:
            StoreError: the store has other losses for the same run.
        """
        lock = filelock.FileLock(self.path / "partial" / f"{run.id}.write.lock")
        try:
            lock.acquire()
        except OSError as error:
            raise cannot_write(Path(lock.lock_file), error) from error
        try:
            if run.id in self:
                run = combined(self.read(run.id), run)
            self.write(run)
        except InvalidInput as error:
            raise StoreError(
                f"{self.path}: {error} (another machine, torch version or number of threads?). "
                "Nothing was changed: record into another folder"
            ) from None
        finally:
            with contextlib.suppress(OSError):
                Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()
            self._drop_folder(run.id)
        return run

    def read(self, run_id: str) -> Run:
        """One run.

        Raises:
            InvalidInput: there is no such run.
            StoreError: its file is damaged, foreign, or of another task.
        """
        return self._read(run_id, self.info, *self.sides())

    def all_runs(self) -> Runs:
        """Every finished run, of whatever recipe, verification runs too, sorted by id."""
        return self._all_runs()

    def _all_runs(self, mapped: bool = False) -> Runs:
        info, sides = self.info, self.sides()
        runs = (self._read(run_id, info, *sides) for run_id in self.ids())
        return Runs(_mapped(runs) if mapped else runs)

    def load(
        self,
        recipe: Recipe | None = None,
        *,
        where: str | None = None,
        verification: bool = False,
        mapped: bool = False,
    ) -> Runs:
        """The finished runs, sorted by id.

        Args:
            recipe: load the runs of this recipe only.
            where: a filter over what is known of the runs, such as ``optimizer == "adamw" and steps > 100``;
                see ``Runs.table`` for the columns.
            verification: load the runs made to confirm forecasts too.
            mapped: keep the losses in a temporary file that is mapped into memory, for more runs than memory holds;
                without measures. Additive, multiplicative and linear simulators fit from them block by block.

        Raises:
            StoreError: a file is damaged or foreign, or runs of several recipes are here and none was chosen.
        """
        runs = self._all_runs(mapped)
        runs = runs.where(where) if where else runs
        chosen = [run for run in runs if verification or not run.verification]
        recipes = {run.recipe for run in chosen if recipe is None or run.recipe == recipe}
        if len(recipes) > 1:
            shown = "\n  ".join(sorted(str(found) for found in recipes))
            raise StoreError(f"{self.path} holds runs of {len(recipes)} recipes; say which: load(recipe=…)\n  {shown}")
        return Runs(run for run in chosen if run.recipe in recipes)

    def merge(self, other: RunStore) -> int:
        """Take over every run and checkpoint of ``other``, a store of the same task; returns how many runs came new.

        Runs that both have are combined: neither loses what it recorded.

        Raises:
            StoreError: ``other`` is of another task, or has other losses for the same run.
        """
        if other.info.fingerprint != self.info.fingerprint:
            raise StoreError(f"{other.path} holds runs of another task than {self.path}")
        mine, new = set(self.all_runs().ids), 0
        for run in other.all_runs():
            new += run.id not in mine
            self.add(run)
            for step, file in run.checkpoints.items():
                if not self.checkpoint(run.id, step).is_file():
                    write_whole(self.checkpoint(run.id, step), file.read_bytes(), aside=self.partial(run.id))
            self._drop_folder(run.id)
        return new

    def copy(self, path: str | Path, where: str | None = None) -> RunStore:
        """A new store with the runs of this one, or with those that a filter over ``Runs.table`` matches.

        Raises:
            StoreError: there is a store at ``path`` already (``merge`` adds to one).
        """
        copied = RunStore(path)
        if copied.exists:
            raise StoreError(f"{path} is a run store already: RunStore({str(path)!r}).merge(…) adds to it")
        runs = self.all_runs().where(where) if where else self.all_runs()
        for name in ("train.parquet", "test.parquet", "store.json"):
            write_whole(copied.path / name, (self.path / name).read_bytes())
        for run in runs:
            write_whole(copied._file(run.id), self._file(run.id).read_bytes())
            for step, file in run.checkpoints.items():
                write_whole(copied.checkpoint(run.id, step), file.read_bytes())
        return copied

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Hold the right to record the runs kept under ``name`` while under way.

        Yields whether it was free. The system takes the right away from a process that dies.

        Raises:
            StoreError: the folder cannot be written.
        """
        lock = filelock.FileLock(self.path / "partial" / f"{name}.lock")
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            yield False
            return
        except OSError as error:
            raise cannot_write(Path(lock.lock_file), error) from error
        try:
            yield True
        finally:
            lock.release()

    def recorder(
        self,
        run: str | None = None,
        *,
        train: Examples | Sequence[Any] | None = None,
        test: Examples | Sequence[Any] | None = None,
        task: Task | str | None = None,
        recipe: Recipe | None = None,
        measures: Sequence[str] = (),
        resume: int | None = None,
    ) -> Recorder:
        """Record a training loop of your own as one run; see ``Recorder``."""
        return Recorder(
            self, run, train=train, test=test, task=task, recipe=recipe, measures=measures, resume=resume
        )  # fmt: skip

    def unfinished(self) -> list[str]:
        """Runs that a ``Recorder`` began and did not finish: under way elsewhere, or broken off."""
        return sorted(file.parent.name for file in (self.path / "partial").glob(f"*/{JOURNAL_FILE}"))

    def partial(self, name: str) -> Path:
        """Folder for a run, or a group of runs, under way."""
        return self.path / "partial" / name

    def drop_partial(self, name: str) -> None:
        """Forget what was kept under ``name``; the claim on it is given up too."""
        shutil.rmtree(self.partial(name), ignore_errors=True)
        (self.path / "partial" / f"{name}.lock").unlink(missing_ok=True)
        self._drop_folder(name)

    def _drop_folder(self, name: str) -> None:
        for folder in (self.partial(name), self.path / "partial"):
            with contextlib.suppress(OSError):  # it holds something, or another process was faster
                folder.rmdir()

    def checkpoint(self, run_id: str, step: int) -> Path:
        """File for a checkpoint after ``step`` updates."""
        return self.path / "checkpoints" / run_id / f"step-{step}.safetensors"

    def checkpoints(self, run_id: str) -> dict[int, Path]:
        """Files of the checkpoints there are, by step."""
        files = (self.path / "checkpoints" / run_id).glob("step-*.safetensors")
        found = {int(file.stem.removeprefix("step-")): file for file in files}
        return dict(sorted(found.items()))

    def __repr__(self) -> str:
        return f"RunStore({str(self.path)!r})"

    def _file(self, run_id: str) -> Path:
        return self.path / f"run-{run_id}.parquet"

    def _read(self, run_id: str, info: TaskInfo, train: Examples, test: Examples) -> Run:
        file = self._file(run_id)
        if not file.is_file():
            raise InvalidInput(f"no run {run_id!r} in {self.path}, {did_you_mean(run_id, self.ids())}")
        run = read_run(file)
        if run.id != run_id or run.fingerprint != info.fingerprint:
            raise StoreError(f"{file} is the run {run.id!r} of another task or name: it does not belong here")
        return dataclasses.replace(
            run, task_name=info.name, train=train, test=test, checkpoints=self.checkpoints(run_id)
        )

    def sides(self) -> tuple[Examples, Examples]:
        """The training and the test examples of the runs here."""
        return self._examples("train"), self._examples("test")

    def _examples(self, side: str) -> Examples:
        file = self.path / f"{side}.parquet"
        table = read_table(file)[0]
        if "id" not in table.column_names:
            raise StoreError(f"{file} has no column 'id'")
        arrays = {name: _numpy(table.column(name)) for name in (_FEATURES, _TARGETS) if name in table.column_names}
        metadata = table.drop_columns(["id", *arrays]).to_pandas()
        return Examples(table.column("id").to_pylist(), metadata, arrays.get(_FEATURES), arrays.get(_TARGETS))

    def _read_json(self) -> dict[str, Any]:
        file = self.path / "store.json"
        try:
            content = json.loads(file.read_text())
        except FileNotFoundError:
            raise StoreError(f"no run store at {self.path} (no store.json): record into it first") from None
        except ValueError as error:
            raise StoreError(f"{file} is damaged: {error}") from None
        if not isinstance(content, dict):
            raise StoreError(f"{file} is damaged: not a JSON object")
        return content

    @staticmethod
    def _check_portable(task: Task | ExternalTask) -> None:
        try:
            json.dumps(dict(task.arguments))
        except TypeError as error:
            raise InvalidInput(f"task {task.name!r}: its arguments must be plain JSON values ({error})") from None


def _mapped(runs: Iterable[Run]) -> list[Run]:
    """The same runs with their losses in one file without a name, mapped into memory; gone when the arrays are.

    Measures are left out: to fit on one, ``select`` it from runs that are loaded as they are.
    """
    waiting, start = [], 0
    with tempfile.TemporaryFile() as file:
        for run in runs:
            there = run.losses.nbytes
            file.write(np.ascontiguousarray(run.losses).tobytes())
            blank = np.broadcast_to(run.losses.dtype.type(0), run.losses.shape)
            waiting.append((dataclasses.replace(run, losses=blank, measures={}), slice(start, start + there)))
            start += there
        file.flush()
        content = np.memmap(file, np.uint8, "r") if waiting else np.empty(0, np.uint8)
    return [
        dataclasses.replace(run, losses=content[place].view(run.losses.dtype).reshape(run.losses.shape))
        for run, place in waiting
    ]


def _arrow(values: np.ndarray) -> pa.Array:
    """A column of numbers, or of lists of equal length."""
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).ravel()), values.shape[1])


def _numpy(column: pa.ChunkedArray) -> np.ndarray:
    array = column.combine_chunks()
    if not pa.types.is_fixed_size_list(array.type):
        return array.to_numpy(zero_copy_only=False)
    return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), -1)
