"""Commands that fit, score and choose simulators."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simfluence.cli.options import (
    SIMULATOR_FORMS,
    SIMULATOR_NAMES,
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
    cross_fitted,
    fitted_all,
    fitted_by_name,
    opened_and_split,
    parsed,
    ready_made_task,
    simulator_class,
    unfitted,
    usual_held_out,
    with_intervals,
)
from simfluence.cli.text import complain, say
from simfluence.errors import InvalidInput, did_you_mean

if TYPE_CHECKING:
    from simfluence.evaluation.tuning import Search
    from simfluence.simulators import Simulator
    from simfluence.storage.store import RunStore

__all__ = ["demo", "evaluate", "fit", "learning_curve", "tune"]

#: The function that runs the demo of each task.
DEMOS = {
    "digits": "simfluence.cli.demo:run_demo",
    "docstrings": "simfluence.cli.demo_docstrings:run_docstrings_demo",
}


def demo(
    folder: Annotated[Path, typer.Option(help="Folder for runs and pictures.")] = Path("simfluence-demo"),
    task: Annotated[str, typer.Option(help=f"One of {', '.join(DEMOS)}.")] = "digits",
    as_json: AsJson = False,
) -> None:
    """Record real runs, fit, score on unseen runs, ask a what-if, and retrain to confirm it."""
    from simfluence._internal.html import readable
    from simfluence._internal.imports import imported_object
    from simfluence.cli.output import print_json, print_table, records

    if task not in DEMOS:
        raise InvalidInput(f"no demo of task {task!r}, {did_you_mean(task, DEMOS)}")
    result = imported_object(DEMOS[task], "demo")(folder)
    if as_json:
        answer = {"store": str(result.store.path), "picture": str(result.picture), "edit": str(result.edit)}
        print_json(answer | {"evaluation": records(result.table), "what_if": records(result.answers)})
        return
    say(f"Recorded runs of the {task} task: {result.store.path}")
    print_table(readable(result.table), f"{result.about} (skill 0: the mean trajectory)")
    print_table(result.answers, f"What if we {result.edit}? Change of the final loss, predicted and retrained")
    say(f"Simulated and real trajectories: {result.picture}")


def fit(
    store: StorePath,
    out: Annotated[Path, typer.Option(help="File for the fitted simulator (.safetensors).")],
    simulator: Named = "best",
    parameters: Parameters = None,
    held_out: HeldOut = None,
    seed: Seed = 0,
    intervals: Intervals = False,
    task: OwnTask = None,
) -> None:
    """Fit a simulator on the runs of STORE that are not held out, and save it."""
    simulator_class(simulator)().with_parameters(**parsed(parameters))  # refuse unknown parameters before fitting
    opened, part, _ = opened_and_split(store, held_out, seed)
    chosen = unfitted(simulator, parameters, opened, task)
    chosen = with_intervals(chosen, seed) if intervals else chosen
    fitted = cross_fitted(chosen, part)
    fitted.save(out)
    say(f"{fitted!r} fitted on {len(part)} runs: {out}")
    if fitted.trust:
        say(f"Forecasts of held-out runs: {fitted.trust}")


def evaluate(
    stores: Annotated[list[Path], typer.Argument(metavar="STORE...", help="Folders of recorded runs.")],
    simulator: Annotated[list[str] | None, typer.Option(help=f"{SIMULATOR_FORMS}; repeatable; by default all.")] = None,
    parameters: Parameters = None,
    held_out: HeldOut = None,
    seed: Seed = 0,
    metric: Annotated[list[str] | None, typer.Option(help="Metric; repeatable; by default all.")] = None,
    intervals: Intervals = False,
    task: OwnTask = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Score simulators on the held-out runs of each STORE against the mean trajectory of the fitting runs.

    Several stores give one table with a row per store and simulator.
    """
    import pandas as pd

    from simfluence import plots
    from simfluence._internal.html import readable
    from simfluence.cli.output import draw, print_json, print_table, records
    from simfluence.evaluation.held_out import METRICS
    from simfluence.evaluation.held_out import evaluate as evaluate_simulators

    splits = {str(store): opened_and_split(store, held_out, seed) for store in stores}
    tables = {}
    interval_seed = seed if intervals else None
    for store, (opened, part, held) in splits.items():
        if simulator:
            chosen = {
                name: fitted_by_name(name, part, parameters, opened, task, interval_seed=interval_seed, judged=False)
                for name in simulator
            }
        else:
            chosen = fitted_all(opened, part, parameters, interval_seed=interval_seed)
        tables[store] = evaluate_simulators(chosen, held, part, metrics=metric or METRICS)
    table = pd.concat(tables, names=["store"]) if len(tables) > 1 else tables[str(stores[0])]
    if plot:
        rows = table.set_axis([": ".join(name) for name in table.index]) if len(tables) > 1 else table
        first = (metric or ["skill"])[0]
        draw(plot, lambda ax: plots.evaluation(rows, ax, "" if len(tables) == 1 else "by store", metric=first))
    if as_json:
        print_json(records(table))
    else:
        titles = [
            f"{store}: {len(held)} held-out runs, {len(part)} to fit on" for store, (_, part, held) in splits.items()
        ]
        print_table(readable(table), "\n".join(titles))


