"""Every picture, drawn from real data: what stands on the axes is what was to be drawn."""

from __future__ import annotations

import ast
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

import simfluence as sf
from simfluence import plots
from simfluence.errors import InvalidInput
from simfluence.evaluation.held_out import METRICS, skill_over_steps

MARKUP = "<script>$\\frac{1}$ & _x"


@pytest.fixture
def ax():
    figure = Figure(layout="constrained")
    yield figure.subplots()
    figure.canvas.draw()  # what cannot be laid out or has broken markup fails here


@pytest.fixture(scope="module")
def simulators(runs):
    return {
        "linear": sf.LinearSimulator(l2=3.0, around="mean").fit(runs[:4]),
        "additive": sf.AdditiveSimulator().fit(runs[:4]),
    }


@pytest.fixture(scope="module")
def verified(task, runs):
    conformal = sf.ConformalSimulator(sf.LinearSimulator(l2=3.0, around="mean"), members=2, folds=2).fit(runs)
    return sf.what_if(conformal, runs[0], sf.Remove("group == 'a'"), task=task).verify()


@pytest.fixture(scope="module")
def scores(task, runs):
    return sf.attribution.attributor_from_run("dot", task, runs[0]).scores(by_layer=True)


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def drawn(line):
    return np.asarray(line.get_xdata()), np.asarray(line.get_ydata())


def test_recorded_runs(runs, ax):
    runs.plot(ax)
    for line, run in zip(ax.lines[:-1], runs, strict=True):
        assert np.allclose(drawn(line)[1], run.losses.mean(1))
    assert np.allclose(drawn(ax.lines[-1])[1], runs.losses.mean((0, 2)))
    assert ax.get_title() == "small: 6 runs, mean of 5 test examples"
    assert ax.get_xlabel() == "step"


def test_runs_with_gaps_and_of_different_length(task, recipe, curricula, ax):
    short = sf.Curriculum(list(curricula[0])[:7], 12)
    runs = sf.record(task, recipe, [curricula[0], short], observe=sf.Observe(every=4))
    runs.plot(ax)
    assert drawn(ax.lines[0])[0].tolist() == [0, 4, 8, 10]
    assert drawn(ax.lines[1])[0].tolist() == [0, 4, 7]
    assert np.allclose(drawn(ax.lines[1])[1], runs[1].losses[[0, 4, 7]].mean(1))


def test_diverged_runs_leave_a_gap(ax):
    losses = np.ones((2, 4, 3))
    losses[1, 2:] = [np.inf, np.inf, np.nan]
    sf.Runs.from_arrays([[[0], [1], [0]]] * 2, losses).plot(ax)
    assert drawn(ax.lines[1])[0].tolist() == [0, 1]


def test_many_runs_are_drawn_in_part(ax):
    plots.recorded(np.arange(300.0)[:, None] + np.zeros(3), ax)
    assert len(ax.lines) == 100
    assert labels(ax) == ["100 of 300 runs"]


def test_trajectories(runs, simulators, ax):
    run = runs[5]
    simulated = {name: s.simulate([run.curriculum], run.initial_losses)[0] for name, s in simulators.items()}
    band = simulated["linear"].mean(1) - 0.1, simulated["linear"].mean(1) + 0.1
    means = {name: losses.mean(1) for name, losses in simulated.items()}
    plots.trajectories(run.losses.mean(1), means, ax, "small", bands={"linear": band})
    assert np.allclose(drawn(ax.lines[0])[1], run.losses.mean(1))
    assert np.allclose(drawn(ax.lines[2])[1], simulated["additive"].mean(1))
    assert labels(ax) == ["real training", "linear", "additive"]
    assert np.allclose(ax.collections[0].get_datalim(ax.transData).intervaly, [band[0].min(), band[1].max()])
    assert len({line.get_color() for line in ax.lines}) == 3


def test_trajectories_of_thousands_of_test_examples(runs, ax):
    losses = np.tile(runs[0].losses, (1, 1000))  # [11, 5000]
    plots.trajectories(losses, {"the same": losses}, ax)
    assert len(ax.lines) == 24
    assert labels(ax) == ["real training (12 of 5,000 test examples)", "the same"]
    assert np.allclose(drawn(ax.lines[11])[1], losses[:, -1])


