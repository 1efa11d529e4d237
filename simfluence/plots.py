"""Pictures: functions ``(data, ax) → ax``. They draw what they are given and compute nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's colours: distinct to colour-blind readers and in grey print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ((), (5, 2), (2, 1.5), (6, 2, 1.5, 2), (1, 1), (8, 2))


def trajectories(
    true: np.ndarray, simulated: Mapping[str, np.ndarray], ax: Axes | None = None, title: str = ""
) -> Axes:
    """A true trajectory ``[steps + 1]`` and simulated ones beside it, by simulator name."""
    ax = ax or plt.subplots(layout="constrained")[1]
    ax.plot(true, color="black", linewidth=2, label="real training")
    for index, (name, losses) in enumerate(simulated.items()):
        ax.plot(losses, color=COLOURS[index % 6], dashes=DASHES[index % 6], linewidth=1.5, label=name)
    ax.set(xlabel="step", ylabel="loss", title=title)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def fan(losses: Mapping[str, np.ndarray], ax: Axes | None = None, title: str = "") -> Axes:
    """Trajectories ``[steps + 1]`` by name; what really happened (names that end in "recorded" or "retrained") is drawn
    solid, what is forecast dashed, the edited ones in colour."""
    ax = ax or plt.subplots(layout="constrained")[1]
    for name, values in losses.items():
        real = name.endswith(("recorded", "retrained"))
        colour = COLOURS[1] if name.startswith("edited") else "black"
        ax.plot(values, color=colour, linewidth=2 if real else 1.5, linestyle="-" if real else "--", label=name)
    ax.set(xlabel="step", ylabel="mean test loss", title=title)
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def changes(
    names: Sequence[str],
    predicted: np.ndarray,
    actual: np.ndarray | None = None,
    ax: Axes | None = None,
    title: str = "",
) -> Axes:
    """Changes of a loss by query, forecast and, if known, retrained: a row each."""
    ax = ax or plt.subplots(layout="constrained")[1]
    rows = np.arange(len(names))
    ax.axvline(0, color="grey", linewidth=0.8)
    ax.plot(predicted, rows, "o", color=COLOURS[0], label="forecast")
    if actual is not None:
        ax.hlines(rows, predicted, actual, color="lightgrey", zorder=0)
        ax.plot(actual, rows, "D", color=COLOURS[1], markerfacecolor="none", label="retrained")
        ax.legend(frameon=False)
    ax.set_yticks(rows, [name if len(name) <= 40 else f"{name[:39]}…" for name in names])
    ax.invert_yaxis()
    ax.set(xlabel="change of the mean final loss", title=title)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def heat_map(
    values: pd.DataFrame, ax: Axes | None = None, title: str = "", label: str = "change of the final loss"
) -> Axes:
    """Values by test example (rows) and training example or group (columns); orange: above 0, purple: below.

    Colours end at the 99th percentile of sizes, so that a few large ones do not hide the rest.
    """
    ax = ax or plt.subplots(layout="constrained")[1]
    array = values.to_numpy()
    largest = float(np.quantile(np.abs(array), 0.99)) or 1.0
    image = ax.imshow(array, aspect="auto", cmap="PuOr_r", vmin=-largest, vmax=largest, interpolation="nearest")
    if values.shape[1] <= 30:
        ax.set_xticks(range(values.shape[1]), [str(name) for name in values.columns])
    ax.set(xlabel=str(values.columns.name), ylabel="test example", title=title)
    ax.figure.colorbar(image, ax=ax, label=label, extend="both")
    return ax


def removal_curve(losses: np.ndarray, past: float | None = None, ax: Axes | None = None, title: str = "") -> Axes:
    """A forecast loss after 0, 1, 2, … removals, and the loss that was to be passed."""
    ax = ax or plt.subplots(layout="constrained")[1]
    ax.plot(losses, "o-", color=COLOURS[0])
    if past is not None:
        ax.axhline(past, color=COLOURS[1], linestyle="--", label=f"loss {past:g}")
        ax.legend(frameon=False)
    ax.set(xlabel="examples removed", ylabel="final loss", title=title)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.spines[["top", "right"]].set_visible(False)
    return ax
