"""What all pictures share: colours, axes, texts that fit, and a part of what is too much."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure

#: Okabe and Ito's colours: distinct to colour-blind readers and in grey print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ((), (5, 2), (2, 1.5), (6, 2, 1.5, 2), (1, 1), (8, 2))
MARKERS = ("o", "D", "s", "^", "v", "P")

_LONGEST = 40  # letters of a name beside an axis


def opened(ax: Axes | None) -> Axes:
    """``ax``, or the axes of a new figure of pyplot's."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(8, 4.2), layout="constrained")[1]


def finished(ax: Axes, title: str, **labels: str) -> Axes:
    """The title, the axes' labels, no frame above and on the right."""
    ax.set_title("\n".join(plain(line, 200) for line in title.split("\n")), wrap=True)
    ax.set(**{name: plain(label, 200) for name, label in labels.items()})
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def save(figure: Figure, file: Any, dpi: int) -> None:
    """Write a figure to a path, or as PNG to a stream, with nothing cut off."""
    figure.draw_without_rendering()  # the layout's first pass takes a wrapped title for a line, and cuts labels
    figure.savefig(file, dpi=dpi)


def legend(ax: Axes) -> None:
    """The names of what is drawn, beside the axes, where no curve is."""
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def empty(ax: Axes, title: str, what: str) -> Axes:
    """A picture of nothing, which says so."""
    ax.text(0.5, 0.5, f"no {what} to draw", ha="center", va="center", transform=ax.transAxes)
    ax.set(xticks=[], yticks=[])
    return finished(ax, title)


def plain(text: Any, longest: int = _LONGEST) -> str:
    """A text as it is to be read, on one line, cut where it is too long; a dollar does not begin a formula."""
    words = " ".join(str(text).split())
    cut = words if len(words) <= longest else f"{words[: longest - 1]}…"
    return cut.replace("$", r"\$")


def named(names: Iterable[Any]) -> list[str]:
    """Names as labels of ticks or lines. One that begins with "_" would be left out of a legend."""
    return [f" {name}" if name.startswith("_") else name for name in map(plain, names)]


def some(count: int, most: int) -> Int[np.ndarray, " some"]:
    """Which of ``count`` things are drawn: all, or ``most`` of them evenly spread."""
    return np.arange(count) if count <= most else np.linspace(0, count - 1, most).astype(int)


def of(drawn: int, count: int, what: str) -> str:
    """How many of them are drawn, in words."""
    return f"{count:,} {what}" if drawn == count else f"{drawn:,} of {count:,} {what}"
