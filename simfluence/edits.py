"""Edits: small frozen objects that turn one curriculum into another, for what-if questions.

A target selects training examples: a filter over their metadata (a string), a boolean mask, or a list of rows or of
ids. Where the ids are numbers themselves, write ``rows=`` or ``ids=``: ``Remove(ids=[17, 4])``. Every edit takes a
``name``, which stands for it in tables and titles.
``fill`` says how to handle the slots that an edit frees or adds:

    "shrink"     the batch shrinks (or grows); the other batches and the number of steps do not change. A batch that
                 shrinks to nothing is a step without an update.
    "repack"     all slots form one stream, which is cut into batches of the original sizes: the order of the other
                 examples does not change, and the number of steps follows the number of slots.
    "resample"   every batch keeps its size: freed slots are filled from the remaining examples of the curriculum, in
                 shuffled passes over them; added examples replace others, drawn at random with ``seed``.

Applying an edit never changes the original; a sequence of edits composes. With "shrink", ``Remove``, ``Keep`` and
``Repeat`` of disjoint targets commute, and so do removals with "repack". Edits of equal content are equal.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import InitVar, dataclass, field
from typing import Any, ClassVar

import numpy as np

from simfluence._internal.checked import checked
from simfluence._internal.slots import insert_slots, marked_slots, rebatched, selected, sizes_of
from simfluence._internal.targets import Selection, as_target, one_target
from simfluence._internal.types import Target
from simfluence.curriculum import Curriculum
from simfluence.errors import InvalidInput, did_you_mean
from simfluence.examples import Examples

__all__ = [
    "EDITS",
    "FILLS",
    "Concatenate",
    "Edit",
    "Insert",
    "Keep",
    "Move",
    "Remove",
    "Reorder",
    "Repeat",
    "Shuffle",
    "Swap",
    "Truncate",
    "apply_all",
]

#: Ways to handle the slots that an edit frees or adds.
FILLS = ("shrink", "repack", "resample")


@dataclass(frozen=True)
class Edit(ABC):
    """A function from curriculum to curriculum that prints as a sentence.

    Raises:
        InvalidInput: an argument of an edit has the wrong type or is out of range.
    """

    kind: ClassVar[str]
    name: str | None = field(default=None, kw_only=True, compare=False)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "apply" in vars(cls):
            setattr(cls, "apply", checked(cls.apply))  # noqa: B010 (a class's own method is replaced on purpose)

    def __post_init__(self) -> None:
        for name in self._fields():
            object.__setattr__(self, name, _CHECKS[name](name, getattr(self, name)))  # frozen

    @abstractmethod
    def sentence(self) -> str:
        """Describe the edit in words, such as "remove examples where label == 3"."""

    def __str__(self) -> str:
        return self.name or self.sentence()

    @abstractmethod
    def apply(self, curriculum: Curriculum, examples: Examples | None = None) -> Curriculum:
        """Return the edited curriculum.

        Args:
            curriculum: the original, which is not changed.
            examples: the training examples, needed for targets given as a filter or as ids.

        Raises:
            InvalidInput: the target is unknown or matches nothing, no example would be left, or a step is beyond the
                end.
        """

    def to_dict(self) -> dict[str, Any]:
        """Return the edit as plain content for YAML and JSON, which ``from_dict`` reads.

        >>> Remove([3, 17], fill="repack").to_dict()
        {'edit': 'remove', 'target': [3, 17], 'fill': 'repack'}
        """
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        defaults = {entry.name: entry.default for entry in dataclasses.fields(self)}
        content = {name: _plain(value) for name, value in values.items() if value != defaults[name]}
        label = {"name": content.pop("name")} if "name" in content else {}
        return {"edit": self.kind} | content | label

    @staticmethod
    def from_dict(content: Any) -> Edit:
        """Build the edit that a mapping describes.

        Raises:
            InvalidInput: the edit or an argument is unknown, or an argument is missing or out of range.
        """
        if not isinstance(content, Mapping):
            raise InvalidInput(f"an edit is a mapping such as {{edit: remove, target: label == 3}}, got {content!r}")
        arguments = {str(name): value for name, value in content.items()}
        kind = str(arguments.pop("edit", None))
        if kind not in EDITS:
            raise InvalidInput(f"unknown edit {kind!r}, {did_you_mean(kind, EDITS)}: write it as 'edit: remove'")
        fields = EDITS[kind]._fields()
        accepted = {**fields, **({"rows": False, "ids": False} if issubclass(EDITS[kind], Targeted) else {})}
        for name in arguments:
            if name not in accepted:
                raise InvalidInput(f"edit {kind!r} takes no {name!r}, {did_you_mean(name, accepted)}")
        missing = [name for name, required in fields.items() if required and name not in arguments]
        if "target" in fields and not {"target", "rows", "ids"} & arguments.keys():
            missing = ["target", *(name for name in missing if name != "target")]
        if missing:
            raise InvalidInput(f"edit {kind!r} needs {' and '.join(missing)}")
        checks = _CHECKS | {"rows": lambda name, value: value, "ids": lambda name, value: value}
        return EDITS[kind](**{name: checks[name](name, value) for name, value in arguments.items()})

    @classmethod
    def _fields(cls) -> dict[str, bool]:
        """Map the name of each argument to whether it is required."""
        return {entry.name: entry.default is dataclasses.MISSING for entry in dataclasses.fields(cls)}


@dataclass(frozen=True)
class Targeted(Edit):
    """An edit of some training examples, which can also be given as ``rows=`` or ``ids=``."""

    target: Target = ()
    rows: InitVar[Any] = field(default=None, kw_only=True)
    ids: InitVar[Any] = field(default=None, kw_only=True)

    def __post_init__(self, rows: Any, ids: Any) -> None:
        listed = isinstance(self.target, list | tuple)
        target = None if listed and len(self.target) == 0 else self.target
        object.__setattr__(self, "target", one_target(target, rows, ids))
        super().__post_init__()


@dataclass(frozen=True)
class Remove(Targeted):
    """Never show the target.

    >>> Remove([2]).apply(Curriculum([[0, 2], [2], [1, 0]])).tolist()
    [[0], [], [1, 0]]
    >>> Remove([2], fill="repack").apply(Curriculum([[0, 2], [2, 1], [1, 0]])).tolist()
    [[0, 1], [1, 0]]
    """

    kind = "remove"
    fill: str = "shrink"
    seed: int = 0

    def apply(self, curriculum: Curriculum, examples: Examples | None = None) -> Curriculum:
        return _restricted(self, ~marked_slots(self.target, curriculum, examples), curriculum)

    def sentence(self) -> str:
        return f"remove {_sentence(self.target)}{_fill_note(self)}"


@dataclass(frozen=True)
class Keep(Targeted):
    """Show nothing but the target.

    >>> Keep([0, 1], fill="resample").apply(Curriculum([[0, 2], [2, 1]])).sizes.tolist()
    [2, 2]
    """

    kind = "keep"
    fill: str = "shrink"
    seed: int = 0

    def apply(self, curriculum: Curriculum, examples: Examples | None = None) -> Curriculum:
        return _restricted(self, marked_slots(self.target, curriculum, examples), curriculum)

    def sentence(self) -> str:
        return f"keep only {_sentence(self.target)}{_fill_note(self)}"


@dataclass(frozen=True)
class Repeat(Targeted):
    """Show the target ``times`` times as often: each of its slots becomes ``times`` slots, in its batch or stream.

    With ``fill="resample"`` the additional showings replace other examples, anywhere in the curriculum.

    >>> Repeat([2], times=3).apply(Curriculum([[0, 2], [1, 0]])).tolist()
    [[0, 2, 2, 2], [1, 0]]
    """

    kind = "repeat"
    times: int = 2
    fill: str = "shrink"
    seed: int = 0

    def apply(self, curriculum: Curriculum, examples: Examples | None = None) -> Curriculum:
        marked = marked_slots(self.target, curriculum, examples)
        if self.fill == "resample":
            return self._replace_others(curriculum, marked)
        copies = np.where(marked, self.times, 1)
        ends = np.concatenate([[0], np.cumsum(copies)])[curriculum.offsets]
        return rebatched(self.fill, np.repeat(curriculum.indices, copies), np.diff(ends), curriculum)

    def _replace_others(self, curriculum: Curriculum, marked: np.ndarray) -> Curriculum:
        additional = np.repeat(curriculum.indices[marked], self.times - 1)
        others = np.flatnonzero(~marked)
        if len(additional) > len(others):
            raise InvalidInput(
                f"'{self}' needs {len(additional)} more slots, but other examples have only {len(others)}: "
                "give a smaller times=, or fill='shrink'"
            )
        indices = curriculum.indices.copy()
        indices[np.random.default_rng(self.seed).choice(others, len(additional), replace=False)] = additional
        return Curriculum.from_flat(indices, curriculum.sizes, curriculum.n_train)

    def sentence(self) -> str:
        return f"show {_sentence(self.target)} {self.times} times as often{_fill_note(self)}"


@dataclass(frozen=True)
class Insert(Targeted):
    """Show the target once more in batch ``at`` (−1: the last); an index listed twice is shown twice.

    >>> Insert([2], at=1).apply(Curriculum([[0, 1], [1, 2]])).tolist()
    [[0, 1], [2, 1, 2]]
    >>> Insert([2], at=1, fill="repack").apply(Curriculum([[0, 1], [1, 2]])).tolist()
    [[0, 1], [2, 1], [2]]
    """

    kind = "insert"
    at: int = -1
    fill: str = "shrink"
    seed: int = 0

    def apply(self, curriculum: Curriculum, examples: Examples | None = None) -> Curriculum:
        added = selected(self.target, curriculum, examples)
        at = _step(self, curriculum)
        if self.fill == "resample":
            return self._replace_others(curriculum, added, at)
        return insert_slots(added, at, self.fill, curriculum.indices, curriculum.sizes, curriculum)

    def _replace_others(self, curriculum: Curriculum, added: np.ndarray, at: int) -> Curriculum:
        size = int(curriculum.sizes[at])
        if len(added) > size:
            raise InvalidInput(f"'{self}': {len(added)} examples do not fit a batch of {size}: use another fill=")
        indices = curriculum.indices.copy()
        slots = curriculum.offsets[at] + np.random.default_rng(self.seed).choice(size, len(added), replace=False)
        indices[slots] = added
        return Curriculum.from_flat(indices, curriculum.sizes, curriculum.n_train)

    def sentence(self) -> str:
        return f"show {_sentence(self.target)} once more {_where(self.at)}{_fill_note(self)}"


@dataclass(frozen=True)
class Move(Targeted):
    """Take the target out of its batches and show it equally often in batch ``to`` (0: the first, −1: the last).

    ``fill`` is "shrink" or "repack".

    >>> Move([2], to=0).apply(Curriculum([[0, 1], [1, 2], [2]])).tolist()
    [[2, 2, 0, 1], [1], []]
    """

    kind = "move"
    to: int = 0
    fill: str = "shrink"

    def __post_init__(self, rows: Any, ids: Any) -> None:
        super().__post_init__(rows, ids)
        if self.fill == "resample":
            raise InvalidInput("a move frees as many slots as it fills: use fill='shrink' or 'repack'")

    def apply(self, curriculum: Curriculum, examples: Examples | None = None) -> Curriculum:
        marked = marked_slots(self.target, curriculum, examples)
        to = _step(self, curriculum)
        moved = curriculum.indices[marked]
        return insert_slots(
            moved, to, self.fill, curriculum.indices[~marked], sizes_of(curriculum, ~marked), curriculum
        )

    def sentence(self) -> str:
        return f"move {_sentence(self.target)} to {_where(self.to).removeprefix('in ')}{_fill_note(self)}"


@dataclass(frozen=True)
class Reorder(Edit):
    """Show ``first``, then ``then``, then all other examples, each group in its present order.

    The sorted slots are cut into batches of the original sizes.

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
            raise InvalidInput(f"'{self}': example {both[0]} is in both targets ({len(both)} such examples)")
        rank = np.where(first, 0, np.where(then, 1, 2))
        order = np.argsort(rank, kind="stable")
        return Curriculum.from_flat(curriculum.indices[order], curriculum.sizes, curriculum.n_train)

    def sentence(self) -> str:
        return f"show {_sentence(self.first)} first" + ("" if self.then is None else f", then {_sentence(self.then)}")


