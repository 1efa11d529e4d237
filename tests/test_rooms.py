"""The house: imports run downwards only and in no circle, and the names on the design page are there."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

import simfluence as sf

ROOT = Path(sf.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
#: Floors from the ground up; a module may import from its own floor and from those below.
FLOORS = [
    ["_version", "errors", "_internal", "plots", "filters", "curriculum", "examples", "edits", "recipe"],
    ["task", "runs", "storage"],
    ["tasks", "recording", "attribution"],
    ["simulators"],
    ["evaluation", "queries", "specs"],
    ["cli", "__main__", "__init__"],
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MOST_ROOT_MODULES = 12


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path) for path in MODULES}


def imported_modules(path: Path) -> set[str]:
    """The package's modules that a module imports: at its top, in functions, and for types alone."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "simfluence":
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= names & NAMES
            modules |= {str(node.module)} if names - NAMES else set()
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names} & NAMES
    return modules - {"simfluence"}  # whose names are imported when they are used


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_downwards(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for other in imported_modules(path):
        below = other.split(".")[1]
        assert FLOOR_OF[below] <= FLOOR_OF[room], f"{name_of(path)} imports {other}, which is above it"


def test_imports_run_in_no_circle():
    """Neither between floors nor within one. A package is what it exports: its modules may not import it."""
    graph = {name_of(path): imported_modules(path) for path in MODULES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"imports in a circle: {' → '.join(error.args[1])}")


def test_the_root_holds_what_users_type_and_little_else():
    modules = {path.stem for path in ROOT.glob("*.py")}
    assert len(modules) <= MOST_ROOT_MODULES, sorted(modules)


def test_no_module_looks_like_a_test():
    assert not [path for path in MODULES if path.name.startswith("test_") or path.name.endswith("_test.py")]


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
    table = sf.evaluate({"linear": linear}, held, baseline_runs=fit)
    assert list(table.index) == ["linear"]
    forecast = sf.what_if(linear, held[0], [sf.Remove("label == 3")], task=task)
    assert list(forecast.frame.columns) == ["step", "test", "base", "what_if", "change"]
    assert "actual" in forecast.verify(recipe).frame
    assert sf.RunStore(str(tmp_path / "digits")).load().ids == sorted(runs.ids)
    assert len(sf.Remove("label == 3").apply(held[0].curriculum, task.train)) == 20
    assert isinstance(sf.RunStore(tmp_path / "digits").load()[:1], sf.Runs)
