"""Commands that fit, score and choose simulators."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from simfluence import plots, simulators
from simfluence._internal.html import cell, readable
from simfluence.cli.demo import run_demo
from simfluence.cli.demo_docstrings import run_docstrings_demo
from simfluence.cli.options import (
    AsJson,
    HeldOut,
    Intervals,
    Named,
    OwnTask,
    Parameters,
    Plot,
    Seed,
    StorePath,
    built_task,
    fitted_all,
    fitted_by_name,
    parsed,
    unfitted,
)
from simfluence.cli.output import draw, print_json, print_table, records
from simfluence.errors import InvalidInput, did_you_mean
from simfluence.evaluation.held_out import METRICS
from simfluence.evaluation.held_out import evaluate as evaluate_simulators
from simfluence.evaluation.learning_curves import learning_curve as curve
from simfluence.evaluation.tuning import Search, search
from simfluence.simulators import OF_TASK, SIMULATORS, ConformalSimulator
from simfluence.storage.store import RunStore

#: What the demo can be of.
DEMOS = {"digits": run_demo, "docstrings": run_docstrings_demo}


def demo(
    folder: Annotated[Path, typer.Option(help="Where to record and draw.")] = Path("simfluence-demo"),
    task: Annotated[str, typer.Option(help=f"One of {', '.join(DEMOS)}.")] = "digits",
    as_json: AsJson = False,
) -> None:
    """Record real runs, fit, score on unseen runs, ask a what-if, and retrain to confirm it."""
    if task not in DEMOS:
        raise InvalidInput(f"no demo of task {task!r}, {did_you_mean(task, DEMOS)}")
    found = DEMOS[task](folder)
    if as_json:
        parts = {"store": str(found.store.path), "picture": str(found.picture), "edit": str(found.edit)}
        print_json(parts | {"evaluation": records(found.table), "what_if": records(found.answers)})
        return
    print(f"Recorded runs of the {task} task: {found.store.path}")
    print_table(readable(found.table), f"{found.about} (skill 0: the mean trajectory)")
    print_table(found.answers, f"What if we {found.edit}? Change of the final loss, predicted and retrained")
    print(f"Simulated and real trajectories: {found.picture}")


def fit(
    store: StorePath,
    out: Annotated[Path, typer.Option(help="File for the fitted simulator (.safetensors).")],
    simulator: Named = "linear",
    parameters: Parameters = None,
    held_out: HeldOut = 8,
    seed: Seed = 0,
    intervals: Intervals = False,
    task: OwnTask = None,
) -> None:
    """Fit a simulator on the runs of STORE that are not held out, and save it."""
    opened = RunStore(store)
    simulators.build(simulator, **parsed(parameters))  # says at once which parameter it does not have
    chosen = unfitted(simulator, parameters, opened, task)
    chosen = ConformalSimulator(chosen, seed=seed) if intervals else chosen
    part, _ = opened.load().split(held_out, seed)
    chosen.fit(part).save(out)
    print(f"{chosen} fitted on {len(part)} runs: {out}")


def evaluate(
    stores: Annotated[list[Path], typer.Argument(metavar="STORE...", help="Folders of recorded runs.")],
    simulator: Annotated[
        list[str] | None, typer.Option(help="Name or file of one; again for more. All if none.")
    ] = None,
    parameters: Parameters = None,
    held_out: HeldOut = 8,
    seed: Seed = 0,
    metric: Annotated[list[str] | None, typer.Option(help="One metric; again for more. All if none.")] = None,
    intervals: Intervals = False,
    task: OwnTask = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Score simulators on the held-out runs of each STORE against the mean trajectory of the others.

    Several stores make one table, a row per store and simulator.
    """
    splits = {str(store): RunStore(store).load().split(held_out, seed) for store in stores}
    tables = {}
    for store, (part, held) in splits.items():
        opened = RunStore(store)
        chosen = {name: fitted_by_name(name, part, parameters, opened, task) for name in simulator or ()} or fitted_all(
            store, part, parameters
        )
        if intervals:
            chosen = {name: ConformalSimulator(each, seed=seed).fit(part) for name, each in chosen.items()}
        tables[store] = evaluate_simulators(chosen, held, part, metrics=metric or METRICS)
    table = pd.concat(tables, names=["store"]) if len(tables) > 1 else tables[str(stores[0])]
    if plot:
        shown = table.set_axis([": ".join(name) for name in table.index]) if len(tables) > 1 else table
        first = (metric or ["skill"])[0]
        draw(plot, lambda ax: plots.evaluation(shown, ax, "" if len(tables) == 1 else "by store", metric=first))
    if as_json:
        print_json(records(table))
    else:
        about = (f"{store}: {len(held)} held-out runs, {len(part)} to fit on" for store, (part, held) in splits.items())
        print_table(readable(table), "\n".join(about))


