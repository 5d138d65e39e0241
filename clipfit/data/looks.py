"""One look at a picture: all that `check` wants to know of its pixels, small enough to keep."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from clipfit.data.images import pixel_hash
from clipfit.data.layout import Sample

THUMB = 16  # pixels a side
SHORT_SIDE = 256  # of the grey picture whose edges are looked at; smaller ones are not enlarged


@dataclass(frozen=True)
class Look:
    """pixels: SHA-256, the same for copies. thumb: (16, 16, 3) uint8, the whole picture squeezed.

    sharpness: see `sharpness_of`; None for a picture of one colour.
    """

    size: tuple[int, int]  # width and height
    pixels: str
    thumb: np.ndarray
    sharpness: float | None


@dataclass(frozen=True)
class Seen:
    """Images that could be read: sample k is in part `parts[k]` and looks as `looks[k]`."""

    samples: list[Sample]
    parts: list[str]
    looks: list[Look]

    def __len__(self) -> int:
        return len(self.samples)


def look(picture: Image.Image) -> Look:
    """At an upright RGB picture."""
    thumb = np.asarray(picture.resize((THUMB, THUMB), Image.Resampling.BOX))
    return Look(picture.size, pixel_hash(pil_to_tensor(picture)), thumb, sharpness_of(picture))


def sharpness_of(picture: Image.Image) -> float | None:
    """var(Laplacian) / var of the greys, at a short side of at most 256 pixels: as sharp as one would see it there.

    The variance of the Laplacian alone (Pech-Pacheco et al. 2000) is small for a sharp drawing of few lines, and for a
    sharp picture of little contrast; divided by that of the greys it is neither. Blur takes from it with its square.
    """
    grey = picture.convert("L")
    shrink = SHORT_SIDE / min(grey.size)
    if shrink < 1:
        grey = grey.resize([max(1, round(side * shrink)) for side in grey.size], Image.Resampling.BOX)
    values = np.pad(np.asarray(grey, np.float32), 1, mode="edge")
    inner = values[1:-1, 1:-1]
    contrast = float(inner.var())
    if contrast == 0:
        return None
    laplacian = values[:-2, 1:-1] + values[2:, 1:-1] + values[1:-1, :-2] + values[1:-1, 2:] - 4 * inner
    return float(laplacian.var()) / contrast
