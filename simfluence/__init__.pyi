from . import attribution, errors, evaluation, plots, queries, recording, simulators, specs, storage, tasks
from ._version import __version__
from .curriculum import Curriculum, random_curricula
from .edits import (
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
from .errors import SimfluenceError
from .evaluation.attribution import LDS, agreement, brittleness, lds
from .evaluation.held_out import evaluate
from .evaluation.learning_curves import learning_curve
from .evaluation.tuning import tune
from .examples import Examples
from .queries.effects import leave_group_out, leave_one_out, move_each, rank_suspects, show_again
from .queries.forecast import Forecast, Verification
from .queries.forecasts import Forecasts, Verifications
from .queries.questions import what_if
from .queries.removal import Removal, best_removal, forecast_removal, smallest_removal
from .recipe import Recipe
from .recording import Checkpoint, Observe, estimate, record, replay, trained_model
from .runs import Run, Runs
from .simulators import (
    AdditiveSimulator,
    AttributedSimulator,
    BestSimulator,
    BoostedSimulator,
    ConformalSimulator,
    FeaturizedSimulator,
    LinearSimulator,
    MeanTrajectorySimulator,
    MultiplicativeSimulator,
    PersistenceSimulator,
    ResponseSimulator,
    Simulator,
    TangentKernelSimulator,
)
from .storage.recorder import Recorder
from .storage.store import RunStore
from .task import Task

__all__ = [
    "LDS",
    "AdditiveSimulator",
    "AttributedSimulator",
    "BestSimulator",
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
    "ResponseSimulator",
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
    "errors",
    "estimate",
    "evaluate",
    "evaluation",
    "forecast_removal",
    "lds",
    "learning_curve",
    "leave_group_out",
    "leave_one_out",
    "move_each",
    "plots",
    "queries",
    "random_curricula",
    "rank_suspects",
    "record",
    "recording",
    "replay",
    "show_again",
    "simulators",
    "smallest_removal",
    "specs",
    "storage",
    "tasks",
    "trained_model",
    "tune",
    "what_if",
]
