"""Commands that record runs and look into stores."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simfluence.cli.options import AsJson, OwnTask, Plot, StorePath
from simfluence.errors import InvalidInput

if TYPE_CHECKING:
    from simfluence.runs import Run
    from simfluence.specs import RecordingSpec
    from simfluence.task import Task


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
    from simfluence.cli.output import print_json
    from simfluence.recording import estimate
    from simfluence.recording import record as record_runs
    from simfluence.specs import RecordingSpec
    from simfluence.storage.store import RunStore

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


def runs_ls(store: StorePath, plot: Plot = None, as_json: AsJson = False) -> None:
    """List the runs of STORE; draw their mean losses."""
    import pandas as pd

    from simfluence.cli.output import draw, print_json, print_table
    from simfluence.storage.store import RunStore

    opened = RunStore(store)
    if plot:
        draw(plot, opened.load().plot)
    info = opened.info
    rows = [_row(opened.read(run_id)) for run_id in opened.ids()]
    if as_json:
        print_json(rows)
    else:
        title = f"{store}: task {info.name}, {info.n_train} training and {info.n_test} test examples, {len(rows)} runs"
        print_table(pd.DataFrame(rows).set_index("run") if rows else pd.DataFrame(), title)


def runs_show(
    store: StorePath, run: Annotated[str, typer.Argument(help="Id of the run.")], as_json: AsJson = False
) -> None:
    """Show one run of STORE."""
    from simfluence.cli.output import print_json
    from simfluence.storage.store import RunStore

    found = RunStore(store).read(run)
    recipe = found.recipe.model_dump() if found.recipe else None
    shown = _row(found) | {"recipe": recipe, "checkpoints": sorted(found.checkpoints)}
    if as_json:
        mean = [float(value) for value in found.losses.mean(1)]
        print_json(shown | {"mean_losses": mean, "curriculum": found.curriculum.tolist()})
    else:
        for name, value in shown.items():
            print(f"{name:>14}  {value}")


def _task(reference: str | None, spec: RecordingSpec) -> Task:
    """The user's own task if one is given, else the ready-made one of the specification."""
    from simfluence import tasks

    if reference:
        return tasks.imported(reference)
    if spec.task is None:
        raise InvalidInput("which task? Name a ready-made one in the file, or give --task package.module:function")
    return spec.task.build()


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
