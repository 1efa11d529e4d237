"""What several commands take, and how it is read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from simfluence import simulators, tasks
from simfluence.errors import InvalidInput
from simfluence.runs import Run, Runs
from simfluence.simulators import OF_TASK, SIMULATORS, Simulator
from simfluence.storage.store import RunStore
from simfluence.task import Task

StorePath = Annotated[Path, typer.Argument(help="Folder of recorded runs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
HeldOut = Annotated[int, typer.Option(help="How many runs are kept from fitting.")]
Seed = Annotated[int, typer.Option(help="Seed of the split into fitting and held-out runs.")]
Parameters = Annotated[list[str] | None, typer.Option("--set", help="A simulator's parameter: l2=10, prior=zero, …")]
Intervals = Annotated[bool, typer.Option("--intervals", help="Fit for intervals too, which takes 15 times as long.")]
OwnTask = Annotated[str | None, typer.Option(help="A task of your own, package.module:function; runs that code.")]
Named = Annotated[str, typer.Option(help=f"One of {', '.join((*SIMULATORS, *OF_TASK))}.")]
NameOrFile = Annotated[str, typer.Option(help="Name or file of a simulator.")]
BaseRun = Annotated[str | None, typer.Option(help="Id of the base run; by default the first held-out one.")]
Out = Annotated[Path | None, typer.Option(help="Write the tidy frame to this Parquet file.")]
Plot = Annotated[Path | None, typer.Option(help="Draw it into this picture (.png, .pdf, .svg).")]


def fitted_by_name(
    name: str, part: Runs, parameters: list[str] | None, store: RunStore, task: str | None = None
) -> Simulator:
    """A simulator read from a file, or one fitted now."""
    if name not in {*SIMULATORS, *OF_TASK} and Path(name).is_file():
        return Simulator.load(name)
    return unfitted(name, parameters, store, task).fit(part)


def unfitted(name: str, parameters: list[str] | None, store: RunStore, task: str | None = None) -> Simulator:
    """A simulator with those of the parameters that it has; one that none has is an error."""
    chosen, given = simulators.build(name), parsed(parameters)
    known = {key for kind in (*SIMULATORS.values(), *OF_TASK.values()) for key in kind().get_params()}
    chosen.with_parameters(**{k: v for k, v in given.items() if k in chosen.get_params() or k not in known})
    return chosen.set_params(task=built_task(store, task)) if name in OF_TASK else chosen


def built_task(store: RunStore, task: str | None) -> Task:
    """The user's own task if one is given, else the ready-made one that the store is of."""
    return tasks.imported(task) if task else tasks.rebuild(store.info)


def fitted_all(store: str, part: Runs, parameters: list[str] | None) -> dict[str, Simulator]:
    """Every simulator that can be fitted on these runs of the store; says of the others why not."""
    fitted = {}
    for chosen in [unfitted(name, parameters, RunStore(store)) for name in SIMULATORS]:
        try:
            fitted[chosen.name] = chosen.fit(part)
        except InvalidInput as error:
            print(f"{store}: left out {chosen.name}: {error}", file=sys.stderr)
    return fitted


def parsed(parameters: list[str] | None) -> dict[str, Any]:
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


def base_runs(store: RunStore, run: str | None, held: Runs, count: int = 1) -> list[Run]:
    """The runs to be edited: the one that is named, or the first held-out ones."""
    if run:
        return [store.read(run)]
    if not 1 <= count <= len(held):
        raise InvalidInput(f"{count} base runs, but {len(held)} are held out")
    return list(held[:count])
