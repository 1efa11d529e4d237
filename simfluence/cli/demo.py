"""The demo: record real runs, fit simulators, score them on unseen runs, ask one what-if, retrain to confirm it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import sklearn.base
from matplotlib.figure import Figure

from simfluence import plots, tasks
from simfluence.curriculum import random_curricula
from simfluence.edits import Edit, Remove
from simfluence.evaluation.held_out import evaluate
from simfluence.plots.style import save
from simfluence.queries.forecast import Verification
from simfluence.queries.questions import what_if
from simfluence.recipe import Recipe
from simfluence.recording import record
from simfluence.runs import Run, Runs
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

__all__ = ["COMPARED", "Demo", "main_job", "run_demo"]

LABEL = 3

#: Parameters were chosen by four-fold cross-validated skill on the 24 fitting runs only: the L2 of additive and linear
#: among 1…3000, "linear, tuned" by ``tune``. Boosted has its defaults. See docs/log.md.
COMPARED: Mapping[str, Simulator] = {
    "persistence": PersistenceSimulator(),
    "mean trajectory": MeanTrajectorySimulator(),
    "additive": AdditiveSimulator(l2=300),
    "linear": LinearSimulator(l2=1000),
    "linear, tuned": LinearSimulator(l2=0.83, prior="zero", order=2, varying=True),
    "boosted": BoostedSimulator(),
}


@dataclass(frozen=True)
class Demo:
    """Results of the demo.

    Args:
        store: the recorded runs.
        about: title with the numbers of held-out and fitting runs.
        table: scores on the held-out runs, a row per simulator.
        edit: edit of the what-if query.
        answers: forecast changes, a row per simulator; the row ``retrained`` has the true ones.
        picture: PNG file of simulated and real trajectories.
    """

    store: RunStore
    about: str
    table: pd.DataFrame
    edit: Edit
    answers: pd.DataFrame
    picture: Path


def run_demo(folder: str | Path) -> Demo:
    """Record runs of the digits task into ``folder``/runs, or read them from there, and run the demo on them."""
    folder = Path(folder)
    task, recipe = tasks.digits(n_train=300, n_test=100, seed=0), Recipe(optimizer="sgd", lr=0.1)
    curricula = random_curricula(n_train=300, runs=32, steps=200, batch_size=8, subset=0.5, seed=0)
    store = RunStore(folder / "runs")
    fit, held = record(task, recipe, curricula, store).split(held_out=8, seed=0)
    return main_job(task, LABEL, COMPARED, fit, held, store, folder / "demo.png", "recorded ones")


def main_job(
    task: Task,
    label: Any,
    compared: Mapping[str, Simulator],
    fit: Runs,
    held: Runs,
    store: RunStore,
    picture: Path,
    origin: str,
) -> Demo:
    """Fit simulators, score them on unseen runs, forecast the removal of a label, and retrain to confirm it.

    Args:
        task: task of the runs.
        label: label to remove.
        compared: unfitted simulators by name.
        fit: fitting runs.
        held: held-out runs.
        store: store for the retrained run.
        picture: file of the picture.
        origin: description of the fitting runs, for the title.
    """
    simulators = {name: sklearn.base.clone(simulator).fit(fit) for name, simulator in compared.items()}
    table = evaluate(simulators, held, baseline_runs=fit)
    edit = Remove(f"label == {label!r}")
    verified = retrained(task, simulators, held[0], edit, store.path)
    draw(picture, task, label, simulators, held, verified)
    about = f"Forecasts of {len(held)} unseen runs, from {len(fit)} {origin}"
    return Demo(store, about, table, edit, answers(task, label, verified), picture)


def retrained(
    task: Task, simulators: Mapping[str, Simulator], base: Run, edit: Edit, store: Path
) -> dict[str, Verification]:
    """Forecast an edit with each simulator, and compare all forecasts with one retraining."""
    forecasts = {name: what_if(simulator, base, edit, task=task) for name, simulator in simulators.items()}
    verification = next(iter(forecasts.values())).verify(store=store)
    return {name: forecast.against(verification) for name, forecast in forecasts.items()}


def answers(task: Task, label: Any, verified: Mapping[str, Verification]) -> pd.DataFrame:
    """Return the mean changes of the final loss, over the test examples of the removed label and over the others."""
    removed = (task.test.table["label"] == label).to_numpy()
    truth = next(iter(verified.values())).actual_change
    rows = {
        name: {
            f"change_of_{label}s": answer.forecast.change[removed].mean(),
            "change_of_others": answer.forecast.change[~removed].mean(),
            "delta_correlation": answer.delta_correlation,
            "within_labels": answer.within_correlation,
            "final_mse": answer.final_mse,
        }
        for name, answer in verified.items()
    }
    rows["retrained"] = {f"change_of_{label}s": truth[removed].mean(), "change_of_others": truth[~removed].mean()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("simulator")


def draw(
    path: Path,
    task: Task,
    label: Any,
    simulators: Mapping[str, Simulator],
    held: Runs,
    verified: Mapping[str, Verification],
) -> None:
    """Draw a held-out run (left), and the same run without the label, on test examples of the label (right)."""
    simulated = {name: s.simulate(held.curricula[:1], held.initial_losses[:1])[0] for name, s in simulators.items()}
    removed = (task.test.table["label"] == label).to_numpy()
    truth = next(iter(verified.values())).actual
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    plots.trajectories(
        _interpolated(held[0].losses.mean(1)), {name: losses.mean(1) for name, losses in simulated.items()}, left,
        f"An unseen run: mean of {held.n_test} test examples", names=False,
    )  # fmt: skip
    plots.trajectories(
        _interpolated(truth[:, removed].mean(1)),
        {name: answer.forecast.what_if[:, removed].mean(1) for name, answer in verified.items()}, right,
        f"The same without any {label} in training: mean of {removed.sum()} test {label}s", names=False,
    )  # fmt: skip
    left.set_ylim(0, 2 * np.nanmax(held[0].losses.mean(1)))
    right.set_ylim(0, 2 * np.nanmax(truth[:, removed].mean(1)))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False)
    figure.suptitle(f"{task.name}: simulators fitted on recorded runs (axes end at twice the real losses)")
    save(figure, path, dpi=120)


def _interpolated(losses: np.ndarray) -> np.ndarray:
    """Interpolate linearly between recorded losses."""
    return pd.Series(losses).interpolate().to_numpy()
