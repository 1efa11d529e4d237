"""The contract: every attributor goes through the same round trip."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

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
    "ConjugateGradients": attribution.ConjugateGradients(damping=1.0, tolerance=1e-11),
    "LiSSA": attribution.LiSSA(damping=20.0, tolerance=1e-12),
    "Arnoldi": attribution.Arnoldi(damping=0.1, iterations=1000),
    "GradientDot": attribution.GradientDot(),
    "GradientCosine": attribution.GradientCosine(),
    "TracInCP": attribution.TracInCP(),
}


#: A batch size that splits the training and the test examples of every case, unevenly.
SMALL = 6


@pytest.fixture(params=ATTRIBUTORS)
def name(request) -> str:
    return request.param


def fitted(name: str, case: Case, **parameters) -> attribution.Attributor:
    """A fresh attributor; TracInCP gets the case's model as its only checkpoint."""
    attributor = sklearn.base.clone(ATTRIBUTORS[name])
    if isinstance(attributor, attribution.TracInCP):
        attributor.set_params(checkpoints=[(case.model.state_dict(), 1.0)])
    return attributor.set_params(**parameters).fit(case.model, case.train, case.loss)


@functools.cache
def shared(name: str, make: Callable[[], Case], batch_size: int = 64) -> tuple[Case, attribution.Attributor]:
    """A case and an attributor fitted on it, which no test may change."""
    case = make()
    return case, fitted(name, case, batch_size=batch_size)


@functools.cache
def train_scores(name: str, make: Callable[[], Case], batch_size: int = 64) -> np.ndarray:
    """The scores of the training examples as test examples."""
    case, attributor = shared(name, make, batch_size)
    return np.asarray(attributor.scores(case.train))


@functools.cache
def scores_of_test(name: str, make: Callable[[], Case]) -> Scores:
    case, attributor = shared(name, make)
    return attributor.scores(case.test)


@functools.cache
def self_influence(name: str, make: Callable[[], Case], batch_size: int = 64) -> np.ndarray:
    return shared(name, make, batch_size)[1].self_influence()


def test_every_attributor_is_in_the_contract():
    public = {getattr(attribution, name) for name in attribution.__all__}
    final = {each for each in public if isinstance(each, type) and issubclass(each, attribution.Attributor)}
    assert final - {attribution.Attributor} == {type(each) for each in ATTRIBUTORS.values()}


def test_scores_have_shape_unit_and_names(name):
    attributor, scores = shared(name, mlp)[1], scores_of_test(name, mlp)
    assert np.asarray(scores).shape == scores.shape == (5, 13)
    assert np.asarray(scores).dtype == np.float64
    assert np.asarray(scores, dtype=np.float32).dtype == np.float32
    assert np.isfinite(scores).all()
    assert scores.unit == attributor.units[0]
    assert scores.method == type(attributor).__name__
    frame = scores.to_frame()
    assert list(frame.columns) == ["test", "train", "score"]
    assert frame.score[13 * 2 + 4] == scores.values[2, 4]
    assert (frame.test[30], frame.train[30]) == (2, 4)


def test_training_on_a_copy_lowers_its_loss(name):
    """The sign: an example is a proponent of itself."""
    assert (train_scores(name, mlp).diagonal() > 0).all()


@pytest.mark.parametrize("make", [mlp, texts, language])
def test_batch_size_does_not_count(name, make):
    assert relative(train_scores(name, make, SMALL), train_scores(name, make)) < 1e-8
    assert relative(self_influence(name, make, SMALL), self_influence(name, make)) < 1e-8


def test_order_does_not_count(name):
    case = mlp()
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    shuffled = Case(case.model, case.loss, (case.train[0][order], case.train[1][order]), case.test)
    expected = np.asarray(scores_of_test(name, mlp))
    assert relative(fitted(name, shuffled).scores(case.test), expected[:, order.numpy()]) < 1e-8


@pytest.mark.parametrize("make", [mlp, texts])
def test_self_influence_is_the_diagonal(name, make):
    assert relative(self_influence(name, make, SMALL), train_scores(name, make, SMALL).diagonal()) < 1e-8


def test_layers_add_up(name):
    case, attributor = shared(name, texts)
    scores = attributor.scores(case.test, by_layer=True)
    assert scores.shape == (5, 4, 10)
    assert scores.layers == ("words", "mix", "norm.weight", "norm.bias", "last")
    assert relative(scores.values.sum(0), scores_of_test(name, texts)) < 1e-10
    assert list(scores.to_frame().columns) == ["layer", "test", "train", "score"]
    assert (np.abs(scores.values).max((1, 2)) > 0).all()


