"""Simulate training runs: what would the losses have been under another curriculum?

task + recipe + curricula ──record──▶ runs ──fit──▶ simulator ──what_if──▶ forecast ──verify──▶ truth
"""

from simfluence import attribution, tasks
from simfluence._version import __version__
from simfluence.curriculum import Curriculum, random_curricula
from simfluence.edits import (
    Concatenate,
    Edit,
    Insert,
    Keep,
    Move,
    Remove,
    Reorder,
    Repeat,
    Shuffle,
    Swap,
    Truncate,
)
from simfluence.effects import leave_group_out, leave_one_out, move_each, rank_suspects, show_again
from simfluence.errors import SimfluenceError
from simfluence.evaluation import evaluate
from simfluence.examples import Examples
from simfluence.judging import LDS, agreement, brittleness, lds
from simfluence.learning import learning_curve
from simfluence.recipe import Recipe
from simfluence.recorder import Recorder
from simfluence.recording import Checkpoint, Observe, estimate, record, replay, trained_model
from simfluence.removal import Removal, best_removal, forecast_removal, smallest_removal
from simfluence.runs import Run, Runs
from simfluence.simulators import (
    AdditiveSimulator,
    AttributedSimulator,
    BoostedSimulator,
    ConformalSimulator,
    FeaturizedSimulator,
    LinearSimulator,
    MeanTrajectorySimulator,
    MultiplicativeSimulator,
    PersistenceSimulator,
    Simulator,
    TangentKernelSimulator,
)
from simfluence.store import RunStore
from simfluence.task import Task
from simfluence.tuning import tune
from simfluence.verification import Verification, Verifications
from simfluence.whatif import Forecast, Forecasts, what_if

__all__ = [
    "LDS",
    "AdditiveSimulator",
    "AttributedSimulator",
    "BoostedSimulator",
    "Checkpoint",
    "Concatenate",
    "ConformalSimulator",
    "Curriculum",
    "Edit",
    "Examples",
    "FeaturizedSimulator",
    "Forecast",
    "Forecasts",
    "Insert",
    "Keep",
    "LinearSimulator",
    "MeanTrajectorySimulator",
    "Move",
    "MultiplicativeSimulator",
    "Observe",
    "PersistenceSimulator",
    "Recipe",
    "Recorder",
    "Removal",
    "Remove",
    "Reorder",
    "Repeat",
    "Run",
    "RunStore",
    "Runs",
    "Shuffle",
    "SimfluenceError",
    "Simulator",
    "Swap",
    "TangentKernelSimulator",
    "Task",
    "Truncate",
    "Verification",
    "Verifications",
    "__version__",
    "agreement",
    "attribution",
    "best_removal",
    "brittleness",
    "estimate",
    "evaluate",
    "forecast_removal",
    "lds",
    "learning_curve",
    "leave_group_out",
    "leave_one_out",
    "move_each",
    "random_curricula",
    "rank_suspects",
    "record",
    "replay",
    "show_again",
    "smallest_removal",
    "tasks",
    "trained_model",
    "tune",
    "what_if",
]
