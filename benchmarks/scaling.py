"""A cost model of adapt, evaluate and predict: its terms measured one by one, then checked against whole commands.

    python benchmarks/scaling.py [--model ViT-B-32]
    python benchmarks/scaling.py --read-off [--rate 4e14] [--cores 16] [--view 4.8] [--crop 2.2]

Terms are products of counts (images, classes, epochs) with what one of them costs: forward and backward passes by
their FLOPs at the rates of the bare towers, decoding and cutting by the image, and a start, which is the command at its
least. Everything is the processor's count of seconds, one thread. The commands that are checked are larger than any
that was measured for the model. --read-off measures nothing: it is the model's arithmetic for large work on GPUs that
sustain so many FLOPs a second, with so many cores each, for which decoding takes so many milliseconds an image.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from predict import photographs, random_model
from step import Step, clip_of, floor_of

from clipfit.data.images import decode

RATIOS = 2  # that evaluate measures without --alpha: 0 and the run's own
TEXT = 10  # tokens of "a photo of a thing number 3."


# ---- the model


def transformer(tokens: float, width: int, layers: int) -> float:
    """FLOPs of a forward pass: products with weights, 12·width² of them in a block, and attention."""
    return layers * (24 * tokens * width**2 + 4 * tokens**2 * width)


def image_flops(config: dict[str, Any]) -> float:
    """Of one image in a vision transformer of open_clip's."""
    v = config["vision_cfg"]
    patches = (v.get("image_size", 224) // v["patch_size"]) ** 2
    return transformer(patches + 1, v["width"], v["layers"]) + 2 * patches * 3 * v["patch_size"] ** 2 * v["width"]


def text_flops(config: dict[str, Any], tokens: float = TEXT) -> float:
    return transformer(tokens, config["text_cfg"]["width"], config["text_cfg"]["layers"])


@dataclass(frozen=True)
class Costs:
    """Of one machine, in seconds. forward, backward: of an image; text: of a class, forward; update: of a step.

    view: decoding and cutting to what is measured. crop: cutting a training view of a decoded image.
    """

    forward: float
    backward: float
    text: float
    update: float
    view: float
    crop: float

    def predict(self, images: int, classes: int) -> float:
        return images * (self.view + self.forward) + classes * self.text

    def evaluate(self, images: int, classes: int) -> float:
        return images * (self.view + RATIOS * self.forward) + RATIOS * classes * self.text

    def adapt(self, classes: int, shots: int, epochs: int, batch: int) -> float:
        """With cite: each view forward and backward, and forward through the frozen tower; shots seen before and
        after; of texts, those of the classes in the batch, forward and backward."""
        images = classes * shots
        steps = epochs * -(-images // batch)
        texts = steps * min(classes, batch) * 3 * self.text + 3 * classes * self.text
        looks = images * (self.view + 2 * self.forward)
        return epochs * images * (self.crop + 2 * self.forward + self.backward) + texts + steps * self.update + looks


# ---- measuring


def median(work: Callable[[], Any], turns: int = 3) -> float:
    work()
    seconds = []
    for _ in range(turns):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return statistics.median(seconds)


def costs_of(model: str, pictures: list[Path]) -> Costs:
    """By the bare parts."""
    from torchvision.transforms.functional import pil_to_tensor

    from clipfit.data.augment import random_crop, resized

    clip, batch = clip_of(model, "finetune"), 16
    visual, config = clip.model.visual, open_clip.get_model_config(model)
    images = torch.randn(batch, 3, *clip.image_size)

    @torch.no_grad()
    def forward() -> None:
        visual(images)

    ahead = median(forward) / batch
    whole = median(floor_of(visual, images)) / batch
    step = Step.of(model, "finetune", 4, 2, "fp32")
    step()
    tensors = [pil_to_tensor(decode(p)) for p in pictures[:8]]
    draw = torch.Generator().manual_seed(0)
    return Costs(
        forward=ahead,
        backward=whole - ahead,
        text=ahead * text_flops(config) / image_flops(config),
        update=median(lambda: step.trained.step(1.0)),
        view=median(lambda: [clip.geometry(decode(p)) for p in pictures[:8]]) / 8,
        crop=median(lambda: [resized(random_crop(t, (0.5, 1.0), (0.75, 1.33), draw), clip.image_size) for t in tensors])
        / 8,
    )


def command(*arguments: object) -> float:
    """Seconds of the processor that a command of clipfit's takes."""
    before = os.times()
    given = [sys.executable, "-m", "clipfit", *map(str, arguments)]
    done = subprocess.run(given, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


class Bench:
    """Folders of pictures, and the commands on them."""

    def __init__(self, root: Path, model: str, pictures: list[Path]):
        self.root, self.pictures = root, pictures
        self.model = random_model(root / "model", model)

    def folder(self, name: str, classes: int, each: int, first: int = 0) -> Path:
        """As many different pictures in class folders, from picture `first` on."""
        place = self.root / name
        for k in range(classes):
            (place / f"thing number {k}").mkdir(parents=True)
            for picture in self.pictures[first + k * each : first + (k + 1) * each]:
                shutil.copy(picture, place / f"thing number {k}")
        return place

    def adapt(self, classes: int, shots: int, epochs: int, batch: int = 16) -> float:
        name = f"adapt-{classes}-{shots}-{epochs}"
        return command("adapt", self.folder(name, classes, shots), "--model", self.model, "--epochs", epochs,
                       "--batch-size", batch, "--output", self.root / f"{name}-run")  # fmt: skip

    def predict(self, images: int, classes: int) -> float:
        names = self.root / f"{classes}.txt"
        names.write_text("\n".join(f"thing number {k}" for k in range(classes)), "utf-8")
        place = self.folder(f"predict-{images}-{classes}", 1, images)
        return command("predict", "--model", self.model, "--classes", names, place, "--output",
                       self.root / f"predict-{images}-{classes}.jsonl")  # fmt: skip

    def evaluate(self, run: Path, images: int, classes: int) -> float:
        """Of pictures that are not among the two shots of the run."""
        place = self.folder(f"evaluate-{images}-{classes}", classes, images // classes, 2)
        return command("evaluate", run, "--data", place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--read-off", action="store_true")
    parser.add_argument("--rate", type=float, default=4e14)
    parser.add_argument("--cores", type=int, default=16)
    parser.add_argument("--view", type=float, default=4.8)
    parser.add_argument("--crop", type=float, default=2.2)
    args = parser.parse_args()
    if args.read_off:
        read_off(args)
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        pictures = photographs(root / "pictures", 128)
        costs = costs_of(args.model, pictures)
        bench = Bench(root, args.model, pictures)
        config = open_clip.get_model_config(args.model)
        print(f"{args.model}, JPEGs of 500 x 375, torch {torch.__version__}, one thread, fp32\n")
        print("| term | milliseconds | GFLOP a second |\n|---|---|---|")
        for name, seconds in vars(costs).items():
            flops = {"forward": 1, "backward": 2}.get(name, 0) * image_flops(config)
            print(f"| {name} | {1000 * seconds:.1f} | {f'{flops / seconds / 1e9:.0f}' if flops else ''} |", flush=True)
        least = (2, 1, 1, 16)
        starts = {"adapt": bench.adapt(*least) - costs.adapt(*least)}
        run = root / "adapt-2-1-1-run"
        starts["predict"] = bench.predict(1, 2) - costs.predict(1, 2)
        starts["evaluate"] = bench.evaluate(run, 2, 2) - costs.evaluate(2, 2)
        for name, seconds in starts.items():
            print(f"| start of {name} | {1000 * seconds:.0f} | |")
        print("\n| command | model, s | found, s | found / model |\n|---|---|---|---|")
        for classes, shots, epochs in ((2, 8, 4), (8, 4, 2), (16, 4, 1)):
            told = starts["adapt"] + costs.adapt(classes, shots, epochs, 16)
            found = bench.adapt(classes, shots, epochs)
            _line(f"adapt, {classes} classes × {shots} shots × {epochs} epochs", told, found)
        for images, classes in ((64, 2), (128, 500)):
            told = starts["predict"] + costs.predict(images, classes)
            _line(f"predict, {images} images, {classes} classes", told, bench.predict(images, classes))
        for images in (64, 96):
            told = starts["evaluate"] + costs.evaluate(images, 2)
            _line(f"evaluate, {images} images, {RATIOS} ratios", told, bench.evaluate(run, images, 2))


LARGE = ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336")


def read_off(args: argparse.Namespace) -> None:
    """What the terms come to where there is more of everything."""
    classes, shots, epochs = 1000, 16, 20
    views = classes * shots * epochs
    decoding = views * (args.view + args.crop) / 1000 / args.cores
    print(f"A GPU that sustains {args.rate / 1e12:.0f} TFLOP a second, {args.cores} cores beside it. adapt, cite: "
          f"{classes:,} classes × {shots} shots × {epochs} epochs, which the cores would decode and cut in "
          f"{decoding:.0f} s if nothing were kept. predict: 10⁹ images, {1e6 * args.view / 3600:.0f} core hours of "
          f"decoding, {1000 * args.cores / args.view:.0f} images a second by its cores.\n")  # fmt: skip
    print("| model | GFLOP an image | adapt, PFLOP | adapt, s | predict, GPU hours | images a second by the GPU |")
    print("|---|---|---|---|---|---|")
    for name in LARGE:
        config = open_clip.get_model_config(name)
        image, text = image_flops(config), text_flops(config)
        work = views * (4 * image + 3 * text)  # twice forward and once backward; at most a text for every image
        print(f"| {name} | {image / 1e9:.1f} | {work / 1e15:.0f} | {work / args.rate:.0f} | "
              f"{1e9 * image / args.rate / 3600:.0f} | {args.rate / image:.0f} |")  # fmt: skip


def _line(name: str, told: float, found: float) -> None:
    print(f"| {name} | {told:.1f} | {found:.1f} | **{found / told:.2f}** |", flush=True)


if __name__ == "__main__":
    main()