def test_the_fan(verified, ax):
    verified.plot(ax)
    forecast = verified.forecast
    expected = [forecast.base, forecast.what_if, forecast.run.losses, verified.actual]
    for line, losses in zip(ax.lines, expected, strict=True):
        assert np.allclose(drawn(line)[1], losses.mean(1))
    assert [line.get_linestyle() for line in ax.lines] == ["--", "--", "-", "-"]
    assert labels(ax)[0] == "intervals, averaged"
    ends = forecast.low.mean(1).min(), forecast.high.mean(1).max()
    assert np.allclose(ax.collections[0].get_datalim(ax.transData).intervaly, ends)
    assert ax.get_title() == (
        "small: what if we remove examples where group == 'a'? (forecast not to be trusted) Mean of 5 test examples"
    )


def test_the_fan_of_one_test_example_without_intervals(task, runs, simulators, ax):
    forecast = sf.what_if(simulators["linear"], runs[5], [sf.Remove([0]), sf.Truncate(4)], task=task)
    forecast.plot(ax, test=[2])
    assert np.allclose(drawn(ax.lines[1])[1], forecast.what_if[:, 2])
    assert len(drawn(ax.lines[1])[0]) == 5  # as long as the edited curriculum
    assert len(ax.collections) == 0
    assert ax.get_ylabel() == "test loss"


def test_forecast_against_retrained(verified, ax):
    verified.plot_changes(ax)
    points = ax.collections[0].get_offsets()
    assert np.allclose(points, np.stack([verified.forecast.change, verified.actual_change], 1))
    assert f"delta correlation {verified.delta_correlation:.3g}" in ax.get_title()
    assert f"within groups {verified.within_correlation:.3g}" in ax.get_title()
    assert ax.get_xlim() == ax.get_ylim()


def test_many_queries(task, runs, simulators, ax):
    queries = {MARKUP: sf.Remove("label == 1"), "half": sf.Truncate(5)}
    found = sf.what_if(simulators["linear"], runs[4:], queries, task=task).verify()
    found.plot(ax)
    assert np.allclose(drawn(ax.lines[1])[0], found.forecasts.change.mean((1, 2)))
    assert np.allclose(drawn(ax.lines[2])[0], found.actual_change.mean((1, 2)))
    assert ax.get_title() == "small: 2 queries of 2 base runs, 5 test examples"
    other = Figure().subplots()
    found.plot_changes(other)
    assert [len(each.get_offsets()) for each in other.collections] == [10, 10]
    assert np.allclose(other.collections[1].get_offsets()[:, 1], found.actual_change[1].ravel())
    alone = found.forecasts.plot(Figure().subplots())
    assert len(alone.lines) == 2  # 0, and what is forecast


def test_scatter_of_too_many_points(ax):
    points = np.linspace(0, 1, 5000)
    plots.scatter(points, points, ax, "t")
    assert len(ax.collections[0].get_offsets()) == 2000
    assert "2,000 of 5,000 points drawn" in ax.get_title()
    with pytest.raises(InvalidInput, match="differ in shape"):
        plots.scatter(points, points[1:], ax)


def test_evaluation_bars(runs, simulators, ax):
    table = sf.evaluate(simulators, runs[4:], baseline_runs=runs[:4])
    table.plot_metric("skill", ax)
    assert [bar.get_width() for bar in ax.patches] == np.maximum(table["skill"], -1).tolist()
    segments = ax.collections[0].get_segments()
    assert np.allclose(segments[0][:, 0], table.loc["linear", ["skill_low", "skill_high"]].to_numpy(float).clip(-1))
    assert ax.get_title() == "small: 4 runs to fit on, 2 runs held out"
    cut = plots.evaluation(pd.DataFrame({"skill": [-7.0]}, ["bad"]), Figure().subplots())
    assert cut.texts[0].get_text() == "-7 (bar cut at −1)"
    with pytest.raises(InvalidInput, match="did you mean 'skill'"):
        plots.evaluation(table, ax, metric="skil")


def test_evaluation_without_intervals_or_of_one_run(runs, simulators, ax):
    table = sf.evaluate(simulators, runs[5:], baseline_runs=runs[:5])
    for metric in METRICS:
        figure = Figure()
        plots.evaluation(table, figure.subplots(), metric=metric)
        figure.canvas.draw()
    plots.evaluation(table[["skill"]], ax)
    assert np.isnan(ax.collections[0].get_segments()[0]).all() or len(ax.collections[0].get_segments()[0]) == 0


