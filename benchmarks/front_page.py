"""What the README shows: a forecast that retraining confirms, and the simulators on the digits protocol.

    python benchmarks/front_page.py

Draws docs/images/forecast.png, and writes the table between the comments "simulators" in README.md. Everything is made
of runs/digits: 24 runs to fit on, 8 held out (split seed 0); what was chosen, was chosen on the fitting runs alone.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import sklearn.base
import torch
from matplotlib.figure import Figure

import simfluence as sf
from simfluence import plots
from simfluence.cli.demo import COMPARED
from simfluence.plots.style import save

NAMES = {
    "persistence": "persistence (the loss stays as it started)",
    "linear, tuned": "linear, tuned: `order=2`, `varying`",
    "tangent kernel, 1": "tangent kernel, from 1 of the 24 runs",
    "tangent kernel, 12": "tangent kernel, from 12 of them",
}
METRICS = {"mse": "all-steps MSE", "final_spearman": "final ρ"}
INTERVALS = {"skill": "skill", "final_skill": "final skill", "run_correlation": "run correlation"}
DECIMALS = {"mse": 4, "skill": 2, "final_skill": 2}
LABEL = 3


def fitted(task: sf.Task, part: sf.Runs) -> dict[str, sf.Simulator]:
    found = {name: sklearn.base.clone(simulator).fit(part) for name, simulator in COMPARED.items()}
    for runs in (1, 12):
        found[f"tangent kernel, {runs}"] = sf.TangentKernelSimulator(task).fit(part[:runs])
    return found


def markdown(table: pd.DataFrame) -> str:
    """Mean ± sd, and value [interval]; the best of each column in bold."""
    columns = {"simulator": [NAMES.get(str(name), str(name)) for name in table.index]}
    for name, shown in (METRICS | INTERVALS).items():
        best = table[name].min() if name == "mse" else table[name].max()
        rows = [(row[name], spread(name, row)) for _, row in table.iterrows()]
        columns[shown] = [
            "–" if np.isnan(v) else f"{f'**{number(name, v)}**' if v == best else number(name, v)} {s}" for v, s in rows
        ]
    lines = [list(columns), ["---"] * len(columns), *map(list, zip(*columns.values(), strict=True))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(name: str, row: pd.Series) -> str:
    if name in METRICS:
        return f"± {number(name, row[f'{name}_sd'])}"
    return f"[{number(name, row[f'{name}_low'])}, {number(name, row[f'{name}_high'])}]"


def number(name: str, value: float) -> str:
    """As many decimals as its column needs, and a true minus."""
    return f"{value:.{DECIMALS.get(name, 3)}f}".replace("-", "−")


def draw(path: Path, task: sf.Task, simulators: dict[str, sf.Simulator], held: sf.Runs) -> None:
    """Left: the test 3s of one run, had there been no 3 in training. Right: three questions, every test example."""
    questions = {
        f"no {LABEL}s": sf.Remove(f"label == {LABEL}"),
        "0–4, then 5–9": sf.Reorder("label < 5"),
        "half as long": sf.Truncate(held[0].steps // 2),
    }
    chosen = {"boosted, 24 runs": simulators["boosted"], "tangent kernel, 1 run": simulators["tangent kernel, 1"]}
    forecasts = {name: sf.what_if(simulator, held[:1], questions, task=task) for name, simulator in chosen.items()}
    verified = forecasts["boosted, 24 runs"].verify()
    mine = (task.test.table["label"] == LABEL).to_numpy()
    said = {name: each[0].what_if[:, mine].mean(axis=1) for name, each in forecasts.items()}
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    plots.trajectories(
        verified[0].actual[:, mine].mean(axis=1), said, left,
        f"digits: an unseen run without any {LABEL}; mean of {mine.sum()} test {LABEL}s",
    )  # fmt: skip
    left.plot(held[0].losses[:, mine].mean(axis=1), color="grey", linewidth=1, label=f"real, with {LABEL}s")
    left.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    plots.scatter(
        np.concatenate(list(forecasts["tangent kernel, 1 run"].change)).reshape(len(questions), -1),
        verified.actual_change.reshape(len(questions), -1), right,
        "digits: tangent kernel, 1 run to fit on; 100 test examples", groups=list(questions),
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path, dpi=100)


def main() -> None:
    torch.set_num_threads(1)
    store = sf.RunStore("runs/digits")
    task = sf.tasks.rebuild(store.info)
    part, held = store.load().split(held_out=8, seed=0)
    simulators = fitted(task, part)
    draw(Path("docs/images/forecast.png"), task, simulators, held)
    table = markdown(sf.evaluate(simulators, held, baseline_runs=part))
    print(table)
    readme = Path("README.md")
    inside = re.compile(
        r"(?<=<!-- simulators: made by `make front-page` -->\n).*?(?=<!-- simulators end -->)", re.DOTALL
    )
    text, count = inside.subn(lambda _: table + "\n", readme.read_text())
    if count != 1:
        raise SystemExit("README.md has not one place between the comments 'simulators': nothing was written there")
    readme.write_text(text)


if __name__ == "__main__":
    main()
