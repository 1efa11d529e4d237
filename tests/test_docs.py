"""The pages that show how to extend the library run as they stand; every public name says what it is."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

import simfluence as sf

DOCS = Path(__file__).parent.parent / "docs"
ROOMS = ("attribution", "evaluation", "plots", "recording", "simulators", "specs", "tasks")


@pytest.mark.parametrize("page", ["adding_a_simulator", "adding_an_attributor", "trust"])
def test_the_page_runs(page, capsys):
    text = (DOCS / f"{page}.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 4
    names = {"__name__": page}
    for block in blocks:
        exec(compile(block, page, "exec"), names)  # noqa: S102 (our own page)
    assert capsys.readouterr().out
    if page == "adding_a_simulator":
        assert names["table"]["skill"].item() > 0  # it is a fair baseline, as the page says


def public_names() -> list[tuple[str, object]]:
    found = {}
    for package in (sf, *(importlib.import_module(f"simfluence.{room}") for room in ROOMS)):
        for name in package.__all__:
            thing = getattr(package, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                found[f"{thing.__module__}.{name}"] = thing
    return sorted(found.items())


def test_every_public_name_says_what_it_is():
    silent = [name for name, thing in public_names() if not (thing.__doc__ or "").strip()]
    assert silent == []


def test_public_functions_have_examples_that_run():
    """Doctests. Tasks that need a language model's weights are shown in docs/text.md; metrics are formulas."""
    functions = [(name, thing) for name, thing in public_names() if inspect.isfunction(thing)]
    shown = [(name, thing) for name, thing in functions if thing.__module__ != "simfluence.evaluation.metrics"]
    missing = {name.rpartition(".")[2] for name, thing in shown if ">>>" not in (thing.__doc__ or "")}
    of_language = {"classification", "docstrings", "language_modelling", "multiple_choice", "topics"}
    assert missing <= of_language | {"search"}  # ``tune`` shows it


def test_every_public_name_is_in_the_reference():
    """By itself, or in its room, all of which a page shows."""
    pages = "\n".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    shown = set(re.findall(r"^::: simfluence\.([\w.]+)$", pages, re.MULTILINE))
    whole_rooms = shown & {*ROOMS, "errors"}
    listed = {name.rpartition(".")[2] for name in shown}
    missing = [
        name
        for name, thing in public_names()
        if name.rpartition(".")[2] not in listed and thing.__module__.split(".")[1] not in whole_rooms
    ]
    assert missing == []
