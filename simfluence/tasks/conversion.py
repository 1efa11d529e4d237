"""Conversion of NumPy, pandas, SciPy and torch data to tensors of their own, with checks of every value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse
import torch
from torch import Tensor

from simfluence._internal.checked import shown
from simfluence._internal.columns import plain_column
from simfluence.errors import InvalidInput

__all__ = ["as_tensors", "check_finite", "class_names", "numbered"]

#: Largest number of elements of a sparse matrix that is made dense: 2 GiB of float64.
_MOST_ELEMENTS = 2**28


def as_tensors(name: str, data: Any) -> Any:
    """Convert data to new tensors on the processor; the recipe's dtype is applied when recording.

    A mapping, a tuple, or a list of arrays is several inputs.

    Raises:
        InvalidInput: a part is no array of numbers, is ragged or single, or is too large to be made dense.
    """
    if isinstance(data, Mapping):
        for key in data:
            if not isinstance(key, str):
                raise InvalidInput(f"{name} has the key {key!r}: keys name arguments of the model, so use strings")
        return {key: as_tensors(f"{name}[{key!r}]", part) for key, part in data.items()}
    if isinstance(data, tuple) or (isinstance(data, list) and data and isinstance(data[0], np.ndarray | Tensor)):
        return tuple(as_tensors(f"{name}[{index}]", part) for index, part in enumerate(data))
    tensor = _from_torch(name, data) if isinstance(data, Tensor) else torch.tensor(_as_array(name, data))
    if tensor.ndim == 0:
        raise InvalidInput(f"{name} must have one row per example, got the single number {tensor.item()}")
    return tensor


def _from_torch(name: str, data: Tensor) -> Tensor:
    """Return a copy, so that later changes by the caller change no task."""
    if data.layout is not torch.strided:
        _check_dense_size(name, data.numel())
        data = data.to_dense()
    if data.is_meta:
        raise InvalidInput(f"{name} is a tensor on the device 'meta', which holds no values")
    return data.detach().to("cpu", copy=True)


def _as_array(name: str, data: Any) -> np.ndarray:
    """Return an array of a dtype that torch has, in this machine's byte order and without gaps or negative strides."""
    if scipy.sparse.issparse(data):
        _check_dense_size(name, int(np.prod(data.shape, dtype=object)))
        data = data.toarray()
    if isinstance(data, pd.DataFrame):
        data = _from_columns(name, data)
    elif isinstance(data, pd.Series | pd.Index | pd.Categorical):
        data = _from_column(name, pd.Series(data), None)
    elif isinstance(data, np.ma.MaskedArray) and np.ma.getmaskarray(data).any():
        data = np.where(np.ma.getmaskarray(data), np.nan, data.data) if data.dtype.kind in "biuf" else data.data
    try:
        array = np.asarray(data)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InvalidInput(f"{name} is no array, its rows may differ in length: {str(error).splitlines()[0]}") from None
    if array.dtype.kind == "c":
        raise InvalidInput(f"{name} has complex numbers: split them into real and imaginary parts")
    if array.dtype.kind not in "biuf":
        raise InvalidInput(
            f"{name} must hold numbers, got {shown(data)}: arrays must hold numbers, so encode text first and pass it "
            "as metadata= to filter by it"
        )
    return np.ascontiguousarray(array.astype(_torch_dtype(name, array)))


def _torch_dtype(name: str, array: np.ndarray) -> np.dtype[Any]:
    """Return the dtype of the array in torch: longer floats become float64, unsigned numbers above 8 bits int64."""
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        return np.dtype(np.float64)
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        if array.size and array.max() >= 2**63:
            raise InvalidInput(f"{name} has the number {array.max()}, which is beyond torch's int64")
        return np.dtype(np.int64)
    return array.dtype.newbyteorder("=")


def _from_columns(name: str, table: pd.DataFrame) -> np.ndarray:
    """Return a table of numbers as one array, ``[rows, columns]``; True and False become 1 and 0."""
    if table.shape[1] == 0:
        raise InvalidInput(f"{name} has no columns")
    columns = [_from_column(name, table.iloc[:, place], table.columns[place]) for place in range(table.shape[1])]
    dtype = np.result_type(*columns)
    return np.stack(columns, axis=1).astype(np.float32 if dtype.kind == "b" else dtype)


