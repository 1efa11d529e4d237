"""Errors of a simulator on held-out runs, for cross-validation and learning curves."""

from __future__ import annotations

import numpy as np
import sklearn.base
from jaxtyping import Float

from simfluence.evaluation.metrics import all_errors, final_errors
from simfluence.runs import Runs
from simfluence.simulators import Simulator
from simfluence.simulators.folds import check_held_out, quiet

__all__ = ["fitted_errors"]


def fitted_errors(simulator: Simulator, part: Runs, held: Runs) -> Float[np.ndarray, "2 runs"]:
    """Fit a simulator on ``part`` and compute ``all_errors`` and ``final_errors`` of each run of ``held``.

    A forecast that runs away has infinite errors. Warnings are silenced, because candidates may run away and small sets
    of runs may lack examples.

    Args:
        simulator: simulator with its parameters, which is not changed.
        part: runs to fit on.
        held: runs to forecast.

    Raises:
        InvalidInput: a part of the simulator, such as an attributor, was fitted on a run of ``held``.
    """
    with quiet():
        fitted = sklearn.base.clone(simulator).fit(part)
        check_held_out(fitted, held)
        simulated = fitted.simulate(held.curricula, held.initial_losses)
        true = held.losses.astype(np.float64)
        errors = np.stack([all_errors(simulated, true), final_errors(simulated, true)])
    errors[:, (fitted.beyond_bounds(simulated) & np.isfinite(true)).any(axis=(1, 2))] = np.inf
    return errors
