"""What tangent kernels and simulating with them cost: against Jacobians, against training, and as data grow.

python benchmarks/tangent_speed.py [--parts kernels parameters training growth] [--threads 1]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap

import simfluence as sf
from simfluence.attribution.gradients.tangent_kernel import tangent_kernel


def seconds(work: Callable[[], object], repetitions: int = 1) -> float:
    """The least of a few goes."""
    found = []
    for _ in range(repetitions):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def by_jacobians(model: nn.Module, X: torch.Tensor, columns: int) -> torch.Tensor:
    """The same kernel from whole Jacobians."""
    parameters = {name: each.detach() for name, each in model.named_parameters()}

    def outputs(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return functional_call(model, parameters, (x[None],))[0]

    jacobians = vmap(jacrev(outputs), (None, 0))(parameters, X)
    flat = torch.cat([each.flatten(2) for each in jacobians.values()], 2).flatten(0, 1)  # [examples · outputs, params]
    outputs_count = flat.shape[0] // len(X)
    return (flat[: columns * outputs_count] @ flat.T).view(columns, outputs_count, len(X), outputs_count)


def kernels() -> None:
    """400 examples × 10 outputs of the digits MLP, at ten checkpoints."""
    task = sf.tasks.digits()
    X = torch.cat([task.train_data[0], task.test_data[0]])
    models = [task.build_model(seed) for seed in range(10)]
    ours = seconds(lambda: [tangent_kernel(model, (X, X)) for model in models], 2)
    theirs = seconds(lambda: [by_jacobians(model, X, len(X)) for model in models])
    a, b = tangent_kernel(models[0], (X, X)), by_jacobians(models[0], X, len(X))
    error = float((a - b).abs().max() / b.abs().max())
    print(
        f"kernels of 400 × 10 outputs, ten checkpoints: vmap(jacrev) {theirs:.2f} s, ours {ours:.2f} s: "
        f"{theirs / ours:.1f} ×; relative difference {error:.1e}",
        flush=True,
    )


def task_of(model: Callable[[], nn.Module], n_train: int, n_test: int, shape: tuple[int, ...]) -> sf.Task:
    """Random inputs and labels: for costs only."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n_train + n_test, *shape)).astype(np.float32)
    y = rng.integers(10, size=n_train + n_test)
    return sf.tasks.from_arrays(
        model, X[:n_train], y[:n_train], "cross_entropy", test=(X[n_train:], y[n_train:]), name="random"
    )


def mlp(width: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip


def cnn() -> nn.Module:
    """10.2 million parameters, on 8 × 8 images."""
    return nn.Sequential(
        nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 512, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(512, 1060, 3, padding=1), nn.ReLU(), nn.Conv2d(1060, 520, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(520, 10),
    )  # fmt: skip


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def fitted_on(
    task: sf.Task, steps: int, lr: float, **arguments: object
) -> tuple[sf.TangentKernelSimulator, sf.Runs, float, float]:
    """A simulator of one run, its run and another, and the seconds to train and to fit."""
    curricula = sf.random_curricula(n_train=len(task.train), runs=2, steps=steps, batch_size=8, seed=0)
    start = time.perf_counter()
    runs = sf.record(task, sf.Recipe(lr=lr), curricula, engine="loop")
    trained = (time.perf_counter() - start) / 2
    start = time.perf_counter()
    fitted = sf.TangentKernelSimulator(task, **arguments).fit(runs[:1])
    return fitted, runs, trained, time.perf_counter() - start


def parameters() -> None:
    """One step's cost, whatever the model's size."""
    for width in (48, 950, 3100):
        task = task_of(mlp(width), 100, 50, (64,))
        fitted, runs, _, _ = fitted_on(task, 50, 0.01, checkpoints=2, landmarks=10)
        took = seconds(lambda f=fitted, r=runs: f.simulate(r.curricula[1:], r.initial_losses[1:]), 3) / 50
        print(f"{count(task.build_model(0)):>10,} parameters: {1e3 * took:.2f} ms per simulated step", flush=True)


def training() -> None:
    """A what-if against training a convolutional network of ten million parameters."""
    task = task_of(cnn, 40, 50, (1, 8, 8))
    fitted, runs, trained, fitting = fitted_on(task, 20, 0.01, checkpoints=1, landmarks=2, features=0)
    took = seconds(lambda: fitted.simulate(runs.curricula[1:], runs.initial_losses[1:]), 3)
    print(
        f"{count(task.build_model(0)):,} parameters, 20 steps of 8, 50 test losses each: training {trained:.1f} s, "
        f"a what-if {1e3 * took:.0f} ms: {trained / took:.0f} ×; fitted in {fitting:.0f} s",
        flush=True,
    )


def growth() -> None:
    """Memory and time from 300 to 10,000 training examples; 100 test examples, 10 outputs, 20 features that move."""
    print("| training examples | whole kernels, each | 25 landmarks, each | taken in | a step |\n|---|---|---|---|---|")
    for n_train in (300, 1_000, 3_000, 10_000):
        task = task_of(lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)), n_train, 100, (64,))
        fitted, runs, _, fitting = fitted_on(task, 20, 0.05, checkpoints=1, landmarks=25)
        took = seconds(lambda f=fitted, r=runs: f.simulate(r.curricula[1:], r.initial_losses[1:]), 3) / 20
        whole = n_train * 20 * (n_train + 100) * 20 * 4
        print(
            f"| {n_train:,} | {whole / 2**20:,.0f} MiB | {fitted.kernels_.nbytes / 2**20:,.0f} MiB | {fitting:.1f} s "
            f"| {1e3 * took:.1f} ms |",
            flush=True,
        )


PARTS = {part.__name__: part for part in (kernels, parameters, training, growth)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.parts:
        PARTS[name]()


if __name__ == "__main__":
    main()
