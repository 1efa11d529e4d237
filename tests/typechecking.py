"""The runtime type checker of the tests: shapes and types of every annotated function of the library."""

import inspect
import re
import typing
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as type checkers have it


def install() -> None:
    """Check the library's functions from its first import on, each as cheaply as what it says allows.

    Functions that are defined anew at every call are left out: to compile a check takes milliseconds each time, and
    none of them has a shape. Where no annotation has a shape there are no axes to compare, which is most of the work.
    """
    of_shapes = jaxtyping.jaxtyped

    def jaxtyped(*arguments: Any, **options: Any) -> Any:
        return of_shapes(*arguments) if arguments else lambda thing: decorated(thing, **options)

    def decorated(thing: Any, typechecker: Any) -> Any:
        if "<locals>" in getattr(thing, "__qualname__", ""):
            return thing
        if inspect.isfunction(thing) and _is_resolved(thing) and not _has_shapes(thing):
            return check(thing)
        return of_shapes(thing, typechecker=typechecker)

    jaxtyping.jaxtyped = jaxtyped
    jaxtyping.install_import_hook("simfluence", f"{__name__}.check")


def _is_resolved(function: Any) -> bool:
    """Whether every name in the annotations is known: some are imported for type checkers only."""
    try:
        typing.get_type_hints(function)
    except NameError:
        return False
    return True


def _has_shapes(function: Any) -> bool:
    """Whether an annotation names an array type of jaxtyping, or an alias of one."""
    names = {name for annotation in function.__annotations__.values() for name in re.findall(r"\w+", str(annotation))}
    return any("jaxtyping" in repr(function.__globals__.get(name)) for name in names)
