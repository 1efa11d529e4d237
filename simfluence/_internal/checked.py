"""Checks of a public function's arguments against its annotations, so that a wrong call is refused by name."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import itertools
import operator
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

import annotated_types
import numpy as np
import pandas as pd
from jaxtyping import AbstractArray, jaxtyped

from simfluence._internal.validation import number, whole
from simfluence.errors import InvalidInput, did_you_mean

__all__ = ["checked", "fitting", "shown"]

P = ParamSpec("P")
R = TypeVar("R")

_ELEMENTS = 1000  # how many elements of a sequence are looked at


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Check every argument of a call against the function's annotations.

    NumPy's numbers become Python's, and lists become the arrays that an array annotation asks for. Bounds are written
    as ``Annotated[int, Ge(1)]``. Python's own TypeError reports a missing or an unknown argument.

    Raises:
        InvalidInput: by the decorated function, which names the argument, what was expected and what was given.

    >>> @checked
    ... def repeated(text: str, times: int = 2) -> str:
    ...     return text * times
    >>> repeated("ab", np.int64(3))
    'ababab'
    >>> repeated(3, "ab")
    Traceback (most recent call last):
    ...
    simfluence.errors.InvalidInput: repeated: text must be a string, got 3; are text and times swapped?
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checking(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        hints = _hints(function)
        with jaxtyped("context"):  # sizes of axes in the function that calls this one say nothing of those in here
            for name, value in bound.arguments.items():
                if name in hints:
                    bound.arguments[name] = _argument(function, signature, bound, name, value)
        return function(*bound.args, **bound.kwargs)

    return checking


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    return typing.get_type_hints(function, include_extras=True)


def _argument(
    function: Callable[..., Any], signature: inspect.Signature, bound: inspect.BoundArguments, name: str, value: Any
) -> Any:
    """Return one argument, converted; its parameter may collect several (``*args``, ``**kwargs``)."""
    hint, kind = _hints(function)[name], signature.parameters[name].kind
    label = function.__name__ if function.__name__ != "__init__" else function.__qualname__.split(".")[-2]
    try:
        if kind is inspect.Parameter.VAR_POSITIONAL:
            return tuple(fitting(name, entry, hint) for entry in value)
        if kind is inspect.Parameter.VAR_KEYWORD:
            return {key: fitting(key, entry, hint) for key, entry in value.items()}
        if value is signature.parameters[name].default:
            return value
        return fitting(name, value, hint)
    except InvalidInput as error:
        raise InvalidInput(f"{label}: {error}{_swapped(_hints(function), bound.arguments, name)}") from None


def _swapped(hints: Mapping[str, Any], arguments: Mapping[str, Any], name: str) -> str:
    """Return a question where this argument and another one fit each other's parameters only."""
    for other, value in arguments.items():
        plain = other != name and other in hints and hints[other] is not Any and hints[name] is not Any
        if plain and _fits(value, hints[name]) and _fits(arguments[name], hints[other]):
            return f"; are {name} and {other} swapped?"
    return ""


def _fits(value: Any, hint: Any) -> bool:
    try:
        fitting("", value, hint)
    except InvalidInput:
        return False
    return True


def fitting(name: str, value: Any, hint: Any) -> Any:
    """Return ``value``, checked against the type ``hint`` and converted to it where that loses nothing.

    Raises:
        InvalidInput: the value is of another type or out of range.

    >>> fitting("lr", np.float32(0.5), float), fitting("k", [1, 2], int | list[int])
    (0.5, [1, 2])
    """
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        base, *bounds = typing.get_args(hint)
        return _bounded(name, fitting(name, value, base), bounds)
    if origin in (typing.Union, types.UnionType):
        return _one_of_types(name, value, hint)
    if origin is typing.Literal:
        options = typing.get_args(hint)
        if not isinstance(value, str | int | None) or value not in options:
            raise InvalidInput(f"{name}={shown(value)} is unknown, {did_you_mean(str(value), options)}")
        return value
    if hint in _SIMPLE:
        return _SIMPLE[hint](name, value)
    if hint is Any or isinstance(hint, TypeVar):
        return value
    kind = origin or hint
    if isinstance(kind, type) and issubclass(kind, AbstractArray):
        return _array(name, value, hint)
    if kind in _CONTAINERS:
        return _container(name, value, hint)
    if kind is type:
        return _accepted(name, value, hint, isinstance(value, type))
    if kind is collections.abc.Callable:
        return _accepted(name, value, hint, callable(value))
    return _accepted(name, value, hint, not isinstance(kind, type) or isinstance(value, kind))


def _accepted(name: str, value: Any, hint: Any, accepted: bool) -> Any:
    if accepted:
        return value
    made = ""
    if isinstance(value, type) and isinstance(hint, type) and issubclass(value, hint):
        made = f": did you mean {value.__name__}(…)?"
    raise InvalidInput(f"{name} must be {_described(hint)}, got {shown(value)}{made}")


def _bounded(name: str, value: Any, bounds: Iterable[Any]) -> Any:
    """Check a number against the bounds of ``annotated_types``."""
    parts = [part for bound in bounds for part in _single(bound)]
    limits = [(key, getattr(part, key)) for part in parts for key in _BOUNDS if hasattr(part, key)]
    if not all(_BOUNDS[key][0](value, limit) for key, limit in limits):
        expected = " and ".join(f"{_BOUNDS[key][1]} {limit}" for key, limit in limits)
        raise InvalidInput(f"{name} must be {expected}, got {shown(value)}")
    return value


_BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "ge": (operator.ge, "at least"), "gt": (operator.gt, "above"),
    "le": (operator.le, "at most"), "lt": (operator.lt, "below"),
}  # fmt: skip


def _single(bound: Any) -> list[Any]:
    return list(bound) if isinstance(bound, annotated_types.GroupedMetadata) else [bound]


def _one_of_types(name: str, value: Any, hint: Any) -> Any:
    """Return the value as the first type of a union that it fits; None and exact types come before conversions."""
    options = typing.get_args(hint)
    if value is None and type(None) in options:
        return None
    for option in options:
        if _fits(value, option):
            return fitting(name, value, option)
    for option in options:  # the right type, but out of range, or with a wrong element: say which
        kind = typing.get_origin(option)
        if kind is typing.Annotated and _fits(value, typing.get_args(option)[0]):
            fitting(name, value, option)
        if kind in _CONTAINERS and isinstance(value, kind) and not isinstance(value, str | bytes):
            fitting(name, value, option)
    return _accepted(name, value, hint, False)


def _truth(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise InvalidInput(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def _nothing(name: str, value: Any) -> None:
    if value is not None:
        raise InvalidInput(f"{name} must be None, got {shown(value)}")


def _array(name: str, value: Any, hint: Any) -> Any:
    """Return an array of the annotated kind of number and number of axes; lists and tables become arrays."""
    if isinstance(value, hint):
        return value
    try:
        array = np.asarray(value)
        array = array.astype(np.float64) if array.dtype.kind in "iu" and not isinstance(array, hint) else array
    except (TypeError, ValueError, RuntimeError):
        array = np.empty(0, object)
    if array.dtype.kind in "OUSVmM" or not isinstance(array, hint):
        raise InvalidInput(f"{name} must be {_described(hint)}, got {shown(value)}")
    return array


def _container(name: str, value: Any, hint: Any) -> Any:
    """Check a sequence, an iterable or a mapping, and the elements of a sequence. A string is none of them."""
    kind = typing.get_origin(hint) or hint
    if isinstance(value, np.ndarray | pd.Series | pd.Index) and kind is not collections.abc.Mapping and value.ndim:
        value = value.tolist()
    single = getattr(value, "ndim", 1) == 0  # arrays and tensors of one number have an iterator that fails
    _accepted(name, value, hint, isinstance(value, kind) and not isinstance(value, str | bytes) and not single)
    element = (*typing.get_args(hint), Any)[0]
    if kind is collections.abc.Sequence and element is not Any and not _holds_only_classes(element):
        return [fitting(f"{name}[{index}]", entry, element) for index, entry in enumerate(value)]
    if kind is collections.abc.Sequence and element is not Any:
        for index, entry in enumerate(itertools.islice(value, _ELEMENTS)):
            fitting(f"{name}[{index}]", entry, element)
    return value


def _holds_only_classes(element: Any) -> bool:
    """Decide whether elements are of a class of this library, which needs no conversion (``Runs`` stay ``Runs``)."""
    return isinstance(element, type) and element not in _SIMPLE


_SIMPLE: dict[Any, Callable[[str, Any], Any]] = {
    bool: _truth, int: whole, float: number, type(None): _nothing,
    str: lambda name, value: _accepted(name, value, str, isinstance(value, str)),
}  # fmt: skip

_CONTAINERS = {
    collections.abc.Sequence: "a sequence", collections.abc.Iterable: "an iterable",
    collections.abc.Mapping: "a mapping", collections.abc.Collection: "a collection", list: "a list", dict: "a dict",
    tuple: "a tuple", set: "a set",
}  # fmt: skip

_WORDS: dict[Any, str] = {
    bool: "True or False", int: "a whole number", float: "a number", str: "a string", type(None): "None",
    np.ndarray: "an array",
}  # fmt: skip


def _described(hint: Any) -> str:
    """Say in words what a type hint accepts."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return _described(typing.get_args(hint)[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_described(option) for option in typing.get_args(hint)))
    if hint in _WORDS:
        return _WORDS[hint]
    kind = origin or hint
    if isinstance(kind, type) and issubclass(kind, AbstractArray):
        return f"an array of numbers [{', '.join(kind.dim_str.split())}]"
    if kind in _CONTAINERS:
        element = (*typing.get_args(hint), Any)[0]
        return _CONTAINERS[kind] + (f" of {_plural(element)}" if _plural(element) else "")
    if kind is type:
        return "a class"
    if kind is collections.abc.Callable:
        return "a function"
    name = getattr(kind, "__name__", str(kind))
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def _plural(element: Any) -> str:
    if element is Any or isinstance(element, TypeVar):
        return ""
    if isinstance(element, type) and element not in _WORDS:
        return f"{element.__name__} objects"
    return {int: "whole numbers", float: "numbers", str: "strings"}.get(element, "")


def shown(value: Any) -> str:
    """Return a short description of a value for an error message.

    >>> shown(np.zeros((2, 3))), shown("a" * 100), shown(int)
    ('an array [2, 3] of float64', "'aaaaaaaaaaaa...aaaaaaaaaaaaa'", 'the class int')
    """
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, np.ndarray):
        return f"an array {list(value.shape)} of {value.dtype}"
    if isinstance(value, pd.DataFrame | pd.Series | pd.Index):
        return f"a {type(value).__name__} of {len(value)}"
    if type(value).__module__.split(".")[0] in ("simfluence", "torch"):
        return f"a {type(value).__name__}"
    return reprlib.repr(value)
