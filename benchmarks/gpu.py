"""Steps on a GPU, beside what a GPU can do and beside two repositories' loops; and ImageNet's base half, end to end.

    python benchmarks/gpu.py [--model ViT-B-16] [--batches 32 128] [--classes 10 100 1000] [--turns 20]
                             [--base 500x16x20] [--device cuda] [--compile]

Images are synthetic, weights random: what is measured is speed alone. One process for everything, rows one after
another, each with the GPU to itself: medians over turns, and the most memory that torch held, weights included.
"floor" is the image tower forward and backward alone, without a teacher, texts or optimiser. The loops of other
repositories are written anew from what theirs do in a step: CLIP-LoRA (LoRA of rank 2 in both towers, fp16 with a
scaler, the texts of all classes in every step) and FLYP (every weight, fp32, a text of the whole context for every
image, the batch's contrastive loss).
--compile adds the floor under torch.compile, in whose memory compiling is.
--base CLASSESxSHOTSxEPOCHS is `adapt --method cite` on JPEGs of 500 x 375, from files to a run on disk.
`--device cpu --model clipfit-tiny --batches 4 --classes 3 --turns 1 --base 2x2x1` tries the script without a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from predict import photographs, random_model
from step import Step, clip_of, floor_of

from clipfit import AdaptConfig, adapt
from clipfit.config.lora import LoraSettings
from clipfit.model import devices, lora
from clipfit.model.clip import Clip
from clipfit.model.lora import Adapters
from clipfit.prompts import prompts
from clipfit.streams import Rows
from clipfit.version import __version__

Work = Callable[[], None]


def names(classes: int) -> list[str]:
    return [f"thing number {k}" for k in range(classes)]


class OneDraw(Adapters):
    """Dropout as other repositories draw it, all at once: not row by row, each from a stream of its own."""

    def mask(self, tower: str, block: int, length: int, width: int) -> torch.Tensor:
        assert self.rows is not None
        shape = (3, len(self.rows.numbers), length, width)
        return torch.rand(shape, device=self._device) >= self.settings.dropout


def like_clip_lora(clip: Clip, images: torch.Tensor, labels: torch.Tensor, classes: int) -> Work:
    """One step as the repository of arXiv 2405.18541 takes it; `clip` has its adapters on."""
    weights = [p for p in clip.model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in weights) < sum(p.numel() for p in clip.model.parameters()) / 10
    optimiser = torch.optim.AdamW(weights, lr=1e-9, weight_decay=1e-2)
    device = images.device.type
    half = torch.float16 if device == "cuda" else torch.bfloat16
    scaler = torch.amp.GradScaler(device, enabled=device == "cuda")
    rows = Rows(0, tuple(range(classes)))

    def run() -> None:
        texts = clip.tokenize(prompts(names(classes), "a photo of a {}.")).to(images.device)
        with torch.amp.autocast(device, half), clip.drawing(rows):
            t = clip.model.encode_text(texts)
        with torch.amp.autocast(device, half), clip.drawing(Rows(0, tuple(range(len(images))))):
            u = clip.model.encode_image(images)
        t, u = t / t.norm(dim=-1, keepdim=True), u / u.norm(dim=-1, keepdim=True)
        loss = F.cross_entropy(clip.scale * u @ t.t(), labels)
        loss.item()
        optimiser.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()

    return run


def like_flyp(clip: Clip, images: torch.Tensor, labels: torch.Tensor, classes: int) -> Work:
    """One step as the repository of arXiv 2212.00638 takes it."""
    optimiser = torch.optim.AdamW([p for p in clip.model.parameters() if p.requires_grad], lr=1e-9, weight_decay=0.1)
    written = names(classes)
    texts = clip.tokenize(prompts([written[k] for k in labels.tolist()], "a photo of a {}."))

    def run() -> None:
        optimiser.zero_grad()
        u = F.normalize(clip.model.encode_image(images), dim=-1)
        t = F.normalize(clip.model.encode_text(texts.to(images.device)), dim=-1)
        logits = clip.scale * u @ t.T
        own = torch.arange(len(images), device=images.device)
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        loss.backward()
        optimiser.step()
        loss.item()

    return run


def rows(args: argparse.Namespace, device: torch.device, size: int, classes: int) -> dict[str, Callable[[], Work]]:
    """By name, how each row's step is made ready."""
    precision = args.precision

    def floor(kind: str, compiled: bool = False) -> Work:
        clip = clip_of(args.model, "finetune", device)
        images = torch.randn(size, 3, *clip.image_size, device=device)
        tower = clip.model.visual
        run = floor_of(torch.compile(tower) if compiled else tower, images)

        def typed() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=kind == "bf16"):
                run()

        return typed

    def other(loop: Callable[..., Work]) -> Work:
        clip = clip_of(args.model, "finetune", device)
        images = torch.randn(size, 3, *clip.image_size, device=device)
        labels = torch.arange(size, device=device) % classes
        if loop is like_clip_lora:
            clip.adapters = lora.attach(clip.model, OneDraw(LoraSettings(rank=2, alpha=1.0, dropout=0.25), 0, device))
        return loop(clip, images, labels, classes)

    types = dict.fromkeys(["fp32", precision])
    found: dict[str, Callable[[], Work]] = {f"floor, {kind}": lambda kind=kind: floor(kind) for kind in types}  # type: ignore[misc]
    if args.compile:
        found[f"compiled floor, {precision}"] = lambda: floor(precision, compiled=True)
    for method in ("cite", "atha", "finetune"):
        found[f"{method}, {precision}"] = lambda method=method: Step.of(  # type: ignore[misc]
            args.model, method, classes, size, precision, device
        )
    found["CLIP-LoRA's loop, fp16"] = lambda: other(like_clip_lora)
    found["FLYP's loop, fp32"] = lambda: other(like_flyp)
    return found