@dataclass(frozen=True)
class Swap(Edit):
    """Replace ``target`` by ``by``: its k-th example by the k-th of ``by``, starting over where ``by`` has fewer.

    ``by`` also keeps its own slots.

    >>> Swap([0, 1], by=[2]).apply(Curriculum([[0, 1], [2, 0]])).tolist()
    [[2, 2], [2, 2]]
    """

    kind = "swap"
    target: Target
    by: Target

    def apply(self, curriculum: Curriculum, examples: Examples | None = None) -> Curriculum:
        target, by = (selected(part, curriculum, examples) for part in (self.target, self.by))
        if both := sorted({*target.tolist()} & {*by.tolist()}):
            raise InvalidInput(f"'{self}': example {both[0]} is in both targets ({len(both)} such examples)")
        replacement = np.arange(curriculum.n_train)
        replacement[target] = np.resize(by, len(target))
        return Curriculum.from_flat(replacement[curriculum.indices], curriculum.sizes, curriculum.n_train)

    def sentence(self) -> str:
        return f"swap {_sentence(self.target)} for {_sentence(self.by)}"


@dataclass(frozen=True)
class Shuffle(Edit):
    """Shuffle all slots of the curriculum; the batches keep their sizes.

    >>> Shuffle(seed=0).apply(Curriculum([[0, 1], [2, 3]])).tolist()
    [[2, 0], [1, 3]]
    """

    kind = "shuffle"
    seed: int = 0

    def apply(self, curriculum: Curriculum, examples: Examples | None = None) -> Curriculum:
        shuffled = np.random.default_rng(self.seed).permutation(curriculum.indices)
        return Curriculum.from_flat(shuffled, curriculum.sizes, curriculum.n_train)

    def sentence(self) -> str:
        return f"shuffle the order of all slots (seed {self.seed})"