def test_tokens_add_up(name):
    case, attributor = shared(name, texts, SMALL)
    tokens = attributor.token_scores(case.test)
    assert tokens.shape == (4, 10, 6)
    by_layer = np.asarray(attributor.scores(case.test, by_layer=True))
    assert relative(tokens.sum(2), by_layer[:2].sum(0)) < 1e-8  # words and mix
    padding = ~case.train[0]["attention_mask"].bool().numpy()
    assert (tokens[:, padding] == 0).all()
    assert (np.abs(tokens[:, ~padding]).max(0) > 0).all()
    with pytest.raises(InvalidInput, match="applied to the same positions, got none"):
        shared(name, mlp)[1].token_scores(mlp().test)
    called_twice, attributor = shared(name, language)
    by_layer = np.asarray(attributor.scores(called_twice.test, by_layer=True))
    tokens = attributor.token_scores(called_twice.test)
    assert tokens.shape == (3, 9, 5)
    assert relative(tokens.sum(2), by_layer[:2].sum(0)) < 1e-8


def test_top_k(name):
    case, attributor = shared(name, mlp, SMALL)
    scores, top = np.asarray(attributor.scores(case.test)), attributor.top_k(3, case.test)
    assert np.array_equal(top.indices, np.argsort(-scores, axis=1, kind="stable")[:, :3])
    assert relative(top.values, np.sort(scores, axis=1)[:, ::-1][:, :3]) < 1e-12
    for k in (0, 14):
        with pytest.raises(InvalidInput, match="k must be from 1 to the number of training examples, 13"):
            attributor.top_k(k, case.test)


def test_progress_counts_every_pair(monkeypatch):
    case, bars = mlp(), []

    @contextlib.contextmanager
    def bar(what, total, shown):
        bars.append([what, total, shown, 0])

        def advance(count):
            bars[-1][3] += count

        yield advance

    monkeypatch.setattr(attribution.base, "bar", bar)
    ekfac = attribution.EKFAC(0.1, batch_size=4).fit(case.model, case.train, case.loss)
    ekfac.scores(case.test)
    monkeypatch.setattr(attribution.base, "_PROGRESS_BAR_PAIRS", 64)
    ekfac.top_k(2, case.test)
    assert bars == [["EKFAC: pairs", 65, False, 65], ["EKFAC: pairs", 65, True, 65]]


def test_units(name):
    case, attributor = shared(name, mlp)
    raw = attributor.scores(case.test, unit="raw")
    assert raw.unit == "raw"
    if "loss" in attributor.units:
        assert relative(raw, 13 * np.asarray(attributor.scores(case.test, unit="loss"))) < 1e-12
        assert relative(attributor.self_influence("raw"), 13 * self_influence(name, mlp)) < 1e-12
    else:
        with pytest.raises(InvalidInput, match="no unit 'loss'"):
            attributor.scores(case.test, unit="loss")


def test_scikit_learn_conventions(name):
    case, attributor = shared(name, mlp)
    copy = sklearn.base.clone(attributor)
    assert str(copy.get_params()) == str(attributor.get_params())
    with pytest.raises(NotFittedError, match="call fit"):
        copy.scores(case.test)
    with pytest.raises(sklearn.exceptions.NotFittedError):
        copy.self_influence()
    assert all(attribute.endswith("_") for attribute in vars(attributor) if attribute not in copy.get_params())
    copy.set_params(layers=["2"])
    assert copy.fit(case.model, case.train, case.loss) is copy


def test_a_task_brings_its_loss_its_test_side_and_its_ids(task):
    model = task.build_model(0).double()
    scores = attribution.EKFAC(0.1).fit(model, task).scores()
    assert scores.shape == (5, 12)
    assert list(scores.to_frame().train[:2]) == list(task.train.ids[:2])
    expected = attribution.EKFAC(0.1).fit(model, task.train_data, task.loss).scores(task.test_data)
    assert np.array_equal(scores, expected)


