"""How an image file stores its picture, where other tools may make another picture of it than `decode` does."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from PIL import Image

# in a card's Python: a file as `decode` sees it, and what of that it leaves out
OPENING = """image = ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGBA")
image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
"""
OPENED = """Pictures are turned as their EXIF says and laid on white, as clipfit does. Grey of more than 8 bits, which
clipfit scales to 8, has to be scaled before."""

ORIENTATION = 0x0112  # EXIF
UPRIGHT = 1


class Stored(NamedTuple):
    """What a file is like, and what to do with it after `Image.open` so that it is seen as clipfit sees it."""

    reason: str
    advice: str


def stored(path: Path, side: int | None = None) -> Stored:
    """Of a file that Pillow opens. Raises OSError.

    Args:
        side: of the square that is cut out of its middle, where the shorter side is resized to that before.
    """
    with Image.open(path) as opened:
        aside = bool(side) and _is_cut_aside(opened.size, side or 0)
        mode, transparent = opened.mode, opened.mode in _ALPHA or "transparency" in opened.info
        turned = opened.getexif().get(ORIENTATION, UPRIGHT) != UPRIGHT
    found = [
        Stored("is turned by its EXIF orientation", "turn it with ImageOps.exif_transpose(image)") if turned else None,
        _TRANSPARENT if transparent else None if mode == "RGB" else _MODES.get(mode, _OTHER),
    ]
    parts = [part for part in found if part] or [_ASIDE if aside else _UNKNOWN]
    return Stored(" and ".join(part.reason for part in parts), ", then ".join(part.advice for part in parts))


_ALPHA = ("LA", "PA", "La", "RGBa", "RGBA")


def _is_cut_aside(size: tuple[int, int], side: int) -> bool:
    """Whether half of what is cut off is an odd number and a half, which torchvision rounds up and others down."""
    return (side * max(size) // min(size) - side) % 4 == 3


_CONVERT = 'call .convert("RGB") on it before the transform'
_TRANSPARENT = Stored("is transparent in places", "lay it on white with Image.alpha_composite before the transform")
_DEEP = Stored("has grey of more than 8 bits", "scale it to 8 bits before the transform")
_MODES = {
    "P": Stored("has a palette", _CONVERT),
    "1": Stored("is black and white, of 1 bit", _CONVERT),
    **dict.fromkeys(("I", "F", "I;16", "I;16B", "I;16L", "I;16N"), _DEEP),
}
_ASIDE = Stored("is cut out a pixel aside, for half of an odd number is rounded otherwise", "nothing helps there")
_UNKNOWN = Stored("is decoded in another way", _CONVERT)
_OTHER = Stored("is not stored as RGB", _CONVERT)
