"""Commands that record runs and inspect stores."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simfluence.cli.options import AsJson, OwnTask, Plot, StorePath
from simfluence.cli.text import complain, say
from simfluence.errors import InvalidInput, StoreError

if TYPE_CHECKING:
    from simfluence.runs import Run
    from simfluence.specs import RecordingSpec
    from simfluence.storage.store import RunStore
    from simfluence.task import Task


__all__ = ["record", "runs_ls", "runs_show"]


def record(
    spec: Annotated[Path, typer.Argument(help="YAML file with the keys task, recipe, curricula and observe.")],
    store: Annotated[Path, typer.Option(help="Folder for the recorded runs.")],
    task: OwnTask = None,
    checkpoints: Annotated[str | None, typer.Option(help="Steps to save parameters at, such as 0,100,200.")] = None,
    every: Annotated[int | None, typer.Option(help="Number of steps between readings of the test losses.")] = None,
    measure: Annotated[list[str] | None, typer.Option(help="Measure to record too; repeatable.")] = None,
    engine: Annotated[str, typer.Option(help="auto, batched (many runs at once) or loop.")] = "auto",
    device: Annotated[str, typer.Option(help="Device to train on.")] = "cpu",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only estimate time, disk and memory, from a few steps.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train under each curriculum of SPEC and record every test loss; continue an interrupted recording."""
    from simfluence.cli.output import print_json
    from simfluence.recording import estimate
    from simfluence.recording import record as record_runs
    from simfluence.specs import RecordingSpec
    from simfluence.storage.store import RunStore

    parsed_spec = RecordingSpec.read(spec)
    built, recipe = _task(task, parsed_spec), parsed_spec.recipe
    curricula = parsed_spec.curricula.build(built.train)
    options = {"checkpoints": checkpoints and _steps(checkpoints), "every": every, "measures": measure}
    observe = parsed_spec.observe.replace(**{name: value for name, value in options.items() if value is not None})
    if dry_run:
        _check_task(RunStore(store), built)
        estimated = estimate(built, recipe, curricula, store, observe=observe, engine=engine, device=device)
        print_json(dataclasses.asdict(estimated)) if as_json else say(estimated)
        return
    try:
        runs = record_runs(built, recipe, curricula, store, observe=observe, engine=engine, device=device)
    except KeyboardInterrupt:
        count = len(RunStore(store).ids()) if RunStore(store).exists else 0
        complain(f"\nStopped. {count} runs are complete in {store}; run the same command again to continue.")
        raise typer.Exit(130) from None
    diverged = sum(run.diverged for run in runs)
    if as_json:
        print_json({"store": str(store), "runs": len(runs), "diverged": diverged})
    else:
        say(f"{len(runs)} runs in {store} ({diverged} diverged)")


def runs_ls(store: StorePath, plot: Plot = None, as_json: AsJson = False) -> None:
    """List the runs of STORE, and draw their mean losses with --plot."""
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

    stored = RunStore(store).read(run)
    recipe = stored.recipe.model_dump() if stored.recipe else None
    fields = _row(stored) | {"recipe": recipe, "checkpoints": sorted(stored.checkpoints)}
    if as_json:
        mean = [float(value) for value in stored.losses.mean(1)]
        print_json(fields | {"mean_losses": mean, "curriculum": stored.curriculum.tolist()})
    else:
        for name, value in fields.items():
            say(f"{name:>14}  {value}")


def _task(reference: str | None, spec: RecordingSpec) -> Task:
    """Build the user's own task, or by default the ready-made task of the specification."""
    from simfluence import tasks

    if reference:
        return tasks.imported(reference)
    if spec.task is None:
        raise InvalidInput(
            "a task is required: name a ready-made one in the file, or pass --task package.module:function"
        )
    return spec.task.build()


def _check_task(store: RunStore, task: Task) -> None:
    """Check that a store, if there is one, has runs of this task.

    Raises:
        StoreError: it has runs of another task.
    """
    if store.exists and store.info.fingerprint != task.fingerprint:
        raise StoreError(
            f"{store.path} has runs of another task ({store.info.name!r}), not of {task.name!r}: "
            "record into another folder"
        )


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
