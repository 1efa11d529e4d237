"""Weights of several references for a curriculum: the more alike the batches so far, the larger the weight."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from simfluence.curriculum import Curriculum
from simfluence.simulators.batches import batch_weights
from simfluence.simulators.tangent.adjoint import by_removal

__all__ = ["reference_weights", "reference_weights_without"]


def reference_weights(curricula: Sequence[Curriculum], references: Sequence[Curriculum], longest: int) -> np.ndarray:
    """Return each reference's weight for each curriculum at each time, ``[runs, references, longest + 1]``; sums are 1.

    A weight is in inverse proportion to the mean, over the steps so far, of the squared distance between the
    cumulative batch weights of curriculum and reference.
    """
    reference_totals = [_cumulative_weights(reference, longest) for reference in references]
    inverse = np.empty((len(curricula), len(references), longest + 1))
    for row, curriculum in enumerate(curricula):
        totals = _cumulative_weights(curriculum, longest)
        for column, others in enumerate(reference_totals):
            distances = np.square(totals - others).sum(1)
            inverse[row, column, 1:] = 1 / (np.cumsum(distances) / np.arange(1, longest + 1) + 1e-9)
    inverse[:, :, 0] = 1.0
    return np.asarray(inverse / inverse.sum(axis=1, keepdims=True))


def reference_weights_without(
    curriculum: Curriculum, references: Sequence[Curriculum]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the references' weights at the curriculum's end, and their derivatives for removing each training example.

    Returns:
        ``[references]``, and ``[references, train]``; for the derivatives see ``final_derivatives``.
    """
    steps, weights = len(curriculum), _weights(curriculum, len(curriculum))
    inverse, changes = np.empty(len(references)), np.empty((len(references), curriculum.n_train))
    totals = np.cumsum(weights, axis=0)
    for row, reference in enumerate(references):
        differences = totals - _cumulative_weights(reference, steps)  # [steps, train]
        inverse[row] = 1 / (np.square(differences).sum() / steps + 1e-9)
        by_weights = 2 / steps * np.cumsum(differences[::-1], axis=0)[::-1]  # derivative of the distance
        changes[row] = -(inverse[row] ** 2) * by_removal(weights, by_weights).sum(0)
    normalized = inverse / inverse.sum()
    return normalized, (changes - normalized[:, None] * changes.sum(0)) / inverse.sum()


def _cumulative_weights(curriculum: Curriculum, longest: int) -> np.ndarray:
    """Sum the batch weights of all steps so far, ``[longest, train]``."""
    return np.cumsum(_weights(curriculum, longest), axis=0, dtype=np.float32)


def _weights(curriculum: Curriculum, longest: int) -> np.ndarray:
    """Return the weights of each batch, ``[longest, train]``."""
    weights, _ = batch_weights([curriculum], max(longest, len(curriculum)), 1)
    dense: np.ndarray = weights.toarray()[:longest]
    return dense
