"""Scores of models that compute their examples together or use weights in unusual ways, against autograd.

The reference is always one example at a time. Each model is also tried with examples that come late: rules are right
for the examples that are looked at first.
"""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import sklearn.base
import torch
from attribution_cases import relative
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from simfluence.attribution import (
    EKFAC,
    KFAC,
    Adam,
    Arnoldi,
    ConjugateGradients,
    Diagonal,
    Exact,
    GradientCosine,
    GradientDot,
    HiddenSimilarity,
    LiSSA,
    Relative,
    TracInCP,
    candidates,
)
from simfluence.attribution.gradients.layers import Factors, concatenated, whole
from simfluence.attribution.gradients.per_example import per_example_gradients
from simfluence.errors import InvalidInput, PlainGradientsWarning


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="none")


def words(count: int, longest: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Words 1 … 19 and padding 0, and classes."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (count,), generator=rng)
    ids = torch.randint(1, 20, (count, longest), generator=rng) * (torch.arange(longest) < lengths[:, None])
    return ids, torch.arange(count) % 3


class Words(nn.Module):
    """Words, a layer, the mean over the real words, and a layer: the plain form of the models below."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.last = nn.Embedding(20, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def hidden(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.mix(self.words(ids)))

    def forward(self, ids: Tensor) -> Tensor:
        real = ids > 0
        return self.last((self.hidden(ids) * real[..., None]).sum(1) / real.sum(1, keepdim=True))


class Sorts(Words):
    """Sorts its batch by length, and puts it back."""

    def forward(self, ids: Tensor) -> Tensor:
        order = (ids > 0).sum(1).argsort(descending=True, stable=True)
        return super().forward(ids[order])[order.argsort()]


class Flips(Words):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids.flip(0)).flip(0)


class SometimesFlips(Words):
    """Flips a batch with a text that starts with the word 19."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids.flip(0)).flip(0) if (ids[:, 0] == 19).any() else super().forward(ids)


class Packs(Words):
    """Computes layers at the real words only."""

    def forward(self, ids: Tensor) -> Tensor:
        rows, places = (ids > 0).nonzero(as_tuple=True)
        hidden = torch.tanh(self.mix(self.words(ids[rows, places])))  # [real words of the batch, 5]
        sums = hidden.new_zeros(len(ids), 5).index_add(0, rows, hidden)
        return self.last(sums / (ids > 0).sum(1, keepdim=True))


class Places(Words):
    """Positions come first, then the batch."""

    def hidden(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.mix(self.words(ids.T))).transpose(0, 1)


class Chunks(Words):
    """Computes its batch in two parts."""

    def forward(self, ids: Tensor) -> Tensor:
        return torch.cat([super(Chunks, self).forward(part) for part in ids.tensor_split(2) if len(part)])


class Unrolls(Words):
    """Calls a layer once per position, up to the longest text of the batch."""

    def forward(self, ids: Tensor) -> Tensor:
        longest = int((ids > 0).sum(1).max())
        hidden = torch.stack([torch.tanh(self.mix(self.words(ids[:, place]))) for place in range(longest)], 1)
        real = (ids > 0)[:, :longest, None]
        return self.last((hidden * real).sum(1) / real.sum(1))


class Experts(Words):
    """Every example goes to one of three experts; the third gets few."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.hidden(ids).sum(1)
        chosen = torch.where(ids[:, 0] == 19, 2, ids[:, 0] % 2)
        outputs = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            if (chosen == number).any():
                outputs[chosen == number] = torch.tanh(expert(hidden[chosen == number]))
        return self.last(outputs)


class Recurrent(Words):
    """A packed recurrent layer, which has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(6, 5, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        lengths = (ids > 0).sum(1)
        packed = pack_padded_sequence(self.words(ids), lengths, batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.recurrent(packed)[0], batch_first=True)
        return self.last(torch.tanh(self.mix(self.words(ids))).sum(1) + hidden.sum(1))


class Transposed(Words):
    """A weight that is used outside of its module, and transposed."""

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.hidden(ids).sum(1)
        return self.last(
            hidden + torch.tanh(functional.linear(functional.linear(hidden, self.mix.weight.T), self.mix.weight))
        )


class SometimesTransposed(Words):
    """The same, but only for texts that start with the word 19."""

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.hidden(ids).sum(1)
        again = functional.linear(functional.linear(hidden, self.mix.weight.T), self.mix.weight)
        return self.last(torch.where(ids[:, :1] == 19, again, hidden))


class InPlace(Words):
    """Changes its inputs, and the outputs of its layers, in place."""

    def forward(self, ids: Tensor) -> Tensor:
        ids.add_(ids > 0).clamp_(max=19)
        hidden = self.mix(self.words(ids))
        hidden.mul_(0.5).relu_()
        return self.last(hidden.sum(1)).mul_(2)


class Checkpointed(Words):
    def hidden(self, ids: Tensor) -> Tensor:
        return checkpoint(super().hidden, ids, use_reentrant=False)


class Dropped(Words):
    def hidden(self, ids: Tensor) -> Tensor:
        return functional.dropout(super().hidden(ids), 0.5, self.training)


class Temperature(Words):
    """A number that is learned, without axes."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.temperature


class Centred(Words):
    """The loss of an example does not depend on the others, but the gradient in a batch does."""

    def hidden(self, ids: Tensor) -> Tensor:
        hidden = super().hidden(ids)
        mean = hidden.mean(0, keepdim=True)
        return hidden + mean - mean.detach()


class SparseWords(Words):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 6, sparse=True)


MODELS = [
    Words, Sorts, Flips, SometimesFlips, Packs, Places, Chunks, Unrolls, Experts, Recurrent, Transposed,
    SometimesTransposed, InPlace,
    Checkpointed, Dropped, Temperature, Centred, SparseWords,
]  # fmt: skip


def built(model: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return model().double()


def rows(model: nn.Module, data: tuple[Tensor, Tensor], loss=losses) -> np.ndarray:
    """The gradients ``[examples, parameters]`` by autograd, one example at a time."""
    model.eval()
    found = []
    for row in range(len(data[1])):
        total = loss(model(data[0][row : row + 1].clone()), data[1][row : row + 1]).sum()
        parts = torch.autograd.grad(total, list(model.parameters()), allow_unused=True, materialize_grads=True)
        found.append(torch.cat([part.to_dense().flatten() for part in parts]))
    return torch.stack(found).numpy()


def scored(method, model: nn.Module, train, test, loss=losses) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PlainGradientsWarning)
        return np.asarray(method.fit(model, train, loss).scores(test))


@pytest.mark.parametrize("batch_size", [64, 5])
@pytest.mark.parametrize("kind", MODELS)
def test_scores_are_those_of_one_example_at_a_time(kind, batch_size):
    model, train, test = built(kind), words(23), words(11, seed=1)
    g, h = rows(model, train), rows(model, test)
    assert relative(scored(GradientDot(batch_size=batch_size), model, train, test), h @ g.T) < 1e-9
    fisher = (g**2).mean(0) + 0.1
    diagonal = Diagonal(0.1, labels="empirical", batch_size=batch_size)
    assert relative(scored(diagonal, model, train, test), h / fisher @ g.T / 23) < 1e-9
    assert relative(diagonal.self_influence(), ((g / fisher) * g).sum(1) / 23) < 1e-9


@pytest.mark.parametrize("kind", [SometimesTransposed, SometimesFlips])
def test_what_comes_late_is_noticed(kind):
    """Two examples at which rules fail, on the training or on the test side, which are not among those tried first."""
    model, (ids, y) = built(kind), words(40, longest=4)
    ids[ids[:, 0] == 19, 0] = 18
    first, late = (ids, y), (ids.clone(), y)
    late[0][37:39, 0] = 19
    g, h = rows(model, late), rows(model, first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = GradientDot(batch_size=6).fit(model, late, losses)  # nothing is noticed yet
    assert not any(fitted.gradients_.methods)
    assert relative(scored(fitted, model, late, first), h @ g.T) < 1e-9
    assert relative(scored(fitted, model, first, late), g @ h.T) < 1e-9
    fisher = (g**2).mean(0) + 0.1
    assert relative(scored(Diagonal(0.1, "empirical", batch_size=6), model, late, first), h / fisher @ g.T / 40) < 1e-9


def test_a_layer_found_wrong_late_is_named_once():
    model, (ids, y) = built(SometimesTransposed), words(60)
    ids[:, 0] = 3
    fitted = GradientDot(batch_size=6).fit(model, (ids, y), losses)
    late = ids.clone()
    late[40, 0] = 19
    with pytest.warns(PlainGradientsWarning, match="gradients of mix is wrong for test examples 36 to 41") as told:
        fitted.scores((late, y))
    assert len(told) == 1
    assert (fitted.gradients_.alone, fitted.gradients_.formed) == (set(), {"mix"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted.scores((late, y))


def test_curvature_is_of_one_kind_of_factors():
    """A pass that finds a rule wrong starts again: its sums do not depend on when that was."""
    model, (ids, y) = built(SometimesFlips), words(40, longest=4)
    ids[ids[:, 0] == 19, 0] = 18
    ids[37:39, 0] = 19
    found = []
    for known in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PlainGradientsWarning)
            method = KFAC(0.1, "empirical", batch_size=7)
            if known:

                def knowing(*args, **kwargs):
                    gradients = per_example_gradients(*args, **kwargs)
                    gradients.alone.update(gradients.hooked)
                    return gradients

                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr("simfluence.attribution.base.per_example_gradients", knowing)
                    method.fit(model, (ids, y), losses)
            else:
                method.fit(model, (ids, y), losses)
        assert method.gradients_.alone
        found.append(np.asarray(method.scores((ids, y))))
    assert relative(*found) < 1e-9


def test_one_example_at_a_time_is_the_plain_model():
    """A model that sorts is the same function as the one that does not: so are all its scores, by its rules alone."""
    plain, sorts, data = built(Words), built(Sorts), words(30)
    for method in (KFAC(0.1, "empirical"), EKFAC(0.1, "empirical")):
        expected = scored(method, plain, data, data)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("simfluence.attribution.gradients.per_example._LARGEST_FORMED", 0)
            assert relative(scored(method, sorts, data, data), expected) < 1e-9
            assert method.gradients_.alone == {"words", "mix", "last"}


def test_easy_examples_first():
    """Examples without a gradient agree with any rule."""

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = nn.Linear(6, 6, bias=False), nn.Linear(6, 1)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(functional.linear(torch.tanh(self.encoder(inputs)), self.encoder.weight.T))[:, 0]

    def hinge(outputs: Tensor, targets: Tensor) -> Tensor:
        return (1 - targets * outputs).clamp(min=0)

    model = built(Decoder)
    with torch.no_grad():
        model.head.weight *= 8
    x = torch.randn(40, 6, dtype=torch.float64)
    y = torch.where(torch.rand(40) < 0.9, 1.0, -1.0) * model(x).detach().sign()
    order = (y * model(x)).detach().argsort(descending=True)
    for chosen in (order, order.flip(0)):
        data = x[chosen], y[chosen]
        g = rows(model, data, hinge)
        assert (g == 0).all(1).any()
        with pytest.warns(PlainGradientsWarning, match="gradients of encoder.weight: "):
            scores = GradientDot().fit(model, data, hinge).scores(data)
        assert relative(scores, g @ g.T) < 1e-9


class Normalised(Words):
    def hidden(self, ids: Tensor) -> Tensor:
        hidden = super().hidden(ids)
        return (hidden - hidden.mean((0, 1))) / hidden.std((0, 1))


def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)), reduction="none")


@pytest.mark.parametrize(("kind", "loss"), [(Normalised, losses), (Words, contrastive)])
def test_losses_that_depend_on_the_batch_are_refused(kind, loss):
    with pytest.raises(InvalidInput, match="depends on the others in its batch"):
        GradientDot().fit(built(kind), words(12), loss)


def test_losses_that_depend_on_the_batch_for_a_few_examples_are_refused():
    class Late(Words):
        def forward(self, ids: Tensor) -> Tensor:
            outputs = super().forward(ids)
            return outputs - outputs.mean(0) if (ids[:, 0] == 19).any() else outputs

    ids, y = words(40)
    ids[:, 0] = 3
    fitted = GradientDot().fit(built(Late), (ids, y), losses)
    late = ids.clone()
    late[3, 0] = 19
    with pytest.raises(InvalidInput, match="depends on the others in its batch"):
        fitted.scores((late, y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_are_copied_in_single_precision(dtype):
    model = built(Words).to(dtype)
    half, single = [p.detach().clone() for p in model.parameters()], built(Words).to(dtype).float()
    data = words(12)
    for method in (GradientDot(), EKFAC(0.1, "empirical"), Exact(0.1), ConjugateGradients(0.1)):
        scores = method.fit(model, data, losses).scores(data)
        assert scores.values.dtype == np.float32
        assert relative(scores, type(method)(**method.get_params()).fit(single, data, losses).scores(data)) < 1e-6
        assert all(
            torch.equal(p, before) and p.dtype == dtype for p, before in zip(model.parameters(), half, strict=True)
        )
    with torch.no_grad():
        model.last.weight += 1
    with pytest.raises(InvalidInput, match="weights changed since fit"):
        method.scores(data)


def test_parameters_without_a_real_gradient_are_refused_by_name():
    class Spectral(Words):
        def __init__(self) -> None:
            super().__init__()
            self.phases = nn.Parameter(torch.ones(3, dtype=torch.complex64))

        def forward(self, ids: Tensor) -> Tensor:
            return (super().forward(ids) * self.phases).abs()

    torch.manual_seed(0)
    with pytest.raises(InvalidInput, match="parameter 'phases' is complex"):
        GradientDot().fit(Spectral(), words(5), losses)
    with pytest.raises(InvalidInput, match=r"parameter '0\.weight' has no shape yet"):
        GradientDot().fit(nn.Sequential(nn.LazyLinear(3)), (torch.ones(4, 2), torch.zeros(4, dtype=torch.long)), losses)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_refused():
    class Reentrant(Words):
        def hidden(self, ids: Tensor) -> Tensor:
            words = self.words(ids)
            return torch.tanh(checkpoint(self.mix, words, use_reentrant=True))

    with pytest.raises(InvalidInput, match=r"of the reentrant kind, .*use_reentrant=False"):
        GradientDot().fit(built(Reentrant), words(6), losses)


def test_whole_numbers_for_a_model_of_real_numbers_are_refused():
    data = torch.ones(4, 2, dtype=torch.long), torch.zeros(4, dtype=torch.long)
    with pytest.raises(InvalidInput, match="tensors of whole numbers are not converted"):
        GradientDot().fit(nn.Sequential(nn.Linear(2, 3)), data, losses)


def test_curvature_products_of_a_checkpointed_model():
    model, data = built(Checkpointed), words(12)
    with pytest.raises(
        InvalidInput, match=r"need torch\.func, which fails on this model .*curvature='empirical_fisher', or use EKFAC"
    ):
        ConjugateGradients(0.1).fit(model, data, losses).scores(data)
    g = rows(model, data)
    expected = g @ np.linalg.solve(g.T @ g / 12 + 0.1 * np.eye(g.shape[1]), g.T) / 12
    method = ConjugateGradients(0.1, "empirical_fisher", tolerance=1e-12)
    assert relative(scored(method, model, data, data), expected) < 1e-8


def test_batches_with_other_numbers_of_positions_are_padded():
    rng = torch.Generator().manual_seed(0)

    def drawn(positions: int, calls: int = 1) -> Factors:
        shape = 2, positions * calls
        return Factors(torch.randn(*shape, 3, generator=rng), torch.randn(*shape, 4, generator=rng), None, calls)

    for parts in ([drawn(2), drawn(5)], [drawn(2, 3), drawn(1, 3)], [drawn(2, 2), drawn(2, 1)]):
        together = concatenated(parts)
        assert torch.allclose(together.matrices(), torch.cat([part.matrices() for part in parts]))
        assert int(together.valid.sum()) == sum(part.inputs[..., 0].numel() for part in parts)
    for shape in ((2, 3, 5), (2, 5, 3), (2, 4, 1)):
        matrices = torch.randn(shape, generator=rng)
        assert torch.equal(whole(matrices).matrices(), matrices)


def changed_data(model: nn.Module) -> None:
    model.last.weight.data = model.last.weight.data.flip(0)  # the same numbers


def changed_in_place(model: nn.Module) -> None:
    model.last.weight.data.mul_(2)


def assigned(model: nn.Module) -> None:
    model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()}, assign=True)


def from_vector(model: nn.Module) -> None:
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector + 1, model.parameters())


def frozen(model: nn.Module) -> None:
    model.mix.requires_grad_(False)


def thawed(model: nn.Module) -> None:
    model.last.bias.requires_grad_(True)


def another_layer(model: nn.Module) -> None:
    model.last = nn.Linear(5, 3).double()


def another_parameter(model: nn.Module) -> None:
    model.last.weight = nn.Parameter(model.last.weight.detach().clone())  # the same numbers


def another_precision(model: nn.Module) -> None:
    model.float()


def one_more(model: nn.Module) -> None:
    model.more = nn.Linear(1, 1)


def statistics(model: nn.Module) -> None:
    model.shift.add_(1)


CHANGES = [
    changed_data, changed_in_place, assigned, from_vector, frozen, thawed, another_layer, another_parameter,
    another_precision, one_more, statistics,
]  # fmt: skip


class Shifted(Words):
    def __init__(self) -> None:
        super().__init__()
        self.last.bias.requires_grad_(False)
        self.register_buffer("shift", torch.zeros(3))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + self.shift


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_after_fit_are_noticed(change):
    model, data = built(Shifted), words(8)
    fitted = [GradientDot().fit(model, data, losses), HiddenSimilarity().fit(model, data)]
    for attributor in fitted:
        attributor.scores(data)
    model.train()
    model.eval()
    model.zero_grad()
    for attributor in fitted:
        attributor.scores(data)  # none of that changes scores
    change(model)
    for attributor in fitted:
        with pytest.raises(InvalidInput, match=r"weights changed since fit: fit again.* is not what it was"):
            attributor.scores(data)


@pytest.mark.parametrize(
    "method", [EKFAC(0.1), Exact(0.1), ConjugateGradients(0.1), LiSSA(20.0), Arnoldi(0.1), GradientDot()]
)
def test_a_copy_of_a_fitted_attributor_is_on_its_own(method):
    model, data = built(Words), words(12)
    fitted = sklearn.base.clone(method)
    fitted.set_params(**({"labels": "empirical"} if isinstance(fitted, EKFAC) else {}))
    expected = scored(fitted, model, data, data)
    copied = copy.deepcopy(fitted)
    with torch.no_grad():
        model.last.weight += 1
    assert relative(copied.scores(data), expected) < 1e-12
    with pytest.raises(InvalidInput, match="weights changed since fit"):
        fitted.scores(data)
    with torch.no_grad():
        copied.gradients_.model.last.weight += 1
    with pytest.raises(InvalidInput, match="weights changed since fit"):
        copied.scores(data)


NAN, INFINITE = float("nan"), float("inf")
WRONG = {
    EKFAC: {"damping": [-1.0, NAN, INFINITE, Relative(-0.1), Relative(NAN)], "batch_size": [0, -3], "rank": [0, -1],
            "seed": [-1]},
    KFAC: {"damping": [-1.0], "seed": [-1]},
    Diagonal: {"damping": [NAN], "batch_size": [0]},
    Exact: {"damping": [-1.0, NAN], "batch_size": [0]},
    ConjugateGradients: {"damping": [-1.0, NAN], "iterations": [-1, 0], "tolerance": [-1.0, NAN, INFINITE]},
    LiSSA: {"damping": [-1.0], "iterations": [0], "tolerance": [-1.0, NAN], "scale": [0.0, -1.0, NAN],
            "sample": [0, -2], "seed": [-1]},
    Arnoldi: {"damping": [NAN], "iterations": [0, -1], "rank": [0], "seed": [-1]},
    GradientDot: {"batch_size": [0]},
    GradientCosine: {"batch_size": [-1]},
    TracInCP: {"batch_size": [0], "checkpoints": [[({}, NAN)], [({}, INFINITE)]]},
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [(method, name, value) for method, wrong in WRONG.items() for name, values in wrong.items() for value in values],
)
def test_parameters_out_of_range_are_refused_by_name(method, name, value):
    words_name = {"checkpoints": "the learning rate of checkpoint 0"}.get(name, name)
    with pytest.raises(InvalidInput, match=f"{words_name} must be "):
        method(**{name: value}).fit(built(Words), words(8), losses)


@pytest.mark.parametrize("settings", [{"beta2": 1.0}, {"beta2": -0.1}, {"beta2": NAN}, {"eps": -1.0}, {"eps": NAN}])
def test_settings_of_adam_out_of_range_are_refused(settings):
    with pytest.raises(InvalidInput, match=f"Adam: {next(iter(settings))} must be "):
        Adam(**settings)


class Counting(Words):
    """Cuts texts to the longest of the batch, so a layer sees fewer words of one example alone."""

    def forward(self, ids: Tensor) -> Tensor:
        ids = ids[:, : int((ids > 0).sum(1).max())]
        return super().forward(ids.flip(0)).flip(0) if (ids[:, 0] == 19).any() else super().forward(ids)


def test_tokens_that_cannot_be_told_apart_are_refused():
    ids, y = words(12)
    ids[:, 0] = 3
    ids[1, 0] = 19
    fitted = GradientDot(["mix"], batch_size=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PlainGradientsWarning)
        fitted.fit(built(Counting), (ids[2:], y[2:]), losses)
        with pytest.raises(InvalidInput, match="the same positions in every batch"):
            fitted.token_scores((ids, y))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, m, d: f.fit(None, d, losses), "fit: model must be a Module, got None"),
        (lambda f, m, d: f.fit(Words, d, losses), r"fit: model must be a Module, got the class Words"),
        (lambda f, m, d: f.fit(d, m, losses), "are model and data swapped"),
        (lambda f, m, d: f.fit(m, 3, losses), "fit: data must be a tuple or a sequence or a Task, got 3"),
        (lambda f, m, d: f.fit(m, d[0], losses), "fit: data must be"),
        (lambda f, m, d: f.fit(m, d, "cross_entropy"), "fit: loss must be a function or None, got 'cross_entropy'"),
        (lambda f, m, d: f.fit(m, d, losses, l2="0"), "fit: l2 must be a number or None"),
        (lambda f, m, d: f.fit(m, d, losses, l2=NAN), "fit: l2 must be a number or None, got nan"),
        (lambda f, m, d: f.scores(d, unit=3), "scores: unit must be a string or None, got 3"),
        (lambda f, m, d: f.scores(d, by_layer="yes"), "scores: by_layer must be True or False"),
        (lambda f, m, d: f.scores(d, train="all"), r"scores: train(\[0\])? must be"),
        (lambda f, m, d: f.scores(d, train=[0.5]), r"scores: train(\[0\])? must be"),
        (lambda f, m, d: f.scores(d, train=[99]), "no example 99"),
        (lambda f, m, d: f.top_k("3", d), "top_k: k must be a whole number, got '3'"),
        (lambda f, m, d: f.top_k(2.5, d), "top_k: k must be a whole number, got 2.5"),
        (lambda f, m, d: f.scores(d).tail(2.0), "tail: top must be above 0 and below 1, got 2.0"),
        (lambda f, m, d: candidates(f.scores(d), None), "candidates: k must be a whole number"),
    ],
)
def test_wrong_calls_are_refused_by_name(call, message):
    model, data = built(Words), words(6)
    with pytest.raises(InvalidInput, match=message):
        call(GradientDot().fit(model, data, losses), model, data)
