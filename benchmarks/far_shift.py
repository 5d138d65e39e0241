"""ATHA and its baselines across large domain shifts: 5-way episodes of digits and of silhouettes, on clipfit-tiny.

    python benchmarks/far_shift.py run [--part 1/2]     finished episodes are kept in benchmarks/results/far_shift
    python benchmarks/far_shift.py report               the tables, from what is finished
    python benchmarks/far_shift.py turn                 how far the edits turn the pre-trained model's embeddings

Needs scikit-learn for its handwritten digits (8 x 8 pixels, enlarged). Under full fine-tuning the settings are those
that clipfit-tiny carries, under LoRA the papers', but for two: at 5 shots CLIP-LoRA would take 2,500 steps of 25 images
(see LORA_AT_5), and no context vectors are learnt, which ATHA's authors do beside their adapters.
"""

import argparse
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from clipfit.verbs.episodes import finished
from PIL import Image
from sklearn.datasets import load_digits

from clipfit import EpisodesConfig, Recipe, episodes
from clipfit.config import parse_part
from clipfit.config.edits import EditSettings
from clipfit.data import layout
from clipfit.data.images import decode
from clipfit.measure.metrics import estimate
from clipfit.model.loading import load
from clipfit.model.named import Additions
from clipfit.prompts import prompts
from clipfit.report.console import Console, percent

HERE = Path(__file__).parent
RESULTS = HERE / "results/far_shift"
NAMES = "zero one two three four five six seven eight nine".split()
PER_DIGIT = 60
MANY = ("zero-shot", "finetune", "atha")
FEW = ("atha:head_ratio=0", "atha:tail_ratio=0", "cite", "cite+atha")  # tail only, head only
LORA = "finetune+lora"  # 500 steps at 1 shot
LORA_AT_5 = "finetune+lora:epochs=100,batch_size=5"  # 500 steps of 5 images, as at 1 shot: CLIP-LoRA has 2,500 of 25
CROPPED = "finetune+lora:crop_scale=[0.5,1]"  # the crops of clipfit-tiny's own settings, for CLIP-LoRA's
UNEDITED = "atha+lora:head_ratio=0,tail_ratio=0"  # ATHA's adapters and schedule without its edits
STRONGER = ("atha:head_strength=8,tail_strength=0.1", "atha:head_strength=80,tail_strength=1")
CALLED = {
    "atha:head_ratio=0": "atha, tail only", "atha:tail_ratio=0": "atha, head only", LORA_AT_5: LORA,
    UNEDITED: "atha+lora, no edits", CROPPED: "finetune+lora, gentle crops",
    STRONGER[0]: "atha, 10 × the strengths", STRONGER[1]: "atha, 100 × the strengths",
}  # fmt: skip
RUNS = (  # contenders, shots, episodes
    (MANY, 1, 60),
    (("atha+lora",), 1, 60),
    ((LORA,), 1, 60),
    (FEW, 1, 30),
    ((UNEDITED, *STRONGER), 1, 30),
    ((*MANY, *FEW, "atha+lora", LORA_AT_5, UNEDITED), 5, 30),
    ((CROPPED,), 1, 30),
)


def digits() -> Path:
    """load_digits as a folder of pictures, black on white, one folder a class; the first PER_DIGIT of each."""
    folder = HERE / "results/images/digits"
    found = load_digits()
    for label, name in enumerate(NAMES):
        (folder / f"number {name}").mkdir(parents=True, exist_ok=True)
        for k, pixels in enumerate(found.images[found.target == label][:PER_DIGIT]):
            grey = Image.fromarray((255 - pixels * 255 / 16).round().astype(np.uint8))
            file = folder / f"number {name}/{k:03d}.png"
            if not file.exists():  # another part may be reading it
                grey.resize((64, 64), Image.Resampling.BICUBIC).save(file)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report", "turn"))
    parser.add_argument("--part", default="1/1", help="k/n: this process does every n-th episode from the k-th")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.what == "run":
        run(parse_part(args.part))
    elif args.what == "report":
        report()
    else:
        turn()


