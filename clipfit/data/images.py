"""Decoding: every mode Pillow reads becomes upright 8-bit RGB; decoded images are kept up to a budget."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from clipfit.data.layout import Sample
from clipfit.errors import DataError


def decode(path: Path) -> Image.Image:
    """An image file as an upright RGB picture; transparency shows white, grey of more than 8 bits is scaled to 8.

    Files do not say how many of their 16 bits are used (12 of an X-ray, say): the image's depth is taken for the
    even number of bits, at least 8, that holds its brightest pixel.

    Raises:
        DataError: the file is missing or no readable image.
    """
    try:
        with Image.open(path) as opened:
            # Pillow only warns of these; turning its warning into an error is not safe with several threads
            if opened.width * opened.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise Image.DecompressionBombError(f"{opened.width} x {opened.height} pixels are too many")
            opened.load()
            return _rgb(ImageOps.exif_transpose(opened))
    except FileNotFoundError as error:
        raise DataError(f"image {path} does not exist.") from error
    except (OSError, SyntaxError, ValueError, ArithmeticError, EOFError, RuntimeError,
            Image.DecompressionBombError) as error:  # fmt: skip
        raise DataError(f"image {path} cannot be read ({error}).") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        top = values.max(initial=0)
        depth = max(8, 2 * math.ceil(math.log2(max(top, 1) + 1) / 2))  # bits
        scale = 255 if 0 < top <= 1 and image.mode == "F" else 255 / (2**depth - 1)
        return Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "La", "RGBa", "RGBA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def content_hash(path: Path) -> str:
    """SHA-256 of the file, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Images(Protocol):
    """Numbered uint8 images (3, H, W)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> torch.Tensor: ...


class Viewed:
    """Images of a store as seen through a transform (picture → uint8 tensor), computed when asked for."""

    def __init__(self, images: Images, transform: Callable[[Image.Image], torch.Tensor]):
        self._images, self._transform = images, transform

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._transform(to_pil_image(self._images[index]))


class Chosen:
    """Some images of others, numbered anew."""

    def __init__(self, images: Images, chosen: Sequence[int]):
        self._images, self._chosen = images, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._images[self._chosen[index]]


class ImageStore:
    """Images of samples as uint8 tensors: decoded once, kept while `budget` bytes last, decoded again beyond it.

    With a `transform` (picture → uint8 tensor (3, H, W)) its result is what is kept; without one the whole image is.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        budget: int,
        transform: Callable[[Image.Image], torch.Tensor] = pil_to_tensor,
        skip_bad: bool = False,
    ):
        self._transform = transform
        self._kept: dict[int, torch.Tensor] = {}
        self.samples: list[Sample] = []
        self.skipped: list[str] = []
        with ThreadPoolExecutor(4) as pool:  # Pillow's decoders release the GIL
            for sample, result in zip(samples, pool.map(self._try, samples), strict=True):
                if isinstance(result, torch.Tensor):
                    if budget >= result.numel():
                        self._kept[len(self.samples)] = result
                        budget -= result.numel()
                    self.samples.append(sample)
                elif skip_bad:
                    self.skipped.append(sample.source)
                else:
                    raise DataError(f"{str(result)[:-1]}: replace it or pass --skip-bad-images.") from result

    def _try(self, sample: Sample) -> torch.Tensor | DataError:
        try:
            return self._transform(decode(sample.path))
        except DataError as error:
            return error

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Image `index`: (3, H, W) uint8."""
        kept = self._kept.get(index)
        return kept if kept is not None else self._transform(decode(self.samples[index].path))
