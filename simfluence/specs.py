"""Specifications in YAML of recordings and what-if queries.

They are plain data: aliases, and tags that would build objects, are refused. The size of a file and the sizes that it
asks for are bounded, because a file may be a stranger's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pydantic
import yaml
from pydantic import Field, field_validator, model_validator

from simfluence import tasks
from simfluence._internal.checked import checked
from simfluence._internal.files import size_of
from simfluence._internal.spec import InvalidSpec, Spec
from simfluence.curriculum import Curriculum, random_curricula
from simfluence.edits import Edit
from simfluence.errors import InvalidInput, did_you_mean
from simfluence.examples import Examples
from simfluence.recipe import Recipe
from simfluence.recording import Observe
from simfluence.task import Task

__all__ = [
    "CURRICULA",
    "CurriculaSpec",
    "ExplicitCurricula",
    "FileSpec",
    "RecordingSpec",
    "ReplacementCurricula",
    "SortedCurricula",
    "StagedCurricula",
    "SubsetCurricula",
    "TaskSpec",
    "WhatIfSpec",
]

#: What a file may ask for at most. Python code may ask for more.
MOST_BYTES = 2**24
MOST_VALUES = 300_000
MOST_NESTED = 20
MOST_RUNS = 100_000
MOST_SLOTS = 10**8  # of all runs together: runs × steps × batch_size
_MOST_BITS = 64  # of a whole number


class TaskSpec(Spec):
    """A ready-made task by name."""

    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)

    def build(self) -> Task:
        if "name" in self.arguments:
            raise InvalidInput(f"task {self.name!r} takes no argument 'name'")
        return tasks.build(self.name, **self.arguments)


class CurriculaSpec(Spec):
    """Curricula of one kind, which ``build`` makes for a task's training examples."""

    kind: ClassVar[str]

    def build(self, train: Examples) -> list[Curriculum]:
        """Build the curricula.

        Raises:
            InvalidInput: the specification does not fit the examples.
        """
        raise NotImplementedError


class SubsetCurricula(CurriculaSpec):
    """Curricula on a random subset per run, reshuffled every epoch; see ``random_curricula``."""

    kind = "subset"
    runs: int = Field(ge=1)
    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    subset: float | int = 1.0
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _bounded(self) -> SubsetCurricula:
        slots = self.runs * self.steps * self.batch_size
        if self.runs > MOST_RUNS or slots > MOST_SLOTS:
            said = (
                f"{self.runs} runs of {self.steps} batches of {self.batch_size} examples are too many: a file may ask "
                f"for {MOST_RUNS:,} runs and for {MOST_SLOTS:,} examples in all their batches"
            )
            raise InvalidSpec("curricula", {"runs": said})
        return self

    def build(self, train: Examples) -> list[Curriculum]:
        return self._random(train)

    def _random(self, train: Examples, **options: Any) -> list[Curriculum]:
        return random_curricula(
            len(train), self.runs, self.steps, self.batch_size, subset=self.subset, seed=self.seed, **options
        )


class ReplacementCurricula(SubsetCurricula):
    """Curricula whose slots are drawn independently from the subset, with replacement."""

    kind = "replacement"

    def build(self, train: Examples) -> list[Curriculum]:
        return self._random(train, replacement=True)


class SortedCurricula(SubsetCurricula):
    """Curricula whose epochs are sorted by a metadata column of the training examples."""

    kind = "sorted"
    column: str
    descending: bool = False

    def build(self, train: Examples) -> list[Curriculum]:
        return self._random(train, sort_by=train.column(self.column), descending=self.descending)


class StagedCurricula(SubsetCurricula):
    """Curricula with stages, each on the examples that have certain values of a metadata column.

    Without ``stages``, every value of the column is a stage, in ascending order.
    """

    kind = "staged"
    column: str
    stages: tuple[tuple[bool | int | float | str, ...], ...] | None = None

    def build(self, train: Examples) -> list[Curriculum]:
        values = train.column(self.column)
        stages = self.stages if self.stages is not None else [(value,) for value in _ascending(self.column, values)]
        members = [[i for i, value in enumerate(values) if value in stage] for stage in stages]
        for stage, stage_members in zip(stages, members, strict=True):
            if not stage_members:
                raise InvalidInput(f"curricula.stages: no training example has {self.column} in {list(stage)}")
        return self._random(train, stages=members)


def _ascending(column: str, values: Sequence[Any]) -> list[Any]:
    """Return the distinct values of a column in ascending order.

    Raises:
        InvalidInput: the values have no order.
    """
    try:
        return sorted(set(values))
    except TypeError:
        raise InvalidInput(
            f"curricula.column: the values of {column!r} have no order (missing values, or texts beside numbers): "
            "write the values of each stage as curricula.stages"
        ) from None


class ExplicitCurricula(CurriculaSpec):
    """Curricula given as their batches, ``[run][step][slot]``."""

    kind = "explicit"
    curricula: tuple[tuple[tuple[int, ...], ...], ...] = Field(min_length=1)

    @classmethod
    @checked
    def of(cls, curricula: Sequence[Curriculum]) -> ExplicitCurricula:
        return cls(curricula=[curriculum.tolist() for curriculum in curricula])

    def build(self, train: Examples) -> list[Curriculum]:
        return [Curriculum(batches, len(train)) for batches in self.curricula]


#: Kinds of curricula that a file may ask for.
CURRICULA: dict[str, type[CurriculaSpec]] = {
    "subset": SubsetCurricula,
    "replacement": ReplacementCurricula,
    "sorted": SortedCurricula,
    "staged": StagedCurricula,
    "explicit": ExplicitCurricula,
}


SpecT = TypeVar("SpecT", bound="FileSpec")


