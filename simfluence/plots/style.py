"""Common parts of all plots: colours, axes, labels, and samples of large data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simfluence.errors import InvalidInput, did_you_mean

__all__ = [
    "COLOURS",
    "DASHES",
    "MARKERS",
    "Line",
    "Numbers",
    "check_columns",
    "count_label",
    "empty",
    "finished",
    "legend",
    "named",
    "opened",
    "plain",
    "save",
    "spread",
]

#: Okabe and Ito's colours, distinct to colour-blind readers and in grey print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ((), (5, 2), (2, 1.5), (6, 2, 1.5, 2), (1, 1), (8, 2))
MARKERS = ("o", "D", "s", "^", "v", "P")

#: Arrays of numbers; lists and whole numbers are converted.
Numbers = Float[np.ndarray, "..."]
Line = Float[np.ndarray, " _"]

_LONGEST = 40  # characters of a name beside an axis


def opened(ax: Axes | None) -> Axes:
    """Return ``ax``, or the axes of a new pyplot figure."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(8, 4.2), layout="constrained")[1]


def check_columns(table: pd.DataFrame, *names: str) -> None:
    """Check that a table has these columns, and numbers in them.

    Raises:
        InvalidInput: a column is missing, or has something else than numbers.
    """
    for name in names:
        if name not in table.columns:
            options = [str(column) for column in table.columns]
            raise InvalidInput(f"the table has no column {name!r}, {did_you_mean(name, options)}")
        if not pd.api.types.is_numeric_dtype(table[name]) or table[name].dtype.kind == "c":
            raise InvalidInput(f"column {name!r} of the table must have numbers, got {table[name].dtype}")


def finished(ax: Axes, title: str, **labels: str) -> Axes:
    """Set the title and the axes' labels, and hide the frame above and on the right."""
    ax.set_title("\n".join(plain(line, 200) for line in title.split("\n")), wrap=True)
    ax.set(**{name: plain(label, 200) for name, label in labels.items()})
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def save(figure: Figure, file: Any, dpi: int) -> None:
    """Write a figure to a path, or as PNG to a stream, without cutting labels off."""
    figure.draw_without_rendering()  # a first layout ignores wrapped titles and cuts labels
    figure.savefig(file, dpi=dpi)


def legend(ax: Axes) -> None:
    """Draw the legend beside the axes, where it covers no curve."""
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def empty(ax: Axes, title: str, what: str) -> Axes:
    """Draw a notice that there is no data to draw."""
    ax.text(0.5, 0.5, f"no {what} to draw", ha="center", va="center", transform=ax.transAxes)
    ax.set(xticks=[], yticks=[])
    return finished(ax, title)


def plain(text: Any, longest: int = _LONGEST) -> str:
    """Return a text on one line, cut to ``longest`` characters, with dollars escaped, which would begin a formula."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in str(text)).split())
    cut = line if len(line) <= longest else f"{line[: longest - 1]}…"
    return cut.replace("$", r"\$")


def named(names: Iterable[Any]) -> list[str]:
    """Return names as labels of ticks or lines; a leading "_", which would hide a name in a legend, gets a space."""
    return [f" {name}" if name.startswith("_") else name for name in map(plain, names)]


def spread(count: int, most: int) -> Int[np.ndarray, " drawn"]:
    """Return the positions to draw of ``count``: all, or ``most`` evenly spread ones."""
    return np.arange(count) if count <= most else np.linspace(0, count - 1, most).astype(int)


def count_label(drawn: int, count: int, what: str) -> str:
    """Return the number of things drawn in words, such as "12 of 5,000 runs"."""
    return f"{count:,} {what}" if drawn == count else f"{drawn:,} of {count:,} {what}"
