"""Checks of a dataclass's fields against their annotations, as ``checked`` does for a function's arguments."""

from __future__ import annotations

import dataclasses
import functools
import typing
from typing import Any

from simfluence._internal.checked import fitting
from simfluence.errors import InvalidInput

__all__ = ["check_fields"]


def check_fields(instance: Any) -> None:
    """Check every field of a frozen dataclass, and convert it to its annotation where that loses nothing.

    Raises:
        InvalidInput: naming the class and the field.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Point:
    ...     x: float
    ...     def __post_init__(self) -> None:
    ...         check_fields(self)
    >>> Point("a")
    Traceback (most recent call last):
    ...
    simfluence.errors.InvalidInput: Point: x must be a number, got 'a'
    """
    for name, hint in _hints(typing.cast("Any", type(instance))).items():
        value = getattr(instance, name)
        try:
            fitted = fitting(name, value, hint)
        except InvalidInput as error:
            raise InvalidInput(f"{type(instance).__name__}: {error}") from None
        if fitted is not value:
            object.__setattr__(instance, name, fitted)  # frozen


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
