"""Specifications in YAML of recordings and what-if queries.

They are plain data: aliases, and tags that would build objects, are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pydantic
import yaml
from pydantic import Field, field_validator

from simfluence import tasks
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


class TaskSpec(Spec):
    """A ready-made task by name."""

    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)

    def build(self) -> Task:
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
        stages = self.stages if self.stages is not None else [(value,) for value in sorted(set(values))]
        members = [[i for i, value in enumerate(values) if value in stage] for stage in stages]
        for stage, stage_members in zip(stages, members, strict=True):
            if not stage_members:
                raise InvalidInput(f"curricula.stages: no training example has {self.column} in {list(stage)}")
        return self._random(train, stages=members)


class ExplicitCurricula(CurriculaSpec):
    """Curricula given as their batches, ``[run][step][slot]``."""

    kind = "explicit"
    curricula: tuple[tuple[tuple[int, ...], ...], ...] = Field(min_length=1)

    @classmethod
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
    def read(cls: type[SpecT], path: str | Path) -> SpecT:
        """Read the specification from a file.

        Raises:
            InvalidInput: the file does not exist or is not a specification; the message names every bad key.
        """
        try:
            return cls.parse(Path(path).read_text("utf-8"))
        except (OSError, UnicodeDecodeError, InvalidInput) as error:
            raise InvalidInput(f"{path}: {error}") from None

    @classmethod
    def parse(cls: type[SpecT], text: str) -> SpecT:
        """Parse the specification from YAML text."""
        try:
            content = yaml.load(text, _PlainLoader)  # noqa: S506 (a subclass of SafeLoader)
        except (yaml.YAMLError, RecursionError) as error:
            raise InvalidInput(f"not plain YAML: {error}") from None
        if not isinstance(content, dict):
            raise InvalidInput(f"not a mapping with the keys {', '.join(cls.model_fields)}")
        return cls(**{str(name): value for name, value in content.items()})


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
        if kind not in CURRICULA:
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


class _PlainLoader(yaml.SafeLoader):
    """A safe YAML loader that refuses aliases, with which a few lines could expand to gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed", event.start_mark)
        return super().compose_node(parent, index)


def _lists(content: Any) -> Any:
    """Convert tuples to lists, because plain YAML has no tuples."""
    if isinstance(content, dict):
        return {name: _lists(value) for name, value in content.items()}
    return [_lists(value) for value in content] if isinstance(content, tuple | list) else content
