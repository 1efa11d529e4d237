"""What several commands take, and how it is read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simfluence.errors import InvalidInput, did_you_mean

if TYPE_CHECKING:
    from simfluence.runs import Run, Runs
    from simfluence.simulators import Simulator
    from simfluence.storage.store import RunStore
    from simfluence.task import Task

# What these modules need beside arguments is imported in functions: help must not wait for torch.

#: The library's own simulators, for help texts; a test compares them with the registry.
SIMULATOR_NAMES = (
    "persistence",
    "mean_trajectory",
    "additive",
    "multiplicative",
    "linear",
    "featurized",
    "boosted",
    "tangent",
)
#: The library's own attribution methods, likewise.
METHOD_NAMES = (
    "ekfac", "kfac", "diagonal", "exact", "cg", "lissa", "arnoldi", "dot", "cosine", "tracin", "tracin-ideal",
)  # fmt: skip
StorePath = Annotated[Path, typer.Argument(help="Folder of recorded runs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
HeldOut = Annotated[int, typer.Option(help="How many runs are kept from fitting.")]
Seed = Annotated[int, typer.Option(help="Seed of the split into fitting and held-out runs.")]
Parameters = Annotated[list[str] | None, typer.Option("--set", help="A simulator's parameter: l2=10, prior=zero, …")]
Intervals = Annotated[bool, typer.Option("--intervals", help="Fit for intervals too, which takes 15 times as long.")]
OwnTask = Annotated[str | None, typer.Option(help="A task of your own, package.module:function; runs that code.")]
Named = Annotated[str, typer.Option(help=f"One of {', '.join(SIMULATOR_NAMES)}, or package.module:Class of your own.")]
NameOrFile = Annotated[str, typer.Option(help="Name, package.module:Class or file of a simulator.")]
BaseRun = Annotated[str | None, typer.Option(help="Id of the base run; by default the first held-out one.")]
Out = Annotated[Path | None, typer.Option(help="Write the tidy frame to this Parquet file.")]
Plot = Annotated[Path | None, typer.Option(help="Draw it into this picture (.png, .pdf, .svg).")]


def fitted_by_name(
    name: str, part: Runs, parameters: list[str] | None, store: RunStore, task: str | None = None
) -> Simulator:
    """Read a simulator from a file, or fit one now."""
    from simfluence.simulators import SIMULATORS, Simulator

    if name not in SIMULATORS and ":" not in name and Path(name).is_file():
        return Simulator.load(name)
    return unfitted(name, parameters, store, task).fit(part)


def unfitted(name: str, parameters: list[str] | None, store: RunStore, task: str | None = None) -> Simulator:
    """Build a simulator with those of the parameters that it has; a parameter that no simulator has is an error."""
    from simfluence.simulators import SIMULATORS

    chosen, values = simulator_class(name)(), parsed(parameters)
    known = {key for kind in SIMULATORS.values() for key in kind().get_params()}
    chosen.with_parameters(**{k: v for k, v in values.items() if k in chosen.get_params() or k not in known})
    if chosen.needs_task:
        chosen.set_params(task=built_task(store, task))
    return chosen


def simulator_class(name: str, *others: str) -> type[Simulator]:
    """The class of a simulator: by its name, or as ``package.module:Class``, which runs the user's code.

    Raises:
        InvalidInput: there is no such simulator.
    """
    from simfluence._internal.imports import imported_object
    from simfluence.simulators import SIMULATORS, Simulator

    if ":" in name:
        kind = imported_object(name, "simulator")
        if not (isinstance(kind, type) and issubclass(kind, Simulator)):
            raise InvalidInput(f"simulator {name!r} is not a class that derives from simfluence.Simulator")
        return kind
    if name not in SIMULATORS:
        raise InvalidInput(f"unknown simulator {name!r}, {did_you_mean(name, (*SIMULATORS, *others))}")
    found: type[Simulator] = SIMULATORS[name]
    return found


def built_task(store: RunStore, task: str | None) -> Task:
    """Build the user's own task if one is given, else the ready-made one that the store is of."""
    from simfluence import tasks

    return tasks.imported(task) if task else tasks.rebuild(store.info)


def with_intervals(simulator: Simulator, part: Runs, seed: int) -> Simulator:
    """Return the simulator if it gives intervals, else one around it that does, fitted on the same runs."""
    from simfluence.simulators import ConformalSimulator

    return simulator if simulator.gives_intervals else ConformalSimulator(simulator, seed=seed).fit(part)


def fitted_all(store: str, part: Runs, parameters: list[str] | None) -> dict[str, Simulator]:
    """Fit each of the library's simulators that can be fitted on these runs alone; say of the others why not."""
    from simfluence.simulators import SIMULATORS
    from simfluence.storage.store import RunStore

    fitted = {}
    names = [name for name in SIMULATOR_NAMES if not SIMULATORS[name].needs_task]
    for chosen in [unfitted(name, parameters, RunStore(store)) for name in names]:
        try:
            fitted[chosen.name] = chosen.fit(part)
        except InvalidInput as error:
            print(f"{store}: left out {chosen.name}: {error}", file=sys.stderr)
    return fitted


def opened_and_split(store: Path, held_out: int, seed: int) -> tuple[RunStore, Runs, Runs]:
    """Open a store, and split its runs into those to fit on and those that are held out."""
    from simfluence.storage.store import RunStore

    opened = RunStore(store)
    return opened, *opened.load().split(held_out, seed)


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
