"""What the way of images to a step costs: `adapt` beside its own bare step, decoding and cropping, and accuracy.

    python benchmarks/input.py steps [--model ViT-B-32] [--epochs 20] [--shots 32] [--threads 2]
    python benchmarks/input.py costs
    python benchmarks/input.py launches [--turns 20]
    python benchmarks/input.py accuracy FOLDER [--seeds 10] [--least 0.5 0.08]

steps: a model with random weights adapts (cite) to JPEGs that are drawn here, with all of them in the cache and with
none. The bare step is the same loop on one batch that is ready, before and after. The ratio hardly depends on the
number of shots and epochs: each step cuts as many images; the first alone waits for its own. Seconds are those of a
step: `adapt`'s whole training by its steps, the first included, which the bare step's leave out. The last column is the
processor time of a step of `adapt` over the bare one's: what input takes of the cores, whoever else is on them.

costs: the processor's milliseconds an image, on one thread, of what training did with whole pictures and does with
reduced ones; and how much a crop of the one differs from the same crop of the other: the mean of absolute differences,
white being 255.

launches: what threads beside it cost a thread that launches small operators, one after another, as a step on a GPU
does; seen without one.

accuracy: cite with clipfit-tiny on FOLDER/train, whose photographs are large beside its 64 pixels, measured on
FOLDER/test, at every seed once with whole pictures and once with reduced ones: the mean difference with its 95%
interval over seeds (Student's t), and the standard deviation between seeds, which crops of other places alone make.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from predict import random_model
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import pil_to_tensor, resized_crop

from clipfit import AdaptConfig, Recipe, adapt
from clipfit.adaptation import Adaptation
from clipfit.data import layout
from clipfit.data.ahead import ahead, cores
from clipfit.data.augment import Enough, random_crop, resized
from clipfit.data.images import ImageStore, Memory, Views, decode, decoded
from clipfit.data.loaded import ShotFiles
from clipfit.ensemble import interpolate
from clipfit.events import Silent, StepReport
from clipfit.measure import scoring
from clipfit.measure.metrics import estimate
from clipfit.methods import METHODS, Task
from clipfit.model import loading
from clipfit.prompts import prompts
from clipfit.runs import start
from clipfit.training import loop
from clipfit.training.input import Input, Schedule

SIZES = ((500, 375), (4000, 3000))
CLASSES = 4
RATIOS = (0.5, 1.0)


# ---- pictures that cost what photographs do


def drawn(size: tuple[int, int], seed: int) -> Image.Image:
    """Smooth noise of every scale, shapes and grain: some 2.5 bits a pixel as a JPEG of quality 90."""
    draw, (width, height) = np.random.default_rng(seed), size
    pixels = np.zeros((height, width, 3), np.float32)
    for cells in (8, 32, 128, 512):
        few = draw.integers(0, 255, (max(2, cells * height // 3000), max(2, cells * width // 3000), 3), dtype=np.uint8)
        pixels += np.asarray(Image.fromarray(few).resize(size, Image.Resampling.BICUBIC), np.float32) / 4
    pixels += draw.normal(0, 4, (height, width, 1)).astype(np.float32)
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for _ in range(12):
        x, y, w, h = (draw.random(4) * (width, height, width / 4, height / 4)).tolist()
        pen.ellipse((x, y, x + w, y + h), fill=tuple(draw.integers(0, 255, 3).tolist()))
    return picture


def folder_of(place: Path, size: tuple[int, int], count: int) -> Path:
    """Classes of JPEGs. Every fourth is drawn, the others are its pixels in another place."""
    for number in range(count):
        if number % 4 == 0:
            pixels = np.asarray(drawn(size, number))
        folder = place / f"class {number % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        turned = np.roll(pixels, (number % 4) * size[0] // 4, 1)
        Image.fromarray(turned).save(folder / f"{number}.jpg", quality=90)
    return place


# ---- adapt beside its own step


class Ready(Schedule):
    """Every step has the same batch, which costs nothing."""

    def inputs(self, images: object, size: tuple[int, int], *_: object, **__: object) -> Generator[Input, None, None]:
        """As Schedule's."""
        crops = torch.randint(0, 256, (len(self.step(0)[1]), 3, *size), dtype=torch.uint8)
        for step in range(self.steps):
            epoch, views = self.step(step)
            yield Input(step, epoch, views, range(len(views)), crops)


