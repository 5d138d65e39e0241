"""Text in pictures: a font that has the letters, lines that fit, nothing left out without an ellipsis."""

from __future__ import annotations

import functools
from typing import TypeAlias

from PIL import Image, ImageDraw, ImageFont

from clipfit.text import printable

Colour: TypeAlias = tuple[int, int, int]
Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

INK: Colour = (25, 25, 25)
PAPER: Colour = (255, 255, 255)
# where Pillow finds fonts of a system; those with more letters of other scripts come later
FONTS = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "segoeui.ttf", "Arial.ttf",
    "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "arialuni.ttf", "msyh.ttc", "PingFang.ttc",
)  # fmt: skip
UNKNOWN = "\ufffd?"  # in place of a letter that no font has: the first of these that the font has
NOWHERE = "\U0010ffff"  # a character that no font has


def text(words: str, width: int, size: int = 15, lines: int = 12, colour: Colour = INK) -> Image.Image:
    """The words on paper of the given width, wrapped; what needs more lines ends with an ellipsis.

    Control characters are shown, not obeyed; a letter that no font here has becomes a replacement mark.
    """
    font = font_for(printable(words), size)
    rows = wrapped(drawable(printable(words), font), width, font, lines)
    height = round(size * 1.4)
    paper = Image.new("RGB", (width, max(1, len(rows)) * height), PAPER)
    draw = ImageDraw.Draw(paper)
    for number, row in enumerate(rows):
        draw.text((0, number * height), row, colour, font)
    return paper


def font_for(words: str, size: int) -> Font:
    """Of the fonts that are here, the one that lacks fewest of the letters."""
    return min(_fonts(size), key=lambda font: sum(not has(font, char) for char in set(words)))


def drawable(words: str, font: Font) -> str:
    """The words with replacement marks for letters that the font lacks, which it would draw as boxes."""
    mark = next((char for char in UNKNOWN if has(font, char)), "")
    return "".join(char if has(font, char) else mark for char in words)


def wrapped(words: str, width: int, font: Font, lines: int) -> list[str]:
    """Lines that fit the width, broken between words where that is possible; at most so many."""
    rows = [""]
    for word in words.split():
        joined = f"{rows[-1]} {word}".lstrip()
        if _fits(joined, width, font):
            rows[-1] = joined
            continue
        if rows[-1]:
            rows.append("")
        for char in word:
            if not _fits(rows[-1] + char, width, font):
                rows.append("")
            rows[-1] += char
    if len(rows) <= lines:
        return rows
    last = rows[lines - 1]
    while last and not _fits(f"{last}…", width, font):
        last = last[:-1]
    return [*rows[: lines - 1], drawable(f"{last}…", font)]


@functools.lru_cache(1 << 16)
def has(font: Font, char: str) -> bool:
    """Whether the font has a picture of its own for the character."""
    return char.isspace() or _shape(font, char) != _shape(font, NOWHERE)


def _shape(font: Font, char: str) -> tuple[object, bytes]:
    mask = font.getmask(char)
    return mask.size, bytes(mask)


def _fits(row: str, width: int, font: Font) -> bool:
    return font.getlength(row) <= width


@functools.cache
def _fonts(size: int) -> tuple[Font, ...]:
    found: list[Font] = []
    for name in FONTS:
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:  # not on this machine
            continue
    return (*found, ImageFont.load_default(size))
