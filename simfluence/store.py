"""Where runs live on disk: a folder of Parquet files, each whole or not there at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from simfluence._files import write_whole
from simfluence._version import __version__
from simfluence.curriculum import Curriculum
from simfluence.errors import InvalidInput, StoreError, did_you_mean
from simfluence.examples import Examples
from simfluence.recipe import Recipe
from simfluence.runs import Run, Runs
from simfluence.task import Task, TaskInfo

FORMAT = 1
_ABOUT = b"simfluence"
_UNSIGNED = b"0" * 64
_CHECKSUM = b"simfluence.sha256"


class RunStore:
    """A folder of recorded runs of one task.

        store.json            format version, task name, arguments and fingerprint, numbers of examples
        train.parquet         metadata of the training examples, in index order; test.parquet likewise
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
        if content.get("format") != FORMAT:
            raise StoreError(f"{self.path} has format {content.get('format')!r}; this version reads format {FORMAT}")
        try:
            return TaskInfo(n_train=content["n_train"], n_test=content["n_test"], **content["task"])
        except (KeyError, TypeError) as error:
            raise StoreError(f"{self.path / 'store.json'} is damaged: {error!r}") from None

    def open_for(self, task: Task) -> None:
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
            return
        self._check_portable(task)
        for side, examples in (("train", task.train), ("test", task.test)):
            table = pa.Table.from_pandas(examples.table, preserve_index=False)
            write_whole(self.path / f"{side}.parquet", _signed(table.replace_schema_metadata()))
        info = task.info
        described = {"name": info.name, "arguments": dict(info.arguments), "fingerprint": info.fingerprint}
        content = {"format": FORMAT, "task": described, "n_train": info.n_train, "n_test": info.n_test}
        write_whole(self.path / "store.json", json.dumps(content, indent=2).encode() + b"\n")

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
        """Write one finished run, whole, and drop what was kept of it while under way.

        Raises:
            StoreError: the run's task is not this store's.
        """
        if run.fingerprint != self.info.fingerprint:
            raise StoreError(f"run {run.id} is of another task than {self.path}")
        content = _signed(run_table(run))
        write_whole(self._file(run.id), content, aside=self.partial(run.id))
        self.drop_partial(run.id)

    def read(self, run_id: str) -> Run:
        """One run.

        Raises:
            InvalidInput: there is no such run.
            StoreError: its file is damaged, foreign, or of another task.
        """
        return self._read(run_id, self.info, *self._sides())

    def load(self, recipe: Recipe | None = None) -> Runs:
        """All finished runs, sorted by id.

        Args:
            recipe: load the runs of this recipe only.

        Raises:
            StoreError: a file is damaged or foreign, or runs of several recipes are here and none was chosen.
        """
        info, sides = self.info, self._sides()
        runs = [self._read(run_id, info, *sides) for run_id in self.ids()]
        recipes = {run.recipe for run in runs if recipe is None or run.recipe == recipe}
        if len(recipes) > 1:
            shown = "\n  ".join(sorted(str(found) for found in recipes))
            raise StoreError(f"{self.path} holds runs of {len(recipes)} recipes; say which: load(recipe=…)\n  {shown}")
        return Runs(run for run in runs if run.recipe in recipes)

    def partial(self, run_id: str) -> Path:
        """Folder for a run under way."""
        return self.path / "partial" / run_id

    def drop_partial(self, run_id: str) -> None:
        shutil.rmtree(self.partial(run_id), ignore_errors=True)
        parent = self.path / "partial"
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()

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
        table, about = _read_signed(file)
        if about.get("id") != run_id or about.get("fingerprint") != info.fingerprint:
            raise StoreError(f"{file} is the run {about.get('id')!r} of another task or name: it does not belong here")
        run = _run_of(table, about, file)
        return Run(**vars(run) | {"train": train, "test": test, "checkpoints": self.checkpoints(run_id)})

    def _sides(self) -> tuple[Examples, Examples]:
        return self._examples("train"), self._examples("test")

    def _examples(self, side: str) -> Examples:
        file = self.path / f"{side}.parquet"
        table = _parse(file)[0].to_pandas()
        if "id" not in table.columns:
            raise StoreError(f"{file} has no column 'id'")
        return Examples(table["id"].tolist(), table.drop(columns="id"))

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
    def _check_portable(task: Task) -> None:
        try:
            json.dumps(dict(task.arguments))
        except TypeError as error:
            raise InvalidInput(f"task {task.name!r}: its arguments must be plain JSON values ({error})") from None


