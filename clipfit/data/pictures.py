"""Whatever is taken for a picture: a file, a file's bytes, what Pillow has open, an array."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image

from clipfit.data.images import decode, require_short, upright
from clipfit.errors import DataError, UsageError

Picture: TypeAlias = "str | Path | Image.Image | np.ndarray[Any, Any]"

# what is not several, though it has parts
SINGLE: tuple[type[Any], ...] = (str, bytes, os.PathLike, Image.Image, np.ndarray, torch.Tensor)


def each(images: Picture | Iterable[Picture]) -> Iterable[Picture]:
    """One picture, or several, as several. What is neither is left for `opened` to refuse."""
    return [images] if isinstance(images, SINGLE) or not isinstance(images, Iterable) else images


def opened(image: Picture, data: bytes | None = None, grey_bits: int | None = None) -> Image.Image:
    """A picture, upright and RGB.

    Args:
        data: the file's bytes, where `image` is but its name.

    Raises:
        DataError: it cannot be read, or is too long to resize. UsageError: it is nothing of the kind.
    """
    if isinstance(image, Image.Image):
        return _upright(image, grey_bits)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
            raise DataError(
                f"an image in an array must be uint8 of (H, W, 3) or (H, W); found {image.dtype} of {image.shape}."
            )
        return _upright(Image.fromarray(image), grey_bits)
    if not isinstance(image, (str, os.PathLike)):
        raise UsageError(
            "an image must be a path, a PIL picture, or a uint8 array (H, W, 3) of RGB or (H, W) of grey; "
            f"found {type(image).__name__}."
        )
    return decode(Path(image), grey_bits, data)


def _upright(picture: Image.Image, grey_bits: int | None) -> Image.Image:
    try:
        require_short(picture)
    except ValueError as error:
        raise DataError(f"an image that was given cannot be taken ({error}).") from error
    return upright(picture, grey_bits)
