"""Plots of forecasts against the truth: by point, by query, by simulator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from simfluence._internal.checked import checked
from simfluence.errors import InvalidInput
from simfluence.plots.style import (
    COLOURS,
    MARKERS,
    Line,
    Numbers,
    check_columns,
    count_label,
    empty,
    finished,
    legend,
    named,
    opened,
    spread,
)

__all__ = ["changes", "evaluation", "heading", "scatter"]

_POINTS = 2000  # points drawn per group
_ROWS = 40  # queries drawn
_LEAST = -1.0  # lowest skill drawn to scale


@checked
def scatter(
    predicted: Numbers,
    actual: Numbers,
    ax: Axes | None = None,
    title: str = "",
    *,
    metrics: Mapping[str, float] | None = None,
    groups: Sequence[str] = (),
    what: str = "change of the final loss",
) -> Axes:
    """Plot forecast against retrained values, with the diagonal on which they agree.

    Args:
        predicted, actual: values ``[points]``, or ``[groups, points]``, a row per run or query.
        ax: axes to draw on; by default those of a new figure.
        title: title of the plot.
        metrics: numbers to show under the title, by name.
        groups: names of the rows; up to six have a colour and a marker of their own.
        what: name of the values, with their unit, if any.

    Of more than 2,000 points of a group, 2,000 evenly spread ones are drawn, and the plot says so.

    Raises:
        InvalidInput: predicted and actual values differ in shape.

    >>> from matplotlib.figure import Figure
    >>> ax = scatter(np.array([0.1, 0.4]), np.array([0.2, 0.3]), Figure().subplots(), metrics={"r": 1.0})
    >>> ax.collections[0].get_offsets().tolist()
    [[0.1, 0.2], [0.4, 0.3]]
    """
    if predicted.ndim not in (1, 2):
        raise InvalidInput(f"predicted must have one or two axes, [points] or [groups, points], got {predicted.ndim}")
    if predicted.shape != actual.shape:
        raise InvalidInput(f"predicted and actual values differ in shape: {predicted.shape} and {actual.shape}")
    ax = opened(ax)
    if not (np.isfinite(predicted) & np.isfinite(actual)).any():
        return empty(ax, title, "points")
    if groups and len(groups) != len(np.atleast_2d(predicted)):
        raise InvalidInput(f"there are {len(groups)} groups for {len(np.atleast_2d(predicted))} rows: name each row")
    rows = list(zip(np.atleast_2d(predicted), np.atleast_2d(actual), strict=True))
    chosen = spread(len(rows[0][0]), _POINTS)
    several = 1 < len(rows) <= len(COLOURS)
    names = named(groups) if several and groups else [None] * len(rows)
    for index, ((x, y), name) in enumerate(zip(rows, names, strict=True)):
        style = index if several else 0
        ax.scatter(x[chosen], y[chosen], s=14, color=COLOURS[style], marker=MARKERS[style], alpha=0.6, label=name)
    ends = _ends(predicted, actual)
    ax.plot(ends, ends, color="grey", linewidth=0.8, zorder=0)
    ax.set(xlim=ends, ylim=ends, aspect="equal")
    notes = [f"{name} {value:.3g}" for name, value in (metrics or {}).items()]
    notes += [f"{count_label(len(chosen), len(rows[0][0]), 'points')} drawn"] if len(chosen) < len(rows[0][0]) else []
    if names[0] is not None:
        legend(ax)
    lines = [title.replace("\n", " "), *([", ".join(notes)] if notes else [])]
    return finished(ax, "\n".join(lines), xlabel=f"forecast {what}", ylabel=f"retrained {what}")


@checked
def changes(
    names: Sequence[str],
    predicted: Line,
    actual: Line | None = None,
    ax: Axes | None = None,
    title: str = "",
) -> Axes:
    """Plot the change of a loss by query, forecast and, if known, retrained: a row per query, 40 at most.

    Args:
        names: names of the queries.
        predicted, actual: changes ``[queries]``.
        ax: axes to draw on; by default those of a new figure.
        title: title of the plot.

    >>> from matplotlib.figure import Figure
    >>> ax = changes(["no 3s"], np.array([0.4]), np.array([0.5]), Figure().subplots())
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['no 3s']
    """
    if len(predicted) != len(names) or (actual is not None and len(actual) != len(names)):
        raise InvalidInput(f"changes needs one predicted and one actual value for each of {len(names)} names")
    ax = opened(ax)
    if len(names) == 0:
        return empty(ax, title, "queries")
    shown = min(len(names), _ROWS)
    rows = np.arange(shown)
    ax.axvline(0, color="grey", linewidth=0.8)
    ax.plot(predicted[:shown], rows, "o", color=COLOURS[0], label="forecast")
    if actual is not None:
        ax.hlines(rows, predicted[:shown], actual[:shown], color="lightgrey", zorder=0)
        ax.plot(actual[:shown], rows, "D", color=COLOURS[1], markerfacecolor="none", label="retrained")
        legend(ax)
    ax.set_yticks(rows, named(list(names)[:shown]))
    ax.invert_yaxis()
    label = "" if shown == len(names) else count_label(shown, len(names), "queries")
    return finished(ax, title, xlabel="change of the mean final loss", ylabel=label)


@checked
def evaluation(table: pd.DataFrame, ax: Axes | None = None, title: str = "", *, metric: str = "skill") -> Axes:
    """Plot a bar per simulator, with its value and, if the table has one, its interval or standard deviation.

    A bar of skill below −1 is cut there; its value is still shown.

    Args:
        table: table from ``evaluate``.
        ax: axes to draw on; by default those of a new figure.
        title: title of the plot; by default the table's task and numbers of runs.
        metric: column of the table.

    Raises:
        InvalidInput: the table has no such column.

    >>> from matplotlib.figure import Figure
    >>> table = pd.DataFrame({"skill": [0.5], "skill_low": [0.4], "skill_high": [0.6]}, index=["linear"])
    >>> [float(bar.get_width()) for bar in evaluation(table, Figure().subplots()).patches]
    [0.5]
    """
    check_columns(table, metric)
    ax = opened(ax)
    title = title or heading(table)
    known = table[table[metric].notna()]
    if known.empty:
        return empty(ax, title, metric.replace("_", " "))
    least = _LEAST if "skill" in metric else -np.inf
    values, ends = known[metric].to_numpy(np.float64), _intervals(known, metric)
    shown = np.maximum(values, least)
    rows = np.arange(len(known))
    ax.barh(rows, shown, color=COLOURS[0], alpha=0.8)
    low, high = np.maximum(ends, least)
    ax.hlines(rows, low, high, color="black", linewidth=1.5)
    for row, value, end in zip(rows, values, np.fmax(np.fmax(shown, high), 0), strict=True):
        cut = " (bar cut at −1)" if value < least else ""
        ax.annotate(f"{value:.3g}{cut}", (end, row), (4, 0), textcoords="offset points", va="center", fontsize="small")
    ax.axvline(0, color="grey", linewidth=0.8)
    ax.set_yticks(rows, named(known.index))
    ax.invert_yaxis()
    ax.margins(x=0.2)
    name = metric.replace("_", " ")
    return finished(ax, title, xlabel=f"{name} (1 is perfect, 0 the mean trajectory)" if "skill" in metric else name)


@checked
def heading(table: pd.DataFrame) -> str:
    """Return a title for a table of an evaluation: its task and its numbers of runs.

    >>> table = pd.DataFrame()
    >>> table.attrs |= {"task": "digits", "fit": 24, "held": 8}
    >>> heading(table)
    'digits: 24 runs to fit on, 8 runs held out'
    """
    parts = [str(table.attrs["task"])] if table.attrs.get("task") else []
    parts += [f"{table.attrs['fit']} runs to fit on"] if table.attrs.get("fit") else []
    parts += [f"{table.attrs['held']} runs held out"] if table.attrs.get("held") else []
    return f"{parts[0]}: {', '.join(parts[1:])}" if len(parts) > 1 else "".join(parts)


def _intervals(table: pd.DataFrame, metric: str) -> np.ndarray:
    """Return the intervals' lower and upper ends ``[2, rows]``; NaN if the table has none."""
    if f"{metric}_low" in table and f"{metric}_high" in table:
        return table[[f"{metric}_low", f"{metric}_high"]].to_numpy(np.float64).T
    if f"{metric}_sd" in table:
        middle, sd = table[[metric, f"{metric}_sd"]].to_numpy(np.float64).T
        return np.stack([middle - sd, middle + sd])
    return np.full((2, len(table)), np.nan)


def _ends(predicted: np.ndarray, actual: np.ndarray) -> tuple[float, float]:
    """Return the limits of both axes."""
    values = np.concatenate([predicted.ravel(), actual.ravel()])
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin
