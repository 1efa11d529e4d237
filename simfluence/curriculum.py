"""The ``Curriculum``, which says what training examples each batch has, and random curricula."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Annotated, Any

import numpy as np
import pandas as pd
import scipy.sparse
from annotated_types import Interval

from simfluence._internal.checked import checked, shown
from simfluence._internal.columns import plain_column
from simfluence._internal.types import Count, Seed
from simfluence.errors import InvalidInput

__all__ = ["Curriculum", "random_curricula"]

#: Largest number of training examples, and of slots that ``random_curricula`` draws: indices are stored as int32.
_MOST = 2**31 - 1

TrainCount = Annotated[int, Interval(ge=1, le=_MOST)]


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

    @checked
    def __init__(self, batches: Iterable[Any], n_train: TrainCount | None = None) -> None:
        if getattr(batches, "ndim", 1) == 0:  # an array of NumPy or torch
            raise InvalidInput("batches must have one sequence of training indices per step, got a single number")
        rows = [_as_indices(f"batch {step}", batch) for step, batch in enumerate(batches)]
        indices = np.concatenate(rows) if rows else np.empty(0, np.int64)
        self._set(indices, np.array([len(row) for row in rows], np.int64), n_train)

    @classmethod
    @checked
    def from_flat(
        cls, indices: np.ndarray | Sequence[Any], sizes: np.ndarray | Sequence[Any], n_train: TrainCount
    ) -> Curriculum:
        """Build a curriculum from its batches laid end to end.

        Args:
            indices: training indices of all batches, ``[slots]``.
            sizes: number of examples in each batch, ``[steps]``.
            n_train: number of training examples.

        Raises:
            InvalidInput: an index or a size is no whole number, an index is out of range, or the sizes do not add up to
                the number of indices.

        >>> Curriculum.from_flat(np.array([0, 2, 1]), np.array([2, 1]), n_train=3).tolist()
        [[0, 2], [1]]
        """
        self = cls.__new__(cls)
        self._set(_as_indices("indices", indices), _whole_numbers("sizes", sizes, "batch sizes"), n_train)
        return self

    def _set(self, indices: np.ndarray, sizes: np.ndarray, n_train: int | None) -> None:
        _check(indices, sizes, n_train)
        self.n_train = int(indices.max()) + 1 if n_train is None else n_train
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


@checked
def random_curricula(
    n_train: TrainCount,
    runs: Count,
    steps: Count,
    batch_size: Count,
    subset: int | float = 1.0,
    seed: Seed = 0,
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
        InvalidInput: an argument is out of range, the curricula have 2³¹ slots or more together, a value of ``sort_by``
            is missing or not comparable with the others, or a stage has no example of a run's subset.

    >>> random_curricula(n_train=10, runs=2, steps=3, batch_size=2, subset=0.5, seed=0)[0]
    Curriculum(steps=3, batch=2, examples=5 of 10)
    >>> random_curricula(n_train=4, runs=1, steps=4, batch_size=1, stages=[[2], [3]])[0].tolist()
    [[2], [2], [3], [3]]
    """
    if runs * steps * batch_size > _MOST:
        raise InvalidInput(
            f"runs={runs}, steps={steps} and batch_size={batch_size} make {runs * steps * batch_size:,} slots, which "
            f"do not fit into memory: ask for {_MOST:,} at most"
        )
    size = _subset_size(n_train, subset)
    ranks = None if sort_by is None else _ranks(sort_by, descending, n_train, replacement)
    members = [np.arange(n_train)] if stages is None else _stages(stages, n_train)
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
    """Return the ascending sort key of each training example, ``[train]``."""
    if replacement:
        raise InvalidInput("sort_by orders epochs, but replacement=True has no epochs: choose one of the two")
    ranks = _sort_column(sort_by, n_train).rank(method="dense").to_numpy(np.int64)
    return -ranks if descending else ranks


