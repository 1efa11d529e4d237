"""Factors, eigenvalues and scores against a plain loop over examples and positions, and against dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attribution_cases import CASES, Case, Images, kronecker_case, mlp, padded, regression, relative, take, texts
from torch import Tensor, nn

from simfluence import attribution
from simfluence.attribution import EKFAC, KFAC, Diagonal, Relative, per_example_gradients
from simfluence.attribution import exact as reference
from simfluence.attribution.curvature import kronecker as curvature
from simfluence.attribution.curvature.kronecker import TrainingPasses, kfac, kronecker_factors
from simfluence.attribution.gradients import inner_products
from simfluence.attribution.gradients.labels import relabelling
from simfluence.errors import InvalidInput
from simfluence.tasks.losses import squared_error


def matrices(gradients, row: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """One example's gradient, by layer."""
    return {name: layer.from_parameters(row).numpy() for name, layer in gradients.layers.items()}


def slow_scores(fitted, case: Case, damping: float) -> np.ndarray:
    """``Σ_layers ⟨Q_S ((Q_Sᵀ g_z Q_A) / (Λ + λ)) Q_Aᵀ, g_i⟩ / N``, pair by pair."""
    train, test = ([matrices(fitted.gradients_, row) for row in case.gradients(d)] for d in (case.train, case.test))
    scores = np.zeros((len(test), len(train)))
    for z, mine in enumerate(test):
        for name, block in fitted.blocks_.items():
            Q_S = np.eye(len(mine[name])) if block.gradients is None else block.gradients.numpy()
            Q_A = np.eye(mine[name].shape[1]) if block.inputs is None else block.inputs.numpy()
            solved = Q_S @ ((Q_S.T @ mine[name] @ Q_A) / (block.eigenvalues.numpy() + damping)) @ Q_A.T
            scores[z] += [(solved * theirs[name]).sum() / len(train) for theirs in train]
    return scores


@pytest.mark.parametrize("method", [EKFAC, KFAC, Diagonal])
@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_a_loop_over_pairs(name, method):
    case = CASES[name]()
    fitted = method(damping=0.01, labels="empirical", batch_size=4).fit(case.model, case.train, case.loss)
    assert relative(fitted.scores(case.test), slow_scores(fitted, case, 0.01)) < 1e-8


@pytest.mark.parametrize("name", CASES)
def test_eigenvalues_are_second_moments_of_whole_gradients(name):
    case = CASES[name]()
    fitted = EKFAC(labels="empirical", batch_size=4).fit(case.model, case.train, case.loss)
    rows = [matrices(fitted.gradients_, row) for row in case.gradients(case.train)]
    for layer, block in fitted.blocks_.items():
        Q_S, Q_A = block.gradients.numpy(), block.inputs.numpy()
        expected = np.mean([(Q_S.T @ row[layer] @ Q_A) ** 2 for row in rows], axis=0)
        assert relative(block.eigenvalues, expected) < 1e-10
        assert relative(Q_S.T @ Q_S, np.eye(len(Q_S))) < 1e-10


class Recorder:
    """What modules see of one example, kept by plain hooks."""

    def __init__(self, model: nn.Module, modules: list[nn.Module]) -> None:
        self.calls: list[tuple[nn.Module, Tensor, Tensor]] = []
        self.handles = [module.register_forward_hook(self.keep) for module in modules]

    def keep(self, module, args, output):
        output.retain_grad()
        self.calls.append((module, args[0].detach(), output))
        return output * 1.0


def slow_factors(case: Case, modules: list[nn.Module], columns) -> tuple[np.ndarray, np.ndarray]:
    """A and S of a layer by a loop over examples, calls and positions; ``columns`` lists (a, s) of a call."""
    A, S, positions = 0, 0, 0
    for index in range(len(case.train[1])):
        recorder = Recorder(case.model, modules)
        inputs = take(case.train[0], index)
        outputs = case.model(**inputs) if isinstance(inputs, dict) else case.model(inputs)
        case.loss(outputs, case.train[1][index : index + 1]).sum().backward()
        for _, given, output in recorder.calls:
            for a, s in columns(given[0].numpy(), output.grad[0].numpy(), inputs):
                S = S + np.outer(s, s)
                if a is not None:
                    A, positions = A + np.outer(a, a), positions + 1
        for handle in recorder.handles:
            handle.remove()
    return A / positions, S / len(case.train[1])


