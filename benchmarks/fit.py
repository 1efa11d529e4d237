"""What does fitting cost?

1. The L2 path of the linear simulator's problem (channels: previous loss and 1; prior identity) for 1,000 training
   and 200 test examples from 24 runs of 300 steps of 8, against scikit-learn's ``Ridge(solver="sparse_cg")`` for each
   test example and L2. Only scikit-learn's ``fit`` is timed; its matrices are built beforehand. Ours is timed whole.
2. ``--large``: a fit for 20,000 training and 500 test examples from 64 runs of 500 steps of 16, whose losses lie on
   disk in single precision; time and peak memory of the process.

The losses are those of a linear Markov process with noise, from about 2.3 down to about 0.3.

    python benchmarks/fit.py [--threads 2] [--tests 200]
    python benchmarks/fit.py --large [--l2 100] [--threads 2]
"""

from __future__ import annotations

import argparse
import platform
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import scipy.sparse
import sklearn
import torch
from sklearn.linear_model import Ridge

import simfluence as sf
from simfluence.simulators.markov.least_squares import Lazy, Problem
from simfluence.simulators.markov.ridge import ridge, ridge_path

L2S = np.logspace(0, 4, 10)


def recorded(n_train: int, n_test: int, runs: int, steps: int, batch: int, folder: Path) -> tuple:
    """Weights ``[rows, train]`` and losses ``[runs, steps + 1, test]``, float32, mapped from a file."""
    rng = np.random.default_rng(0)
    curricula = sf.random_curricula(n_train, runs, steps, batch, subset=0.5)
    A = rng.normal(-0.01, 0.02, (n_train, n_test)) / batch  # what an example adds to the slope 1, and to the loss
    B = rng.normal(0.003, 0.03, (n_train, n_test)) / batch
    start = rng.normal(2.3, 0.3, n_test)
    shape = (runs, steps + 1, n_test)
    losses = np.lib.format.open_memmap(folder / "losses.npy", "w+", np.float32, shape)
    for run, curriculum in enumerate(curricula):
        now = start
        losses[run, 0] = now
        for step, examples in enumerate(curriculum):
            now = now + A[examples].sum(0) * now + B[examples].sum(0) + 0.02 * rng.normal(size=n_test)
            losses[run, step + 1] = now
    losses.flush()
    weights = scipy.sparse.csr_array(scipy.sparse.vstack([curriculum.counts for curriculum in curricula]))
    return weights.astype(np.float64), np.load(folder / "losses.npy", mmap_mode="r")


def problem_of(weights: scipy.sparse.csr_array, losses: np.ndarray) -> Problem:
    shape = (weights.shape[0], losses.shape[2])
    before = Lazy(shape, lambda some: losses[:, :-1, some].reshape(shape[0], -1))
    change = Lazy(shape, lambda some: np.diff(losses[..., some].astype(np.float64), axis=1).reshape(shape[0], -1))
    return Problem(weights, [before, None], change)


def clocks() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


def by_scikit_learn(problem: Problem, tests: int, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of all calls of ``fit``, also the processor's, and the parameters ``[path, channels, train, test]``."""
    channels, train, _ = problem.shape
    found, seconds = np.empty((len(L2S), channels, train, tests)), np.zeros(2)
    for z in range(tests):
        one = slice(z, z + 1)
        before, target = problem.multipliers[0][:, one].astype(np.float64), problem.targets[:, one][:, 0]
        X = scipy.sparse.csr_matrix(scipy.sparse.hstack([problem.weights.multiply(before), problem.weights]))
        models = [Ridge(alpha, fit_intercept=False, solver="sparse_cg", tol=tolerance) for alpha in L2S]
        start = clocks()
        for model in models:
            model.fit(X, target)
        seconds += clocks() - start
        found[..., z] = [model.coef_.reshape(channels, train) for model in models]
    return seconds, found


def by_simfluence(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    start = clocks()
    found = np.concatenate([block for _, block in ridge_path(problem, L2S)], axis=-1)
    return clocks() - start, found


def compare(problem: Problem, tests: int, tolerance: float) -> None:
    ours, path = min((by_simfluence(problem) for _ in range(3)), key=lambda timed: timed[0][0])
    theirs, expected = by_scikit_learn(problem, tests, tolerance)
    theirs *= problem.shape[2] / tests
    note = "" if tests == problem.shape[2] else f", measured on {tests} test examples and scaled"
    errors = [
        np.linalg.norm(mine[..., :tests] - other) / np.linalg.norm(other)
        for mine, other in zip(path, expected, strict=True)
    ]
    print(f"L2 path of {len(L2S)} values, {L2S[0]:g} to {L2S[-1]:g}; seconds, and the processor's")
    print(f"  simfluence     {ours[0]:7.2f}  {ours[1]:7.2f}   (the fastest of three)")
    print(f"  scikit-learn   {theirs[0]:7.2f}  {theirs[1]:7.2f}   (tol={tolerance:g}{note})")
    print("  ratio          {:7.1f}  {:7.1f}".format(*(theirs / ours)))
    print(f"  relative difference of the parameters, largest over L2: {max(errors):.1e}")
    assert max(errors) <= 1e-4, "not the same solutions"


def large(problem: Problem, l2: float) -> None:
    size = int(np.prod(problem.shape))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    solution = ridge(problem, l2)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{size:,} parameters, L2 {l2:g}")
    print(f"  fit            {seconds:7.1f} s")
    print(f"  peak memory    {peak / 2**20:7.2f} GiB of the process ({before / 2**20:.2f} before the fit;")
    print(f"                 the solution is {solution.nbytes / 2**30:.2f} GiB)")
    assert np.isfinite(solution).all()
    assert peak / 2**20 < 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--l2", type=float, default=100.0, help="of the large fit")
    parser.add_argument("--tests", type=int, default=200, help="test examples that scikit-learn is timed on")
    parser.add_argument("--tolerance", type=float, default=1e-8, help="scikit-learn's, on its residuals as ours is")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}, sklearn {sklearn.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        sizes = (20_000, 500, 64, 500, 16) if options.large else (1_000, 200, 24, 300, 8)
        weights, losses = recorded(*sizes, Path(folder))
        print("{:,} training × {:,} test examples, {} runs × {} steps of {}".format(*sizes))
        problem = problem_of(weights, losses)
        large(problem, options.l2) if options.large else compare(problem, options.tests, options.tolerance)


if __name__ == "__main__":
    main()