def timed(work: Work, turns: int, device: torch.device) -> float:
    """Median seconds of a step, of those after three."""
    seconds = []
    for turn in range(turns + 3):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if turn >= 3:
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def memory(device: torch.device) -> str:
    return f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if device.type == "cuda" else "–"


def steps(args: argparse.Namespace, device: torch.device) -> None:
    print("| batch | classes | step | images a second | of the floor | memory, GiB |\n|---|---|---|---|---|---|")
    for size in args.batches:
        for classes in args.classes:
            floors: dict[str, float] = {}
            for name, ready in rows(args, device, size, classes).items():
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                try:
                    speed = size / timed(ready(), args.turns, device)
                except torch.OutOfMemoryError:
                    print(f"| {size} | {classes} | {name} | out of memory | – | – |", flush=True)
                    continue
                kind = name.rpartition(" ")[2]
                if name.startswith("floor"):
                    floors[kind] = speed
                floor = floors.get(kind, floors.get("bf16"))  # of fp16: bf16's
                share = f"{speed / floor:.2f}" if floor else "–"
                print(f"| {size} | {classes} | {name} | {speed:.0f} | {share} | {memory(device)} |", flush=True)


def base_half(args: argparse.Namespace, device: torch.device) -> None:
    """`adapt` on files, at the size of the base half of ImageNet."""
    classes, shots, epochs = map(int, args.base.split("x"))
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        pictures = photographs(root / "pictures", classes * shots)
        for number, picture in enumerate(pictures):
            folder = root / "shots" / names(classes)[number // shots]
            folder.mkdir(parents=True, exist_ok=True)
            picture.rename(folder / picture.name)
        model = args.model if args.model == "clipfit-tiny" else str(random_model(root / "model", args.model))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        config = AdaptConfig(root / "shots", "cite", model, device=args.device, precision=args.precision,
                             recipe={"epochs": epochs}, output=root / "run", cache_bytes=8 * 2**30)  # fmt: skip
        done = adapt(config)
        training = json.loads((root / "run" / "timing.json").read_text())["training_seconds"]
    images = classes * shots * epochs
    print(f"\nadapt --method cite, {classes} classes × {shots} shots × {epochs} epochs = {images} images: "
          f"{done.seconds:.0f} s from files to a run, {training:.0f} s of them training "
          f"({images / training:.0f} images a second), {memory(device)} GiB")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--base", default="500x16x20")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no GPU here: run this where there is one (--device cpu tries the script alone).")
    device = devices.resolve_device(args.device)
    args.precision = devices.resolve_precision("auto", device)
    card = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(f"{card}, {args.model}, torch {torch.__version__}, clipfit {__version__}, auto is {args.precision}, "
          f"medians of {args.turns} turns\n")  # fmt: skip
    steps(args, device)
    base_half(args, device)


if __name__ == "__main__":
    main()
