"""The command line: arguments in, tables or JSON out."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from simfluence import simulators, tasks
from simfluence.demo import run_demo
from simfluence.edits import Edit, Remove, Reorder, Repeat
from simfluence.errors import InvalidInput, SimfluenceError
from simfluence.evaluation import METRICS
from simfluence.evaluation import evaluate as evaluate_simulators
from simfluence.learning import learning_curve as curve
from simfluence.printing import cell, print_json, print_table, readable, records
from simfluence.recording import estimate
from simfluence.recording import record as record_runs
from simfluence.runs import Run, Runs
from simfluence.simulators import SIMULATORS, ConformalSimulator, Simulator
from simfluence.specs import RecordingSpec
from simfluence.store import RunStore
from simfluence.task import Task
from simfluence.tuning import Search, search
from simfluence.whatif import Forecast, Verification
from simfluence.whatif import what_if as ask

app = typer.Typer(
    help="Simulate training runs: what would the losses have been under another curriculum?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
runs_app = typer.Typer(help="Look into a run store.", no_args_is_help=True)
app.add_typer(runs_app, name="runs")

StorePath = Annotated[Path, typer.Argument(help="Folder of recorded runs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
HeldOut = Annotated[int, typer.Option(help="How many runs are kept from fitting.")]
Seed = Annotated[int, typer.Option(help="Seed of the split into fitting and held-out runs.")]
Parameters = Annotated[list[str] | None, typer.Option("--set", help="A simulator's parameter: l2=10, prior=zero, …")]
Intervals = Annotated[bool, typer.Option("--intervals", help="Fit for intervals too, which takes 15 times as long.")]
OwnTask = Annotated[str | None, typer.Option(help="A task of your own, package.module:function; runs that code.")]


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where to record and draw.")] = Path("simfluence-demo"),
    as_json: AsJson = False,
) -> None:
    """Record real runs, fit, score on unseen runs, ask a what-if, and retrain to confirm it."""
    found = run_demo(folder)
    if as_json:
        parts = {"store": str(found.store.path), "picture": str(found.picture), "edit": str(found.edit)}
        print_json(parts | {"evaluation": records(found.table), "what_if": records(found.answers)})
        return
    print(f"Recorded runs of the digits task: {found.store.path}")
    print_table(
        readable(found.table), "Forecasts of 8 unseen runs, from 24 recorded ones (skill 0: the mean trajectory)"
    )
    print_table(found.answers, f"What if we {found.edit}? Change of the final loss, predicted and retrained")
    print(f"Simulated and real trajectories: {found.picture}")


@app.command()
def record(
    spec: Annotated[Path, typer.Argument(help="YAML file with the keys task, recipe, curricula and observe.")],
    store: Annotated[Path, typer.Option(help="Folder to keep the runs in.")],
    task: OwnTask = None,
    checkpoints: Annotated[str | None, typer.Option(help="Steps to save parameters at, such as 0,100,200.")] = None,
    every: Annotated[int | None, typer.Option(help="Read the test losses after every so many steps.")] = None,
    measure: Annotated[list[str] | None, typer.Option(help="A measure to record too; again for more.")] = None,
    engine: Annotated[str, typer.Option(help="auto, batched (many runs at once) or loop.")] = "auto",
    device: Annotated[str, typer.Option(help="Where to train.")] = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure a few steps, say what it will take.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train under each curriculum of SPEC and record every test loss; goes on where it stopped."""
    wanted = RecordingSpec.read(spec)
    built = _task(task, wanted)
    curricula = wanted.curricula.build(built.train)
    asked = {"checkpoints": checkpoints and _steps(checkpoints), "every": every, "measures": measure}
    observe = wanted.observe.replace(**{name: value for name, value in asked.items() if value is not None})
    if dry_run:
        found = estimate(built, wanted.recipe, curricula, store, observe=observe, engine=engine, device=device)
        print_json(dataclasses.asdict(found)) if as_json else print(found)
        return
    try:
        runs = record_runs(built, wanted.recipe, curricula, store, observe=observe, engine=engine, device=device)
    except KeyboardInterrupt:
        there = len(RunStore(store).ids()) if RunStore(store).exists else 0
        print(f"\nStopped. {there} runs are whole in {store}; the same command goes on from there.", file=sys.stderr)
        raise typer.Exit(130) from None
    diverged = sum(run.diverged for run in runs)
    if as_json:
        print_json({"store": str(store), "runs": len(runs), "diverged": diverged})
    else:
        print(f"{len(runs)} runs in {store} ({diverged} diverged)")


