"""Arguments and options that several commands share, and how they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simfluence.cli.text import complain
from simfluence.errors import InvalidInput, SimfluenceError, did_you_mean

if TYPE_CHECKING:
    from simfluence.examples import Examples
    from simfluence.runs import Run, Runs
    from simfluence.simulators import Simulator
    from simfluence.storage.store import RunStore
    from simfluence.task import Task

# Slow imports are inside functions, so that --help does not wait for torch.

__all__ = [
    "METHOD_NAMES",
    "SIMULATOR_FORMS",
    "SIMULATOR_NAMES",
    "AsJson",
    "BaseRun",
    "HeldOut",
    "Intervals",
    "NameOrFile",
    "Named",
    "Out",
    "OwnTask",
    "Parameters",
    "Plot",
    "Seed",
    "StorePath",
    "base_runs",
    "built_task",
    "check_numbers",
    "cross_fitted",
    "fitted_all",
    "fitted_by_name",
    "opened_and_split",
    "parsed",
    "ready_made_task",
    "simulator_class",
    "target",
    "unfitted",
    "usual_held_out",
    "with_intervals",
]

#: Names of the library's own simulators, for help texts; a test compares them with the registry.
SIMULATOR_NAMES = (
    "best",
    "persistence",
    "mean_trajectory",
    "additive",
    "multiplicative",
    "linear",
    "featurized",
    "boosted",
    "tangent",
    "response",
)
#: Names of the library's own attribution methods, for help texts; a test compares them with the registry.
METHOD_NAMES = (
    "ekfac", "kfac", "diagonal", "exact", "cg", "lissa", "arnoldi", "dot", "cosine", "tracin", "tracin-ideal",
)  # fmt: skip
#: The ways to name a simulator to load or to fit, for help texts.
SIMULATOR_FORMS = "Name, package.module:Class, FILE, or package.module:Class=FILE for a file of your own class"
StorePath = Annotated[Path, typer.Argument(help="Folder of recorded runs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
HeldOut = Annotated[
    int | None, typer.Option(help="Number of runs to hold out from fitting; by default a quarter, at most 8.")
]
Seed = Annotated[int, typer.Option(help="Seed of the split into fitting and held-out runs.")]
Parameters = Annotated[list[str] | None, typer.Option("--set", help="A simulator's parameter: l2=10, prior=zero, …")]
Intervals = Annotated[bool, typer.Option("--intervals", help="Fit intervals too, which takes 15 times as long.")]
OwnTask = Annotated[str | None, typer.Option(help="A task of your own, package.module:function; runs that code.")]
Named = Annotated[str, typer.Option(help=f"One of {', '.join(SIMULATOR_NAMES)}, or package.module:Class of your own.")]
NameOrFile = Annotated[str, typer.Option(help=f"{SIMULATOR_FORMS}.")]
BaseRun = Annotated[str | None, typer.Option(help="Id of the base run; by default the first held-out run.")]
Out = Annotated[Path | None, typer.Option(help="Write the results as a table to this Parquet file.")]
Plot = Annotated[Path | None, typer.Option(help="Draw the results to this picture (.png, .pdf, .svg).")]


def fitted_by_name(
    name: str,
    part: Runs,
    parameters: list[str] | None,
    store: RunStore,
    task: str | None = None,
    *,
    interval_seed: int | None = None,
    judged: bool = True,
) -> Simulator:
    """Load a simulator from a file, or fit one.

    Args:
        name: name of a simulator, ``package.module:Class``, a file, or ``package.module:Class=FILE``.
        part: fitting runs.
        parameters: texts ``name=value``.
        store: store of the runs.
        task: the user's own task, ``package.module:function``; by default the store's.
        interval_seed: seed of a ``ConformalSimulator`` to fit around a simulator without intervals; None for none.
        judged: whether to learn from held-out runs how far its forecasts can be trusted.

    Raises:
        InvalidInput: there is no such simulator, or it cannot be fitted on these runs.
        StoreError: the file is damaged or not a simulator.
    """
    simulator = _loaded(name)
    is_fitted = simulator is not None
    simulator = simulator or unfitted(name, parameters, store, task)
    if interval_seed is not None and not simulator.gives_intervals:
        return with_intervals(simulator, interval_seed).fit(part)
    if is_fitted:
        return simulator
    return cross_fitted(simulator, part) if judged else simulator.fit(part)


def cross_fitted(simulator: Simulator, part: Runs) -> Simulator:
    """Fit a simulator, and learn from held-out runs how far to trust it, if there is more than one run."""
    return simulator.cross_fit(part) if len(set(part.ids)) > 1 else simulator.fit(part)


def _loaded(name: str) -> Simulator | None:
    """Load a simulator from ``FILE`` or ``package.module:Class=FILE``; return None if ``name`` is neither."""
    from simfluence.simulators import SIMULATORS, Simulator

    reference, _, file = name.rpartition("=")
    if ":" in reference and Path(file).is_file():
        simulator_class(reference)  # defining the class registers it, which makes its files readable
        return Simulator.load(file)
    if name not in SIMULATORS and Path(name).is_file():
        return Simulator.load(name)
    return None


def unfitted(name: str, parameters: list[str] | None, store: RunStore, task: str | None = None) -> Simulator:
    """Build a simulator with those parameters that it has.

    Raises:
        InvalidInput: there is no such simulator, or no simulator has one of the parameters.
    """
    from simfluence.simulators import SIMULATORS

    chosen, values = simulator_class(name)(), parsed(parameters)
    known = {key for kind in SIMULATORS.values() for key in kind().get_params()}
    chosen.with_parameters(**{k: v for k, v in values.items() if k in chosen.get_params() or k not in known})
    if chosen.needs_task or (task and "task" in chosen.get_params()):
        chosen.set_params(task=built_task(store, task))
    elif "task" in chosen.get_params():
        chosen.set_params(task=ready_made_task(store))
    return chosen


def simulator_class(name: str, *others: str) -> type[Simulator]:
    """Return the class of a simulator by its name, or as ``package.module:Class``, which runs the user's code.

    Raises:
        InvalidInput: there is no such simulator.
    """
    from simfluence._internal.imports import imported_object
    from simfluence.simulators import SIMULATORS, Simulator

    if ":" in name:
        kind = imported_object(name, "simulator")
        if not (isinstance(kind, type) and issubclass(kind, Simulator)):
            raise InvalidInput(f"simulator {name!r} is not a subclass of simfluence.Simulator")
        return kind
    if name not in SIMULATORS:
        raise InvalidInput(f"unknown simulator {name!r}, {did_you_mean(name, (*SIMULATORS, *others))}")
    registered: type[Simulator] = SIMULATORS[name]
    return registered


def built_task(store: RunStore, task: str | None) -> Task:
    """Build the user's own task, or by default the ready-made task of the store."""
    from simfluence import tasks

    return tasks.imported(task) if task else tasks.rebuild(store.info)


