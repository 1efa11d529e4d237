"""The demo on a pretrained language model: fine-tune MiniLM a few times, forecast these runs, ask one what-if.

The simulators are fitted on runs in the repository. If these are missing (in an installed wheel), or have the
docstrings of another Python version, a few more runs are recorded to fit on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import simfluence
from simfluence import tasks
from simfluence.cli.demo import Demo, main_job
from simfluence.curriculum import random_curricula
from simfluence.recipe import Recipe
from simfluence.recording import Observe, record
from simfluence.runs import Runs
from simfluence.simulators import (
    AdditiveSimulator,
    BoostedSimulator,
    LinearSimulator,
    MeanTrajectorySimulator,
    PersistenceSimulator,
    Simulator,
)
from simfluence.storage.store import RunStore
from simfluence.task import Task

__all__ = ["run_docstrings_demo"]

LABEL = "email"

SHIPPED = Path(simfluence.__file__).parents[1] / "runs" / "docstrings-minilm-ia3"

#: Numbers of runs to record: runs to forecast, and runs to fit on if the repository's cannot be used.
FORECAST, LEARNED = 2, 6

#: Number of steps between readings of the test losses if the fitting runs are recorded too.
SPARSE = 10

RECIPE = Recipe(optimizer="adamw", lr=0.01, schedule="linear", horizon=100, warmup=10)

#: The L2 was chosen by four-fold cross-validation on 12 of the shipped runs. Boosted has its defaults. See docs/log.md.
COMPARED: Mapping[str, Simulator] = {
    "boosted": BoostedSimulator(),
    "linear, around the mean": LinearSimulator(l2=3.5, around="mean"),
    "additive": AdditiveSimulator(l2=0.11),
    "mean trajectory": MeanTrajectorySimulator(),
    "persistence": PersistenceSimulator(),
}

#: The simulators that need losses at every step.
NEEDS_EVERY_STEP = ("linear, around the mean",)


def run_docstrings_demo(folder: str | Path) -> Demo:
    """Record runs into ``folder``/runs, or read them from there, and run the demo on them; this takes minutes."""
    folder = Path(folder)
    task = tasks.docstrings(tuning="ia3")
    store = RunStore(folder / "runs")
    problem = _problem_with_shipped(task)
    if problem is None:
        fit, held = RunStore(SHIPPED).load(), _recorded(task, store, FORECAST, 1)
        return main_job(task, LABEL, COMPARED, fit, held, store, folder / "demo.png", "shipped ones")
    compared = {name: simulator for name, simulator in COMPARED.items() if name not in NEEDS_EVERY_STEP}
    fit, held = _split(task, store)
    return main_job(task, LABEL, compared, fit, held, store, folder / "demo.png", f"recorded here: {problem}")


def _problem_with_shipped(task: Task) -> str | None:
    """Return why the repository's runs cannot be used, or None if they can."""
    store = RunStore(SHIPPED)
    if not store.exists:
        return "a package has no recorded runs, 16 are in the repository (runs/docstrings-minilm-ia3)"
    if store.info.fingerprint != task.fingerprint:
        return f"the shipped ones have the docstrings of Python {store.info.arguments['python']}"
    return None


def _split(task: Task, store: RunStore) -> tuple[Runs, Runs]:
    """Record fitting runs and runs to forecast."""
    runs = _recorded(task, store, FORECAST + LEARNED, SPARSE)
    return runs[FORECAST:], runs[:FORECAST]


def _recorded(task: Task, store: RunStore, runs: int, every: int) -> Runs:
    """Record runs under curricula that the shipped runs do not have."""
    curricula = random_curricula(len(task.train), runs, steps=100, batch_size=8, subset=0.5, seed=1)
    return record(task, RECIPE, curricula, store, observe=Observe(every=every))