def _from_column(name: str, column: pd.Series, label: Any) -> np.ndarray:
    """Return a column of numbers as an array ``[rows]``; missing ones become NaN."""
    plain = plain_column(column)
    dtype: Any = plain.dtype
    if getattr(dtype, "kind", "O") not in "biuf":
        where = name if label is None else f"column {label!r} of {name}"
        raise InvalidInput(
            f"{where} has {dtype} values, but arrays must hold numbers: encode text first (pd.get_dummies for columns) "
            "or leave it out; pass it as metadata= to filter by it"
        )
    if plain.hasnans:
        return plain.to_numpy(np.float64, na_value=np.nan)
    return plain.to_numpy()


def _check_dense_size(name: str, elements: int) -> None:
    if elements > _MOST_ELEMENTS:
        raise InvalidInput(
            f"{name} is a sparse matrix of {elements:,} elements, too many to be made dense (at most "
            f"{_MOST_ELEMENTS:,}): choose fewer columns or examples"
        )


def check_finite(name: str, tensors: Any, source: Any = None) -> None:
    """Check that no number is NaN or infinite.

    Args:
        name: name of the argument.
        tensors: a tensor, or a mapping or tuple of them.
        source: the user's data, whose columns may have names.

    Raises:
        InvalidInput: naming rows and columns.
    """
    if isinstance(tensors, Mapping):
        for key, part in tensors.items():
            check_finite(f"{name}[{key!r}]", part, source[key])
    elif isinstance(tensors, tuple):
        for index, part in enumerate(tensors):
            check_finite(f"{name}[{index}]", part, source[index])
    elif (tensors.is_floating_point() or tensors.is_complex()) and not bool(tensors.isfinite().all()):
        bad = (~tensors.isfinite()).flatten(1) if tensors.ndim > 1 else (~tensors.isfinite())[:, None]
        rows, columns = (torch.nonzero(bad.any(axis)).flatten().tolist() for axis in (1, 0))
        labels = list(source.columns) if isinstance(source, pd.DataFrame) else range(bad.shape[1])
        where = f"row{'s' * (len(rows) > 1)} {_listed(rows)}"
        if tensors.ndim > 1:
            where += f", column{'s' * (len(columns) > 1)} {_listed([labels[column] for column in columns])}"
        raise InvalidInput(
            f"{name} has NaN, infinite or missing values ({where}): fill them or leave these examples out"
        )


def _listed(values: list[Any], most: int = 5) -> str:
    shown_values = ", ".join(repr(value) for value in values[:most])
    return shown_values + (f" and {len(values) - most} more" if len(values) > most else "")


def class_names(y: Any) -> list[str] | None:
    """Return the distinct labels in ``y`` if it is a list or an array of text, else None.

    Categories keep their order if they are ordered; other labels are sorted.

    Raises:
        InvalidInput: a label is missing, or only some labels are text.
    """
    labels = _text(y)
    if labels is None:
        return None
    if isinstance(labels.dtype, pd.CategoricalDtype):
        return [name for name in labels.cat.categories if (labels == name).any()]
    return sorted(set(labels))


def numbered(y: Any, names: list[str], part: str) -> tuple[np.ndarray, list[str]]:
    """Return text labels as class numbers ``[examples]``, and as text.

    Raises:
        InvalidInput: a label is none of ``names``.
    """
    labels = _text(y)
    number = {name: index for index, name in enumerate(names)}
    values = [] if labels is None else labels.tolist()
    unknown = [(row, value) for row, value in enumerate(values) if value not in number]
    if labels is None or unknown:
        given = shown(y) if labels is None else f"{unknown[0][1]!r} in row {unknown[0][0]}"
        raise InvalidInput(f"the labels of the training examples are {_listed(list(names))}, but {part} has {given}")
    return np.array([number[value] for value in values], np.int64), values


def _text(y: Any) -> pd.Series | None:
    """Return labels as a column of text, or None if they are not text."""
    if isinstance(y, np.ndarray | pd.DataFrame) and y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0] if isinstance(y, np.ndarray) else y.iloc[:, 0]
    if isinstance(y, np.ndarray) and (y.ndim != 1 or y.dtype.kind not in "OUT"):
        return None
    if not isinstance(y, list | tuple | np.ndarray | pd.Series | pd.Index | pd.Categorical):
        return None
    values = pd.Series(y).reset_index(drop=True)
    present = values.dropna()
    texts = [isinstance(value, str) for value in present]
    if not any(texts):
        return None
    missing = np.flatnonzero(values.isna())
    if len(missing) or not all(texts):
        where = missing[0] if len(missing) else texts.index(False)
        raise InvalidInput(
            f"y must hold text or numbers, not both: row {where} has {values[where]!r} beside text labels"
        )
    return plain_column(values)
