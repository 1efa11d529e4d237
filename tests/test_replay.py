from __future__ import annotations

import dataclasses

import pytest
import torch
from comparing import relative

import simfluence as sf
from simfluence.errors import InvalidInput


@pytest.mark.parametrize("steps", [[10], [0, 3, 10]])
def test_replayed_states_are_those_of_training(task, recipe, runs, steps):
    found = sf.replay(task, runs[0], steps)
    assert list(found) == steps
    model = task.build_model(recipe.seed)
    optimizer = recipe.build_optimizer(model.parameters())
    X, y = task.train_data
    for step, batch in enumerate([*runs[0].curriculum, None]):
        if step in found:
            for name, tensor in model.state_dict().items():
                assert torch.allclose(found[step].model[name], tensor, atol=1e-6)
        if batch is not None:
            optimizer.zero_grad()
            task.loss(model(X[batch.tolist()]), y[batch.tolist()]).mean().backward()
            optimizer.step()


def test_the_trained_model_has_the_recorded_losses(task, runs):
    model = sf.trained_model(task, runs[2])
    losses = task.evaluate(model, task.test_data)["loss"].numpy()
    assert relative(losses, runs[2].losses[-1]) < 1e-5
    assert not model.training


def test_checkpoints_are_kept_in_a_store_and_read_again(task, store, monkeypatch):
    run = store.load()[0]
    first = sf.replay(task, run, [0, 5], store)
    run = store.read(run.id)
    assert list(run.checkpoints) == [0, 5]
    monkeypatch.setattr("simfluence.recording.session._Session._record", None)  # nothing is trained again
    for step, checkpoint in sf.replay(task, run, [5, 0]).items():
        assert checkpoint.model.keys() == first[step].model.keys()
        assert all(torch.equal(checkpoint.model[name], first[step].model[name]) for name in checkpoint.model)
    assert len(store.load()) == 6


def test_bad_questions(task, runs):
    with pytest.raises(InvalidInput, match="no step 11"):
        sf.replay(task, runs[0], [11])
    with pytest.raises(InvalidInput, match="another task"):
        sf.replay(sf.tasks.digits(n_train=12, n_test=5), runs[0], [1])
    bare = dataclasses.replace(runs[0], recipe=None)
    with pytest.raises(InvalidInput, match="has no recipe"):
        sf.replay(task, bare, [1])
