"""The runtime type checker of the tests: shapes and types of every annotated function of the library."""

import inspect
import re
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

    def decorator(context: Any = None, *, typechecker: Any = None) -> Any:
        if typechecker is None:  # not the import hook's: the library opens a new context
            return of_shapes(context)

        def decorated(thing: Any) -> Any:
            if "<locals>" in getattr(thing, "__qualname__", ""):
                return thing
            if inspect.isfunction(thing) and not _has_shapes(thing):
                return check(thing)
            return of_shapes(thing, typechecker=typechecker)

        return decorated

    jaxtyping.jaxtyped = decorator
    jaxtyping.install_import_hook("simfluence", f"{__name__}.check")


def _has_shapes(function: Any) -> bool:
    """Whether an annotation names an array type of jaxtyping, or an alias of one."""
    names = {name for annotation in function.__annotations__.values() for name in re.findall(r"\w+", str(annotation))}
    return any("jaxtyping" in repr(function.__globals__.get(name)) for name in names)