def _sort_column(sort_by: Any, n_train: int) -> pd.Series:
    """Return the values of ``sort_by`` as a column of one kind: numbers, text, dates or ordered categories."""
    try:
        values = sort_by if isinstance(sort_by, pd.Series) else pd.Series(_one_axis(sort_by))
    except (TypeError, ValueError, RuntimeError):
        raise InvalidInput(f"sort_by must be a list or an array, got {shown(sort_by)}") from None
    if len(values) != n_train:
        raise InvalidInput(f"sort_by must have one value for each of {n_train} training examples, got {len(values)}")
    missing = np.flatnonzero(values.isna())
    if len(missing):
        raise InvalidInput(f"sort_by has no value (NaN or None) for training example {missing[0]}: fill it")
    column = values if isinstance(values.dtype, pd.CategoricalDtype) and values.dtype.ordered else plain_column(values)
    if column.dtype == object:
        kinds = sorted({type(value).__name__ for value in column})
        raise InvalidInput(f"sort_by has values that cannot be sorted ({', '.join(kinds)}): give only numbers or text")
    return column.reset_index(drop=True)


def _one_axis(values: Any) -> Any:
    """Return the values of a list or an array with one axis, NumPy's where it is another library's.

    A list stays a list: NumPy would make numbers beside text into text.
    """
    if isinstance(values, Sequence | pd.Index) and not isinstance(values, str | bytes):
        return values
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(array.shape)
    return array.astype(array.dtype.newbyteorder("="))


def _stages(stages: Sequence[Any], n_train: int) -> list[np.ndarray]:
    """Return the training indices of each stage."""
    members = [_as_indices(f"stage {number}", stage) for number, stage in enumerate(stages)]
    for number, stage in enumerate(members):
        if len(stage) == 0:
            raise InvalidInput(f"stage {number} has no example: give it one or more, or leave it out")
        if stage.max() >= n_train:
            raise InvalidInput(f"stage {number} has no example {stage.max()}: indices go from 0 to {n_train - 1}")
    return members


def _stage_members(chosen: np.ndarray, stage: np.ndarray, number: int, run: int) -> np.ndarray:
    members = chosen[np.isin(chosen, stage)]
    if len(members) == 0:
        raise InvalidInput(f"stage {number} has no example in the subset of run {run}: give a larger subset=")
    return members


def _subset_size(n_train: int, subset: float | int) -> int:
    is_fraction = isinstance(subset, float)
    size = round(subset * n_train) if is_fraction and 0 < subset <= 1 else 0 if is_fraction else int(subset)
    if not 1 <= size <= n_train:
        raise InvalidInput(
            f"subset={subset!r} of {n_train} training examples: "
            "give a fraction (a float in (0, 1]) or a number of examples (an int)"
        )
    return size


def _as_indices(name: str, values: Any) -> np.ndarray:
    """Return training indices from 0 to 2³¹ − 2, ``[n]``."""
    array = _whole_numbers(name, values, "integer training indices")
    if array.size and array.max() >= _MOST:
        raise InvalidInput(f"{name} has {array.max()}: training indices go from 0 to {_MOST - 1}")
    return array


def _whole_numbers(name: str, values: Any, what: str) -> np.ndarray:
    """Return whole numbers from 0 up as an int64 array, ``[n]``."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # such as lists of different lengths
        array = np.asarray(None)
    plain = array.ndim == 1 and (array.dtype.kind in "iu" or array.size == 0)
    if plain and isinstance(values, list | tuple):  # NumPy takes True in a list of numbers for 1
        plain = not any(isinstance(value, bool | np.bool_) for value in values)
    if not plain:
        raise InvalidInput(f"{name} must be a sequence of {what}, got {shown(values)}")
    outside = array[(array < 0) | (array >= 2**63)]
    if len(outside):
        raise InvalidInput(f"{name} has {outside[0]}: {what} go from 0 to {_MOST - 1}")
    return array.astype(np.int64)


def _check(indices: np.ndarray, sizes: np.ndarray, n_train: int | None) -> None:
    if len(indices) == 0:
        raise InvalidInput(f"the curriculum is empty: {len(sizes)} steps without a training example")
    if sizes.max(initial=0) > len(indices) or sizes.sum() != len(indices):  # the sum of larger ones could overflow
        raise InvalidInput(f"batch sizes do not add up to the number of indices, {len(indices)}")
    limit = _MOST if n_train is None else n_train
    bad = np.flatnonzero(indices >= limit)
    if len(bad):
        step = int(np.searchsorted(np.cumsum(sizes), bad[0], side="right"))
        raise InvalidInput(f"batch {step} names training example {indices[bad[0]]}: indices go from 0 to {limit - 1}")


def _frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array
