"""The ``Curriculum``, which says what training examples each batch has, and random curricula."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse

from simfluence._internal.validation import checked_indices
from simfluence.errors import InvalidInput

__all__ = ["Curriculum", "random_curricula"]


class Curriculum:
    """The training examples of every batch, in order. Frozen; equal and hashed by content.

    ``curriculum[t]`` is batch t as an int array, t = 0…T−1; it carries the losses of time t to those of
    time t + 1. Batches may differ in size; an empty batch is a step without an update.

    Args:
        batches: one sequence of training indices per step (or an int array ``[steps, batch]``).
        n_train: number of training examples; by default one more than the largest index.

    Raises:
        InvalidInput: the curriculum has no step or no example, or an index is not an integer in ``0…n_train−1``.

    >>> curriculum = Curriculum([[0, 2], [1], []], n_train=3)
    >>> len(curriculum), curriculum[0]
    (3, array([0, 2], dtype=int32))
    >>> curriculum.counts.toarray()
    array([[1, 0, 1],
           [0, 1, 0],
           [0, 0, 0]])
    """

    def __init__(self, batches: Iterable[Any], n_train: int | None = None) -> None:
        rows = [_as_indices(batch, step) for step, batch in enumerate(batches)]
        indices = np.concatenate(rows) if rows else np.empty(0, np.int64)
        self._set(indices, np.array([len(row) for row in rows], np.int64), n_train)

    @classmethod
    def from_flat(cls, indices: np.ndarray, sizes: np.ndarray, n_train: int) -> Curriculum:
        """Build a curriculum from its batches laid end to end, ``indices``, and their ``sizes``."""
        self = cls.__new__(cls)
        self._set(np.asarray(indices), np.asarray(sizes, np.int64), n_train)
        return self

    def _set(self, indices: np.ndarray, sizes: np.ndarray, n_train: int | None) -> None:
        _check(indices, sizes, n_train)
        self.n_train = int(indices.max()) + 1 if n_train is None else int(n_train)
        self.indices = _frozen(indices.astype(np.int32))  # [slots] of all batches, end to end
        self.offsets = _frozen(np.concatenate([[0], np.cumsum(sizes)]))  # [steps + 1]

    @property
    def sizes(self) -> np.ndarray:
        """Number of examples in each batch, ``[steps]``."""
        return np.diff(self.offsets)

    @cached_property
    def counts(self) -> scipy.sparse.csr_array:
        """Count of each example in each batch, sparse ``[steps, train]``."""
        ones = np.ones(len(self.indices), np.int64)
        matrix = scipy.sparse.csr_array((ones, self.indices, self.offsets), (len(self), self.n_train))
        matrix = matrix.copy()  # sum_duplicates works in place, and the curriculum's arrays are frozen
        matrix.sum_duplicates()
        return matrix

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content, the same on every machine."""
        digest = hashlib.sha256(f"curriculum {self.n_train} {len(self)}".encode())
        digest.update(self.offsets.astype("<i8").tobytes())
        digest.update(self.indices.astype("<i4").tobytes())
        return digest.hexdigest()

    def tolist(self) -> list[list[int]]:
        """Return the batches as plain lists, for JSON and YAML."""
        return [batch.tolist() for batch in self]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, step: int) -> np.ndarray:
        if not -len(self) <= step < len(self):
            raise IndexError(f"step {step} is out of range: the curriculum has {len(self)} steps")
        step = step % len(self)
        return self.indices[self.offsets[step] : self.offsets[step + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[step] for step in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Curriculum) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[Any, ...]:
        return Curriculum.from_flat, (self.indices, self.sizes, self.n_train)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__:
            raise AttributeError(f"a Curriculum is frozen: {name} cannot be set; build a new one or apply an edit")
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        sizes = f"{self.sizes.min()}" if np.ptp(self.sizes) == 0 else f"{self.sizes.min()}–{self.sizes.max()}"
        seen = len(np.unique(self.indices))
        return f"Curriculum(steps={len(self)}, batch={sizes}, examples={seen} of {self.n_train})"


def random_curricula(
    n_train: int,
    runs: int,
    steps: int,
    batch_size: int,
    subset: float | int = 1.0,
    seed: int = 0,
    *,
    replacement: bool = False,
    sort_by: Any = None,
    descending: bool = False,
    stages: Sequence[Any] | None = None,
) -> list[Curriculum]:
    """Draw random curricula as in Guu et al. (2023): each run trains on its own random subset.

    By default the subset is reshuffled every epoch; the epochs are laid end to end and cut into batches of
    ``batch_size``, so the counts of two examples of the subset differ by at most one.
    Run r depends on ``seed`` and r alone: asking for more runs does not change the first ones.

    Args:
        n_train: number of training examples.
        runs, steps, batch_size: number of curricula, of batches per curriculum, and of examples per batch.
        subset: a fraction of the training examples (float in (0, 1]) or their number (int).
        seed: any non-negative integer.
        replacement: fill every slot with an independent draw from the subset, with replacement, without epochs.
        sort_by: one value per training example: every epoch goes from the smallest to the largest value, ties
            shuffled.
        descending: sort from the largest to the smallest.
        stages: lists of training indices, one per stage. The steps are split evenly over the stages; a stage's
            batches come from the examples of its list that are in the subset.

    Raises:
        InvalidInput: an argument is out of range, or a stage has no example of a run's subset.

    >>> random_curricula(n_train=10, runs=2, steps=3, batch_size=2, subset=0.5, seed=0)[0]
    Curriculum(steps=3, batch=2, examples=5 of 10)
    >>> random_curricula(n_train=4, runs=1, steps=4, batch_size=1, stages=[[2], [3]])[0].tolist()
    [[2], [2], [3], [3]]
    """
    _check_positive(n_train=n_train, runs=runs, steps=steps, batch_size=batch_size)
    if seed < 0:
        raise InvalidInput(f"seed must not be negative, got {seed}")
    size = _subset_size(n_train, subset)
    ranks = None if sort_by is None else _ranks(sort_by, descending, n_train, replacement)
    members = [np.arange(n_train)] if stages is None else [checked_indices(stage, n_train) for stage in stages]
    if not 1 <= len(members) <= steps:
        raise InvalidInput(f"{len(members)} stages for {steps} steps: give at least one stage, and a step per stage")
    lengths = [len(part) * batch_size for part in np.array_split(np.arange(steps), len(members))]
    curricula = []
    for run in range(runs):
        rng = np.random.default_rng([seed, run])
        chosen = rng.choice(n_train, size=size, replace=False)
        streams = [
            _stream(rng, _stage_members(chosen, stage, number, run), length, replacement, ranks)
            for number, (stage, length) in enumerate(zip(members, lengths, strict=True))
        ]
        curricula.append(Curriculum.from_flat(np.concatenate(streams), np.full(steps, batch_size), n_train))
    return curricula


def _stream(
    rng: np.random.Generator, members: np.ndarray, length: int, replacement: bool, ranks: np.ndarray | None
) -> np.ndarray:
    """Fill ``length`` slots from ``members``, epoch by epoch or with replacement."""
    if replacement:
        return rng.choice(members, size=length)
    epochs = [rng.permutation(members) for _ in range(-(-length // len(members)))]
    if ranks is not None:
        epochs = [epoch[np.argsort(ranks[epoch], kind="stable")] for epoch in epochs]
    return np.concatenate(epochs)[:length]


def _ranks(sort_by: Any, descending: bool, n_train: int, replacement: bool) -> np.ndarray:
    """Return the ascending sort key of each training example."""
    values = np.asarray(sort_by)
    if replacement:
        raise InvalidInput("sort_by orders epochs, but replacement=True has no epochs: choose one of the two")
    if values.shape != (n_train,):
        raise InvalidInput(f"sort_by must have one value for each of {n_train} training examples, got {values.shape}")
    ranks = np.unique(values, return_inverse=True)[1]
    return -ranks if descending else ranks


def _stage_members(chosen: np.ndarray, stage: np.ndarray, number: int, run: int) -> np.ndarray:
    members = chosen[np.isin(chosen, stage)]
    if len(members) == 0:
        raise InvalidInput(f"stage {number} has no example in the subset of run {run}: give a larger subset=")
    return members


def _subset_size(n_train: int, subset: float | int) -> int:
    is_fraction = isinstance(subset, float | np.floating)
    size = round(subset * n_train) if is_fraction and 0 < subset <= 1 else 0 if is_fraction else int(subset)
    if not 1 <= size <= n_train:
        raise InvalidInput(
            f"subset={subset!r} of {n_train} training examples: "
            "give a fraction (a float in (0, 1]) or a number of examples (an int)"
        )
    return size


def _check_positive(**values: int) -> None:
    bad = [f"{name}={value!r}" for name, value in values.items() if value < 1]
    if bad:
        raise InvalidInput(f"must be 1 or more: {', '.join(bad)}")


def _as_indices(batch: Any, step: int) -> np.ndarray:
    array = np.asarray(batch)
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InvalidInput(f"batch {step} must be a sequence of integer training indices, got {batch!r}")
    return array


def _check(indices: np.ndarray, sizes: np.ndarray, n_train: int | None) -> None:
    if len(indices) == 0:
        raise InvalidInput(f"the curriculum is empty: {len(sizes)} steps without a training example")
    if sizes.sum() != len(indices) or sizes.min() < 0:
        raise InvalidInput(f"batch sizes add up to {sizes.sum()}, but the curriculum has {len(indices)} slots")
    limit = np.iinfo(np.int32).max if n_train is None else n_train
    bad = np.flatnonzero((indices < 0) | (indices >= limit))
    if len(bad):
        step = int(np.searchsorted(np.cumsum(sizes), bad[0], side="right"))
        raise InvalidInput(f"batch {step} names training example {indices[bad[0]]}: indices go from 0 to {limit - 1}")


def _frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array
