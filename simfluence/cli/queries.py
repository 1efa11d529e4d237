"""Commands that ask what-if questions of a simulator."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    fitted_by_name,
    opened_and_split,
    with_intervals,
)
from simfluence.errors import InvalidInput

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from simfluence.edits import Edit
    from simfluence.queries.forecast import Forecast
    from simfluence.queries.forecasts import Forecasts
    from simfluence.runs import Run
    from simfluence.simulators import Simulator


Top = Annotated[int, typer.Option(help="How many rows to show.")]
TestTarget = Annotated[str | None, typer.Option(help="Test example (index), or a filter over them; all if none.")]


def what_if(
    store: StorePath,
    remove: Annotated[str | None, typer.Option(help="Filter: never show these, such as 'label == 3'.")] = None,
    keep: Annotated[str | None, typer.Option(help="Filter: show nothing but these.")] = None,
    repeat: Annotated[str | None, typer.Option(help="Filter: show these --times as often.")] = None,
    times: Annotated[int, typer.Option(help="For --repeat.")] = 2,
    first: Annotated[str | None, typer.Option(help="Filter: show these first.")] = None,
    then: Annotated[str | None, typer.Option(help="Filter: show these after --first.")] = None,
    fill: Annotated[str, typer.Option(help="What becomes of places: shrink, repack or resample.")] = "shrink",
    spec: Annotated[Path | None, typer.Option(help="YAML file of queries, instead of edits here.")] = None,
    simulator: NameOrFile = "linear",
    parameters: Parameters = None,
    intervals: Intervals = False,
    run: BaseRun = None,
    bases: Annotated[int, typer.Option(help="How many held-out runs to ask of, if no --run.")] = 1,
    held_out: HeldOut = 8,
    seed: Seed = 0,
    verify: Annotated[bool, typer.Option(help="Retrain to confirm; kept in STORE, so once is enough.")] = False,
    seeds: Annotated[int, typer.Option(help="For --verify: retrain from so many seeds, to tell their noise.")] = 1,
    by: Annotated[str | None, typer.Option(help="Sum up by this column of the test examples.")] = None,
    task: OwnTask = None,
    out: Out = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Forecast the test losses of runs of STORE had their curricula been edited."""
    from simfluence.cli.output import print_json
    from simfluence.queries.questions import what_if as ask
    from simfluence.specs import WhatIfSpec

    edits = _edits(remove, keep, repeat, times, first, then, fill)
    if bool(edits) == bool(spec):
        raise InvalidInput("say what to change: --remove, --keep, --repeat, --first (with --then), or --spec")
    opened, part, held = opened_and_split(store, held_out, seed)
    of = base_runs(opened, run, held, bases)
    built = built_task(opened, task) if verify else None
    fitted = fitted_by_name(simulator, part, parameters, opened, task)
    fitted = with_intervals(fitted, part, seed) if intervals else fitted
    queries: Any = WhatIfSpec.read(spec).queries if spec else edits
    forecast = ask(fitted, of[0] if len(of) == 1 else of, queries, task=built)
    verified = forecast.verify(store=store, seeds=seeds) if verify else None
    if out:
        (verified or forecast).frame.to_parquet(out, index=False)
    show = _Answer(forecast, verified, by)
    if plot:
        show.draw(plot)
    print_json(show.content()) if as_json else show.print()