class Watch(Silent):
    """When steps ended, by the clock and in seconds of all cores."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def step(self, report: StepReport) -> None:
        """One more."""
        self.ends.append((time.perf_counter(), time.process_time()))

    def a_step(self) -> tuple[float, float]:
        """What each took, but for the first."""
        first, last = self.ends[0], self.ends[-1]
        return (last[0] - first[0]) / (len(self.ends) - 1), (last[1] - first[1]) / (len(self.ends) - 1)


def bare(model: str, shots: int, recipe: Recipe) -> tuple[float, float]:
    """A step of the loop without input."""
    clip, method, watch = loading.load(model), METHODS["cite"], Watch()
    names = [f"class {c}" for c in range(CLASSES)]
    task = Task(clip, clip.tokenize(prompts(names, recipe.template)))
    objective = method.build(task, method.configure({}))
    schedule = Ready([number % CLASSES for number in range(shots)], recipe, 0)
    with loop.deterministic(clip.device):
        loop.train(clip, objective, range(shots), schedule, watch.step)  # type: ignore[arg-type]
    return watch.a_step()


def steps(args: argparse.Namespace) -> None:
    """The table of `steps`."""
    torch.set_num_threads(args.threads)
    recipe = Recipe(learning_rate=1e-9, epochs=args.epochs)
    short = replace(recipe, epochs=args.bare)
    print(
        f"{args.model}, cite, {args.shots} shots of {CLASSES} classes, batch {recipe.batch_size}, "
        f"{args.epochs} epochs, torch {torch.__version__}, {args.threads} threads, {cores()} cores, fp32, "
        f"bf16 {bf16()}\n"
    )
    print("| JPEGs | in the cache | bare, s | `adapt`, s | speed of the bare step | cores' time of the bare step |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        model = str(random_model(Path(folder) / "model", args.model))
        for size in SIZES:
            place = folder_of(Path(folder) / f"{size[0]}", size, args.shots)
            for cache in (2**31, 0):
                watch, before = Watch(), bare(model, args.shots, short)
                config = AdaptConfig(
                    place, "cite", model, cache_bytes=cache, output=Path(folder) / "run", overwrite=True,
                    precision="fp32", device="cpu", recipe={"epochs": args.epochs, "learning_rate": 1e-9},
                )  # fmt: skip
                run = adapt(config, watch).run
                after = bare(model, args.shots, short)
                clock, busy = ((one + other) / 2 for one, other in zip(before, after, strict=True))
                done = json.loads((run / "timing.json").read_text("utf-8"))["training_seconds"] / len(watch.ends)
                kept = "all" if cache else "none"
                print(
                    f"| {size[0]}×{size[1]} | {kept} | {clock:.2f} | {done:.2f} | {clock / done:.2f} | "
                    f"{watch.a_step()[1] / busy:.2f} |",
                    flush=True,
                )


def bf16() -> str:
    """Whether the processor has products in bf16."""
    has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "yes" if has else "no"


# ---- decoding and cropping


def costs(_args: argparse.Namespace) -> None:
    """The table of `costs`."""
    torch.set_num_threads(1)
    recipe = Recipe()
    how = recipe.crop_scale, recipe.crop_ratio
    enough = Enough.of((224, 224), *how)
    print(f"224×224 crops, the paper's recipe, torch {torch.__version__}, 1 thread, cpu; ms an image\n")
    print(
        "| JPEG | training has | MB | decode | crop | both | full crop differs | smallest crop |"
        "\n|---|---|---|---|---|---|---|---|"
    )
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a.jpg"
            drawn(size, 0).save(path, quality=90)
            whole = read(path, None)
            for name, given in (("whole", None), ("reduced", enough)):
                image = read(path, given)
                decoding = fastest(functools.partial(read, path, given), 5)
                cutting = fastest(functools.partial(crops, image, how), 3) / 32
                print(
                    f"| {size[0]}×{size[1]} | {name}: {image.shape[2]}×{image.shape[1]} | {image.numel() / 1e6:.1f} | "
                    f"{decoding:.1f} | {cutting:.1f} | {decoding + cutting:.1f} | {differs(whole, image, 1):.2f} | "
                    f"{differs(whole, image, recipe.crop_scale[0] ** 0.5):.2f} |",
                    flush=True,
                )


def read(path: Path, enough: Enough | None) -> torch.Tensor:
    """As training has it."""
    return pil_to_tensor(decode(path, enough=enough))


def crops(image: torch.Tensor, how: tuple[tuple[float, float], ...]) -> None:
    """32 of one image."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(32):
        resized(random_crop(image, how[0], how[1], draw), (224, 224))


