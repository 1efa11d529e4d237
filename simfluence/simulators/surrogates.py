"""Surrogates: small learners that go through the same curriculum in the trained model's place.

A surrogate is a kernel machine on the examples' features. Its outputs f on all examples start at 0, and each batch
moves them by what the batch still has to learn (functional gradient descent on its own loss):

    f(x) ← f(x) + speed · ρ_t / |c_t| · Σ_{i∈c_t} k(x, i) r_i,      r_i = y_i − softmax(f(i))   or   2 (y_i − f(i))

with ρ_t the recipe's learning rate relative to its peak. No gradient of the real model is used, nor the model itself.
The surrogate's losses are not those of the model; but how they differ between curricula is much the same: what was
seen already teaches little, like examples help, unlike ones hurt. So a surrogate's deviation from its own mean over
the fitting runs says a good deal about the model's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial.distance import cdist, pdist

from simfluence.curriculum import Curriculum
from simfluence.errors import InvalidInput
from simfluence.examples import Examples
from simfluence.runs import Runs

#: arccos is the tangent kernel of a wide network with one hidden ReLU layer (Cho & Saul 2009; Jacot et al. 2018).
KERNELS = ("arccos", "linear", "rbf")
SPEEDS = tuple(0.0125 * 2**k for k in range(11))

_BIAS = 0.1  # of the kernels with one, beside inputs of mean squared norm 1
_CACHED_ENTRIES = 30_000_000  # of a kernel matrix kept whole: 240 MB
_TYPICAL_PAIRS = 1000  # examples whose distances give the width of "rbf"
_TRIAL_RUNS = 6  # that a speed is chosen on


@dataclass(frozen=True)
class Sides:
    """What surrogates see of the examples.

    Args:
        train, test: features ``[examples, features]``, divided by the root mean square norm of the training side.
        train_targets, test_targets: ``[examples, outputs]``; one column per class, 1 at the right one, for classes.
        classes: whether targets are classes, learned by cross-entropy, or numbers, learned by squared error.
    """

    train: np.ndarray
    test: np.ndarray
    train_targets: np.ndarray
    test_targets: np.ndarray
    classes: bool

    @classmethod
    def of(cls, train: Examples | None, test: Examples | None, purpose: str) -> Sides:
        """The two sides of runs.

        Raises:
            InvalidInput: features or targets are missing, or differ between the sides.
        """
        given = [_given(train, "train", purpose), _given(test, "test", purpose)]
        features, targets = [pair[0] for pair in given], [pair[1] for pair in given]
        if features[0].shape[1] != features[1].shape[1] or targets[0].shape[1:] != targets[1].shape[1:]:
            raise InvalidInput(
                f"train and test features or targets differ in width: {features[0].shape} and {features[1].shape}, "
                f"{targets[0].shape} and {targets[1].shape}"
            )
        whole = [side.dtype.kind in "iub" for side in targets]
        if whole[0] != whole[1]:
            raise InvalidInput(
                f"train targets are {targets[0].dtype} and test targets {targets[1].dtype}: give whole numbers on both "
                "sides for classes, or decimal ones on both"
            )
        scale = np.sqrt((features[0] ** 2).sum(1).mean()) or 1.0
        classes = targets[0].ndim == 1 and targets[0].dtype.kind in "iub"
        wide = _one_hot(targets) if classes else [t.reshape(len(t), -1).astype(np.float64) for t in targets]
        return cls(features[0] / scale, features[1] / scale, wide[0], wide[1], classes)

    def losses(self, outputs: np.ndarray) -> np.ndarray:
        """Of the test side under outputs ``[…, test, outputs]``: ``[…, test]``."""
        if self.classes:
            total = torch.logsumexp(torch.from_numpy(outputs), dim=-1).numpy()  # several times as fast as SciPy's
            return total - np.einsum("...o,...o", outputs, self.test_targets)
        return ((outputs - self.test_targets) ** 2).mean(-1)

    def residuals(self, outputs: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """What training examples ``indices`` still have to learn, under their ``outputs`` ``[…, outputs]``."""
        targets = self.train_targets[indices]
        if self.classes:
            return targets - torch.softmax(torch.from_numpy(outputs), dim=-1).numpy()
        return 2 * (targets - outputs)


@dataclass(frozen=True)
class Batches:
    """Curricula of any shape as arrays.

    Args:
        indices: ``[runs, steps, largest batch]``, 0 where there is no example.
        weights: ``1/|c_t|``, and 0 where there is no example.
    """

    indices: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, curricula: Sequence[Curriculum]) -> Batches:
        steps = max(len(curriculum) for curriculum in curricula)
        width = max(1, *(int(curriculum.sizes.max()) for curriculum in curricula))
        indices, weights = np.zeros((len(curricula), steps, width), np.int64), np.zeros((len(curricula), steps, width))
        for run, curriculum in enumerate(curricula):
            there = np.arange(width) < curriculum.sizes[:, None]  # [steps, width]
            indices[run, : len(curriculum)][there] = curriculum.indices
            weights[run, : len(curriculum)] = there / np.maximum(curriculum.sizes, 1)[:, None]
        return cls(indices, weights)


class Kernel:
    """k(x, i) between all examples x, training side first, and training examples i."""

    def __init__(self, kind: str, sides: Sides) -> None:
        self._kind = kind
        self._all = np.concatenate([sides.train, sides.test])
        self._norms = (self._all**2).sum(1) + _BIAS
        some = sides.train[:: max(1, len(sides.train) // _TYPICAL_PAIRS)]
        self._width = float(np.median(pdist(some))) if len(some) > 1 else 1.0
        small = len(self._all) * len(sides.train) <= _CACHED_ENTRIES
        self._matrix = self._between(np.arange(len(sides.train))) if small else None

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Of training examples ``[…]``: ``[…, train + test]``."""
        return (
            self._between(indices.ravel()).reshape(*indices.shape, -1)
            if self._matrix is None
            else self._matrix[indices]
        )

    def _between(self, indices: np.ndarray) -> np.ndarray:
        left = self._all[indices]
        if self._kind == "rbf":
            return np.exp(-cdist(left, self._all, "sqeuclidean") / (2 * (self._width or 1.0) ** 2))
        products = left @ self._all.T + _BIAS
        if self._kind == "linear":
            return products
        scale = np.sqrt(np.outer(self._norms[indices], self._norms))
        cosine = np.clip(products / scale, -1, 1)
        angle = np.pi - np.arccos(cosine)
        return (scale * (np.sqrt(1 - cosine**2) + angle * cosine) + products * angle) / np.pi


