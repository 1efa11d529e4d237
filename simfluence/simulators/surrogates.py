"""Surrogates: small learners that are trained on the same curriculum in the model's place.

A surrogate is a kernel machine on the examples' features. Its outputs f on all examples start at 0, and each batch
moves them by its residuals (functional gradient descent on the surrogate's own loss):

    f(x) ← f(x) + speed · ρ_t / |c_t| · Σ_{i∈c_t} k(x, i) r_i,      r_i = y_i − softmax(f(i))   or   2 (y_i − f(i))

with ρ_t the recipe's learning rate relative to its peak. Neither the real model nor its gradients are used. The
surrogate's losses are not those of the model, but they differ between curricula in much the same way: examples seen
before teach little, similar ones help, dissimilar ones hurt. So the surrogate's deviations from its mean over the
fitting runs predict much of the model's.
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

__all__ = ["KERNELS", "SPEEDS", "Batches", "Kernel", "Sides", "best_speed", "surrogate_losses"]

#: arccos is the tangent kernel of a wide network with one hidden ReLU layer (Cho & Saul 2009; Jacot et al. 2018).
KERNELS = ("arccos", "linear", "rbf")
#: Learning rates that ``best_speed`` chooses from.
SPEEDS: tuple[float, ...] = tuple(0.0125 * 2**k for k in range(11))

_BIAS = 0.1  # of "linear" and "arccos"; inputs have a mean squared norm of 1
_CACHED_ENTRIES = 30_000_000  # largest kernel matrix held in memory: 240 MB
_TYPICAL_PAIRS = 1000  # examples whose distances give the width of "rbf"
_TRIAL_RUNS = 6  # runs to choose a speed on


@dataclass(frozen=True)
class Sides:
    """Features and targets of the training and the test examples.

    Args:
        train, test: features, ``[examples, features]``, divided by the root mean square norm of the training features.
        train_targets, test_targets: ``[examples, outputs]``; one-hot for classes.
        classes: whether targets are classes, learned by cross-entropy, or numbers, learned by squared error. Numbers
            of two whole values, such as the 0.0 and 1.0 of a binary cross-entropy, are classes.
    """

    train: np.ndarray
    test: np.ndarray
    train_targets: np.ndarray
    test_targets: np.ndarray
    classes: bool

    @classmethod
    def of(cls, train: Examples | None, test: Examples | None, purpose: str) -> Sides:
        """Check and scale the features and targets of a set of runs.

        Args:
            train, test: the runs' examples.
            purpose: what needs the features, for error messages.

        Raises:
            InvalidInput: features or targets are missing, or those of training and test examples differ in kind.
        """
        pairs = [_features_and_targets(train, "train", purpose), _features_and_targets(test, "test", purpose)]
        features, targets = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        if features[0].shape[1] != features[1].shape[1] or targets[0].shape[1:] != targets[1].shape[1:]:
            raise InvalidInput(
                f"train and test features or targets differ in width: {features[0].shape} and {features[1].shape}, "
                f"{targets[0].shape} and {targets[1].shape}"
            )
        integer = [values.dtype.kind in "iub" for values in targets]
        if integer[0] != integer[1]:
            raise InvalidInput(
                f"train targets are {targets[0].dtype} and test targets {targets[1].dtype}: use integers in both for "
                "classes, or floats in both"
            )
        scale = np.sqrt((features[0] ** 2).sum(1).mean()) or 1.0
        if _are_two_classes(targets):
            targets = [values.reshape(len(values)).astype(np.int64) for values in targets]
        classes = targets[0].ndim == 1 and targets[0].dtype.kind in "iub"
        columns = _one_hot(targets) if classes else [t.reshape(len(t), -1).astype(np.float64) for t in targets]
        return cls(features[0] / scale, features[1] / scale, columns[0], columns[1], classes)

    def losses(self, outputs: np.ndarray) -> np.ndarray:
        """Return the test losses, ``[…, test]``, of outputs ``[…, test, outputs]``."""
        if self.classes:
            total = torch.logsumexp(torch.from_numpy(outputs), dim=-1).numpy()  # several times as fast as SciPy's
            return np.asarray(total - np.einsum("...o,...o", outputs, self.test_targets))
        return np.asarray(((outputs - self.test_targets) ** 2).mean(-1))

    def residuals(self, outputs: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Return the residuals, ``[…, outputs]``, of training examples ``indices`` ``[…]`` with these outputs."""
        targets = self.train_targets[indices]
        if self.classes:
            return np.asarray(targets - torch.softmax(torch.from_numpy(outputs), dim=-1).numpy())
        return np.asarray(2 * (targets - outputs))


@dataclass(frozen=True)
class Batches:
    """Curricula of any shape as padded arrays.

    Args:
        indices: training examples, ``[runs, steps, largest batch]``; padding is 0.
        weights: ``1/|c_t|``, ``[runs, steps, largest batch]``; padding is 0.
    """

    indices: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, curricula: Sequence[Curriculum]) -> Batches:
        steps = max(len(curriculum) for curriculum in curricula)
        width = max(1, *(int(curriculum.sizes.max()) for curriculum in curricula))
        indices, weights = np.zeros((len(curricula), steps, width), np.int64), np.zeros((len(curricula), steps, width))
        for run, curriculum in enumerate(curricula):
            filled = np.arange(width) < curriculum.sizes[:, None]  # [steps, width]
            indices[run, : len(curriculum)][filled] = curriculum.indices
            weights[run, : len(curriculum)] = filled / np.maximum(curriculum.sizes, 1)[:, None]
        return cls(indices, weights)


