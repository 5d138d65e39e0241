"""CITE against its baselines, base to new, on clipfit-tiny.

    python benchmarks/base_to_new.py tune     learning rate and epochs of every method, on the three tuning tasks
    python benchmarks/base_to_new.py report   the example task: five seeds, α = 0, 0.5, 1, paired 95% intervals;
                                              the same for silhouettes, a far style, with three seeds
    python benchmarks/base_to_new.py rates    plain fine-tuning to both far styles at ever higher rates, three seeds

Settings are chosen on held-out images of benchmarks/tasks/{a,b,c} alone, by the harmonic mean at α = 0.5; the chosen
ones are written down in clipfit/assets/clipfit-tiny/clipfit.json. `report` uses what stands there. Every finished run
is kept in benchmarks/results/, so both commands go on where they stopped; a run is measured again when the model's
weights or its settings change.
"""

import argparse
import itertools
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipfit import AdaptConfig, EvaluateConfig, Evaluation, Recipe, adapt, evaluate
from clipfit.measure.evaluations import read
from clipfit.measure.metrics import estimate
from clipfit.measure.predictions import Predictions
from clipfit.model.loading import load
from clipfit.report.console import percent

HERE = Path(__file__).parent
ROOT = HERE.parent
TASKS = [HERE / "tasks" / name for name in "abc"]
FAR, HALFTONE = HERE / "tasks/silhouettes", HERE / "tasks/halftone"
EXAMPLE = ROOT / "examples/shots"
METHODS = ("finetune", "flyp", "cite")
RATES = (3e-5, 1e-4, 3e-4)
EPOCHS = (20, 10)
HIGH_RATES = (1e-4, 3e-4, 1e-3)
ALPHAS = (0.0, 0.5, 1.0)
SEEDS, FAR_SEEDS = range(5), range(3)
FIGURES = ("base", "new", "hm")

Figures = dict[str, dict[str, Any]]  # α → B, N, HM, in percent, and which images were right


def right(table: Predictions, evaluation: Evaluation) -> dict[str, list[int]]:
    """Of every base and every new image 1 where its own kind's names are told rightly, else 0."""
    parts = {"base": table.within(evaluation.base_classes), "new": table.within(evaluation.new_classes)}
    return {name: [int(a == b) for a, b in zip(part.names, part.labels, strict=True)] for name, part in parts.items()}


class Results:
    """Measured runs, by what determines them; one file a method, so that methods can be measured side by side."""

    def __init__(self, folder: Path, model: str):
        self.folder, self.model = folder, model
        self.source = load(model).source
        files = {m: folder / f"{m}.json" for m in METHODS}
        self.rows: dict[str, dict[str, Figures]] = {
            m: json.loads(f.read_text()) if f.exists() else {} for m, f in files.items()
        }

    def measure(self, task: Path, method: str, recipe: dict[str, Any], seed: int) -> Figures:
        full = Recipe.resolved(self.source.adapt_defaults, method, recipe)
        key = json.dumps([self.source.sha256[:12], task.name, method, str(full), seed])
        rows = self.rows[method]
        if key not in rows:
            with tempfile.TemporaryDirectory() as folder:
                run = adapt(
                    AdaptConfig(task, method, self.model, seed=seed, recipe=recipe, output=Path(folder) / "run")
                ).run
                evaluation = evaluate(EvaluateConfig(run, alphas=ALPHAS))
                stored = read(run / "evaluations/held-out")
                rows[key] = {
                    f"{r.alpha:g}": {
                        "base": 100 * r.base.value, "new": 100 * r.new.value, "hm": 100 * r.harmonic_mean,
                        "right": right(stored.tables(r.alpha)["union"], evaluation),
                    }
                    for r in evaluation.rows
                }  # fmt: skip
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"{method}.json").write_text(json.dumps(rows, indent=1) + "\n")
        return rows[key]


def tune(results: Results, methods: Sequence[str]) -> None:
    """Means over the tasks, one seed each: every learning rate at EPOCHS[0], then the best one at the other lengths."""

    def measured(method: str, rate: float, epochs: int) -> list[Figures]:
        return [results.measure(task, method, {"learning_rate": rate, "epochs": epochs}, 0) for task in TASKS]

    def harmonic(method: str, rate: float, epochs: int) -> float:
        return statistics.mean(r["0.5"]["hm"] for r in measured(method, rate, epochs))

    settings = {method: [(rate, EPOCHS[0]) for rate in RATES] for method in methods}
    for method in methods:
        best_rate, _ = max(settings[method], key=lambda s: harmonic(method, *s))
        settings[method] += [(best_rate, epochs) for epochs in EPOCHS[1:]]

    print("| method | learning rate | epochs | α = 0.5: B | N | HM | α = 1: B | N | HM |")
    print("|---|---|---|---|---|---|---|---|---|")
    any_runs = measured(methods[0], *settings[methods[0]][0])
    zero = " | ".join(f"{statistics.mean(r['0'][f] for r in any_runs):.1f}" for f in FIGURES)
    print(f"| zero-shot | | | {zero} | {zero} |")
    for method in methods:
        best = max(settings[method], key=lambda s: harmonic(method, *s))
        for rate, epochs in settings[method]:
            runs = measured(method, rate, epochs)
            cells = " | ".join(f"{statistics.mean(r[a][f] for r in runs):.1f}" for a in ("0.5", "1") for f in FIGURES)
            mark = "**" if (rate, epochs) == best else ""
            print(f"| {mark}{method}{mark} | {rate:g} | {epochs} | {cells} |")