def test_skill_over_steps(runs, simulators, ax):
    table = skill_over_steps(simulators, runs[4:], runs[:4])
    plots.skill_over_steps(table, ax)
    for line, name in zip(ax.lines, simulators, strict=False):
        rows = table[table["simulator"] == name]
        assert np.array_equal(drawn(line)[0], rows["step"])
        assert np.allclose(drawn(line)[1], rows["skill"])
    last = sf.evaluate(simulators, runs[4:], baseline_runs=runs[:4], metrics=["final_skill"])
    assert np.allclose(table[table["step"] == 10]["skill"], last["final_skill"])
    assert ax.get_ylim()[0] >= -1
    plots.skill_over_steps(table.drop(columns=["low", "high"]), Figure().subplots())


def test_skill_over_steps_of_one_run_and_of_short_ones(task, recipe, runs, curricula, simulators):
    short = sf.record(task, recipe, [sf.Curriculum(list(curricula[4])[:6], 12)], observe=sf.Observe(every=3))
    held = sf.Runs([*short, runs[5]])
    table = skill_over_steps({"linear": simulators["linear"]}, held, runs[:4])
    assert table["step"].tolist() == list(range(1, 11))
    alone = skill_over_steps({"linear": simulators["linear"]}, short, runs[:4])
    assert alone["step"].tolist() == [3, 6]
    assert np.allclose(alone["low"], alone["skill"])


def test_learning_curve(runs, ax):
    table = sf.learning_curve("additive", runs, held_out=2, repeats=2)
    plots.learning_curve(table, ax)
    assert np.array_equal(drawn(ax.lines[0])[0], table["runs"])
    assert np.allclose(drawn(ax.lines[0])[1], table["skill"].clip(-1))
    assert ax.get_title() == "small: 2 runs held out"
    plots.learning_curve(table[["runs", "skill"]].head(1), Figure().subplots())


def test_removal_curve(runs, simulators, ax):
    found = sf.smallest_removal(simulators["additive"], runs[0], 0, past=1.0, most=3)
    plots.removal_curve(found.losses, 1.0, ax)
    assert drawn(ax.lines[0])[1].tolist() == found.losses.tolist()
    assert drawn(ax.lines[1])[1].tolist() == [1.0, 1.0]


def test_heat_map(runs, simulators, ax):
    changes = (
        pd.DataFrame(sf.leave_one_out(simulators["linear"], runs[0]).values)
        .rename_axis("test")
        .rename_axis(columns="train")
    )
    plots.heat_map(changes, ax)
    assert np.allclose(ax.images[0].get_array(), changes)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("training example", "test example")
    groups = plots.heat_map(sf.leave_group_out(simulators["linear"], runs[0], "group"), Figure().subplots())
    assert [label.get_text() for label in groups.get_xticklabels()] == ["a", "b", "c"]


def test_heat_map_of_thousands_with_missing_values(ax):
    values = pd.DataFrame(np.arange(3000.0)[:, None] * np.ones(3), columns=["a", MARKUP, "_c"]).rename_axis("test")
    values.iloc[-1, 0] = np.nan
    plots.heat_map(values, ax)
    assert ax.images[0].get_array().shape == (1000, 3)
    assert ax.get_ylabel() == "test example (1,000 of 3,000 drawn)"
    assert ax.images[0].get_array().mask.sum() == 1
    plots.heat_map(pd.DataFrame([[np.nan]]), Figure().subplots())


def test_ranked_examples(task, runs, simulators, ax):
    table = sf.rank_suspects(simulators["linear"], runs[0])
    plots.ranked(table, ax, k=4, images=np.random.default_rng(0).random((12, 8, 8)))
    assert [bar.get_width() for bar in ax.patches] == table["gain"].head(4).tolist()
    assert [label.get_text() for label in ax.get_yticklabels()] == table["id"].head(4).tolist()
    assert len(ax.artists) == 4
    texts = [f"{MARKUP} {number} " + "word " * 100 for number in range(12)]
    other = plots.ranked(table, Figure().subplots(), texts=texts)
    assert all(len(label.get_text()) <= 42 for label in other.get_yticklabels())
    assert other.get_yticklabels()[0].get_text().startswith(f"{table.index[0]}: <script>\\$")


def test_the_plane_of_effects(task, simulators, runs, ax):
    linear = sf.LinearSimulator(l2=1.0).fit(runs)
    plots.plane(linear.A_[:, 0], linear.B_[:, 0], ax, groups=task.train.table["group"], name="group")
    mine = (task.train.table["group"] == "a").to_numpy()
    assert np.allclose(ax.collections[0].get_offsets(), np.stack([linear.A_[mine, 0], linear.B_[mine, 0]], 1))
    assert labels(ax) == ["group a", "group b", "group c"]
    many = plots.plane(np.arange(20.0), np.arange(20.0), Figure().subplots(), groups=range(20))
    assert labels(many)[-1] == "14 others"
    assert sum(len(each.get_offsets()) for each in many.collections) == 20


