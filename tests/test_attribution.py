"""The contract: every attributor goes through the same round trip."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import sklearn.base
import sklearn.exceptions
import torch
from attribution_cases import Case, language, mlp, relative, texts
from torch import nn

import simfluence as sf
from simfluence import attribution
from simfluence.attribution import Scores
from simfluence.errors import InvalidInput, NotFittedError, PlainGradientsWarning

ATTRIBUTORS = {
    "EKFAC": attribution.EKFAC(damping=0.1, labels="empirical"),
    "EKFAC-relative": attribution.EKFAC(labels="empirical"),
    "EKFAC-rank": attribution.EKFAC(damping=0.1, labels="empirical", rank=20),
    "KFAC": attribution.KFAC(damping=0.1, labels="empirical"),
    "Diagonal": attribution.Diagonal(damping=0.1, labels="empirical"),
    "Exact": attribution.Exact(damping=0.1),
    "ConjugateGradients": attribution.ConjugateGradients(damping=0.1, tolerance=1e-12),
    "LiSSA": attribution.LiSSA(damping=20.0, tolerance=1e-12),
    "Arnoldi": attribution.Arnoldi(damping=0.1, iterations=1000),
    "GradientDot": attribution.GradientDot(),
    "GradientCosine": attribution.GradientCosine(),
    "TracInCP": attribution.TracInCP(),
}


@pytest.fixture(params=ATTRIBUTORS)
def attributor(request):
    """Unfitted; that of checkpoints gets those of the model at hand by ``fitted``."""
    return sklearn.base.clone(ATTRIBUTORS[request.param])


def fitted(attributor, case: Case, **parameters):
    if isinstance(attributor, attribution.TracInCP):
        attributor = sklearn.base.clone(attributor).set_params(checkpoints=[(case.model.state_dict(), 1.0)])
    return sklearn.base.clone(attributor).set_params(**parameters).fit(case.model, case.train, case.loss)


def test_every_attributor_is_in_the_contract():
    public = {getattr(attribution, name) for name in attribution.__all__}
    final = {each for each in public if isinstance(each, type) and issubclass(each, attribution.Attributor)}
    assert final - {attribution.Attributor} == {type(each) for each in ATTRIBUTORS.values()}


def test_scores_have_shape_unit_and_names(attributor):
    case = mlp()
    found = fitted(attributor, case)
    scores = found.scores(case.test)
    assert np.asarray(scores).shape == scores.shape == (5, 13)
    assert np.asarray(scores).dtype == np.float64
    assert np.asarray(scores, dtype=np.float32).dtype == np.float32
    assert np.isfinite(scores).all()
    assert scores.unit == found.units[0]
    assert scores.method == type(found).__name__
    frame = scores.to_frame()
    assert list(frame.columns) == ["test", "train", "score"]
    assert frame.score[13 * 2 + 4] == scores.values[2, 4]
    assert (frame.test[30], frame.train[30]) == (2, 4)


def test_training_on_a_copy_lowers_its_loss(attributor):
    """The sign: an example is a proponent of itself."""
    case = mlp()
    own = np.asarray(fitted(attributor, case).scores(case.train)).diagonal()
    assert (own > 0).all()


@pytest.mark.parametrize("make", [mlp, texts, language])
def test_batch_size_does_not_count(attributor, make):
    case = make()
    expected = fitted(attributor, case, batch_size=64)
    found = fitted(attributor, case, batch_size=3)
    assert relative(found.scores(case.test), expected.scores(case.test)) < 1e-8
    assert relative(found.self_influence(), expected.self_influence()) < 1e-8


def test_order_does_not_count(attributor):
    case = mlp()
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    shuffled = Case(case.model, case.loss, (case.train[0][order], case.train[1][order]), case.test)
    expected = np.asarray(fitted(attributor, case).scores(case.test))
    assert relative(fitted(attributor, shuffled).scores(case.test), expected[:, order.numpy()]) < 1e-8


def test_self_influence_is_the_diagonal(attributor):
    for case in (mlp(), texts()):
        found = fitted(attributor, case, batch_size=4)
        assert relative(found.self_influence(), np.asarray(found.scores(case.train)).diagonal()) < 1e-8


def test_layers_add_up(attributor):
    case = texts()
    found = fitted(attributor, case)
    scores = found.scores(case.test, by_layer=True)
    assert scores.shape == (5, 4, 10)
    assert scores.layers == ("words", "mix", "norm.weight", "norm.bias", "last")
    assert relative(scores.values.sum(0), found.scores(case.test)) < 1e-10
    assert list(scores.to_frame().columns) == ["layer", "test", "train", "score"]
    assert (np.abs(scores.values).max((1, 2)) > 0).all()


def test_tokens_add_up(attributor):
    case = texts()
    found = fitted(attributor, case, batch_size=4)
    tokens = found.token_scores(case.test)
    assert tokens.shape == (4, 10, 6)
    by_layer = np.asarray(found.scores(case.test, by_layer=True))
    assert relative(tokens.sum(2), by_layer[:2].sum(0)) < 1e-8  # words and mix
    padding = ~case.train[0]["attention_mask"].bool().numpy()
    assert (tokens[:, padding] == 0).all()
    assert (np.abs(tokens[:, ~padding]).max(0) > 0).all()
    with pytest.raises(InvalidInput, match="applied to the same positions, found none"):
        fitted(attributor, mlp()).token_scores(mlp().test)
    called_twice = language()
    found = fitted(attributor, called_twice)
    by_layer = np.asarray(found.scores(called_twice.test, by_layer=True))
    tokens = found.token_scores(called_twice.test)
    assert tokens.shape == (3, 9, 5)
    assert relative(tokens.sum(2), by_layer[:2].sum(0)) < 1e-8


def test_top_k(attributor):
    case = mlp()
    found = fitted(attributor, case, batch_size=4)
    scores, top = np.asarray(found.scores(case.test)), found.top_k(3, case.test)
    assert np.array_equal(top.indices, np.argsort(-scores, axis=1, kind="stable")[:, :3])
    assert relative(top.values, np.sort(scores, axis=1)[:, ::-1][:, :3]) < 1e-12
    for k in (0, 14):
        with pytest.raises(InvalidInput, match="k must be from 1 to the number of training examples, 13"):
            found.top_k(k, case.test)


def test_progress_counts_every_pair(monkeypatch):
    case, bars = mlp(), []

    @contextlib.contextmanager
    def bar(what, total, shown):
        bars.append([what, total, shown, 0])

        def advance(count):
            bars[-1][3] += count

        yield advance

    monkeypatch.setattr(attribution.base, "bar", bar)
    found = fitted(attribution.EKFAC(0.1), case, batch_size=4)
    found.scores(case.test)
    monkeypatch.setattr(attribution.base, "_SHOWN", 64)
    found.top_k(2, case.test)
    assert bars == [["EKFAC: pairs", 65, False, 65], ["EKFAC: pairs", 65, True, 65]]


def test_units(attributor):
    case = mlp()
    found = fitted(attributor, case)
    raw = found.scores(case.test, unit="raw")
    assert raw.unit == "raw"
    if "loss" in found.units:
        assert relative(raw, 13 * np.asarray(found.scores(case.test, unit="loss"))) < 1e-12
        assert relative(found.self_influence("raw"), 13 * found.self_influence()) < 1e-12
    else:
        with pytest.raises(InvalidInput, match="no unit 'loss'"):
            found.scores(case.test, unit="loss")


def test_scikit_learn_conventions(attributor):
    case = mlp()
    found = fitted(attributor, case)
    assert found.fit(case.model, case.train, case.loss) is found
    copy = sklearn.base.clone(found)
    assert str(copy.get_params()) == str(found.get_params())
    with pytest.raises(NotFittedError, match="call fit"):
        copy.scores(case.test)
    with pytest.raises(sklearn.exceptions.NotFittedError):
        copy.self_influence()
    assert all(name.endswith("_") for name in vars(found) if name not in found.get_params())


def test_a_task_brings_its_loss_its_test_side_and_its_ids(task):
    model = task.build_model(0).double()
    found = attribution.EKFAC(0.1).fit(model, task)
    scores = found.scores()
    assert scores.shape == (5, 12)
    assert list(scores.to_frame().train[:2]) == list(task.train.ids[:2])
    expected = attribution.EKFAC(0.1).fit(model, task.train_data, task.loss).scores(task.test_data)
    assert np.array_equal(scores, expected)


def test_the_penalty_of_a_task_counts():
    task = sf.tasks.breast_cancer(n_train=40, n_test=10)
    trained = attribution.exact.retrain(task.build_model(0), task.train_data, task.loss, task.l2)
    found = attribution.Exact(curvature="hessian").fit(trained, task).scores()
    test, train = (attribution.exact.gradients(trained, d, task.loss) for d in (task.test_data, task.train_data))
    H = attribution.exact.hessian(trained, task.train_data, task.loss)
    assert relative(found, attribution.exact.influence(H, test, train, task.l2)) < 1e-10


def test_the_design_page_runs():
    case = mlp()
    X, y = case.train
    found = sf.attribution.EKFAC(damping=1e-2, labels="empirical").fit(case.model, (X, y), loss=case.loss)
    assert isinstance(found.scores(case.test), Scores)


def test_changed_weights_are_noticed(attributor):
    case = mlp()
    found = fitted(attributor, case)
    with torch.no_grad():
        case.model[0].weight += 1
    if isinstance(attributor, attribution.TracInCP):
        found.scores(case.test)  # it has its own
    else:
        with pytest.raises(InvalidInput, match="weights changed since fit: fit again"):
            found.scores(case.test)


def test_layers_can_be_named(attributor):
    case = mlp()
    found = fitted(attributor, case, layers=["2"])
    assert list(found.gradients_.layers) == ["2"]
    frozen = mlp()
    frozen.model[0].requires_grad_(False)
    assert relative(found.scores(case.test), fitted(attributor, frozen).scores(case.test)) < 1e-8


class Own(nn.Module):
    """A model whose parameter no rule covers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4, dtype=torch.float64))

    def forward(self, inputs):
        return inputs @ self.weight.T


