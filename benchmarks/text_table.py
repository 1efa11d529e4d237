"""The paper's table on a pretrained language model: MiniLM on docstrings, tuned with IA3 and with LoRA.

For each store 4 of 16 runs are held out (split seed 0); all else is chosen on the 12 others by cross-validation:

    TracIn-CP(10), (all)   gradient products in the middle of ten blocks, or at every step, of one fitting run
    additive … linear      the paper's, of which l2 is chosen
    around the mean        linear, with l2 chosen
    boosted, (tuned)       as it comes, or in half as many trials
    tangent kernel         of one fitting run, its mean error corrected by the others

    python benchmarks/text_table.py [--stores runs/docstrings-minilm-ia3 …] [--rows additive linear …]
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from score_lines import print_scores

import simfluence as sf
from simfluence.errors import UnseenWarning
from simfluence.recording import follow

HELD_OUT = 4
FOLDS = 4
STORAGE = Path("build/text_table.sqlite")
STORES = [Path("runs/docstrings-minilm-ia3"), Path("runs/docstrings-minilm-lora")]


def tuned(kind: str, part: sf.Runs, trials: int, **fixed: object) -> sf.Simulator:
    """Of the paper's form, or with what is fixed; only its l2 is chosen."""
    simulator = {"additive": sf.AdditiveSimulator, "multiplicative": sf.MultiplicativeSimulator}.get(
        kind, sf.LinearSimulator
    )
    papers = {name: value for name, value in simulator().get_params().items() if name != "l2"}
    return sf.tune(kind, part, trials=trials, folds=FOLDS, fixed=papers | fixed, storage=STORAGE)


def tracin(task: sf.Task, run: sf.Run) -> list[tuple[sf.Checkpoint, float]]:
    """The states before each step of a run, with its learning rate; what is frozen is there once."""
    states, frozen = [], {}
    for training in follow(task, run):
        if training.finished:
            break
        trained = {name for name, parameter in training.model.named_parameters() if parameter.requires_grad}
        state = training.model.state_dict()
        frozen = frozen or {name: tensor.clone() for name, tensor in state.items() if name not in trained}
        model = {name: state[name].clone() if name in trained else frozen[name] for name in state}
        states.append((sf.Checkpoint(training.step, model, {}, {}), float(training.rates[training.step])))
    return states


def played(task: sf.Task, states: list, every: int, part: sf.Runs) -> sf.Simulator:
    """Over the state in the middle of each ``every`` steps."""
    attributor = sf.attribution.TracInCP(states[every // 2 :: every]).fit(task.build_model(0), task)
    return sf.AttributedSimulator(attributor).fit(part)


def rows(store: sf.RunStore, part: sf.Runs, options: argparse.Namespace) -> dict[str, Callable[[], sf.Simulator]]:
    task = cache(lambda: sf.tasks.rebuild(store.info))
    states = cache(lambda: tracin(task(), part[0]))
    tenth = max(1, part[0].steps // 10)
    return {
        "mean trajectory": lambda: sf.MeanTrajectorySimulator().fit(part),
        "additive": lambda: tuned("additive", part, options.trials),
        "multiplicative": lambda: tuned("multiplicative", part, options.trials),
        "linear": lambda: tuned("linear", part, options.trials),
        "linear, around the mean": lambda: tuned("linear", part, options.trials, around="mean"),
        "boosted": lambda: sf.BoostedSimulator().fit(part),
        "boosted, tuned": lambda: sf.tune("boosted", part, trials=options.trials // 2, folds=FOLDS, storage=STORAGE),
        "TracIn-CP(10)": lambda: played(task(), states(), tenth, part),
        "tangent kernel": lambda: sf.TangentKernelSimulator(
            task(), n_checkpoints=options.checkpoints, n_references=options.references, n_features=options.features
        ).fit(part),
        "TracIn-CP(all)": lambda: played(task(), states(), 1, part),
    }


def score(path: Path, options: argparse.Namespace) -> None:
    store = sf.RunStore(path)
    part, held = store.load().split(HELD_OUT, seed=0)
    every = rows(store, part, options)
    print_scores(path, part, held, [(name, every[name]) for name in every if name in (options.rows or every)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stores", type=Path, nargs="+", default=STORES)
    parser.add_argument("--rows", nargs="+", help="only these rows")
    parser.add_argument("--trials", type=int, default=20, help="of each choice of an l2")
    parser.add_argument("--checkpoints", type=int, default=4, help="of the tangent kernel")
    parser.add_argument("--references", type=int, default=1, help="of the tangent kernel")
    parser.add_argument("--features", type=int, default=2, help="of the tangent kernel, beside those of the outputs")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", UnseenWarning)
    for path in options.stores:
        score(path, options)


if __name__ == "__main__":
    main()
