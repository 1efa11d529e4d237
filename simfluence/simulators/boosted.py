"""Boosted trees on what surrogate learners say of a curriculum (ours)."""

from __future__ import annotations

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
from simfluence.simulators.mean import mean_trajectory
from simfluence.simulators.surrogates import KERNELS, Batches, Kernel, Sides, best_speed, surrogate_losses

#: Speeds of the surrogates of one kernel, relative to the best alone.
_PACES = (0.5, 1.0, 2.0)
_RIDGE = 1e-3  # relative to each deviation's own mean square
_FIT_ROWS = 200_000  # of (run, step, test example) that trees are grown on
_MOST_LEAVES = 131_072  # LightGBM's own limit
_CHUNK_ENTRIES = 1_000_000  # of [runs, steps, test] that are simulated at a time
_LARGEST = 1e6  # a surrogate that overflows says as much as one that is very wrong


class BoostedSimulator(Simulator):
    """The mean trajectory, plus what the curriculum changes, read off surrogate learners.

    Kernel machines on the examples' features go through each curriculum (see ``surrogates``): three kernels, each at
    its best speed on the fitting runs, half and twice that. With ``s_k`` the loss of surrogate k and ``s̄_k`` its mean
    over the fitting runs, all at time t,

        L_t(z) = m_t(z) + Σ_k w_k (s_k − s̄_k) + trees(s − s̄, s̄, m_t, t)

    where w is a ridge regression, which carries on beyond what the fitting runs show, and the trees (LightGBM) learn
    what it leaves. A forecast at t is made from the curriculum up to t alone, never from a forecast at t − 1, so that
    errors cannot feed on themselves. For the same reason losses may have been recorded with gaps.

    Beyond the longest fitting run, m and s̄ are held at their ends while the surrogates go on learning at the last
    learning rate.
    Needs examples with features and targets; no gradient, and no model.

    Args:
        rounds: number of trees; 0 leaves the ridge regression alone.
        learning_rate: of the boosting.
        leaves: of a tree, at most.
        min_rows: of a leaf, at least: rows are (run, step, test example).
        seed: of the sampled rows and columns.

    Attributes:
        mean_: m, ``[steps + 1, test]``.
        speeds_: of the kernels, each the best alone, ``[kernels]``.
        surrogate_mean_: s̄, ``[steps + 1, test, surrogates]``.
        weights_: w, ``[surrogates]``.
        trees_: the model in LightGBM's text form.

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
            raise InvalidInput(f"leaves can be {_MOST_LEAVES} at most, got {self.leaves}")
        if number("learning_rate", self.learning_rate, above=0) > 1:
            raise InvalidInput(f"learning_rate must be above 0 and at most 1, got {self.learning_rate!r}")

    def _fit(self, runs: Runs) -> None:
        runs = Runs(sorted(runs, key=lambda run: run.id))  # their order is to make no difference
        sides = Sides.of(runs.train, runs.test, "the boosted simulator")
        self._keep(sides)
        self.schedule_ = _relative_rates(runs)
        kernels = [Kernel(kind, sides) for kind in KERNELS]
        self.speeds_ = np.array([best_speed(kernel, sides, runs, self.schedule_) for kernel in kernels])
        said = self._surrogates(runs.curricula)
        lengths = np.array([run.steps for run in runs])
        going = np.arange(said.shape[1]) <= lengths[:, None]  # [runs, times]
        self.mean_ = mean_trajectory(runs)
        self.surrogate_mean_ = (said * going[:, :, None, None]).sum(0) / going.sum(0)[:, None, None]
        missing = runs.losses.astype(np.float64) - self.mean_
        missing[:, 0] = np.nan  # nothing to forecast there
        self.weights_ = _ridge(said - self.surrogate_mean_, missing)
        missing -= (said - self.surrogate_mean_) @ self.weights_
        self.trees_ = self._grow(said, missing)

    def _simulate(self, curricula: Sequence[Curriculum], initial: np.ndarray) -> np.ndarray:
        longest = max(len(curriculum) for curriculum in curricula)
        losses = np.full((len(curricula), longest + 1, self.n_test_), np.nan)
        chunk = max(1, _CHUNK_ENTRIES // ((longest + 1) * self.n_test_))
        trees = lightgbm.Booster(model_str=self.trees_) if self.trees_ else None
        for start in range(0, len(curricula), chunk):
            said = self._surrogates(curricula[start : start + chunk])
            times = np.minimum(np.arange(said.shape[1]), len(self.mean_) - 1)
            found = self.mean_[times] + (said - self.surrogate_mean_[times]) @ self.weights_
            if trees:
                rows = self._rows(said.reshape(-1, *said.shape[2:]), np.tile(times, len(said)))
                found += np.asarray(trees.predict(rows, num_threads=1)).reshape(found.shape)
            losses[start : start + chunk, : found.shape[1]] = found
        return losses

    def _surrogates(self, curricula: Sequence[Curriculum]) -> np.ndarray:
        """What every surrogate's losses are, ``[runs, steps + 1, test, surrogates]``."""
        sides, batches = self._sides(), Batches.of(curricula)
        steps = batches.indices.shape[1]
        rates = self.schedule_[np.minimum(np.arange(steps), len(self.schedule_) - 1)]
        said = []
        with np.errstate(all="ignore"):
            for kind, speed in zip(KERNELS, self.speeds_, strict=True):
                kernel = Kernel(kind, sides)
                said += [surrogate_losses(kernel, sides, batches, pace * speed * rates) for pace in _PACES]
        return np.nan_to_num(np.stack(said, axis=-1), nan=_LARGEST, posinf=_LARGEST).clip(-_LARGEST, _LARGEST)

    def _rows(self, said: np.ndarray, times: np.ndarray) -> np.ndarray:
        """What the trees see at some times ``[k]`` of some runs: rows ``[k · test, columns]``.

        ``said`` is what the surrogates' losses are then, ``[k, test, surrogates]``.
        """
        usual, mean = self.surrogate_mean_[times], self.mean_[times][:, :, None]
        step = np.broadcast_to(times[:, None, None], mean.shape)
        columns = np.concatenate([said - usual, usual, mean, step], axis=2)
        return columns.reshape(-1, columns.shape[2])

    def _grow(self, said: np.ndarray, missing: np.ndarray) -> str:
        """Trees that predict ``missing`` where it is known, on a random sample if there are many rows."""
        if self.rounds == 0:
            return ""
        known = np.argwhere(~np.isnan(missing).any(axis=2))  # [k, run and time]
        if not len(known):
            raise InvalidInput("no loss after time 0 was read in any of these runs: record with Observe(every=…)")
        count = min(len(known), max(1, _FIT_ROWS // missing.shape[2]))
        rng = np.random.default_rng(self.seed)
        run, time = known[np.sort(rng.choice(len(known), count, replace=False))].T
        parameters = {
            "objective": "l2", "learning_rate": self.learning_rate, "num_leaves": self.leaves,
            "min_data_in_leaf": self.min_rows, "feature_fraction": 0.7, "bagging_fraction": 0.5, "bagging_freq": 1,
            "seed": self.seed, "deterministic": True, "force_row_wise": True, "verbose": -1,
            "num_threads": 1,
        }  # fmt: skip
        rows = lightgbm.Dataset(self._rows(said[run, time], time), missing[run, time].ravel())
        return lightgbm.train(parameters, rows, self.rounds).model_to_string()

    def _keep(self, sides: Sides) -> None:
        self.train_features_, self.test_features_ = sides.train, sides.test
        self.train_targets_, self.test_targets_ = sides.train_targets, sides.test_targets
        self.classes_ = sides.classes

    def _sides(self) -> Sides:
        return Sides(
            self.train_features_, self.test_features_, self.train_targets_, self.test_targets_, self.classes_
        )  # fmt: skip


def _relative_rates(runs: Runs) -> np.ndarray:
    """The longest run's learning rates relative to their peak, ``[steps]``; 1 where they are not known."""
    longest = max(runs, key=lambda run: run.steps)
    rates = longest.learning_rates
    if rates is None or not np.isfinite(rates).all() or rates.max() <= 0:
        return np.ones(longest.steps)
    return rates / rates.max()


def _ridge(deviations: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """Weights ``[surrogates]`` of their deviations that best explain what is known of ``missing``."""
    known = ~np.isnan(missing)
    rows, wanted = deviations[known], missing[known]
    gram = rows.T @ rows
    penalty = _RIDGE * np.diag(gram)
    return np.linalg.solve(gram + np.diag(np.where(penalty > 0, penalty, 1.0)), rows.T @ wanted)
