"""Support for old names, which work for one more release with a warning."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

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


def warn_renamed(old: str, new: str, stacklevel: int = 2) -> None:
    """Warn that ``old`` was renamed to ``new``."""
    warnings.warn(
        f"{old} was renamed to {new}; the next release removes the old name", DeprecationWarning, stacklevel + 1
    )