def report(results: Results, methods: Sequence[str]) -> None:
    """Both tasks that no setting was chosen on, and CITE's paired differences to the baselines."""
    for task, seeds in ((EXAMPLE, SEEDS), (FAR, FAR_SEEDS)):
        print(f"\n{task.relative_to(ROOT)}, {len(seeds)} seeds\n")
        compare({m: [results.measure(task, m, {}, seed) for seed in seeds] for m in methods})


def compare(runs: dict[str, list[Figures]]) -> None:
    """One row a method and α; then, where all methods are there, CITE minus each, paired by seed."""
    print("| method | α | B | N | HM |\n|---|---|---|---|---|")
    first = next(iter(runs.values()))[0]["0"]
    print("| zero-shot | 0 | " + " | ".join(f"{first[f]:.1f}" for f in FIGURES) + " |")
    for method, alpha in itertools.product(runs, ("0.5", "1")):
        cells = " | ".join(interval([r[alpha][f] for r in runs[method]]) for f in FIGURES)
        print(f"| {method} | {alpha} | {cells} |")
    if set(runs) != set(METHODS):
        return
    print("\n| cite minus … | α | B | N | HM |\n|---|---|---|---|---|")
    for alpha, other in itertools.product(("0.5", "1"), ("zero-shot", *METHODS[:2])):
        theirs = [{alpha: first}] * len(runs["cite"]) if other == "zero-shot" else runs[other]
        pairs = list(zip(runs["cite"], theirs, strict=True))
        cells = " | ".join(interval([mine[alpha][f] - r[alpha][f] for mine, r in pairs]) for f in FIGURES)
        print(f"| {other} | {alpha} | {cells} |")

    print("\n| cite minus …, over images | α | B | N | HM |\n|---|---|---|---|---|")
    for alpha, other in itertools.product(("0.5", "1"), ("zero-shot", *METHODS[:2])):
        theirs = [{alpha: first}] * len(runs["cite"]) if other == "zero-shot" else runs[other]
        print(f"| {other} | {alpha} | {' | '.join(over_images(runs['cite'], theirs, alpha))} |")


def over_images(mine: list[Figures], theirs: list[Figures], alpha: str) -> list[str]:
    """Differences of B, N and HM with 95% intervals over the draw of images: both sides on the same resampled ones.

    An image counts by the share of seeds that had it right, so these intervals leave the seeds as they are.
    """

    def shares(runs: list[Figures], part: str) -> np.ndarray:
        return np.mean([run[alpha]["right"][part] for run in runs], axis=0)

    draw = np.random.default_rng(0)
    drawn: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for part in ("base", "new"):
        ours, others = shares(mine, part), shares(theirs, part)
        index = draw.integers(len(ours), size=(10_000, len(ours)))
        index[0] = np.arange(len(ours))  # the images as they are
        drawn[part] = ours[index].mean(1), others[index].mean(1)
    (b, b2), (n, n2) = drawn["base"], drawn["new"]
    gains = (b - b2, n - n2, 2 * b * n / (b + n) - 2 * b2 * n2 / (b2 + n2))
    return [
        f"{100 * gain[0]:.1f} [{100 * np.quantile(gain, 0.025):.1f}, {100 * np.quantile(gain, 0.975):.1f}]"
        for gain in gains
    ]


def rates(results: Results) -> None:
    """What fine-tuning gains on base classes of a far style, and what it loses of new ones at too high a rate."""
    for task in (HALFTONE, FAR):
        print(f"\n{task.relative_to(ROOT)}\n\n| learning rate | α | B | N | HM |\n|---|---|---|---|---|")
        for rate in HIGH_RATES:
            recipe = {"learning_rate": rate, "epochs": EPOCHS[0]}
            runs = [results.measure(task, "finetune", recipe, seed) for seed in FAR_SEEDS]
            if rate == HIGH_RATES[0]:
                print("| zero-shot | 0 | " + " | ".join(f"{runs[0]['0'][f]:.1f}" for f in FIGURES) + " |")
            for alpha in ("0.5", "1"):
                cells = " | ".join(interval([r[alpha][f] for r in runs]) for f in FIGURES)
                print(f"| {rate:g} | {alpha} | {cells} |")


def interval(values: list[float]) -> str:
    """Mean ± half of Student's 95% interval, of values in percent."""
    return percent(estimate([value / 100 for value in values]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tune", "report", "rates"))
    parser.add_argument("--model", default="clipfit-tiny")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="only these, for now")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = Results(HERE / "results" / args.what, args.model)
    if args.what == "rates":
        rates(results)
    else:
        (tune if args.what == "tune" else report)(results, args.methods)


if __name__ == "__main__":
    main()
