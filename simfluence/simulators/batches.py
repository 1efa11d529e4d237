"""Batches of curricula as weights of training examples, from which step-by-step simulators start."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse

from simfluence.curriculum import Curriculum

__all__ = ["batch_weights", "usual_batch_size", "weights_of_batches"]


def batch_weights(
    curricula: Sequence[Curriculum], longest: int, batch_size: int
) -> tuple[scipy.sparse.csr_array, np.ndarray]:
    """Return ``w_i = count · B/|c|`` of all steps ``[runs · longest, train]``, and whether each step is an update.

    Steps after a curriculum's end are empty rows. An example that is twice in a batch may have two entries in its row.
    """
    ends = np.cumsum([0, *(len(curriculum.indices) for curriculum in curricula)])
    offsets = np.repeat(ends[1:, None], longest + 1, axis=1)  # [runs, longest + 1]
    for row, curriculum in enumerate(curricula):
        offsets[row, : len(curriculum) + 1] = curriculum.offsets + ends[row]
    indices = np.concatenate([curriculum.indices for curriculum in curricula])
    flat = np.append(offsets[:, :-1].ravel(), ends[-1])
    return weights_of_batches(indices, flat, curricula[0].n_train, batch_size), np.diff(flat) > 0


def weights_of_batches(
    indices: np.ndarray, offsets: np.ndarray, n_train: int, batch_size: int
) -> scipy.sparse.csr_array:
    """Return batches laid end to end as rows ``[batches, train]``, each example with the weight B/|c|."""
    sizes = np.diff(offsets)
    values = np.repeat(batch_size / np.maximum(sizes, 1), sizes)
    return scipy.sparse.csr_array((values, indices, offsets), (len(sizes), n_train))


def usual_batch_size(curricula: Sequence[Curriculum]) -> int:
    """Return the most frequent size of the batches that are not empty."""
    sizes = np.concatenate([curriculum.sizes for curriculum in curricula])
    return int(np.bincount(sizes[sizes > 0]).argmax())
