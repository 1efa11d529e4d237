"""``RunStore``: runs on disk, in a folder of Parquet files, each written atomically."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import filelock
import numpy as np
import pyarrow as pa
from annotated_types import Ge

from simfluence._internal.checked import checked, fitting
from simfluence._internal.columns import from_arrow
from simfluence._internal.files import (
    cannot_write,
    check_file_name,
    check_format,
    check_no_links,
    regular_content,
    whole_file,
    write_whole,
)
from simfluence._internal.types import Count
from simfluence.errors import InvalidInput, StoreError, did_you_mean
from simfluence.examples import Examples
from simfluence.recipe import Recipe
from simfluence.runs import Run, Runs, combined
from simfluence.storage.journal import JOURNAL_FILE
from simfluence.storage.recorder import Recorder
from simfluence.storage.run_file import (
    RunHeader,
    RunRows,
    read_run,
    read_table,
    signed_content,
    to_bytes,
    write_rows,
    write_run,
)
from simfluence.task import ExternalTask, Task, TaskInfo

__all__ = ["RunStore"]

_FEATURES, _TARGETS = "simfluence.features", "simfluence.targets"  # columns next to the metadata

#: Version of store.json that this version writes. Formats 1 and 2 had no checksums.
_FORMAT = 3
_LARGEST_DESCRIPTION = 2**24  # bytes of a store.json
_SIDES = ("train", "test")
_MERGING = ".merging-"  # begins the name of the file that marks a merge until it is whole
_COPYING = ".copying"  # folder for the temporary files of a copy
_FIELDS = {"format": int, "task": dict, "n_train": Count, "n_test": Count}  # of store.json
_TASK_FIELDS = {"name": str, "arguments": dict, "fingerprint": str}
_CHECKSUMS = {"tables": dict, "sha256": str}  # further fields of store.json since format 3

Step = Annotated[int, Ge(0)]


@dataclasses.dataclass(frozen=True)
class _Description:
    """The content of store.json: the task, and the SHA-256 of each side's table, which older formats lack."""

    info: TaskInfo
    digests: Mapping[str, str]

    def to_bytes(self) -> bytes:
        info = self.info
        described = {"name": info.name, "arguments": dict(info.arguments), "fingerprint": info.fingerprint}
        content = {"format": _FORMAT if self.digests else _FORMAT - 1, "task": described}
        content |= {"n_train": info.n_train, "n_test": info.n_test}
        content |= {"tables": dict(self.digests)} if self.digests else {}
        content |= {"sha256": _checksum(content)} if self.digests else {}
        return json.dumps(content, indent=2).encode() + b"\n"

    @classmethod
    def from_bytes(cls, content: bytes, file: Path) -> _Description:
        """Read store.json and check every value of it.

        Raises:
            StoreError: a value is missing, unknown or wrong, or the format is newer.
        """
        try:
            parsed = fitting("its content", json.loads(content), dict)
            check_format(parsed.get("format"), _FORMAT, file, oldest=1)
            signed = parsed["format"] == _FORMAT
            fields = _fields("", parsed, _FIELDS | (_CHECKSUMS if signed else {}))
            if signed and fields["sha256"] != _checksum({k: v for k, v in parsed.items() if k != "sha256"}):
                raise InvalidInput("its checksum does not match")
            task = _fields("task.", fields["task"], _TASK_FIELDS)
            if not re.fullmatch("[0-9a-f]{64}", task["fingerprint"]):
                raise InvalidInput("task.fingerprint is not 64 hexadecimal digits")
            digests = _fields("tables.", fields["tables"], dict.fromkeys(_SIDES, str)) if signed else {}
        except (ValueError, RecursionError) as error:
            raise StoreError(f"{file} is damaged: {error}. Copy it from a backup, or record again") from None
        return cls(TaskInfo(**task, n_train=fields["n_train"], n_test=fields["n_test"]), digests)


