"""Pictures: functions ``(data, ax) → ax``. They draw what they are given and compute nothing."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

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
