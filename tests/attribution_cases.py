"""Small models in float64 with data, and their per-example gradients by plain autograd, for the attribution tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from comparing import relative as relative
from torch import Tensor, nn
from torch.nn import functional

from simfluence.tasks.losses import cross_entropy, squared_error


@dataclass(frozen=True)
class Case:
    """``model`` and ``loss`` with training and test data."""

    model: nn.Module
    loss: Callable[[Any, Tensor], Tensor]
    train: tuple[Any, Tensor]
    test: tuple[Any, Tensor]

    def gradients(self, data: tuple[Any, Tensor]) -> list[dict[str, Tensor]]:
        """For each example, the gradient by every parameter: one forward and backward pass each."""
        found = []
        for index in range(len(data[1])):
            inputs = take(data[0], index)
            outputs = self.model(**inputs) if isinstance(inputs, Mapping) else self.model(inputs)
            loss = self.loss(outputs, data[1][index : index + 1]).sum()
            names, parameters = zip(*self.model.named_parameters(), strict=True)
            values = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            found.append(dict(zip(names, values, strict=True)))
        return found


def take(inputs: Any, index: int) -> Any:
    if isinstance(inputs, Mapping):
        return {name: value[index : index + 1] for name, value in inputs.items()}
    return inputs[index : index + 1]


def classes(rng: torch.Generator, count: int, n: int) -> Tensor:
    return torch.randint(0, n, (count,), generator=rng)


def build(model: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return model().double()


def mlp() -> Case:
    rng = torch.Generator().manual_seed(1)
    model = build(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)))
    X = torch.randn(18, 4, generator=rng, dtype=torch.float64)
    y = classes(rng, 18, 3)
    return Case(model, cross_entropy, (X[:13], y[:13]), (X[13:], y[13:]))


def regression() -> Case:
    rng = torch.Generator().manual_seed(2)
    model = build(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False)))
    X = torch.randn(16, 3, generator=rng, dtype=torch.float64)
    y = torch.randn(16, 2, generator=rng, dtype=torch.float64)
    return Case(model, squared_error, (X[:11], y[:11]), (X[11:], y[11:]))


class Images(nn.Module):
    """Convolutions in two dimensions and in one, with stride, padding and dilation; no bias in one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.second = nn.Conv2d(3, 2, (1, 2), bias=False)
        self.third = nn.Conv1d(2, 3, 2, dilation=2, padding=1)
        self.last = nn.Linear(15, 3)

    def forward(self, images: Tensor) -> Tensor:
        hidden = functional.relu(self.first(images), inplace=True)  # [batch, 3, 3, 3]
        hidden = torch.tanh(self.second(hidden)).flatten(2)  # [batch, 2, 6]
        return self.last(torch.tanh(self.third(hidden))[..., :5].flatten(1))


def images() -> Case:
    rng = torch.Generator().manual_seed(3)
    X = torch.randn(13, 2, 5, 6, generator=rng, dtype=torch.float64)
    y = classes(rng, 13, 3)
    return Case(build(Images), cross_entropy, (X[:9], y[:9]), (X[9:], y[9:]))


class Texts(nn.Module):
    """Words, one layer per position, a normalisation, and the mean over the positions that are no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 4, padding_idx=0)
        self.mix = nn.Linear(4, 5)
        self.norm = nn.LayerNorm(5)
        self.last = nn.Linear(5, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.norm(torch.tanh(self.mix(self.words(input_ids))))
        kept = attention_mask[..., None].to(hidden.dtype)
        return self.last((hidden * kept).sum(1) / kept.sum(1))


def padded(inputs: Mapping[str, Tensor], more: int, word: int = 3) -> dict[str, Tensor]:
    """With ``more`` positions of padding, which hold a real word."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    rest = torch.full((len(ids), more), word)
    return {"input_ids": torch.cat([ids, rest], 1), "attention_mask": torch.cat([mask, torch.zeros_like(rest)], 1)}


def texts() -> Case:
    rng = torch.Generator().manual_seed(4)
    ids = torch.randint(1, 7, (14, 6), generator=rng)
    lengths = torch.randint(2, 7, (14,), generator=rng)
    mask = (torch.arange(6) < lengths[:, None]).long()
    y = classes(rng, 14, 3)
    train, test = ({"input_ids": ids[s], "attention_mask": mask[s]} for s in (slice(0, 10), slice(10, 14)))
    return Case(build(Texts), cross_entropy, (train, y[:10]), (test, y[10:]))


class Tied(nn.Module):
    """One module called three times, and another that shares its weight and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(4, 4)
        self.twin = nn.Linear(4, 4)
        self.twin.weight, self.twin.bias = self.again.weight, self.again.bias
        self.last = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs
        for _ in range(3):
            hidden = torch.tanh(self.again(hidden))
        return self.last(torch.tanh(self.twin(hidden)))


def tied() -> Case:
    rng = torch.Generator().manual_seed(5)
    X = torch.randn(15, 4, generator=rng, dtype=torch.float64)
    y = classes(rng, 15, 3)
    return Case(build(Tied), cross_entropy, (X[:11], y[:11]), (X[11:], y[11:]))


class Conv1D(nn.Module):
    """As in transformers: a linear layer whose weight is ``[in, out]``."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(0.1 * torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.nf)
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(shape)


class Language(nn.Module):
    """Next-word prediction with the embedding as the output layer, and a bias of the output's own."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(6, 4)
        self.mix = Conv1D(4, 4)
        self.head = nn.Linear(4, 6)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.words(ids)
        return self.head(functional.relu(self.mix(hidden), inplace=True) + hidden.cumsum(1))


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed over the words of each example; −100 is no target."""
    return functional.cross_entropy(logits.mT, targets, reduction="none", ignore_index=-100).sum(1)


def language() -> Case:
    rng = torch.Generator().manual_seed(6)
    ids = torch.randint(0, 6, (12, 6), generator=rng)
    targets = ids[:, 1:].clone()
    targets[::3, -2:] = -100
    model = build(Language)
    return Case(model, token_losses, (ids[:9, :-1], targets[:9]), (ids[9:, :-1], targets[9:]))


def kronecker_case() -> Case:
    """One layer whose inputs and output gradients are independent: every input with every gradient."""
    rng = torch.Generator().manual_seed(0)
    X = torch.randn(6, 3, generator=rng, dtype=torch.float64)
    slopes = torch.randn(5, 4, generator=rng, dtype=torch.float64)
    slopes[:, 1] *= 3
    pairs = X.repeat_interleave(5, 0), slopes.repeat(6, 1)
    model = nn.Linear(3, 4).double()

    def along(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs * targets).sum(1)  # the derivative by the outputs is the target

    order = torch.randperm(30, generator=rng)
    train = pairs[0][order], pairs[1][order]
    return Case(model, along, train, (train[0][:4] + 1, train[1][4:8]))


CASES = {case.__name__: case for case in (mlp, regression, images, texts, tied, language)}
