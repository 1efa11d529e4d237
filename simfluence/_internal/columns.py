"""One conversion of metadata columns, so that filters give the same result in memory and from a store."""

from __future__ import annotations

import datetime
import numbers
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from simfluence.errors import InvalidInput

__all__ = ["from_arrow", "plain_column", "plain_table"]


def plain_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return a copy of a table with text names, plain columns, and rows numbered from 0.

    Raises:
        InvalidInput: two columns have one name, names have several levels, or a column has complex numbers.

    >>> plain_table(pd.DataFrame({0: pd.Categorical([3, None, 1])}))["0"].dtype
    Int64Dtype()
    """
    if isinstance(table.columns, pd.MultiIndex):
        raise InvalidInput("metadata has column names of several levels: join them into one name each")
    names = [str(name) for name in table.columns]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InvalidInput(f"metadata has several columns called {repeated[0]!r}: give each column a name of its own")
    columns = {name: plain_column(table.iloc[:, place].rename(name)) for place, name in enumerate(names)}
    return pd.DataFrame({name: column.reset_index(drop=True) for name, column in columns.items()}, range(len(table)))


def from_arrow(table: pa.Table) -> pd.DataFrame:
    """Return an Arrow table as a plain one: whole numbers keep every digit where others are missing."""
    return plain_table(table.to_pandas(types_mapper=_NULLABLE.get))


def plain_column(column: pd.Series) -> pd.Series:
    """Return a column as booleans, whole numbers, numbers, dates, durations or text, by what its values are.

    Whole numbers keep every digit where others are missing, dates of any kind become timestamps, categories become
    their values (ordered text stays ordered), and intervals and periods become text. Other objects stay as they are.

    Raises:
        InvalidInput: the column has complex numbers.
    """
    dtype: Any = column.dtype  # pandas types its many kinds of columns too finely to follow here
    if isinstance(dtype, pd.CategoricalDtype):
        return column if _is_ordered_text(dtype) else plain_column(_values_of_categories(column))
    if isinstance(dtype, pd.SparseDtype):
        return plain_column(pd.Series(np.asarray(column), column.index, name=column.name))
    if dtype.kind == "c":
        raise InvalidInput(f"column {column.name!r} has complex numbers: split it into real and imaginary parts")
    if isinstance(dtype, pd.IntervalDtype | pd.PeriodDtype):
        return column.astype(str).where(column.notna(), None).astype("str")
    if isinstance(dtype, pd.ArrowDtype):
        return _from_arrow_column(column)
    if isinstance(dtype, pd.StringDtype):
        return column.astype("str")
    if isinstance(dtype, pd.Float32Dtype):
        return column.astype("float32")
    if isinstance(dtype, pd.Float64Dtype):
        return column.astype("float64")
    if dtype.kind == "f" and dtype.itemsize == 2:
        return column.astype(np.float32)
    if dtype.kind == "O":
        return _from_objects(column)
    if pd.api.types.is_extension_array_dtype(dtype) and dtype.kind in "iub" and not column.hasnans:
        return column.astype(dtype.numpy_dtype)
    return column


def _is_ordered_text(dtype: pd.CategoricalDtype) -> bool:
    return bool(dtype.ordered) and pd.api.types.is_string_dtype(dtype.categories)


def _values_of_categories(column: pd.Series) -> pd.Series:
    """Return the values of a categorical column; whole numbers stay whole where some are missing."""
    categories: Any = column.cat.categories.to_series()
    if categories.dtype.kind in "iub" and column.hasnans:
        categories = categories.astype("boolean" if categories.dtype.kind == "b" else _nullable(categories.dtype))
    values = categories.array.take(column.cat.codes.to_numpy(), allow_fill=True)
    return pd.Series(values, column.index, name=column.name)


def _nullable(dtype: Any) -> str:
    return "UInt64" if dtype.kind == "u" else "Int64"


def _from_arrow_column(column: pd.Series) -> pd.Series:
    """Return a column backed by pyarrow as pandas' own kind."""
    dtype: Any = column.dtype
    if dtype.kind in "iu" and column.hasnans:
        values: Any = column.astype("UInt64" if dtype.kind == "u" else "Int64")
        return plain_column(values)
    arrow = pa.chunked_array(pa.array(column))
    return plain_column(pd.Series(arrow.to_pandas().array, column.index, name=column.name))


def _from_objects(column: pd.Series) -> pd.Series:
    """Return a column of Python objects as what all its present values are, if they are of one kind."""
    present = column.dropna()
    if present.empty:
        return column
    for kinds, convert in _KINDS:
        if all(isinstance(value, kinds) for value in present):
            try:
                return convert(column)
            except (OverflowError, ValueError, TypeError):  # such as whole numbers beyond 64 bits
                return column
    return column


def _whole(column: pd.Series) -> pd.Series:
    present = column.dropna()
    wide = "UInt64" if max(present) >= 2**63 else "Int64"
    whole = [pd.NA if missing else int(value) for value, missing in zip(column, column.isna(), strict=True)]
    values: Any = pd.array(whole, wide)  # type: ignore[call-overload]  # the stubs know no mixed lists
    return plain_column(pd.Series(values, column.index, name=column.name))


def _dates(column: pd.Series) -> pd.Series:
    return pd.Series(pd.to_datetime(column), column.index, name=column.name)


_KINDS: tuple[tuple[Any, Callable[[pd.Series], pd.Series]], ...] = (
    ((bool, np.bool_), lambda column: plain_column(column.astype("boolean"))),
    (numbers.Integral, _whole),
    (numbers.Real, lambda column: column.astype(np.float64)),
    (str, lambda column: column.astype("str")),
    ((datetime.date, np.datetime64), _dates),
    ((datetime.timedelta, np.timedelta64), lambda column: pd.to_timedelta(column)),
    ((pd.Interval, pd.Period), lambda column: column.map(str, na_action="ignore").astype("str")),
)
_NULLABLE: dict[Any, Any] = {
    pa.int8(): pd.Int8Dtype(), pa.int16(): pd.Int16Dtype(), pa.int32(): pd.Int32Dtype(), pa.int64(): pd.Int64Dtype(),
    pa.uint8(): pd.UInt8Dtype(), pa.uint16(): pd.UInt16Dtype(), pa.uint32(): pd.UInt32Dtype(),
    pa.uint64(): pd.UInt64Dtype(), pa.bool_(): pd.BooleanDtype(),
}  # fmt: skip
