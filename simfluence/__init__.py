"""Simulate training runs: what would the losses have been under another curriculum?

task + recipe + curricula ──record──▶ runs ──fit──▶ simulator ──what_if──▶ forecast ──verify──▶ truth
"""

from simfluence import attribution, tasks
from simfluence._version import __version__
from simfluence.curriculum import Curriculum, random_curricula
from simfluence.edits import Edit, Remove, Reorder, Repeat
from simfluence.errors import SimfluenceError
from simfluence.evaluation import evaluate
from simfluence.examples import Examples
from simfluence.learning import learning_curve
from simfluence.recipe import Recipe
from simfluence.recording import Checkpoint, Observe, estimate, record
from simfluence.runs import Run, Runs
from simfluence.simulators import (
    AdditiveSimulator,
    BoostedSimulator,
    ConformalSimulator,
    FeaturizedSimulator,
    LinearSimulator,
    MeanTrajectorySimulator,
    MultiplicativeSimulator,
    PersistenceSimulator,
    Simulator,
)
from simfluence.store import RunStore
from simfluence.task import Task
from simfluence.tuning import tune
from simfluence.whatif import Forecast, Verification, leave_one_out, what_if

__all__ = [
    "AdditiveSimulator",
    "BoostedSimulator",
    "Checkpoint",
    "ConformalSimulator",
    "Curriculum",
    "Edit",
    "Examples",
    "FeaturizedSimulator",
    "Forecast",
    "LinearSimulator",
    "MeanTrajectorySimulator",
    "MultiplicativeSimulator",
    "Observe",
    "PersistenceSimulator",
    "Recipe",
    "Remove",
    "Reorder",
    "Repeat",
    "Run",
    "RunStore",
    "Runs",
    "SimfluenceError",
    "Simulator",
    "Task",
    "Verification",
    "__version__",
    "attribution",
    "estimate",
    "evaluate",
    "learning_curve",
    "leave_one_out",
    "random_curricula",
    "record",
    "tasks",
    "tune",
    "what_if",
]