def ready_made_task(store: RunStore) -> Task | None:
    """Build the ready-made task of the store, or return None if it is a task of somebody's own."""
    try:
        return built_task(store, None)
    except SimfluenceError:
        return None


def with_intervals(simulator: Simulator, seed: int) -> Simulator:
    """Wrap a simulator in a ``ConformalSimulator``, not yet fitted, unless it gives intervals itself."""
    from simfluence.simulators import ConformalSimulator

    return simulator if simulator.gives_intervals else ConformalSimulator(simulator, seed=seed)


def fitted_all(
    store: RunStore, part: Runs, parameters: list[str] | None, *, interval_seed: int | None = None
) -> dict[str, Simulator]:
    """Fit all simulators of the library that do not need a task; print which cannot be fitted on these runs, and why.

    Raises:
        InvalidInput: no simulator can be fitted on these runs.
    """
    from simfluence.simulators import SIMULATORS

    fitted: dict[str, Simulator] = {}
    problem = InvalidInput(f"{store.path}: no simulator can be fitted")
    names = [name for name in SIMULATOR_NAMES if not SIMULATORS[name].needs_task]
    for name, simulator in {name: unfitted(name, parameters, store) for name in names}.items():
        try:
            chosen = simulator if interval_seed is None else with_intervals(simulator, interval_seed)
            fitted[name] = chosen.fit(part)
        except InvalidInput as error:
            complain(f"{store.path}: left out {name}: {error}")
            problem = error
    if not fitted:
        raise problem
    return fitted


def opened_and_split(store: Path, held_out: int | None, seed: int) -> tuple[RunStore, Runs, Runs]:
    """Open a store, and split its runs into fitting and held-out runs."""
    from simfluence.storage.store import RunStore

    opened = RunStore(store)
    runs = opened.load()
    return opened, *runs.split(usual_held_out(runs) if held_out is None else held_out, seed)


def usual_held_out(runs: Runs) -> int:
    """Return how many runs are held out if nothing is said: a quarter, at least 1 and at most 8."""
    return min(8, max(1, len(runs) // 4))


def parsed(parameters: list[str] | None) -> dict[str, Any]:
    """Parse texts ``name=value``; a value is parsed as JSON if possible, and is text otherwise.

    Raises:
        InvalidInput: a text without "=".
    """
    values = {}
    for text in parameters or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise InvalidInput(f"--set {text!r}: write name=value")
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    return values


def base_runs(store: RunStore, run: str | None, held: Runs, count: int = 1) -> list[Run]:
    """Return the runs to edit: the named one, or the first ``count`` held-out runs.

    Raises:
        InvalidInput: there is no such run, or there are fewer held-out runs.
    """
    if run:
        return [store.read(run)]
    if not 1 <= count <= len(held):
        raise InvalidInput(f"{count} base runs are not available: use --bases with 1 to {len(held)}, the held-out runs")
    return list(held[:count])


def target(text: str | None) -> Any:
    """Parse a target: ``rows:3,4``, ``ids:3,4``, numbers such as ``3`` or ``3,4``; all else is a filter.

    Raises:
        InvalidInput: rows that are not whole numbers.

    >>> target("rows:3,4"), target("ids:a"), target("17"), target("label == 3")
    ({'rows': [3, 4]}, {'ids': ['a']}, [17], 'label == 3')
    """
    kind, colon, listed = (text or "").partition(":")
    entries = [entry.strip() for entry in listed.split(",")]
    if colon and kind.strip() == "ids":
        return {"ids": entries}
    if colon and kind.strip() == "rows":
        if not all(map(_is_number, entries)):
            raise InvalidInput(f"{text!r} must list whole numbers, such as rows:3,4")
        return {"rows": list(map(int, entries))}
    return list(map(int, str(text).split(","))) if _are_numbers(text) else text


def check_numbers(text: str | None, examples: Examples | None) -> None:
    """Check that numbers of the command line cannot mean ids as well as rows.

    Raises:
        InvalidInput: they can, because the examples' ids are numbers too.
    """
    if _are_numbers(text) and examples is not None and examples.numbers_are_ambiguous:
        raise InvalidInput(
            f"{text!r} can mean rows or ids, because the ids of these examples are numbers (such as "
            f"{', '.join(examples.ids[:3])}): write rows:{text} or ids:{text}"
        )


def _are_numbers(text: str | None) -> bool:
    return text is not None and all(map(_is_number, text.split(",")))


def _is_number(text: str) -> bool:
    return text.strip().isdecimal() and len(text) < 19
