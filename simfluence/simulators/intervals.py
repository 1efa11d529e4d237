"""Sizes of a simulator's errors on held-out runs, and the intervals that follow from them.

This is split conformal prediction with a local scale (Lei et al. 2018): errors are divided by how large they usually
are, and the quantiles of these ratios say how wide an interval must be to contain a share of the losses.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simfluence.errors import InvalidInput
from simfluence.simulators.folds import at_times

__all__ = ["LEVELS", "USUAL_CONFIDENCE", "UsualErrors", "half_widths", "mean_over_runs", "widened"]

#: Confidences at which quantiles are stored; others are interpolated.
LEVELS = np.linspace(0.5, 0.99, 50)
#: The confidence of intervals where none is named, and of the coverage that is reported.
USUAL_CONFIDENCE = 0.9

_BORROWED = 0.5  # weight, in runs, of the median variance in each test example's: few runs may miss its errors


@dataclass(frozen=True, eq=False)
class UsualErrors:
    """How large errors usually are, from those of held-out runs.

    Args:
        squares: squared errors, ``[runs, times, test]``; NaN where no loss was recorded.
        variance: their mean over runs, shrunk slightly to the median of all test examples, ``[times, test]``.
        without: the same without the run itself, ``[runs, times, test]``.
        read: the times that were recorded, ``[read]``; the other times of ``variance`` are interpolated.
    """

    squares: np.ndarray
    variance: np.ndarray
    without: np.ndarray
    read: np.ndarray

    @classmethod
    def of(cls, errors: np.ndarray) -> UsualErrors:
        """Compute them from errors ``[runs, times, test]``; NaN where no loss was recorded."""
        squares = errors**2
        observed = ~np.isnan(squares)
        read = np.flatnonzero(observed.any(axis=(0, 2)))
        counts, known = observed.sum(axis=0), np.where(observed, squares, 0.0)
        sums = known.sum(axis=0)
        borrowed = _BORROWED * np.median(sums / np.maximum(counts, 1), axis=1, keepdims=True)
        variance = (borrowed + sums) / (_BORROWED + counts)
        without = np.maximum(borrowed + sums - known, 0.0) / (_BORROWED + np.maximum(counts - 1, 0))
        return cls(squares, interpolated(variance, read), without, read)

    def quantiles(self, variance: np.ndarray) -> np.ndarray:
        """Return the quantiles of the errors' ratios to their standard deviations, ``[times, levels]``.

        Args:
            variance: what was to be expected of each squared error, ``[runs, times, test]``.
        """
        scale = np.sqrt(variance)
        ratios = np.divide(np.sqrt(self.squares), scale, out=np.zeros_like(scale), where=scale > 0)
        ratios[np.isnan(self.squares)] = np.nan
        at_read = np.nanquantile(ratios[:, self.read], LEVELS, axis=(0, 2)).T
        quantiles = np.zeros((ratios.shape[1], len(LEVELS)))
        quantiles[self.read] = at_read
        return interpolated(quantiles, self.read)


def interpolated(values: np.ndarray, read: np.ndarray) -> np.ndarray:
    """Interpolate the rows ``[times, columns]`` of the times that were not read."""
    times = np.arange(len(values))
    return np.stack([np.interp(times, read, column[read]) for column in values.T], axis=1)


def half_widths(quantiles: np.ndarray, variance: np.ndarray, confidence: float) -> np.ndarray:
    """Return half the width of each loss's interval, ``[runs, times, test]``; 0 at time 0.

    Args:
        quantiles: ``[times, levels]``; the last ones are held.
        variance: expected squared error of each loss, ``[runs, times, test]``.
        confidence: share of the losses that the intervals should contain.

    Raises:
        InvalidInput: the confidence is out of range.
    """
    if not LEVELS[0] <= confidence <= LEVELS[-1]:
        raise InvalidInput(f"confidence must be from {LEVELS[0]} to {LEVELS[-1]}, got {confidence}")
    rows = at_times(quantiles, variance.shape[1])
    factors = np.array([np.interp(confidence, LEVELS, row) for row in rows])
    half: np.ndarray = factors[:, None] * np.sqrt(variance)
    half[:, 0] = 0.0
    return half


def widened(
    variance: np.ndarray,
    usual_error: np.ndarray,
    deviation: tuple[np.ndarray, np.ndarray],
    *further: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """Return expected squared errors ``[runs, times, test]``, larger than usual for unusual curricula.

    Errors are taken to grow in proportion: with the distance of the whole curriculum from the mean trajectory beyond
    the usual one; and beyond their usual sizes, with the deviation of each loss and whatever else tells of its error.

    Args:
        variance: usual squared errors, ``[runs or 1, times, test]``.
        usual_error: mean of the squared errors of held-out runs, ``[times, test]``; the last ones are held.
        deviation: squared deviations of the forecasts from the mean trajectory, ``[runs, times, test]``, and their mean
            over the held-out runs, ``[times, test]``.
        further: the same of other signs of an error, such as the variance of several simulators' forecasts.
    """
    times = deviation[0].shape[1]
    error = at_times(usual_error, times).mean(axis=1, keepdims=True)  # [times, 1]
    usual = at_times(deviation[1], times).mean(axis=1, keepdims=True)
    found = variance * np.maximum(_ratio(deviation[0].mean(axis=2, keepdims=True), usual), 1.0)
    for now, before in (deviation, *further):
        size = at_times(before, times)
        share = _ratio(error, size.mean(axis=1, keepdims=True))
        found = found + share * np.maximum(now - size, 0.0)
    return np.asarray(found)


def mean_over_runs(values: np.ndarray) -> np.ndarray:
    """Average ``[runs, times, test]`` over the runs that have the time."""
    known = ~np.isnan(values)
    return np.asarray(np.where(known, values, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Divide; 0 where there is nothing to compare with."""
    shape = np.broadcast_shapes(part.shape, whole.shape)
    ratio: np.ndarray = np.divide(part, whole, out=np.zeros(shape), where=np.broadcast_to(whole > 0, shape))
    return ratio