def tune(
    store: StorePath,
    out: Annotated[Path, typer.Option(help="File for the fitted simulator (.safetensors).")],
    simulator: Annotated[str, typer.Option(help=f"best, or one of {', '.join((*SIMULATORS, *OF_TASK))}.")] = "linear",
    trials: Annotated[int, typer.Option(help="How many candidates to try.")] = 20,
    parameters: Parameters = None,
    folds: Annotated[int, typer.Option(help="Parts of the fitting runs that are held out in turn.")] = 4,
    held_out: HeldOut = 8,
    seed: Seed = 0,
    storage: Annotated[Path | None, typer.Option(help="SQLite file that remembers what was tried.")] = None,
    task: OwnTask = None,
    as_json: AsJson = False,
) -> None:
    """Choose parameters by cross-validation on the runs of STORE that are not held out, fit, and save.

    Parameters that are --set are not searched.
    """
    opened = RunStore(store)
    part, held = opened.load().split(held_out, seed)
    given = {"task": built_task(opened, task)} if simulator in OF_TASK else {}
    options: dict[str, Any] = {"fixed": parsed(parameters) | given, "storage": storage}
    try:
        found = search(simulator, part, trials=trials, seed=seed, folds=folds, **options)
    except KeyboardInterrupt:
        kept = f"What was tried is in {storage}; the same command goes on from there." if storage else ""
        print(f"\nStopped. {kept}", file=sys.stderr)
        raise typer.Exit(130) from None
    fitted = found.simulator.fit(part)
    fitted.save(out)
    table = evaluate_simulators({found.name: fitted}, held, part)
    if as_json:
        tried = {name: value for name, value in found.parameters.items() if name not in given}
        chosen = {"simulator": found.name, "parameters": tried, "skill": found.skill, "out": str(out)}
        print_json(chosen | {"held_out": records(table)[0], "trials": records(found.trials)})
    else:
        _print_search(found)
        print_table(readable(table), f"{store}: {len(held)} held-out runs, which took no part in that")
        print(f"{fitted} fitted on {len(part)} runs: {out}")


def learning_curve(
    store: StorePath,
    simulator: Named = "linear",
    parameters: Parameters = None,
    repeats: Annotated[int, typer.Option(help="Random sets of fitting runs of each size.")] = 5,
    held_out: HeldOut = 8,
    seed: Seed = 0,
    task: OwnTask = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Score a simulator fitted on 2, 4, 8, … runs of STORE: how many are needed?"""
    opened = RunStore(store)
    given = {"task": built_task(opened, task)} if simulator in OF_TASK else {}
    chosen = simulators.build(simulator, **parsed(parameters), **given)
    table = curve(chosen, opened.load(), held_out=held_out, repeats=repeats, seed=seed)
    if plot:
        draw(plot, lambda ax: plots.learning_curve(table, ax, f"{plots.heading(table)}, {chosen.name}"))
    if as_json:
        print_json(table.to_dict("records"))
    else:
        print_table(readable(table.set_index("runs")), f"{store}: {chosen} by number of fitting runs")


def _print_search(found: Search) -> None:
    chosen = ", ".join(f"{name}={cell(value)}" for name, value in found.parameters.items())
    print(f"Best of {len(found.trials)} candidates: {found.name} with {chosen or 'no parameters'}")
    print(f"Cross-validated skill {cell(found.skill)}")
    complete = found.trials[found.trials["folds"] == found.trials["folds"].max()]
    best = complete.sort_values("skill", ascending=False, kind="stable").head(10)
    print_table(best.drop(columns=["folds", "problem"]), "The best that were tried")