def tune(
    store: StorePath,
    out: Annotated[Path, typer.Option(help="File for the fitted simulator (.safetensors).")],
    simulator: Annotated[
        str, typer.Option(help=f"best, package.module:Class, or one of {', '.join(SIMULATOR_NAMES)}.")
    ] = "best",
    trials: Annotated[int, typer.Option(help="Number of candidates to try.")] = 20,
    parameters: Parameters = None,
    folds: Annotated[int, typer.Option(help="Number of cross-validation folds.")] = 4,
    held_out: HeldOut = None,
    seed: Seed = 0,
    storage: Annotated[Path | None, typer.Option(help="SQLite file to store trials in, and resume from.")] = None,
    task: OwnTask = None,
    as_json: AsJson = False,
) -> None:
    """Choose parameters by cross-validation on the runs of STORE that are not held out, fit, and save.

    Parameters passed by --set are not searched.
    """
    from simfluence._internal.html import readable
    from simfluence.cli.output import print_json, print_table, records
    from simfluence.evaluation.held_out import evaluate as evaluate_simulators
    from simfluence.evaluation.tuning import search

    kind = "best" if simulator == "best" else simulator_class(simulator, "best")
    opened, part, held = opened_and_split(store, held_out, seed)
    task_parameter = _task_parameter(kind, opened, task)
    options: dict[str, Any] = {"fixed": parsed(parameters) | task_parameter, "storage": storage}
    try:
        result = search(kind, part, trials=trials, seed=seed, folds=folds, **options)
    except KeyboardInterrupt:
        advice = f"Finished trials are in {storage}; run the same command again to continue." if storage else ""
        complain(f"\nStopped. {advice}")
        raise typer.Exit(130) from None
    fitted = result.simulator.fit(part)
    fitted.save(out)
    table = evaluate_simulators({result.name: fitted}, held, part)
    if as_json:
        chosen = {name: value for name, value in result.parameters.items() if name not in task_parameter}
        answer = {"simulator": result.name, "parameters": chosen, "skill": result.skill, "out": str(out)}
        print_json(answer | {"held_out": records(table)[0], "trials": records(result.trials)})
    else:
        _print_search(result)
        print_table(readable(table), f"{store}: {len(held)} held-out runs, not used for tuning")
        say(f"{fitted!r} fitted on {len(part)} runs: {out}")


def learning_curve(
    store: StorePath,
    simulator: Named = "best",
    parameters: Parameters = None,
    repeats: Annotated[int, typer.Option(help="Number of random sets of fitting runs of each size.")] = 5,
    held_out: HeldOut = None,
    seed: Seed = 0,
    task: OwnTask = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Score a simulator fitted on 2, 4, 8, … runs of STORE, to see how many are needed."""
    from simfluence import plots
    from simfluence._internal.html import readable
    from simfluence.cli.output import draw, print_json, print_table
    from simfluence.evaluation.learning_curves import learning_curve as curve
    from simfluence.storage.store import RunStore

    opened, chosen = RunStore(store), simulator_class(simulator)()
    task_parameter = {"task": built_task(opened, task)} if chosen.needs_task else {}
    chosen = chosen.with_parameters(**parsed(parameters), **task_parameter)
    runs = opened.load()
    table = curve(
        chosen, runs, held_out=usual_held_out(runs) if held_out is None else held_out, repeats=repeats, seed=seed
    )
    if plot:
        draw(plot, lambda ax: plots.learning_curve(table, ax, f"{plots.heading(table)}, {chosen.name}"))
    if as_json:
        print_json(table.to_dict("records"))
    else:
        print_table(readable(table.set_index("runs")), f"{store}: {chosen} by number of fitting runs")


def _task_parameter(kind: type[Simulator] | str, store: RunStore, task: str | None) -> dict[str, Any]:
    """Return the task as a fixed parameter of the search, where a kind needs it or it is at hand."""
    if isinstance(kind, str):
        built = built_task(store, task) if task else ready_made_task(store)
        return {} if built is None else {"task": built}
    return {"task": built_task(store, task)} if kind.needs_task else {}


def _print_search(result: Search) -> None:
    from simfluence._internal.html import cell
    from simfluence.cli.output import print_table

    chosen = ", ".join(f"{name}={cell(value)}" for name, value in result.parameters.items())
    say(f"Best of {len(result.trials)} candidates: {result.name} with {chosen or 'no parameters'}")
    say(f"Cross-validated skill {cell(result.skill)}")
    complete = result.trials[result.trials["folds"] == result.trials["folds"].max()]
    best = complete.sort_values("skill", ascending=False, kind="stable").head(10)
    print_table(best.drop(columns=["folds", "problem"]), "The best candidates")