@app.command()
def fit(
    store: StorePath,
    out: Annotated[Path, typer.Option(help="File for the fitted simulator (.safetensors).")],
    simulator: Annotated[str, typer.Option(help=f"One of {', '.join(SIMULATORS)}.")] = "linear",
    parameters: Parameters = None,
    held_out: HeldOut = 8,
    seed: Seed = 0,
    intervals: Intervals = False,
) -> None:
    """Fit a simulator on the runs of STORE that are not held out, and save it."""
    chosen = simulators.build(simulator, **_parsed(parameters))
    chosen = ConformalSimulator(chosen, seed=seed) if intervals else chosen
    part, _ = RunStore(store).load().split(held_out, seed)
    chosen.fit(part).save(out)
    print(f"{chosen} fitted on {len(part)} runs: {out}")


@app.command()
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
    as_json: AsJson = False,
) -> None:
    """Score simulators on the held-out runs of each STORE against the mean trajectory of the others.

    Several stores make one table, a row per store and simulator.
    """
    splits = {str(store): RunStore(store).load().split(held_out, seed) for store in stores}
    tables = {}
    for store, (part, held) in splits.items():
        chosen = {name: _fitted(name, part, parameters) for name in simulator or ()} or _all(store, part, parameters)
        if intervals:
            chosen = {name: ConformalSimulator(each, seed=seed).fit(part) for name, each in chosen.items()}
        tables[store] = evaluate_simulators(chosen, held, part, metrics=metric or METRICS)
    table = pd.concat(tables, names=["store"]) if len(tables) > 1 else tables[str(stores[0])]
    if as_json:
        print_json(records(table))
    else:
        about = (f"{store}: {len(held)} held-out runs, {len(part)} to fit on" for store, (part, held) in splits.items())
        print_table(readable(table), "\n".join(about))


@app.command()
def tune(
    store: StorePath,
    out: Annotated[Path, typer.Option(help="File for the fitted simulator (.safetensors).")],
    simulator: Annotated[str, typer.Option(help=f"best, or one of {', '.join(SIMULATORS)}.")] = "linear",
    trials: Annotated[int, typer.Option(help="How many candidates to try.")] = 20,
    parameters: Parameters = None,
    folds: Annotated[int, typer.Option(help="Parts of the fitting runs that are held out in turn.")] = 4,
    held_out: HeldOut = 8,
    seed: Seed = 0,
    storage: Annotated[Path | None, typer.Option(help="SQLite file that remembers what was tried.")] = None,
    as_json: AsJson = False,
) -> None:
    """Choose parameters by cross-validation on the runs of STORE that are not held out, fit, and save.

    Parameters that are --set are not searched.
    """
    part, held = RunStore(store).load().split(held_out, seed)
    options: dict[str, Any] = {"fixed": _parsed(parameters), "storage": storage}
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
        chosen = {"simulator": found.name, "parameters": found.parameters, "skill": found.skill, "out": str(out)}
        print_json(chosen | {"held_out": records(table)[0], "trials": records(found.trials)})
    else:
        _print_search(found)
        print_table(readable(table), f"{store}: {len(held)} held-out runs, which took no part in that")
        print(f"{fitted} fitted on {len(part)} runs: {out}")


