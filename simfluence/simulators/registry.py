"""Every kind of simulator by its name: a class that has a ``name`` of its own is registered when it is defined."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from simfluence.errors import InvalidInput

_ALL: dict[str, type[Any]] = {}
_BUILT_BY_NAME: dict[str, type[Any]] = {}

#: The simulators that can be built by name alone, the library's own and others, in the order of their definition.
SIMULATORS: Mapping[str, type[Any]] = MappingProxyType(_BUILT_BY_NAME)


def register(kind: type[Any]) -> None:
    """Remember a class under its ``name``. The same class defined again, as in a notebook, takes its place.

    Raises:
        InvalidInput: another class has that name.
    """
    name: str = kind.name
    other = _ALL.get(name)
    if other is not None and (other.__module__, other.__qualname__) != (kind.__module__, kind.__qualname__):
        raise InvalidInput(
            f"{kind.__qualname__} cannot be called {name!r}: {other.__module__}.{other.__qualname__} has that name. "
            "Give the class a name of its own"
        )
    _ALL[name] = kind
    if not kind.is_wrapper:
        _BUILT_BY_NAME[name] = kind


def registered(name: str) -> type[Any] | None:
    """The class of that name; None where no class has it."""
    return _ALL.get(name)
