"""Parquet files that contain their own checksum: for a run, and for the metadata of examples.

A run file has a row per time from 0 to T: ``step``, ``batch`` (empty at 0), ``lr`` (null at 0), ``losses`` and
``measure.<name>`` (lists with one value per test example, null where not recorded). The schema's metadata has the rest
as JSON. The file's metadata has the SHA-256 of the whole file, computed with zeros in place of the checksum.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from simfluence._internal.checked import fitting
from simfluence._internal.files import check_format, regular_content, size_of
from simfluence._internal.types import Count
from simfluence._version import __version__
from simfluence.curriculum import Curriculum
from simfluence.errors import InvalidInput, StoreError
from simfluence.recipe import Recipe
from simfluence.runs import Run

__all__ = [
    "FORMAT",
    "RunHeader",
    "RunRows",
    "read_run",
    "read_table",
    "signed_content",
    "to_bytes",
    "write_rows",
    "write_run",
]

#: Version of the files that this version writes. Older ones are migrated (``_MIGRATIONS``), newer ones are refused.
FORMAT = 2
_ABOUT = b"simfluence"  # key of the header in the schema's metadata
_MEASURE = "measure."  # prefix of the column of a measure
_ZEROS = b"0" * 64  # placeholder for the checksum
_CHECKSUM = "simfluence.sha256"
_KEY = _CHECKSUM.encode() + b"\x18@"  # the bytes before the checksum: its key, and the length 64 in Thrift
_CHUNK = 2**20

#: Types of the fields of a run file's header, in JSON.
_HEADER: dict[str, Any] = {
    "id": str, "fingerprint": str | None, "n_train": Count, "recipe": dict | None, "diverged": bool,
    "verification": bool, "engine": str | None,
}  # fmt: skip

_LEAST_LIMIT = 2**28  # bytes in memory that any file may take
_LARGEST_RATIO = 4000  # of the bytes in memory to those of a larger file, such as one of many rows without losses

#: Bytes of a value of each physical type of Parquet; of a text those of its length, and another length decides.
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8, "BYTE_ARRAY": 8}


@dataclass(frozen=True)
class RunHeader:
    """The content of a run file besides its rows."""

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
    """A block of consecutive times of a run.

    Args:
        start: the first time.
        batches: concatenated indices of the batches, each of the step that led to its time; time 0 has none.
        sizes: length of each batch, ``[times]``.
        rates: learning rate of each step, ``[times]``; NaN if not recorded.
        recorded: whether the test losses were recorded at each time, ``[times]``.
        losses: test losses, ``[times, test]``.
        measures: values of each measure, ``[times, test]``, by name.
    """

    start: int
    batches: np.ndarray
    sizes: np.ndarray
    rates: np.ndarray
    recorded: np.ndarray
    losses: np.ndarray
    measures: Mapping[str, np.ndarray]


def write_run(file: io.BufferedIOBase, run: Run) -> None:
    """Write a run to an open file."""
    rates = np.full(run.steps, np.nan) if run.learning_rates is None else run.learning_rates
    recorded = np.ones(run.steps + 1, bool) if run.recorded is None else run.recorded
    sizes, rates = np.concatenate([[0], run.curriculum.sizes]), np.concatenate([[np.nan], rates])
    rows = RunRows(0, run.curriculum.indices, sizes, rates, recorded, run.losses, run.measures)
    n_train, recipe = run.curriculum.n_train, run.recipe
    about = RunHeader(run.id, run.fingerprint, n_train, recipe, run.diverged, run.verification, run.engine)
    write_rows(file, about, [rows])


def write_rows(file: io.BufferedIOBase, about: RunHeader, rows: Iterable[RunRows]) -> None:
    """Write a run of any length to an open file, block by block."""
    _write_signed(file, (_table(block).replace_schema_metadata({_ABOUT: about.to_json()}) for block in rows))


def read_run(file: Path) -> Run:
    """Read a run file. The run's examples and checkpoints are in other files.

    Raises:
        StoreError: the file is damaged, not a run, or of a newer format.
    """
    with _naming(file):
        content = signed_content(file)
        schema = pq.ParquetFile(pa.BufferReader(content)).schema_arrow
        about = _header(schema.metadata or {}, file)
        _check_columns(schema)
        table = _decoded(content)
        batches, rates = table.column("batch").combine_chunks(), table.column("lr").to_numpy()[1:]
        if not np.array_equal(table.column("step").to_numpy(), np.arange(len(table))):
            raise InvalidInput("its steps are not 0, 1, … in order")
        if batches.null_count or batches.values.null_count or len(batches[:1].flatten()):
            raise InvalidInput("a batch is missing, or there is one before the first step")
        losses, recorded = _readings(table, "losses")
        measures = [name for name in table.column_names if name.startswith(_MEASURE)]
        return Run(
            id=about.id,
            curriculum=Curriculum.from_flat(
                batches.flatten().to_numpy(), batches.value_lengths().to_numpy()[1:], about.n_train
            ),
            losses=losses,
            learning_rates=None if np.isnan(rates).all() else rates,
            recipe=about.recipe,
            fingerprint=about.fingerprint,
            recorded=None if recorded.all() else recorded,
            measures={name.removeprefix(_MEASURE): _readings(table, name)[0] for name in measures},
            verification=about.verification,
            engine=about.engine,
        )


def to_bytes(table: pa.Table) -> bytes:
    """Return the table as the content of a Parquet file with a checksum."""
    file = io.BytesIO()
    _write_signed(file, [table])
    return file.getvalue()


def _write_signed(file: io.BufferedIOBase, tables: Iterable[pa.Table]) -> None:
    """Write tables of one schema as consecutive row groups of one file, then insert the file's checksum."""
    tables = iter(tables)
    first = next(tables)
    with pq.ParquetWriter(file, first.schema, compression="zstd") as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)
        writer.add_key_value_metadata({_CHECKSUM: _ZEROS.decode()})
    digest, previous, start = hashlib.sha256(), b"", 0
    offsets: dict[bytes, list[int]] = {_ZEROS: [], _KEY: []}
    file.seek(0)
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
        for pattern in offsets:
            window = previous[len(previous) - len(pattern) + 1 :] + chunk  # a match may straddle two chunks
            offsets[pattern] += [start + len(chunk) - len(window) + offset for offset in _offsets(pattern, window)]
        previous, start = chunk, start + len(chunk)
    if [len(matches) for matches in offsets.values()] != [1, 1]:
        raise StoreError(
            f"the file's content includes the text '{_CHECKSUM}' or 64 zeros in a row, which mark the checksum: "
            "change the ids, names or values that contain them"
        )
    file.seek(offsets[_ZEROS][0])
    file.write(digest.hexdigest().encode())