def _fields(prefix: str, content: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a JSON object, checked to be these and of these types."""
    if set(content) != set(hints):
        wrong = sorted(set(content) ^ set(hints))[0]
        raise InvalidInput(f"{prefix}{wrong} is {'missing' if wrong in hints else 'unknown'}")
    return {name: fitting(f"{prefix}{name}", content[name], hint) for name, hint in hints.items()}


def _checksum(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of JSON content, however it is laid out."""
    plain = json.loads(json.dumps(content))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


class RunStore:
    """A folder of recorded runs of one task.

        store.json            format version, task name, arguments and fingerprint, numbers of examples, checksums
        train.parquet         metadata and features of the training examples, in index order; test.parquet likewise
        run-<id>.parquet      one finished run, a row per time; any Parquet reader can read it
        partial/<id>/         an unfinished recording, deleted when the run is complete
        checkpoints/<id>/     step-<t>.safetensors
        .lock                 held by the process that changes a file

    Nothing is written until a run is recorded, and then only to a folder that is new, empty or a store.

    Raises:
        InvalidInput: the path is empty, or not a path.

    >>> RunStore("runs/digits").load()
    Runs(32: train=300, test=100)
    """

    @checked
    def __init__(self, path: str | Path) -> None:
        if not str(path).strip() or "\0" in str(path):
            raise InvalidInput(f"RunStore: path must name a folder, got {str(path)!r}; write '.' for the present one")
        self.path = Path(path)

    @property
    def exists(self) -> bool:
        """Whether the folder is a run store."""
        return os.path.isfile(self.path / "store.json")

    @property
    def info(self) -> TaskInfo:
        """The name, arguments, fingerprint and sizes of the task of this store.

        Raises:
            StoreError: the folder is not a store, or its format is one that this version cannot read.
        """
        return self._described().info

    def _described(self) -> _Description:
        file = self.path / "store.json"
        if not self.exists:
            runs = any(self.path.glob("run-*.parquet"))
            advice = "a copy was interrupted here: delete the folder and copy again" if runs else "record into it first"
            raise StoreError(f"no run store at {self.path} (store.json is missing): {advice}")
        return _Description.from_bytes(regular_content(file, _LARGEST_DESCRIPTION), file)

    def _describe(self, info: TaskInfo, digests: Mapping[str, str]) -> None:
        write_whole(self.path / "store.json", _Description(info, digests).to_bytes())

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Wait until no other process or thread changes the store.

        The lock's file stays: who deletes the file of a lock lets two processes hold it.
        """
        with self._acquired(self.path / ".lock"):
            yield

    @contextlib.contextmanager
    def _acquired(self, path: Path, blocking: bool = True) -> Iterator[bool]:
        """Hold the lock of a file, or yield False if another process holds it and this one does not wait."""
        lock = filelock.FileLock(check_no_links(path, self.path))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=blocking, poll_interval=0.005)
        except filelock.Timeout:
            yield False
            return
        except (OSError, NotImplementedError) as error:
            raise cannot_write(path, error if isinstance(error, OSError) else OSError(str(error))) from error
        try:
            yield True
        finally:
            lock.release()

    def _check_unused(self) -> None:
        """Check that a store can be created here: the folder is new or empty, or has an unfinished store.

        Raises:
            StoreError: the folder has other files, which are not touched.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise StoreError(f"{self.path} is a file, but a run store is a folder: choose another path")
        names = sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith("."))
        foreign = [name for name in names if not self._is_own_table(name)]
        if foreign and not self.exists:  # another process may have created the store just now
            raise StoreError(
                f"{self.path} is not a run store, and has other files, such as {foreign[0]!r}: "
                "choose a new or an empty folder, or delete it if a copy was interrupted there"
            )

    def _is_own_table(self, name: str) -> bool:
        file = self.path / name
        if name not in ("train.parquet", "test.parquet") or file.is_symlink():
            return False
        try:
            signed_content(file)
        except StoreError:
            return False
        return True

    @checked
    def open_for(self, task: Task | ExternalTask) -> None:
        """Create the store, or check that it has the same task.

        Raises:
            StoreError: the store has runs of another task, or the folder is not a store and not empty.
        """
        if not self.exists:
            self._check_portable(task)
            self._check_unused()
            with self._locked():
                if not self.exists:  # no other process was faster
                    self._check_unused()
                    self._create(task)
                    return
        info = self.info
        if info.fingerprint != task.fingerprint:
            raise StoreError(
                f"{self.path} holds runs of another task ({info.name!r}, fingerprint {info.fingerprint[:12]}…), "
                f"not of {task.name!r} ({task.fingerprint[:12]}…): record into another folder"
            )
        self._complete(task)

    def _create(self, task: Task | ExternalTask) -> None:
        """Write the tables, then store.json, which has their checksums: it makes the folder a store."""
        sides = {"train": task.train, "test": task.test}
        tables = {side: self._table(side, examples) for side, examples in sides.items()}
        for side, content in tables.items():
            write_whole(self.path / f"{side}.parquet", content)
        self._describe(task.info, {side: hashlib.sha256(content).hexdigest() for side, content in tables.items()})

    @checked
    def open_recording(self, train: Examples | None, test: Examples | None, task: Task | str | None) -> TaskInfo:
        """Create the store for a ``Recorder``, or check that it has the same examples and task.

        Args:
            train, test: training and test examples; None takes those of the store or of the task.
            task: the task that is trained, or a name for a new store.

        Raises:
            InvalidInput: the store is new and its examples are missing, or they are not those of the task.
            StoreError: the store has other examples, or runs of another task.
        """
        if isinstance(task, Task):
            train, test = train or task.train, test or task.test
            if train.ids != task.train.ids or test.ids != task.test.ids:
                raise InvalidInput(f"train= and test= differ from the examples of task {task.name!r}: leave them out")
            self.open_for(task)
        elif not self.exists:
            if train is None or test is None or not len(train) or not len(test):
                raise InvalidInput(
                    f"{self.path} is a new store and needs its examples: pass train= and test= (ids, or Examples with "
                    "metadata)"
                )
            self.open_for(ExternalTask(task or "recorded", train, test))
        for side, stored, passed in zip(("train", "test"), self.sides(), (train, test), strict=True):
            if passed is not None and passed.ids != stored.ids:
                raise StoreError(f"{self.path} has {side} examples with other ids: record into another folder")
        return self.info

    def _complete(self, task: Task | ExternalTask) -> None:
        """Add the task's features and targets to a store that lacks them, such as one of an older version."""
        completed = {}
        for side, stored, examples in zip(_SIDES, self.sides(), (task.train, task.test), strict=True):
            features = examples.features if stored.features is None else stored.features
            targets = examples.targets if stored.targets is None else stored.targets
            if features is not stored.features or targets is not stored.targets:
                completed[side] = self._table(side, stored.with_features(features, targets))
        if not completed:
            return
        with self._locked():
            info = self.info
            self._describe(info, {})  # without checksums, so that the store can be read after an interruption here
            for side, content in completed.items():
                write_whole(self.path / f"{side}.parquet", content)
            self._describe(info, self._digests())

    @staticmethod
    def _table(side: str, examples: Examples) -> bytes:
        """Return the ids, metadata, features and targets of one side as the content of a Parquet file."""
        try:
            table = pa.Table.from_pandas(examples.table, preserve_index=False).replace_schema_metadata()
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise InvalidInput(f"{side} metadata: a column mixes types or holds objects ({error})") from None
        for name, values in ((_FEATURES, examples.features), (_TARGETS, examples.targets)):
            if name in table.column_names:
                raise InvalidInput(f"{side} metadata: a column cannot be called {name!r}")
            table = table if values is None else table.append_column(name, _arrow(values))
        return to_bytes(table)

    def ids(self) -> list[str]:
        """Return the ids of the finished runs, sorted.

        Raises:
            StoreError: the folder is not a store, or it contains a Parquet file that is not part of one.
        """
        _ = self.info
        names, foreign = self._names()
        if foreign:
            raise StoreError(_foreign(self.path / foreign[0]))
        return names

    def _names(self) -> tuple[list[str], list[str]]:
        """Return the ids of the runs, and the names of Parquet files that are not part of a store."""
        files = {path.name for path in self.path.glob("*.parquet") if not path.name.startswith(".")}
        files -= {f"{side}.parquet" for side in _SIDES}
        ids = {name: name.removeprefix("run-").removesuffix(".parquet") for name in sorted(files)}
        runs = [name for name, run_id in ids.items() if name.startswith("run-") and _is_file_name(run_id)]
        return [ids[name] for name in runs], [name for name in ids if name not in runs]

    @checked
    def __contains__(self, run_id: str) -> bool:
        return self._file(run_id).is_file()

    @checked
    def write(self, run: Run) -> None:
        """Write one finished run; replace a stored run of the same id.

        Raises:
            InvalidInput: the run's id cannot be part of the name of a file.
            StoreError: the run belongs to another task than the store, or the file cannot be written.
        """
        with self._locked_for(run.id, run.fingerprint):
            self._write(run)

    @contextlib.contextmanager
    def _locked_for(self, run_id: str, fingerprint: str | None) -> Iterator[None]:
        """Hold the store's lock while the file of a run of this store's task is written."""
        self._file(run_id)
        if fingerprint != self.info.fingerprint:
            raise StoreError(f"run {run_id} belongs to another task than {self.path}: record into another folder")
        with self._locked():
            try:
                yield
            finally:
                self._drop_folder(run_id)

    def _write(self, run: Run) -> None:
        info, shape = self.info, (run.curriculum.n_train, run.losses.shape[1])
        if shape != (info.n_train, info.n_test):
            raise StoreError(
                f"run {run.id} has {shape[0]} training and {shape[1]} test examples, but {self.path} has "
                f"{info.n_train} and {info.n_test}: record into another folder"
            )
        with whole_file(self._file(run.id), aside=self.partial(run.id)) as file:
            write_run(file, run)

    @checked
    def write_rows(self, about: RunHeader, rows: Iterable[RunRows]) -> None:
        """Write one finished run block by block, so that it need not fit in memory.

        Raises:
            InvalidInput: the run's id cannot be part of the name of a file.
            StoreError: the run belongs to another task than the store, or the file cannot be written.
        """
        with (
            self._locked_for(about.id, about.fingerprint),
            whole_file(self._file(about.id), aside=self.partial(about.id)) as file,
        ):
            write_rows(file, about, rows)

    @checked
    def add(self, run: Run) -> Run:
        """Write ``run``, combined with the stored run of the same id. Other processes that add runs wait.

        Returns:
            The combined run.

        Raises:
            InvalidInput: the run's id cannot be part of the name of a file.
            StoreError: the store has different losses for the same run.
        """
        with self._locked_for(run.id, run.fingerprint):
            run = self._combined(run)
            self._write(run)
        return run

    def _combined(self, run: Run) -> Run:
        """Return the run combined with the stored run of the same id, if there is one."""
        if run.id not in self:
            return run
        try:
            return combined(self.read(run.id), run)
        except InvalidInput as error:
            raise StoreError(
                f"{self.path}: {error} (another machine, torch version or number of threads?). "
                "Nothing was changed: record into another folder"
            ) from None

    @checked
    def read(self, run_id: str) -> Run:
        """Read one run.

        Raises:
            InvalidInput: the store has no such run.
            StoreError: the run's file is damaged, was not written by simfluence, or belongs to another task.
        """
        return self._read(run_id, self._file(run_id), self.info, *self.sides())

    def all_runs(self) -> Runs:
        """Read every finished run, of any recipe and including verification runs, sorted by id."""
        return self._all_runs()

    def _all_runs(self, mapped: bool = False, skip_damaged: bool = False) -> Runs:
        for mark in sorted(self.path.glob(f"{_MERGING}*")):
            warnings.warn(
                f"a merge into {self.path} is not complete ({mark.name}): some runs are missing. If no process is "
                "merging any more, it was interrupted: merge again",
                stacklevel=3,
            )
        info, sides = self.info, self.sides()
        names = self._names()[0] if skip_damaged else self.ids()
        damaged = [_foreign(self.path / name) for name in self._names()[1]]

        def each() -> Iterator[Run]:
            for run_id in names:
                try:
                    yield self._read(run_id, self._file(run_id), info, *sides)
                except StoreError as error:
                    if not skip_damaged:
                        raise
                    damaged.append(str(error))

        runs = Runs(_mapped(each()) if mapped else each())
        if damaged:
            warnings.warn(f"{len(damaged)} files were left out:\n" + "\n".join(damaged), stacklevel=3)
        return runs

    @checked
    def load(
        self,
        recipe: Recipe | str | None = None,
        *,
        where: str | None = None,
        verification: bool = False,
        mapped: bool = False,
        skip_damaged: bool = False,
    ) -> Runs:
        """Read the finished runs, sorted by id.

        Args:
            recipe: load only the runs of this recipe. Text is taken as the filter ``where``.
            where: a filter over the columns of ``Runs.table``, such as ``optimizer == "adamw" and steps > 100``.
            verification: also load the runs that were recorded to verify forecasts.
            mapped: keep the losses in a memory-mapped temporary file, for runs that do not fit in memory, and skip
                the measures. Additive, multiplicative and linear simulators fit from such runs block by block.
            skip_damaged: leave out files that are damaged or not part of the store, with a warning that names them.

        Raises:
            InvalidInput: a filter is given twice, or cannot be read.
            StoreError: a file is damaged or not part of a store, or the runs have several recipes and none is chosen.
        """
        if isinstance(recipe, str):
            if where is not None:
                raise InvalidInput(f"load: {recipe!r} and where={where!r} are two filters: join them with 'and'")
            recipe, where = None, recipe
        runs = self._all_runs(mapped, skip_damaged)
        runs = runs if where is None else runs.where(where)
        chosen = [run for run in runs if verification or not run.verification]
        recipes = {run.recipe for run in chosen if recipe is None or run.recipe == recipe}
        if len(recipes) > 1:
            choices = "\n  ".join(sorted(map(str, recipes)))
            raise StoreError(
                f"{self.path} holds runs of {len(recipes)} recipes: choose one with load(recipe=…)\n  {choices}"
            )
        return Runs(run for run in chosen if run.recipe in recipes)

    @checked
    def merge(self, other: RunStore) -> int:
        """Copy every run and checkpoint of ``other``, a store of the same task, into this one.

        Runs that both stores have are combined, and nothing recorded is lost. To complete an
        interrupted merge, merge again; until then, ``load`` warns.

        Returns:
            The number of runs that this store did not have before.

        Raises:
            StoreError: ``other`` has another task, or different losses for the same run.
        """
        if other.info.fingerprint != self.info.fingerprint:
            raise StoreError(f"{other.path} holds runs of another task than {self.path}: only the same task can merge")
        runs = other.all_runs()
        new = [run.id for run in runs if run.id not in self]
        for run in runs:
            self._combined(run)  # a difference is found before anything is changed
        mark = self.path / f"{_MERGING}{hashlib.sha256(str(other.path.resolve()).encode()).hexdigest()[:16]}"
        write_whole(mark, str(other.path).encode())
        for run in runs:
            self.add(run)
            for step, file in run.checkpoints.items():
                if not self.checkpoint(run.id, step).is_file():
                    content = regular_content(check_no_links(file, other.path))
                    write_whole(self.checkpoint(run.id, step), content, aside=self.partial(run.id))
            self._drop_folder(run.id)
        with contextlib.suppress(OSError):  # another process has merged the same store
            mark.unlink()
        return len(new)

    @checked
    def copy(self, path: str | Path, where: str | None = None) -> RunStore:
        """Create a new store with the runs of this one, or with those that a filter over ``Runs.table`` matches.

        Raises:
            InvalidInput: the filter cannot be read.
            StoreError: ``path`` is already a store (use ``merge`` to add runs to it), or a folder with other files.
        """
        copied = RunStore(path)
        runs = self.all_runs() if where is None else self.all_runs().where(where)
        copied._check_copy()
        with copied._locked():
            copied._check_copy()
            files = [self.path / f"{side}.parquet" for side in _SIDES]
            files += [file for run in runs for file in (self._file(run.id), *run.checkpoints.values())]
            try:
                for file in files:
                    content = regular_content(check_no_links(file, self.path))
                    target = copied.path / file.relative_to(self.path)
                    write_whole(check_no_links(target, copied.path), content, aside=copied.path / _COPYING)
                copied._describe(self.info, copied._digests())
            except BaseException:
                for file in files:
                    copied._remove(file.relative_to(self.path))
                raise
            finally:
                with contextlib.suppress(OSError):
                    (copied.path / _COPYING).rmdir()
        return copied

    def _check_copy(self) -> None:
        if self.exists:
            raise StoreError(
                f"{self.path} is already a run store: use RunStore({str(self.path)!r}).merge(…) to add runs to it"
            )
        self._check_unused()

    def _digests(self) -> dict[str, str]:
        return {side: hashlib.sha256(signed_content(self.path / f"{side}.parquet")).hexdigest() for side in _SIDES}

    def _remove(self, relative: Path) -> None:
        """Delete a file of a broken-off copy, and its folders once they are empty."""
        with contextlib.suppress(OSError):
            (self.path / relative).unlink(missing_ok=True)
            for folder in relative.parents[:-1]:
                (self.path / folder).rmdir()

    @checked
    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Lock an unfinished recording against other processes; yield False if it is locked already.

        The operating system releases the lock of a process that dies.

        Raises:
            StoreError: the folder cannot be written.
        """
        lock = self.partial(name).with_name(f"{name}.lock")
        with self._acquired(lock, blocking=False) as free:
            yield free

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
        """Return a ``Recorder`` of a training loop of your own; see there for arguments and errors."""
        return Recorder(
            self, run, train=train, test=test, task=task, recipe=recipe, measures=measures, resume=resume
        )  # fmt: skip

    def unfinished(self) -> list[str]:
        """Return the ids of recordings that a ``Recorder`` started: still running elsewhere, or interrupted."""
        return sorted(file.parent.name for file in (self.path / "partial").glob(f"*/{JOURNAL_FILE}"))

    @checked
    def partial(self, name: str) -> Path:
        """Return the folder of an unfinished recording of one run or of a group.

        Raises:
            InvalidInput: the name cannot be the name of a folder.
            StoreError: the folder is a symbolic link.
        """
        return check_no_links(self.path / "partial" / check_file_name("the run or group", name), self.path)

    @checked
    def drop_partial(self, name: str) -> None:
        """Delete an unfinished recording and its lock.

        Raises:
            InvalidInput: the name cannot be the name of a folder.
            StoreError: the folder is a symbolic link, or cannot be deleted.
        """
        folder = self.partial(name)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.with_name(f"{name}.lock").unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(folder, error) from error
        self._drop_folder(name)

    def _drop_folder(self, name: str) -> None:
        for folder in (self.partial(name), self.path / "partial"):
            with contextlib.suppress(OSError):  # not empty, or another process was faster
                folder.rmdir()

    @checked
    def checkpoint(self, run_id: str, step: Step) -> Path:
        """Return the path of a run's checkpoint after ``step`` updates.

        Raises:
            InvalidInput: the id cannot be the name of a folder, or the step is negative.
            StoreError: the file or its folder is a symbolic link.
        """
        folder = self.path / "checkpoints" / check_file_name("the run id", run_id)
        return check_no_links(folder / f"step-{step}.safetensors", self.path)

    @checked
    def checkpoints(self, run_id: str) -> dict[int, Path]:
        """Return the paths of a run's checkpoints by step.

        Raises:
            InvalidInput: the id cannot be the name of a folder.
        """
        folder = self.path / "checkpoints" / check_file_name("the run id", run_id)
        found = {re.fullmatch(r"step-([0-9]{1,18})\.safetensors", file.name): file for file in folder.glob("step-*")}
        return dict(sorted((int(match[1]), file) for match, file in found.items() if match))

    def __repr__(self) -> str:
        return f"RunStore({str(self.path)!r})"

    def _file(self, run_id: str) -> Path:
        return self.path / f"run-{check_file_name('the run id', run_id)}.parquet"

    def _read(self, run_id: str, file: Path, info: TaskInfo, train: Examples, test: Examples) -> Run:
        if not os.path.lexists(file):
            raise InvalidInput(f"no run {run_id!r} in {self.path}, {did_you_mean(run_id, self.ids())}")
        run = read_run(file)
        if run.id != run_id or run.fingerprint != info.fingerprint:
            raise StoreError(
                f"{file} contains run {run.id!r}, which has another id or belongs to another task: move it elsewhere"
            )
        if (run.curriculum.n_train, run.losses.shape[1]) != (info.n_train, info.n_test):
            raise StoreError(f"{file} contains a run of other numbers of examples than the store: move it elsewhere")
        return dataclasses.replace(
            run, task_name=info.name, train=train, test=test, checkpoints=self.checkpoints(run_id)
        )

    def sides(self) -> tuple[Examples, Examples]:
        """Return the training and the test examples of the store.

        Raises:
            StoreError: a table is damaged, or is not the one that was written with the store.
        """
        described = self._described()
        return self._examples("train", described), self._examples("test", described)

    def _examples(self, side: str, described: _Description) -> Examples:
        file = self.path / f"{side}.parquet"
        table = read_table(file)[0]
        if described.digests and hashlib.sha256(signed_content(file)).hexdigest() != described.digests[side]:
            raise StoreError(
                f"{file} is not the table that was written with {self.path / 'store.json'}: copy it from a backup"
            )
        count = described.info.n_train if side == "train" else described.info.n_test
        if len(table) != count:
            raise StoreError(f"{file} has {len(table)} examples, but {self.path / 'store.json'} says {count}")
        if table.column_names.count("id") != 1 or table.column("id").null_count:
            raise StoreError(f"{file} is damaged: it has no column 'id', or an id is missing")
        try:
            arrays = {name: _numpy(table.column(name)) for name in (_FEATURES, _TARGETS) if name in table.column_names}
            metadata = from_arrow(table.drop_columns(["id", *arrays]))
            return Examples(table.column("id").to_pylist(), metadata, arrays.get(_FEATURES), arrays.get(_TARGETS))
        except (ValueError, TypeError, LookupError, ArithmeticError, NotImplementedError, pa.ArrowException) as error:
            raise StoreError(f"{file} does not hold examples: {error}. Copy it from a backup") from error

    @staticmethod
    def _check_portable(task: Task | ExternalTask) -> None:
        try:
            json.dumps(dict(task.arguments))
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidInput(f"task {task.name!r}: its arguments must be plain JSON values ({error})") from None


def _foreign(file: Path) -> str:
    return f"{file} is not part of a run store: move it elsewhere"


def _is_file_name(name: str) -> bool:
    try:
        check_file_name("the run id", name)
    except InvalidInput:
        return False
    return True


def _mapped(runs: Iterable[Run]) -> list[Run]:
    """Move the losses of all runs to one temporary memory-mapped file, which is deleted along with the arrays.

    The runs lose their measures: to fit on a measure, load the runs unmapped and ``select`` it.
    """
    blanks, start = [], 0  # runs without their losses, and the losses' slices of the file
    with tempfile.TemporaryFile() as file:
        for run in runs:
            file.write(np.ascontiguousarray(run.losses).tobytes())
            end = start + run.losses.nbytes
            blank = np.broadcast_to(run.losses.dtype.type(0), run.losses.shape)
            blanks.append((dataclasses.replace(run, losses=blank, measures={}), slice(start, end)))
            start = end
        file.flush()
        content = np.memmap(file, np.uint8, "r") if blanks else np.empty(0, np.uint8)
    return [
        dataclasses.replace(run, losses=content[span].view(run.losses.dtype).reshape(run.losses.shape))
        for run, span in blanks
    ]


def _arrow(values: np.ndarray) -> pa.Array:
    """Convert an array to a column of numbers, or of lists of equal length."""
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).ravel()), values.shape[1])


def _numpy(column: pa.ChunkedArray) -> np.ndarray:
    """Convert a column of numbers, or of lists of equal length, to an array."""
    array = column.combine_chunks()
    is_list = pa.types.is_fixed_size_list(array.type)
    values: np.ndarray = (array.flatten() if is_list else array).to_numpy(zero_copy_only=False)
    return values.reshape(len(array), -1) if is_list else values
