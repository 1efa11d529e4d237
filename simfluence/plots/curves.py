"""Plots of skill and losses against steps, numbers of runs and removals."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

from simfluence._internal.checked import checked
from simfluence.plots.comparison import heading
from simfluence.plots.style import COLOURS, DASHES, Line, check_columns, empty, finished, legend, named, opened, plain

__all__ = ["learning_curve", "removal_curve", "skill_over_steps"]

_LEAST = -1.0  # lowest skill drawn


@checked
def skill_over_steps(table: pd.DataFrame, ax: Axes | None = None, title: str = "") -> Axes:
    """Plot the skill at each step, a line per simulator, with its interval if the table has ``low`` and ``high``.

    Args:
        table: table from ``evaluation.skill_over_steps``, with columns simulator, step, skill, low, high.
        ax: axes to draw on; by default those of a new figure.
        title: title of the plot; by default the table's task and numbers of runs.

    Values below −1 are not drawn, and the axis says so.

    >>> from matplotlib.figure import Figure
    >>> table = pd.DataFrame({"simulator": "linear", "step": [1, 2], "skill": [0.5, 0.6]})
    >>> skill_over_steps(table, Figure().subplots()).lines[0].get_ydata().tolist()
    [0.5, 0.6]
    """
    ax, title = opened(ax), title or heading(table)
    if table.empty:
        return empty(ax, title, "skill")
    check_columns(table, "step", "skill")
    for index, (name, rows) in enumerate(table.groupby("simulator", sort=False)):
        colour = COLOURS[index % 6]
        if {"low", "high"} <= set(rows.columns):
            ax.fill_between(rows["step"], rows["low"], rows["high"], color=colour, alpha=0.15, linewidth=0)
        ax.plot(rows["step"], rows["skill"], color=colour, dashes=DASHES[index % 6], label=named([name])[0])
    ax.axhline(0, color="grey", linewidth=0.8)
    cut = bool((table["skill"] < _LEAST).any())
    ax.set_ylim(max(_LEAST, ax.get_ylim()[0]), 1.05)
    legend(ax)
    return finished(ax, title, xlabel="step", ylabel="skill (cut at −1)" if cut else "skill")


@checked
def learning_curve(table: pd.DataFrame, ax: Axes | None = None, title: str = "") -> Axes:
    """Plot skill and final skill against the number of fitting runs.

    Args:
        table: table from ``simfluence.learning_curve``.
        ax: axes to draw on; by default those of a new figure.
        title: title of the plot; by default the table's task and numbers of runs.

    >>> from matplotlib.figure import Figure
    >>> table = pd.DataFrame({"runs": [2, 4], "skill": [0.5, 0.6], "skill_low": [0.4, 0.5], "skill_high": [0.6, 0.7]})
    >>> learning_curve(table, Figure().subplots()).lines[0].get_xdata().tolist()
    [2, 4]
    """
    ax, title = opened(ax), title or heading(table)
    if table.empty:
        return empty(ax, title, "skill")
    check_columns(table, "runs", "skill")
    runs = table["runs"]
    for index, metric in enumerate(name for name in ("skill", "final_skill") if name in table):
        if f"{metric}_low" in table:
            ends = table[f"{metric}_low"].clip(_LEAST), table[f"{metric}_high"].clip(_LEAST)
            ax.vlines(runs * (1 + 0.03 * index), *ends, color=COLOURS[index], linewidth=1.5, alpha=0.6)
        ax.plot(
            runs, table[metric].clip(_LEAST), "oD"[index], linestyle="-", dashes=DASHES[index], color=COLOURS[index],
            label=metric.replace("_", " "),
        )  # fmt: skip
    ax.axhline(0, color="grey", linewidth=0.8)
    ax.set_xscale("log", base=2)
    ax.set_xticks(runs, [str(count) for count in runs])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_ylim(top=1.05)
    ax.legend(frameon=False, loc="lower right")
    return finished(ax, title, xlabel="runs to fit on", ylabel="skill, 95 % intervals")


@checked
def removal_curve(losses: Line, past: float | None = None, ax: Axes | None = None, title: str = "") -> Axes:
    """Plot a forecast loss after 0, 1, 2, … removals, and the loss to exceed.

    Args:
        losses: forecast losses, ``[removals + 1]``.
        past: loss to exceed; by default none is drawn.
        ax: axes to draw on; by default those of a new figure.
        title: title of the plot.

    >>> from matplotlib.figure import Figure
    >>> removal_curve(np.array([1.0, 1.5]), 1.4, Figure().subplots()).lines[0].get_ydata().tolist()
    [1.0, 1.5]
    """
    ax = opened(ax)
    if not np.isfinite(losses).any():
        return empty(ax, title, "removals")
    ax.plot(losses, "o-", color=COLOURS[0])
    if past is not None:
        ax.axhline(past, color=COLOURS[1], linestyle="--", label=plain(f"loss {past:g}"))
        ax.legend(frameon=False)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return finished(ax, title, xlabel="examples removed", ylabel="final loss")
