"""Plots: functions ``(data, ax=None) → ax``. They draw their data and compute nothing.

Colours are Okabe and Ito's, distinct to colour-blind readers and in grey print; lines also differ in their dashes.
Without ``ax`` a new pyplot figure is opened, which notebooks show; with ``ax`` pyplot is never used. Large data are
drawn in part, and the plot says so. Names may contain any characters: none is read as markup.
"""

from simfluence.plots.comparison import changes, evaluation, heading, scatter
from simfluence.plots.curves import learning_curve, removal_curve, skill_over_steps
from simfluence.plots.examples import counts, heat_map, plane, ranked
from simfluence.plots.influence import by_layer, distribution, tokens
from simfluence.plots.style import COLOURS, DASHES
from simfluence.plots.trajectories import fan, recorded, trajectories

__all__ = [
    "COLOURS",
    "DASHES",
    "by_layer",
    "changes",
    "counts",
    "distribution",
    "evaluation",
    "fan",
    "heading",
    "heat_map",
    "learning_curve",
    "plane",
    "ranked",
    "recorded",
    "removal_curve",
    "scatter",
    "skill_over_steps",
    "tokens",
    "trajectories",
]
