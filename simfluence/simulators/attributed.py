"""Attribution scores played forward through a curriculum, as an additive simulator.

    L_{t+1}(z) = L_t(z) + s · Σ_i count_i/|c_t| · E_{t,i}(z)

    TracIn, gradient dot    E_{t,i} = −η_t ⟨∇ℓ_z, P ∇ℓ_i⟩ at the checkpoint nearest to step t (Pruthi et al. 2020)
    scores in losses        E_{t,i} = −B · score(z, i) / n_i, shared out over the n_i times that i is usually shown

Around the mean trajectory m of the fitting runs (ours), with c̄ their mean weights, it is what differs from the usual
batch that counts: ``L_t = m_t + s · Σ_{τ<t} Σ_i (count_i/|c_τ| − c̄_i) · E_{τ,i}``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from simfluence._internal.deprecation import renamed_arguments
from simfluence._internal.validation import one_of
from simfluence.attribution import TracInCP
from simfluence.curriculum import Curriculum
from simfluence.errors import InvalidInput
from simfluence.runs import Run, Runs
from simfluence.simulators.base import Simulator
from simfluence.simulators.batches import batch_weights, usual_batch_size
from simfluence.simulators.mean import mean_trajectory

AROUND = (None, "mean")


class AttributedSimulator(Simulator):
    """Plays an attributor's scores forward; learns nothing of the runs but, if asked to, one number.

    Args:
        attributor: fitted on the task, with its test side as the test examples of the runs; or scores ``[test, train]``
            in losses: the predicted rise if every occurrence of an example were taken out.
        fit_scale: whether s is the one with the smallest squared error on the fitting runs, for scores without a unit
            or of the wrong size; otherwise scores are taken as they are (s = 1).
        around: "mean" for effects around the mean trajectory of the fitting runs.

    Attributes:
        effects_: E without its rate, one set per checkpoint, ``[states, train, test]``.
        times_: steps of the checkpoints, ``[states]``.
        rates_: what E is multiplied by at each step; the last holds beyond.
        scale_: s.
        mean_, centre_: around the mean only: m ``[steps + 1, test]``, c̄ ``[train]``.

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
        """A clone keeps the attributor fitted: it is what this one plays."""
        return type(self)(self.attributor, self.fit_scale, self.around)

    def _check_parameters(self) -> None:
        one_of("fit_scale", self.fit_scale, (False, True))
        one_of("around", self.around, AROUND)

    def _fit(self, runs: Runs) -> None:
        if self.attributor is None:
            raise InvalidInput("attributor is required: a fitted attributor or scores [test, train]")
        if isinstance(self.attributor, TracInCP):
            self._take_products(self.attributor, runs)
        else:
            self._take_scores(self.attributor, runs)
        if self.around == "mean":
            self.mean_ = mean_trajectory(runs)
            weights, updates = batch_weights(runs.curricula, max(run.steps for run in runs), 1)
            self.centre_ = np.asarray(weights.sum(axis=0)).ravel() / updates.sum()
        self.scale_ = 1.0
        if self.fit_scale:
            self.scale_ = self._best_scale(runs)

    def _take_products(self, attributor: TracInCP, runs: Runs) -> None:
        steps, products = attributor.by_checkpoint()
        self._check_shape(products.shape[1:], runs)
        self.times_ = steps
        self.effects_ = -np.ascontiguousarray(products.swapaxes(1, 2), np.float64)
        self.rates_ = _rates(max(runs, key=lambda run: run.steps))

    def _take_scores(self, attributor: Any, runs: Runs) -> None:
        scores = attributor.scores() if hasattr(attributor, "scores") else attributor
        if getattr(scores, "unit", "loss") != "loss" and not self.fit_scale:
            raise InvalidInput(f"scores in the unit {scores.unit!r} have no size in losses: take fit_scale=True")
        values = np.asarray(scores, np.float64)
        if values.ndim != 2 or not np.isfinite(values).all():
            raise InvalidInput(f"scores must be finite numbers [test, train], got {list(values.shape)}")
        counts = np.array([run.curriculum.counts.sum(axis=0) for run in runs])  # [runs, train]
        seen = (counts > 0).sum(axis=0)
        usual = counts.sum() / (counts > 0).sum()
        times = np.divide(counts.sum(axis=0), seen, out=np.full(len(seen), usual), where=seen > 0)
        self.times_, self.rates_ = np.zeros(1, np.int64), np.full(1, float(usual_batch_size(runs.curricula)))
        self._check_shape(values.shape, runs)
        self.effects_ = -np.ascontiguousarray((values / times).T[None])

    @staticmethod
    def _check_shape(found: tuple[int, ...], runs: Runs) -> None:
        if found != (runs.n_test, runs.n_train):
            raise InvalidInput(
                f"scores of {found[0]} test and {found[1]} training examples, but the runs are of {runs.n_test} and "
                f"{runs.n_train}: fit the attributor on the runs' task"
            )

    def _best_scale(self, runs: Runs) -> float:
        """The s with the smallest squared error of rollouts, in closed form: they are linear in it."""
        initial = runs.initial_losses.astype(np.float64)
        start = self._start(runs.curricula, initial)
        moved = self._moved(runs.curricula)
        wanted = runs.losses[:, : moved.shape[1]] - start
        known = np.isfinite(wanted)
        size = float((moved[known] ** 2).sum())
        if size == 0:
            raise InvalidInput("the scores say that nothing changes any loss: there is no scale to fit")
        return float((moved[known] * wanted[known]).sum()) / size

    def _start(self, curricula: Sequence[Curriculum], initial: np.ndarray) -> np.ndarray:
        """Losses without any effects, ``[runs, 1 or steps + 1, test]``."""
        if self.around is None:
            return initial[:, None]
        longest = max(len(curriculum) for curriculum in curricula)
        return self.mean_[np.minimum(np.arange(longest + 1), len(self.mean_) - 1)][None]

    def _moved(self, curricula: Sequence[Curriculum]) -> np.ndarray:
        """What the effects have added up to at each time, with s = 1, ``[runs, steps + 1, test]``."""
        longest = max(len(curriculum) for curriculum in curricula)
        weights, updates = batch_weights(curricula, longest, 1)  # [runs · steps, train]
        steps = np.tile(np.arange(longest), len(curricula))
        nearest = np.abs(steps[:, None] - self.times_).argmin(axis=1)
        changes = np.zeros((len(steps), self.effects_.shape[2]))
        for state, effects in enumerate(self.effects_):
            rows = np.flatnonzero(nearest == state)
            usual = self.centre_ @ effects if self.around == "mean" else 0.0
            changes[rows] = weights[rows] @ effects - usual
        changes *= (updates * self.rates_[np.minimum(steps, len(self.rates_) - 1)])[:, None]
        moved = np.zeros((len(curricula), longest + 1, changes.shape[1]))
        np.cumsum(changes.reshape(len(curricula), longest, -1), axis=1, out=moved[:, 1:])
        return moved

    def _simulate(self, curricula: Sequence[Curriculum], initial: np.ndarray) -> np.ndarray:
        return self._start(curricula, initial) + self.scale_ * self._moved(curricula)

    @classmethod
    def _from_format_0(
        cls, parameters: dict[str, Any], learned: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Rename scale="fitted" to fit_scale=True."""
        parameters["fit_scale"] = parameters.pop("scale") == "fitted"
        return parameters, learned

    def _state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The attributor, which holds a model, is not kept: what was learned of it is."""
        about, arrays = super()._state()
        about["parameters"]["attributor"] = None
        return about, arrays


def _rates(run: Run) -> np.ndarray:
    if run.learning_rates is not None:
        return np.asarray(run.learning_rates, np.float64)
    if run.recipe is None:
        raise InvalidInput(f"run {run.id} does not know its learning rates: gradients say how far only times those")
    return run.recipe.learning_rates(run.steps)
