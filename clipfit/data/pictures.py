"""Whatever is taken for a picture: a file, a file's bytes, what Pillow has open, an array."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from clipfit.data.images import decode, upright
from clipfit.errors import DataError

Picture: TypeAlias = "str | Path | Image.Image | np.ndarray[Any, Any]"
MOST_PIXELS = Image.MAX_IMAGE_PIXELS or 2**27  # of a picture, resized as the model wants it and not yet cropped


def opened(image: Picture, data: bytes | None = None, grey_bits: int | None = None) -> Image.Image:
    """A picture, upright and RGB.

    Args:
        data: the file's bytes, where `image` is but its name.

    Raises:
        DataError: it cannot be read.
    """
    if isinstance(image, Image.Image):
        return upright(image, grey_bits)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
            raise DataError(
                f"an image in an array must be uint8 of (H, W, 3) or (H, W); found {image.dtype} of {image.shape}."
            )
        return upright(Image.fromarray(image), grey_bits)
    return decode(Path(image), grey_bits, data)


def require_short(picture: Image.Image, side: int, image: Picture) -> None:
    """Raises DataError for a picture so long that it would fill the memory, its shorter side resized to `side`."""
    short, long = sorted(picture.size)
    if side**2 * long / short > MOST_PIXELS:
        name = str(image) if isinstance(image, (str, Path)) else "given"
        raise DataError(f"image {name} of {picture.width} x {picture.height} pixels is too long to resize.")
