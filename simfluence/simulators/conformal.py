"""Forecasts with intervals, for any simulator."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import sklearn.base

from simfluence._internal.types import Losses
from simfluence._internal.validation import whole
from simfluence.curriculum import Curriculum
from simfluence.errors import BeyondReferenceWarning, InvalidInput, UnseenWarning
from simfluence.runs import Runs
from simfluence.simulators.base import Simulator
from simfluence.simulators.markov.simulators import LinearSimulator

_LEVELS = np.linspace(0.5, 0.99, 50)  # of confidence, between which an interval's width is interpolated
_BORROWED = 0.5  # runs' worth of residuals that a test example borrows from the others: few runs may miss some


class ConformalSimulator(Simulator):
    """A simulator's forecasts, with intervals that are as wide as its errors were on runs left out of the fit.

    With r the residuals of cross-validation, v_t(z) their mean square over runs (a little drawn to the median of all
    test examples) and s the standard deviation of forecasts by simulators fitted on bootstrap resamples of the runs,

        interval = forecast ± q_t(confidence) · √(v_t(z) + s²)

    where q_t is the quantile, over runs and test examples, of |r| / √(v + s²), with v taken without the run itself
    (split conformal prediction with a local scale: Lei et al. 2018; cross-validated: Barber et al. 2021). v is the
    error that such curricula always leave, s grows for one that the runs say little of. Coverage is that of runs
    like the recorded ones; a curriculum far from all of them may be outside more often.

    Args:
        simulator: what to fit; it is not changed.
        members: number of bootstrap resamples.
        folds: parts of the runs that are left out in turn.
        seed: of the resamples and the folds.

    Attributes:
        fitted_: the simulator fitted on all runs, then on each resample.
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

    def interval(
        self, curricula: Sequence[Curriculum], initial_losses: Any, confidence: float = 0.9
    ) -> tuple[Losses, Losses]:
        """Lower and upper ends ``[runs, steps + 1, test]`` of the interval of each loss; at time 0 they are the losses.

        Args:
            curricula, initial_losses: as of ``simulate``.
            confidence: share of losses that is to lie within, from 0.5 to 0.99.

        Raises:
            NotFittedError: before ``fit``.
            InvalidInput: a confidence out of range, or what ``simulate`` refuses.
        """
        self._check_fitted()
        if not _LEVELS[0] <= confidence <= _LEVELS[-1]:
            raise InvalidInput(f"confidence must be from {_LEVELS[0]} to {_LEVELS[-1]}, got {confidence}")
        forecast = self.simulate(curricula, initial_losses)
        times = np.minimum(np.arange(forecast.shape[1]), len(self.variance_) - 1)
        wide = [np.interp(confidence, _LEVELS, quantiles) for quantiles in self.quantiles_[times]]
        spread = self._spread(curricula, initial_losses)
        half = np.array(wide)[:, None] * np.sqrt(self.variance_[times] + spread)
        half[:, 0] = 0.0
        return forecast - half, forecast + half

    def _check_parameters(self) -> None:
        if self.simulator is not None and not isinstance(self.simulator, Simulator):
            raise InvalidInput(f"simulator must be a Simulator, such as LinearSimulator(l2=10), got {self.simulator!r}")
        for name, least in (("members", 2), ("folds", 2), ("seed", 0)):
            whole(name, getattr(self, name), least)

    def _fit(self, runs: Runs) -> None:
        if len(runs) < self.folds:
            raise InvalidInput(
                f"{len(runs)} runs cannot be left out in {self.folds} folds: give more runs, or folds={len(runs)}"
            )
        rng = np.random.default_rng(self.seed)
        draws = [rng.integers(len(runs), size=len(runs)) for _ in range(self.members)]
        parts = [runs, *(runs.take(draw) for draw in draws)]
        with _quiet():  # parts of the runs need not show what all of them do
            self.fitted_ = [self._base().fit(part) for part in parts]
            squares = self._residuals(runs, rng) ** 2  # [runs, times, test]
        known = ~np.isnan(squares)
        read = np.flatnonzero(known.any(axis=(0, 2)))  # where none was, a straight line joins what is around
        squares, known = squares[:, read], known[:, read]
        sums = np.nansum(squares, axis=0)
        borrowed = _BORROWED * np.median(sums / np.maximum(known.sum(0), 1), axis=1, keepdims=True)
        variance = (borrowed + sums) / (_BORROWED + known.sum(0))
        without = np.maximum(borrowed + sums - squares, 0.0) / (_BORROWED + known.sum(0) - 1)  # each run
        spread = self._spread(runs.curricula, runs.initial_losses)
        scale = np.sqrt(without + spread[:, read])
        scores = np.divide(np.sqrt(squares), scale, out=np.zeros_like(scale), where=scale > 0)
        scores[~known] = np.nan
        times = np.arange(runs.losses.shape[1])
        quantiles = np.nanquantile(scores, _LEVELS, axis=(0, 2)).T
        self.variance_, self.quantiles_ = (
            np.stack([np.interp(times, read, column) for column in values.T], axis=1)
            for values in (variance, quantiles)
        )

    def _base(self) -> Simulator:
        return LinearSimulator(around="mean") if self.simulator is None else sklearn.base.clone(self.simulator)

    def _residuals(self, runs: Runs, rng: np.random.Generator) -> np.ndarray:
        """Of forecasts by simulators fitted without the run, ``[runs, times, test]``; NaN where not recorded."""
        fold_of = rng.permutation(len(runs)) % self.folds
        residuals = np.full(runs.losses.shape, np.nan)
        for fold in range(self.folds):
            held = np.flatnonzero(fold_of == fold)
            fitted = self._base().fit(Runs(run for run, part in zip(runs, fold_of, strict=True) if part != fold))
            left = runs.take(held)
            simulated = fitted.simulate(left.curricula, left.initial_losses)
            residuals[held, : simulated.shape[1]] = simulated - left.losses
        return residuals

    def _spread(self, curricula: Sequence[Curriculum], initial_losses: Any) -> np.ndarray:
        """Variance of the members' forecasts, ``[runs, times, test]``."""
        with _quiet():
            forecasts = [member.simulate(curricula, initial_losses) for member in self.fitted_[1:]]
        return np.var(forecasts, axis=0, ddof=1)

    def _changes(self, base: Curriculum, edited: Sequence[Curriculum], initial: np.ndarray) -> np.ndarray:
        return self.fitted_[0].changes(base, edited, initial)

    def _changes_without(self, base: Curriculum, groups: np.ndarray, initial: np.ndarray) -> np.ndarray:
        return self.fitted_[0].changes_without(base, groups, initial)

    def _derivatives_without(self, base: Curriculum, initial: np.ndarray) -> np.ndarray:
        return self.fitted_[0].derivatives_without(base, initial)

    def _simulate(self, curricula: Sequence[Curriculum], initial: np.ndarray) -> np.ndarray:
        return self.fitted_[0].simulate(curricula, initial)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing is said of what parts of the runs do not show."""
    with warnings.catch_warnings():
        for kind in (UnseenWarning, BeyondReferenceWarning):
            warnings.simplefilter("ignore", kind)
        yield
