"""Cross-validation over runs: disjoint folds, and a simulator's errors on runs that it was not fitted on."""

from __future__ import annotations

import warnings

import numpy as np
import sklearn.base
from jaxtyping import Float

from simfluence.errors import BeyondReferenceWarning, UnseenWarning
from simfluence.evaluation.metrics import all_errors, final_errors
from simfluence.runs import Runs
from simfluence.simulators import Simulator


def fitted_errors(simulator: Simulator, part: Runs, held: Runs) -> Float[np.ndarray, "2 runs"]:
    """Per held-out run, ``all_errors`` and ``final_errors`` of the simulator fitted on ``part``.

    A rollout that runs away has infinite errors. It is silent: candidates may overflow, and small sets of runs miss
    examples.

    Args:
        simulator: with its parameters; it is not changed.
        part: runs to fit on.
        held: runs to forecast.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        warnings.simplefilter("ignore", UnseenWarning)
        warnings.simplefilter("ignore", BeyondReferenceWarning)
        simulated = sklearn.base.clone(simulator).fit(part).simulate(held.curricula, held.initial_losses)
        true = held.losses.astype(np.float64)
        errors = np.stack([all_errors(simulated, true), final_errors(simulated, true)])
    errors[:, (~np.isfinite(simulated) & np.isfinite(true)).any(axis=(1, 2))] = np.inf
    return errors