class Kernel:
    """The kernel k(x, i) between all examples x, the training examples first, and training examples i."""

    def __init__(self, kind: str, sides: Sides) -> None:
        self._kind = kind
        self._all = np.concatenate([sides.train, sides.test])
        self._norms = (self._all**2).sum(1) + _BIAS
        sample = sides.train[:: max(1, len(sides.train) // _TYPICAL_PAIRS)]
        self._width = float(np.median(pdist(sample))) if len(sample) > 1 else 1.0
        small = len(self._all) * len(sides.train) <= _CACHED_ENTRIES
        self._matrix = self._between(np.arange(len(sides.train))) if small else None

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Return the kernel of training examples ``[…]`` with all examples, ``[…, train + test]``."""
        if self._matrix is None:
            return self._between(indices.ravel()).reshape(*indices.shape, -1)
        return np.asarray(self._matrix[indices])

    def _between(self, indices: np.ndarray) -> np.ndarray:
        left = self._all[indices]
        if self._kind == "rbf":
            return np.asarray(np.exp(-cdist(left, self._all, "sqeuclidean") / (2 * (self._width or 1.0) ** 2)))
        products = left @ self._all.T + _BIAS
        if self._kind == "linear":
            return np.asarray(products)
        scale = np.sqrt(np.outer(self._norms[indices], self._norms))
        cosine = np.clip(products / scale, -1, 1)
        angle = np.pi - np.arccos(cosine)
        return np.asarray((scale * (np.sqrt(1 - cosine**2) + angle * cosine) + products * angle) / np.pi)


def surrogate_losses(kernel: Kernel, sides: Sides, batches: Batches, rates: np.ndarray) -> np.ndarray:
    """Train a surrogate on each curriculum; return its test losses, ``[runs, steps + 1, test]``.

    Args:
        kernel, sides: kernel, features and targets of the examples.
        batches: the curricula.
        rates: speed times relative learning rate of every step, ``[steps]``.
    """
    runs, steps, _ = batches.indices.shape
    n_train = len(sides.train)
    outputs = np.zeros((runs, n_train + len(sides.test), sides.train_targets.shape[1]))
    losses = np.empty((runs, steps + 1, len(sides.test)))
    rows = np.arange(runs)[:, None]
    losses[:, 0] = sides.losses(outputs[:, n_train:])
    for step in range(steps):
        batch = batches.indices[:, step]  # [runs, batch]
        residuals = sides.residuals(outputs[rows, batch], batch) * batches.weights[:, step, :, None]
        outputs += kernel.rows(batch).swapaxes(1, 2) @ (rates[step] * residuals)
        losses[:, step + 1] = sides.losses(outputs[:, n_train:])
    return losses


def best_speed(kernel: Kernel, sides: Sides, runs: Runs, rates: np.ndarray) -> float:
    """Choose from ``SPEEDS`` the one whose surrogate's deviations from its mean explain most of those of the runs.

    Args:
        kernel, sides: kernel, features and targets of the examples.
        runs: recorded runs; only the first few are used.
        rates: relative learning rates, ``[steps]``.
    """
    trials = runs[:_TRIAL_RUNS]
    true = _deviations(trials.losses.astype(np.float64))
    scores = []
    for losses in _losses_at_speeds(kernel, sides, Batches.of(trials.curricula), rates):
        simulated = np.where(np.isfinite(true), _deviations(losses), 0.0)
        size = float((simulated**2).sum())
        product = max(0.0, float(np.nansum(simulated * true)))  # a negative correlation is no help
        scores.append(product**2 / size if 0 < size < np.inf else 0.0)
    return SPEEDS[int(np.argmax(scores))]


def _losses_at_speeds(kernel: Kernel, sides: Sides, batches: Batches, rates: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the losses at each of ``SPEEDS``; a surrogate that is too fast overflows to inf or NaN."""
    for speed in SPEEDS:
        with np.errstate(all="ignore"):
            yield surrogate_losses(kernel, sides, batches, speed * rates)


def _deviations(losses: np.ndarray) -> np.ndarray:
    """Subtract the mean over the runs that have a loss at the time."""
    counts = np.maximum(np.isfinite(losses).sum(0), 1)
    return np.asarray(losses - np.nansum(losses, axis=0) / counts)


def _features_and_targets(examples: Examples | None, split: str, purpose: str) -> tuple[np.ndarray, np.ndarray]:
    """Return features, in double precision, and targets."""
    features, targets = (None, None) if examples is None else (examples.features, examples.targets)
    for name, values in (("features", features), ("targets", targets)):
        if values is None:
            raise InvalidInput(
                f"{purpose} compares examples by their features, but the {split} examples of these runs have no "
                f"{name}: add them with runs.with_examples({split}=Examples(ids, features=…, targets=…))"
            )
    return np.asarray(features, np.float64), np.asarray(targets)


def _are_two_classes(targets: list[np.ndarray]) -> bool:
    """Decide whether targets are floating-point numbers of two whole values, one for each example."""
    if any(values.dtype.kind != "f" or values.size != len(values) for values in targets):
        return False
    values = np.unique(np.concatenate([part.ravel() for part in targets]))
    return len(values) == 2 and bool((values == np.round(values)).all())


def _one_hot(targets: list[np.ndarray]) -> list[np.ndarray]:
    classes = np.unique(np.concatenate(targets))
    return [(labels[:, None] == classes).astype(np.float64) for labels in targets]
