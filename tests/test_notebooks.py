"""Every notebook runs from its first cell to its last, small; and what is committed was executed, whole, and is fit to
be shown."""

from __future__ import annotations

import ast
import json
import re
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def execute(source: str, names: dict) -> None:
    """A cell, as a notebook does it: the value of a last expression is shown."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)  # noqa: S102 (our own notebooks)
    if last is not None:
        shown = eval(compile(ast.Expression(last.value), "cell", "eval"), names)  # noqa: S307
        if hasattr(shown, "_repr_html_"):
            shown._repr_html_()


@each_notebook
def test_it_runs(path, monkeypatch, capsys):
    """In one process, as to start a kernel for each takes longer than what they do. Warnings are as in a kernel."""
    monkeypatch.setenv("SIMFLUENCE_SMALL", "1")
    monkeypatch.chdir(path.parent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = {"__name__": "__main__"}
        for cell in code(path):
            execute("".join(cell["source"]), names)
        for number in plt.get_fignums():
            plt.figure(number).canvas.draw()
    plt.close("all")


@each_notebook
def test_it_was_executed_whole(path):
    cells = code(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert cells[-1]["outputs"]  # it ends in an answer
    assert path.stat().st_size < 400_000
    assert not re.search(r"/(home|root|work|tmp|Users)/\w+", json.dumps([output.get("text") for output in outputs]))