def fastest(work: Callable[[], object], times: int) -> float:
    """Milliseconds of the processor."""
    found = []
    for _ in range(times):
        began = time.thread_time()
        work()
        found.append(time.thread_time() - began)
    return 1e3 * min(found)


def differs(one: torch.Tensor, other: torch.Tensor, side: float) -> float:
    """The mean absolute difference of the same crop of two pictures of one thing, from their middle.

    side: the crop's to the picture's. Its edges are pixels' edges in both pictures.
    """
    boxes: list[list[int]] = [[], []]
    for whole, reduced in zip(one.shape[1:], other.shape[1:], strict=True):
        parts = math.gcd(whole, reduced)
        length = round(side * parts)
        for box, pixels in zip(boxes, (whole, reduced), strict=True):
            box += [(parts - length) // 2 * pixels // parts, length * pixels // parts]
    seen = [
        resized_crop(image, top, left, height, width, [224, 224], InterpolationMode.BICUBIC, antialias=True).float()
        for image, (top, height, left, width) in zip((one, other), boxes, strict=True)
    ]
    return float((seen[0] - seen[1]).abs().mean())


# ---- threads beside one that launches


def launches(args: argparse.Namespace) -> None:
    """The table of `launches`."""
    torch.set_num_threads(1)
    how = Recipe().crop_scale, Recipe().crop_ratio
    pictures = [pil_to_tensor(drawn(SIZES[0], number)) for number in range(4)]

    def cut(number: int) -> torch.Tensor:
        return random_crop(pictures[number % 4], *how, torch.Generator().manual_seed(number))

    beside: dict[str, Callable[[int], torch.Tensor] | None] = {
        "none": None,
        "resize crops, as for a processor": lambda number: resized(cut(number), (224, 224)),
        "copy what crops show, as for a GPU": lambda number: cut(number).contiguous(),
    }
    print(f"{SMALL} operators on 16 numbers, torch {torch.__version__}, {cores()} cores, {args.turns} turns\n")
    print("| threads | ms, median | of alone |\n|---|---|---|")
    alone = 0.0
    for name, work in beside.items():
        found = 1e3 * launched(work, args.turns)
        alone = alone or found
        print(f"| {name} | {found:.1f} | {found / alone:.1f} |", flush=True)


SMALL = 2400  # operators, as many as a step of cite launches on a GPU


def launched(beside: Callable[[int], torch.Tensor] | None, turns: int) -> float:
    """Seconds by the clock that a thread takes for many small operators, beside threads that are two batches ahead."""
    found, numbers = [], torch.ones(16)
    with contextlib.closing(ahead(range(32 * (turns + 2)), beside or (lambda number: numbers), 64)) as crops:
        for _ in range(turns):
            for _ in range(32 if beside else 0):
                next(crops)
            began, value = time.perf_counter(), numbers
            for _ in range(SMALL):
                value = value * 1.0001
            found.append(time.perf_counter() - began)
    return float(np.median(found))


# ---- accuracy


def accuracy(args: argparse.Namespace) -> None:
    """The table of `accuracy`."""
    torch.set_num_threads(1)
    print(f"clipfit-tiny, cite, {args.folder.name}, {args.seeds} seeds, torch {torch.__version__}, 1 thread, cpu\n")
    print(
        "| crops show | α | whole | reduced | difference, points | of whole, between seeds |\n|---|---|---|---|---|---|"
    )
    for scale in ((least, 1.0) for least in args.least):
        pairs = [
            [measured(args.folder, scale, seed, reduced) for reduced in (False, True)] for seed in range(args.seeds)
        ]
        for place, alpha in enumerate(RATIOS):
            whole, reduced = ([100 * pair[k][place] for pair in pairs] for k in (0, 1))
            gap = estimate([b - a for a, b in zip(whole, reduced, strict=True)])
            print(
                f"| {scale[0]:g} to {scale[1]:g} | {alpha} | {np.mean(whole):.1f}% | {np.mean(reduced):.1f}% | "
                f"{gap.mean or 0:+.2f} ± {gap.half_width or math.nan:.2f} | {np.std(whole, ddof=1):.2f} |",
                flush=True,
            )


def measured(folder: Path, scale: tuple[float, float], seed: int, reduced: bool) -> Sequence[float]:
    """The share of the test images of the shots' classes that are named rightly, at every ratio."""
    config = AdaptConfig(folder, "cite", "clipfit-tiny", seed=seed, recipe={"crop_scale": scale})
    origin, chosen = start.find(config.model, None), ShotFiles.of(config)
    method = METHODS[config.method]
    adaptation = Adaptation.resolve(method, method.configure({}), config, origin.adapt_defaults, chosen.counts)
    clip = origin.load(config.method, adaptation.additions, False, torch.device("cpu"))
    pretrained, samples, base = clip.snapshot(), chosen.selection.shots, chosen.selection.base
    images = ImageStore(
        samples, Memory(2**31), functools.partial(decoded, enough=adaptation.enough(clip) if reduced else None)
    )
    adaptation.run(clip, base, images, [base.index(sample.label) for sample in samples], pretrained)
    finetuned = clip.snapshot()
    wanted = [sample for sample in layout.read(folder).test or () if sample.label in base]
    views = ImageStore(wanted, Memory(2**31), Views(clip.geometry, None).read)
    found = []
    for alpha in RATIOS:
        clip.load_state(interpolate(pretrained, finetuned, alpha))
        t, z = scoring.texts(clip, base, adaptation.templates)
        names = scoring.best_names(scoring.image_embeddings(clip, views, range(len(views)), 64, z), t, base)
        found.append(sum(n == s.label for n, s in zip(names, wanted, strict=True)) / len(wanted))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = parser.add_subparsers(required=True)
    one = tables.add_parser("steps")
    one.add_argument("--model", default="ViT-B-32", help="an architecture of open_clip's")
    one.add_argument("--epochs", type=int, default=20)
    one.add_argument("--shots", type=int, default=32)
    one.add_argument("--bare", type=int, default=6, help="epochs of the bare step, before and after")
    one.add_argument("--threads", type=int, default=2)
    one.set_defaults(do=steps)
    tables.add_parser("costs").set_defaults(do=costs)
    launching = tables.add_parser("launches")
    launching.add_argument("--turns", type=int, default=20)
    launching.set_defaults(do=launches)
    other = tables.add_parser("accuracy")
    other.add_argument("folder", type=Path)
    other.add_argument("--seeds", type=int, default=10)
    other.add_argument("--least", type=float, nargs="+", default=[0.5, 0.08], help="share that a crop shows at least")
    other.set_defaults(do=accuracy)
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