def test_counts(ax):
    table = pd.DataFrame(
        {"train": range(50), "test": 1}, index=pd.Index([f"{MARKUP} {i}" for i in range(50)], name="w")
    )
    plots.counts(table, ax)
    assert [bar.get_height() for bar in ax.patches[:3]] == [0, 1, 2]
    assert len(ax.patches) == 40
    assert ax.get_xlabel() == "w (20 of 50 values)"


def test_distribution_of_scores(scores, ax):
    values = scores.values.sum(0)
    tail = scores.tail()
    plots.distribution(values, ax, share=tail.share, exponent=tail.exponent, start=tail.start)
    positive = np.sort(values[values > 0])[::-1]
    assert np.allclose(drawn(ax.lines[0])[0], positive)
    assert np.allclose(drawn(ax.lines[0])[1], np.arange(1, len(positive) + 1) / values.size)
    assert f"top 1 %: {tail.share:.0%} of the positive sum" in labels(ax)


def test_the_tail_of_a_power_law(ax):
    """Pareto's scores with a known exponent; the line passes through where the tail begins."""
    draws = np.random.default_rng(0).pareto(1.5, size=(40, 2500)) + 1
    found = sf.attribution.Scores(draws, "raw", "drawn").tail(top=0.05)
    assert found.exponent == pytest.approx(1.5, rel=0.05)
    assert found.count == 5000
    top = -np.sort(-draws, axis=1)[:, :125].sum(1) / draws.sum(1)
    assert found.share == pytest.approx(top.mean())
    plots.distribution(draws, ax, exponent=found.exponent, start=found.start)
    assert len(drawn(ax.lines[0])[0]) <= 5000
    assert drawn(ax.lines[1])[1][0] == pytest.approx((draws >= found.start).mean(), rel=1e-3)
    with pytest.raises(InvalidInput, match="above 0 and below 1"):
        sf.attribution.Scores(draws, "raw", "drawn").tail(top=1.0)


def test_tails_that_are_none():
    nothing = sf.attribution.Scores(np.zeros((2, 30)), "raw", "none").tail()
    assert np.isnan(nothing.share)
    assert np.isnan(nothing.exponent)
    same = sf.attribution.Scores(np.ones((2, 30)), "raw", "same").tail()
    assert same.share == pytest.approx(1 / 30)
    assert np.isnan(same.exponent)


def test_influence_by_layer(scores, ax):
    table = scores.by_layer()
    plots.by_layer(table, ax)
    assert np.allclose([bar.get_width() for bar in ax.patches], table["share"])
    assert table["share"].sum() == pytest.approx(1)
    sizes = np.abs(scores.values).sum(2)
    assert np.allclose(table["share"], (sizes / sizes.sum(0)).mean(1))
    with pytest.raises(InvalidInput, match="not by layer"):
        sf.attribution.Scores(scores.values.sum(0), "raw", "dot").by_layer()
    silent = sf.attribution.Scores(np.zeros((2, 1, 3)), "raw", "dot", ["a", "b"]).by_layer()
    assert silent["share"].isna().all()
    plots.by_layer(silent, Figure().subplots())


def test_tokens():
    page = plots.tokens(["<script>", " dog"], np.array([-0.5, 1.0, 7.0]), MARKUP, unit="<i>")
    assert "<script>" not in page
    assert "<i>" not in page
    assert page.count("<span") == 2
    assert 'title="1 (&lt;i&gt;)"' in page  # padding does not count
    assert page._repr_html_() == str(page)
    assert "1,000 of 3,000 tokens" in plots.tokens(["a"] * 3000, np.ones(3000))
    assert plots.tokens(["a"], np.array([np.nan])).count("background") == 0
    assert "no tokens" in plots.tokens([], np.array([]))
    strong, weak = plots.tokens(["a", "b"], np.array([1.0, 0.1])).split("background:")[1:]
    assert strong[:7] != weak[:7]


NOTHING = {
    plots.recorded: np.empty((0, 5)),
    plots.evaluation: pd.DataFrame({"skill": []}),
    plots.skill_over_steps: pd.DataFrame({"simulator": [], "step": [], "skill": []}),
    plots.learning_curve: pd.DataFrame({"runs": [], "skill": []}),
    plots.heat_map: pd.DataFrame(),
    plots.ranked: pd.DataFrame({"gain": []}),
    plots.counts: pd.DataFrame(),
    plots.distribution: np.full((2, 3), -1.0),
    plots.by_layer: pd.DataFrame({"share": []}),
    plots.fan: {},
}


