"""How long `check` takes, and what its thresholds find and leave in peace, with the embedded model.

    python benchmarks/check.py [--images 10000] [--classes 100]
    python benchmarks/check.py --thresholds examples/shots benchmarks/tasks/a …

The first makes JPEGs of 500 x 375 in a temporary folder and prints the seconds by the clock and on the processor, and
the most memory that the process held. The second takes folders whose images are all sharp, different and rightly
labelled, plants faults in them and prints how many are found (docs/check.md).
"""

from __future__ import annotations

import argparse
import functools
import io
import os
import resource
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from predict import photographs, seconds

import clipfit
from clipfit import CheckConfig, check
from clipfit.data import faults, layout
from clipfit.data.images import decode
from clipfit.data.layout import Sample
from clipfit.data.looks import look
from clipfit.measure import suspicions
from clipfit.predictor import Predictor

DRAWN = 200  # photographs; the others are these, moved
SAMPLE = 60  # images of a folder that faults are planted in
SWAPPED, TURNS = 0.04, 20  # share of labels that are swapped, and draws of them


def speed(images: int, classes: int, work: Path) -> None:
    drawn = [np.asarray(decode(file)) for file in photographs(work / "images", DRAWN)]
    draw = np.random.default_rng(0)
    for k in range(images):
        folder = work / "shots" / f"thing {k % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        moved = np.roll(drawn[k % DRAWN], draw.integers(0, 300, 2), (0, 1))
        Image.fromarray(moved).save(folder / f"{k}.jpg", quality=90)
    drawn.clear()
    clock, processor = seconds(lambda: check(CheckConfig(work / "shots", model="clipfit-tiny")))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{images} images of {classes} classes, {os.cpu_count()} cores, torch {torch.__version__}: "
          f"{clock:.0f} s by the clock, {processor:.0f} s on the processor, at most {memory:.1f} GiB")  # fmt: skip


def scaled(by: float) -> Callable[[Image.Image], Image.Image]:
    return lambda p: p.resize([max(1, round(side * by)) for side in p.size], Image.Resampling.BICUBIC)


def as_jpeg(picture: Image.Image) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=30)
    return Image.open(file).convert("RGB")


def cropped(picture: Image.Image) -> Image.Image:
    return picture.crop([round(side * share) for share in (0.03, 0.97) for side in picture.size])


COPIES = {
    "half the size": scaled(0.5),
    "twice the size": scaled(2),
    "JPEG of quality 30": as_jpeg,
    "3% cropped": cropped,
}


def blurred(share: float) -> Callable[[Image.Image], Image.Image]:
    return lambda p: p.filter(ImageFilter.GaussianBlur(share * min(p.size)))


BLURS = {f"1/{part}": blurred(1 / part) for part in (128, 50, 20)}


def column_of(model: Predictor, place: Path) -> list[str]:
    found = layout.read(place)
    samples = [*found.train, *(found.test or ())]
    pictures = [decode(sample.path) for sample in samples]
    looks, u = [look(picture) for picture in pictures], model.embed_images(pictures)
    values = np.stack([one.thumb for one in looks]).astype(np.float64).reshape(len(looks), -1, 3)
    values = (values - values.mean(1, keepdims=True)).reshape(len(looks), -1)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    nearest = np.triu(values @ values.T * (u @ u.T >= faults.SAME_EMBEDDING).numpy(), 1).max()
    sharpness = [one.sharpness for one in looks if one.sharpness is not None]
    soft = min(faults.BLURRED, faults.OF_THE_MEDIAN * float(np.median(sharpness)))
    chosen = np.random.default_rng(0).permutation(len(samples))[:SAMPLE].tolist()
    cells = [f"{place.name}", f"{len(samples)}", f"{nearest:.3f}"]
    for change in COPIES.values():
        changed = [change(pictures[k]) for k in chosen]
        both = zip(chosen, changed, model.embed_images(changed), strict=True)
        hits = [faults.near_copies([looks[k].thumb, look(p).thumb], torch.stack([u[k], v])) for k, p, v in both]
        cells.append(f"{np.mean([bool(hit) for hit in hits]):.0%}")
    cells += [f"{min(sharpness):.3f}", f"{np.median(sharpness):.2f}"]
    cells += [f"{np.mean([(look(b(pictures[k])).sharpness or 0) < soft for k in chosen]):.0%}" for b in BLURS.values()]
    return cells + labels_of(model, samples, list(found.names.values()), u)


def labels_of(model: Predictor, samples: Sequence[Sample], names: list[str], u: torch.Tensor) -> list[str]:
    """Labels that zero-shot contradicts, those that are named, and of swapped ones the share that is found."""
    texts = model.candidates(names).texts.embeddings
    logits = functools.partial(model.clip.logits, t=texts)
    taken = [names[c] for c in logits(u).argmax(1).tolist()]
    by_zero_shot = np.mean([name != sample.label for name, sample in zip(taken, samples, strict=True)])
    named, reason = suspicions.doubtful_labels(samples, names, u, logits)
    if reason:
        return [f"{by_zero_shot:.0%}", "not judged", "", ""]
    draw, planted, hits, alarms = np.random.default_rng(0), 0, 0, 0
    for _ in range(TURNS):
        changed = list(samples)
        wrong = draw.choice(len(samples), round(SWAPPED * len(samples)), replace=False).tolist()
        for k in wrong:
            changed[k] = replace(samples[k], label=str(draw.choice([n for n in names if n != samples[k].label])))
        found = {finding.images[0] for finding in suspicions.doubtful_labels(changed, names, u, logits)[0]}
        right = found & {samples[k].source for k in wrong}
        planted, hits, alarms = planted + len(wrong), hits + len(right), alarms + len(found)
    return [f"{by_zero_shot:.0%}", f"{len(named) / len(samples):.1%}", f"{hits / planted:.0%}", f"{hits / alarms:.0%}"]


def thresholds(places: Sequence[Path]) -> None:
    model = clipfit.load("clipfit-tiny")
    heads = ["", "images", "correlation of the two most alike", *(f"copies found: {name}" for name in COPIES),
             "sharpness: least", "sharpness: median", *(f"found when blurred by {name}" for name in BLURS),
             "labels that zero-shot contradicts", "labels named", "swapped labels found",
             "of those named then, wrong"]  # fmt: skip
    rows = list(zip(heads, *(column_of(model, place) for place in places), strict=True))
    print(f"| {' | '.join(rows[0])} |\n" + "|---" * len(rows[0]) + "|")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows[1:]))
    names = ["shirt", "t shirt", "Boeing 737-200", "Boeing 737-300", "plane", "airplane", "cat", "dog"]
    everyday = model.candidates(suspicions.EVERYDAY).texts.embeddings
    usual = (1 - everyday @ everyday.T)[torch.ones(len(everyday), len(everyday)).triu(1).bool()].median()
    t = model.candidates(names).texts.embeddings
    apart = [f"{a}, {b}: {float((1 - t[2 * k] @ t[2 * k + 1]) / usual):.2f}"
             for k, (a, b) in enumerate(zip(names[::2], names[1::2], strict=True))]  # fmt: skip
    print("\nHow far names lie apart, of everyday things: " + "; ".join(apart) + ".")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--thresholds", type=Path, nargs="+")
    args = parser.parse_args()
    if args.thresholds:
        thresholds(args.thresholds)
        return
    with tempfile.TemporaryDirectory() as work:
        speed(args.images, args.classes, Path(work))


if __name__ == "__main__":
    main()