def leave_one_out(
    store: StorePath,
    simulator: NameOrFile = "linear",
    parameters: Parameters = None,
    run: BaseRun = None,
    held_out: HeldOut = 8,
    seed: Seed = 0,
    test: TestTarget = None,
    by: Annotated[str | None, typer.Option(help="Leave out groups: a column of the training examples.")] = None,
    derivative: Annotated[
        bool, typer.Option(help="By derivatives, for --simulator tangent: quicker, rougher.")
    ] = False,
    top: Top = 10,
    task: OwnTask = None,
    out: Out = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Forecast the test losses of a run of STORE without each training example; rank the suspects.

    The gain of an example is how far the mean final loss falls without it: those with the largest are suspects.
    """
    from simfluence import plots
    from simfluence.cli.output import draw, print_json, print_table, records
    from simfluence.queries.effects import rank_suspects

    opened, part, held = opened_and_split(store, held_out, seed)
    base = base_runs(opened, run, held)[0]
    fitted = fitted_by_name(simulator, part, parameters, opened, task)
    target = _test(test)
    method = "derivative" if derivative else "simulate"
    table = rank_suspects(fitted, base, test=target, by=by, method=method)
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
    said = f"{fitted}, base run {base.id}: gain of the mean final loss by leaving out"
    if by:
        print_table(table, f"{said} each {by}")
    else:
        print_table(table.head(top), f"{said} each example; the most suspect")
        print_table(table.tail(top)[::-1], "The most useful")


def _left_out(fitted: Simulator, base: Run, by: str | None, method: str) -> pd.DataFrame:
    """A row per test example, a column per training example or group."""
    import pandas as pd

    from simfluence.queries.effects import leave_group_out
    from simfluence.queries.effects import leave_one_out as leave_each_out

    if by:
        return leave_group_out(fitted, base, by).rename_axis("test")
    columns = pd.RangeIndex(base.curriculum.n_train, name="train")
    return pd.DataFrame(leave_each_out(fitted, base, method), columns=columns).rename_axis("test")


def removal(
    store: StorePath,
    where: Annotated[str | None, typer.Option(help="Filter: forecast the losses without these.")] = None,
    by: Annotated[str | None, typer.Option(help="Forecast the losses without each value of this column.")] = None,
    past: Annotated[float | None, typer.Option(help="The smallest removal that raises --test past this loss.")] = None,
    best: Annotated[int | None, typer.Option(help="The best so many to remove, to lower --test.")] = None,
    test: TestTarget = None,
    exact: Annotated[bool, typer.Option(help="Prove it; for --simulator additive.")] = False,
    fill: Annotated[str, typer.Option(help="For --where and --by: shrink, repack or resample.")] = "shrink",
    simulator: NameOrFile = "linear",
    parameters: Parameters = None,
    intervals: Intervals = False,
    run: BaseRun = None,
    held_out: HeldOut = 8,
    seed: Seed = 0,
    task: OwnTask = None,
    out: Out = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Forecast data removal: the losses without some examples, or which to remove to move a loss."""
    import pandas as pd

    from simfluence import plots
    from simfluence.cli.output import draw, print_json, print_table, records
    from simfluence.queries.removal import best_removal, forecast_removal, smallest_removal

    if sum(option is not None for option in (where, by, past, best)) != 1:
        raise InvalidInput("say what to find out: one of --where, --by, --past (with --test), --best (with --test)")
    opened, part, held = opened_and_split(store, held_out, seed)
    base = base_runs(opened, run, held)[0]
    fitted = fitted_by_name(simulator, part, parameters, opened, task)
    fitted = with_intervals(fitted, part, seed) if intervals else fitted
    if past is None and best is None:
        targets = where if where is not None else _groups(base, str(by))
        show = _Answer(forecast_removal(fitted, base, targets, fill=fill), None, None)
        if out:
            show.forecast.to_parquet(out)
        if plot:
            show.draw(plot)
        print_json(show.content()) if as_json else show.print()
        return
    target = range(base.losses.shape[1]) if test is None else _test(test)
    if past is not None:
        found = smallest_removal(fitted, base, target, past, exact=exact)
    else:
        found = best_removal(fitted, base, target, int(best or 0), exact=exact)
    ids = [base.train.ids[index] for index in found.examples] if base.train else list(map(str, found.examples))
    losses = found.losses[1:] if len(found.losses) == len(ids) + 1 else [None] * len(ids)
    table = pd.DataFrame({"train": found.examples, "id": ids, "loss": losses})
    if out:
        table.to_parquet(out, index=False)
    if plot:
        draw(plot, lambda ax: plots.removal_curve(found.losses, past, ax, f"{base.task_name}: {fitted.name}: {found}"))
    if as_json:
        content = {"run": base.id, "simulator": str(fitted), "removed": records(table)}
        print_json(content | {"losses": found.losses.tolist(), "reached": found.reached, "exact": found.exact})
        return
    print(f"{fitted}, base run {base.id}: remove {found}")
    if len(table):
        print_table(table.set_index("train"), "In the order of removal, with the loss after it")


class _Answer:
    """Forecasts, of one query or of many, beside the truth if it is known: as text, as JSON and as a picture."""

    def __init__(self, forecast: Forecast | Forecasts, verified: Any, by: str | None) -> None:
        self.forecast, self.verified, self.by = forecast, verified, by
        self.groups = forecast.by_group(by) if by else None

    def content(self) -> dict[str, Any]:
        from simfluence.cli.output import records
        from simfluence.queries.forecast import Forecast

        answer = self._of_one(self.forecast) if isinstance(self.forecast, Forecast) else self._of_many(self.forecast)
        return answer | ({} if self.groups is None else {"by": records(self.groups)})

    def _of_one(self, forecast: Forecast) -> dict[str, Any]:
        final = {"base": forecast.base[-1].tolist(), "what_if": forecast.what_if[-1].tolist()}
        if forecast.low is not None and forecast.high is not None:
            final |= {"low": forecast.low[-1].tolist(), "high": forecast.high[-1].tolist()}
        answer: dict[str, Any] = {"run": forecast.run.id, "edits": [str(edit) for edit in forecast.edits]}
        answer |= {"final_loss": final, "change": forecast.change.tolist()}
        if self.verified:
            names = ("final_mse", "delta_correlation", "relative_error", "coverage", "seed_share")
            answer |= {name: getattr(self.verified, name) for name in names}
            answer |= {"actual_change": self.verified.actual_change.tolist(), "hit_rate": self.verified.hit_rate()}
        return answer

    def _of_many(self, forecasts: Forecasts) -> dict[str, Any]:
        from simfluence.cli.output import records

        answer: dict[str, Any] = {"runs": [run.id for run in forecasts.runs], "queries": records(forecasts.ranking())}
        return answer | ({"verification": records(self.verified.table)} if self.verified else {})

    def print(self) -> None:
        from simfluence.cli.output import print_table
        from simfluence.queries.forecast import Forecast

        if isinstance(self.forecast, Forecast):
            print(self.forecast.summary())
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
            print(self.verified.summary())

    def draw(self, path: Path) -> None:
        """One query: the mean trajectory. Many: their mean changes, beside the retrained ones."""
        from simfluence.cli.output import draw

        draw(path, (self.verified or self.forecast).plot)


def _edits(
    remove: str | None, keep: str | None, repeat: str | None, times: int, first: str | None, then: str | None, fill: str
) -> list[Edit]:
    from simfluence.edits import Keep, Remove, Reorder, Repeat

    if then and not first:
        raise InvalidInput("say what to change: --then goes with --first")
    edits: list[Edit] = []
    if remove:
        edits.append(Remove(remove, fill))
    if keep:
        edits.append(Keep(keep, fill))
    if repeat:
        edits.append(Repeat(repeat, times, fill))
    if first:
        edits.append(Reorder(first, then))
    return edits


def _test(text: str | None) -> Any:
    """An index, or a filter over the test examples."""
    return [int(text)] if text is not None and text.strip().isdigit() else text


def _groups(base: Run, column: str) -> Mapping[str, np.ndarray]:
    """The training examples of each value of a column."""
    import numpy as np

    if base.train is None:
        raise InvalidInput(f"nothing is known of the training examples of run {base.id}: --by has no column {column!r}")
    values = np.array(base.train.column(column), dtype=object)
    return {f"{column} {value}": np.flatnonzero(values == value) for value in sorted(set(values.tolist()))}
