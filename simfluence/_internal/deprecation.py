"""Support for old names, which work for one more release with a warning."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, ParamSpec, TypeVar

import pandas as pd

P = ParamSpec("P")
R = TypeVar("R")


def renamed_arguments(**new_names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function also accept old names of its keyword arguments: ``@renamed_arguments(old="new")``.

    >>> @renamed_arguments(colour="color")
    ... def paint(color: str) -> str:
    ...     return color
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore", DeprecationWarning)
    ...     paint(colour="red")
    'red'
    """

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def accepting(*args: P.args, **kwargs: P.kwargs) -> R:
            for old in new_names.keys() & kwargs.keys():
                kwargs[new_names[old]] = kwargs.pop(old)
                warn_renamed(f"{old}=", f"{new_names[old]}=", stacklevel=3)
            return function(*args, **kwargs)

        return accepting

    return decorated


def renamed_names(module: str, new_names: dict[str, str]) -> Callable[[str], Any]:
    """Build a module's ``__getattr__`` that resolves old names: ``{"old": "package.module:new"}``."""

    def getattribute(name: str) -> Any:
        if name not in new_names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        target, _, attribute = new_names[name].partition(":")
        warn_renamed(f"{module}.{name}", f"{target}.{attribute}" if attribute else target, stacklevel=3)
        target_module = importlib.import_module(target)
        return getattr(target_module, attribute) if attribute else target_module

    return getattribute


class _RenamedColumns(pd.DataFrame):
    """A table that also answers to the old names of its columns, with a warning."""

    _metadata: ClassVar[list[str]] = ["new_names"]
    new_names: Mapping[str, str] = MappingProxyType({})

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str) and key in self.new_names:
            warn_renamed(f"the column {key!r}", f"{self.new_names[key]!r}", stacklevel=2)
            key = self.new_names[key]
        return super().__getitem__(key)


def with_old_columns(table: pd.DataFrame, new_names: Mapping[str, str]) -> pd.DataFrame:
    """Let ``table[old]`` return the renamed column: ``{"old": "new"}``. Tables made from it are plain ones.

    >>> table = with_old_columns(pd.DataFrame({"new": [1]}), {"old": "new"})
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore", DeprecationWarning)
    ...     table["old"].tolist()
    [1]
    """
    renamed = _RenamedColumns(table)
    object.__setattr__(renamed, "new_names", dict(new_names))
    return renamed


def warn_renamed(old: str, new: str, stacklevel: int = 2) -> None:
    """Warn that ``old`` was renamed to ``new``."""
    warnings.warn(
        f"{old} was renamed to {new}; the next release removes the old name", DeprecationWarning, stacklevel + 1
    )
