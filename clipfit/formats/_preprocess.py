"""Pictures as the model beside this file takes them, by Pillow and NumPy alone.

    x = pixels(Image.open(file), constants)[None]  # (1, 3, H, W) float32

`constants` is what the model's own metadata has under `preprocess`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageOps


def pixels(picture: Image.Image, constants: Mapping[str, Any]) -> np.ndarray:
    """A picture → (3, H, W) float32: turned as its EXIF says, on white where it is transparent, resized, cut or filled
    up from its middle, normalised. Grey of more than 8 bits is to be scaled to 8 before."""
    picture = ImageOps.exif_transpose(picture).convert("RGBA")
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    height, width = constants["size"]
    resample = Image.Resampling.BILINEAR if constants["interpolation"] == "bilinear" else Image.Resampling.BICUBIC
    resized = picture.resize(_size(picture.size, (width, height), constants["resize_mode"]), resample)
    view = Image.new("RGB", (width, height), (constants["fill_color"],) * 3)
    view.paste(resized, (_start(resized.width, width), _start(resized.height, height)))
    values = np.asarray(view, np.float32) / 255
    values = (values - np.float32(constants["mean"])) / np.float32(constants["std"])
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def _size(found: tuple[int, int], wanted: tuple[int, int], mode: str) -> tuple[int, int]:
    """To what (width, height) a picture is resized."""
    if mode == "squash":
        return wanted
    if mode == "shortest" and wanted[0] == wanted[1]:
        return int(wanted[0] * found[0] / min(found)), int(wanted[1] * found[1] / min(found))
    ratios = found[0] / wanted[0], found[1] / wanted[1]
    ratio = max(ratios) if mode == "longest" else min(ratios)
    return round(found[0] / ratio), round(found[1] / ratio)


def _start(found: int, wanted: int) -> int:
    """Where a side of the resized picture begins within the view; below 0 where it is cut."""
    return (wanted - found) // 2 if found < wanted else -round((found - wanted) / 2)
