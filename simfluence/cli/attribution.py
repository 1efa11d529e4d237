"""Commands that attribute a run's test losses to its training examples, and judge how well."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

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
    parsed,
)

if TYPE_CHECKING:
    from simfluence.runs import Run
    from simfluence.storage.store import RunStore


OfRun = Annotated[str | None, typer.Option("--run", help="Id of the run whose model it is; by default the first.")]
Checkpoints = Annotated[int, typer.Option(help="For tracin: how many checkpoints.")]


def attribute(
    store: StorePath,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHOD_NAMES)}.")] = "ekfac",
    parameters: Parameters = None,
    run: OfRun = None,
    test: Annotated[str | None, typer.Option(help="Test example (index), or a filter over them; all if none.")] = None,
    checkpoints: Checkpoints = 10,
    top: Annotated[int, typer.Option(help="How many training examples to show.")] = 10,
    task: OwnTask = None,
    out: Out = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Which training examples lower, and which raise, the test losses of a run of STORE?"""
    import numpy as np
    import pandas as pd

    from simfluence import plots
    from simfluence.attribution import attributor_from_run
    from simfluence.cli.output import draw, print_json, print_table, records
    from simfluence.queries.effects import rank_suspects
    from simfluence.storage.store import RunStore

    opened = RunStore(store)
    base = _run(opened, run)
    built = built_task(opened, task)
    scores = attributor_from_run(
        method, built, base, checkpoints=checkpoints, store=opened, **parsed(parameters)
    ).scores()
    target: Any = [int(test)] if test is not None and test.strip().isdigit() else test
    ranked = rank_suspects(scores, base, test=target).rename(columns={"gain": "score"})
    ranked["score"] *= -1  # a helpful example has a positive score, and its removal no gain
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
        about = {"run": base.id, "method": method, "unit": scores.unit}
        print_json(about | {"ranking": records(ranked.sort_values("score", ascending=False))})
        return
    print(f"{scores}, run {base.id}; positive: training on the example lowers the loss")
    print_table(ranked.tail(top)[::-1], "The most helpful, mean score")
    print_table(ranked.head(top), "The most harmful")


def lds(
    store: StorePath,
    method: Annotated[list[str] | None, typer.Option(help="One method; again for more. dot and ekfac if none.")] = None,
    parameters: Parameters = None,
    run: OfRun = None,
    checkpoints: Checkpoints = 10,
    task: OwnTask = None,
    as_json: AsJson = False,
) -> None:
    """Linear datamodeling scores of attribution methods on the runs of STORE, but for the one that they are of."""
    import pandas as pd

    from simfluence.attribution import attributor_from_run
    from simfluence.cli.output import print_json, print_table, records
    from simfluence.evaluation.attribution import lds as score
    from simfluence.runs import Runs
    from simfluence.storage.store import RunStore

    opened = RunStore(store)
    base = _run(opened, run)
    built = built_task(opened, task)
    others = Runs(each for each in opened.load(recipe=base.recipe) if each.id != base.id)
    rows = {}
    for name in method or ["dot", "ekfac"]:
        fitted = attributor_from_run(name, built, base, checkpoints=checkpoints, store=opened, **parsed(parameters))
        found = score(fitted.scores(), others)
        rows[name] = {"lds": found.value, "lds_low": found.low, "lds_high": found.high, "runs": found.runs}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")
    if as_json:
        print_json({"run": base.id, "methods": records(table)})
    else:
        print_table(table, f"{store}: linear datamodeling score, attributed to run {base.id}")


def _run(store: RunStore, name: str | None) -> Run:
    return store.read(name) if name else store.load()[0]
