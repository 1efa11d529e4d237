"""Parquet files that carry their own checksum: a run, and the metadata of examples.

A run has a row per step from 0 to T: ``step``, ``batch`` (empty at 0), ``lr`` (null at 0), ``losses`` and
``measure.<name>`` (lists of the test side, null where not recorded). The schema's metadata holds the rest as JSON.
The file's metadata holds the SHA-256 of the whole file, taken with zeros in its own place.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from simfluence._internal.files import check_format
from simfluence._version import __version__
from simfluence.curriculum import Curriculum
from simfluence.errors import StoreError
from simfluence.recipe import Recipe
from simfluence.runs import Run

#: Version of the files written here. Older ones are read too (``_MIGRATIONS``), newer ones are refused.
FORMAT = 2
_ABOUT = b"simfluence"
_MEASURE = "measure."  # what the column of a measure is called before its name
_UNSIGNED = b"0" * 64
_CHECKSUM = "simfluence.sha256"
_SIGNED = _CHECKSUM.encode() + b"\x18@"  # what stands before the checksum: its key, and the length 64 in Thrift
_CHUNK = 2**20


@dataclass(frozen=True)
class RunHeader:
    """What a run file says of its run beside the rows."""

    id: str
    fingerprint: str | None
    n_train: int
    recipe: Recipe | None
    diverged: bool
    verification: bool = False
    engine: str | None = None

    def to_json(self) -> str:
        recipe = self.recipe.model_dump() if self.recipe else None
        seed = self.recipe.seed if self.recipe else None
        return json.dumps(asdict(self) | {"recipe": recipe, "seed": seed, "format": FORMAT, "library": __version__})


@dataclass(frozen=True)
class RunRows:
    """Consecutive times of a run.

    Args:
        start: the first of them.
        batches: the batch before each time, end to end; ``sizes`` says where to cut, ``[times]``. Time 0 has none.
        rates: learning rate before each time, ``[times]``; NaN where there is none.
        recorded: at which times the test side was read, ``[times]``.
        losses: ``[times, test]``.
        measures: likewise, by name.
    """

    start: int
    batches: np.ndarray
    sizes: np.ndarray
    rates: np.ndarray
    recorded: np.ndarray
    losses: np.ndarray
    measures: Mapping[str, np.ndarray]


def write_run(file: io.BufferedIOBase, run: Run) -> None:
    """Write the file of a run."""
    rates = np.full(run.steps, np.nan) if run.learning_rates is None else run.learning_rates
    recorded = np.ones(run.steps + 1, bool) if run.recorded is None else run.recorded
    sizes, rates = np.concatenate([[0], run.curriculum.sizes]), np.concatenate([[np.nan], rates])
    rows = RunRows(0, run.curriculum.indices, sizes, rates, recorded, run.losses, run.measures)
    n_train, recipe = run.curriculum.n_train, run.recipe
    about = RunHeader(run.id, run.fingerprint, n_train, recipe, run.diverged, run.verification, run.engine)
    write_rows(file, about, [rows])


def write_rows(file: io.BufferedIOBase, about: RunHeader, rows: Iterable[RunRows]) -> None:
    """Write the file of a run of any length, block by block."""
    _write_signed(file, (_table(block).replace_schema_metadata({_ABOUT: about.to_json()}) for block in rows))


def read_run(file: Path) -> Run:
    """The run in a file; without its examples and checkpoints, which stand elsewhere.

    Raises:
        StoreError: the file is damaged, not a run, or of a newer format.
    """
    table, metadata = read_table(file)
    if _ABOUT not in metadata:
        raise StoreError(f"{file} is not a run that simfluence wrote: move it elsewhere")
    about = _migrated(json.loads(metadata[_ABOUT]), file)
    batches = table.column("batch").combine_chunks()
    sizes = batches.value_lengths().to_numpy()[1:]
    losses, recorded = _readings(table, "losses")
    measures = [name for name in table.column_names if name.startswith(_MEASURE)]
    return Run(
        id=about["id"],
        curriculum=Curriculum.from_flat(batches.flatten().to_numpy(), sizes, about["n_train"]),
        losses=losses,
        learning_rates=table.column("lr").to_numpy()[1:],
        recipe=None if about["recipe"] is None else Recipe(**about["recipe"]),
        fingerprint=about["fingerprint"],
        recorded=None if recorded.all() else recorded,
        measures={name.removeprefix(_MEASURE): _readings(table, name)[0] for name in measures},
        verification=about["verification"],
        engine=about["engine"],
    )


def to_bytes(table: pa.Table) -> bytes:
    """A Parquet file whose metadata holds the SHA-256 of the whole file, taken with zeros in its place."""
    file = io.BytesIO()
    _write_signed(file, [table])
    return file.getvalue()


def _write_signed(file: io.BufferedIOBase, tables: Iterable[pa.Table]) -> None:
    """Write tables of one schema, one row group or more for each, and the checksum of it all."""
    tables = iter(tables)
    first = next(tables)
    with pq.ParquetWriter(file, first.schema, compression="zstd") as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)
        writer.add_key_value_metadata({_CHECKSUM: _UNSIGNED.decode()})
    digest, before, start = hashlib.sha256(), b"", 0
    places: dict[bytes, list[int]] = {_UNSIGNED: [], _SIGNED: []}
    file.seek(0)
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
        for text, found in places.items():
            window = before[len(before) - len(text) + 1 :] + chunk  # a text may straddle two chunks
            found += [start + len(chunk) - len(window) + place for place in _places(text, window)]
        before, start = chunk, start + len(chunk)
    if [len(found) for found in places.values()] != [1, 1]:
        raise StoreError("the file to be written contains 64 zeros in a row as text: rename what holds them")
    file.seek(places[_UNSIGNED][0])
    file.write(digest.hexdigest().encode())


def _places(text: bytes, window: bytes) -> list[int]:
    found, place = [], window.find(text)
    while place >= 0:
        found.append(place)
        place = window.find(text, place + len(text))
    return found


def read_table(file: Path) -> tuple[pa.Table, Mapping[bytes, bytes]]:
    """A table and its file's metadata, after the checksum held.

    Raises:
        StoreError: the file is damaged, or not one of ours.
    """
    content = file.read_bytes()
    found = content.rfind(_SIGNED)
    start, end = found + len(_SIGNED), found + len(_SIGNED) + len(_UNSIGNED)
    unsigned = content[:start] + _UNSIGNED + content[end:]
    if found < 0 or hashlib.sha256(unsigned).hexdigest().encode() != content[start:end]:
        raise StoreError(
            f"{file} is damaged (its checksum does not hold) or was not written by simfluence: "
            "move it elsewhere and record again"
        )
    table = pq.read_table(pa.BufferReader(content))
    return table, table.schema.metadata or {}


def _table(rows: RunRows) -> pa.Table:
    offsets = np.concatenate([[0], np.cumsum(rows.sizes)]).astype(np.int32)
    columns = {
        "step": pa.array(np.arange(rows.start, rows.start + len(rows.sizes)), pa.int32()),
        "batch": pa.ListArray.from_arrays(offsets, pa.array(rows.batches, pa.int32())),
        "lr": pa.array(rows.rates, pa.float64(), from_pandas=True),
        "losses": _column(rows.losses, rows.recorded),
    }
    return pa.table(
        columns | {_MEASURE + name: _column(values, rows.recorded) for name, values in rows.measures.items()}
    )


def _column(readings: np.ndarray, recorded: np.ndarray) -> pa.FixedSizeListArray:
    """Readings ``[times, test]`` as lists of the test side; null where not recorded."""
    value = pa.float64() if readings.dtype == np.float64 else pa.float32()
    flat = pa.array(np.ascontiguousarray(readings).reshape(-1), value)
    mask = None if recorded.all() else pa.array(~recorded)
    return pa.FixedSizeListArray.from_arrays(flat, readings.shape[1], mask=mask)


def _readings(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A column of lists as ``[times, test]``, NaN where null, and which rows are not null."""
    column = table.column(name).combine_chunks()
    recorded = column.is_valid().to_numpy(zero_copy_only=False)
    values = column.flatten().to_numpy()  # of the rows that are not null
    readings = np.full((len(table), column.type.list_size), np.nan, values.dtype)
    readings[recorded] = values.reshape(-1, column.type.list_size)
    return readings, recorded


def _migrated(about: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """What a run file says, in the words of the present format."""
    check_format(about.get("format"), FORMAT, file, oldest=1)
    migrated = dict(about)
    for version in range(about["format"], FORMAT):
        migrated |= _MIGRATIONS[version](migrated)
    return migrated


def _from_1(about: Mapping[str, Any]) -> dict[str, Any]:
    """Format 1 knew one engine, and neither verification runs nor measures nor steps left out."""
    return {"verification": False, "engine": "loop"}


#: What each older format lacks of the next.
_MIGRATIONS = {1: _from_1}
