"""How right are what-if forecasts? 24 edits of held-out digits runs, by every simulator, verified by retraining.

Each simulator is fitted on 24 runs (the tangent kernel on the first of them alone) and asked of the 8 others; places
that an edit frees are filled from the remaining examples. "Error" is the mean squared error of the forecast change of
the final loss, as a share of that of saying "no change" (below 1 is of use), pooled over base runs and test examples;
"delta r" is the mean over base runs of Pearson's r, over test examples, of forecast and retrained change. Beside it
stands what a forecast would have that knows of an edit only how many showings it takes from each label ("label alone"),
and delta r within labels: after each label's mean has been taken out of both changes.

Then the tangent kernel from each of eight runs in turn: how much depends on which run it is?

The last part, "Koda and Dub", has ten near-duplicates of one odd training image: what if one goes, what if all go?

    python benchmarks/what_if.py [--markdown FILE] [--bases 8] [--references 8] [--threads 2]

Retrained runs are kept in build/what_if; a second time trains nothing.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from sklearn.datasets import load_digits

import simfluence as sf

FOLDER = Path("build/what_if")
SIMULATORS = {
    "mean trajectory": sf.MeanTrajectorySimulator(),
    "additive": sf.AdditiveSimulator(l2="auto"),
    "multiplicative": sf.MultiplicativeSimulator(l2="auto"),
    "linear (paper)": sf.LinearSimulator(l2="auto"),
    "linear, around the mean": sf.LinearSimulator(l2="auto", around="mean"),
    "linear, tuned": sf.LinearSimulator(l2=0.83, prior="zero", order=2, varying=True),
    "featurized": sf.FeaturizedSimulator(),
    "boosted": sf.BoostedSimulator(),
}
COPIES = 10


def suite(n_train: int) -> dict[str, sf.Edit]:
    """The 22 edits of the digits protocol itself."""
    drawn = np.random.default_rng(0).permutation(n_train)
    edits: dict[str, sf.Edit] = {f"no {digit}s": sf.Remove(f"label == {digit}", "resample") for digit in range(10)}
    edits["0–4, then 5–9"] = sf.Reorder("label < 5")
    edits["5–9, then 0–4"] = sf.Reorder("label >= 5")
    edits["3s last"] = sf.Reorder("label != 3")
    edits["ten examples ten times as often"] = sf.Repeat(drawn[:10], 10, "resample")
    for share in (5, 10, 20, 50):
        edits[f"{share} % removed"] = sf.Remove(drawn[: n_train * share // 100], "resample")
    edits["50 % removed, batches shrink"] = sf.Remove(drawn[: n_train // 2])
    edits["8s in the places of 3s"] = sf.Swap("label == 3", by="label == 8")
    edits["half as long"] = sf.Truncate(100)
    edits["twice as long"] = sf.Repeat("label >= 0", 2, "repack")
    return edits


def with_copies() -> sf.Task:
    """The digits task with ten near-copies of one odd image among the training examples, and one more to test on.

    The image is the one, of those that the task leaves out, whose nearest training example of its own label is farthest
    compared with the nearest of another.
    """
    digits = sf.tasks.digits()
    images, labels = load_digits(return_X_y=True)
    used = [int(name.removeprefix("digits-")) for name in digits.train.ids + digits.test.ids]
    left = np.setdiff1d(np.arange(len(images)), used)
    train = used[: len(digits.train)]
    distance = np.linalg.norm(images[left][:, None] - images[train], axis=2)
    same = labels[left][:, None] == labels[train]
    oddness = np.where(same, distance, np.inf).min(1) - np.where(same, np.inf, distance).min(1)
    odd = left[np.argmax(oddness)]
    noise = np.random.default_rng(0).normal(scale=0.5, size=(COPIES + 1, 64))
    copies = np.clip(images[odd] + noise, 0, 16)
    X = np.concatenate([images[train][COPIES:], copies[:COPIES]]) / 16
    y = np.append(labels[train][COPIES:], [labels[odd]] * COPIES)
    rest = used[len(digits.train) :]
    test = (np.concatenate([images[rest], copies[COPIES:]]) / 16, np.append(labels[rest], labels[odd]))
    table = pd.DataFrame({"label": y, "copy": np.arange(len(y)) >= len(y) - COPIES})
    return sf.tasks.from_arrays(
        digits.model, X.astype(np.float32), y, "cross_entropy",
        test=(test[0].astype(np.float32), test[1]), metadata=table, name="digits with copies",
    )  # fmt: skip


def of_copies(bases: list[sf.Run]) -> tuple[list[sf.Run], dict[str, sf.Remove]]:
    """Base runs that show some copies, and the two removals. One copy that all of them show is the one."""
    shown = np.array([run.curriculum.counts.sum(axis=0) > 0 for run in bases])
    copies = np.arange(shown.shape[1] - COPIES, shown.shape[1])
    one = int(copies[np.argmax(shown[:, copies].sum(axis=0))])
    chosen = [run for run, has in zip(bases, shown[:, one], strict=True) if has]
    return chosen, {"one copy removed": sf.Remove([one], "resample"), "all ten removed": sf.Remove(copies, "resample")}


def fitted_on(part: sf.Runs, task: sf.Task) -> dict[str, sf.Simulator]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted: dict[str, sf.Simulator] = {name: simulator.fit(part) for name, simulator in SIMULATORS.items()}
    return fitted | {"tangent kernel, one run": sf.TangentKernelSimulator(task).fit(part[:1])}


def verified(
    fitted: dict[str, sf.Simulator], bases: list[sf.Run], edits: Mapping[str, sf.Edit], task: sf.Task, store: Path
) -> dict[str, sf.Verifications]:
    found = {}
    for name, simulator in fitted.items():
        start = time.perf_counter()
        forecasts = sf.what_if(simulator, bases, edits, task=task)
        asked = time.perf_counter() - start
        found[name] = forecasts.verify(store=store)
        print(f"  {name}: {len(forecasts)} forecasts in {asked:.1f} s")
    return found


def over_references(part: sf.Runs, bases: list[sf.Run], task: sf.Task, count: int) -> pd.DataFrame:
    """Of the tangent kernel from one run, and another, and another: of each edit, the median and the range."""
    edits, columns = suite(len(task.train)), ["relative_error", "delta_correlation"]
    tables = []
    for choice in range(count):
        fitted = sf.TangentKernelSimulator(task).fit(part[choice * len(part) // count :][:1])
        found = sf.what_if(fitted, bases, edits, task=task).verify(store=FOLDER / "digits")
        tables.append(found.table[columns][:-1])
        print(f"  reference {choice + 1} of {count}")
    errors, correlations = (np.stack([table[column] for table in tables]) for column in columns)
    return pd.DataFrame(
        {
            f"{said}, {name}": summary(each, axis=0)
            for said, each in (("error", errors), ("delta r", correlations))
            for name, summary in (("median", np.median), ("least", np.min), ("most", np.max))
        },
        index=tables[0].index,
    )


def redundancy(found: dict[str, sf.Verifications]) -> pd.DataFrame:
    """Change of the loss of the copy among the test examples, without one copy and without all.

    With one number per example the second is as many times the first as copies go. It is *seen* that there is more to
    it if the forecast for all is within half and twice the truth, and that for one is at most twice the truth or 0.1.
    """
    some = next(iter(found.values()))
    truth = some.actual_change[:, :, -1].mean(axis=1)
    rows = {"retrained": {"one": truth[0], "all": truth[1], "seen": ""}}
    for name, each in found.items():
        one, every = each.forecasts.change[:, :, -1].mean(axis=1)
        right = truth[1] / 2 <= every <= 2 * truth[1] and abs(one) <= max(2 * abs(truth[0]), 0.1)
        rows[name] = {"one": one, "all": every, "seen": "yes" if right else "no"}
    return pd.DataFrame.from_dict(rows, orient="index")


def shown(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.3f}" if abs(value) < 10 else f"{value:.0f}"


def markdown(table: pd.DataFrame) -> str:
    cells = table.map(lambda value: value if isinstance(value, str) else shown(value))
    lines = [[str(table.index.name or ""), *cells.columns], ["---"] * (len(cells.columns) + 1)]
    lines += [[str(name), *row] for name, row in zip(cells.index, cells.to_numpy(), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--bases", type=int, default=8)
    parser.add_argument("--references", type=int, default=8, help="how many runs to fit the tangent kernel on in turn")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start = time.perf_counter()

    print("The digits protocol")
    part, held = sf.RunStore("runs/digits").load().split(held_out=8, seed=0)
    task = sf.tasks.digits()
    bases = list(held[: options.bases])
    found = verified(fitted_on(part, task), bases, suite(len(task.train)), task, FOLDER / "digits")
    references = over_references(part, bases, task, options.references)

    print("Ten near-duplicates")
    copied = with_copies()
    curricula = sf.random_curricula(n_train=300, runs=32, steps=200, batch_size=8, subset=0.5, seed=0)
    part, held = sf.record(copied, sf.Recipe(lr=0.1), curricula, FOLDER / "copies").split(held_out=8, seed=0)
    chosen, removals = of_copies(list(held[: options.bases]))
    copies = verified(fitted_on(part, copied), chosen, removals, copied, FOLDER / "copies")

    tables = {}
    some, some_copies = next(iter(found.values())).table, next(iter(copies.values())).table
    for column, title in (("relative_error", "Error, as a share of that of saying 'no change'"),
                          ("delta_correlation", "Delta correlation"),
                          ("within_correlation", "Delta correlation within labels")):  # fmt: skip
        rows = {n: pd.concat([found[n].table[column][:-1], copies[n].table[column][:-1]]) for n in found}
        table = pd.DataFrame(rows)
        table.index.name = f"{len(bases)} base runs"
        summary = {"median of 24": table.median(), "edits with an error below 1": (table < 1).sum().astype(str)}
        pooled = pd.Series({name: each.table.loc["all", column] for name, each in found.items()})
        wanted = (
            {"all 22, pooled": pooled, **summary} if column == "relative_error" else {"median of 24": table.median()}
        )
        truth = {"retrained change": "retrained"}
        truth |= {"label alone": "group_correlation"} if column == "delta_correlation" else {}
        rest = pd.DataFrame(wanted).T.rename_axis(table.index.name)
        for place, (name, known) in enumerate(truth.items()):
            table.insert(place, name, pd.concat([some[known][:-1], some_copies[known][:-1]]))
            rest[name] = "" if known == "retrained" else table[name].median()
        tables[title] = pd.concat([table.astype(object), rest])
    title = f"The tangent kernel from one run, over {options.references} choices of it"
    tables[title] = references.rename_axis(f"{len(bases)} base runs")
    there = np.mean([len(np.intersect1d(run.curriculum.indices, removals["all ten removed"].target)) for run in chosen])
    title = f"Koda and Dub: change of the copy's test loss, {len(chosen)} base runs with {there:.1f} copies each"
    tables[title] = redundancy(copies)
    text = "\n\n".join(f"{title}\n\n{markdown(table)}" for title, table in tables.items())
    Console(width=250).print(text, highlight=False, markup=False)
    if options.markdown:
        options.markdown.write_text(f"# The suite of 24 what-ifs\n\n`python benchmarks/what_if.py`\n\n{text}\n")
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
