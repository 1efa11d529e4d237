"""Tables of text from files, data frames, lists of rows or ``datasets.Dataset``, with checked columns."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from simfluence._internal.checked import shown
from simfluence.errors import InvalidInput, did_you_mean
from simfluence.examples import Examples

__all__ = ["Rows", "chosen", "described", "read_rows", "sampled"]

#: Types of rows of text that ``read_rows`` takes.
Rows = pd.DataFrame | Sequence[Mapping[str, Any]] | str | Path | Any


def read_rows(source: Rows) -> pd.DataFrame:
    """Read a table with one row per example.

    Args:
        source: a data frame, a list of mappings, a ``datasets.Dataset``, or the path of a CSV, JSONL or Parquet file.

    Raises:
        InvalidInput: the file does not exist, has another type or cannot be read, or there are no rows.

    >>> read_rows([{"text": "fine", "label": "good"}]).columns.tolist()
    ['text', 'label']
    """
    if isinstance(source, str | Path):
        table = _read_file(Path(source))
    elif isinstance(source, pd.DataFrame):
        table = source.reset_index(drop=True)
    elif hasattr(source, "to_pandas"):  # datasets.Dataset
        table = _with_class_names(source)
    elif isinstance(source, Iterable) and not isinstance(source, Mapping | bytes) and getattr(source, "ndim", 1) != 0:
        table = _from_mappings(list(source))
    else:
        raise InvalidInput(f"rows must be a data frame, a list of mappings, a dataset or a file, got {shown(source)}")
    if not len(table):
        raise InvalidInput("there is no row of text: pass at least one training and one test example")
    return table


def _from_mappings(rows: list[Any]) -> pd.DataFrame:
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise InvalidInput(f"row {number} must be a mapping such as {{'text': …}}, got {shown(row)}")
    return pd.DataFrame(rows)


def chosen(table: pd.DataFrame, columns: Iterable[str]) -> pd.DataFrame:
    """Return ``table`` if it has these columns and no missing value in them.

    Raises:
        InvalidInput: a column or a value is missing.
    """
    for column in columns:
        if column not in table.columns:
            names = ", ".join(map(str, table.columns))
            raise InvalidInput(
                f"no column {column!r} in the data, {did_you_mean(column, table.columns)} (columns: {names}); pass "
                "the columns' names as arguments"
            )
        missing = np.flatnonzero(table[column].isna())
        if len(missing):
            raise InvalidInput(f"row {missing[0]} has nothing in column {column!r}: fill it or leave the row out")
    return table


def described(
    table: pd.DataFrame, part: str, lengths: Sequence[int], left_out: Iterable[str] = (), features: Any = None
) -> Examples:
    """Return examples with the table's plain columns, and ``length`` in tokens, as metadata.

    Ids are the column ``id`` or ``idx`` if there is one, else ``part`` ("train" or "test") and a number.
    """
    id_column = next((column for column in _IDS if column in table.columns), None)
    ids = [f"{part}-{row}" if id_column is None else str(table[id_column].iloc[row]) for row in range(len(table))]
    plain = [
        column
        for column in table.columns
        if column not in {"id", "idx", "length", *left_out}
        and table[column].map(lambda value: value is None or isinstance(value, str | bool | int | float)).all()
    ]
    repeated = [name for name, count in Counter(ids).items() if count > 1]
    if repeated:
        raise InvalidInput(
            f"the {part} rows {[row for row, name in enumerate(ids) if name == repeated[0]][:5]} have the same "
            f"{id_column} {repeated[0]!r}: give each row an id of its own, or leave the column out"
        )
    metadata = table[plain].reset_index(drop=True)
    metadata["length"] = list(lengths)
    return Examples(ids, metadata, features)


def sampled(table: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """Draw a random sample of rows.

    Raises:
        InvalidInput: there are fewer rows than requested.
    """
    if not 1 <= count <= len(table):
        raise InvalidInput(f"{count} rows: there are {len(table)}, ask for 1 to {len(table)}")
    return table.iloc[np.random.default_rng(seed).permutation(len(table))[:count]].reset_index(drop=True)


def _with_class_names(source: Any) -> pd.DataFrame:
    """Return a dataset's rows, with class names instead of class numbers."""
    table: pd.DataFrame = source.to_pandas()
    for column, feature in source.features.items():
        names = getattr(feature, "names", None)
        if names:
            table[column] = [names[number] if 0 <= number < len(names) else None for number in table[column]]
    return table


def _read_file(path: Path) -> pd.DataFrame:
    readers: dict[str, Callable[[Path], pd.DataFrame]] = {
        ".csv": _read_csv,
        ".jsonl": _read_lines,
        ".json": _read_lines,
        ".parquet": pd.read_parquet,
    }
    if path.suffix not in readers:
        raise InvalidInput(f"{path} has an unknown type: pass a .csv, .jsonl or .parquet file")
    try:
        return readers[path.suffix](path)
    except InvalidInput:
        raise
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path}: byte {error.start} is no text in UTF-8: save the file in UTF-8") from None
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, pa.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InvalidInput(f"{path} cannot be read: {reason}") from None


def _read_csv(path: Path) -> pd.DataFrame:
    """Read a table with a line of column names; fields are text, and only numbers in a column without text are numbers.

    Ids such as "01" and words such as "NA" stay text; empty fields are missing.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        rows, lines = [], []
        try:
            for row in reader:
                if row:
                    rows.append(row)
                    lines.append(reader.line_num)
        except csv.Error as error:
            raise InvalidInput(f"{path}, line {reader.line_num}: {error}") from None
    if not rows:
        raise InvalidInput(f"{path} is empty: its first line must name the columns")
    names = rows[0]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise InvalidInput(f"{path} has several columns called {repeated[0]!r}: give each column a name of its own")
    for line, row in zip(lines, rows, strict=True):
        if len(row) != len(names):
            raise InvalidInput(f"{path}, line {line}: there are {len(row)} fields for {len(names)} columns")
    columns = zip(*rows[1:], strict=True) if len(rows) > 1 else [[] for _ in names]
    return pd.DataFrame({name: _as_numbers(name, column) for name, column in zip(names, columns, strict=True)})


def _as_numbers(name: str, fields: Sequence[str]) -> pd.Series:
    """Return a column of a CSV file as whole numbers or numbers if each field is written as one, else as text."""
    column = pd.Series([field if field else None for field in fields], dtype="str")
    present = [field for field in fields if field]
    if name in _IDS or not present:
        return column
    if all(_WHOLE.fullmatch(field) for field in present):
        return column.astype("Int64") if column.hasnans else column.astype("int64")
    return column.astype("float64") if all(_NUMBER.fullmatch(field) for field in present) else column


def _read_lines(path: Path) -> pd.DataFrame:
    """Read one JSON object per line, without guessing dates or numbers from text."""
    rows = []
    for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidInput(f"{path}, line {number}: {str(error).splitlines()[0]}") from None
        if not isinstance(row, dict):
            raise InvalidInput(
                f'{path}, line {number}: a line must be a JSON object such as {{"text": …}}, got {shown(row)}'
            )
        rows.append(row)
    return pd.DataFrame(rows)


#: Names of a column of ids.
_IDS = ("id", "idx")

#: Numbers as a CSV file writes them; "01" is none, nor is a number beyond 18 digits.
_WHOLE = re.compile(r"-?(0|[1-9]\d{0,17})", re.ASCII)
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d{1,3})?", re.ASCII)