@pytest.mark.parametrize("function", NOTHING, ids=lambda function: function.__name__)
def test_nothing_to_draw_is_said(function, ax):
    function(NOTHING[function], ax)
    assert ax.texts[0].get_text().startswith("no ")


def test_nothing_to_draw_is_said_of_pairs_too():
    nothing = np.empty(0)
    for drawn_on in (
        plots.scatter(nothing, nothing, Figure().subplots()),
        plots.changes([], nothing, None, Figure().subplots()),
        plots.plane(nothing, nothing, Figure().subplots()),
        plots.trajectories(nothing, {}, Figure().subplots()),
        plots.removal_curve(nothing, None, Figure().subplots()),
        sf.Runs([]).plot(Figure().subplots()),
    ):
        assert drawn_on.texts[0].get_text().startswith("no ")


def test_names_are_no_markup_and_are_cut(runs, ax):
    plots.trajectories(runs[0].losses.mean(1), {MARKUP * 10: runs[1].losses.mean(1)}, ax, MARKUP)
    assert len(labels(ax)[1]) <= 60
    hidden = plots.fan({"_edited": np.ones(3)}, Figure().subplots())
    assert labels(hidden) == [" _edited"]


def test_pyplot_is_touched_only_without_axes(runs):
    before = plt.get_fignums()
    runs.plot(Figure().subplots())
    runs._repr_html_()
    assert plt.get_fignums() == before
    ax = runs.plot()
    assert plt.get_fignums() != before
    plt.close(ax.figure)


def test_matplotlib_is_not_imported_with_the_library():
    """Nor is ``plots``: by functions that draw, not by modules."""
    root = Path(sf.__file__).parent
    rooms = [path for path in root.rglob("*.py") if path.relative_to(root).parts[0] not in ("plots", "cli")]
    for path in rooms:
        if path.stem in ("demo", "printing", "__main__"):  # of the command line
            continue
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            module = str(getattr(node, "module", ""))
            assert not any(name.split(".")[0] == "matplotlib" for name in [*names, module]), path
            assert "plots" not in names, path
            assert not module.startswith("simfluence.plots"), path


@pytest.mark.parametrize(
    ("draw", "said"),
    [
        (lambda ax: plots.scatter("x", np.ones(2), ax), "predicted must be an array of numbers"),
        (lambda ax: plots.scatter(np.ones(2), np.ones(2), "title"), "ax must be an Axes or None"),
        (lambda ax: plots.scatter(np.ones((2, 2, 2)), np.ones((2, 2, 2)), ax), "one or two axes"),
        (lambda ax: plots.scatter(np.ones((2, 3)), np.ones((2, 3)), ax, groups=["a"]), "1 groups for 2 rows"),
        (lambda ax: plots.recorded(np.ones(3), ax), "two axes"),
        (lambda ax: plots.changes(["a"], np.ones(2), None, ax), "for each of 1 names"),
        (lambda ax: plots.plane(np.ones(2), np.ones(3), ax), "one value per training example"),
        (lambda ax: plots.fan({"a": np.ones((2, 2))}, ax), "must be an array of numbers"),
        (lambda ax: plots.trajectories(np.ones(3), {"a": np.ones(2)}, ax), "must have the shape of true"),
        (lambda ax: plots.heat_map(pd.DataFrame({"a": ["x"]}), ax), "must have numbers"),
        (lambda ax: plots.ranked(pd.DataFrame({"gain": ["x"]}), ax), "must have numbers"),
        (lambda ax: plots.by_layer(pd.DataFrame({"shape": [1]}), ax), "no column 'share'"),
        (lambda ax: plots.removal_curve(np.ones((2, 2)), None, ax), "losses must be an array of numbers"),
    ],
)
def test_wrong_calls_are_refused_by_name(draw, said, ax):
    with pytest.raises(InvalidInput, match=said):
        draw(ax)


def test_nothing_but_nan_is_said(ax):
    plots.recorded(np.full((2, 3), np.nan), ax)
    assert ax.texts[0].get_text() == "no runs to draw"


def test_control_characters_and_dollars_are_no_markup(ax):
    plots.recorded(np.ones((1, 3)), ax, "a\x1b[2J $x$")
    assert ax.get_title() == r"a [2J \$x\$"
