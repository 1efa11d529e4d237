"""Boosted trees on the losses of surrogate learners (a method of this library)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import lightgbm
import numpy as np
import optuna

from simfluence._internal.validation import number, whole
from simfluence.curriculum import Curriculum
from simfluence.errors import InvalidInput
from simfluence.runs import Runs
from simfluence.simulators.base import Simulator
from simfluence.simulators.learned import check_arrays
from simfluence.simulators.mean import mean_trajectory
from simfluence.simulators.surrogates import KERNELS, Batches, Kernel, Sides, best_speed, surrogate_losses
from simfluence.simulators.trees import Trees

__all__ = ["BoostedSimulator"]

#: Speeds of the surrogates of one kernel, relative to the kernel's best single speed.
_PACES = (0.5, 1.0, 2.0)
_RIDGE = 1e-3  # relative to each deviation's mean square
_FIT_ROWS = 200_000  # (run, step, test example) that trees are grown on
_MOST_LEAVES = 131_072  # LightGBM's limit
_CHUNK_ENTRIES = 1_000_000  # of [runs, steps, test] simulated at a time
_LARGEST = 1e6  # an overflowing surrogate is as informative as a very wrong one


class BoostedSimulator(Simulator):
    """The mean trajectory, plus deviations predicted from the losses of surrogate learners.

    Kernel machines on the examples' features are trained on each curriculum (see ``surrogates``): three kernels, each
    at its best speed on the fitting runs, half and twice that. With ``s_k`` the loss of surrogate k and ``s̄_k`` its
    mean over the fitting runs, all at time t,

        L_t(z) = m_t(z) + Σ_k w_k (s_k − s̄_k) + trees(s − s̄, s̄, m_t, t)

    where w is a ridge regression, which extrapolates beyond the fitting runs, and the trees (LightGBM) learn its
    residuals. A forecast at t depends on the curriculum up to t alone, never on a forecast at t − 1, so errors do not
    accumulate. For the same reason losses may have been recorded with gaps.

    Beyond the longest fitting run, m and s̄ keep their last values while the surrogates continue to learn at the last
    learning rate.
    Needs examples with features and targets, but no gradient and no model.

    Args:
        rounds: number of trees; 0 is the ridge regression alone.
        learning_rate: learning rate of the boosting.
        leaves: maximum number of leaves of a tree.
        min_rows: minimum number of rows of a leaf; a row is a (run, step, test example).
        seed: seed of the sampled rows and columns.

    Attributes:
        mean_: m, ``[steps + 1, test]``.
        speeds_: best single speed of each kernel, ``[kernels]``.
        surrogate_mean_: s̄, ``[steps + 1, test, surrogates]``.
        weights_: w, ``[surrogates]``.
        trees_leaves_, trees_features_, trees_thresholds_, trees_children_, trees_values_: the trees; see ``Trees``.

    >>> rng = np.random.default_rng(0)
    >>> from simfluence import Examples
    >>> train, test = (Examples.numbered(n, None, rng.normal(size=(n, 2)), rng.integers(2, size=n)) for n in (6, 3))
    >>> curricula = [rng.integers(6, size=(20, 2)) for _ in range(4)]
    >>> losses = rng.normal(size=(4, 21, 3))
    >>> boosted = BoostedSimulator(rounds=5).fit(Runs.from_arrays(curricula, losses, train=train, test=test))
    >>> boosted.simulate([Curriculum(curricula[0])], losses[0, 0]).shape
    (1, 21, 3)
    """

    name = "boosted"

    def __init__(
        self, rounds: int = 150, learning_rate: float = 0.08, leaves: int = 31, min_rows: int = 100, seed: int = 0
    ) -> None:
        self.rounds = rounds
        self.learning_rate = learning_rate
        self.leaves = leaves
        self.min_rows = min_rows
        self.seed = seed

    @classmethod
    def suggest(cls, trial: optuna.Trial) -> dict[str, Any]:
        return {
            "rounds": trial.suggest_int("rounds", 50, 400, log=True),
            "learning_rate": trial.suggest_float("learning_rate", 0.02, 0.2, log=True),
            "leaves": trial.suggest_int("leaves", 7, 63, log=True),
            "min_rows": trial.suggest_int("min_rows", 50, 1000, log=True),
        }

    def _check_parameters(self) -> None:
        for name, least in (("rounds", 0), ("leaves", 2), ("min_rows", 1), ("seed", 0)):
            whole(name, getattr(self, name), least)
        if self.leaves > _MOST_LEAVES:
            raise InvalidInput(f"leaves must be at most {_MOST_LEAVES}, got {self.leaves}")
        if number("learning_rate", self.learning_rate, above=0) > 1:
            raise InvalidInput(f"learning_rate must be above 0 and at most 1, got {self.learning_rate!r}")

    def _fit(self, runs: Runs) -> None:
        runs = Runs(sorted(runs, key=lambda run: run.id))  # so that their order makes no difference
        sides = Sides.of(runs.train, runs.test, "the boosted simulator")
        self._store(sides)
        self.schedule_ = _relative_rates(runs)
        kernels = [Kernel(kind, sides) for kind in KERNELS]
        self.speeds_ = np.array([best_speed(kernel, sides, runs, self.schedule_) for kernel in kernels])
        surrogates = self._surrogates(runs.curricula)
        lengths = np.array([run.steps for run in runs])
        within = np.arange(surrogates.shape[1]) <= lengths[:, None]  # [runs, times]
        self.mean_ = mean_trajectory(runs)
        self.surrogate_mean_ = (surrogates * within[:, :, None, None]).sum(0) / within.sum(0)[:, None, None]
        residuals = runs.losses.astype(np.float64) - self.mean_
        residuals[:, 0] = np.nan  # the losses at time 0 are given
        self.weights_ = _ridge(surrogates - self.surrogate_mean_, residuals)
        residuals -= (surrogates - self.surrogate_mean_) @ self.weights_
        trees = self._grow(surrogates, residuals)
        for field in dataclasses.fields(trees):
            setattr(self, f"trees_{field.name}_", getattr(trees, field.name))

    def _simulate(self, curricula: Sequence[Curriculum], initial: np.ndarray) -> np.ndarray:
        longest = max(len(curriculum) for curriculum in curricula)
        losses = np.full((len(curricula), longest + 1, self.n_test_), np.nan)
        chunk = max(1, _CHUNK_ENTRIES // ((longest + 1) * self.n_test_))
        trees = self._trees()
        for start in range(0, len(curricula), chunk):
            surrogates = self._surrogates(curricula[start : start + chunk])
            times = np.minimum(np.arange(surrogates.shape[1]), len(self.mean_) - 1)
            forecasts = self.mean_[times] + (surrogates - self.surrogate_mean_[times]) @ self.weights_
            if len(trees.leaves):
                rows = self._rows(surrogates.reshape(-1, *surrogates.shape[2:]), np.tile(times, len(surrogates)))
                forecasts += trees.predict(rows).reshape(forecasts.shape)
            losses[start : start + chunk, : forecasts.shape[1]] = forecasts
        return losses

    def _surrogates(self, curricula: Sequence[Curriculum]) -> np.ndarray:
        """Return the losses of every surrogate, ``[runs, steps + 1, test, surrogates]``."""
        sides, batches = self._sides(), Batches.of(curricula)
        steps = batches.indices.shape[1]
        rates = self.schedule_[np.minimum(np.arange(steps), len(self.schedule_) - 1)]
        surrogates = []
        with np.errstate(all="ignore"):
            for kind, speed in zip(KERNELS, self.speeds_, strict=True):
                kernel = Kernel(kind, sides)
                surrogates += [surrogate_losses(kernel, sides, batches, pace * speed * rates) for pace in _PACES]
        losses: np.ndarray = np.nan_to_num(np.stack(surrogates, axis=-1), nan=_LARGEST, posinf=_LARGEST)
        return losses.clip(-_LARGEST, _LARGEST)

    def _rows(self, surrogates: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Return the trees' input at times ``[k]``, rows ``[k · test, columns]``.

        Args:
            surrogates: losses of the surrogates at these times, ``[k, test, surrogates]``.
            times: times of these losses, of any runs.
        """
        surrogate_mean, mean = self.surrogate_mean_[times], self.mean_[times][:, :, None]
        step = np.broadcast_to(times[:, None, None], mean.shape)
        columns = np.concatenate([surrogates - surrogate_mean, surrogate_mean, mean, step], axis=2)
        return columns.reshape(-1, columns.shape[2])

    def _grow(self, surrogates: np.ndarray, residuals: np.ndarray) -> Trees:
        """Fit trees to the residuals that are not NaN, on a random sample if there are many rows."""
        if self.rounds == 0:
            return Trees.none()
        known = np.argwhere(~np.isnan(residuals).any(axis=2))  # [k, run and time]
        if not len(known):
            raise InvalidInput("none of these runs recorded a loss after time 0: record with Observe(every=…)")
        count = min(len(known), max(1, _FIT_ROWS // residuals.shape[2]))
        rng = np.random.default_rng(self.seed)
        run, time = known[np.sort(rng.choice(len(known), count, replace=False))].T
        parameters = {
            "objective": "l2", "learning_rate": self.learning_rate, "num_leaves": self.leaves,
            "min_data_in_leaf": self.min_rows, "feature_fraction": 0.7, "bagging_fraction": 0.5, "bagging_freq": 1,
            "seed": self.seed, "deterministic": True, "force_row_wise": True, "verbose": -1,
            "num_threads": 1,
        }  # fmt: skip
        rows = lightgbm.Dataset(self._rows(surrogates[run, time], time), residuals[run, time].ravel())
        return Trees.from_lightgbm(lightgbm.train(parameters, rows, self.rounds).model_to_string())

    def _check_learned(self) -> None:
        super()._check_learned()
        surrogates = len(KERNELS) * len(_PACES)
        check_arrays(
            self,
            {
                "mean_": "float times test", "surrogate_mean_": f"float times test {surrogates}",
                "weights_": f"float {surrogates}", "speeds_": f"float {len(KERNELS)}", "schedule_": "float steps",
                "train_features_": "float train features", "test_features_": "float test features",
                "train_targets_": "float train outputs", "test_targets_": "float test outputs",
            },
        )  # fmt: skip
        if not isinstance(getattr(self, "classes_", None), bool):
            raise InvalidInput("classes_ is not true or false")
        splits = {"trees_thresholds_": "float splits", "trees_values_": "float leaves"}
        check_arrays(self, splits, empty=("splits", "leaves"))
        if self._trees().features.max(initial=0) >= 2 * surrogates + 2:
            raise InvalidInput("a tree compares a feature that does not exist")

    def _trees(self) -> Trees:
        return Trees(**{field.name: getattr(self, f"trees_{field.name}_") for field in dataclasses.fields(Trees)})

    @classmethod
    def _from_format_1(
        cls, parameters: dict[str, Any], learned: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Turn LightGBM's text into arrays."""
        if "trees_" in learned:  # a file of unfitted parameters has none
            text = learned.pop("trees_")
            trees = Trees.from_lightgbm(text) if text else Trees.none()
            learned |= {f"trees_{field.name}_": getattr(trees, field.name) for field in dataclasses.fields(trees)}
        return parameters, learned

    def _store(self, sides: Sides) -> None:
        self.train_features_, self.test_features_ = sides.train, sides.test
        self.train_targets_, self.test_targets_ = sides.train_targets, sides.test_targets
        self.classes_ = sides.classes

    def _sides(self) -> Sides:
        return Sides(
            self.train_features_, self.test_features_, self.train_targets_, self.test_targets_, self.classes_
        )  # fmt: skip


def _relative_rates(runs: Runs) -> np.ndarray:
    """Return the longest run's learning rates relative to their peak, ``[steps]``; 1 if they are unknown."""
    longest = max(runs, key=lambda run: run.steps)
    rates = longest.learning_rates
    if rates is None or not np.isfinite(rates).all() or rates.max() <= 0:
        return np.ones(longest.steps)
    relative: np.ndarray = rates / rates.max()
    return relative


def _ridge(deviations: np.ndarray, residuals: np.ndarray) -> np.ndarray:
    """Return the weights ``[surrogates]`` of a ridge regression of the residuals, where known, on the deviations."""
    known = ~np.isnan(residuals)
    rows, targets = deviations[known], residuals[known]
    gram = rows.T @ rows
    penalty = _RIDGE * np.diag(gram)
    weights: np.ndarray = np.linalg.solve(gram + np.diag(np.where(penalty > 0, penalty, 1.0)), rows.T @ targets)
    return weights
