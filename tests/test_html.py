"""What notebooks show of tasks, runs, forecasts and tables: summaries with a picture, nothing in them is markup."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

import simfluence as sf
from simfluence._internal.html import card

EVIL = "<script>alert('x')</script> $\\frac{$ & \"q\""


class Balanced(HTMLParser):
    """Collects tags, and fails where one is left open."""

    VOID = ("br", "img")

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def checked(shown) -> tuple[str, list[Image.Image]]:
    """The HTML of an object, well-formed and without scripts, and its pictures."""
    page = shown._repr_html_()
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert set(parser.seen) <= {"div", "b", "br", "img", "table", "tr", "th", "td"}
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    images = [Image.open(io.BytesIO(base64.b64decode(each))) for each in pictures]
    for pixels in (np.asarray(image.convert("L")) for image in images):
        assert all((edge == 255).all() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])), "cut off"
    return page, images


@pytest.fixture(scope="module")
def evil() -> sf.Task:
    """A task whose names, labels and metadata are all markup."""
    table = pd.DataFrame({EVIL: [EVIL, "b"] * 6})
    X, y = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 2
    return sf.tasks.from_arrays(
        lambda: nn.Linear(3, 2), X, y, "cross_entropy",
        test=(X[:5], y[:5]), metadata=table, test_metadata=table.head(5), name=EVIL,
    )  # fmt: skip


@pytest.fixture(scope="module")
def evil_runs(evil):
    curricula = sf.random_curricula(n_train=12, runs=4, steps=5, batch_size=3, subset=0.8, seed=0)
    return sf.record(evil, sf.Recipe(lr=0.1), curricula)


def test_task(evil, task):
    page, pictures = checked(task)
    assert "Task small" in page
    assert "training examples: 12" in page
    assert len(pictures) == 1
    checked(evil)
    lists = pd.DataFrame({"tags": [["a"], ["b"]] * 3, "mixed": ["x", 1, None] * 2})
    odd = sf.tasks.from_arrays(
        nn.Linear(2, 1), np.ones((6, 2)), np.ones((6, 1)), "squared_error", metadata=lists, test=2
    )  # fmt: skip
    assert "metadata: id, tags, mixed" in checked(odd)[0]
    plain = sf.tasks.diabetes(n_train=30, n_test=20)
    assert "squared" in checked(plain)[0]


def test_runs(runs, evil_runs):
    page, pictures = checked(runs)
    assert "task: small" in page
    assert "runs: 6" in page
    assert pictures[0].size[0] > 300
    checked(evil_runs)
    assert checked(runs[:1])[1]
    assert "runs: 0" in checked(sf.Runs([]))[0]
    losses = np.ones((2, 2, 1))
    losses[1, 1] = np.nan
    assert "diverged: 1" in checked(sf.Runs.from_arrays([[[0]], [[0]]], losses))[0]


def test_forecasts(task, runs, evil, evil_runs):
    linear = sf.LinearSimulator(l2=1.0).fit(runs)
    forecast = sf.what_if(linear, runs[0], sf.Remove("group == 'a'"), task=task)
    page, pictures = checked(forecast)
    assert f"{forecast.base[-1].mean():.3f} → {forecast.what_if[-1].mean():.3f}" in page
    assert len(pictures) == 1
    page, pictures = checked(forecast.verify())
    assert "Delta correlation" in page
    assert len(pictures) == 2
    long = sf.Remove("group == 'a' and not group in ['b', 'c']", fill="resample", seed=12)
    checked(sf.what_if(linear, runs[0], long, task=task).verify())  # a title of several lines
    many = sf.what_if(linear, runs, {EVIL: sf.Remove([0]), "b": sf.Remove([1])}, task=task)
    assert len(checked(many)[1]) == 1
    assert len(checked(many.verify())[1]) == 2
    wicked = sf.AdditiveSimulator().fit(evil_runs)
    ids = {EVIL: sf.Remove([0])}
    checked(sf.what_if(wicked, evil_runs[0], sf.Remove([0]), task=evil).verify())
    checked(sf.what_if(wicked, evil_runs, ids, task=evil).verify())


def test_evaluation_tables(runs):
    linear = sf.LinearSimulator(l2=1.0).fit(runs[:4])
    table = sf.evaluate({"linear": linear, EVIL: linear}, runs[4:], baseline_runs=runs[:4])
    page, pictures = checked(table)
    assert f"{table.loc['linear', 'skill']:.3f} [" in page
    assert "task: small" in page
    assert len(pictures) == 1
    assert type(table.round(2)) is pd.DataFrame
    assert checked(sf.evaluate({"linear": linear}, runs[4:], baseline_runs=runs[:4], metrics=["mse"]))[1]


def test_cards_are_escaped_and_cut():
    page = card(EVIL, {EVIL: EVIL * 100})
    assert "<script>" not in page
    assert len(page) < 2000
