"""Tables of text from files, data frames, lists of rows or ``datasets.Dataset``, with checked columns."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

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
    else:
        table = pd.DataFrame(list(source))
    if not len(table):
        raise InvalidInput("there is no row of text: pass at least one training and one test example")
    return table


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
    id_column = next((column for column in ("id", "idx") if column in table.columns), None)
    ids = [f"{part}-{row}" if id_column is None else str(table[id_column].iloc[row]) for row in range(len(table))]
    plain = [
        column
        for column in table.columns
        if column not in {"id", "idx", "length", *left_out}
        and table[column].map(lambda value: value is None or isinstance(value, str | bool | int | float)).all()
    ]
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
        ".csv": pd.read_csv,
        ".jsonl": _read_lines,
        ".json": _read_lines,
        ".parquet": pd.read_parquet,
    }
    if path.suffix not in readers:
        raise InvalidInput(f"{path} has an unknown type: pass a .csv, .jsonl or .parquet file")
    try:
        return readers[path.suffix](path)
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInput(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def _read_lines(path: Path) -> pd.DataFrame:
    """Read one JSON object per line, without guessing dates or numbers from text."""
    return pd.DataFrame([json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()])
