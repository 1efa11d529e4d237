"""The public surface: every public name and its signature, held in a text file. A change here is a change for users.

``python tests/test_public_api.py`` writes the file anew; its diff belongs to the change, and to CHANGELOG.md.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import pydantic

SNAPSHOT = Path(__file__).parent / "data" / "public_api.txt"
PACKAGES = [
    "simfluence",
    *(f"simfluence.{room}" for room in ("attribution", "plots", "recording", "simulators", "tasks")),
]


def public_api() -> list[str]:
    """A line for each public name, and for each public method of a public class."""
    lines = []
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            lines += described(f"{package}.{name}", getattr(module, name))
    return sorted(lines)


def described(name: str, thing: object) -> list[str]:
    if inspect.ismodule(thing) or not callable(thing):
        return [name]
    lines = [name + signature(thing)]
    if inspect.isclass(thing):
        for local, value in vars(thing).items():
            if local.startswith("_") or local in ("set_fit_request", "set_score_request") or local in of_library(thing):
                continue
            value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            lines.append(f"{name}.{local}{signature(value) if inspect.isfunction(value) else ''}")
    return lines


def of_library(thing: type) -> set[str]:
    """What pydantic and dataclasses add, which says nothing that the signature does not."""
    fields = {field.name for field in dataclasses.fields(thing)} if dataclasses.is_dataclass(thing) else set()
    return fields | (set(vars(pydantic.BaseModel)) if issubclass(thing, pydantic.BaseModel) else set())


def signature(thing: object) -> str:
    """Parameters by name, kind and default; types are mypy's business."""
    try:
        found = inspect.signature(thing)
    except (TypeError, ValueError):
        return ""
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in found.parameters.values()]
    text = str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return re.sub(r"<(\w+) ([\w.]+) at 0x\w+>", r"<\1 \2>", text)


def test_the_public_surface_is_the_one_that_was_agreed_on():
    assert public_api() == SNAPSHOT.read_text().splitlines()


if __name__ == "__main__":
    SNAPSHOT.write_text("\n".join(public_api()) + "\n")
