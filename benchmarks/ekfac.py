"""EK-FAC against the kronfluence package: the same scores, how long they take, and in how much memory.

Each side works in a process of its own, the two in alternation: factors are fitted to the real labels of the training
examples (empirical Fisher), then all pairs of test and training examples are scored with the same absolute damping.
Raw scores are compared, ``∇ℓ_zᵀ (G + λI)⁻¹ ∇ℓ_i``, sums over layers that both sides track.

    make bench-peers, or: python benchmarks/ekfac.py [mlp] [transformer] [--small] [--threads 1] [--repetitions 1]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

SIDES = ("kronfluence", "simfluence")


@dataclass(frozen=True)
class Case:
    """A model with its data.

    Args:
        train, test: how many examples.
        damping: λ, about a tenth of the mean eigenvalue of the layers' blocks.
        layers: a pattern of those that are tracked.
        batches: what suits kronfluence best of those tried: for covariances, eigenvalues, and training examples
            in scores.
        batch: the same of simfluence.
        goals: at least so many times faster in fitting and in scores.
    """

    model: Callable[[], nn.Module]
    data: Callable[[int], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    train: int
    test: int
    damping: float
    layers: str
    batches: tuple[int, int, int]
    batch: int
    epochs: int
    goals: tuple[float, float]


def classification(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="none")


def next_token(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs.mT, targets, reduction="none").sum(1)


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )  # fmt: skip


def images(count: int) -> tuple[Tensor, Tensor]:
    """Ten noisy prototypes of 784 correlated pixels, a tenth of the labels wrong."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(784, 784, generator=generator) / torch.arange(1, 785) ** 0.75
    prototypes = torch.randn(10, 784, generator=generator) @ mixing.T
    labels = torch.randint(10, (count,), generator=generator)
    noise = torch.randn(count, 784, generator=generator) @ mixing.T
    wrong = torch.rand(count, generator=generator) < 0.1
    drawn = torch.randint(10, (count,), generator=generator)
    return (prototypes[labels] + noise).relu(), torch.where(wrong, drawn, labels)


class Block(nn.Module):
    """Causal attention and an MLP, each behind a norm, with a linear layer for every weight."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        parts = (f(h).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.between(x))))


class Transformer(nn.Module):
    def __init__(self, words: int = 256, width: int = 256, length: int = 64, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def texts(count: int) -> tuple[Tensor, Tensor]:
    """64 tokens of a Markov chain of 256 states, eight likely successors each; the targets are one place ahead."""
    generator = torch.Generator().manual_seed(0)
    successors = torch.randint(256, (256, 8), generator=generator)
    tokens = torch.randint(256, (count, 65), generator=generator)
    for place in range(64):
        drawn = torch.randint(8, (count,), generator=generator)
        stays = torch.rand(count, generator=generator) < 0.1
        tokens[:, place + 1] = torch.where(stays, tokens[:, place + 1], successors[tokens[:, place], drawn])
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


CASES = {
    "mlp": Case(mlp, images, classification, 5000, 200, 1e-6, "*", (500, 20, 500), 250, 3, (20, 2)),
    "transformer": Case(Transformer, texts, next_token, 1000, 100, 5e-4, "blocks.*", (50, 20, 50), 64, 3, (2, 1.5)),
}


def trained(case: Case) -> nn.Module:
    """Briefly, so that the examples' gradients differ in size."""
    torch.manual_seed(0)
    model = case.model()
    inputs, targets = case.data(case.train + case.test)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(case.epochs):
        for rows in torch.randperm(case.train).split(50):
            optimizer.zero_grad()
            case.loss(model(inputs[rows]), targets[rows]).mean().backward()
            optimizer.step()
    return model.eval()


@contextlib.contextmanager
def timed(times: dict[str, float], name: str) -> Iterator[None]:
    """Seconds by the clock, and of the processor: those do not count what else the machine is doing."""
    start, worked = time.perf_counter(), time.process_time()
    yield
    times[name], times[f"{name}, processor"] = time.perf_counter() - start, time.process_time() - worked


def with_kronfluence(case: Case, model: nn.Module, train, test, times: dict[str, float]) -> np.ndarray:
    import kronfluence
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from torch.utils.data import TensorDataset

    names = tracked(case, model)

    class Summed(kronfluence.Task):
        def compute_train_loss(self, batch, model, sample=False):
            return case.loss(model(batch[0]), batch[1]).sum()

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self):
            return names

    task = Summed()
    model = kronfluence.prepare_model(model, task)
    covariances, eigenvalues, scored = case.batches
    with tempfile.TemporaryDirectory() as folder:
        analyzer = kronfluence.Analyzer("peer", model, task, cpu=True, disable_tqdm=True, output_dir=folder)
        common = {"factors_name": "f", "factor_args": FactorArguments(strategy="ekfac", use_empirical_fisher=True)}
        data, few = TensorDataset(*train), TensorDataset(*test)
        with timed(times, "covariances"):
            analyzer.fit_covariance_matrices(dataset=data, per_device_batch_size=covariances, **common)
        with timed(times, "eigenvectors"):
            analyzer.perform_eigendecomposition(**common)
        with timed(times, "eigenvalues"):
            analyzer.fit_lambda_matrices(dataset=data, per_device_batch_size=eigenvalues, **common)
        with timed(times, "scores"):
            analyzer.compute_pairwise_scores(
                "s", "f", few, data, len(few), scored, score_args=ScoreArguments(damping_factor=case.damping)
            )  # fmt: skip
        return analyzer.load_pairwise_scores("s")["all_modules"].numpy()