def one(values: np.ndarray) -> np.ndarray:
    return np.append(values, 1.0)


def assert_factors(case: Case, layer: str, modules: list[nn.Module], columns) -> None:
    gradients = per_example_gradients(case.model, case.loss, case.train)
    found = kronecker_factors(TrainingPasses(gradients, case.train, batch_size=4))[layer]
    A, S = slow_factors(case, modules, columns)
    assert relative(found.inputs, A) < 1e-10
    assert relative(found.gradients, S) < 1e-10


def test_factors_of_a_linear_layer_with_bias():
    case = mlp()
    assert_factors(case, "2", [case.model[2]], lambda x, d, _: [(one(x), d)])


def test_factors_of_a_layer_used_several_times():
    case = CASES["tied"]()
    assert_factors(case, "again", [case.model.again, case.model.twin], lambda x, d, _: [(one(x), d)])


def test_factors_of_a_sequence_leave_out_padding():
    case = texts()

    def columns(x, d, inputs):
        kept = inputs["attention_mask"][0].tolist()
        return [(one(x[p]) if kept[p] else None, d[p]) for p in range(len(x))]

    assert_factors(case, "mix", [case.model.mix], columns)


def test_factors_of_convolutions():
    case = CASES["images"]()
    assert isinstance(case.model, Images)

    def first(x, d, _):  # kernel 3, stride 2, padding 1
        x = np.pad(x, ((0, 0), (1, 1), (1, 1)))
        places = [(r, c) for r in range(d.shape[1]) for c in range(d.shape[2])]
        return [(one(x[:, 2 * r : 2 * r + 3, 2 * c : 2 * c + 3].ravel()), d[:, r, c]) for r, c in places]

    def second(x, d, _):  # kernel 1 × 2, no bias
        places = [(r, c) for r in range(d.shape[1]) for c in range(d.shape[2])]
        return [(x[:, r : r + 1, c : c + 2].ravel(), d[:, r, c]) for r, c in places]

    def third(x, d, _):  # one dimension, kernel 2, dilation 2, padding 1
        x = np.pad(x, ((0, 0), (1, 1)))
        return [(one(x[:, p : p + 3 : 2].ravel()), d[:, p]) for p in range(d.shape[1])]

    for name, columns in (("first", first), ("second", second), ("third", third)):
        assert_factors(case, name, [getattr(case.model, name)], columns)


def test_eigenvectors_diagonalise_the_factors():
    case = regression()
    gradients = per_example_gradients(case.model, case.loss, case.train)
    factors = kronecker_factors(TrainingPasses(gradients, case.train, batch_size=4))
    for name, block in kfac(factors).items():
        S, A = factors[name].gradients, factors[name].inputs
        dense = torch.kron(S, A)
        basis = torch.kron(block.gradients, block.inputs)
        assert relative(basis @ torch.diag(block.eigenvalues.flatten()) @ basis.T, dense) < 1e-10


@pytest.mark.parametrize("method", [EKFAC, KFAC])
def test_an_exactly_kronecker_block_is_the_dense_matrix(method):
    case = kronecker_case()
    fitted = method(damping=0.3, labels="empirical", batch_size=7).fit(case.model, case.train, case.loss)
    gradients = [reference.gradients(case.model, data, case.loss) for data in (case.test, case.train)]
    dense = reference.empirical_fisher(case.model, case.train, case.loss)
    assert relative(fitted.scores(case.test), reference.influence(dense, *gradients, damping=0.3)) < 1e-8
    small = method(damping=1e-6, labels="empirical").fit(case.model, case.train, case.loss).scores(case.test)
    assert relative(small, reference.influence(dense, *gradients, damping=1e-6)) < 1e-8


def test_blocks_of_vectors_are_dense():
    case = texts()
    gradients = [per_example_gradients(case.model, case.loss, case.train, layers=["norm.*"])]
    fitted = EKFAC(damping=0.1, labels="empirical", layers=["norm.weight"]).fit(case.model, case.train, case.loss)
    rows = torch.stack([row["norm.weight"] for row in case.gradients(case.train)])
    tests = torch.stack([row["norm.weight"] for row in case.gradients(case.test)])
    expected = reference.influence(rows.T @ rows / len(rows), tests, rows, damping=0.1)
    assert relative(fitted.scores(case.test), expected) < 1e-8
    assert list(gradients[0].layers) == ["norm.weight", "norm.bias"]


