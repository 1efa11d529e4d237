"""Per-example gradients by hooks against plain autograd, one example at a time, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from attribution_cases import CASES, Language, build, mlp, padded, relative, texts, tied
from torch import Tensor, nn
from torch.nn import functional

from simfluence.attribution.gradients.hooks import Gradients, _check_finite
from simfluence.attribution.gradients.layers import Factors
from simfluence.attribution.gradients.per_example import per_example_gradients
from simfluence.errors import InvalidInput, PlainGradientsWarning
from simfluence.tasks.losses import cross_entropy


def formed(gradients: Gradients, data, batch_size: int = 4) -> dict[str, Tensor]:
    """The gradients of all examples by parameter, from the factors."""
    parts: dict[str, list[Tensor]] = {}
    for _, factors in gradients.batches(data, batch_size=batch_size):
        for name, layer in gradients.layers.items():
            for parameter, values in layer.to_parameters(factors[name].matrices()).items():
                parts.setdefault(parameter, []).append(values)
    return {name: torch.cat(values) for name, values in parts.items()}


def assert_equal_to_autograd(gradients: Gradients, case, data) -> None:
    found, true = formed(gradients, data), case.gradients(data)
    assert sorted(found) == sorted(name for name, _ in case.model.named_parameters())
    for name, values in found.items():
        assert relative(values, torch.stack([row[name] for row in true])) < 1e-10, name


@pytest.mark.parametrize("name", CASES)
def test_factors_make_the_gradients_of_autograd(name):
    case = CASES[name]()
    gradients = per_example_gradients(case.model, case.loss, case.train)
    assert all(layer.sources for layer in gradients.layers.values())  # by hooks, all of them
    assert_equal_to_autograd(gradients, case, case.train)
    assert_equal_to_autograd(gradients, case, case.test)


def test_matrices_and_parameters_are_two_forms_of_the_same():
    case = CASES["language"]()
    gradients = per_example_gradients(case.model, case.loss, case.train)
    for layer in gradients.layers.values():
        matrices = torch.arange(2 * layer.size, dtype=torch.float64).reshape(2, layer.rows, layer.columns)
        tensors = layer.to_parameters(matrices)
        assert [tensors[name].shape[1:] for name in layer.parameters] == [
            gradients.parameters[name].shape for name in layer.parameters
        ]
        assert torch.equal(layer.from_parameters(tensors), matrices)
        assert torch.equal(layer.from_parameters({n: t[0] for n, t in tensors.items()}), matrices[0])


def test_layers_have_their_bias_as_last_column():
    layers = per_example_gradients(mlp().model, cross_entropy, mlp().train).layers
    assert {name: (layer.rows, layer.columns) for name, layer in layers.items()} == {"0": (5, 5), "2": (3, 6)}
    shared = per_example_gradients(tied().model, cross_entropy, tied().train)
    assert list(shared.layers) == ["again", "last"]
    assert shared.factors(tied().train)["again"].positions == 4


def test_the_embedding_as_output_layer_has_its_bias_apart():
    case = CASES["language"]()
    layers = per_example_gradients(case.model, case.loss, case.train).layers
    assert list(layers) == ["words", "mix", "head.bias"]


def test_the_model_is_left_as_it_was():
    case = mlp()
    case.model.train()
    case.model[1].eval()
    per_example_gradients(case.model, case.loss, case.train).factors(case.train)
    assert [module.training for module in case.model] == [True, False, True]
    assert all(parameter.grad is None for parameter in case.model.parameters())
    assert all(not module._forward_hooks for module in case.model.modules())


def test_padding_is_marked():
    case = texts()
    factors = per_example_gradients(case.model, case.loss, case.train).factors(case.train)
    assert torch.equal(factors["mix"].valid, case.train[0]["attention_mask"].bool())
    assert factors["last"].valid is None  # one position, behind the pooling
    more = per_example_gradients(case.model, case.loss, case.train).factors((padded(case.train[0], 3), case.train[1]))
    for name in factors:
        assert relative(more[name].matrices(), factors[name].matrices()) < 1e-12


def test_the_padding_word_of_an_embedding_is_not_trained():
    case = texts()
    inputs = dict(case.train[0])
    inputs["input_ids"] = inputs["input_ids"] - 1  # with word 0, which is the padding word
    assert (inputs["input_ids"] == 0).any()
    gradients = per_example_gradients(case.model, case.loss, (inputs, case.train[1]))
    assert_equal_to_autograd(gradients, case, (inputs, case.train[1]))
    assert gradients.layers["words"].sources


class Scaled(nn.Module):
    """A parameter of its own, a weight used outside of its module, and attention, which goes around its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))
        self.mix = nn.Linear(4, 4, bias=False)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.place = nn.Embedding(3, 4)
        self.last = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.mix(inputs * self.scale) + self.place(torch.arange(3)[None])  # [batch, 3, 4]
        hidden = functional.linear(torch.tanh(hidden), self.mix.weight)
        hidden, _ = self.attention(hidden, hidden, hidden, need_weights=False)
        return self.last(hidden.sum(1))


def scaled():
    rng = torch.Generator().manual_seed(0)
    data = torch.randn(6, 3, 4, generator=rng, dtype=torch.float64), torch.randint(0, 3, (6,), generator=rng)
    case = mlp()
    return type(case)(build(Scaled), cross_entropy, data, data)


