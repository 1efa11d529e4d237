"""Commands that attribute a run's test losses to its training examples, and evaluate attributions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from simfluence.cli.options import (
    METHOD_NAMES,
    AsJson,
    Out,
    OwnTask,
    Parameters,
    Plot,
    StorePath,
    built_task,
    check_numbers,
    parsed,
    target,
)
from simfluence.cli.text import say

if TYPE_CHECKING:
    from simfluence.runs import Run
    from simfluence.storage.store import RunStore


__all__ = ["attribute", "lds"]

OfRun = Annotated[str | None, typer.Option("--run", help="Id of the run to attribute; by default the first.")]
Checkpoints = Annotated[int, typer.Option(help="For tracin: number of checkpoints.")]


def attribute(
    store: StorePath,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHOD_NAMES)}.")] = "ekfac",
    parameters: Parameters = None,
    run: OfRun = None,
    test: Annotated[
        str | None, typer.Option(help="Test examples: a filter, rows:3,4 or ids:3,4; by default all.")
    ] = None,
    checkpoints: Checkpoints = 10,
    top: Annotated[int, typer.Option(help="How many training examples to show.")] = 10,
    task: OwnTask = None,
    out: Out = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Show which training examples lower the test losses of a run of STORE, and which raise them."""
    import numpy as np
    import pandas as pd

    from simfluence import plots
    from simfluence.attribution import attributor_from_run
    from simfluence.cli.output import draw, print_json, print_table, records
    from simfluence.queries.effects import rank_suspects
    from simfluence.storage.store import RunStore

    opened = RunStore(store)
    base = _run(opened, run)
    check_numbers(test, base.test)
    built = built_task(opened, task)
    scores = attributor_from_run(
        method, built, base, checkpoints=checkpoints, store=opened, **parsed(parameters)
    ).scores()
    ranked = rank_suspects(scores, base, test=target(test)).rename(columns={"gain": "score"})
    ranked["score"] *= -1  # the gain is that of removing the example, the score that of training on it
    if out:
        scores.to_frame().to_parquet(out, index=False)
    if plot:
        matrix = pd.DataFrame(np.asarray(scores), columns=pd.RangeIndex(scores.shape[1], name="train"))
        matrix = matrix.rename_axis("test")
        draw(
            plot,
            lambda ax: plots.heat_map(
                matrix, ax, f"{base.task_name}: {method}, run {base.id}", f"score ({scores.unit})"
            ),
        )
    if as_json:
        answer = {"run": base.id, "method": method, "unit": scores.unit}
        print_json(answer | {"ranking": records(ranked.sort_values("score", ascending=False))})
        return
    say(f"{scores}, run {base.id}; positive: training on the example lowers the loss")
    print_table(ranked.tail(top)[::-1], "The most helpful examples, by mean score")
    print_table(ranked.head(top), "The most harmful examples")


def lds(
    store: StorePath,
    method: Annotated[list[str] | None, typer.Option(help="Method; repeatable; by default dot and ekfac.")] = None,
    parameters: Parameters = None,
    run: OfRun = None,
    checkpoints: Checkpoints = 10,
    task: OwnTask = None,
    as_json: AsJson = False,
) -> None:
    """Compute linear datamodeling scores of attribution methods for one run of STORE, on its other runs."""
    import pandas as pd

    from simfluence.attribution import attributor_from_run
    from simfluence.cli.output import print_json, print_table, records
    from simfluence.evaluation.attribution import lds as score
    from simfluence.runs import Runs
    from simfluence.storage.store import RunStore

    opened = RunStore(store)
    base = _run(opened, run)
    built = built_task(opened, task)
    others = Runs(other for other in opened.load(recipe=base.recipe) if other.id != base.id)
    rows = {}
    for name in method or ["dot", "ekfac"]:
        fitted = attributor_from_run(name, built, base, checkpoints=checkpoints, store=opened, **parsed(parameters))
        result = score(fitted.scores(), others)
        rows[name] = {"lds": result.value, "lds_low": result.low, "lds_high": result.high, "runs": result.runs}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")
    if as_json:
        print_json({"run": base.id, "methods": records(table)})
    else:
        print_table(table, f"{store}: linear datamodeling scores of attributions of run {base.id}")


def _run(store: RunStore, name: str | None) -> Run:
    return store.read(name) if name else store.load()[0]