def _offsets(pattern: bytes, content: bytes) -> list[int]:
    """Return where the pattern occurs, without overlaps."""
    offsets, offset = [], content.find(pattern)
    while offset >= 0:
        offsets.append(offset)
        offset = content.find(pattern, offset + len(pattern))
    return offsets


def read_table(file: Path) -> tuple[pa.Table, Mapping[bytes, bytes]]:
    """Return the table and the metadata of a file after checking its checksum.

    Raises:
        StoreError: the file is damaged, or simfluence did not write it.
    """
    with _naming(file):
        table = _decoded(signed_content(file))
        return table, table.schema.metadata or {}


def signed_content(file: Path) -> bytes:
    """Return the bytes of a file after checking its checksum.

    Raises:
        StoreError: the file is damaged, or simfluence did not write it.
    """
    content = regular_content(file)
    key = content.rfind(_KEY)
    start, end = key + len(_KEY), key + len(_KEY) + len(_ZEROS)
    unsigned = content[:start] + _ZEROS + content[end:]
    if key < 0 or hashlib.sha256(unsigned).hexdigest().encode() != content[start:end]:
        raise StoreError(
            f"{file} is damaged (its checksum does not match) or was not written by simfluence: "
            "move it elsewhere and record again"
        )
    return content


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Turn every error of reading a file into one that names the file."""
    try:
        yield
    except StoreError:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, OSError, RecursionError, MemoryError) as error:
        raise _damaged(file, error) from error
    except (pa.ArrowException, NotImplementedError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> StoreError:
    text = str(error) if isinstance(error, InvalidInput) else f"{type(error).__name__}: {error}"
    return StoreError(f"{file} is damaged or was not written by simfluence: {text[:500]}. Move it elsewhere")


def _header(metadata: Mapping[bytes, bytes], file: Path) -> RunHeader:
    """Return the header of a run file, of this format or an older one, with every field checked."""
    if _ABOUT not in metadata:
        raise StoreError(f"{file} is not a run file of simfluence: move it elsewhere")
    content = fitting("its header", json.loads(metadata[_ABOUT]), Mapping)
    about = _migrated(content, file)
    missing = [name for name in _HEADER if name not in about]
    if missing:
        raise InvalidInput(f"its header lacks {', '.join(missing)}")
    fields = {name: fitting(name, about[name], hint) for name, hint in _HEADER.items()}
    recipe = fields["recipe"]
    return RunHeader(**fields | {"recipe": None if recipe is None else Recipe(**recipe)})


def _check_columns(schema: pa.Schema) -> None:
    """Check the names and the types of a run's columns."""
    expected = {"step": pa.int32(), "batch": pa.list_(pa.int32()), "lr": pa.float64()}
    names = [name for name in schema.names if not name.startswith(_MEASURE)]
    if sorted(names) != sorted([*expected, "losses"]) or len(set(schema.names)) < len(schema.names):
        raise InvalidInput(f"its columns are {', '.join(schema.names)}")
    for field in schema:
        wrong = not _is_reading(field.type) if field.name not in expected else field.type != expected[field.name]
        if wrong or (_is_reading(field.type) and field.type.list_size != schema.field("losses").type.list_size):
            raise InvalidInput(f"its column {field.name!r} holds {field.type}")


