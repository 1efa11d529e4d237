"""Intervals around any simulator's forecasts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import sklearn.base

from simfluence._internal.checked import checked
from simfluence._internal.types import Losses
from simfluence._internal.validation import whole
from simfluence.curriculum import Curriculum
from simfluence.errors import InvalidInput
from simfluence.runs import Runs
from simfluence.simulators.base import InitialLosses, Simulator
from simfluence.simulators.folds import at_times, fold_of, means_of_others, quiet
from simfluence.simulators.intervals import LEVELS, USUAL_CONFIDENCE, UsualErrors, half_widths, mean_over_runs, widened
from simfluence.simulators.learned import check_arrays
from simfluence.simulators.markov.simulators import LinearSimulator
from simfluence.simulators.trust import Trust

__all__ = ["ConformalSimulator"]


class ConformalSimulator(Simulator):
    """Add intervals to a simulator's forecasts, as wide as its errors on held-out runs.

    With r the residuals of cross-validation, v_t(z) their mean square over runs (shrunk slightly to the median of all
    test examples) and s the standard deviation of forecasts by simulators fitted on bootstrap resamples of the runs,

        interval = forecast ± q_t(confidence) · √(v_t(z) + s²)

    where q_t is the quantile, over runs and test examples, of |r| / √(v + s²), with v taken without the run itself
    (split conformal prediction with a local scale: Lei et al. 2018; cross-validated: Barber et al. 2021). v is the
    usual error for curricula like those of the runs. For a curriculum unlike them s grows, and v is taken to grow in
    proportion to the distance of its forecast from the mean trajectory. Coverage holds for runs like the recorded ones;
    far from all of them, intervals are a guess.

    Args:
        simulator: the simulator to fit, which is cloned; by default a linear one around the mean.
        members: number of bootstrap resamples.
        folds: number of folds in cross-validation.
        seed: seed of the resamples and the folds.

    Attributes:
        fitted_: simulators fitted on all runs, then on each resample.
        variance_: v, ``[steps + 1, test]``.
        usual_square_: mean squared deviation of held-out forecasts from the mean trajectory, ``[steps + 1, test]``.
        quantiles_: q at confidences of 0.50, 0.51, … 0.99, ``[steps + 1, levels]``.

    >>> rng = np.random.default_rng(0)
    >>> runs = Runs.from_arrays(rng.integers(3, size=(8, 5, 2)), rng.normal(size=(8, 6, 2)).cumsum(axis=1))
    >>> fitted = ConformalSimulator(LinearSimulator(l2=10, around="mean"), members=3).fit(runs)
    >>> low, high = fitted.interval(runs.curricula, runs.initial_losses, confidence=0.9)
    >>> bool((low <= fitted.simulate(runs.curricula, runs.initial_losses)).all()), high.shape
    (True, (8, 6, 2))
    """

    name = "conformal"
    holds_out = True
    is_wrapper = True

    def __init__(self, simulator: Simulator | None = None, members: int = 10, folds: int = 4, seed: int = 0) -> None:
        self.simulator = simulator
        self.members = members
        self.folds = folds
        self.seed = seed

    @property
    def gives_intervals(self) -> bool:
        return True

    @checked
    def interval(
        self, curricula: Sequence[Curriculum], initial_losses: InitialLosses, confidence: float = 0.9
    ) -> tuple[Losses, Losses]:
        """Return the lower and upper ends of each loss's interval, each ``[runs, steps + 1, test]``.

        At time 0 both are the initial losses.

        Args:
            curricula, initial_losses: see ``simulate``.
            confidence: fraction of the losses that the intervals should contain, from 0.5 to 0.99.

        Raises:
            NotFittedError: before ``fit``.
            InvalidInput: the confidence is out of range, or ``simulate`` refuses the curricula or losses.
        """
        self._check_fitted()
        forecast = self.simulate(curricula, initial_losses)
        variance = self._widened(at_times(self.variance_, forecast.shape[1])[None], forecast)
        variance = variance + self._spread(curricula, initial_losses)
        half = half_widths(self.quantiles_, variance, confidence)
        return forecast - half, forecast + half

    def _check_parameters(self) -> None:
        if self.simulator is not None and not isinstance(self.simulator, Simulator):
            raise InvalidInput(f"simulator must be a Simulator, such as LinearSimulator(l2=10), got {self.simulator!r}")
        for name, least in (("members", 2), ("folds", 2), ("seed", 0)):
            whole(name, getattr(self, name), least)

    def _fit(self, runs: Runs) -> None:
        distinct = len(set(runs.ids))
        if distinct < self.folds:
            raise InvalidInput(
                f"{distinct} runs cannot be split into {self.folds} folds: fit on more runs, or pass a smaller folds="
            )
        rng = np.random.default_rng(self.seed)
        draws = [rng.integers(len(runs), size=len(runs)) for _ in range(self.members)]
        samples = [runs.take(draw) for draw in draws]
        with quiet():  # samples and folds need not show all examples
            fitted = self._base()
            folds = fold_of(runs, int(self.folds), int(self.seed))
            forecasts = fitted._cross_fit(runs, folds)
            errors = UsualErrors.of(forecasts - runs.losses)
            self.fitted_ = [fitted, *(self._base().fit(sample) for sample in samples)]
            spread = self._spread(runs.curricula, runs.initial_losses)
        means = means_of_others(runs, folds)
        squares = (forecasts - means) ** 2
        self.variance_, self.usual_square_ = errors.variance, mean_over_runs(squares)
        expected = widened(errors.without, self.variance_, (squares, self.usual_square_)) + spread
        self.quantiles_ = errors.quantiles(expected)
        inside = np.abs(forecasts - runs.losses) <= half_widths(self.quantiles_, expected, USUAL_CONFIDENCE)
        self.trust_ = dataclasses.asdict(Trust.of(forecasts, runs.losses, means, inside))

    def _check_learned(self) -> None:
        super()._check_learned()
        check_arrays(self, {"variance_": "float times test", "quantiles_": f"float times {len(LEVELS)}"})
        if hasattr(self, "usual_square_"):
            check_arrays(self, {"usual_square_": "float times test"})
        fitted = getattr(self, "fitted_", None)
        if not isinstance(fitted, list) or len(fitted) < 3 or not all(isinstance(part, Simulator) for part in fitted):
            raise InvalidInput("fitted_ is not a list of three simulators or more")
        if any((part.n_train_, part.n_test_) != (self.n_train_, self.n_test_) for part in fitted):
            raise InvalidInput("the simulators in fitted_ are of other numbers of examples")

    def _ids_of_parts(self) -> set[str]:
        """Leave out the parameter ``simulator``, of which only unfitted clones are used."""
        return {run_id for part in self.fitted_ for run_id in part.fitted_ids_}

    def _warn_beyond(self, curricula: Sequence[Curriculum]) -> None:
        """Leave the warning to the simulator inside."""

    def _base(self) -> Simulator:
        return LinearSimulator(around="mean") if self.simulator is None else sklearn.base.clone(self.simulator)

    def _widened(self, variance: np.ndarray, forecast: np.ndarray) -> np.ndarray:
        """Widen usual squared errors by how far forecasts are from the mean trajectory of the fitting runs."""
        if not hasattr(self, "usual_square_"):  # the file of an older version
            return variance
        squares = (forecast - at_times(self.baseline_, forecast.shape[1])) ** 2
        return widened(variance, self.variance_, (squares, self.usual_square_))

    def _spread(self, curricula: Sequence[Curriculum], initial_losses: np.ndarray) -> np.ndarray:
        """Return the variance of the members' forecasts, ``[runs, times, test]``."""
        with quiet():
            forecasts = [member.simulate(curricula, initial_losses) for member in self.fitted_[1:]]
        return np.asarray(np.var(forecasts, axis=0, ddof=1))

    def _changes(self, base: Curriculum, edited: Sequence[Curriculum], initial: np.ndarray) -> np.ndarray:
        return self.fitted_[0].changes(base, edited, initial)

    def _changes_without(self, base: Curriculum, groups: Sequence[np.ndarray], initial: np.ndarray) -> np.ndarray:
        return self.fitted_[0].changes_without(base, groups, initial)

    def _derivatives_without(self, base: Curriculum, initial: np.ndarray) -> np.ndarray:
        return self.fitted_[0].derivatives_without(base, initial)

    def _simulate(self, curricula: Sequence[Curriculum], initial: np.ndarray) -> np.ndarray:
        return self.fitted_[0].simulate(curricula, initial)