@dataclass(frozen=True)
class Truncate(Edit):
    """Stop after ``steps`` steps.

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

    def sentence(self) -> str:
        return f"stop after {self.steps} steps"


@dataclass(frozen=True)
class Concatenate(Edit):
    """Append batches: those of another curriculum, or a list of lists of training indices.

    >>> Concatenate([[2], [0]]).apply(Curriculum([[0, 1]], n_train=3)).tolist()
    [[0, 1], [2], [0]]
    """

    kind = "concatenate"
    batches: Any

    def apply(self, curriculum: Curriculum, examples: Examples | None = None) -> Curriculum:
        return Curriculum([*curriculum, *self.batches], curriculum.n_train)

    def sentence(self) -> str:
        return f"continue for {len(self.batches)} more steps"


#: Every edit by its name in files.
EDITS: dict[str, type[Edit]] = {
    edit.kind: edit
    for edit in (Remove, Keep, Repeat, Insert, Move, Reorder, Swap, Shuffle, Truncate, Concatenate)
}  # fmt: skip


def apply_all(edits: Iterable[Edit], curriculum: Curriculum, examples: Examples | None = None) -> Curriculum:
    """Apply all edits in turn and return the curriculum."""
    for edit in edits:
        curriculum = edit.apply(curriculum, examples)
    return curriculum


def _step(edit: Insert | Move, curriculum: Curriculum) -> int:
    """Return the number of the batch that an edit names, counted from 0."""
    step = edit.at if isinstance(edit, Insert) else edit.to
    if not -len(curriculum) <= step < len(curriculum):
        raise InvalidInput(f"'{edit}': batches go from 0 to {len(curriculum) - 1} (−1: the last)")
    return step % len(curriculum)


def _restricted(edit: Remove | Keep, remains: np.ndarray, curriculum: Curriculum) -> Curriculum:
    """Return the curriculum with only the slots that ``remains`` marks."""
    if not remains.any():
        raise InvalidInput(f"'{edit}' would leave no example in the curriculum")
    if edit.fill == "resample":
        indices, rng = curriculum.indices.copy(), np.random.default_rng(edit.seed)
        remaining, count = np.unique(indices[remains]), int((~remains).sum())
        passes = [rng.permutation(remaining) for _ in range(-(-count // len(remaining)))]
        indices[~remains] = np.concatenate(passes)[:count] if count else remaining[:0]
        return Curriculum.from_flat(indices, curriculum.sizes, curriculum.n_train)
    return rebatched(edit.fill, curriculum.indices[remains], sizes_of(curriculum, remains), curriculum)


def _sentence(target: Target) -> str:
    if isinstance(target, str):
        return f"examples where {target}"
    values = target.values if isinstance(target, Selection) else list(target)
    shown = ", ".join(str(value) for value in values[:5])
    return f"examples {shown}{', …' if len(values) > 5 else ''} ({len(values)})"


def _fill_note(edit: Remove | Keep | Repeat | Insert | Move) -> str:
    """Return the part of the sentence about ``fill``; empty for the default."""
    if edit.fill == "repack":
        return ", and re-batch the stream"
    if edit.fill == "shrink" or isinstance(edit, Move):
        return ""
    frees_slots = isinstance(edit, Remove | Keep)
    note = "filling their slots from the rest" if frees_slots else "replacing others"
    return f", {note} (seed {edit.seed})"


def _where(step: int) -> str:
    return {0: "in the first batch", -1: "in the last batch"}.get(step, f"in batch {step}")


def _optional_target(name: str, value: Any) -> Target | None:
    return None if value is None else as_target(name, value)


def _optional_name(name: str, value: Any) -> str | None:
    if value is not None and not (isinstance(value, str) and value.strip()):
        raise InvalidInput(f"{name} must be a text, got {value!r}")
    return value


def _known_fill(name: str, value: Any) -> str:
    if not isinstance(value, str) or value not in FILLS:
        raise InvalidInput(f"unknown fill {value!r}, {did_you_mean(str(value), FILLS)}")
    return str(value)


def _whole(least: int | None, note: str = "") -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or (least is not None and value < least):
            expected = "a whole number" if least is None else f"a whole number from {least} up"
            raise InvalidInput(f"{name} must be {expected}, got {value!r}{note}")
        return int(value)

    return check


def _batches(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    curriculum = value if isinstance(value, Curriculum) else Curriculum(value)
    return tuple(tuple(batch) for batch in curriculum.tolist())


#: Check of each argument, by name; the same for every edit.
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "target": as_target, "first": as_target, "then": _optional_target, "by": as_target, "fill": _known_fill,
    "name": _optional_name,
    "times": _whole(1, "; Remove takes examples out"), "at": _whole(None), "to": _whole(None),
    "seed": _whole(0), "steps": _whole(1), "batches": _batches,
}  # fmt: skip


def _plain(value: Any) -> Any:
    if isinstance(value, Selection):
        return value.to_dict()
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value