@pytest.mark.parametrize("case", [mlp(), regression()], ids=["mlp", "regression"])
def test_sampled_labels_give_the_sampled_fisher(case):
    fitted = Diagonal(labels="sampled", seed=3, batch_size=4).fit(case.model, case.train, case.loss)
    dense = reference.sampled_fisher(case.model, case.train, case.loss, seed=3).diagonal()
    by_parameter = {}
    for name, layer in fitted.gradients_.layers.items():
        by_parameter |= layer.to_parameters(fitted.blocks_[name].eigenvalues)
    found = torch.cat([by_parameter[name].flatten() for name, _ in case.model.named_parameters()])
    assert relative(found, dense) < 1e-10
    other = Diagonal(labels="sampled", seed=4).fit(case.model, case.train, case.loss).blocks_["0"].eigenvalues
    assert relative(other, fitted.blocks_["0"].eigenvalues) > 0.01


def test_labels_of_other_losses_are_drawn_by_a_function():
    case = CASES["language"]()
    with pytest.raises(InvalidInput, match="no rule to draw labels for the loss 'token_losses'"):
        EKFAC().fit(case.model, case.train, case.loss)
    scores = [
        EKFAC(labels=attribution.draw_classes, batch_size=size).fit(case.model, case.train, case.loss).scores(case.test)
        for size in (2, 9)
    ]
    assert relative(scores[0], scores[1]) < 1e-8


def test_drawn_classes_follow_the_softmax_and_leave_ignored_targets():
    logits = torch.log(torch.tensor([0.1, 0.6, 0.3])).expand(4000, 2, 3)
    uniforms = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0))
    targets = torch.zeros(4000, 2, dtype=torch.int64)
    targets[:, 1] = -100
    drawn = attribution.draw_classes(logits, targets, uniforms)
    assert (drawn[:, 1] == -100).all()
    shares = torch.bincount(drawn[:, 0]) / 4000
    assert (shares - torch.tensor([0.1, 0.6, 0.3])).abs().max() < 0.02
    assert torch.equal(attribution.draw_classes(logits.mT, targets, uniforms), drawn)  # torch's own order of axes


def test_every_example_has_draws_of_its_own():
    relabel = relabelling("sampled", squared_error, seed=2)
    outputs, targets = torch.zeros(40, 2), torch.zeros(40, 2)
    drawn = relabel(outputs, targets, range(40))
    assert len(drawn.unique()) == 80
    assert torch.equal(relabel(outputs[:10], targets[:10], range(30, 40)), drawn[30:])


def test_padding_does_not_count():
    case = texts()
    more = padded(case.train[0], 4), case.train[1]
    more_test = padded(case.test[0], 2), case.test[1]
    for method in (EKFAC, KFAC):
        fit = method(labels="empirical").fit
        expected = fit(case.model, case.train, case.loss).scores(case.test)
        assert relative(fit(case.model, more, case.loss).scores(more_test), expected) < 1e-8
        unmasked = fit(case.model, more, case.loss, mask=lambda inputs: None).scores(more_test)
        assert relative(unmasked, expected) > 1e-3


def test_order_does_not_count():
    case = mlp()
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    shuffled = case.train[0][order], case.train[1][order]
    expected = np.asarray(EKFAC(labels="empirical").fit(case.model, case.train, case.loss).scores(case.test))
    found = EKFAC(labels="empirical").fit(case.model, shuffled, case.loss).scores(case.test)
    assert relative(found, expected[:, order.numpy()]) < 1e-8


def test_relative_damping_is_by_the_mean_eigenvalue_of_each_block():
    case = mlp()
    fitted = EKFAC(Relative(0.5), labels="empirical").fit(case.model, case.train, case.loss)
    means = {name: float(block.eigenvalues.mean()) for name, block in fitted.blocks_.items()}
    by_layer = np.asarray(fitted.scores(case.test, by_layer=True))
    for index, (name, mean) in enumerate(means.items()):
        absolute = EKFAC(0.5 * mean, labels="empirical", layers=[name]).fit(case.model, case.train, case.loss)
        assert relative(absolute.scores(case.test), by_layer[index]) < 1e-10


