"""Intervals around any simulator's forecasts."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import sklearn.base

from simfluence._internal.checked import checked
from simfluence._internal.types import Losses
from simfluence._internal.validation import whole
from simfluence.curriculum import Curriculum
from simfluence.errors import BeyondReferenceWarning, InvalidInput, UnseenWarning
from simfluence.runs import Runs
from simfluence.simulators.base import InitialLosses, Simulator
from simfluence.simulators.learned import check_arrays
from simfluence.simulators.markov.simulators import LinearSimulator

__all__ = ["ConformalSimulator"]

_LEVELS = np.linspace(0.5, 0.99, 50)  # confidences at which quantiles are stored; others are interpolated
_BORROWED = 0.5  # weight, in runs, of the median variance in each test example's: few runs may miss its errors


class ConformalSimulator(Simulator):
    """Add intervals to a simulator's forecasts, as wide as its errors on held-out runs.

    With r the residuals of cross-validation, v_t(z) their mean square over runs (shrunk slightly to the median of all
    test examples) and s the standard deviation of forecasts by simulators fitted on bootstrap resamples of the runs,

        interval = forecast ± q_t(confidence) · √(v_t(z) + s²)

    where q_t is the quantile, over runs and test examples, of |r| / √(v + s²), with v taken without the run itself
    (split conformal prediction with a local scale: Lei et al. 2018; cross-validated: Barber et al. 2021). v is the
    usual error for curricula like those of the runs; s grows for a curriculum unlike them. Coverage holds for runs
    like the recorded ones; for a curriculum far from all of them, intervals may miss more often.

    Args:
        simulator: the simulator to fit, which is cloned; by default a linear one around the mean.
        members: number of bootstrap resamples.
        folds: number of folds in cross-validation.
        seed: seed of the resamples and the folds.

    Attributes:
        fitted_: simulators fitted on all runs, then on each resample.
        variance_: v, ``[steps + 1, test]``.
        quantiles_: q at confidences of 0.50, 0.51, … 0.99, ``[steps + 1, levels]``.

    >>> rng = np.random.default_rng(0)
    >>> runs = Runs.from_arrays(rng.integers(3, size=(8, 5, 2)), rng.normal(size=(8, 6, 2)).cumsum(axis=1))
    >>> fitted = ConformalSimulator(LinearSimulator(l2=10, around="mean"), members=3).fit(runs)
    >>> low, high = fitted.interval(runs.curricula, runs.initial_losses, confidence=0.9)
    >>> bool((low <= fitted.simulate(runs.curricula, runs.initial_losses)).all()), high.shape
    (True, (8, 6, 2))
    """

    name = "conformal"
    gives_intervals = True
    is_wrapper = True

    def __init__(self, simulator: Simulator | None = None, members: int = 10, folds: int = 4, seed: int = 0) -> None:
        self.simulator = simulator
        self.members = members
        self.folds = folds
        self.seed = seed

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
        if not _LEVELS[0] <= confidence <= _LEVELS[-1]:
            raise InvalidInput(f"confidence must be from {_LEVELS[0]} to {_LEVELS[-1]}, got {confidence}")
        forecast = self.simulate(curricula, initial_losses)
        times = np.minimum(np.arange(forecast.shape[1]), len(self.variance_) - 1)
        factors = [np.interp(confidence, _LEVELS, quantiles) for quantiles in self.quantiles_[times]]
        spread = self._spread(curricula, initial_losses)
        half = np.array(factors)[:, None] * np.sqrt(self.variance_[times] + spread)
        half[:, 0] = 0.0
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
        samples = [runs, *(runs.take(draw) for draw in draws)]
        with _quiet():  # samples and folds need not show all examples
            self.fitted_ = [self._base().fit(sample) for sample in samples]
            squares = self._residuals(runs, rng) ** 2  # [runs, times, test]
        observed = ~np.isnan(squares)
        read = np.flatnonzero(observed.any(axis=(0, 2)))  # other times are interpolated
        squares, observed = squares[:, read], observed[:, read]
        sums = np.nansum(squares, axis=0)
        borrowed = _BORROWED * np.median(sums / np.maximum(observed.sum(0), 1), axis=1, keepdims=True)
        variance = (borrowed + sums) / (_BORROWED + observed.sum(0))
        variance_without = np.maximum(borrowed + sums - squares, 0.0) / (_BORROWED + observed.sum(0) - 1)  # each run
        spread = self._spread(runs.curricula, runs.initial_losses)
        scale = np.sqrt(variance_without + spread[:, read])
        scores = np.divide(np.sqrt(squares), scale, out=np.zeros_like(scale), where=scale > 0)
        scores[~observed] = np.nan
        times = np.arange(runs.losses.shape[1])
        quantiles = np.nanquantile(scores, _LEVELS, axis=(0, 2)).T
        self.variance_, self.quantiles_ = (
            np.stack([np.interp(times, read, column) for column in values.T], axis=1)
            for values in (variance, quantiles)
        )

    def _check_learned(self) -> None:
        super()._check_learned()
        check_arrays(self, {"variance_": "float times test", "quantiles_": f"float times {len(_LEVELS)}"})
        fitted = getattr(self, "fitted_", None)
        if not isinstance(fitted, list) or len(fitted) < 3 or not all(isinstance(part, Simulator) for part in fitted):
            raise InvalidInput("fitted_ is not a list of three simulators or more")
        if any((part.n_train_, part.n_test_) != (self.n_train_, self.n_test_) for part in fitted):
            raise InvalidInput("the simulators in fitted_ are of other numbers of examples")

    def _ids_of_parts(self) -> set[str]:
        """Leave out the parameter ``simulator``, of which only unfitted clones are used."""
        return {run_id for part in self.fitted_ for run_id in part.fitted_ids_}

    def _base(self) -> Simulator:
        return LinearSimulator(around="mean") if self.simulator is None else sklearn.base.clone(self.simulator)

    def _residuals(self, runs: Runs, rng: np.random.Generator) -> np.ndarray:
        """Return the residuals of cross-validation, ``[runs, times, test]``; NaN where no loss was recorded."""
        ids = list(dict.fromkeys(runs.ids))
        folds = dict(zip(ids, rng.permutation(len(ids)) % self.folds, strict=True))
        fold_of = np.array([folds[run_id] for run_id in runs.ids])  # copies of a run are held out together
        residuals = np.full(runs.losses.shape, np.nan)
        for fold in range(self.folds):
            rows = np.flatnonzero(fold_of == fold)
            fitted = self._base().fit(runs.take(np.flatnonzero(fold_of != fold)))
            held_out = runs.take(rows)
            simulated = fitted.simulate(held_out.curricula, held_out.initial_losses)
            residuals[rows, : simulated.shape[1]] = simulated - held_out.losses
        return residuals

    def _spread(self, curricula: Sequence[Curriculum], initial_losses: np.ndarray) -> np.ndarray:
        """Return the variance of the members' forecasts, ``[runs, times, test]``."""
        with _quiet():
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings about what a sample of the runs does not cover."""
    with warnings.catch_warnings():
        for kind in (UnseenWarning, BeyondReferenceWarning):
            warnings.simplefilter("ignore", kind)
        yield
