"""Commands that ask what-if questions of a simulator."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from simfluence.cli.options import (
    AsJson,
    BaseRun,
    HeldOut,
    Intervals,
    NameOrFile,
    Out,
    OwnTask,
    Parameters,
    Plot,
    Seed,
    StorePath,
    base_runs,
    built_task,
    check_numbers,
    fitted_by_name,
    opened_and_split,
    target,
)
from simfluence.cli.text import say
from simfluence.errors import InvalidInput

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from simfluence.edits import Edit
    from simfluence.queries.forecast import Forecast
    from simfluence.queries.forecasts import Forecasts
    from simfluence.recipe import Recipe
    from simfluence.runs import Run
    from simfluence.simulators import Simulator
    from simfluence.task import Task


__all__ = ["leave_one_out", "removal", "what_if"]

Top = Annotated[int, typer.Option(help="Number of rows to show.")]
TestTarget = Annotated[str | None, typer.Option(help="Test examples: a filter, rows:3,4 or ids:3,4; by default all.")]


def what_if(
    store: StorePath,
    remove: Annotated[
        str | None, typer.Option(help="Never show these: a filter such as 'label == 3', rows:3,4 or ids:3,4.")
    ] = None,
    keep: Annotated[str | None, typer.Option(help="Show only these: a filter, rows:… or ids:….")] = None,
    repeat: Annotated[str | None, typer.Option(help="Show these --times as often: a filter, rows:… or ids:….")] = None,
    times: Annotated[int, typer.Option(help="For --repeat.")] = 2,
    first: Annotated[str | None, typer.Option(help="Show these first: a filter, rows:… or ids:….")] = None,
    then: Annotated[str | None, typer.Option(help="Show these after --first: a filter, rows:… or ids:….")] = None,
    fill: Annotated[str, typer.Option(help="How to fill removed slots: shrink, repack or resample.")] = "shrink",
    spec: Annotated[Path | None, typer.Option(help="YAML file of queries, instead of these edits.")] = None,
    simulator: NameOrFile = "best",
    parameters: Parameters = None,
    intervals: Intervals = False,
    run: BaseRun = None,
    bases: Annotated[int, typer.Option(help="Number of held-out runs to edit, without --run.")] = 1,
    held_out: HeldOut = None,
    seed: Seed = 0,
    verify: Annotated[bool, typer.Option(help="Retrain to confirm; STORE keeps the retrained runs.")] = False,
    seeds: Annotated[int, typer.Option(help="For --verify: number of seeds, to measure their noise.")] = 1,
    by: Annotated[
        str | None, typer.Option(help="Group by this column of the test examples, in --verify too (else by label).")
    ] = None,
    task: OwnTask = None,
    out: Out = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Forecast what the test losses of runs of STORE would have been under edited curricula."""
    from simfluence.cli.output import print_json
    from simfluence.queries.questions import what_if as ask
    from simfluence.specs import WhatIfSpec

    edits = _edits(remove, keep, repeat, times, first, then, fill)
    if bool(edits) == bool(spec):
        raise InvalidInput("an edit is required: --remove, --keep, --repeat, --first (with --then), or --spec")
    if seeds != 1 and not verify:
        raise InvalidInput("--seeds is the number of retrainings of --verify: pass both, or neither")
    opened, part, held = opened_and_split(store, held_out, seed)
    base = base_runs(opened, run, held, bases)
    for text in (remove, keep, repeat, first, then):
        check_numbers(text, base[0].train)
    built = built_task(opened, task) if verify else None
    interval_seed = seed if intervals else None
    fitted = fitted_by_name(simulator, part, parameters, opened, task, interval_seed=interval_seed)
    queries: Any = WhatIfSpec.read(spec).queries if spec else edits
    forecast = ask(fitted, base[0] if len(base) == 1 else base, queries, task=built)
    verified = forecast.verify(store=store, seeds=seeds, group=by) if verify else None
    if out:
        (verified or forecast).frame.to_parquet(out, index=False)
    answer = _Answer(forecast, verified, by)
    if plot:
        answer.draw(plot)
    if as_json:
        print_json(answer.content())
        return
    answer.print()
    if built and base[0].recipe:
        say(_costs(forecast, built, base[0].recipe))


