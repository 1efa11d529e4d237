"""Tables of text: from files, data frames, lists of rows or ``datasets.Dataset``, with their columns checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from simfluence.errors import InvalidInput, did_you_mean
from simfluence.examples import Examples

#: What rows of text may be given as.
Rows = pd.DataFrame | Sequence[Mapping[str, Any]] | str | Path | Any


def read_rows(source: Rows) -> pd.DataFrame:
    """A table with one row per example.

    Args:
        source: a data frame, a list of mappings, a ``datasets.Dataset``, or the path of a CSV, JSONL or Parquet file.

    Raises:
        InvalidInput: no such file, a file of another kind or that cannot be read, or no row.

    >>> read_rows([{"text": "fine", "label": "good"}]).columns.tolist()
    ['text', 'label']
    """
    if isinstance(source, str | Path):
        found = _read_file(Path(source))
    elif isinstance(source, pd.DataFrame):
        found = source.reset_index(drop=True)
    elif hasattr(source, "to_pandas"):  # datasets.Dataset
        found = _named_classes(source)
    else:
        found = pd.DataFrame(list(source))
    if not len(found):
        raise InvalidInput("no row of text: give some examples for each side")
    return found


def chosen(table: pd.DataFrame, columns: Iterable[str]) -> pd.DataFrame:
    """``table``, after a look whether it has these columns and something in each place.

    Raises:
        InvalidInput: naming the columns that are there, or the row with nothing in it.
    """
    for column in columns:
        if column not in table.columns:
            there = ", ".join(map(str, table.columns))
            raise InvalidInput(
                f"no column {column!r} in the data, {did_you_mean(column, table.columns)} (columns: {there}); say "
                "which column is which"
            )
        missing = np.flatnonzero(table[column].isna())
        if len(missing):
            raise InvalidInput(f"row {missing[0]} has nothing in column {column!r}: fill it or leave the row out")
    return table


def described(
    table: pd.DataFrame, side: str, lengths: Sequence[int], left_out: Iterable[str] = (), features: Any = None
) -> Examples:
    """Ids and metadata of a side: the table's plain columns, and ``length`` in tokens.

    Ids are the column ``id`` or ``idx`` where there is one, else the side and a number.
    """
    named = next((column for column in ("id", "idx") if column in table.columns), None)
    ids = [f"{side}-{row}" if named is None else str(table[named].iloc[row]) for row in range(len(table))]
    kept = [
        column
        for column in table.columns
        if column not in {"id", "idx", "length", *left_out}
        and table[column].map(lambda value: value is None or isinstance(value, str | bool | int | float)).all()
    ]
    metadata = table[kept].reset_index(drop=True)
    metadata["length"] = list(lengths)
    return Examples(ids, metadata, features)


def sampled(table: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """A random sample of rows.

    Raises:
        InvalidInput: more rows than there are.
    """
    if not 1 <= count <= len(table):
        raise InvalidInput(f"{count} rows: there are {len(table)}, take some of them")
    return table.iloc[np.random.default_rng(seed).permutation(len(table))[:count]].reset_index(drop=True)


def _named_classes(source: Any) -> pd.DataFrame:
    """A dataset's rows, with the names of its classes in place of their numbers."""
    table: pd.DataFrame = source.to_pandas()
    for column, kind in source.features.items():
        names = getattr(kind, "names", None)
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
        raise InvalidInput(f"{path}: give a .csv, .jsonl or .parquet file")
    try:
        return readers[path.suffix](path)
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInput(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def _read_lines(path: Path) -> pd.DataFrame:
    """One JSON object a line; no date or number is guessed from text."""
    return pd.DataFrame([json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()])