def run_table(run: Run) -> pa.Table:
    """A run as a table: a row per step from 0 to T, the rest in the schema's metadata."""
    steps = run.steps
    rates = np.full(steps, np.nan) if run.learning_rates is None else run.learning_rates
    width = run.losses.shape[1]
    value = pa.float64() if run.losses.dtype == np.float64 else pa.float32()
    offsets = np.concatenate([[0], run.curriculum.offsets]).astype(np.int32)  # the row of step 0 has no batch
    flat = pa.array(np.ascontiguousarray(run.losses).reshape(-1), value)
    columns = {
        "step": pa.array(np.arange(steps + 1), pa.int32()),
        "batch": pa.ListArray.from_arrays(offsets, pa.array(run.curriculum.indices, pa.int32())),
        "lr": pa.array(np.concatenate([[np.nan], rates]), pa.float64(), from_pandas=True),
        "losses": pa.FixedSizeListArray.from_arrays(flat, width),
    }
    return pa.table(columns).replace_schema_metadata({_ABOUT: json.dumps(_about(run))})


def _about(run: Run) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "id": run.id,
        "fingerprint": run.fingerprint,
        "n_train": run.curriculum.n_train,
        "seed": run.recipe.seed if run.recipe else None,
        "recipe": run.recipe.model_dump() if run.recipe else None,
        "diverged": run.diverged,
        "library": __version__,
    }


def _run_of(table: pa.Table, about: Mapping[str, Any], file: Path) -> Run:
    if about.get("format") != FORMAT:
        raise StoreError(f"{file} has format {about.get('format')!r}; this version reads format {FORMAT}")
    batches = table.column("batch").combine_chunks()
    losses = table.column("losses").combine_chunks()
    sizes = batches.value_lengths().to_numpy()[1:]
    return Run(
        id=about["id"],
        curriculum=Curriculum.from_flat(batches.flatten().to_numpy(), sizes, about["n_train"]),
        losses=losses.flatten().to_numpy().reshape(len(table), -1),
        learning_rates=table.column("lr").to_numpy()[1:],
        recipe=None if about["recipe"] is None else Recipe(**about["recipe"]),
        fingerprint=about["fingerprint"],
    )


def _signed(table: pa.Table) -> bytes:
    """A Parquet file whose metadata holds the SHA-256 of the whole file, taken with zeros in its place."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({_CHECKSUM.decode(): _UNSIGNED.decode()})
    content = sink.getvalue().to_pybytes()
    if content.count(_UNSIGNED) != 1:
        raise StoreError("the file to be written contains 64 zeros in a row as text: rename what holds them")
    return content.replace(_UNSIGNED, hashlib.sha256(content).hexdigest().encode())


def _read_signed(file: Path) -> tuple[pa.Table, dict[str, Any]]:
    """A run file's table and what its metadata says, after the checksum held."""
    table, metadata = _parse(file)
    if _ABOUT not in metadata:
        raise StoreError(f"{file} was not written by simfluence: move it elsewhere")
    return table, json.loads(metadata[_ABOUT])


def _parse(file: Path) -> tuple[pa.Table, Mapping[bytes, bytes]]:
    content = file.read_bytes()
    try:
        metadata = pq.read_metadata(pa.BufferReader(content)).metadata or {}
    except (pa.ArrowInvalid, OSError) as error:
        raise StoreError(f"{file} is damaged or no Parquet file: {error}") from None
    signature = metadata.get(_CHECKSUM)
    if signature is None or len(signature) != len(_UNSIGNED):
        raise StoreError(f"{file} was not written by simfluence (no checksum): move it elsewhere")
    if hashlib.sha256(content.replace(signature, _UNSIGNED)).hexdigest().encode() != signature:
        raise StoreError(f"{file} is damaged: its checksum does not hold. Delete it and record again")
    return pq.read_table(pa.BufferReader(content)), metadata
