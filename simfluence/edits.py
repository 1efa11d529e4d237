"""Edits: small frozen objects that make one curriculum out of another, for what-if questions.

A target says which training examples are meant: a filter over their metadata (a text), a list of indices, or a list
of ids. ``fill`` says what becomes of places that an edit frees or adds:

    "shrink"     the batch shrinks (or grows), and every other batch stays as it is: as many steps as before. A batch
                 that shrinks to nothing is a step without an update.
    "repack"     the stream closes up (or makes room) and is cut anew into batches of the sizes that were: the order of
                 the rest stays, the number of steps follows the number of places.
    "resample"   every batch keeps its size: freed places are filled from the remaining examples of the curriculum,
                 in shuffled passes over them; added ones take the places of others, drawn at random. ``seed`` says how.

Applying an edit never changes the original; a sequence of edits composes. With "shrink", ``Remove``, ``Keep`` and
``Repeat`` of disjoint targets commute, and so do removals with "repack". Edits of equal content are equal.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from simfluence._internal.slots import insert_slots, marked_slots, rebatched, selected, sizes_of
from simfluence._internal.types import Target
from simfluence.curriculum import Curriculum
from simfluence.errors import InvalidInput, did_you_mean
from simfluence.examples import Examples

#: What may become of places that an edit frees or adds.
FILLS = ("shrink", "repack", "resample")


@dataclass(frozen=True)
class Edit(ABC):
    """A function from curriculum to curriculum that prints as a sentence.

    Raises:
        InvalidInput: (of every edit) an argument of another kind, or out of range.
    """

    kind: ClassVar[str]

    def __post_init__(self) -> None:
        for name in self._fields():
            object.__setattr__(self, name, _CHECKS[name](name, getattr(self, name)))  # frozen

    @abstractmethod
    def apply(self, curriculum: Curriculum, examples: Examples | None = None) -> Curriculum:
        """The edited curriculum.

        Args:
            curriculum: the original; it stays as it is.
            examples: the training examples, needed for targets given as a filter or as ids.

        Raises:
            InvalidInput: the target is unknown, matches nothing, or nothing would be left; a step beyond the end.
        """

    def to_dict(self) -> dict[str, Any]:
        """Plain content for YAML and JSON; ``from_dict`` reads it.

        >>> Remove([3, 17], fill="repack").to_dict()
        {'edit': 'remove', 'target': [3, 17], 'fill': 'repack'}
        """
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {"edit": self.kind} | {name: _plain(v) for name, v in given.items() if v != defaults[name]}

    @staticmethod
    def from_dict(content: Any) -> Edit:
        """The edit that a mapping says.

        Raises:
            InvalidInput: an unknown edit or argument, one that is missing, or one out of range.
        """
        if not isinstance(content, Mapping):
            raise InvalidInput(f"an edit is a mapping such as {{edit: remove, target: label == 3}}, got {content!r}")
        given = {str(name): value for name, value in content.items()}
        kind = str(given.pop("edit", None))
        if kind not in EDITS:
            raise InvalidInput(f"unknown edit {kind!r}, {did_you_mean(kind, EDITS)}: write it as 'edit: remove'")
        fields = EDITS[kind]._fields()
        for name in given:
            if name not in fields:
                raise InvalidInput(f"edit {kind!r} takes no {name!r}, {did_you_mean(name, fields)}")
        missing = [name for name, needed in fields.items() if needed and name not in given]
        if missing:
            raise InvalidInput(f"edit {kind!r} needs {' and '.join(missing)}")
        return EDITS[kind](**{name: _CHECKS[name](name, value) for name, value in given.items()})

    @classmethod
    def _fields(cls) -> dict[str, bool]:
        """Names of the arguments, and whether each must be given."""
        return {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(cls)}


@dataclass(frozen=True)
class Remove(Edit):
    """Never show the target.

    >>> Remove([2]).apply(Curriculum([[0, 2], [2], [1, 0]])).tolist()
    [[0], [], [1, 0]]
    >>> Remove([2], fill="repack").apply(Curriculum([[0, 2], [2, 1], [1, 0]])).tolist()
    [[0, 1], [1, 0]]
    """

    kind = "remove"
    target: Target
    fill: str = "shrink"
    seed: int = 0

    def apply(self, curriculum: Curriculum, examples: Examples | None = None) -> Curriculum:
        return _kept(self, ~marked_slots(self.target, curriculum, examples), curriculum)

    def __str__(self) -> str:
        return f"remove {_said(self.target)}{_filled(self)}"


@dataclass(frozen=True)
class Keep(Edit):
    """Show nothing but the target.

    >>> Keep([0, 1], fill="resample").apply(Curriculum([[0, 2], [2, 1]])).sizes.tolist()
    [2, 2]
    """

    kind = "keep"
    target: Target
    fill: str = "shrink"
    seed: int = 0

    def apply(self, curriculum: Curriculum, examples: Examples | None = None) -> Curriculum:
        return _kept(self, marked_slots(self.target, curriculum, examples), curriculum)

    def __str__(self) -> str:
        return f"keep only {_said(self.target)}{_filled(self)}"


@dataclass(frozen=True)
class Repeat(Edit):
    """Show the target ``times`` as often: each of its places becomes ``times`` of them, in its batch or stream.

    With ``fill="resample"`` the further showings take the places of others, anywhere in the curriculum.

    >>> Repeat([2], times=3).apply(Curriculum([[0, 2], [1, 0]])).tolist()
    [[0, 2, 2, 2], [1, 0]]
    """

    kind = "repeat"
    target: Target
    times: int = 2
    fill: str = "shrink"
    seed: int = 0

    def apply(self, curriculum: Curriculum, examples: Examples | None = None) -> Curriculum:
        marked = marked_slots(self.target, curriculum, examples)
        if self.fill == "resample":
            return self._in_place_of_others(curriculum, marked)
        copies = np.where(marked, self.times, 1)
        ends = np.concatenate([[0], np.cumsum(copies)])[curriculum.offsets]
        return rebatched(self.fill, np.repeat(curriculum.indices, copies), np.diff(ends), curriculum)

    def _in_place_of_others(self, curriculum: Curriculum, marked: np.ndarray) -> Curriculum:
        further = np.repeat(curriculum.indices[marked], self.times - 1)
        others = np.flatnonzero(~marked)
        if len(further) > len(others):
            raise InvalidInput(
                f"'{self}' needs {len(further)} more places, but other examples have only {len(others)}: "
                "fewer times, or fill='shrink'"
            )
        indices = curriculum.indices.copy()
        indices[np.random.default_rng(self.seed).choice(others, len(further), replace=False)] = further
        return Curriculum.from_flat(indices, curriculum.sizes, curriculum.n_train)

    def __str__(self) -> str:
        return f"show {_said(self.target)} {self.times} times as often{_filled(self)}"


@dataclass(frozen=True)
class Insert(Edit):
    """Show the target once more in batch ``at`` (−1: the last); an index that is listed twice is shown twice.

    >>> Insert([2], at=1).apply(Curriculum([[0, 1], [1, 2]])).tolist()
    [[0, 1], [2, 1, 2]]
    >>> Insert([2], at=1, fill="repack").apply(Curriculum([[0, 1], [1, 2]])).tolist()
    [[0, 1], [2, 1], [2]]
    """

    kind = "insert"
    target: Target
    at: int
    fill: str = "shrink"
    seed: int = 0

    def apply(self, curriculum: Curriculum, examples: Examples | None = None) -> Curriculum:
        added = selected(self.target, curriculum, examples)
        at = _step(self, curriculum)
        if self.fill == "resample":
            return self._in_place_of_others(curriculum, added, at)
        return insert_slots(added, at, self.fill, curriculum.indices, curriculum.sizes, curriculum)

    def _in_place_of_others(self, curriculum: Curriculum, added: np.ndarray, at: int) -> Curriculum:
        size = int(curriculum.sizes[at])
        if len(added) > size:
            raise InvalidInput(f"'{self}': {len(added)} examples for a batch of {size}: fill='shrink' or 'repack'")
        indices = curriculum.indices.copy()
        places = curriculum.offsets[at] + np.random.default_rng(self.seed).choice(size, len(added), replace=False)
        indices[places] = added
        return Curriculum.from_flat(indices, curriculum.sizes, curriculum.n_train)

    def __str__(self) -> str:
        return f"show {_said(self.target)} once more {_where(self.at)}{_filled(self)}"


@dataclass(frozen=True)
class Move(Edit):
    """Take the target out of its batches and show it, as often, in batch ``to`` (0: the first, −1: the last).

    ``fill`` is "shrink" or "repack".

    >>> Move([2], to=0).apply(Curriculum([[0, 1], [1, 2], [2]])).tolist()
    [[2, 2, 0, 1], [1], []]
    """

    kind = "move"
    target: Target
    to: int
    fill: str = "shrink"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fill == "resample":
            raise InvalidInput("a move frees as many places as it takes: fill is 'shrink' or 'repack'")

    def apply(self, curriculum: Curriculum, examples: Examples | None = None) -> Curriculum:
        marked = marked_slots(self.target, curriculum, examples)
        to = _step(self, curriculum)
        moved = curriculum.indices[marked]
        return insert_slots(
            moved, to, self.fill, curriculum.indices[~marked], sizes_of(curriculum, ~marked), curriculum
        )

    def __str__(self) -> str:
        return f"move {_said(self.target)} to {_where(self.to).removeprefix('in ')}{_filled(self)}"


@dataclass(frozen=True)
class Reorder(Edit):
    """Show ``first`` before everything else, and then ``then`` before the rest, each in its present order.

    The places, laid end to end, are sorted so, and cut into batches of the same sizes as before.

    >>> Reorder(first=[2]).apply(Curriculum([[0, 1], [2, 0], [1, 2]])).tolist()
    [[2, 2], [0, 1], [0, 1]]
    """

    kind = "reorder"
    first: Target
    then: Target | None = None

    def apply(self, curriculum: Curriculum, examples: Examples | None = None) -> Curriculum:
        first = marked_slots(self.first, curriculum, examples)
        then = np.zeros_like(first) if self.then is None else marked_slots(self.then, curriculum, examples)
        if (first & then).any():
            both = np.unique(curriculum.indices[first & then])
            raise InvalidInput(f"'{self}': example {both[0]} is in both targets ({len(both)} such)")
        rank = np.where(first, 0, np.where(then, 1, 2))
        order = np.argsort(rank, kind="stable")
        return Curriculum.from_flat(curriculum.indices[order], curriculum.sizes, curriculum.n_train)

    def __str__(self) -> str:
        return f"show {_said(self.first)} first" + ("" if self.then is None else f", then {_said(self.then)}")


@dataclass(frozen=True)
class Swap(Edit):
    """Show ``by`` in the places of ``target``: the k-th of the one for the k-th of the other, from the first again
    where ``by`` has fewer. ``by`` keeps the places that it has.

    >>> Swap([0, 1], by=[2]).apply(Curriculum([[0, 1], [2, 0]])).tolist()
    [[2, 2], [2, 2]]
    """

    kind = "swap"
    target: Target
    by: Target

    def apply(self, curriculum: Curriculum, examples: Examples | None = None) -> Curriculum:
        target, by = (selected(each, curriculum, examples) for each in (self.target, self.by))
        if both := sorted({*target.tolist()} & {*by.tolist()}):
            raise InvalidInput(f"'{self}': example {both[0]} is in both targets ({len(both)} such)")
        now = np.arange(curriculum.n_train)
        now[target] = np.resize(by, len(target))
        return Curriculum.from_flat(now[curriculum.indices], curriculum.sizes, curriculum.n_train)

    def __str__(self) -> str:
        return f"swap {_said(self.target)} for {_said(self.by)}"


@dataclass(frozen=True)
class Shuffle(Edit):
    """Show all in another order: the places, laid end to end, shuffled, in batches of the same sizes as before.

    >>> Shuffle(seed=0).apply(Curriculum([[0, 1], [2, 3]])).tolist()
    [[2, 0], [1, 3]]
    """

    kind = "shuffle"
    seed: int = 0

    def apply(self, curriculum: Curriculum, examples: Examples | None = None) -> Curriculum:
        shuffled = np.random.default_rng(self.seed).permutation(curriculum.indices)
        return Curriculum.from_flat(shuffled, curriculum.sizes, curriculum.n_train)

    def __str__(self) -> str:
        return f"shuffle the order of all places (seed {self.seed})"


@dataclass(frozen=True)
class Truncate(Edit):
    """Stop after so many steps.

    >>> Truncate(1).apply(Curriculum([[0, 1], [2, 0]])).tolist()
    [[0, 1]]
    """

    kind = "truncate"
    steps: int

    def apply(self, curriculum: Curriculum, examples: Examples | None = None) -> Curriculum:
        if self.steps > len(curriculum):
            raise InvalidInput(f"'{self}': the curriculum has {len(curriculum)} steps")
        end = int(curriculum.offsets[self.steps])
        if end == 0:
            raise InvalidInput(f"'{self}' would leave no example in the curriculum")
        return Curriculum.from_flat(curriculum.indices[:end], curriculum.sizes[: self.steps], curriculum.n_train)

    def __str__(self) -> str:
        return f"stop after {self.steps} steps"


@dataclass(frozen=True)
class Concatenate(Edit):
    """Go on with further batches: those of another curriculum, or a list of lists of training indices.

    >>> Concatenate([[2], [0]]).apply(Curriculum([[0, 1]], n_train=3)).tolist()
    [[0, 1], [2], [0]]
    """

    kind = "concatenate"
    batches: Any

    def apply(self, curriculum: Curriculum, examples: Examples | None = None) -> Curriculum:
        return Curriculum([*curriculum, *self.batches], curriculum.n_train)

    def __str__(self) -> str:
        return f"go on for {len(self.batches)} more steps"


#: Every edit by its name in files.
EDITS: dict[str, type[Edit]] = {
    each.kind: each
    for each in (Remove, Keep, Repeat, Insert, Move, Reorder, Swap, Shuffle, Truncate, Concatenate)
}  # fmt: skip


def apply_all(edits: Iterable[Edit], curriculum: Curriculum, examples: Examples | None = None) -> Curriculum:
    """The curriculum after all edits, one after the other."""
    for edit in edits:
        curriculum = edit.apply(curriculum, examples)
    return curriculum


def _step(edit: Insert | Move, curriculum: Curriculum) -> int:
    """The batch that an edit names, from 0."""
    named = edit.at if isinstance(edit, Insert) else edit.to
    if not -len(curriculum) <= named < len(curriculum):
        raise InvalidInput(f"'{edit}': batches go from 0 to {len(curriculum) - 1} (−1: the last)")
    return named % len(curriculum)


def _kept(edit: Remove | Keep, kept: np.ndarray, curriculum: Curriculum) -> Curriculum:
    """The curriculum without the places that are not ``kept``."""
    if not kept.any():
        raise InvalidInput(f"'{edit}' would leave no example in the curriculum")
    if edit.fill == "resample":
        indices, rng = curriculum.indices.copy(), np.random.default_rng(edit.seed)
        remaining, count = np.unique(indices[kept]), int((~kept).sum())
        passes = [rng.permutation(remaining) for _ in range(-(-count // len(remaining)))]
        indices[~kept] = np.concatenate(passes)[:count] if count else remaining[:0]
        return Curriculum.from_flat(indices, curriculum.sizes, curriculum.n_train)
    return rebatched(edit.fill, curriculum.indices[kept], sizes_of(curriculum, kept), curriculum)


def _said(target: Target) -> str:
    if isinstance(target, str):
        return f"examples where {target}"
    shown = ", ".join(str(name) for name in list(target)[:5])
    return f"examples {shown}{', …' if len(target) > 5 else ''} ({len(target)})"


def _filled(edit: Remove | Keep | Repeat | Insert | Move) -> str:
    """What the sentence says of ``fill``, where it is not the usual one."""
    if edit.fill == "repack":
        return ", and cut the stream anew"
    if edit.fill == "shrink" or isinstance(edit, Move):
        return ""
    freed = isinstance(edit, Remove | Keep)
    said = "filling their places from the rest" if freed else "in the places of others"
    return f", {said} (seed {edit.seed})"


def _where(step: int) -> str:
    return {0: "in the first batch", -1: "in the last batch"}.get(step, f"in batch {step}")


def _target(name: str, value: Any) -> Target:
    if isinstance(value, str):
        return value
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, Sequence):
        raise InvalidInput(f"{name}: a target is a filter (a text) or a list of indices or ids, got {value!r}")
    return tuple(each.item() if isinstance(each, np.generic) else each for each in value)


def _optional_target(name: str, value: Any) -> Target | None:
    return None if value is None else _target(name, value)


def _known_fill(name: str, value: Any) -> str:
    if value not in FILLS:
        raise InvalidInput(f"unknown fill {value!r}, {did_you_mean(str(value), FILLS)}")
    return str(value)


def _whole(least: int | None, note: str = "") -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or (least is not None and value < least):
            wanted = "a whole number" if least is None else f"{least} or more"
            raise InvalidInput(f"{name} must be {wanted}, got {value!r}{note}")
        return int(value)

    return check


def _batches(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    try:
        found = value if isinstance(value, Curriculum) else Curriculum(value)
    except TypeError:
        raise InvalidInput(f"{name}: a Curriculum, or a list of lists of indices, got {value!r}") from None
    return tuple(tuple(batch) for batch in found.tolist())


#: What each argument must be, whichever edit has it.
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "target": _target, "first": _target, "then": _optional_target, "by": _target, "fill": _known_fill,
    "times": _whole(1, "; Remove takes examples out"), "at": _whole(None), "to": _whole(None),
    "seed": _whole(0), "steps": _whole(1), "batches": _batches,
}  # fmt: skip


def _plain(value: Any) -> Any:
    return [_plain(each) for each in value] if isinstance(value, tuple) else value
