"""Recorded training runs: one ``Run``, and several ``Runs`` of one task."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from torch import Tensor

from simfluence import filters
from simfluence._internal.checked import checked, shown
from simfluence._internal.fields import check_fields
from simfluence._internal.html import card, picture
from simfluence._internal.types import Count, InitialLosses, Losses, RunLosses, Seed
from simfluence._internal.validation import whole
from simfluence.curriculum import Curriculum
from simfluence.errors import DivergedWarning, InvalidInput, did_you_mean
from simfluence.examples import Examples
from simfluence.recipe import Recipe
from simfluence.task import Task

__all__ = ["Run", "Runs", "combined"]


@dataclass(frozen=True, eq=False)
class Run:
    """The record of one training run.

    Args:
        id: content address, or any distinct string.
        curriculum: the batches that the run was trained on.
        losses: ``[steps + 1, test]``; ``losses[0]`` before any update. NaN where not recorded or diverged.
        learning_rates: learning rate of each step, ``[steps]``.
        recipe: settings that the run was trained with, if known.
        fingerprint: fingerprint of the task, if known.
        task_name: name of the task, if known.
        train, test: training and test examples of the task, if known.
        checkpoints: checkpoint file of each saved step.
        recorded: whether the test examples were evaluated at each time, ``[steps + 1]``; by default at all times.
        measures: other recorded measures by name, ``[steps + 1, test]`` like the losses.
        verification: whether the run was trained to verify a forecast, so that it is not used for fitting.
        engine: engine that trained the run, if known.

    Raises:
        InvalidInput: the losses do not have ``steps + 1`` rows, or another array does not have the shape given above.

    >>> run = Run("a", Curriculum([[0, 1], [2]]), np.ones((3, 5)))
    >>> run.steps, run.initial_losses.shape, run.diverged
    (2, (5,), False)
    """

    id: str
    curriculum: Curriculum
    losses: RunLosses
    learning_rates: Float[np.ndarray, " steps"] | None = None
    recipe: Recipe | None = None
    fingerprint: str | None = None
    train: Examples | None = None
    test: Examples | None = None
    checkpoints: Mapping[int, Path] = field(default_factory=dict)
    recorded: Bool[np.ndarray, " times"] | None = None
    measures: Mapping[str, RunLosses] = field(default_factory=dict)
    verification: bool = False
    engine: str | None = None
    task_name: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.losses.shape[0] != len(self.curriculum) + 1:
            raise InvalidInput(
                f"run {self.id}: {len(self.curriculum)} steps need {len(self.curriculum) + 1} rows of losses "
                f"(the first before any update), got {self.losses.shape[0]}"
            )
        shapes = {"learning_rates": (self.learning_rates, (self.steps,))}
        shapes |= {"recorded": (self.recorded, self.losses.shape[:1])}
        shapes |= {f"measure {name!r}": (values, self.losses.shape) for name, values in self.measures.items()}
        for name, (values, shape) in shapes.items():
            if values is not None and values.shape != shape:
                raise InvalidInput(
                    f"run {self.id}: {name} must have the shape {list(shape)}, as its losses are "
                    f"{list(self.losses.shape)}; got {list(values.shape)}"
                )

    @property
    def initial_losses(self) -> Float[np.ndarray, " test"]:
        values: np.ndarray = self.losses[0]
        return values

    @property
    def diverged(self) -> bool:
        """Whether a loss became NaN or infinite, including a loss that ``select`` made a measure."""
        losses = [self.losses, *(self.measures[name] for name in ("loss",) if name in self.measures)]
        return not all(np.isfinite(readings[self.times]).all() for readings in losses)

    @property
    def times(self) -> Int[np.ndarray, " k"]:
        """The times 0…T at which the test examples were evaluated."""
        return np.arange(len(self.losses)) if self.recorded is None else np.flatnonzero(self.recorded)

    @checked
    def check_task(self, task: Task) -> None:
        """Check that the run is of this task, as far as the run knows its task.

        Raises:
            InvalidInput: the run is of another task.
        """
        if self.fingerprint not in (None, task.fingerprint):
            raise InvalidInput(
                f"run {self.id} is of another task than {task.name!r}: the model, the data or their order differ "
                "from those that it was recorded with"
            )

    @checked
    def times_of(self, name: str) -> Int[np.ndarray, " k"]:
        """Return the times at which the loss or a measure was recorded.

        A run that combines recordings of different measures can lack a measure where it has the loss: such rows of the
        measure are all NaN.
        """
        if name == "loss":
            return self.times
        if name not in self.measures:
            return self.times[:0]
        unread = np.isnan(self.measures[name]).all(axis=1) & np.isfinite(self.losses).all(axis=1)
        values: np.ndarray = self.times[~unread[self.times]]
        return values

    @checked
    def select(self, name: str) -> Run:
        """Return the run with the measure ``name`` as its losses; the losses become the measure "loss"."""
        readings = dict(self.measures)
        if name not in {"loss", *readings}:
            raise InvalidInput(f"run {self.id} recorded no measure {name!r}, {did_you_mean(name, ['loss', *readings])}")
        if name not in readings:  # "loss" is already in place
            return self
        recorded = np.isin(np.arange(len(self.losses)), self.times_of(name))
        chosen = readings.pop(name)
        loss = {"loss": self.losses} if "loss" not in readings else {}
        recorded_or_none = None if recorded.all() else recorded
        return dataclasses.replace(self, losses=chosen, measures=readings | loss, recorded=recorded_or_none)

    @property
    def steps(self) -> int:
        return len(self.curriculum)

    def __repr__(self) -> str:
        note = ", diverged" if self.diverged else ""
        return f"Run({self.id}, steps={self.steps}, test={self.losses.shape[1]}{note})"


class Runs(Sequence[Run]):
    """Several runs of one task: a sequence of ``Run`` whose slices are ``Runs`` too.

    Raises:
        InvalidInput: the runs are of different tasks or have different numbers of examples.

    >>> runs = Runs.from_arrays([[[0], [1]], [[1], [1]]], np.zeros((2, 3, 5)))
    >>> runs[:1], runs.losses.shape, runs[0].curriculum.tolist()
    (Runs(1: train=2, test=5), (2, 3, 5), [[0], [1]])
    """

    @checked
    def __init__(self, runs: Iterable[Run]) -> None:
        self._runs = tuple(runs)
        for position, run in enumerate(self._runs):
            if not isinstance(run, Run):
                raise InvalidInput(f"Runs: runs[{position}] must be a Run, got {shown(run)}")
        sizes = {(run.curriculum.n_train, run.losses.shape[1]) for run in self._runs}
        if len(sizes) > 1:
            counts = "; ".join(f"{train} training and {test} test examples" for train, test in sorted(sizes))
            raise InvalidInput(f"runs must have the same numbers of examples, got {counts}")
        if len({run.fingerprint for run in self._runs if run.fingerprint}) > 1:
            raise InvalidInput("runs must be of one task, but their task fingerprints differ")

    @classmethod
    @checked
    def from_arrays(
        cls,
        curricula: Iterable[Any],
        losses: np.ndarray | Sequence[Any],
        n_train: Count | None = None,
        *,
        train: Examples | None = None,
        test: Examples | None = None,
    ) -> Runs:
        """Build runs without a task or a store.

        Args:
            curricula: ``Curriculum`` objects, or for each run a sequence of batches of training indices.
            losses: ``[runs, steps + 1, test]``.
            n_train: number of training examples; by default one more than the largest index.
            train, test: training and test examples with their metadata and features, if any.

        Raises:
            InvalidInput: the numbers of curricula, losses or examples differ.

        >>> Runs.from_arrays([[[0], [1]], [[1], [1]]], np.zeros((2, 3, 5)))
        Runs(2: train=2, test=5)
        """
        curricula, n_train = list(curricula), n_train or (None if train is None else len(train))
        if not all(isinstance(curriculum, Curriculum) for curriculum in curricula):
            plain = [Curriculum(batches, n_train) for batches in curricula]
            width = n_train or max(curriculum.n_train for curriculum in plain)
            curricula = [Curriculum.from_flat(c.indices, c.sizes, width) for c in plain]
        if len(curricula) != len(losses):
            raise InvalidInput(f"{len(curricula)} curricula, but losses of {len(losses)} runs")
        pairs = zip(curricula, losses, strict=True)
        return cls(_from_arrays(curriculum, _as_array(run)) for curriculum, run in pairs).with_examples(train, test)

    @checked
    def with_examples(self, train: Examples | None = None, test: Examples | None = None) -> Runs:
        """Return the same runs with other training or test examples, such as ones with features.

        Raises:
            InvalidInput: the number of examples differs from the runs'.
        """
        parts = {"train": (train, self.n_train), "test": (test, self.n_test)}
        changes: dict[str, Any] = {}
        for name, (examples, count) in parts.items():
            if examples is None:
                continue
            if len(examples) != count:
                raise InvalidInput(f"{len(examples)} {name} examples for runs of {count}")
            changes[name] = examples
        return Runs(dataclasses.replace(run, **changes) for run in self)

    @property
    def curricula(self) -> list[Curriculum]:
        return [run.curriculum for run in self]

    @property
    def losses(self) -> Losses:
        """All losses ``[runs, steps + 1, test]``; rows after the end of a shorter run are NaN."""
        times = max((len(run.losses) for run in self), default=0)
        dtype = np.result_type(*(run.losses for run in self)) if len(self) else np.float32
        losses = np.full((len(self), times, self.n_test), np.nan, dtype)
        for index, run in enumerate(self):
            losses[index, : len(run.losses)] = run.losses
        return losses

    @property
    def initial_losses(self) -> InitialLosses:
        return np.stack([run.initial_losses for run in self])

    @property
    def ids(self) -> list[str]:
        return [run.id for run in self]

    @property
    def n_train(self) -> int:
        return self[0].curriculum.n_train if len(self) else 0

    @property
    def n_test(self) -> int:
        return self[0].losses.shape[1] if len(self) else 0

    @property
    def train(self) -> Examples | None:
        return self[0].train if len(self) else None

    @property
    def test(self) -> Examples | None:
        return self[0].test if len(self) else None

    @property
    def task_name(self) -> str | None:
        return self[0].task_name if len(self) else None

    @checked
    def plot(self, ax: Any = None, title: str = "") -> Any:
        """Plot the mean test loss along training, a thin line per run, and the mean over runs.

        Args:
            ax: matplotlib axes to draw on, which are returned; by default those of a new figure.
            title: by default the task and the numbers of runs and test examples.

        >>> from matplotlib.figure import Figure
        >>> Runs.from_arrays([[[0], [1]]], np.ones((1, 3, 5))).plot(Figure().subplots()).get_title()
        '1 runs, mean of 5 test examples'
        """
        from simfluence import plots

        means = self.losses.astype(np.float64).mean(axis=2) if len(self) else np.empty((0, 0))
        middle = np.ma.masked_invalid(means).mean(axis=0).filled(np.nan) if len(self) else None
        name = f"{self.task_name}: " if self.task_name else ""
        title = title or f"{name}{len(self)} runs, mean of {self.n_test} test examples"
        return plots.recorded(means, ax, title, mean=middle, unit="mean test loss")

    @checked
    def select(self, name: str) -> Runs:
        """Return the runs with the measure ``name`` as their losses, for simulators and ``evaluate``.

        Raises:
            InvalidInput: a run did not record the measure.
        """
        return Runs(run.select(name) for run in self)

    @property
    def table(self) -> pd.DataFrame:
        """The description of each run, one row per run; ``where`` filters by these columns."""
        return pd.DataFrame([_described(run) for run in self])

    @checked
    def where(self, text: str) -> Runs:
        """Return the runs that a filter over ``table`` matches, such as ``optimizer == "adamw" and steps > 100``."""
        chosen = np.flatnonzero(filters.parse(text).mask(self.table)) if len(self) else ()
        return Runs(self[int(index)] for index in chosen)

    def to_frame(self) -> pd.DataFrame:
        """Return a table with columns run, step, test, loss and all measures, a row per run, recorded time and test."""
        return pd.concat([_tidy(run) for run in self], ignore_index=True)

    def to_arrays(self) -> tuple[list[Curriculum], Losses]:
        """Return curricula and losses ``[runs, steps + 1, test]``, the arguments of ``from_arrays``."""
        return self.curricula, self.losses

    @checked
    def take(self, indices: Iterable[Any]) -> Runs:
        """Return the runs at these positions, in this order; a position may occur several times.

        Raises:
            InvalidInput: a position is no whole number, or there is no run at it.
        """
        if getattr(indices, "ndim", 1) == 0:  # an array of NumPy or torch
            raise InvalidInput("take: indices must be a list of positions, got a single number")
        positions = [
            whole("a position", index.item() if isinstance(index, Tensor) and not index.ndim else index)
            for index in indices
        ]
        for position in positions:
            if not -len(self) <= position < len(self):
                raise InvalidInput(f"take: there is no run at position {position} of {len(self)} runs")
        return Runs(self._runs[position] for position in positions)

    @checked
    def usable(self, purpose: str) -> Runs:
        """Return the runs that did not diverge, checked to share one recipe; warn about the others.

        Args:
            purpose: verb for messages, such as "fit".

        Raises:
            InvalidInput: no run is left, or the runs have several recipes.
        """
        if len(self) == 0:
            raise InvalidInput(f"no run to {purpose}: record some first")
        finite = Runs(run for run in self if not run.diverged)
        if len(finite) < len(self):
            lost = [run.id for run in self if run.diverged]
            count = "1 diverged run" if len(lost) == 1 else f"{len(lost)} diverged runs"
            warnings.warn(f"left out {count}: {', '.join(lost)}", DivergedWarning, stacklevel=3)
        if len(finite) == 0:
            raise InvalidInput(f"no run to {purpose}: all {len(self)} diverged (a loss became NaN or infinite)")
        if len({run.recipe for run in finite}) > 1:
            raise InvalidInput(f"cannot {purpose} runs of several recipes together: load(recipe=…) chooses one")
        return finite

    @checked
    def split(self, held_out: int | float, seed: Seed = 0) -> tuple[Runs, Runs]:
        """Split into disjoint ``(fit, held)``, each sorted by run id, so that the order of the runs does not matter.

        Args:
            held_out: number (int) or fraction (float) of the runs that go into ``held``.

        Raises:
            InvalidInput: a part would be empty.
        """
        ids = sorted(set(self.ids))
        count = round(held_out * len(ids)) if isinstance(held_out, float) else held_out
        if not 1 <= count < len(ids):
            raise InvalidInput(f"held_out={held_out!r} of {len(ids)} runs: leave at least one for each part")
        held = {ids[index] for index in np.random.default_rng(seed).permutation(len(ids))[:count]}
        ordered = sorted(self, key=lambda run: run.id)
        return Runs(run for run in ordered if run.id not in held), Runs(run for run in ordered if run.id in held)

    def __len__(self) -> int:
        return len(self._runs)

    @overload
    def __getitem__(self, index: int) -> Run: ...
    @overload
    def __getitem__(self, index: slice) -> Runs: ...
    def __getitem__(self, index: int | slice) -> Run | Runs:
        return Runs(self._runs[index]) if isinstance(index, slice) else self._runs[index]

    def __iter__(self) -> Iterator[Run]:
        return iter(self._runs)

    def __repr__(self) -> str:
        return f"Runs({len(self)}: train={self.n_train}, test={self.n_test})"

    def _repr_html_(self) -> str:
        facts: dict[str, object] = {"task": self.task_name or "not known", "runs": len(self)}
        if len(self):
            facts |= {"steps": _range(run.steps for run in self), "training examples": self.n_train}
            recipes = {str(run.recipe or "not known") for run in self}
            facts |= {"test examples": self.n_test, "recipe": " and ".join(sorted(recipes))}
        if lost := sum(run.diverged for run in self):
            facts["diverged"] = lost
        return card("Runs", facts, picture(self.plot))


def combined(before: Run, again: Run) -> Run:
    """Combine two recordings of the same training: ``again`` fills what ``before`` lacks.

    Raises:
        InvalidInput: where both have values, they differ by more than another engine's rounding.
    """
    loose = before.losses.dtype == np.float32
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if loose else {"rtol": 1e-9, "atol": 1e-9}
    readings = {"loss": before.losses} | dict(before.measures)
    merged = {"loss": again.losses} | dict(again.measures)
    for name, values in readings.items():
        times = before.times_of(name)
        both = np.intersect1d(times, again.times_of(name))
        merged[name] = merged[name].copy() if name in merged else np.full_like(values, np.nan)
        if not np.allclose(values[both], merged[name][both], equal_nan=True, **tolerance):
            raise InvalidInput(f"{name} of run {before.id} differs from the recorded values")
        merged[name][times] = values[times]
    recorded = np.isin(np.arange(len(before.losses)), np.union1d(before.times, again.times))
    return dataclasses.replace(
        before,
        losses=merged.pop("loss"),
        measures=merged,
        recorded=None if recorded.all() else recorded,
        checkpoints=dict(again.checkpoints) | dict(before.checkpoints),
        verification=before.verification and again.verification,
    )


def _range(numbers: Iterable[int]) -> str:
    ordered = sorted(numbers)
    return str(ordered[0]) if ordered[0] == ordered[-1] else f"{ordered[0]} to {ordered[-1]}"


def _described(run: Run) -> dict[str, Any]:
    facts = {"id": run.id, "steps": run.steps, "examples": len(np.unique(run.curriculum.indices))}
    facts |= {"diverged": run.diverged, "verification": run.verification, "engine": run.engine or ""}
    recipe = run.recipe.model_dump(exclude={"optimizer_args"}) if run.recipe else {}
    return facts | recipe


def _tidy(run: Run) -> pd.DataFrame:
    times, tests = run.times, run.losses.shape[1]
    index = {"run": run.id, "step": np.repeat(times, tests), "test": np.tile(np.arange(tests), len(times))}
    readings = {"loss": run.losses} | dict(run.measures)
    return pd.DataFrame(index | {name: values[times].ravel() for name, values in readings.items()})


def _as_array(losses: Any) -> np.ndarray:
    try:
        return np.asarray(losses)
    except (TypeError, ValueError, RuntimeError):
        raise InvalidInput(
            f"losses must be numbers of shape [runs, steps + 1, test]; a run has {shown(losses)}"
        ) from None


def _from_arrays(curriculum: Curriculum, losses: np.ndarray) -> Run:
    if losses.ndim != 2 or losses.dtype.kind not in "fiu":
        raise InvalidInput(f"losses must be numbers of shape [runs, steps + 1, test]; a run has {losses.shape}")
    losses = losses if losses.dtype.kind == "f" else losses.astype(np.float64)
    digest = hashlib.sha256(curriculum.digest.encode() + np.ascontiguousarray(losses).tobytes())
    return Run(digest.hexdigest()[:16], curriculum, losses)
