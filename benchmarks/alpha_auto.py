"""What `--alpha auto` and the forecast are worth: every task with known answers, against the best α in hindsight.

    python benchmarks/alpha_auto.py run [--part k/n] [--seeds 0 1 2] [--shots all 2 1] [--tasks example digits …]
    python benchmarks/alpha_auto.py report        the tables of docs/alpha.md, from what was run
    python benchmarks/alpha_auto.py draw          docs/probabilities.svg: reliability and coverage on four tasks

A cell is a task, a number of shots a class and a seed: CITE on clipfit-tiny, with its own settings. `run` keeps the
logits of the test images at every ratio, and those of the folds, in benchmarks/results/alpha/; a finished cell is not
run again. `report` chooses α, temperature and forecast from the folds as `adapt` does, and looks at the test images
only then. Digits need scikit-learn; clothing, photographs, is read from --clothing, a folder with train/ and test/.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import digits
import torch

from clipfit import AdaptConfig, methods
from clipfit.adaptation import Adaptation
from clipfit.config import parse_part
from clipfit.data import layout
from clipfit.data.images import ImageStore, Memory, Views, grey_bits
from clipfit.data.loaded import ShotFiles, Shots
from clipfit.events import Silent
from clipfit.folding import Subject, carry_out, score
from clipfit.measure.choice import Curve, choose, curve_of
from clipfit.measure.folds import CLASSES, IMAGES, RATIOS, Scores, folds_of
from clipfit.measure.forecast import Expected, expected
from clipfit.measure.metrics import harmonic_mean, wilson_interval
from clipfit.measure.predictions import Predictions
from clipfit.measure.reliability import Reliability
from clipfit.runs import files, start

HERE = Path(__file__).parent
RESULTS = HERE / "results/alpha"
DRAWN = ("example", "silhouettes", "halftone", "clothing")
TASKS = ("example", "a", "b", "c", "silhouettes", "halftone", "digits", "clothing")
CLOTHING = HERE.parent.parent / "shared/data/clothing"


def place_of(task: str, clothing: Path) -> Path:
    """The folder of a task, with train/ and test/."""
    if task == "digits":
        return digits.split()
    return {"example": HERE.parent / "examples/shots", "clothing": clothing}.get(task, HERE / "tasks" / task)


@dataclass(frozen=True)
class Cell:
    """One adaptation, and its folds."""

    task: str
    shots: str  # a class; "all"
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.shots}-{self.seed}"

    def kept(self, part: str) -> Path:
        """Where the logits of "test" or "folds" lie."""
        return RESULTS / f"{self.name}-{part}.safetensors"


def run(cell: Cell, clothing: Path) -> None:
    """The test images at every ratio of the final fit; then the folds."""
    place = place_of(cell.task, clothing)
    per_class = None if cell.shots == "all" else int(cell.shots)
    config = AdaptConfig(place, "cite", "clipfit-tiny", seed=cell.seed, shots_per_class=per_class)
    origin, chosen = start.find(config.model, None), ShotFiles.of(config)
    method = methods.find(config.method)
    adaptation = Adaptation.resolve(method, method.configure({}), config, origin.adapt_defaults, chosen.counts)
    clip = origin.load(config.method, adaptation.additions, False, torch.device("cpu"))
    shots, pretrained = Shots.of(chosen, config, clip.geometry, adaptation.enough(clip)), clip.snapshot()
    subject = Subject(adaptation, clip, pretrained, shots.base, shots.images, shots.images.views, shots.labels)
    if not cell.kept("test").exists():
        adaptation.run(clip, shots.base, shots.images, shots.labels, pretrained)
        finetuned = clip.snapshot()
        found = layout.read(place)
        samples = found.test or ()
        new = [name for name in dict.fromkeys(s.label for s in samples) if name not in shots.base]
        names = [*shots.base, *(name for name in found.names.values() if name in new)]
        images = ImageStore(samples, Memory(2**31), Views(clip.geometry, grey_bits(samples)).read)
        labels = [names.index(sample.label) for sample in samples]
        tested = score(subject, finetuned, images, range(len(samples)), labels, names, RATIOS)
        keep(cell.kept("test"), [tested], {"base": len(shots.base), "new": len(new)})
    folds = folds_of(shots.labels, [found.pixels for found in shots.prints], cell.seed)
    scores = carry_out(subject, folds, RATIOS, Silent(), None)
    keep(cell.kept("folds"), scores, {"kinds": [fold.kind for fold in folds]})


def keep(path: Path, tables: Sequence[Scores], about: dict[str, Any]) -> None:
    """Logits and labels by number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pairs = {f"{key}{k}": getattr(table, key) for k, table in enumerate(tables) for key in ("logits", "labels")}
    files.write_tensors(path, pairs, about)


