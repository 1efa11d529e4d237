"""Weights under which the forecasts of several simulators are best together."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import scipy.optimize

__all__ = ["stacking_weights"]

_RIDGE = 1e-3  # relative to each column's sum of squares


def stacking_weights(deviations: np.ndarray, actual: np.ndarray, stretches: int) -> np.ndarray:
    """Return the weights, none negative, under which members forecast the actual deviations best by least squares.

    This is stacked regression (Breiman 1996), with weights that change along training in straight lines between
    ``stretches`` evenly spread times.

    Args:
        deviations: what each member forecast of held-out runs, minus the mean trajectory of the runs it was fitted on,
            ``[members, runs, times, test]``.
        actual: the recorded losses minus that mean, ``[runs, times, test]``; NaN where nothing was recorded.
        stretches: number of weights of each member; with one they are constant.

    Returns:
        ``[times, members]``.

    >>> deviations = np.array([[[[0.0], [1.0]]], [[[0.0], [-1.0]]]])
    >>> stacking_weights(deviations, 0.5 * deviations[0], 1).round(3).tolist()  # the second is wrong throughout
    [[0.5, 0.0], [0.5, 0.0]]
    """
    known = ~np.isnan(actual)
    rows, target = np.where(known, deviations, 0.0), np.where(known, actual, 0.0)
    shares = _shares(actual.shape[1], stretches)  # [times, stretches]
    gram = np.einsum("krtz,lrtz->tkl", rows, rows)
    gram = np.einsum("tb,tkl,tc->kblc", shares, gram, shares).reshape(2 * [len(deviations) * shares.shape[1]])
    product = np.einsum("tb,krtz,rtz->kb", shares, rows, target, optimize=True).ravel()
    sizes = np.diag(gram)
    penalty = np.where(sizes > 0, _RIDGE * sizes, 1.0)  # a member that never deviates has the weight 0
    factor = np.linalg.cholesky(gram + np.diag(penalty))
    weights = scipy.optimize.nnls(factor.T, scipy.linalg.solve_triangular(factor, product, lower=True))[0]
    found: np.ndarray = shares @ weights.reshape(len(deviations), -1).T
    return found


def _shares(times: int, stretches: int) -> np.ndarray:
    """Return how much of each stretch's weight each time has, ``[times, stretches]``; rows sum to 1."""
    knots = np.linspace(0, times - 1, min(stretches, times))
    if len(knots) == 1:
        return np.ones((times, 1))
    return np.stack([np.interp(np.arange(times), knots, unit) for unit in np.eye(len(knots))], axis=1)
