"""Can examples that no fitting run has be simulated?

24 runs over 90 % of the training examples, read on 80 % of the test examples, fit a featurized simulator; it then
forecasts the other test examples in 8 runs over all training examples. Skill 0 is the mean of the trajectories known.

    python benchmarks/unseen_examples.py
"""

from __future__ import annotations

import numpy as np

import simfluence as sf
from simfluence.evaluation import metrics as evaluation

TASKS = {
    "digits": (sf.tasks.digits(), sf.Recipe(lr=0.1), 200),
    "diabetes": (sf.tasks.diabetes(), sf.Recipe(lr=0.02), 150),
}


def some(examples: sf.Examples, chosen: np.ndarray) -> sf.Examples:
    ids = [examples.ids[index] for index in chosen]
    return sf.Examples(ids, None, examples.features[chosen], examples.targets[chosen])


def main() -> None:
    for name, (task, recipe, steps) in TASKS.items():
        n_train, n_test = len(task.train), len(task.test)
        protocol = {"steps": steps, "batch_size": 8, "subset": 0.5}
        drawn = sf.random_curricula(n_train=int(0.9 * n_train), runs=24, seed=5, **protocol)
        known = [sf.Curriculum(curriculum.tolist(), n_train=n_train) for curriculum in drawn]
        unseen = sf.random_curricula(n_train=n_train, runs=8, seed=6, **protocol)
        losses = sf.record(task, recipe, [*known, *unseen]).losses.astype(np.float64)
        first, rest = np.split(np.arange(n_test), [int(0.8 * n_test)])
        fit = sf.Runs.from_arrays(known, losses[:24, :, first], train=task.train, test=some(task.test, first))
        fitted = sf.FeaturizedSimulator().fit(fit).for_examples(test=some(task.test, rest))
        true = losses[24:, :, rest]
        others = np.broadcast_to(fit.losses.mean((0, 2))[:, None], true.shape)
        candidates = {
            "featurized": fitted.simulate(unseen, true[:, 0]),
            "its mean trajectory alone": np.broadcast_to(fitted.mean_, true.shape),
            "the examples' own mean, which nobody knows": np.broadcast_to(losses[:24, :, rest].mean(0), true.shape),
        }
        for row, simulated in candidates.items():
            skill, final = evaluation.skill(simulated, true, others), evaluation.final_skill(simulated, true, others)
            print(f"{name:10} {row:44} skill {skill:6.3f}   final {final:6.3f}")


if __name__ == "__main__":
    main()