def test_the_penalty_adds_to_the_damping():
    case = mlp()
    expected = EKFAC(0.5, labels="empirical").fit(case.model, case.train, case.loss).scores(case.test)
    found = EKFAC(0.3, labels="empirical").fit(case.model, case.train, case.loss, l2=0.2).scores(case.test)
    assert relative(found, expected) < 1e-12


def test_a_singular_block_needs_damping():
    case = mlp()
    X = case.train[0].clone()
    X[:, 2] = 0
    for method in (EKFAC, KFAC, Diagonal):
        with pytest.raises(InvalidInput, match=r"layer '0' is singular .* damping adds 0. Pass a larger damping"):
            method(damping=0.0, labels="empirical").fit(case.model, (X, case.train[1]), case.loss)
    with pytest.raises(InvalidInput, match="damping must be a number from 0 up"):
        EKFAC(damping=-1.0).fit(case.model, case.train, case.loss)
    with pytest.raises(InvalidInput, match="damping must be a number from 0 up"):
        EKFAC(damping=Relative(float("nan"))).fit(case.model, case.train, case.loss)


def test_a_layer_that_is_too_wide_is_named(monkeypatch):
    monkeypatch.setattr(curvature, "LONGEST_SIDE", 4)
    case = mlp()
    with pytest.raises(InvalidInput, match="layer '0' is 5 × 5: a factor of 5² numbers is too large"):
        EKFAC().fit(case.model, case.train, case.loss)


def test_pieces_of_formed_gradients_do_not_change_results(monkeypatch):
    case = CASES["language"]()
    expected = EKFAC(labels="empirical").fit(case.model, case.train, case.loss).scores(case.test)
    monkeypatch.setattr(curvature, "FORMED", 50)
    monkeypatch.setattr(inner_products, "FORMED", 50)
    monkeypatch.setattr(inner_products, "BLOCK", 50)
    monkeypatch.setattr(attribution.base, "QUERIES", 100)
    found = EKFAC(labels="empirical").fit(case.model, case.train, case.loss).scores(case.test)
    assert relative(found, expected) < 1e-10
    simple = mlp()
    found = EKFAC(labels="empirical").fit(simple.model, simple.train, simple.loss)
    assert relative(found.scores(simple.test), slow_scores_of(found, simple)) < 1e-8


def slow_scores_of(fitted, case: Case) -> np.ndarray:
    train, test = ([matrices(fitted.gradients_, row) for row in case.gradients(d)] for d in (case.train, case.test))
    found = np.zeros((len(test), len(train)))
    for name, block in fitted.blocks_.items():
        scale = block.eigenvalues + 0.1 * block.eigenvalues.mean()
        for z, mine in enumerate(test):
            solved = block.gradients @ ((block.gradients.T @ torch.tensor(mine[name]) @ block.inputs) / scale)
            solved = (solved @ block.inputs.T).numpy()
            found[z] += [(solved * theirs[name]).sum() / len(train) for theirs in train]
    return found