def test_what_hooks_do_not_see_is_taken_by_other_means():
    case = scaled()
    message = "scale, mix.weight, attention.*place.weight: they are computed by torch.func"
    with pytest.warns(PlainGradientsWarning, match=message):
        gradients = per_example_gradients(case.model, case.loss, case.train)
    assert [name for name, layer in gradients.layers.items() if layer.sources] == ["last"]
    assert_equal_to_autograd(gradients, case, case.train)


def test_one_example_after_the_other_where_torch_func_fails():
    class Branching(Scaled):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs) * (1 if inputs.sum().item() > -1e9 else 0)

    case = scaled()
    case = type(case)(build(Branching), case.loss, case.train, case.test)
    with pytest.warns(PlainGradientsWarning, match="one example at a time"):
        gradients = per_example_gradients(case.model, case.loss, case.train)
    assert gradients.plain
    assert_equal_to_autograd(gradients, case, case.train)


def test_layers_are_chosen_by_name():
    case = scaled()
    gradients = per_example_gradients(
        case.model, case.loss, case.train, layers=["la*"]
    )  # no warning: nothing else is touched
    assert list(gradients.layers) == ["last"]
    with pytest.raises(InvalidInput, match="no layer 'lasst', did you mean 'last'"):
        per_example_gradients(case.model, case.loss, case.train, layers=["lasst"])
    with pytest.raises(InvalidInput, match="layers must be a sequence of strings or None, got 'last'"):
        per_example_gradients(case.model, case.loss, case.train, layers="last")
    with pytest.raises(InvalidInput, match="empty list: name some of scale, mix"):
        per_example_gradients(case.model, case.loss, case.train, layers=[])


def test_frozen_parameters_are_left_out():
    case = mlp()
    case.model[0].requires_grad_(False)
    case.model[2].weight.requires_grad_(False)
    assert list(per_example_gradients(case.model, case.loss, case.train).layers) == ["2.bias"]
    case.model.requires_grad_(False)
    with pytest.raises(InvalidInput, match="Sequential has no parameter that requires a gradient"):
        per_example_gradients(case.model, case.loss, case.train)


def test_a_reduced_loss_is_refused():
    case = mlp()
    with pytest.raises(InvalidInput, match=r"shape \(\) for a batch of 1: return one loss per example"):
        per_example_gradients(case.model, functional.cross_entropy, case.train)


def test_a_random_forward_pass_is_refused():
    case = mlp()
    model = nn.Sequential(case.model, _Always())
    with pytest.raises(InvalidInput, match="two passes over the same examples differ"):
        per_example_gradients(model, case.loss, case.train)
    quiet = nn.Sequential(case.model, nn.Dropout(0.5)).train()
    same = type(case)(quiet, case.loss, case.train, case.test)
    gradients = per_example_gradients(quiet, case.loss, case.train)
    quiet.eval()
    assert_equal_to_autograd(gradients, same, case.train)


class _Always(nn.Module):
    """Dropout that forgot to ask for the mode."""

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.dropout(inputs, 0.5, training=True)


def test_examples_that_are_mixed_are_refused():
    case = mlp()

    def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs - outputs.mean(0), targets)

    with pytest.raises(InvalidInput, match="depends on the others in its batch"):
        per_example_gradients(case.model, contrastive, case.train)


def test_labels_out_of_range_are_named_with_their_examples():
    case = mlp()
    gradients = per_example_gradients(case.model, case.loss, case.train)
    labels = case.train[1].clone()
    labels[6] = 3
    with pytest.raises(InvalidInput, match=r"fails on training examples 4 to 7: .*3.* labels are in the model's range"):
        formed(gradients, (case.train[0], labels))


def test_a_gradient_that_is_not_finite_is_named():
    case = mlp()

    def rooted(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs[:, 0].pow(2).sqrt() + 0 * targets  # no derivative at 0

    model = nn.Sequential(nn.Linear(4, 2, bias=False)).double()
    X = case.train[0].clone()
    X[6] = 0
    gradients = per_example_gradients(model, rooted, (X, case.train[1]))
    with pytest.raises(InvalidInput, match="the gradient of training example 6 in layer '0' is not finite"):
        formed(gradients, (X, case.train[1]))
    X[5, 1] = math.nan
    with pytest.raises(InvalidInput, match="the loss of training example 5 is nan"):
        formed(gradients, (X, case.train[1]))


def test_no_examples():
    case = mlp()
    with pytest.raises(InvalidInput, match="no example"):
        per_example_gradients(case.model, case.loss, (case.train[0][:0], case.train[1][:0]))


def test_half_of_a_language_model_by_pattern():
    case = CASES["language"]()
    assert isinstance(case.model, Language)
    assert list(per_example_gradients(case.model, case.loss, case.train, layers=["mix", "*.bias"]).layers) == [
        "mix",
        "head.bias",
    ]


def test_large_numbers_are_finite():
    large = torch.full((2, 1, 3), 3e38)  # their sum is not
    _check_finite("layer", Factors(large, large), "training", 0)
    large[1, 0, 2] = math.inf
    with pytest.raises(InvalidInput, match="the input of training example 5 in layer 'layer' is not finite"):
        _check_finite("layer", Factors(large, torch.ones(2, 1, 3)), "training", 4)
