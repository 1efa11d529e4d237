"""Pictures: functions ``(data, ax=None) → ax``. They draw what they are given and compute nothing.

Colours are Okabe and Ito's, told apart by colour-blind readers and in grey print; lines differ in their dashes too.
Without ``ax`` a figure of pyplot's is opened, as notebooks show it; with ``ax`` pyplot is never touched. What there is
too much of is drawn in part, and the picture says so. Names may hold anything: nothing in them is read as markup.
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
