from __future__ import annotations

import pytest
import torch
from torch import nn

from simfluence.attribution.gradients.tangent_kernel import tangent_kernel
from simfluence.errors import InvalidInput


class Words(nn.Module):
    """Embedding, LayerNorm, positions, a pooling."""

    def __init__(self):
        super().__init__()
        self.words, self.norm = nn.Embedding(7, 5), nn.LayerNorm(5)
        self.inner, self.out = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, words):
        return self.out(torch.tanh(self.inner(self.norm(self.words(words)))).mean(1))


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 6),
        nn.Tanh(),
        nn.Linear(6, 2),
    )


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), lambda: torch.randn(7, 4)),
    "no bias": (lambda: nn.Linear(4, 2, bias=False), lambda: torch.randn(7, 4)),
    "cnn": (cnn, lambda: torch.randn(7, 1, 4, 4)),
    "words": (Words, lambda: torch.randint(7, (7, 6))),
    "one output": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1), nn.Flatten(0)),
        lambda: torch.randn(7, 4),
    ),
}


def dense(model, inputs, steps=None):
    """All outputs' gradients by autograd, one at a time."""
    parameters = dict(model.named_parameters())
    rows = []
    for row in range(len(inputs)):
        for output in model(inputs[row : row + 1]).flatten():
            found = torch.autograd.grad(output, list(parameters.values()), retain_graph=True)
            rows.append(torch.cat([gradient.flatten() for gradient in found]))
    J = torch.stack(rows)
    P = torch.ones(J.shape[1]) if steps is None else torch.cat([steps[name].flatten() for name in parameters])
    return J * P @ J.T


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("preconditioned", [False, True])
def test_the_kernel_is_the_dense_one(name, preconditioned, monkeypatch):
    torch.manual_seed(0)
    make, draw = MODELS[name]
    model, inputs = make().double(), draw()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    steps = {n: torch.rand_like(p) + 0.1 for n, p in model.named_parameters()} if preconditioned else None
    expected = dense(model, inputs, steps)
    outputs = len(expected) // 7
    for columns in (7, 4):
        for formed in (2**25, 40):  # in one piece, and in many
            monkeypatch.setattr("simfluence.attribution.gradients.tangent_kernel.FORMED", formed)
            found = tangent_kernel(model, (inputs, torch.zeros(7)), columns, steps, batch_size=3)
            assert found.shape == (columns, outputs, 7, outputs)
            assert torch.allclose(found.flatten(0, 1).flatten(1), expected[: columns * outputs], rtol=1e-8, atol=1e-10)


def test_outputs_must_be_one_tensor():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x):
            return {"logits": self.linear(x)}

    with pytest.raises(InvalidInput, match="outputs that are one tensor"):
        tangent_kernel(Two(), (torch.randn(3, 2), torch.zeros(3)))