def test_the_penalty_of_a_task_counts():
    task = sf.tasks.breast_cancer(n_train=40, n_test=10)
    trained = attribution.exact.retrain(task.build_model(0), task.train_data, task.loss, task.l2)
    scores = attribution.Exact(curvature="hessian").fit(trained, task).scores()
    test, train = (attribution.exact.gradients(trained, d, task.loss) for d in (task.test_data, task.train_data))
    H = attribution.exact.hessian(trained, task.train_data, task.loss)
    assert relative(scores, attribution.exact.influence(H, test, train, task.l2)) < 1e-10


def test_the_design_page_runs():
    case = mlp()
    X, y = case.train
    ekfac = sf.attribution.EKFAC(damping=1e-2, labels="empirical").fit(case.model, (X, y), loss=case.loss)
    assert isinstance(ekfac.scores(case.test), Scores)


def test_layers_can_be_named(name):
    """And weights that change after ``fit`` are noticed, whether their layer is named or not."""
    case, frozen = mlp(), mlp()
    attributor = fitted(name, case, layers=["2"])
    assert list(attributor.gradients_.layers) == ["2"]
    frozen.model[0].requires_grad_(False)
    frozen_attributor = fitted(name, frozen)
    assert relative(attributor.scores(case.test), frozen_attributor.scores(case.test)) < 1e-8
    with torch.no_grad():
        case.model[0].weight += 1
        frozen.model[2].weight += 1
    for changed in (attributor, frozen_attributor):
        if name == "TracInCP":
            changed.scores(case.test)  # it has its own weights
        else:
            with pytest.raises(InvalidInput, match="weights changed since fit: fit again"):
                changed.scores(case.test)


class Own(nn.Module):
    """A model whose parameter no rule covers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4, dtype=torch.float64))

    def forward(self, inputs):
        return inputs @ self.weight.T


def test_a_model_of_ones_own(name):
    case = mlp()
    own = Case(Own(), case.loss, case.train, case.test)
    linear = nn.Linear(4, 3, bias=False).double()
    with torch.no_grad():
        linear.weight.fill_(1.0)
    with pytest.warns(PlainGradientsWarning, match="gradients of weight: they are computed by torch.func"):
        scores = fitted(name, own).scores(case.test)
    expected = fitted(name, Case(linear, case.loss, case.train, case.test)).scores(case.test)
    if isinstance(ATTRIBUTORS[name], attribution.EKFAC | attribution.KFAC):  # the block of a lone parameter is dense
        assert scores.shape == expected.shape
    else:
        assert relative(scores, expected) < 1e-8


def test_bad_input(name):
    case, attributor = shared(name, mlp)
    X, y = case.train
    with pytest.raises(InvalidInput, match="batch_size must be at least 1, got 0"):
        fitted(name, case, batch_size=0)
    with pytest.raises(InvalidInput, match="a loss is required"):
        sklearn.base.clone(attributor).fit(case.model, (X, y))
    with pytest.raises(InvalidInput, match="return one loss per example"):
        sklearn.base.clone(attributor).fit(case.model, (X, y), lambda f, y: case.loss(f, y).mean())
    with pytest.raises(InvalidInput, match="equally many"):
        sklearn.base.clone(attributor).fit(case.model, (X, y[:4]), case.loss)
    with pytest.raises(InvalidInput, match="l2 must be a number from 0 up"):
        sklearn.base.clone(attributor).fit(case.model, (X, y), case.loss, l2=-1.0)
    labels = y.clone()
    labels[9] = 7
    with pytest.raises(InvalidInput, match="labels are in the model's range"):
        sklearn.base.clone(attributor).fit(case.model, (X, labels), case.loss).scores(case.test)
    holed = X.clone()
    holed[9, 0] = torch.nan
    with pytest.raises(InvalidInput, match="training example 9"):
        sklearn.base.clone(attributor).fit(case.model, (holed, y), case.loss).scores(case.test)
    with pytest.raises(InvalidInput, match="fails on test examples 0 to 4"):
        attributor.scores((case.test[0][:, :3], case.test[1]))
    with pytest.raises(InvalidInput, match=r"pass test_data=\(inputs, targets\)"):
        attributor.scores()
    broken = case.test[0].clone()
    broken[3, 1] = torch.nan
    with pytest.raises(InvalidInput, match="test example 3"):
        attributor.scores((broken, case.test[1]))
    with pytest.raises(InvalidInput, match="unit 'loses'"):
        attributor.scores(case.test, unit="loses")
    frozen = mlp().model.requires_grad_(False)
    with pytest.raises(InvalidInput, match="has no parameter that requires a gradient"):
        sklearn.base.clone(attributor).fit(frozen, (X, y), case.loss)
