"""scikit-learn's handwritten digits as folders of pictures, black on white, below benchmarks/results/images.

    python benchmarks/digits.py       digits/number zero/000.png, … and digits-split/{train,test}/zero/001.png, …

Eight by eight pixels, enlarged to 64 × 64. `digits` has the first 60 of each; `digits-split` eight of each to train on
and forty to test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

IMAGES = Path(__file__).parent / "results/images"
NAMES = "zero one two three four five six seven eight nine".split()


def flat() -> Path:
    """One folder a class, from which episodes are drawn."""
    return _written("digits", 60, lambda name, k: f"number {name}/{k:03d}.png")


def split() -> Path:
    """A part to train on and a part to test."""
    return _written("digits-split", 48, lambda name, k: f"{'train' if k < 8 else 'test'}/{name}/{k + 1:03d}.png")


def _written(folder: str, count: int, place: Callable[[str, int], str]) -> Path:
    for name, k, grey in _pictures(count):
        file = IMAGES / folder / place(name, k)
        if not file.exists():  # another process may be reading it
            file.parent.mkdir(parents=True, exist_ok=True)
            grey.resize((64, 64), Image.Resampling.BICUBIC).save(file)
    return IMAGES / folder


def _pictures(count: int) -> Iterator[tuple[str, int, Image.Image]]:
    found = load_digits()
    for label, name in enumerate(NAMES):
        for k, pixels in enumerate(found.images[found.target == label][:count]):
            yield name, k, Image.fromarray((255 - pixels * 255 / 16).astype(np.uint8))


if __name__ == "__main__":
    for made in (flat(), split()):
        print(made)
