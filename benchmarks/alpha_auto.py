"""What `--alpha auto` and the forecast are worth: every task with known answers, against the best α in hindsight.

    python benchmarks/alpha_auto.py run [--part k/n] [--seeds 0 1 2] [--shots all 2 1] [--tasks example digits …]
    python benchmarks/alpha_auto.py report        the tables of docs/alpha.md, from what was run

A cell is a task, a number of shots a class and a seed: CITE on clipfit-tiny, with its own settings. `run` keeps the
logits of the test images at every ratio, and those of the folds, in benchmarks/results/alpha/; a finished cell is not
run again. `report` chooses α, temperature and forecast from the folds as `adapt` does, and looks at the test images
only then. Digits need scikit-learn; clothing, photographs, is read from --clothing, a folder with train/ and test/.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clipfit import AdaptConfig, methods
from clipfit.adaptation import Adaptation
from clipfit.config import parse_part
from clipfit.data import layout
from clipfit.data.images import ImageStore, grey_bits
from clipfit.data.loaded import ShotFiles, Shots
from clipfit.events import Silent
from clipfit.folding import Subject, carry_out, score
from clipfit.measure.folds import RATIOS, Scores, folds_of
from clipfit.runs import files, start

HERE = Path(__file__).parent
RESULTS = HERE / "results/alpha"
DIGITS = "zero one two three four five six seven eight nine".split()
TASKS = ("example", "a", "b", "c", "silhouettes", "halftone", "digits", "clothing")
CLOTHING = HERE.parent.parent / "shared/data/clothing"


def place_of(task: str, clothing: Path) -> Path:
    """The folder of a task, with train/ and test/."""
    if task == "digits":
        return digits()
    return {"example": HERE.parent / "examples/shots", "clothing": clothing}.get(task, HERE / "tasks" / task)


def digits() -> Path:
    """scikit-learn's handwritten digits, black on white: eight of each to train on, forty to test."""
    from sklearn.datasets import load_digits

    folder, found = HERE / "results/images/alpha-digits", load_digits()
    for label, name in enumerate(DIGITS):
        for k, pixels in enumerate(found.images[found.target == label][:48]):
            file = folder / ("train" if k < 8 else "test") / name / f"{k + 1:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                grey = Image.fromarray((255 - pixels * 255 / 16).astype(np.uint8))
                grey.resize((64, 64), Image.Resampling.BICUBIC).save(file)
    return folder


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
    shots, pretrained = Shots.of(chosen, config), clip.snapshot()
    subject = Subject(adaptation, clip, pretrained, shots.base, shots.images, shots.labels)
    if not cell.kept("test").exists():
        adaptation.run(clip, shots.base, shots.images, shots.labels, pretrained)
        finetuned = clip.snapshot()
        found = layout.read(place)
        samples = found.test or ()
        new = [name for name in dict.fromkeys(s.label for s in samples) if name not in shots.base]
        names = [*shots.base, *(name for name in found.names.values() if name in new)]
        images = ImageStore(samples, 2**31, clip.geometry, grey_bits=grey_bits(samples))
        labels = [names.index(sample.label) for sample in samples]
        tested = score(subject, finetuned, images, range(len(samples)), labels, names, RATIOS)
        keep(cell.kept("test"), [tested], {"base": len(shots.base), "new": len(new)})
    folds = folds_of(shots.labels, [found.pixels for found in shots.prints], cell.seed)
    scores = carry_out(subject, folds, RATIOS, Silent(), None)
    keep(cell.kept("folds"), scores, {"kinds": [fold.kind for fold in folds]})


def keep(path: Path, tables: Sequence[Scores], about: dict[str, object]) -> None:
    """Logits and labels by number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pairs = {f"{key}{k}": getattr(table, key) for k, table in enumerate(tables) for key in ("logits", "labels")}
    files.write_tensors(path, pairs, about)


def kept(path: Path) -> tuple[list[Scores], dict[str, object]]:
    """What `keep` wrote."""
    tensors, about = files.read_tensors(path)
    return [Scores(tensors[f"logits{k}"], tensors[f"labels{k}"]) for k in range(len(tensors) // 2)], about


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--part", default="1/1", help="k/n: this process does every n-th cell from the k-th")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--shots", nargs="+", default=["all", "2", "1"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--clothing", type=Path, default=CLOTHING)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    k, n = parse_part(args.part)
    cells = [Cell(*parts) for parts in itertools.product(args.tasks, args.shots, args.seeds)]
    for cell in sorted(cells, key=lambda cell: (cell.seed, cell.shots != "all"))[k - 1 :: n]:
        if not cell.kept("folds").exists():
            run(cell, args.clothing)
            print(cell.name, flush=True)