def _costs(forecast: Forecast | Forecasts, task: Task, recipe: Recipe) -> str:
    """Say from how many questions on the simulator saves time, with the time of a retraining measured on its steps."""
    from simfluence.queries.forecast import Forecast
    from simfluence.recording.estimate import duration, estimate

    rows = [[forecast.curriculum]] if isinstance(forecast, Forecast) else forecast.curricula
    retrain = estimate(task, recipe, [curriculum for row in rows for curriculum in row], steps=5).seconds_per_run
    simulate, fit = forecast.simulate_seconds, forecast.fit_seconds
    said = f"Retraining takes {duration(retrain)} a question"
    if simulate is None:
        return f"{said}."
    said += f", the simulator {duration(simulate)}"
    if simulate >= retrain:
        return f"{said}: retraining is cheaper, and exact."
    if fit is None:
        return f"{said} once it is fitted."
    questions = math.ceil(forecast.break_even(retrain))
    return (
        f"{said} and {duration(fit)} to fit: it is cheaper from {questions:,} questions on, not counting the runs that "
        "it was fitted on."
    )


def leave_one_out(
    store: StorePath,
    simulator: NameOrFile = "best",
    parameters: Parameters = None,
    run: BaseRun = None,
    held_out: HeldOut = None,
    seed: Seed = 0,
    test: TestTarget = None,
    by: Annotated[str | None, typer.Option(help="Leave out groups: a column of the training examples.")] = None,
    derivative: Annotated[
        bool, typer.Option(help="Use derivatives, for --simulator tangent: faster, less accurate.")
    ] = False,
    top: Top = 10,
    task: OwnTask = None,
    out: Out = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Forecast the test losses of a run of STORE without each training example, and rank the examples.

    The gain of an example is how far the mean final loss falls without it. Examples with large gains are suspects.
    """
    from simfluence import plots
    from simfluence.cli.output import draw, print_json, print_table, records
    from simfluence.queries.effects import rank_suspects

    opened, part, held = opened_and_split(store, held_out, seed)
    base = base_runs(opened, run, held)[0]
    check_numbers(test, base.test)
    fitted = fitted_by_name(simulator, part, parameters, opened, task)
    method: Literal["simulate", "derivative"] = "derivative" if derivative else "simulate"
    table = rank_suspects(fitted, base, test=target(test), by=by, method=method)
    if out or plot:
        changes = _left_out(fitted, base, by, method)
        if out:
            changes.melt(ignore_index=False, value_name="change").reset_index().to_parquet(out)
        if plot:
            title = f"{base.task_name}: {fitted.name}, {len(part)} runs to fit on, base run {base.id}"
            draw(plot, lambda ax: plots.heat_map(changes, ax, title))
    if as_json:
        print_json({"run": base.id, "simulator": str(fitted), "ranking": records(table)})
        return
    title = f"{fitted}, base run {base.id}: gain of the mean final loss by leaving out"
    if by:
        print_table(table, f"{title} each {by}")
    else:
        print_table(table.head(top), f"{title} each example; the most suspect examples")
        print_table(table.tail(top)[::-1], "The most useful examples")


def _left_out(fitted: Simulator, base: Run, by: str | None, method: Literal["simulate", "derivative"]) -> pd.DataFrame:
    """Return the change of each final loss: a row per test example, a column per training example or group."""
    import pandas as pd

    from simfluence.queries.effects import leave_group_out
    from simfluence.queries.effects import leave_one_out as leave_each_out

    if by:
        return leave_group_out(fitted, base, by).rename_axis("test")
    columns = pd.RangeIndex(base.curriculum.n_train, name="train")
    return pd.DataFrame(leave_each_out(fitted, base, method).values, columns=columns).rename_axis("test")


def removal(
    store: StorePath,
    where: Annotated[
        str | None, typer.Option(help="Forecast the losses without these: a filter, rows:… or ids:….")
    ] = None,
    by: Annotated[str | None, typer.Option(help="Forecast the losses without each value of this column.")] = None,
    past: Annotated[
        float | None, typer.Option(help="Find the smallest removal that raises the loss of --test past this.")
    ] = None,
    best: Annotated[
        int | None, typer.Option(help="Find the best removal of this many examples to lower the loss of --test.")
    ] = None,
    test: TestTarget = None,
    exact: Annotated[bool, typer.Option(help="Find a proven optimum; for --simulator additive.")] = False,
    fill: Annotated[str, typer.Option(help="For --where and --by: shrink, repack or resample.")] = "shrink",
    simulator: NameOrFile = "best",
    parameters: Parameters = None,
    intervals: Intervals = False,
    run: BaseRun = None,
    held_out: HeldOut = None,
    seed: Seed = 0,
    task: OwnTask = None,
    out: Out = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Forecast the losses without some examples, or find which examples to remove to move a loss."""
    import pandas as pd

    from simfluence import plots
    from simfluence.cli.output import draw, print_json, print_table, records
    from simfluence.queries.removal import best_removal, forecast_removal, smallest_removal

    if sum(option is not None for option in (where, by, past, best)) != 1:
        raise InvalidInput("a question is required: one of --where, --by, --past (with --test), --best (with --test)")
    opened, part, held = opened_and_split(store, held_out, seed)
    base = base_runs(opened, run, held)[0]
    check_numbers(where, base.train)
    check_numbers(test, base.test)
    interval_seed = seed if intervals else None
    fitted = fitted_by_name(simulator, part, parameters, opened, task, interval_seed=interval_seed)
    if past is None and best is None:
        targets = target(where) if where is not None else _groups(base, str(by))
        answer = _Answer(forecast_removal(fitted, base, targets, fill=fill), None, None)
        if out:
            answer.forecast.to_parquet(out)
        if plot:
            answer.draw(plot)
        print_json(answer.content()) if as_json else answer.print()
        return
    tests = range(base.losses.shape[1]) if test is None else target(test)
    with _warning_once():
        if past is not None:
            chosen = smallest_removal(fitted, base, tests, past, exact=exact)
        else:
            chosen = best_removal(fitted, base, tests, int(best or 0), exact=exact)
    ids = [base.train.ids[index] for index in chosen.examples] if base.train else list(map(str, chosen.examples))
    table = pd.DataFrame({"train": chosen.examples, "id": ids, "loss": chosen.losses[1:]})
    if out:
        table.to_parquet(out, index=False)
    if plot:
        title = f"{base.task_name}: {fitted.name}: {chosen}"
        draw(plot, lambda ax: plots.removal_curve(chosen.losses, past, ax, title))
    if as_json:
        content = {"run": base.id, "simulator": str(fitted), "removed": records(table)}
        print_json(content | {"losses": chosen.losses.tolist(), "reached": chosen.reached, "exact": chosen.exact})
        return
    say(f"{fitted}, base run {base.id}: remove {chosen}")
    if len(table):
        print_table(table.set_index("train"), "In the order of removal, with the loss after each")


@contextlib.contextmanager
def _warning_once() -> Iterator[None]:
    """Show the first warning of each kind only: a search simulates many candidates, each with its own warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in {warning.category: warning for warning in reversed(caught)}.values():
        warnings.warn(warning.message, stacklevel=2)


class _Answer:
    """Output of one forecast or many, with retrained losses if available: as text, as JSON and as a picture."""

    def __init__(self, forecast: Forecast | Forecasts, verified: Any, by: str | None) -> None:
        self.forecast, self.verified, self.by = forecast, verified, by
        self.groups = forecast.by_group(by) if by else None

    def content(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        from simfluence.cli.output import records
        from simfluence.queries.forecast import Forecast

        forecast = self.forecast
        content = self._of_one(forecast) if isinstance(forecast, Forecast) else self._of_many(forecast)
        return content | ({} if self.groups is None else {"by": records(self.groups)})

    def _of_one(self, forecast: Forecast) -> dict[str, Any]:
        final = {"base": forecast.base[-1].tolist(), "what_if": forecast.what_if[-1].tolist()}
        if forecast.low is not None and forecast.high is not None:
            final |= {"low": forecast.low[-1].tolist(), "high": forecast.high[-1].tolist()}
        answer: dict[str, Any] = {"run": forecast.run.id, "edits": [str(edit) for edit in forecast.edits]}
        if forecast.run.test is not None:
            answer["test"] = forecast.run.test.ids
        answer |= {"final_loss": final, "change": forecast.change.tolist()}
        if forecast.judgement:
            judged = forecast.judgement
            answer["judgement"] = dataclasses.asdict(judged) | {"trusted": judged.trusted, "doubts": judged.doubts}
        if self.verified:
            names = (
                "final_mse", "delta_correlation", "group_correlation", "within_correlation", "relative_error",
                "coverage", "seed_share",
            )  # fmt: skip
            answer |= {name: getattr(self.verified, name) for name in names}
            answer |= {"actual_change": self.verified.actual_change.tolist(), "hit_rate": self.verified.hit_rate()}
        return answer

    def _of_many(self, forecasts: Forecasts) -> dict[str, Any]:
        from simfluence.cli.output import records

        answer: dict[str, Any] = {"runs": [run.id for run in forecasts.runs], "queries": records(forecasts.ranking())}
        return answer | ({"verification": records(self.verified.table)} if self.verified else {})

    def print(self) -> None:
        """Print summaries and tables."""
        from simfluence.cli.output import print_table
        from simfluence.queries.forecast import Forecast

        if isinstance(self.forecast, Forecast):
            say(self.forecast.summary())
            table = self.forecast.ranking().rename(columns={"change": "predicted"})
            if self.verified:
                table.insert(3, "retrained", self.verified.actual_change[table.index])
            print_table(table.head(10), "Largest changes of the final loss")
        elif self.verified:
            print_table(self.verified.table, f"{self.forecast}: change of the mean final loss, forecast and retrained")
        else:
            print_table(self.forecast.ranking(), f"{self.forecast}: change of the mean final loss")
        if self.groups is not None:
            print_table(self.groups, f"By {self.by}")
        if self.verified:
            say(self.verified.summary())

    def draw(self, path: Path) -> None:
        """Draw the mean trajectory of one query, or the mean changes of many, with the retrained ones."""
        from simfluence.cli.output import draw

        draw(path, (self.verified or self.forecast).plot)


def _edits(
    remove: str | None, keep: str | None, repeat: str | None, times: int, first: str | None, then: str | None, fill: str
) -> list[Edit]:
    from simfluence.edits import Keep, Remove, Reorder, Repeat

    if then and not first:
        raise InvalidInput("--then requires --first: pass both")
    edits: list[Edit] = []
    if remove:
        edits.append(Remove(target(remove), fill))
    if keep:
        edits.append(Keep(target(keep), fill))
    if repeat:
        edits.append(Repeat(target(repeat), times, fill))
    if first:
        edits.append(Reorder(target(first), target(then)))
    return edits


def _groups(base: Run, column: str) -> Mapping[str, np.ndarray]:
    """Return the indices of the training examples with each value of a column."""
    import numpy as np

    if base.train is None:
        raise InvalidInput(
            f"run {base.id} has no metadata for its training examples: --by cannot look up column {column!r}"
        )
    values = np.array(base.train.column(column), dtype=object)
    return {f"{column} {value}": np.flatnonzero(values == value) for value in sorted(set(values.tolist()))}