def run(part: tuple[int, int]) -> None:
    """Every episode of RUNS that is not finished yet."""
    places = digits(), HERE / "tasks/silhouettes"
    for (contenders, shots, count), data in itertools.product(RUNS, places):
        config = EpisodesConfig(
            data, RESULTS / data.name, contenders, "clipfit-tiny", episodes=count, shots=(shots,), most_shots=5,
            part=part,
        )  # fmt: skip
        with Console() as console:
            episodes(config, console)


def report() -> None:
    """One table of all, then one for each kind of picture and number of shots, with paired differences at α = 1."""
    folders = sorted(path for path in RESULTS.iterdir() if path.is_dir())
    measured = {
        (f.name, shots, c): finished(f, c, shots, count) for f in folders for cs, shots, count in RUNS for c in cs
    }
    columns = sorted({key[:2] for key in measured})
    names = list(dict.fromkeys(called(c) for cs, _, _ in RUNS for c in cs))

    print("| method, α = 1 | " + " | ".join(f"{folder}, {shots}-shot" for folder, shots in columns) + " |")
    print("|---|" + "---|" * len(columns))
    for name in names:
        rows = {key[:2]: found for key, found in measured.items() if called(key[2]) == name}
        cells = [percent(estimate([at_one(r) for r in rows.get(column, {}).values()])) for column in columns]
        print(f"| {name} | {' | '.join(cells)} |")

    for folder, shots in columns:
        print(f"\n{folder}, 5-way, {shots}-shot\n")
        print("| method | α = 0.5 | α = 1 | minus zero-shot | minus finetune | episodes |\n|---|---|---|---|---|---|")
        for name, found in ((called(key[2]), found) for key, found in measured.items() if key[:2] == (folder, shots)):
            cells = [percent(estimate([r.get("0.5", at_one(r)) for r in found.values()]))]
            cells.append(percent(estimate([at_one(r) for r in found.values()])))
            for baseline in ("zero-shot", "finetune"):
                other = measured[folder, shots, baseline]
                gains = [at_one(r) - at_one(other[n]) for n, r in found.items() if n in other]
                cells.append("" if name == baseline else percent(estimate(gains)))
            print(f"| {name} | {' | '.join(cells)} | {len(found)} |")
        for one, other in (("atha+lora", UNEDITED), (CROPPED, LORA)):
            mine, theirs = measured.get((folder, shots, one), {}), measured.get((folder, shots, other), {})
            gains = [at_one(r) - at_one(theirs[n]) for n, r in mine.items() if n in theirs]
            if gains:
                what = f"{called(one)} minus {called(other)}"
                print(f"\n{what}, α = 1: {percent(estimate(gains))} ({len(gains)} episodes)")


@torch.no_grad()
def turn() -> None:
    """The angle between an image's embedding with the edits of untrained strengths and without them."""
    usual = EditSettings()
    print("| images | strengths | median angle | 95% of images below |\n|---|---|---|---|")
    for data in (digits(), HERE / "tasks/silhouettes"):
        found = layout.read(data)
        model = load("clipfit-tiny")
        pictures = [model.geometry(decode(sample.path)) for sample in (*found.train, *(found.test or ()))]
        images = model.normalize(torch.stack(pictures))  # (n, 3, H, W)
        plain = model.encode_image(images)  # (n, D)
        tokens = model.tokenize(prompts(found.names.values(), Recipe().template))
        for times in (1, 10, 100):
            head, tail = times * usual.head_strength, times * usual.tail_strength
            model = model.with_additions(Additions(replace(usual, head_strength=head, tail_strength=tail)))
            model.edits.start()
            edited, _ = model.encode(images, tokens)
            angles = 2 * ((plain - edited).norm(dim=1) / 2).asin().rad2deg()  # (n,); a cosine near 1 is too coarse
            print(f"| {data.name} | {times} × | {angles.median():.2f}° | {angles.quantile(0.95):.2f}° |")


def called(contender: str) -> str:
    return CALLED.get(contender, contender)


def at_one(result: dict[str, float]) -> float:
    """Accuracy at α = 1; of zero-shot CLIP its only one."""
    return result["1"] if "1" in result else result["0"]


if __name__ == "__main__":
    main()
