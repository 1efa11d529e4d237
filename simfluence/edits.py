"""Edits: small frozen objects that make one curriculum out of another, for what-if questions.

Every edit keeps the number of steps. ``target`` is a filter over the training examples' metadata (a text), a list
of indices, or a list of ids. Applying an edit never changes the original; a sequence of edits composes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from simfluence._indices import checked_indices
from simfluence._types import Indices, Target
from simfluence.curriculum import Curriculum
from simfluence.errors import InvalidInput
from simfluence.examples import Examples


class Edit(ABC):
    """A function from curriculum to curriculum that prints as a sentence."""

    @abstractmethod
    def apply(self, curriculum: Curriculum, examples: Examples | None = None) -> Curriculum:
        """The edited curriculum.

        Args:
            curriculum: the original; it stays as it is.
            examples: the training examples, needed for targets given as a filter or as ids.

        Raises:
            InvalidInput: the target is unknown, matches nothing, or nothing would be left.
        """


@dataclass(frozen=True, eq=False)
class Remove(Edit):
    """Never show the target. Batches shrink; one that shrinks to nothing is a step without an update.

    >>> Remove([2]).apply(Curriculum([[0, 2], [2], [1, 0]])).tolist()
    [[0], [], [1, 0]]
    """

    target: Target

    def apply(self, curriculum: Curriculum, examples: Examples | None = None) -> Curriculum:
        kept = ~_marked(self.target, curriculum, examples)
        if not kept.any():
            raise InvalidInput(f"'{self}' would leave no example in the curriculum")
        return _resized(curriculum, kept.astype(np.int64))

    def __str__(self) -> str:
        return f"remove {_said(self.target)}"


@dataclass(frozen=True, eq=False)
class Repeat(Edit):
    """Show the target ``times`` as often: each of its occurrences stands ``times`` in its batch, which grows.

    >>> Repeat([2], times=3).apply(Curriculum([[0, 2], [1, 0]])).tolist()
    [[0, 2, 2, 2], [1, 0]]
    """

    target: Target
    times: int = 2

    def __post_init__(self) -> None:
        if not isinstance(self.times, int) or self.times < 1:
            raise InvalidInput(f"times must be 1 or more, got {self.times}; Remove takes examples out")

    def apply(self, curriculum: Curriculum, examples: Examples | None = None) -> Curriculum:
        marked = _marked(self.target, curriculum, examples)
        return _resized(curriculum, np.where(marked, self.times, 1))

    def __str__(self) -> str:
        return f"show {_said(self.target)} {self.times} times as often"


@dataclass(frozen=True, eq=False)
class Reorder(Edit):
    """Show ``first`` before everything else, and then ``then`` before the rest, each in its present order.

    The places, laid end to end, are sorted so, and cut into batches of the same sizes as before.

    >>> Reorder(first=[2]).apply(Curriculum([[0, 1], [2, 0], [1, 2]])).tolist()
    [[2, 2], [0, 1], [0, 1]]
    """

    first: Target
    then: Target | None = None

    def apply(self, curriculum: Curriculum, examples: Examples | None = None) -> Curriculum:
        first = _marked(self.first, curriculum, examples)
        then = np.zeros_like(first) if self.then is None else _marked(self.then, curriculum, examples)
        if (first & then).any():
            both = np.unique(curriculum.indices[first & then])
            raise InvalidInput(f"'{self}': example {both[0]} is in both targets ({len(both)} such)")
        rank = np.where(first, 0, np.where(then, 1, 2))
        order = np.argsort(rank, kind="stable")
        return Curriculum.from_flat(curriculum.indices[order], curriculum.sizes, curriculum.n_train)

    def __str__(self) -> str:
        return f"show {_said(self.first)} first" + ("" if self.then is None else f", then {_said(self.then)}")


def apply_all(edits: Iterable[Edit], curriculum: Curriculum, examples: Examples | None = None) -> Curriculum:
    """The curriculum after all edits, one after the other."""
    for edit in edits:
        curriculum = edit.apply(curriculum, examples)
    return curriculum


def _selected(target: Target, curriculum: Curriculum, examples: Examples | None) -> Indices:
    """The training indices that ``target`` means."""
    if not isinstance(target, str | Sequence | np.ndarray):
        raise InvalidInput(f"a target is a filter (a text) or a list of indices or ids, got {target!r}")
    if examples is not None:
        if len(examples) != curriculum.n_train:
            raise InvalidInput(
                f"a curriculum of {curriculum.n_train} training examples, but metadata of {len(examples)}"
            )
        return examples.select(target)
    if isinstance(target, str) or any(isinstance(name, str) for name in target):
        raise InvalidInput(f"{target!r} speaks of metadata or ids: give the training examples (task=… or task.train)")
    return checked_indices(target, curriculum.n_train)


def _marked(target: Target, curriculum: Curriculum, examples: Examples | None) -> np.ndarray:
    """Which places of the curriculum hold an example of ``target``."""
    return np.isin(curriculum.indices, _selected(target, curriculum, examples))


def _resized(curriculum: Curriculum, copies: np.ndarray) -> Curriculum:
    """Each place ``copies`` times, in its batch."""
    ends = np.concatenate([[0], np.cumsum(copies)])[curriculum.offsets]
    return Curriculum.from_flat(np.repeat(curriculum.indices, copies), np.diff(ends), curriculum.n_train)


def _said(target: Target) -> str:
    if isinstance(target, str):
        return f"examples where {target}"
    shown = ", ".join(str(name) for name in list(target)[:5])
    return f"examples {shown}{', …' if len(target) > 5 else ''} ({len(target)})"
