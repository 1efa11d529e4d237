"""How right is training-data attribution? Every attributor against retraining, runs on subsets, and removals.

Five parts, each with what its numbers mean:

    leave-one-out   logistic regression in float64: exact influence beside 200 retrainings
    PBRF            what damped influence functions approximate, by optimisation, on the digits MLP
    LDS             does the sum of scores rank 64 runs on random halves of the training examples?
    simulators      scores played forward, beside fitted simulators
    brittleness     how far does a test loss rise when its top k are removed?

    python benchmarks/attribution.py [--markdown FILE]

Trained runs are kept in build/attribution; a second time trains nothing.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from scipy.stats import spearmanr
from torch import nn
from what_if import markdown

import simfluence as sf
from simfluence import attribution
from simfluence.errors import ConvergenceWarning, UnseenWarning
from simfluence.evaluation.groups import Groups, groups_of

FOLDER = Path("build/attribution")
RECIPE = sf.Recipe(lr=0.1)
STEPS = 200
DAMPINGS = (0.1, 0.01)
SEEDS = range(5)  # of the labels that EK-FAC and K-FAC draw from the model
REMOVED = 30  # training examples with a PBRF
TOP = (1, 5, 10, 20)
ROUNDING = 1e-12
DEFAULT = "EK-FAC, sampled labels, λ 0.1 of the mean eigenvalue (default)"

#: Text, and the tables under it by title.
Part = tuple[str, Mapping[str, pd.DataFrame]]


def leave_one_out() -> Part:
    weak, strong = sf.tasks.breast_cancer(), sf.tasks.breast_cancer(l2=0.1)
    count = len(weak.train)
    rows = {
        f"l2 {weak.l2}, removed": judged_by(weak, 1.0),
        f"l2 {weak.l2}, a hundredth of its weight removed": judged_by(weak, 0.01),
        f"l2 {weak.l2}, removed, the others weigh 1/{count - 1}": judged_by(weak, 1.0, 1 / (count - 1)),
        f"l2 {strong.l2}, removed": judged_by(strong, 1.0),
    }
    text = (
        f"Breast cancer, logistic regression, {count} training and {len(weak.test)} test examples, float64, the same "
        "l2 in training and in the Hessian. Exact influence, without further damping, beside each removal retrained "
        f"to convergence. The objective that is left is Σ ℓ_j / {count} + l2/2 ‖θ‖², but for the third row. Test "
        f"examples whose loss is below {ROUNDING}, where changes are lost in rounding, are left out. Removing a "
        "hundredth of the weight tells errors of the computation from those of the first order: influence is the "
        "derivative. The slope is that of the truth by the scores: 1 where their size is right. Beside it are means "
        "over test examples of Pearson's r (of influence; of saying that those of the same class help; of influence "
        "within each class of training examples), and the share found of the ten most harmful examples."
    )
    table = pd.DataFrame.from_dict(rows, orient="index")
    return text, {"Spearman's ρ of exact influence and retraining": table}


def judged_by(task: sf.Task, share: float, weight: float | None = None) -> dict[str, str]:
    """Influence beside retraining without a ``share`` of each example, per share; the others weigh ``weight``."""
    model = attribution.exact.retrain(task.build_model(0), task.train_data, task.loss, task.l2)
    found = np.asarray(attribution.Exact(curvature="hessian").fit(model, task).scores())
    before = test_losses(task, model)
    columns = []
    for index in range(len(task.train)):
        weights = torch.full((len(task.train),), weight or 1 / len(task.train), dtype=torch.float64)
        weights[index] *= 1 - share
        without = attribution.exact.retrain(model, task.train_data, task.loss, task.l2, weights)
        columns.append((test_losses(task, without) - before) / share)
    kept = before > ROUNDING
    found, truth = found[kept], np.stack(columns, 1)[kept]
    each = [spearmanr(*pair).statistic for pair in zip(found, truth, strict=True)]
    numbers = {
        "mean over test examples": np.mean(each),
        "median": np.median(each),
        "lowest": np.min(each),
        "all pairs": spearmanr(found.ravel(), truth.ravel()).statistic,
    } | beside_classes(task, found, truth, kept)
    return {name: f"{number:.4f}" for name, number in numbers.items()} | {"test examples": str(kept.sum())}


def beside_classes(task: sf.Task, found: np.ndarray, truth: np.ndarray, kept: np.ndarray) -> dict[str, float]:
    known = groups_of(task.train, task.test)
    agreed = sf.agreement(found, truth, groups=Groups(known.name, known.test[kept], known.train))
    return {
        "slope": agreed["size"],
        "Pearson's r": agreed["pearson"],
        "same class alone": agreed["same_group"],
        "within classes": agreed["within"],
        "most harmful found": agreed["harmful"],
    }


def test_losses(task: sf.Task, model: nn.Module) -> np.ndarray:
    with torch.no_grad():
        return task.loss(model(task.test_data[0].double()), task.test_data[1]).numpy()


def whole_run(task: sf.Task) -> sf.Run:
    """Trained on all training examples: where gradients are taken."""
    curricula = sf.random_curricula(n_train=len(task.train), runs=1, steps=STEPS, batch_size=8, subset=1.0, seed=1)
    return sf.record(task, RECIPE, curricula, FOLDER / "whole")[0]


def trained(task: sf.Task, run: sf.Run) -> nn.Module:
    return sf.trained_model(task, run, FOLDER / "replayed").double()


def methods(damping: float) -> dict[str, list[Any]]:
    """Attributors at the same λ by name; those that draw labels once per seed."""
    found: dict[str, list[Any]] = {}
    for kind, name in (
        (attribution.EKFAC, "EK-FAC"),
        (attribution.KFAC, "K-FAC"),
        (attribution.Diagonal, "diagonal"),
    ):
        found[f"{name}, sampled labels"] = [kind(damping, seed=seed) for seed in SEEDS]
        found[f"{name}, empirical"] = [kind(damping, labels="empirical")]
    found["conjugate gradients"] = [attribution.ConjugateGradients(damping)]
    return found


def without_curvature() -> dict[str, Any]:
    return {
        "gradient dot": attribution.GradientDot(),
        "gradient cosine": attribution.GradientCosine(),
        "hidden cosine": attribution.HiddenSimilarity(),
        "hidden dot": attribution.HiddenSimilarity(cosine=False),
    }


Key = tuple[str, float | None]


def all_scores(task: sf.Task, model: nn.Module) -> dict[Key, list[np.ndarray]]:
    """Scores by method and λ, one per seed."""
    several: dict[Key, list[Any]] = {(name, None): [each] for name, each in without_curvature().items()}
    several[DEFAULT, None] = [attribution.EKFAC(seed=seed) for seed in SEEDS]
    for damping in DAMPINGS:
        several |= {(name, damping): each for name, each in methods(damping).items()}
    return {key: [np.asarray(one.fit(model, task).scores()) for one in each] for key, each in several.items()}


def spread(values: Iterable[float]) -> str:
    several = list(values)
    return f"{np.mean(several):.3f}" + (f" ± {np.std(several, ddof=1):.3f}" if len(several) > 1 else "")


def pbrf(task: sf.Task, run: sf.Run, model: nn.Module, scores: Mapping[Key, list[np.ndarray]]) -> Part:
    removed = np.sort(np.random.default_rng(0).permutation(len(task.train))[:REMOVED])
    rows: dict[str, dict[str, str]] = {}
    kinks = []
    for damping in DAMPINGS:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            truth = attribution.exact.pbrf(
                model, task.train_data, task.test_data, task.loss, damping, removed.tolist(), tolerance=1e-7
            ).numpy()
        kinks.append(f"{len(caught)} of {REMOVED} at λ {damping}")
        for (name, own), several in scores.items():
            if own in (None, damping) and name != DEFAULT:
                agreed = pd.DataFrame([sf.agreement(each[:, removed], truth) for each in several])
                for column in ("pearson", "pooled", "spearman"):
                    rows.setdefault(name, {})[f"{column}, λ {damping}"] = spread(agreed[column])
    text = (
        f"Digits MLP after {STEPS} steps on all {len(task.train)} training examples (mean test loss "
        f"{run.losses[-1].mean():.2f}), float64; {REMOVED} random training examples × {len(task.test)} test examples. "
        "Pearson's r and Spearman's ρ are means over test examples, pooled is Pearson's r over all pairs. λ is "
        f"absolute, the same for all. ± is the standard deviation over {len(SEEDS)} draws of labels from the model. "
        "The optimisation ends on a kink of a ReLU, where some gradient (above 1e-7) is left, for "
        f"{' and for '.join(kinks)}."
    )
    return text, {"Correlation with the proximal Bregman response": pd.DataFrame.from_dict(rows, orient="index")}


def tracin(task: sf.Task, run: sf.Run, every: int) -> attribution.TracInCP:
    """Over the checkpoint in the middle of each ``every`` steps."""
    steps = list(range(every // 2, run.steps, every))
    states = sf.replay(task, run, steps, FOLDER / "replayed")
    pairs = [(states[step], float(run.learning_rates[step])) for step in steps]
    return attribution.TracInCP(pairs).fit(task.build_model(RECIPE.seed), task)


def recorded() -> tuple[sf.Runs, sf.Runs]:
    """The digits runs that the repository ships: 24 to fit on, 8 held out."""
    return sf.RunStore("runs/digits").load().split(held_out=8, seed=0)


def linear_datamodeling(task: sf.Task, run: sf.Run, scores: Mapping[Key, list[np.ndarray]]) -> Part:
    curricula = sf.random_curricula(n_train=len(task.train), runs=64, steps=STEPS, batch_size=8, subset=0.5, seed=1)
    judges = sf.record(task, RECIPE, curricula, FOLDER / "digits")
    part, _ = recorded()
    assert not set(judges.ids) & {run.id, *part.ids}, "a run judges what was made of it"
    found = {
        "TracIn-CP(10)": tracin(task, run, 20).scores(),
        f"TracIn-CP(all {STEPS})": tracin(task, run, 1).scores(),
        "TracIn-ideal, the same run": attribution.TracInIdeal().fit(run).scores(),
        f"TracIn-ideal, {len(part)} other runs": attribution.TracInIdeal().fit(part).scores(),
    }
    found |= {name if own is None else f"{name}, λ {own}": each[0] for (name, own), each in scores.items()}
    table = pd.DataFrame({"LDS [95 %]": {name: str(sf.lds(each, judges)) for name, each in found.items()}})
    text = (
        f"{len(judges)} runs on random halves of the digits' training examples, from the same initial weights; mean "
        f"over {len(task.test)} test examples, intervals over runs. Gradients are those of one further run on all "
        "training examples, as under PBRF, with the first draw of labels. Conjugate gradients, to a residual of 1e-6, "
        "stand for the exact inverse. No run judges an attributor that was made of it."
    )
    return text, {"Linear datamodeling score": table}


def played(attributors: Mapping[str, Any], part: sf.Runs) -> dict[str, sf.Simulator]:
    """As they are (where they have a size), with a fitted scale, and around the mean with a fitted scale."""
    variants: dict[str, dict[str, str]] = {
        "as given": {},
        "scaled": {"fit_scale": True},
        "scaled, around the mean": {"fit_scale": True, "around": "mean"},
    }
    return {
        f"{name}, {variant}": sf.AttributedSimulator(each, **options).fit(part)
        for name, each in attributors.items()
        for variant, options in variants.items()
    }


def simulators(task: sf.Task) -> Part:
    part, held = recorded()
    run = part[0]
    attributors = {
        "TracIn-CP(10)": tracin(task, run, 20),
        f"TracIn-CP(all {STEPS})": tracin(task, run, 1),
        "TracIn-ideal": attribution.TracInIdeal().fit(part),
        "EK-FAC": attribution.EKFAC().fit(trained(task, run), task),
    }
    fitted = {
        "mean trajectory": sf.MeanTrajectorySimulator(),
        "additive": sf.AdditiveSimulator(l2="auto"),
        "multiplicative": sf.MultiplicativeSimulator(l2="auto"),
        "linear (paper)": sf.LinearSimulator(l2="auto"),
        "linear, around the mean": sf.LinearSimulator(l2="auto", around="mean"),
        "boosted": sf.BoostedSimulator(),
    }
    every = played(attributors, part) | {name: each.fit(part) for name, each in fitted.items()}
    scored = sf.evaluate(every, held, part)
    table = pd.DataFrame(
        {
            "all-steps MSE": scored["mse"],
            "final Spearman": scored["final_spearman"],
            "skill": scored["skill"],
            "final skill": scored["final_skill"],
            "run correlation": [interval(row) for _, row in scored.iterrows()],
        }
    ).rename_axis(None)
    text = (
        f"runs/digits, {len(part)} runs to fit on and {len(held)} held out (split seed 0). TracIn-CP and EK-FAC take "
        "their gradients from one of the fitting runs, TracIn-ideal is read off all of them. A scale is fitted on the "
        f"fitting runs alone. Run correlations of {len(held)} runs mean little: see their intervals."
    )
    return text, {"Attribution as simulators, beside fitted ones": table}


def interval(row: pd.Series) -> str:
    value, low, high = row[["run_correlation", "run_correlation_low", "run_correlation_high"]]
    return "–" if np.isnan(value) else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def brittleness(task: sf.Task, run: sf.Run, scores: Mapping[Key, list[np.ndarray]]) -> Part:
    chosen = {
        "EK-FAC (default damping)": scores[DEFAULT, None][0],
        "TracIn-CP(10)": tracin(task, run, 20).scores(),
        "gradient dot": scores["gradient dot", None][0],
        "hidden cosine": scores["hidden cosine", None][0],
    }
    found = {name: sf.brittleness(each, task, run, TOP, store=FOLDER / "removals") for name, each in chosen.items()}
    rows = {name: with_error(each["rise"], each["rise_se"]) for name, each in found.items()}
    some = next(iter(found.values()))
    rows["random"] = with_error(some["random_rise"], some["random_rise_se"])
    table = pd.DataFrame(rows).T
    table.columns = [f"k = {number}" for number in TOP]
    text = (
        f"Digits MLP, {len(task.train)} training examples: how far a test example's loss rises when its k most helpful "
        "training examples are removed and the run is trained again. Mean ± standard error over "
        f"{some['test_examples'].iloc[0]} test examples. Batches shrink."
    )
    return text, {"Brittleness": table}


def with_error(mean: pd.Series, error: pd.Series) -> pd.Series:
    return pd.Series([f"{m:.3f} ± {e:.3f}" for m, e in zip(mean, error, strict=True)], mean.index)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)  # small models
    warnings.simplefilter("ignore", UnseenWarning)
    console = Console(width=200)
    task = sf.tasks.digits()
    run = whole_run(task)
    model = trained(task, run)
    start, written = time.perf_counter(), []
    scores = all_scores(task, model)
    print(f"  scores: {time.perf_counter() - start:.0f} s", flush=True)
    parts: dict[str, Callable[[], Part]] = {
        "Leave-one-out": leave_one_out,
        "PBRF": lambda: pbrf(task, run, model, scores),
        "LDS": lambda: linear_datamodeling(task, run, scores),
        "Simulators": lambda: simulators(task),
        "Removals": lambda: brittleness(task, run, scores),
    }
    for name, make in parts.items():
        began = time.perf_counter()
        text, tables = make()
        shown = "\n\n".join(f"{title}\n\n{markdown(table)}" for title, table in tables.items())
        console.print(f"\n{text}\n\n{shown}\n", highlight=False, markup=False)
        print(f"  {name}: {time.perf_counter() - began:.0f} s", flush=True)
        written.append(f"## {name}\n\n{text}\n\n{shown}\n")
    if options.markdown:
        body = "\n".join(written)
        options.markdown.write_text(f"# Attribution, judged\n\n`python benchmarks/attribution.py`\n\n{body}")
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