@pytest.mark.parametrize("held", [1, 2, 3])
def test_test_examples_share_passes_as_memory_allows(monkeypatch, held):
    """Three test examples, of which so many are kept at a time."""
    case = CASES["language"]()
    found = EKFAC(0.1, labels="empirical", batch_size=1).fit(case.model, case.train, case.loss)
    expected, passes = found.scores(case.test), []
    batches = found.gradients_.batches

    def counted(data, **arguments):
        passes.append(arguments["side"])
        return batches(data, **arguments)

    monkeypatch.setattr(type(found.gradients_), "batches", lambda self, *a, **k: counted(*a, **k))
    monkeypatch.setattr(attribution.base, "QUERIES", held * found.gradients_.size * 8)
    assert relative(found.scores(case.test), expected) < 1e-12
    assert passes.count("training") == -(-3 // held)


@pytest.mark.parametrize("method", [EKFAC, KFAC, Diagonal])
@pytest.mark.parametrize("name", CASES)
def test_full_rank_is_exact(name, method):
    case = CASES[name]()
    exact = method(0.01, labels="empirical").fit(case.model, case.train, case.loss)
    full = method(0.01, labels="empirical", rank=100).fit(case.model, case.train, case.loss)
    assert relative(full.scores(case.test), exact.scores(case.test)) < 1e-8


def test_lower_rank_is_worse_and_within_its_bound():
    case = mlp()
    exact = EKFAC(0.01, labels="empirical").fit(case.model, case.train, case.loss)
    queries = exact._solve(exact._prepared(exact.gradients_.factors(case.test)))
    norms = {name: each.matrices().norm(dim=(1, 2)) for name, each in exact.gradients_.factors(case.train).items()}
    wanted, errors = np.asarray(exact.scores(case.test, unit="raw")), []
    for rank in (1, 2, 3, 4):
        lower = EKFAC(0.01, labels="empirical", rank=rank, batch_size=2).fit(case.model, case.train, case.loss)
        scores = lower.scores(case.test, unit="raw")
        wrong = np.abs(scores - wanted)
        bound = sum(
            torch.outer(torch.linalg.svdvals(inner_products.matrices(query))[:, rank:].norm(dim=1), norms[name])
            for name, query in queries.items()
        )
        assert (wrong <= 1.01 * bound.numpy() + 1e-10).all()
        errors.append(relative(scores, wanted))
    assert errors[0] > errors[1] > errors[2] > errors[3] > 0
    assert errors[3] < 0.1 * errors[0]


def test_rank_takes_less_memory_and_leaves_the_random_state_alone():
    matrices = torch.randn(4, 30, 20, dtype=torch.float64)
    before = torch.get_rng_state()
    found = inner_products.low_rank(matrices, 2, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert inner_products.numbers([found]) == 4 * 2 * (30 + 20)
    assert torch.equal(inner_products.low_rank(matrices, 2, seed=0).inputs, found.inputs)
    least = torch.linalg.svdvals(matrices)[:, 2:].norm(dim=1)
    assert ((found.matrices() - matrices).norm(dim=(1, 2)) <= 1.05 * least).all()


@pytest.mark.parametrize("rank", [0, -1, True])
def test_ranks_out_of_range_are_refused(rank):
    case = mlp()
    with pytest.raises(InvalidInput, match=r"EKFAC: rank must be (at least 1, got|a whole number or None, got True)"):
        EKFAC(rank=rank).fit(case.model, case.train, case.loss)


def test_single_precision_is_close():
    case = mlp()
    expected = EKFAC(0.05, labels="empirical").fit(case.model, case.train, case.loss).scores(case.test)
    single = EKFAC(0.05, labels="empirical").fit(case.model.float(), case.train, case.loss).scores(case.test)
    assert single.values.dtype == np.float32
    assert relative(single, expected) < 1e-4


@pytest.mark.parametrize("width", [1, 3, 7, 20])
def test_symmetric_products_by_blocks_are_whole(monkeypatch, width):
    monkeypatch.setattr(curvature, "_SQUARE", 3)
    rows = torch.randn(5, width, dtype=torch.float64)
    total = torch.zeros(width, width, dtype=torch.float64)
    curvature._add_squared(total, rows[:2])
    curvature._add_squared(total, rows[2:])
    assert relative(curvature._mirrored(total), rows.T @ rows) < 1e-12


@pytest.mark.parametrize(("rows", "columns"), [(2, 5), (5, 2), (4, 4), (6, 1), (1, 6)])
@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("numbers", [1, 20, 10_000])
def test_products_by_blocks_are_those_of_whole_gradients(monkeypatch, numbers, positions, rows, columns):
    monkeypatch.setattr(curvature, "CACHED", numbers)
    monkeypatch.setattr(inner_products, "BLOCK", numbers)
    monkeypatch.setattr(inner_products, "FORMED", numbers)
    query = torch.randn(3, rows, columns, dtype=torch.float64)
    factors = attribution.Factors(
        torch.randn(4, positions, columns, dtype=torch.float64), torch.randn(4, positions, rows, dtype=torch.float64)
    )
    expected = torch.einsum("zoi,npo,npi->zn", query, factors.gradients, factors.inputs)
    assert relative(inner_products.products(query, factors), expected) < 1e-12
    factored = attribution.Factors(query, torch.eye(rows, dtype=torch.float64).expand(3, -1, -1))
    assert relative(inner_products.products(factored, factors), expected) < 1e-12
    whole = torch.einsum("npo,npi->noi", factors.gradients, factors.inputs)
    assert relative(curvature.squares(factors), whole.square().sum(0)) < 1e-12
