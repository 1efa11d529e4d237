"""Curvature in a file: read again, gone on with after a stop, refused where it is another's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attribution_cases import mlp, relative, texts

from simfluence.attribution import EKFAC, KFAC
from simfluence.attribution.curvature import cache as kept
from simfluence.attribution.gradients import hooks as gradients
from simfluence.errors import StoreError


def passes(monkeypatch) -> list[int]:
    """The number of examples of every pass over a batch, as they come."""
    seen: list[int] = []
    factors = gradients.Gradients.factors

    def counted(self, batch, *args, **kwargs):
        seen.append(len(batch[1]))
        return factors(self, batch, *args, **kwargs)

    monkeypatch.setattr(gradients.Gradients, "factors", counted)
    return seen


@pytest.mark.parametrize("method", [EKFAC, KFAC])
def test_a_finished_file_is_read_and_not_fitted_again(method, tmp_path, monkeypatch):
    case, path = texts(), tmp_path / "factors.safetensors"
    fitted = method(store=path, batch_size=4).fit(case.model, case.train, case.loss)
    expected = method(batch_size=4).fit(case.model, case.train, case.loss).scores(case.test)
    assert np.array_equal(fitted.scores(case.test), expected)
    seen = passes(monkeypatch)
    again = method(store=str(path), batch_size=4).fit(case.model, case.train, case.loss)
    assert seen == [1]  # a look at what is a sequence
    assert relative(again.scores(case.test), expected) < 1e-12


@pytest.mark.parametrize("batches", [2, 5])  # stopped in the first pass, and in the second
def test_fitting_goes_on_where_it_was_stopped(batches, tmp_path, monkeypatch):
    case, path = texts(), tmp_path / "factors.safetensors"
    expected = EKFAC(batch_size=4).fit(case.model, case.train, case.loss).scores(case.test)
    monkeypatch.setattr(kept, "EVERY", 0.0)
    save, saves = kept.CurvatureCache.save, []

    def stopping(self, *args, **kwargs):
        save(self, *args, **kwargs)
        saves.append(1)
        if len(saves) == batches:
            raise KeyboardInterrupt

    monkeypatch.setattr(kept.CurvatureCache, "save", stopping)
    with pytest.raises(KeyboardInterrupt):
        EKFAC(store=path, batch_size=4).fit(case.model, case.train, case.loss)
    seen = passes(monkeypatch)
    found = EKFAC(store=path, batch_size=4).fit(case.model, case.train, case.loss)
    assert len(seen) == 6 - batches + 1  # two passes of three batches, and a look at what is a sequence
    assert relative(found.scores(case.test), expected) < 1e-10


def test_a_file_of_something_else_is_refused(tmp_path):
    case, path = mlp(), tmp_path / "factors.safetensors"
    EKFAC(store=path, labels="empirical").fit(case.model, case.train, case.loss)
    for parameters in ({"labels": "sampled"}, {"seed": 1}, {"layers": ["0"]}):
        with pytest.raises(StoreError, match="of another model, training data, labels or layers"):
            EKFAC(store=path, **{"labels": "empirical"} | parameters).fit(case.model, case.train, case.loss)
    with pytest.raises(StoreError, match="of another model"):
        KFAC(store=path, labels="empirical").fit(case.model, case.train, case.loss)
    with torch.no_grad():
        case.model[0].bias += 1
    with pytest.raises(StoreError, match="of another model"):
        EKFAC(store=path, labels="empirical").fit(case.model, case.train, case.loss)


def test_a_damaged_file_is_refused(tmp_path):
    case, path = mlp(), tmp_path / "factors.safetensors"
    EKFAC(store=path).fit(case.model, case.train, case.loss)
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[-9] ^= 1
    for damaged in (b"", b"junk", content[: len(content) // 2], bytes(flipped), content.replace(b"format", b"tamrof")):
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match="is damaged or is no curvature file"):
            EKFAC(store=path).fit(case.model, case.train, case.loss)