def kept(path: Path) -> tuple[list[Scores], dict[str, Any]]:
    """What `keep` wrote."""
    tensors, about = files.read_tensors(path)
    return [Scores(tensors[f"logits{k}"], tensors[f"labels{k}"]) for k in range(len(tensors) // 2)], about


# ---- report


@dataclass(frozen=True)
class Found:
    """A finished cell: what the folds say, and what the test images say of that."""

    cell: Cell
    base: Curve | None
    new: Curve | None
    target: list[float]  # HM at every ratio, base accuracy where nothing is new
    tested: dict[str, Scores]

    @classmethod
    def of(cls, cell: Cell) -> Found:
        """Read what `run` kept."""
        scores, about = kept(cell.kept("folds"))
        kinds = [[s for s, kind in zip(scores, about["kinds"], strict=True) if kind == k] for k in (IMAGES, CLASSES)]
        base, new = (curve_of(of_kind, RATIOS) if of_kind else None for of_kind in kinds)
        [tested], about = kept(cell.kept("test"))
        parts = {"base": within(tested, 0, about["base"]), "new": within(tested, about["base"], about["new"])}
        parts = {name: part for name, part in parts.items() if len(part.labels)}
        accuracies = [accuracies_of(part) for part in parts.values()]
        target = [harmonic_mean(*pair) if len(pair) == 2 else pair[0] for pair in zip(*accuracies, strict=True)]
        return cls(cell, base, new, target, parts)

    @property
    def curves(self) -> list[Curve]:
        return [curve for curve in (self.base, self.new) if curve]

    def regret(self, alpha: float) -> float:
        """Points behind the best ratio in hindsight."""
        return 100 * (max(self.target) - self.target[RATIOS.index(alpha)])


def within(scores: Scores, first: int, count: int) -> Scores:
    """The images of some classes among those alone."""
    rows = (scores.labels >= first) & (scores.labels < first + count)
    return Scores(scores.logits[:, rows, first : first + count], scores.labels[rows] - first)


def accuracies_of(scores: Scores) -> list[float]:
    return (scores.logits.argmax(2) == scores.labels).double().mean(1).tolist()


def by(statistic: Callable[[Curve], torch.Tensor]) -> Callable[[Found], float]:
    """The ratio of the highest harmonic mean of a statistic (A,) of each curve."""

    def rule(found: Found) -> float:
        means = torch.stack([statistic(curve) for curve in found.curves])
        return RATIOS[int((len(means) / (1 / means).sum(0)).argmax())]

    return rule


RULES: dict[str, Callable[[Found], float]] = {
    "auto": lambda found: choose(found.curves),
    "0.5": lambda found: 0.5,
    "1": lambda found: 1.0,
    "by accuracy": by(lambda curve: curve.right.double().mean(1)),
    "by probability": by(lambda curve: curve.likely.mean(1)),
    "by log-loss": by(lambda curve: curve.likely.log().mean(1).exp()),
    "1 − zero-shot": lambda found: round(1 - found.curves[0].right[0].double().mean().item(), 1),
}


def report(shots: Sequence[str], seeds: Sequence[int]) -> None:
    """Every table, of the cells that are there."""
    found = {
        (task, k): [Found.of(cell) for seed in seeds if (cell := Cell(task, k, seed)).kept("folds").exists()]
        for k in shots
        for task in TASKS
    }
    found = {key: cells for key, cells in found.items() if cells}
    for k in shots:
        of_k = {task: cells for (task, count), cells in found.items() if count == k}
        title = "All shots" if k == "all" else f"{k} shot{'s' * (k != '1')} a class"
        print(f"\n### {title}\n")
        regrets(of_k)
        print()
        forecasts(of_k)
    print("\n### All of them\n")
    covered([cell for cells in found.values() for cell in cells])
    calibrated(found)


def regrets(found: Mapping[str, Sequence[Found]]) -> None:
    """Points behind the best ratio in hindsight: means over seeds, the largest of these last."""
    print(f"| task | seeds | zero-shot | best | at α | auto takes | {' | '.join(RULES)} |")
    print("|---" * (6 + len(RULES)) + "|")
    table = []
    for task, cells in found.items():
        row = [statistics.mean(cell.regret(rule(cell)) for cell in cells) for rule in RULES.values()]
        best = [RATIOS[cell.target.index(max(cell.target))] for cell in cells]
        auto = [choose(cell.curves) for cell in cells]
        zero, most = (100 * statistics.mean(f(cell.target) for cell in cells) for f in (lambda t: t[0], max))
        texts = [" ".join(f"{alpha:g}" for alpha in ratios) for ratios in (best, auto)]
        numbers = " | ".join(f"{value:.1f}" for value in row)
        print(f"| {task} | {len(cells)} | {zero:.1f} | {most:.1f} | {texts[0]} | {texts[1]} | {numbers} |")
        table.append(row)
    for name, of in (("mean", statistics.mean), ("largest", max)):
        print(f"| {name} | | | | | | {' | '.join(f'{of(column):.1f}' for column in zip(*table, strict=True))} |")


def forecasts(found: Mapping[str, Sequence[Found]]) -> None:
    """What was foretold and what came, in percent, as means over seeds; ECE of the base images in points."""
    print(
        "| task | base: zero-shot | foretold | came | within | new: zero-shot | foretold | came | within "
        "| ECE | at T | by chance | beyond chance | at T |"
    )
    print("|---" * 14 + "|")
    for task, cells in found.items():
        texts = [task]
        for part in ("base", "new"):
            pairs = [pair for cell in cells if (pair := foretold(cell, part))]
            if not pairs:
                texts += ["–"] * 4
                continue
            columns = zip(*((told.zero_shot, told.accuracy, came) for told, came in pairs), strict=True)
            texts += [f"{100 * statistics.mean(column):.1f}" for column in columns]
            texts.append(f"{sum(told.low <= came <= told.high for told, came in pairs)} of {len(pairs)}")
        errors = [calibration(cell) for cell in cells if cell.base]
        texts += [f"{100 * statistics.mean(column):.1f}" for column in zip(*errors, strict=True)] or ["–"] * 5
        print(f"| {' | '.join(texts)} |")


def foretold(found: Found, part: str) -> tuple[Expected, float] | None:
    """The forecast, and the test accuracy that it is of: that of new classes among as many of them."""
    curve, tested = getattr(found, part), found.tested.get(part)
    if curve is None or tested is None:
        return None
    alpha = choose(found.curves)
    at, classes = RATIOS.index(alpha), found.tested["base"].logits.shape[2]
    if part == "base":
        return expected(curve, alpha, classes), accuracies_of(tested)[at]
    return expected(curve, alpha, classes // 2), among(tested, at, classes // 2)


def among(tested: Scores, at: int, count: int) -> float:
    """The mean accuracy among `count` of the classes, drawn 500 times."""
    draw, total, logits = torch.Generator().manual_seed(0), 0.0, tested.logits[at]
    if count >= logits.shape[1]:
        return accuracies_of(tested)[at]
    for _ in range(500):
        chosen = torch.randperm(logits.shape[1], generator=draw)[:count]
        rows = torch.isin(tested.labels, chosen)
        total += (chosen[logits[rows][:, chosen].argmax(1)] == tested.labels[rows]).double().mean().item()
    return total / 500


def calibration(found: Found) -> tuple[float, float, float, float, float]:
    """ECE of the base test images at the chosen ratio, before and after the temperature of the folds; what faultless
    probabilities would show after it; and how far both are beyond what such would show."""
    errors, chances = zip(*((r.calibration_error(), r.error_by_chance()) for r in reliabilities(found)), strict=True)
    beyond = [max(error - chance, 0.0) for error, chance in zip(errors, chances, strict=True)]
    return *errors, chances[1], *beyond


def calibrated(found: Mapping[tuple[str, str], Sequence[Found]]) -> None:
    """In how many rows of the tables the temperature leaves half of the error that is no chance, or three points."""
    rows = [[calibration(cell)[3:] for cell in cells if cell.base] for cells in found.values()]
    means = [[statistics.mean(column) for column in zip(*row, strict=True)] for row in rows if row]
    good = sum(after <= before / 2 or after <= 0.03 for before, after in means)
    rule = "at most half of that before it, or 3 points"
    print(f"\nCalibration error beyond chance, at T: {rule}, in {good} of {len(means)} rows.")


def reliabilities(found: Found) -> tuple[Reliability, Reliability]:
    """Of the base test images at the chosen ratio, before and after the temperature of the folds."""
    assert found.base
    at, tested = RATIOS.index(choose(found.curves)), found.tested["base"]
    names = tuple(map(str, range(tested.logits.shape[2])))
    labels = tuple(names[label] for label in tested.labels.tolist())
    table = Predictions(labels, labels, names, tested.logits[at], RATIOS[at], "")
    before, after = (Reliability.of(table, t) for t in (1.0, found.base.temperatures[at]))
    return before, after


def draw(seeds: Sequence[int]) -> None:
    """A column a task, all seeds pooled: above how often what is said so surely is right, below what certainty buys."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "clipfit"  # the same bytes again
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(DRAWN), figsize=(3 * len(DRAWN), 6), sharey="row", layout="constrained")
    for (upper, lower), task in zip(axes.T, DRAWN, strict=True):
        cells = [Found.of(cell) for seed in seeds if (cell := Cell(task, "all", seed)).kept("folds").exists()]
        pairs = [reliabilities(cell) for cell in cells]
        for place, (name, marker) in enumerate((("as it is", "o"), ("at the folds' temperature", "s"))):
            of = [pair[place] for pair in pairs]
            pooled = Reliability(torch.cat([r.confidence for r in of]), torch.cat([r.right for r in of]))
            bins = pooled.bins(10)
            upper.plot([b.confidence for b in bins], [b.accuracy for b in bins], marker=marker, label=name)
            curve = pooled.curve()
            lower.plot([point.coverage for point in curve], [point.accuracy for point in curve], label=name)
        upper.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle="--")
        upper.set(title=task, xlabel="probability", xlim=(0, 1), ylim=(0, 1))
        lower.set(xlabel="share of images, most certain first", xlim=(0, 1), ylim=(0, 1.02))
    axes[0, 0].set_ylabel("right")
    axes[1, 0].set_ylabel("right")
    axes[0, 0].legend(fontsize="small")
    figure.savefig(HERE.parent / "docs/probabilities.svg", metadata={"Date": None})


def covered(cells: Sequence[Found]) -> None:
    """How often a forecast's interval holds what came, and how wide it is beside Wilson's of as many images."""
    print("| forecast | runs | within its 90% interval | width over Wilson's |\n|---|---|---|---|")
    for parts in (("base",), ("new",), ("base", "new")):
        pairs = [(getattr(cell, part), pair) for cell in cells for part in parts if (pair := foretold(cell, part))]
        inside = sum(told.low <= came <= told.high for _, (told, came) in pairs)
        widths = []
        for curve, (told, _) in pairs:
            n = curve.images
            low, high = wilson_interval(round(told.accuracy * n), n, 0.9)
            widths.append((told.high - told.low) / (high - low))
        share, width = 100 * inside / len(pairs), statistics.mean(widths)
        print(f"| {' and '.join(parts)} | {len(pairs)} | {share:.0f}% | {width:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report", "draw"))
    parser.add_argument("--part", default="1/1", help="k/n: this process does every n-th cell from the k-th")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--shots", nargs="+", default=["all", "2", "1"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--clothing", type=Path, default=CLOTHING)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.what == "report":
        report(args.shots, args.seeds)
        return
    if args.what == "draw":
        draw(args.seeds)
        return
    k, n = parse_part(args.part)
    cells = [Cell(*parts) for parts in itertools.product(args.tasks, args.shots, args.seeds)]
    for cell in sorted(cells, key=lambda cell: (cell.seed, cell.shots != "all"))[k - 1 :: n]:
        if not cell.kept("folds").exists():
            run(cell, args.clothing)
            print(cell.name, flush=True)


if __name__ == "__main__":
    main()
