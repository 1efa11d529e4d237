"""What-if questions: what would the losses be under an edited curriculum, and what does retraining say?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float

from simfluence._types import RunLosses
from simfluence.curriculum import Curriculum
from simfluence.edits import Edit, apply_all
from simfluence.errors import InvalidInput
from simfluence.evaluation import delta_correlation
from simfluence.recipe import Recipe
from simfluence.recording import record
from simfluence.runs import Run
from simfluence.simulators import Simulator
from simfluence.task import Task

PerTest = Float[np.ndarray, " test"]


@dataclass(frozen=True, eq=False)
class Forecast:
    """What a simulator says of an edited curriculum, beside what it says of the base.

    Both sides are simulated, so that the simulator's common error cancels in the difference.

    Args:
        run: the base run.
        edits: what was changed.
        curriculum: the edited curriculum.
        base: simulated losses under the base curriculum, ``[steps + 1, test]``.
        what_if: the same under the edited one.
        task: for ``verify``, if known.
    """

    run: Run
    edits: tuple[Edit, ...]
    curriculum: Curriculum
    base: RunLosses
    what_if: RunLosses
    task: Task | None = field(default=None, repr=False)

    @property
    def change(self) -> PerTest:
        """Predicted change of each test example's final loss."""
        return self.what_if[-1] - self.base[-1]

    @cached_property
    def frame(self) -> pd.DataFrame:
        """Tidy: a row per step and test example; columns step, test, base, what_if, delta."""
        return _tidy({"base": self.base, "what_if": self.what_if, "delta": self.what_if - self.base})

    def verify(
        self, recipe: Recipe | None = None, *, task: Task | None = None, store: str | Path | None = None
    ) -> Verification:
        """Really retrain under the edited curriculum and set the truth beside the forecast.

        Args:
            recipe: how to train; by default as the base run was.
            task: what to train; by default the one given to ``what_if``.
            store: folder to keep the retrained run in, marked as a verification so that ``load()`` leaves it out;
                asking again trains nothing.

        Raises:
            InvalidInput: the task is not known or not the base run's, or the recipe is not the base run's.
        """
        task, recipe = task or self.task, recipe or self.run.recipe
        if task is None or recipe is None:
            missing = "task" if task is None else "recipe"
            raise InvalidInput(f"verifying means training again: give {missing}=")
        if self.run.fingerprint not in (None, task.fingerprint):
            raise InvalidInput(f"base run {self.run.id} is of another task than {task.name!r}")
        if self.run.recipe not in (None, recipe):
            raise InvalidInput(f"base run {self.run.id} was trained by another recipe: {self.run.recipe}")
        retrained = record(task, recipe, [self.curriculum], store, verification=True)[0]
        return Verification(self, retrained.losses.astype(np.float64))

    def __str__(self) -> str:
        said = " and ".join(str(edit) for edit in self.edits)
        return f"What if we {said}? Mean final loss {self.base[-1].mean():.3f} → {self.what_if[-1].mean():.3f}"


@dataclass(frozen=True, eq=False)
class Verification:
    """A forecast beside the truth.

    Args:
        forecast: what was predicted.
        actual: losses of the retrained run, ``[steps + 1, test]``.
    """

    forecast: Forecast
    actual: RunLosses

    @property
    def actual_change(self) -> PerTest:
        """Retrained change of each test example's final loss, against the recorded base run."""
        return self.actual[-1] - self.forecast.run.losses[-1]

    @property
    def delta_correlation(self) -> float:
        """Over test examples, Pearson's r of predicted and retrained change of the final loss."""
        return delta_correlation(self.forecast.change, self.actual_change)

    @property
    def final_mse(self) -> float:
        """Mean over test examples of (predicted − retrained)² of the final loss."""
        return float(np.mean((self.forecast.what_if[-1] - self.actual[-1]) ** 2))

    @cached_property
    def frame(self) -> pd.DataFrame:
        """The forecast's frame with the columns actual_base, actual and actual_delta."""
        base = self.forecast.run.losses.astype(np.float64)
        actual = {"actual_base": base, "actual": self.actual, "actual_delta": self.actual - base}
        return self.forecast.frame.assign(**{name: losses.ravel() for name, losses in actual.items()})


def what_if(simulator: Simulator, run: Run, edits: Edit | Sequence[Edit], *, task: Task | None = None) -> Forecast:
    """What would the losses of ``run`` be, had its curriculum been edited?

    Args:
        simulator: fitted on runs of the same task.
        run: the base: its curriculum is edited, its initial losses are where both simulations start.
        edits: one edit, or several to be applied one after the other.
        task: for filters over metadata when the run does not carry it, and for ``Forecast.verify``.

    Raises:
        InvalidInput: no edit, an edit that cannot be applied, or a run of other examples than the simulator's.

    >>> import simfluence as sf
    >>> runs = sf.Runs.from_arrays([[[0], [1], [0]]], [[[3.0], [2.0], [2.5], [1.5]]])
    >>> what_if(sf.AdditiveSimulator(l2=1e-6).fit(runs), runs[0], sf.Remove([1])).change.round(2)
    array([-0.5])
    """
    if not isinstance(run, Run):
        raise InvalidInput(f"the base must be one Run (runs[0], say), got {type(run).__name__}")
    edits = (edits,) if isinstance(edits, Edit) else tuple(edits)
    if not edits or not all(isinstance(edit, Edit) for edit in edits):
        raise InvalidInput("edits must be one or more of Remove, Repeat, Reorder, such as Remove('label == 3')")
    if task is not None and run.fingerprint not in (None, task.fingerprint):
        raise InvalidInput(f"base run {run.id} is of another task than {task.name!r}")
    edited = apply_all(edits, run.curriculum, task.train if task else run.train)
    base, changed = simulator.simulate([run.curriculum, edited], run.initial_losses)
    return Forecast(run, edits, edited, base, changed, task)


def leave_one_out(simulator: Simulator, run: Run) -> Float[np.ndarray, "test train"]:
    """The change of every test example's final loss had one training example never been shown, for each of them.

    Batches shrink, as with ``Remove``. Examples that the run never saw get 0. For the Markov family all are had at
    once; other simulators are asked one example at a time.

    Args:
        simulator: fitted on runs of the same task.
        run: the base: its curriculum, and the losses it starts from.

    Raises:
        NotFittedError: before ``fit``.
        InvalidInput: a run of other examples than the simulator's.

    >>> import simfluence as sf
    >>> runs = sf.Runs.from_arrays([[[0], [1], [0]]], [[[3.0], [2.0], [2.5], [1.5]]])
    >>> leave_one_out(sf.AdditiveSimulator(l2=1e-6).fit(runs), runs[0]).round(2)
    array([[ 2. , -0.5]])
    """
    return simulator.changes_without(run.curriculum, np.eye(run.curriculum.n_train, dtype=bool), run.initial_losses).T


def _tidy(columns: dict[str, RunLosses]) -> pd.DataFrame:
    times, tests = next(iter(columns.values())).shape
    index = {"step": np.repeat(np.arange(times), tests), "test": np.tile(np.arange(tests), times)}
    return pd.DataFrame(index | {name: losses.ravel() for name, losses in columns.items()})
