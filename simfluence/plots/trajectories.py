"""Losses along training: recorded, simulated, and what they would be if."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from simfluence.plots.style import COLOURS, DASHES, empty, finished, legend, named, of, opened, some

Band = tuple[np.ndarray, np.ndarray]

_RUNS = 100  # lines of single runs that are drawn
_TESTS = 12  # and of single test examples


def recorded(
    losses: np.ndarray, ax: Axes | None = None, title: str = "", *, mean: np.ndarray | None = None, unit: str = "loss"
) -> Axes:
    """A thin line for each run, ``losses`` ``[runs, steps + 1]``, and their mean ``[steps + 1]`` if it is given.

    Losses that were not read (NaN) are bridged by straight lines. Of more than 100 runs some are drawn.

    >>> from matplotlib.figure import Figure
    >>> ax = recorded(np.array([[2.0, 1.0], [2.0, 1.5]]), Figure().subplots())
    >>> len(ax.lines)
    2
    """
    ax = opened(ax)
    if losses.size == 0:
        return empty(ax, title, "runs")
    chosen = some(len(losses), _RUNS)
    for index in chosen:
        label = of(len(chosen), len(losses), "runs") if index == chosen[0] else None
        ax.plot(*_read(losses[index]), color=COLOURS[5], linewidth=0.8, alpha=0.7, label=label)
    if mean is not None:
        ax.plot(*_read(mean), color="black", linewidth=2, label="mean")
    legend(ax)
    return finished(ax, title, xlabel="step", ylabel=unit)


def trajectories(
    true: np.ndarray,
    simulated: Mapping[str, np.ndarray],
    ax: Axes | None = None,
    title: str = "",
    *,
    bands: Mapping[str, Band] | None = None,
    names: bool = True,
) -> Axes:
    """A true trajectory and simulated ones beside it, by simulator name.

    Args:
        true: ``[steps + 1]``; or ``[steps + 1, test]``, of which up to 12 test examples are drawn, evenly spread.
        simulated: of the same shape, by name; each has a colour and dashes of its own.
        bands: lower and upper ends of intervals of some of them, of the same shape; drawn for single trajectories.
        names: write them beside the axes; a figure may do so once for several.

    >>> from matplotlib.figure import Figure
    >>> ax = trajectories(np.array([2.0, 1.0]), {"linear": np.array([2.0, 1.2])}, Figure().subplots())
    >>> [line.get_label() for line in ax.lines]
    ['real training', 'linear']
    """
    ax = opened(ax)
    if true.size == 0:
        return empty(ax, title, "trajectory")
    tests = some(1 if true.ndim == 1 else true.shape[1], _TESTS)
    count = "" if true.ndim == 1 else f" ({of(len(tests), true.shape[1], 'test examples')})"
    thin = 0.6 if true.ndim > 1 else 1.0
    _lines(ax, true, tests, f"real training{count}", color="black", linewidth=2 * thin)
    for index, (name, losses) in enumerate(zip(named(simulated), simulated.values(), strict=True)):
        colour = COLOURS[index % 6]
        _lines(ax, losses, tests, name, color=colour, dashes=DASHES[index % 6], linewidth=1.5 * thin)
    for name, (low, high) in (bands or {}).items():
        if low.ndim == 1 and name in simulated:
            colour = COLOURS[list(simulated).index(name) % 6]
            ax.fill_between(np.arange(len(low)), low, high, color=colour, alpha=0.2, linewidth=0)
    if names:
        legend(ax)
    return finished(ax, title, xlabel="step", ylabel="loss")


def fan(
    losses: Mapping[str, np.ndarray],
    ax: Axes | None = None,
    title: str = "",
    *,
    interval: Band | None = None,
    interval_name: str = "interval of the forecast",
    ylabel: str = "mean test loss",
) -> Axes:
    """A what-if question: trajectories ``[steps + 1]`` by name, with the interval of the edited one's forecast.

    What really happened (names that end in "recorded" or "retrained") is drawn solid, what is forecast dashed; those
    whose names begin with "edited" in colour.

    >>> from matplotlib.figure import Figure
    >>> losses = {"base, recorded": np.array([2.0, 1.0]), "edited, forecast": np.array([2.0, 1.5])}
    >>> [line.get_linestyle() for line in fan(losses, Figure().subplots()).lines]
    ['-', '--']
    """
    ax = opened(ax)
    if not losses:
        return empty(ax, title, "trajectories")
    if interval is not None:
        low, high = interval
        ax.fill_between(np.arange(len(low)), low, high, color=COLOURS[1], alpha=0.2, linewidth=0, label=interval_name)
    for name, values in losses.items():
        real = name.endswith(("recorded", "retrained"))
        colour = COLOURS[1] if name.startswith("edited") else "black"
        style: dict[str, Any] = {"linewidth": 2 if real else 1.5, "linestyle": "-" if real else "--"}
        ax.plot(*_read(values), color=colour, label=named([name])[0], **style)
    legend(ax)
    return finished(ax, title, xlabel="step", ylabel=ylabel)


def _lines(ax: Axes, losses: np.ndarray, tests: np.ndarray, label: str, **style: Any) -> None:
    """One line, or one for each of the chosen test examples, with one entry in the legend."""
    columns = [losses] if losses.ndim == 1 else losses[:, tests].T
    for index, column in enumerate(columns):
        ax.plot(*_read(np.asarray(column)), label=label if index == 0 else None, **style)


def _read(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The steps and losses that are numbers."""
    steps = np.flatnonzero(np.isfinite(losses))
    return steps, losses[steps]