@app.command("learning-curve")
def learning_curve(
    store: StorePath,
    simulator: Annotated[str, typer.Option(help=f"One of {', '.join(SIMULATORS)}.")] = "linear",
    parameters: Parameters = None,
    repeats: Annotated[int, typer.Option(help="Random sets of fitting runs of each size.")] = 5,
    held_out: HeldOut = 8,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Score a simulator fitted on 2, 4, 8, … runs of STORE: how many are needed?"""
    chosen = simulators.build(simulator, **_parsed(parameters))
    table = curve(chosen, RunStore(store).load(), held_out=held_out, repeats=repeats, seed=seed)
    if as_json:
        print_json(table.to_dict("records"))
    else:
        print_table(readable(table.set_index("runs")), f"{store}: {chosen} by number of fitting runs")


@app.command("what-if")
def what_if(
    store: StorePath,
    remove: Annotated[str | None, typer.Option(help="Filter: never show these, such as 'label == 3'.")] = None,
    repeat: Annotated[str | None, typer.Option(help="Filter: show these --times as often.")] = None,
    times: Annotated[int, typer.Option(help="For --repeat.")] = 2,
    first: Annotated[str | None, typer.Option(help="Filter: show these first.")] = None,
    then: Annotated[str | None, typer.Option(help="Filter: show these after --first.")] = None,
    simulator: Annotated[str, typer.Option(help="Name or file of a simulator.")] = "linear",
    parameters: Parameters = None,
    run: Annotated[str | None, typer.Option(help="Id of the base run; by default the first held-out one.")] = None,
    held_out: HeldOut = 8,
    seed: Seed = 0,
    verify: Annotated[bool, typer.Option(help="Retrain to confirm.")] = False,
    task: OwnTask = None,
    out: Annotated[Path | None, typer.Option(help="Write the tidy frame to this Parquet file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Forecast the test losses of a run of STORE had its curriculum been edited."""
    edits = _edits(remove, repeat, times, first, then)
    opened = RunStore(store)
    part, held = opened.load().split(held_out, seed)
    base = opened.read(run) if run else held[0]
    built = (tasks.imported(task) if task else tasks.rebuild(opened.info)) if verify else None
    forecast = ask(_fitted(simulator, part, parameters), base, edits, task=built)
    verified = forecast.verify() if verify else None
    if out:
        (verified or forecast).frame.to_parquet(out, index=False)
    if as_json:
        print_json(_answer(forecast, verified))
    else:
        _print_answer(forecast, verified)


@runs_app.command("ls")
def runs_ls(store: StorePath, as_json: AsJson = False) -> None:
    """List the runs of STORE."""
    opened = RunStore(store)
    info = opened.info
    rows = [_row(opened.read(run_id)) for run_id in opened.ids()]
    if as_json:
        print_json(rows)
    else:
        title = f"{store}: task {info.name}, {info.n_train} training and {info.n_test} test examples, {len(rows)} runs"
        print_table(pd.DataFrame(rows).set_index("run") if rows else pd.DataFrame(), title)


@runs_app.command("show")
def runs_show(
    store: StorePath, run: Annotated[str, typer.Argument(help="Id of the run.")], as_json: AsJson = False
) -> None:
    """Show one run of STORE."""
    found = RunStore(store).read(run)
    recipe = found.recipe.model_dump() if found.recipe else None
    shown = _row(found) | {"recipe": recipe, "checkpoints": sorted(found.checkpoints)}
    if as_json:
        mean = [float(value) for value in found.losses.mean(1)]
        print_json(shown | {"mean_losses": mean, "curriculum": found.curriculum.tolist()})
    else:
        for name, value in shown.items():
            print(f"{name:>14}  {value}")


def main() -> None:
    """Entry point: errors raised on purpose become one line and exit code 1."""
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        app()
    except SimfluenceError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _task(reference: str | None, spec: RecordingSpec) -> Task:
    """The user's own task if one is given, else the ready-made one of the specification."""
    if reference:
        return tasks.imported(reference)
    if spec.task is None:
        raise InvalidInput("which task? Name a ready-made one in the file, or give --task package.module:function")
    return spec.task.build()


def _edits(remove: str | None, repeat: str | None, times: int, first: str | None, then: str | None) -> list[Edit]:
    edits: list[Edit] = []
    if remove:
        edits.append(Remove(remove))
    if repeat:
        edits.append(Repeat(repeat, times))
    if first:
        edits.append(Reorder(first, then))
    if not edits or (then and not first):
        raise InvalidInput("say what to change: --remove, --repeat, or --first (with --then)")
    return edits


def _fitted(name: str, part: Runs, parameters: list[str] | None) -> Simulator:
    """A simulator read from a file, or one fitted now."""
    if name not in SIMULATORS and Path(name).is_file():
        return Simulator.load(name)
    return _unfitted(name, parameters).fit(part)


def _unfitted(name: str, parameters: list[str] | None) -> Simulator:
    """A simulator with those of the parameters that it has; one that none has is an error."""
    chosen, given = simulators.build(name), _parsed(parameters)
    known = {key for kind in SIMULATORS.values() for key in kind().get_params()}
    return chosen.with_parameters(**{k: v for k, v in given.items() if k in chosen.get_params() or k not in known})


def _all(store: str, part: Runs, parameters: list[str] | None) -> dict[str, Simulator]:
    """Every simulator that can be fitted on these runs of the store; says of the others why not."""
    fitted = {}
    for chosen in [_unfitted(name, parameters) for name in SIMULATORS]:
        try:
            fitted[chosen.name] = chosen.fit(part)
        except InvalidInput as error:
            print(f"{store}: left out {chosen.name}: {error}", file=sys.stderr)
    return fitted


def _parsed(parameters: list[str] | None) -> dict[str, Any]:
    """``name=value`` texts; a value is read as JSON where it is JSON, and is text otherwise."""
    found = {}
    for text in parameters or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise InvalidInput(f"--set {text!r}: write name=value")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _steps(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InvalidInput(f"--checkpoints {text!r}: write step numbers such as 0,100,200") from None


def _row(run: Run) -> dict[str, Any]:
    first, last = float(run.losses[0].mean()), float(run.losses[-1].mean())
    return {
        "run": run.id,
        "steps": run.steps,
        "initial_loss": first,
        "final_loss": last,
        "diverged": run.diverged,
        "verification": run.verification,
    }


def _answer(forecast: Forecast, verified: Verification | None) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "run": forecast.run.id,
        "edits": [str(edit) for edit in forecast.edits],
        "final_loss": {"base": forecast.base[-1].tolist(), "what_if": forecast.what_if[-1].tolist()},
        "change": forecast.change.tolist(),
    }
    if verified:
        answer |= {"actual_change": verified.actual_change.tolist(), "final_mse": verified.final_mse}
        answer["delta_correlation"] = verified.delta_correlation
    return answer


def _print_search(found: Search) -> None:
    chosen = ", ".join(f"{name}={cell(value)}" for name, value in found.parameters.items())
    print(f"Best of {len(found.trials)} candidates: {found.name} with {chosen or 'no parameters'}")
    print(f"Cross-validated skill {cell(found.skill)}")
    complete = found.trials[found.trials["folds"] == found.trials["folds"].max()]
    best = complete.sort_values("skill", ascending=False, kind="stable").head(10)
    print_table(best.drop(columns=["folds", "problem"]), "The best that were tried")


def _print_answer(forecast: Forecast, verified: Verification | None) -> None:
    change = pd.DataFrame({"predicted": forecast.change}).rename_axis("test")
    if verified:
        change["retrained"] = verified.actual_change
    if forecast.run.test is not None:
        change = change.join(forecast.run.test.table)
    largest = change["predicted"].abs().sort_values(ascending=False).index[:10]
    print(forecast)
    print_table(change.loc[largest], "Largest changes of the final loss")
    if verified:
        print(f"Retrained: mean final loss {verified.actual[-1].mean():.3f} (was {forecast.run.losses[-1].mean():.3f})")
        print(f"Delta correlation {verified.delta_correlation:.3f}, final-loss MSE {verified.final_mse:.4g}")
