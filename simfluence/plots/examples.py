"""Plots of training and test examples: effects of each on each, rankings, and counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.offsetbox import AnnotationBbox, OffsetImage

from simfluence._internal.checked import checked
from simfluence.errors import InvalidInput
from simfluence.plots.style import (
    COLOURS,
    MARKERS,
    Line,
    check_columns,
    count_label,
    empty,
    finished,
    legend,
    named,
    opened,
    spread,
)

__all__ = ["counts", "heat_map", "plane", "ranked"]

_ROWS = 1000  # rows or columns drawn of a heat map
_VALUES = 20  # values drawn of counts


@checked
def heat_map(
    values: pd.DataFrame, ax: Axes | None = None, title: str = "", label: str = "change of the final loss"
) -> Axes:
    """Plot values by test example (rows) and training example or group (columns): orange above 0, purple below.

    Colours saturate at the 99th percentile of absolute values, so that a few outliers do not hide the rest; NaN is
    grey. Of more than 1,000 rows or columns, 1,000 evenly spread ones are drawn, and the axes say so.

    Args:
        values: values with test examples as rows; the names of index and columns label the axes.
        ax: axes to draw on; by default those of a new figure.
        title: title of the plot.
        label: label of the colours.

    >>> from matplotlib.figure import Figure
    >>> heat_map(pd.DataFrame([[0.5, -0.5]]), Figure().subplots()).images[0].get_array().tolist()
    [[0.5, -0.5]]
    """
    for place, kind in enumerate(values.dtypes):
        if not pd.api.types.is_numeric_dtype(kind):
            raise InvalidInput(f"column {values.columns[place]!r} of the values must have numbers, got {kind}")
    ax = opened(ax)
    if values.size == 0:
        return empty(ax, title, "values")
    rows, columns = (spread(count, _ROWS) for count in values.shape)
    drawn = values.iloc[rows, columns]
    array = np.ma.masked_invalid(drawn.to_numpy(np.float64))
    largest = float(np.quantile(np.abs(array.compressed()), 0.99)) if array.count() else 0.0
    largest = largest or 1.0
    cmap = colormaps["PuOr_r"].with_extremes(bad="lightgrey")
    image = ax.imshow(array, aspect="auto", cmap=cmap, vmin=-largest, vmax=largest, interpolation="nearest")
    if len(columns) <= 30:
        crowded = len(columns) > 12 or max(len(str(name)) for name in drawn.columns) > 6
        style: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
        ax.set_xticks(range(len(columns)), named(drawn.columns), **style)
    if len(rows) <= 30:
        ax.set_yticks(range(len(rows)), named(drawn.index))
    names = str(values.columns.name or "column"), str(values.index.name or "row")
    labels = [{"train": "training example", "test": "test example"}.get(name, name) for name in names]
    ax.figure.colorbar(image, ax=ax, label=label, extend="both")
    x, y = (
        name if len(chosen) == count else f"{name} ({count_label(len(chosen), count, 'drawn')})"
        for name, chosen, count in zip(labels, (columns, rows), values.shape[::-1], strict=True)
    )
    return finished(ax, title, xlabel=x, ylabel=y)


@checked
def ranked(
    table: pd.DataFrame,
    ax: Axes | None = None,
    title: str = "",
    *,
    column: str = "gain",
    k: int = 10,
    images: np.ndarray | None = None,
    texts: Sequence[str] | None = None,
    label: str = "",
) -> Axes:
    """Plot bars of the first ``k`` rows of a ranking, with each example's image or text beside its bar.

    Args:
        table: ranking, such as ``rank_suspects`` returns, indexed by example; a column ``id`` labels the bars.
        ax: axes to draw on; by default those of a new figure.
        title: title of the plot.
        column: column with the bars' lengths.
        k: number of bars.
        images: images of all examples, ``[examples, height, width]`` or with a last axis of colours.
        texts: texts of all examples; long ones are cut.
        label: label of the axis; by default the column's name.

    >>> from matplotlib.figure import Figure
    >>> table = pd.DataFrame({"gain": [0.5, 0.2]}, index=[7, 3])
    >>> [label.get_text() for label in ranked(table, Figure().subplots()).get_yticklabels()]
    ['7', '3']
    """
    check_columns(table, column)
    ax = opened(ax)
    first = table.head(k)
    if first.empty:
        return empty(ax, title, "examples")
    rows = np.arange(len(first))
    ax.barh(rows, first[column], color=COLOURS[0])
    ax.axvline(0, color="grey", linewidth=0.8)
    labels = [str(index) for index in first.index]
    if texts is not None:
        labels = [f"{index}: {texts[int(str(index))]}" for index in first.index]
    elif "id" in first:
        labels = first["id"].tolist()
    ax.set_yticks(rows, named(labels))
    ax.invert_yaxis()
    if images is not None:
        ax.tick_params(axis="y", length=0, pad=26)
        for row, index in zip(rows, first.index, strict=True):
            _thumbnail(ax, np.asarray(images[int(str(index))]), float(row))
    return finished(ax, title, xlabel=label or column.replace("_", " "))


@checked
def plane(
    A: Line,
    B: Line,
    ax: Axes | None = None,
    title: str = "",
    *,
    groups: Any = None,
    name: str = "group",
) -> Axes:
    """Plot each training example's effects in a linear simulator: on the slope, and on the intercept.

    Args:
        A, B: effects on one test example, or means over several, ``[train]``.
        ax: axes to draw on; by default those of a new figure.
        title: title of the plot.
        groups: group of each training example, such as whether it has the test example's label; the six most frequent
            groups have colours and markers of their own.
        name: name of the grouping.

    >>> from matplotlib.figure import Figure
    >>> plane(np.array([0.1]), np.array([-0.2]), Figure().subplots()).collections[0].get_offsets().tolist()
    [[0.1, -0.2]]
    """
    if len(A) != len(B) or (groups is not None and np.shape(groups)[:1] != (len(A),)):
        raise InvalidInput(f"A, B and groups must have one value per training example; A has {len(A)}, B {len(B)}")
    ax = opened(ax)
    if A.size == 0:
        return empty(ax, title, "training examples")
    values = pd.Series(["training examples"] * len(A) if groups is None else [str(value) for value in groups])
    frequent = values.value_counts().index[: len(COLOURS)]
    for index, value in enumerate(frequent):
        members = (values == value).to_numpy()
        label = named([value if groups is None else f"{name} {value}"])[0]
        ax.scatter(A[members], B[members], s=16, color=COLOURS[index], marker=MARKERS[index], alpha=0.7, label=label)
    others = (~values.isin(frequent)).to_numpy()
    if others.any():
        ax.scatter(A[others], B[others], s=10, color="grey", marker="x", alpha=0.7, label=f"{others.sum()} others")
    ax.axhline(0, color="grey", linewidth=0.8, zorder=0)
    legend(ax)
    return finished(ax, title, xlabel="A: effect on the slope", ylabel="B: effect on the intercept (loss per step)")


@checked
def counts(table: pd.DataFrame, ax: Axes | None = None, title: str = "") -> Axes:
    """Plot the number of examples with each value (rows), for training and test examples (columns).

    Args:
        table: counts; of more than 20 rows, the first 20 are drawn.
        ax: axes to draw on; by default those of a new figure.
        title: title of the plot.

    >>> from matplotlib.figure import Figure
    >>> table = pd.DataFrame({"train": [3, 1]}, index=pd.Index(["cat", "dog"], name="label"))
    >>> [float(bar.get_height()) for bar in counts(table, Figure().subplots()).patches]
    [3.0, 1.0]
    """
    ax = opened(ax)
    if table.empty:
        return empty(ax, title, "examples")
    first = table.head(_VALUES)
    width = 0.8 / len(table.columns)
    for index, column in enumerate(table.columns):
        positions = np.arange(len(first)) + (index - (len(table.columns) - 1) / 2) * width
        ax.bar(positions, first[column].astype(float), width, color=COLOURS[index % 6], label=named([column])[0])
    ax.set_xticks(range(len(first)), named(first.index), rotation=45 if len(first) > 12 else 0)
    legend(ax)
    name = str(table.index.name or "value")
    part = "" if len(first) == len(table) else f" ({count_label(len(first), len(table), 'values')})"
    return finished(ax, title, xlabel=f"{name}{part}", ylabel="examples")


def _thumbnail(ax: Axes, image: np.ndarray, row: float) -> None:
    """Draw the example's image left of its bar."""
    box = OffsetImage(image, zoom=18 / image.shape[0], cmap="gray_r", interpolation="nearest")
    xycoords = ("axes fraction", "data")
    ax.add_artist(
        AnnotationBbox(box, (0, row), (-13, 0), xycoords=xycoords, boxcoords="offset points", frameon=False, pad=0)
    )
