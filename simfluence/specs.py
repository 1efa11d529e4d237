"""Specifications in YAML: what to record. Data only: tags that would build objects are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from simfluence import tasks
from simfluence._spec import Spec
from simfluence.curriculum import Curriculum, random_curricula
from simfluence.errors import InvalidInput
from simfluence.recipe import Recipe
from simfluence.task import Task


class TaskSpec(Spec):
    """A ready-made task by name."""

    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)

    def build(self) -> Task:
        return tasks.build(self.name, **self.arguments)


class CurriculaSpec(Spec):
    """The arguments of ``random_curricula`` without the number of training examples, which the task says."""

    runs: int = Field(ge=1)
    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    subset: float | int = 1.0
    seed: int = Field(0, ge=0)

    def build(self, n_train: int) -> list[Curriculum]:
        return random_curricula(n_train, **self.model_dump())


class RecordingSpec(Spec):
    """All that ``record`` needs.

    >>> RecordingSpec.parse("task: {name: digits}\\nrecipe: {lr: 0.1}\\n"
    ...                     "curricula: {runs: 2, steps: 9, batch_size: 4}").recipe.lr
    0.1
    """

    task: TaskSpec
    recipe: Recipe = Recipe()
    curricula: CurriculaSpec

    @classmethod
    def read(cls, path: str | Path) -> RecordingSpec:
        """The specification in a file.

        Raises:
            InvalidInput: there is no such file, or its content is not a specification; every bad key is named.
        """
        try:
            return cls.parse(Path(path).read_text("utf-8"))
        except (OSError, UnicodeDecodeError, InvalidInput) as error:
            raise InvalidInput(f"{path}: {error}") from None

    @classmethod
    def parse(cls, text: str) -> RecordingSpec:
        """The specification in a YAML text."""
        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InvalidInput(f"not plain YAML: {error}") from None
        if not isinstance(content, dict):
            raise InvalidInput("expected the keys task, recipe and curricula")
        return cls(**content)
