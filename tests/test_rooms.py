"""The house: imports run downwards only, and the names on the design page are there."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import simfluence as sf

ROOT = Path(sf.__file__).parent
#: Floors from the ground up; a module may import from its own floor and from those below.
FLOORS = [
    [
        "_version",
        "errors",
        "_types",
        "_indices",
        "_places",
        "_files",
        "_progress",
        "_spec",
        "_html",
        "_tables",
        "plots",
        "filters",
        "curriculum",
        "examples",
        "edits",
        "recipe",
    ],
    ["task", "runs", "run_file", "recorder", "store"],
    ["tasks", "recording", "attribution"],
    ["simulators"],
    ["evaluation", "tuning", "learning", "verification", "whatif", "effects", "removal", "judging", "specs"],
    ["printing", "demo", "demo_docstrings", "cli", "__main__", "__init__"],
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "simfluence":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("simfluence."):
            found.add(str(node.module).split(".")[1])
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downwards(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for other in imported_rooms(path):
        assert FLOOR_OF[other] <= FLOOR_OF[room], f"{room} imports {other}, which is above it"


@pytest.mark.filterwarnings("ignore::simfluence.errors.UnseenWarning")  # four runs miss an example
def test_the_design_page_runs(tmp_path):
    task = sf.tasks.digits(n_train=30, n_test=10, seed=0)
    recipe = sf.Recipe(optimizer="sgd", lr=0.1)
    curricula = sf.random_curricula(n_train=30, runs=6, steps=20, batch_size=8, subset=0.5, seed=0)
    runs = sf.record(task, recipe, curricula, store=str(tmp_path / "digits"))
    fit, held = runs.split(held_out=2, seed=0)
    linear = sf.LinearSimulator(l2=10, prior="identity").fit(fit)
    losses = linear.simulate(held.curricula, held.initial_losses)
    assert losses.shape == held.losses.shape
    table = sf.evaluate({"linear": linear}, held, reference=fit)
    assert list(table.index) == ["linear"]
    forecast = sf.what_if(linear, held[0], [sf.Remove("label == 3")], task=task)
    assert list(forecast.frame.columns) == ["step", "test", "base", "what_if", "delta"]
    assert "actual" in forecast.verify(recipe).frame
    assert sf.RunStore(str(tmp_path / "digits")).load().ids == sorted(runs.ids)
    assert len(sf.Remove("label == 3").apply(held[0].curriculum, task.train)) == 20
    assert isinstance(sf.RunStore(tmp_path / "digits").load()[:1], sf.Runs)
