"""Attribution scores played forward through a curriculum, as an additive simulator.

    L_{t+1}(z) = L_t(z) + s · Σ_i count_i/|c_t| · E_{t,i}(z)

    TracIn, gradient dot    E_{t,i} = −η_t ⟨∇ℓ_z, P ∇ℓ_i⟩ at the checkpoint nearest to step t (Pruthi et al. 2020)
    scores in losses        E_{t,i} = −B · score(z, i) / n_i, divided among the n_i times that i is usually shown

Around the mean trajectory m of the fitting runs (this library's variant), only differences from the usual batch count,
with c̄ the mean weights: ``L_t = m_t + s · Σ_{τ<t} Σ_i (count_i/|c_τ| − c̄_i) · E_{τ,i}``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from simfluence._internal.deprecation import renamed_arguments
from simfluence._internal.validation import number, one_of
from simfluence.attribution import TracInCP
from simfluence.curriculum import Curriculum
from simfluence.errors import InvalidInput
from simfluence.runs import Run, Runs
from simfluence.simulators.base import Simulator
from simfluence.simulators.batches import batch_weights, usual_batch_size
from simfluence.simulators.learned import check_arrays
from simfluence.simulators.mean import mean_trajectory

__all__ = ["AROUND", "AttributedSimulator"]

#: Values of ``around``.
AROUND = (None, "mean")


class AttributedSimulator(Simulator):
    """Play an attributor's scores forward; the runs give at most a scale and a mean.

    Args:
        attributor: an attributor fitted on the runs' task and test examples; or scores in losses, ``[test, train]``:
            the predicted rise of a test loss if every occurrence of a training example were removed.
        fit_scale: whether s minimizes the squared error on the fitting runs, for scores without a unit or of the wrong
            size; otherwise s = 1.
        around: "mean" for effects around the mean trajectory of the fitting runs.

    Attributes:
        effects_: E without its rate at each checkpoint, ``[checkpoints, train, test]``.
        times_: steps of the checkpoints, ``[checkpoints]``.
        rates_: factors of E at each step, ``[steps]``; later steps use the last.
        scale_: s.
        mean_, centre_: for around="mean" only: m ``[steps + 1, test]`` and c̄ ``[train]``.

    >>> runs = Runs.from_arrays([[[0], [1], [0]]], [[[3.0], [2.0], [2.5], [1.5]]])
    >>> simulator = AttributedSimulator(np.array([[2.0, -0.5]])).fit(runs)
    >>> simulator.simulate(runs.curricula, runs.initial_losses)[0, :, 0].tolist()
    [3.0, 2.0, 2.5, 1.5]
    """

    name = "attributed"
    is_wrapper = True

    @renamed_arguments(scale="fit_scale")
    def __init__(self, attributor: Any = None, fit_scale: bool | str = False, around: str | None = None) -> None:
        self.attributor = attributor
        self.fit_scale = {"given": False, "fitted": True}.get(str(fit_scale), fit_scale)  # the values of scale=
        self.around = around

    def __sklearn_clone__(self) -> AttributedSimulator:
        """Clone the parameters, but share the fitted attributor."""
        return type(self)(self.attributor, self.fit_scale, self.around)

    def _check_parameters(self) -> None:
        one_of("fit_scale", self.fit_scale, (False, True))
        one_of("around", self.around, AROUND)

    def _fit(self, runs: Runs) -> None:
        if self.attributor is None:
            raise InvalidInput("attributor is required: a fitted attributor or scores [test, train]")
        if isinstance(self.attributor, TracInCP):
            self._use_tracin(self.attributor, runs)
        else:
            self._use_scores(self.attributor, runs)
        if self.around == "mean":
            self.mean_ = mean_trajectory(runs)
            weights, updates = batch_weights(runs.curricula, max(run.steps for run in runs), 1)
            self.centre_ = np.asarray(weights.sum(axis=0)).ravel() / updates.sum()
        self.scale_ = 1.0
        if self.fit_scale:
            self.scale_ = self._best_scale(runs)

    def _use_tracin(self, attributor: TracInCP, runs: Runs) -> None:
        steps, products = attributor.by_checkpoint()
        self._check_shape(products.shape[1:], runs)
        self.times_ = steps
        self.effects_ = -np.ascontiguousarray(products.swapaxes(1, 2), np.float64)
        self.rates_ = _rates(max(runs, key=lambda run: run.steps))

    def _use_scores(self, attributor: Any, runs: Runs) -> None:
        scores = attributor.scores() if hasattr(attributor, "scores") else attributor
        if getattr(scores, "unit", "loss") != "loss" and not self.fit_scale:
            raise InvalidInput(f"scores in the unit {scores.unit!r} have no size in losses: pass fit_scale=True")
        values = np.asarray(scores, np.float64)
        if values.ndim != 2 or not np.isfinite(values).all():
            raise InvalidInput(f"scores must be finite numbers [test, train], got {list(values.shape)}")
        counts = np.array([run.curriculum.counts.sum(axis=0) for run in runs])  # [runs, train]
        n_runs = (counts > 0).sum(axis=0)  # that show each example, [train]
        usual = counts.sum() / (counts > 0).sum()
        occurrences = np.divide(counts.sum(axis=0), n_runs, out=np.full(len(n_runs), usual), where=n_runs > 0)
        self.times_, self.rates_ = np.zeros(1, np.int64), np.full(1, float(usual_batch_size(runs.curricula)))
        self._check_shape(values.shape, runs)
        self.effects_ = -np.ascontiguousarray((values / occurrences).T[None])

    @staticmethod
    def _check_shape(shape: tuple[int, ...], runs: Runs) -> None:
        if shape != (runs.n_test, runs.n_train):
            raise InvalidInput(
                f"the scores are of {shape[0]} test and {shape[1]} training examples, but the runs have {runs.n_test} "
                f"and {runs.n_train}: fit the attributor on the runs' task"
            )

    def _best_scale(self, runs: Runs) -> float:
        """Return the s with the smallest squared error of rollouts, in closed form: they are linear in s."""
        initial = runs.initial_losses.astype(np.float64)
        start = self._start(runs.curricula, initial)
        changes = self._cumulative_effects(runs.curricula)
        true = runs.losses[:, : changes.shape[1]] - start
        observed = np.isfinite(true)
        size = float((changes[observed] ** 2).sum())
        if size == 0:
            raise InvalidInput("these scores change no loss, so there is no scale to fit: pass fit_scale=False")
        return float((changes[observed] * true[observed]).sum()) / size

    def _start(self, curricula: Sequence[Curriculum], initial: np.ndarray) -> np.ndarray:
        """Return losses without any effects, ``[runs or 1, 1 or steps + 1, test]``."""
        if self.around is None:
            return initial[:, None]
        longest = max(len(curriculum) for curriculum in curricula)
        return self.mean_[np.minimum(np.arange(longest + 1), len(self.mean_) - 1)][None]

    def _cumulative_effects(self, curricula: Sequence[Curriculum]) -> np.ndarray:
        """Sum the effects up to each time, with s = 1, ``[runs, steps + 1, test]``."""
        longest = max(len(curriculum) for curriculum in curricula)
        weights, updates = batch_weights(curricula, longest, 1)  # [runs · steps, train]
        steps = np.tile(np.arange(longest), len(curricula))
        nearest = np.abs(steps[:, None] - self.times_).argmin(axis=1)
        changes = np.zeros((len(steps), self.effects_.shape[2]))
        for checkpoint, effects in enumerate(self.effects_):
            rows = np.flatnonzero(nearest == checkpoint)
            usual = self.centre_ @ effects if self.around == "mean" else 0.0
            changes[rows] = weights[rows] @ effects - usual
        changes *= (updates * self.rates_[np.minimum(steps, len(self.rates_) - 1)])[:, None]
        sums = np.zeros((len(curricula), longest + 1, changes.shape[1]))
        np.cumsum(changes.reshape(len(curricula), longest, -1), axis=1, out=sums[:, 1:])
        return sums

    def _simulate(self, curricula: Sequence[Curriculum], initial: np.ndarray) -> np.ndarray:
        return self._start(curricula, initial) + self.scale_ * self._cumulative_effects(curricula)

    def _check_learned(self) -> None:
        super()._check_learned()
        check_arrays(self, {"effects_": "float checkpoints train test", "times_": "int checkpoints"})
        check_arrays(self, {"rates_": "float steps"})
        number("scale_", getattr(self, "scale_", None))
        if self.around == "mean":
            check_arrays(self, {"mean_": "float times test", "centre_": "float train"})

    @classmethod
    def _from_format_0(
        cls, parameters: dict[str, Any], learned: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Rename scale="fitted" to fit_scale=True."""
        parameters["fit_scale"] = parameters.pop("scale") == "fitted"
        return parameters, learned

    def _state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Leave out the attributor, which holds a model: ``effects_`` has all that is needed."""
        about, arrays = super()._state()
        about["parameters"]["attributor"] = None
        return about, arrays


def _rates(run: Run) -> np.ndarray:
    if run.learning_rates is not None:
        rates = np.asarray(run.learning_rates, np.float64)
        if not np.isfinite(rates).all():
            raise InvalidInput(
                f"run {run.id} has no learning rate at some steps, which TracIn's effects need: record one at each step"
            )
        return rates
    if run.recipe is None:
        raise InvalidInput(
            f"run {run.id} has no learning rates, which TracIn's effects need: record runs with a recipe"
        )
    return run.recipe.learning_rates(run.steps)
