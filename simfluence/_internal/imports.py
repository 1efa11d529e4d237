"""Import of objects that a user names as ``package.module:name`` on the command line."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from simfluence.errors import InvalidInput, did_you_mean


def imported_object(reference: str, what: str) -> Any:
    """Import the callable that ``package.module:name`` names.

    This runs the user's code, so use it only for names from the command line, never for names from a file.

    Args:
        reference: name of the callable, such as "my_project.tasks:flowers".
        what: kind of object, for messages: "task" or "simulator".

    Raises:
        InvalidInput: the name has another form, or the module or callable does not exist.

    >>> imported_object("simfluence.tasks:digits", "task").__name__
    'digits'
    """
    module_name, colon, name = reference.partition(":")
    if not colon or not all(part.isidentifier() for part in [*module_name.split("."), name]):
        raise InvalidInput(f"{what} {reference!r}: write package.module:name")
    try:
        sys.path.insert(0, "")  # import from the current folder, as python -m does
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InvalidInput(f"{what} {reference!r}: {error}") from None
    finally:
        sys.path.remove("")
    value = getattr(module, name, None)
    if not callable(value):
        names = [attribute for attribute, content in vars(module).items() if callable(content)]
        raise InvalidInput(f"{what} {reference!r}: the module has no callable {name!r}, {did_you_mean(name, names)}")
    return value
