"""Errors of a simulator on held-out runs, for cross-validation and learning curves."""

from __future__ import annotations

import warnings

import numpy as np
import sklearn.base
from jaxtyping import Float

from simfluence.errors import BeyondReferenceWarning, InvalidInput, UnseenWarning
from simfluence.evaluation.metrics import all_errors, final_errors
from simfluence.runs import Runs
from simfluence.simulators import Simulator

__all__ = ["fitted_errors"]


def fitted_errors(simulator: Simulator, part: Runs, held: Runs) -> Float[np.ndarray, "2 runs"]:
    """Fit a simulator on ``part`` and compute ``all_errors`` and ``final_errors`` of each run of ``held``.

    A diverging rollout has infinite errors. Warnings are silenced, because candidates may overflow and small sets of
    runs may lack examples.

    Args:
        simulator: simulator with its parameters, which is not changed.
        part: runs to fit on.
        held: runs to forecast.

    Raises:
        InvalidInput: a part of the simulator, such as an attributor, was fitted on a run of ``held``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        warnings.simplefilter("ignore", UnseenWarning)
        warnings.simplefilter("ignore", BeyondReferenceWarning)
        fitted = sklearn.base.clone(simulator).fit(part)
        if seen := [run.id for run in held if fitted.was_fitted_on(run)]:
            raise InvalidInput(
                f"run {seen[0]} is held out, but a part of {simulator.name!r} was fitted on it: fit that part on other "
                "runs"
            )
        simulated = fitted.simulate(held.curricula, held.initial_losses)
        true = held.losses.astype(np.float64)
        errors = np.stack([all_errors(simulated, true), final_errors(simulated, true)])
    errors[:, (~np.isfinite(simulated) & np.isfinite(true)).any(axis=(1, 2))] = np.inf
    return errors
