"""Every simulator class by its name: a class with a ``name`` of its own is registered when it is defined."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from simfluence.errors import InvalidInput

__all__ = ["SIMULATORS", "register", "registered"]

_ALL: dict[str, type[Any]] = {}
_BUILT_BY_NAME: dict[str, type[Any]] = {}

#: Simulator classes that can be built from their name alone, the library's and the user's, in order of definition.
SIMULATORS: Mapping[str, type[Any]] = MappingProxyType(_BUILT_BY_NAME)


def register(kind: type[Any]) -> None:
    """Register a class under its ``name``. A class defined again, as in a notebook, replaces its earlier definition.

    Raises:
        InvalidInput: another class already has that name.
    """
    name: str = kind.name
    other = _ALL.get(name)
    if other is not None and (other.__module__, other.__qualname__) != (kind.__module__, kind.__qualname__):
        raise InvalidInput(
            f"{kind.__qualname__} cannot be called {name!r}, because {other.__module__}.{other.__qualname__} already "
            "has that name: choose another"
        )
    _ALL[name] = kind
    if not kind.is_wrapper:
        _BUILT_BY_NAME[name] = kind


def registered(name: str) -> type[Any] | None:
    """Return the class with that name, or None."""
    return _ALL.get(name)
