"""Plots of losses along training: recorded, simulated, and counterfactual."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from simfluence._internal.checked import checked, fitting
from simfluence.errors import InvalidInput
from simfluence.plots.style import (
    COLOURS,
    DASHES,
    Line,
    Numbers,
    count_label,
    empty,
    finished,
    legend,
    named,
    opened,
    spread,
)

__all__ = ["Band", "fan", "recorded", "trajectories"]

Band = tuple[np.ndarray, np.ndarray]

_RUNS = 100  # runs drawn
_TESTS = 12  # test examples drawn


@checked
def recorded(
    losses: Numbers, ax: Axes | None = None, title: str = "", *, mean: Line | None = None, unit: str = "loss"
) -> Axes:
    """Plot a thin line for each run, and their mean.

    Args:
        losses: losses ``[runs, steps + 1]``; straight lines bridge NaN. Of more than 100 runs, 100 evenly spread ones
            are drawn.
        ax: axes to draw on; by default those of a new figure.
        title: title of the plot.
        mean: mean losses ``[steps + 1]``; by default none are drawn.
        unit: name of the losses, with their unit, if any.

    >>> from matplotlib.figure import Figure
    >>> ax = recorded(np.array([[2.0, 1.0], [2.0, 1.5]]), Figure().subplots())
    >>> len(ax.lines)
    2
    """
    if losses.ndim != 2:
        raise InvalidInput(f"losses must have two axes, [runs, steps + 1], got {losses.ndim}")
    ax = opened(ax)
    if not np.isfinite(losses).any():
        return empty(ax, title, "runs")
    chosen = spread(len(losses), _RUNS)
    for index in chosen:
        label = count_label(len(chosen), len(losses), "runs") if index == chosen[0] else None
        ax.plot(*_finite(losses[index]), color=COLOURS[5], linewidth=0.8, alpha=0.7, label=label)
    if mean is not None:
        ax.plot(*_finite(mean), color="black", linewidth=2, label="mean")
    legend(ax)
    return finished(ax, title, xlabel="step", ylabel=unit)


@checked
def trajectories(
    true: Numbers,
    simulated: Mapping[str, np.ndarray],
    ax: Axes | None = None,
    title: str = "",
    *,
    bands: Mapping[str, Band] | None = None,
    names: bool = True,
) -> Axes:
    """Plot a true trajectory and simulated ones.

    Args:
        true: losses ``[steps + 1]``; or ``[steps + 1, test]``, of which up to 12 evenly spread test examples are drawn.
        simulated: losses of the same shape by simulator; each simulator has a colour and dashes of its own.
        ax: axes to draw on; by default those of a new figure.
        title: title of the plot.
        bands: lower and upper ends of intervals by simulator, of the same shape; drawn for single trajectories.
        names: whether to draw a legend.

    >>> from matplotlib.figure import Figure
    >>> ax = trajectories(np.array([2.0, 1.0]), {"linear": np.array([2.0, 1.2])}, Figure().subplots())
    >>> [line.get_label() for line in ax.lines]
    ['real training', 'linear']
    """
    if true.ndim not in (1, 2):
        raise InvalidInput(f"true must have one or two axes, [steps + 1] or [steps + 1, test], got {true.ndim}")
    for name, values in simulated.items():
        if np.shape(values) != true.shape:
            raise InvalidInput(f"simulated[{name!r}] must have the shape of true, {list(true.shape)}")
    ax = opened(ax)
    if true.size == 0:
        return empty(ax, title, "trajectory")
    tests = spread(1 if true.ndim == 1 else true.shape[1], _TESTS)
    count = "" if true.ndim == 1 else f" ({count_label(len(tests), true.shape[1], 'test examples')})"
    scale = 0.6 if true.ndim > 1 else 1.0
    _lines(ax, true, tests, f"real training{count}", color="black", linewidth=2 * scale)
    for index, (name, losses) in enumerate(zip(named(simulated), simulated.values(), strict=True)):
        colour = COLOURS[index % 6]
        _lines(ax, losses, tests, name, color=colour, dashes=DASHES[index % 6], linewidth=1.5 * scale)
    for name, (low, high) in (bands or {}).items():
        if low.ndim == 1 and name in simulated:
            colour = COLOURS[list(simulated).index(name) % 6]
            ax.fill_between(np.arange(len(low)), low, high, color=colour, alpha=0.2, linewidth=0)
    if names:
        legend(ax)
    return finished(ax, title, xlabel="step", ylabel="loss")


@checked
def fan(
    losses: Mapping[str, np.ndarray],
    ax: Axes | None = None,
    title: str = "",
    *,
    interval: Band | None = None,
    interval_name: str = "interval of the forecast",
    ylabel: str = "mean test loss",
) -> Axes:
    """Plot a what-if question: base and edited trajectories, with an interval of the edited forecast.

    Lines whose names end in "recorded" or "retrained" are solid, forecasts dashed; lines whose names begin with
    "edited" are coloured.

    Args:
        losses: trajectories ``[steps + 1]`` by name.
        ax: axes to draw on; by default those of a new figure.
        title: title of the plot.
        interval: lower and upper ends of the interval, each ``[steps + 1]``.
        interval_name: name of the interval in the legend.
        ylabel: label of the losses.

    >>> from matplotlib.figure import Figure
    >>> losses = {"base, recorded": np.array([2.0, 1.0]), "edited, forecast": np.array([2.0, 1.5])}
    >>> [line.get_linestyle() for line in fan(losses, Figure().subplots()).lines]
    ['-', '--']
    """
    losses = {name: fitting(f"losses[{name!r}]", values, Line) for name, values in losses.items()}
    if interval is not None and (len(interval) != 2 or np.shape(interval[0]) != np.shape(interval[1])):
        raise InvalidInput("interval must be two arrays of one length, the lower and the upper ends")
    ax = opened(ax)
    if not losses:
        return empty(ax, title, "trajectories")
    if interval is not None:
        low, high = interval
        ax.fill_between(np.arange(len(low)), low, high, color=COLOURS[1], alpha=0.2, linewidth=0, label=interval_name)
    for name, values in losses.items():
        name = str(name)
        trained = name.endswith(("recorded", "retrained"))
        colour = COLOURS[1] if name.startswith("edited") else "black"
        style: dict[str, Any] = {"linewidth": 2 if trained else 1.5, "linestyle": "-" if trained else "--"}
        ax.plot(*_finite(values), color=colour, label=named([name])[0], **style)
    legend(ax)
    return finished(ax, title, xlabel="step", ylabel=ylabel)


def _lines(ax: Axes, losses: np.ndarray, tests: np.ndarray, label: str, **style: Any) -> None:
    """Plot one line, or one for each chosen test example, with one entry in the legend."""
    columns = [losses] if losses.ndim == 1 else losses[:, tests].T
    for index, column in enumerate(columns):
        ax.plot(*_finite(np.asarray(column)), label=label if index == 0 else None, **style)


def _finite(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps with finite losses, and these losses."""
    steps = np.flatnonzero(np.isfinite(losses))
    return steps, losses[steps]