def _is_reading(kind: pa.DataType) -> bool:
    return pa.types.is_fixed_size_list(kind) and kind.value_type in (pa.float32(), pa.float64())


def _decoded(content: bytes) -> pa.Table:
    """Decode a Parquet file, after checking from its metadata that it cannot fill the memory.

    A few bytes can encode any number of equal values. Texts are decoded once each first, to add up their lengths.

    Raises:
        InvalidInput: the table takes far more memory than a file of this size should.
    """
    parquet = pq.ParquetFile(pa.BufferReader(content))
    _check_size(_least_size(parquet), len(content))
    leaves = [parquet.metadata.schema.column(place) for place in range(parquet.metadata.num_columns)]
    texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
    table = pq.ParquetFile(pa.BufferReader(content), read_dictionary=texts).read()
    _check_size(sum(_text_size(chunk) for column in table.columns for chunk in column.chunks), len(content))
    return table.cast(parquet.schema_arrow) if texts else table


def _check_size(decoded: int, size: int) -> None:
    if decoded > max(_LEAST_LIMIT, _LARGEST_RATIO * size):
        raise InvalidInput(f"a file of {size_of(size)} that takes {size_of(decoded)} of memory")


def _least_size(parquet: pq.ParquetFile) -> int:
    """Return how many bytes a file's columns take in memory, by its metadata, if every distinct text is there once."""
    metadata = parquet.metadata
    groups = [metadata.row_group(place) for place in range(metadata.num_row_groups)]
    rows = max(metadata.num_rows, sum(group.num_rows for group in groups))
    total = rows * sum(_row_size(field.type) for field in parquet.schema_arrow)
    for group in groups:
        for place in range(group.num_columns):
            chunk = group.column(place)
            width = _WIDTHS.get(chunk.physical_type) or metadata.schema.column(place).length
            total += chunk.num_values * width + chunk.total_uncompressed_size
    return int(total)


def _row_size(kind: pa.DataType) -> int:
    """Return the bytes of one value of a column, missing or not; of lists and texts just those of their length."""
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size) * _row_size(kind.value_type)
    if pa.types.is_struct(kind):
        return sum(_row_size(kind.field(place).type) for place in range(kind.num_fields))
    if pa.types.is_primitive(kind) or pa.types.is_fixed_size_binary(kind):
        return -(-int(kind.bit_width) // 8)
    return 8


def _text_size(array: pa.Array) -> int:
    """Return how many bytes the texts of an array take when each is written out."""
    kind = array.type
    if pa.types.is_dictionary(kind) and _is_text(kind.value_type):
        return int(pc.sum(pc.take(pc.binary_length(array.dictionary), array.indices)).as_py() or 0)
    if pa.types.is_struct(kind):
        return sum(_text_size(array.field(place)) for place in range(kind.num_fields))
    if pa.types.is_map(kind):
        return _text_size(array.keys) + _text_size(array.items)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _text_size(array.values)
    return 0


def _is_text(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
    )


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
    """Convert values ``[times, test]`` to a column of lists; null where not recorded."""
    value = pa.float64() if readings.dtype == np.float64 else pa.float32()
    flat = pa.array(np.ascontiguousarray(readings).reshape(-1), value)
    mask = None if recorded.all() else pa.array(~recorded)
    return pa.FixedSizeListArray.from_arrays(flat, readings.shape[1], mask=mask)


def _readings(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a column of lists as ``[times, test]`` with NaN where null, and a mask of the rows that are not null."""
    column = table.column(name).combine_chunks()
    recorded = column.is_valid().to_numpy(zero_copy_only=False)
    flat = column.flatten()  # without the null rows
    if flat.null_count:
        raise InvalidInput(f"its column {name!r} lacks single numbers of a row")
    values = flat.to_numpy()
    readings = np.full((len(table), column.type.list_size), np.nan, values.dtype)
    readings[recorded] = values.reshape(-1, column.type.list_size)
    return readings, recorded


def _migrated(about: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Convert the header of an older file to the present format."""
    check_format(about.get("format"), FORMAT, file, oldest=1)
    migrated = dict(about)
    for version in range(about["format"], FORMAT):
        migrated |= _MIGRATIONS[version](migrated)
    return migrated


def _from_1(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that format 1 lacks: it had one engine, no verification runs, no measures and no gaps."""
    return {"verification": False, "engine": "loop"}


#: For each older format, a function that returns the fields that the next format adds.
_MIGRATIONS = {1: _from_1}