def test_a_model_of_ones_own(attributor):
    case = mlp()
    own = Case(Own(), case.loss, case.train, case.test)
    linear = nn.Linear(4, 3, bias=False).double()
    with torch.no_grad():
        linear.weight.fill_(1.0)
    with pytest.warns(PlainGradientsWarning, match="no rule gives the gradients of weight: taken by torch.func"):
        found = fitted(attributor, own)
    expected = fitted(attributor, Case(linear, case.loss, case.train, case.test))
    if type(attributor) in (attribution.EKFAC, attribution.KFAC):  # the block of a parameter alone is dense
        assert found.scores(case.test).shape == expected.scores(case.test).shape
    else:
        assert relative(found.scores(case.test), expected.scores(case.test)) < 1e-8


def test_bad_input(attributor):
    case = mlp()
    X, y = case.train
    found = fitted(attributor, case)
    with pytest.raises(InvalidInput, match="batch_size must be a whole number from 1 up"):
        fitted(attributor, case, batch_size=0)
    with pytest.raises(InvalidInput, match="a loss is needed"):
        sklearn.base.clone(found).fit(case.model, (X, y))
    with pytest.raises(InvalidInput, match="give one loss per example"):
        sklearn.base.clone(found).fit(case.model, (X, y), lambda f, y: case.loss(f, y).mean())
    with pytest.raises(InvalidInput, match="equally many"):
        sklearn.base.clone(found).fit(case.model, (X, y[:4]), case.loss)
    with pytest.raises(InvalidInput, match="l2 must be a number from 0 up"):
        sklearn.base.clone(found).fit(case.model, (X, y), case.loss, l2=-1.0)
    labels = y.clone()
    labels[9] = 7
    with pytest.raises(InvalidInput, match="labels are in the model's range"):
        sklearn.base.clone(found).fit(case.model, (X, labels), case.loss).scores(case.test)
    holed = X.clone()
    holed[9, 0] = torch.nan
    with pytest.raises(InvalidInput, match="training example 9"):
        sklearn.base.clone(found).fit(case.model, (holed, y), case.loss).scores(case.test)
    with pytest.raises(InvalidInput, match="fails on test examples 0 to 4"):
        found.scores((case.test[0][:, :3], case.test[1]))
    with pytest.raises(InvalidInput, match=r"give test_data=\(inputs, targets\)"):
        found.scores()
    broken = case.test[0].clone()
    broken[3, 1] = torch.nan
    with pytest.raises(InvalidInput, match="test example 3"):
        found.scores((broken, case.test[1]))
    with pytest.raises(InvalidInput, match="unit 'loses'"):
        found.scores(case.test, unit="loses")
    case.model.requires_grad_(False)
    with pytest.raises(InvalidInput, match="has no parameter that requires a gradient"):
        sklearn.base.clone(found).fit(case.model, (X, y), case.loss)
