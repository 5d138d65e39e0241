"""ATHA and its baselines across large domain shifts: 5-way episodes of digits and of silhouettes, on clipfit-tiny.

    python benchmarks/far_shift.py run [--part 1/2]     finished episodes are kept in benchmarks/results/far_shift
    python benchmarks/far_shift.py report               the tables, from what is finished

Needs scikit-learn for its handwritten digits (8 x 8 pixels, enlarged). Settings stand in ROWS: the papers' own, but
for CLIP-LoRA's 500 steps a shot, which become 100 steps on all shots at once, as many as atha+lora takes.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from clipfit import EpisodesConfig, episodes
from clipfit.config import parse_part
from clipfit.progress import Progress
from clipfit.report.console import Console

HERE = Path(__file__).parent
RESULTS = HERE / "results/far_shift"
NAMES = "zero one two three four five six seven eight nine".split()
PER_DIGIT = 60
MANY = ("zero-shot", "finetune", "finetune+lora:epochs=100,batch_size=25", "atha", "atha+lora")
FEW = ("atha:head_ratio=0", "atha:tail_ratio=0", "cite", "cite+atha")  # tail only, head only
COUNTS = ((MANY, 1, 60), (FEW, 1, 30), (MANY + FEW, 5, 30))  # contenders, shots, episodes


def digits() -> Path:
    """load_digits as a folder of pictures, black on white, one folder a class; the first PER_DIGIT of each."""
    folder = RESULTS / "digits"
    found = load_digits()
    for label, name in enumerate(NAMES):
        (folder / f"number {name}").mkdir(parents=True, exist_ok=True)
        for k, pixels in enumerate(found.images[found.target == label][:PER_DIGIT]):
            grey = Image.fromarray((255 - pixels * 255 / 16).round().astype(np.uint8))
            grey.resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"number {name}/{k:03d}.png")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--part", default="1/1", help="k/n: this process does every n-th episode from the k-th")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for data in (digits(), HERE / "tasks/silhouettes"):
        with Console() as console:
            for contenders, shots, count in COUNTS:
                show(data, contenders, shots, count, args.what == "run", args.part, console)


def show(
    data: Path, contenders: tuple[str, ...], shots: int, count: int, running: bool, part: str, console: Console
) -> None:
    progress: Progress | None = console if running else None
    named = ("zero-shot", *(c for c in contenders if c != "zero-shot"))
    config = EpisodesConfig(
        data, RESULTS / data.name / "episodes", named, "clipfit-tiny", episodes=count, shots=(shots,), most_shots=5,
        part=parse_part(part) if running else (count + 1, count + 1),
    )  # fmt: skip
    console.compared(episodes(config, progress))


if __name__ == "__main__":
    main()
