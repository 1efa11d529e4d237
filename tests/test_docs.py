"""The pages that show how to extend the library run as they stand; every public name says what it is."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

import simfluence as sf

DOCS = Path(__file__).parent.parent / "docs"
ROOMS = ("attribution", "recording", "simulators", "tasks", "plots")


@pytest.mark.parametrize("page", ["adding_a_simulator", "adding_an_attributor"])
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
    """Doctests. Tasks that need a language model's weights are shown in docs/text.md."""
    shown = [(name, thing) for name, thing in public_names() if inspect.isfunction(thing)]
    missing = {name.rpartition(".")[2] for name, thing in shown if ">>>" not in (thing.__doc__ or "")}
    of_language = {"classification", "docstrings", "language_modelling", "multiple_choice", "topics"}
    assert missing <= of_language


def test_every_public_name_is_in_the_reference():
    pages = "\n".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    missing = [
        name
        for name in sf.__all__
        if not inspect.ismodule(getattr(sf, name)) and name not in ("__version__", "SimfluenceError")
    ]
    missing = [name for name in missing if not re.search(rf"::: simfluence\.(\w+\.)?{name}\b", pages)]
    assert missing == []
