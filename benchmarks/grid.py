"""How right is the default simulator on settings that nothing was tuned on, beside each simulator that it is made of?

Thirty settings (``settings.GRID``), three seeds each: eighteen runs of random curricula, eleven to fit on and seven
held out. Results are kept in a folder as they come, so an interrupted grid goes on where it stopped.

    python benchmarks/grid.py [--known] [--seeds 3] [--settings residual-4 lr-2 …] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from settings import GRID, KNOWN, Setting

import simfluence as sf

HELD_OUT = 7


def measured(setting: Setting, seed: int, folder: Path) -> dict[str, Any]:
    """Fit the default and score it, and each simulator that it tried, on the runs that are held out."""
    path = folder / f"{setting.name}-{seed}.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    task, runs = setting.recorded(seed, store=str(folder / "runs" / f"{setting.name}-{seed}"))
    part, held = runs.usable("fit").split(held_out=HELD_OUT, seed=0)
    start = time.process_time()
    best = sf.BestSimulator(task).fit(part)
    seconds = time.process_time() - start
    mean = sf.MeanTrajectorySimulator().fit(part)
    fitted = {"best": best, "mean_trajectory": mean} | {member.name: member for member in best.members_}
    table = sf.evaluate(fitted, held, part, bootstrap=1)
    largest = max(float(np.nanmax(run.losses)) for run in part)
    farthest = float(np.nanmax(best.simulate(held.curricula, held.initial_losses)))
    result = {
        "skill": table["skill"].to_dict(), "final_skill": table["final_skill"].to_dict(),
        "coverage": float(table.loc["best", "coverage"]), "expected": best.trust.skill, "farthest": farthest / largest,
        "loss": [float(runs.losses[:, at].mean()) for at in (0, -1)], "diverged": len(runs) - len(part) - len(held),
        "left_out": best.left_out_, "seconds": seconds,
    }  # fmt: skip
    path.write_text(json.dumps(result))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--known", action="store_true", help="the settings that the methods were developed on")
    parser.add_argument("--settings", nargs="+")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("build/grid"))
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    chosen = [s for s in (KNOWN if arguments.known else GRID) if s.name in (arguments.settings or [s.name])]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for setting in chosen:
        results = [measured(setting, seed, arguments.folder) for seed in range(arguments.seeds)]
        rows.append(row(setting.name, results))
        print(rows[-1], flush=True)
    results = [measured(s, seed, arguments.folder) for s in chosen for seed in range(arguments.seeds)]
    text = "\n".join([HEADER, *rows, "", summary(results)])
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text + "\n")


HEADER = (
    "| setting | loss | best: skill / final | expected | coverage | best single | its skill | farthest | CPU s |\n"
    + "|---" * 9
    + "|"
)


def row(name: str, results: list[dict[str, Any]]) -> str:
    """Return a line of the table: medians over seeds, the lowest skill in brackets."""
    best = [result["skill"]["best"] for result in results]
    singles = [max((s, n) for n, s in result["skill"].items() if n != "best") for result in results]
    median = lambda key: np.median([result[key] for result in results])  # noqa: E731
    final = np.median([result["final_skill"]["best"] for result in results])
    loss = np.mean([result["loss"] for result in results], axis=0)
    return (
        f"| {name} | {loss[0]:.2f} → {loss[1]:.2f} | {np.median(best):.2f} [{min(best):.2f}] / {final:.2f} | "
        f"{median('expected'):.2f} | {median('coverage'):.0%} | {', '.join(sorted({n for _, n in singles}))} | "
        f"{np.median([s for s, _ in singles]):.2f} | {max(r['farthest'] for r in results):.1f} × | "
        f"{median('seconds'):.0f} |"
    )


def summary(results: list[dict[str, Any]]) -> str:
    """Say on how many settings and seeds the goals are met."""
    best = np.array([result["skill"]["best"] for result in results])
    single = np.array([max(s for n, s in result["skill"].items() if n != "best") for result in results])
    return (
        f"{len(best)} results: skill 0 or more on {(best >= 0).sum()}; within 0.02 of the best single "
        f"simulator, or above, on {(best >= single - 0.02).sum()}; no forecast above ten times the largest recorded "
        f"loss on {sum(result['farthest'] <= 10 for result in results)}; median skill {np.median(best):.3f}; "
        f"intervals cover {np.mean([result['coverage'] for result in results]):.1%}."
    )


if __name__ == "__main__":
    main()