def with_simfluence(case: Case, model: nn.Module, train, test, times: dict[str, float]) -> np.ndarray:
    from simfluence import attribution

    names = tracked(case, model)
    attributor = attribution.EKFAC(damping=case.damping, labels="empirical", layers=names, batch_size=case.batch)
    with timed(times, "fit"):
        attributor.fit(model, train, loss=case.loss)
    with timed(times, "scores"):
        return attributor.scores(test, unit="raw").values


def tracked(case: Case, model: nn.Module) -> list[str]:
    prefix = case.layers.rstrip("*")
    return [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and name.startswith(prefix)]


def child(case: Case, side: str, folder: Path) -> None:
    """One side's work, its findings left in ``folder``."""
    model = case.model()
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    inputs, targets = case.data(case.train + case.test)
    train, test = (inputs[: case.train], targets[: case.train]), (inputs[case.train :], targets[case.train :])
    warm_up(model, train)
    times: dict[str, float] = {}
    before = peak()
    values = {"kronfluence": with_kronfluence, "simfluence": with_simfluence}[side](case, model, train, test, times)
    np.savez(folder / f"{side}.npz", values=values, before=before, peak=peak(), **times)


def warm_up(model: nn.Module, train: tuple[Tensor, Tensor]) -> None:
    for _ in range(3):
        model(train[0][:20]).sum().backward()
    model.zero_grad()


def peak() -> float:
    """The most memory that this process has had, in MB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def compare(name: str, case: Case, options: argparse.Namespace) -> None:
    found: dict[str, list[dict[str, np.ndarray]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        torch.save(trained(case).state_dict(), Path(folder) / "model.pt")
        for repetition in range(options.repetitions):
            for side in sorted(SIDES, reverse=bool(repetition % 2)):
                command = [sys.executable, "-W", "ignore", __file__, name, "--side", side, "--folder", folder]
                command += ["--threads", str(options.threads)] + ["--small"] * options.small
                subprocess.run(command, check=True)
                with np.load(Path(folder) / f"{side}.npz") as file:
                    found[side].append(dict(file))
    report(name, case, found)


def report(name: str, case: Case, found: dict[str, list[dict[str, np.ndarray]]]) -> None:
    print(f"\n{name}: {case.train:,} training and {case.test} test examples, damping {case.damping:g}")
    middle = {
        side: {key: float(np.median([one[key] for one in each])) for key in each[0] if key != "values"}
        for side, each in found.items()
    }
    theirs, ours = (middle[side] for side in SIDES)
    stages = ("covariances", "eigenvectors", "eigenvalues")
    for kind in ("", ", processor"):
        theirs[f"fit{kind}"] = sum(theirs[f"{stage}{kind}"] for stage in stages)
    print(f"  {'':12} {'kronfluence':>12} {'simfluence':>12}")
    for what, goal in zip(("fit", "scores"), case.goals, strict=True):
        ratio = f"{theirs[what] / ours[what]:6.1f} × faster (goal {goal:g})"
        print(f"  {what:10} s {theirs[what]:12.2f} {ours[what]:12.2f} {ratio}")
        worked = [each[f"{what}, processor"] for each in (theirs, ours)]
        print(f"  {'processor':>10} s {worked[0]:12.2f} {worked[1]:12.2f} {worked[0] / worked[1]:6.1f} ×")
    ratio = f"{ours['peak'] / theirs['peak']:6.2f} of theirs (goal 1)"
    print(f"  {'peak':9} MB {theirs['peak']:12.0f} {ours['peak']:12.0f} {ratio}")
    print(f"    before any of it: {theirs['before']:.0f} and {ours['before']:.0f} MB")
    print("    kronfluence's fit: " + ", ".join(f"{stage} {theirs[stage]:.2f} s" for stage in stages))
    x, y = (found[side][-1]["values"].astype(float) for side in SIDES)
    by_test = [np.corrcoef(a, b)[0, 1] for a, b in zip(x, y, strict=True)]
    difference = np.linalg.norm(x - y) / np.linalg.norm(x)
    print(f"  scores: correlation {np.corrcoef(x.ravel(), y.ravel())[0, 1]:.6f}, of the worst test example")
    print(f"    {min(by_test):.6f}; relative difference {difference:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="case", help="mlp, transformer, or both by default")
    parser.add_argument("--small", action="store_true", help="a tenth of the examples, for a quick look")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases = {name: CASES[name] for name in options.cases or CASES}
    if options.small:
        cases = {name: replace(case, train=case.train // 10, test=case.test // 10) for name, case in cases.items()}
    if options.side:
        for case in cases.values():
            child(case, options.side, options.folder)
        return
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "kronfluence"))
    print(f"{platform.machine()}, {options.threads} threads, {versions}")
    for name, case in cases.items():
        compare(name, case, options)


if __name__ == "__main__":
    main()
