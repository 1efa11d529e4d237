"""How near a curriculum is to each of several references, by what has been shown so far."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from simfluence.curriculum import Curriculum
from simfluence.simulators.batches import batch_weights
from simfluence.simulators.tangent.adjoint import by_removal


def reference_weights(curricula: Sequence[Curriculum], references: Sequence[Curriculum], longest: int) -> np.ndarray:
    """How much each reference counts for each curriculum at each time, ``[runs, references, longest + 1]``; sums are 1.

    In inverse proportion to the mean, over the steps so far, of the squared distance of what has been shown.
    """
    shown = [_shown(reference, longest) for reference in references]
    inverse = np.empty((len(curricula), len(references), longest + 1))
    for row, curriculum in enumerate(curricula):
        mine = _shown(curriculum, longest)
        for column, other in enumerate(shown):
            distances = np.square(mine - other).sum(1)
            inverse[row, column, 1:] = 1 / (np.cumsum(distances) / np.arange(1, longest + 1) + 1e-9)
    inverse[:, :, 0] = 1.0
    return inverse / inverse.sum(axis=1, keepdims=True)


def reference_weights_without(
    curriculum: Curriculum, references: Sequence[Curriculum]
) -> tuple[np.ndarray, np.ndarray]:
    """The same at the curriculum's end, ``[references]``, and its derivatives as each training example leaves,
    ``[references, train]``."""
    steps, shares = len(curriculum), _shares(curriculum, len(curriculum))
    inverse, moved = np.empty(len(references)), np.empty((len(references), curriculum.n_train))
    mine = np.cumsum(shares, axis=0)
    for row, reference in enumerate(references):
        apart = mine - _shown(reference, steps)  # [steps, train]
        inverse[row] = 1 / (np.square(apart).sum() / steps + 1e-9)
        by_shares = 2 / steps * np.cumsum(apart[::-1], axis=0)[::-1]  # of the distance
        moved[row] = -(inverse[row] ** 2) * by_removal(shares, by_shares).sum(0)
    nearest = inverse / inverse.sum()
    return nearest, (moved - nearest[:, None] * moved.sum(0)) / inverse.sum()


def _shown(curriculum: Curriculum, longest: int) -> np.ndarray:
    """What has been shown by each step, in batches' shares, ``[longest, train]``."""
    return np.cumsum(_shares(curriculum, longest), axis=0, dtype=np.float32)


def _shares(curriculum: Curriculum, longest: int) -> np.ndarray:
    """Of each batch, ``[longest, train]``."""
    weights, _ = batch_weights([curriculum], max(longest, len(curriculum)), 1)
    found: np.ndarray = weights.toarray()[:longest]
    return found