class FileSpec(Spec):
    """A specification that is a whole file."""

    @classmethod
    @checked
    def read(cls: type[SpecT], path: str | Path) -> SpecT:
        """Read the specification from a file.

        Raises:
            InvalidInput: the file does not exist, is too large or is not a specification; the message names the file,
                the line, and every bad key.
        """
        try:
            size = Path(path).stat().st_size
            if size > MOST_BYTES:
                raise InvalidInput(f"a file of {size_of(size)} is too large for a specification")
            return cls.parse(Path(path).read_text("utf-8"))
        except (OSError, ValueError) as error:  # also of bytes that are not UTF-8, and InvalidInput
            raise InvalidInput(f"{path}: {error}") from None

    @classmethod
    @checked
    def parse(cls: type[SpecT], text: str) -> SpecT:
        """Parse the specification from YAML text.

        Raises:
            InvalidInput: the text is not plain YAML, or not a specification; the message names the place.
        """
        try:
            content = yaml.load(text, _PlainLoader)  # noqa: S506 (a subclass of SafeLoader)
        except yaml.YAMLError as error:
            raise InvalidInput(f"not plain YAML: {_said(error)}") from None
        if not isinstance(content, dict):
            raise InvalidInput(f"not a mapping with the keys {', '.join(cls.model_fields)}")
        try:
            return cls(**{str(name): value for name, value in content.items()})
        except InvalidInput:
            raise
        except (*_UNREADABLE, RecursionError) as error:
            raise InvalidInput(f"a value cannot be used: {error}") from None


class RecordingSpec(FileSpec):
    """The arguments of ``record``. A custom task is not part of the file; pass it where the file is used.

    >>> RecordingSpec.parse("task: {name: digits}\\nrecipe: {lr: 0.1}\\n"
    ...                     "curricula: {runs: 2, steps: 9, batch_size: 4}").recipe.lr
    0.1
    """

    task: TaskSpec | None = None
    recipe: Recipe = Recipe()
    curricula: CurriculaSpec
    observe: Observe = Observe()

    @field_validator("curricula", mode="before")
    @classmethod
    def _of_kind(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        fields = {str(name): value for name, value in content.items()}
        kind = fields.pop("kind", "subset")
        if not isinstance(kind, str) or kind not in CURRICULA:
            problem = {"kind": f"unknown kind {kind!r}, {did_you_mean(str(kind), CURRICULA)}"}
            raise InvalidSpec("curricula", problem)
        return CURRICULA[kind](**fields)

    def dump(self) -> str:
        """Return the YAML text that ``parse`` reads."""
        curricula = {"kind": self.curricula.kind} | self.curricula.model_dump()
        rest = self.model_dump(exclude_defaults=True, exclude={"curricula"})
        return yaml.safe_dump(_lists(rest | {"curricula": curricula}))


class WhatIfSpec(FileSpec):
    """What-if queries by name, each with one edit or several, which are applied in turn.

    >>> spec = WhatIfSpec.parse("queries: {no threes: {edit: remove, target: label == 3}}")
    >>> str(spec.queries["no threes"][0])
    'remove examples where label == 3'
    """

    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)

    queries: dict[str, tuple[Edit, ...]] = Field(min_length=1)

    @field_validator("queries", mode="before")
    @classmethod
    def _as_edits(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        return {str(name): _query(str(name), query) for name, query in content.items()}

    def dump(self) -> str:
        """Return the YAML text that ``parse`` reads."""
        queries = {name: [edit.to_dict() for edit in edits] for name, edits in self.queries.items()}
        return yaml.safe_dump({"queries": queries}, sort_keys=False, allow_unicode=True)


def _query(name: str, content: Any) -> tuple[Edit, ...]:
    listed = content if isinstance(content, list | tuple) else [content]
    if not listed:
        raise InvalidSpec("queries", {name: "a query needs at least one edit"})
    edits = []
    for number, part in enumerate(listed):
        try:
            edits.append(part if isinstance(part, Edit) else Edit.from_dict(part))
        except InvalidInput as error:
            raise InvalidSpec("queries", {f"{name}.{number}": str(error)}) from None
    return tuple(edits)


#: Errors of Python that a YAML loader lets through, such as of dates with a thirteenth month.
_UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)


class _PlainLoader(yaml.SafeLoader):
    """A safe YAML loader of bounded size, which refuses what is not plain.

    It refuses aliases, with which a few lines could expand to gigabytes, keys that appear twice, and values that its
    base class cannot read. Every error has the place.
    """

    _values = _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]  # yaml's stubs lack it
        if self.check_event(yaml.AliasEvent):
            raise _problem("aliases are not allowed", mark)
        self._values += 1
        self._depth += 1
        if self._depth > MOST_NESTED:
            raise _problem(f"lists and mappings are nested more than {MOST_NESTED} deep", mark)
        if self._values > MOST_VALUES:
            raise _problem(f"the file has more than {MOST_VALUES:,} values", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except _UNREADABLE as error:
            raise _problem(f"this value cannot be read ({error})", node.start_mark) from None
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            raise _problem(f"this whole number has more than {_MOST_BITS} bits", node.start_mark)
        return value

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise _problem("a key appears twice in this mapping", node.start_mark)
        return mapping


def _problem(problem: str, mark: Any) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)


def _said(error: yaml.YAMLError) -> str:
    """Return an error of YAML in one line, with its place."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return " ".join(str(error).split())
    return f"{problem} at line {mark.line + 1}, column {mark.column + 1}"


def _lists(content: Any) -> Any:
    """Convert tuples to lists, because plain YAML has no tuples."""
    if isinstance(content, dict):
        return {name: _lists(value) for name, value in content.items()}
    return [_lists(value) for value in content] if isinstance(content, tuple | list) else content