def surrogate_losses(kernel: Kernel, sides: Sides, batches: Batches, rates: np.ndarray) -> np.ndarray:
    """A surrogate's test losses under each curriculum, ``[runs, steps + 1, test]``.

    Args:
        kernel, sides: of the examples.
        batches: the curricula.
        rates: speed times relative learning rate of every step, ``[steps]``.
    """
    runs, steps, _ = batches.indices.shape
    n_train = len(sides.train)
    outputs = np.zeros((runs, n_train + len(sides.test), sides.train_targets.shape[1]))
    losses = np.empty((runs, steps + 1, len(sides.test)))
    every = np.arange(runs)[:, None]
    losses[:, 0] = sides.losses(outputs[:, n_train:])
    for step in range(steps):
        batch = batches.indices[:, step]  # [runs, batch]
        pull = sides.residuals(outputs[every, batch], batch) * batches.weights[:, step, :, None]
        outputs += kernel.rows(batch).swapaxes(1, 2) @ (rates[step] * pull)
        losses[:, step + 1] = sides.losses(outputs[:, n_train:])
    return losses


def best_speed(kernel: Kernel, sides: Sides, runs: Runs, rates: np.ndarray) -> float:
    """Of ``SPEEDS``, the one whose surrogate's deviations from its mean explain most of the runs' own.

    Args:
        kernel, sides: of the examples.
        runs: recorded; the first few are tried.
        rates: relative learning rates, ``[steps]``.
    """
    tried = runs[:_TRIAL_RUNS]
    true, batches = tried.losses.astype(np.float64), Batches.of(tried.curricula)
    wanted = _deviations(true)
    scores = []
    for losses in _speeds(kernel, sides, batches, rates):
        found = np.where(np.isfinite(wanted), _deviations(losses), 0.0)
        size, along = (found**2).sum(), max(0.0, float(np.nansum(found * wanted)))  # the wrong way round is no help
        scores.append(along**2 / size if 0 < size < np.inf else 0.0)
    return SPEEDS[int(np.argmax(scores))]


def _speeds(kernel: Kernel, sides: Sides, batches: Batches, rates: np.ndarray) -> Iterator[np.ndarray]:
    """Losses at each of ``SPEEDS``; a surrogate that is too fast overflows, which its user sees in the numbers."""
    for speed in SPEEDS:
        with np.errstate(all="ignore"):
            yield surrogate_losses(kernel, sides, batches, speed * rates)


def _deviations(losses: np.ndarray) -> np.ndarray:
    """From the mean over runs, where any run goes on so long."""
    counts = np.maximum(np.isfinite(losses).sum(0), 1)
    return losses - np.nansum(losses, axis=0) / counts


def _given(examples: Examples | None, side: str, purpose: str) -> tuple[np.ndarray, np.ndarray]:
    """Features in double precision, and targets."""
    features, targets = (None, None) if examples is None else (examples.features, examples.targets)
    for name, values in (("features", features), ("targets", targets)):
        if values is None:
            raise InvalidInput(
                f"{purpose} compares examples by their features, and the {side} examples of these runs have no {name}: "
                f"runs.with_examples({side}=Examples(ids, features=…, targets=…)) gives them"
            )
    return np.asarray(features, np.float64), np.asarray(targets)


def _one_hot(targets: list[np.ndarray]) -> list[np.ndarray]:
    values = np.unique(np.concatenate(targets))
    return [(side[:, None] == values).astype(np.float64) for side in targets]
