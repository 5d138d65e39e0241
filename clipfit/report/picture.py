"""A picture of what a model sees, for people who have never heard of patches: the photograph and what was found on it.

Everything here is an image; sheets are made by putting images beside and below each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw

from clipfit.model.edits import Look
from clipfit.model.patches import View
from clipfit.report.lettering import INK, PAPER, Colour, text
from clipfit.verbs.explain import Edits, Explanation

PHOTO, SMALL = 460, 260  # longer side of a photograph, pixels
NARROW = 230  # least width of a column of text
GAP, MARGIN = 12, 24
FAINT: Colour = (110, 110, 110)
COLD, WARM = (50, 90, 220), (255, 205, 30)  # the patch that looks least and most like the text
HEAD, TAIL = (0, 150, 70), (215, 30, 60)
BAR: Colour = (90, 130, 200)
TINT = 0.5
SHOWN = 5  # classes


def picture(found: Explanation) -> Image.Image:
    """What the model takes the picture for, the patches that look like that class's text, and ATHA's edits, if any."""
    width = 2 * _column(_scaled(found, PHOTO)) + SMALL + 2 * MARGIN
    name, best = _short(found.image.name), _short(found.classes[found.best])
    title = f'{name}: taken for "{best}" ({_share(found.probabilities[found.best])})'
    rows = [
        _below([text(title, width, 22, 2), text(f"by {found.model}", width, 13, 2, FAINT)]),
        _beside([_photo_cell(found), _likeness_cell(found), _answer_cell(found)]),
        *(text(sentence, width) for sentence in _reading(found)),
    ]
    if found.edits:
        rows += _edit_rows(found, found.edits, width)
    return _framed(_below(rows, 2 * GAP))


def _reading(found: Explanation) -> list[str]:
    rows, columns = found.grid
    return [
        f"How to read it. The model compares the picture with a text for each of {len(found.classes)} classes and "
        "takes the class whose text is most like it. The percentages share out 100% among these classes alone: a "
        "picture of something else is given to one of them too.",
        f"The model cuts what it sees into {rows} x {columns} squares. Yellow squares look most like the text of that "
        "class to it, blue ones least. Colours are stretched from the least to the most similar square of this "
        "picture, so yellow does not mean very similar, and every picture has yellow squares.",
        "It shows likeness, not reasons: the model decides by the picture as a whole, and a yellow square need not "
        "have mattered. Squares can be yellow away from the thing itself, for each has taken in its surroundings.",
    ]


def _short(name: str, most: int = 40) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _share(probability: float) -> str:
    """In percent; only what is 0 or 1 is called so."""
    if 0 < probability < 0.0005:
        return "<0.1%"
    return ">99.9%" if 0.9995 <= probability < 1 else f"{probability:.1%}"


# --- the first row: photograph, likeness, answer


def _photo_cell(found: Explanation) -> Image.Image:
    photo = _scaled(found, PHOTO)
    cut = " The faded part is cut off before the model sees it." if _is_cut(found) else ""
    caption = f"The picture, {found.photo.width} x {found.photo.height} pixels.{cut}"
    return _below([_seen(found, photo, photo), text(caption, _column(photo))])


def likeness_panel(found: Explanation) -> Image.Image:
    """The photograph, tinted where the model sees it by how much each patch looks like the predicted class's text."""
    photo = _scaled(found, PHOTO)
    return _seen(found, photo, _tinted(found, photo, found.likeness))


def _likeness_cell(found: Explanation) -> Image.Image:
    panel = likeness_panel(found)
    width = _column(panel)
    low, high = float(found.likeness.min()), float(found.likeness.max())
    others = f", in mean with {found.others} others" if found.others else ""
    return _below([
        panel,
        text(f'Which squares look like the text "{found.text_of(found.best)}"{others}', width, lines=3),
        _scale(width),
        text(f"cosine similarity {low:.2f} to {high:.2f}; 1 would be the same", width, 13, colour=FAINT),
    ])  # fmt: skip


def _column(photo: Image.Image) -> int:
    return max(NARROW, photo.width)


def _answer_cell(found: Explanation) -> Image.Image:
    order = sorted(range(len(found.classes)), key=lambda c: -found.probabilities[c])
    rows = [text("What the model takes it for", SMALL)]
    for c in order[:SHOWN]:
        bar = Image.new("RGB", (SMALL, 10), (232, 232, 232))
        ImageDraw.Draw(bar).rectangle((0, 0, round(found.probabilities[c] * (SMALL - 1)), 9), BAR)
        rows.append(_below([text(f"{_share(found.probabilities[c])} {found.classes[c]}", SMALL, lines=2), bar], 2))
    if rest := order[SHOWN:]:
        share = sum(found.probabilities[c] for c in rest)
        rows.append(text(f"{len(rest)} other classes: {_share(share)} together", SMALL, 13, colour=FAINT))
    return _below(rows)


# --- ATHA


def _edit_rows(found: Explanation, edits: Edits, width: int) -> list[Image.Image]:
    none = "" if any((*edits.head, *edits.tail)) else " Here all strengths are 0: nothing is changed."
    said = (
        "This model reads the picture in steps, called blocks. Before each block, the squares that look most like any "
        "class text (green frames) are moved a little towards that text, and those that look least like any (red "
        "frames, crossed) away from one. How far was learnt: a is the strength for the green ones, b that for the red "
        f"ones. A strength of 0 changes nothing, a negative one goes the other way.{none}"
    )
    cells = [_block_cell(found, edits, block, look) for block, look in edits.looks.items()]
    return [
        text("What ATHA changes on the way", width, 22),
        text(said, width),
        *_in_rows([*cells, _strength_cell(edits)], width),
    ]


def block_panel(found: Explanation, look: Look) -> Image.Image:
    """The photograph, patches tinted by likeness to any class text, and framed where they are moved."""
    photo = _scaled(found, SMALL)
    panel = _tinted(found, photo, look.similarity)
    draw = ImageDraw.Draw(panel)
    for i in range(len(look.similarity)):
        box = _box(found, photo, found.view.patch(i, found.grid))
        if look.head[i] or look.tail[i]:
            draw.rectangle(box, None, HEAD if look.head[i] else TAIL, 2)
        if look.tail[i]:
            draw.line(box, TAIL, 2)
    return _seen(found, photo, panel)


def _block_cell(found: Explanation, edits: Edits, block: int, look: Look) -> Image.Image:
    panel = block_panel(found, look)
    width, top = _column(panel), found.classes[int(look.best[int(look.similarity.argmax())])]
    return _below([
        panel,
        text(f'Before block {block}. The yellowest square looks most like "{top}".', width, 13, 3),
        text(f"green: {int(look.head.sum())} squares, a = {edits.head[block]:.3g}", width, 13, 1, HEAD),
        text(f"red: {int(look.tail.sum())} squares, b = {edits.tail[block]:.3g}", width, 13, 1, TAIL),
    ], 4)  # fmt: skip


def _strength_cell(edits: Edits) -> Image.Image:
    last = len(edits.head) - 1
    return _below([
        strengths(edits),
        text(f"Strengths before blocks 0 (left) to {last}. The line in the middle is 0.", SMALL, 13),
        text("a, towards a text: drawn upwards", SMALL, 13, 1, HEAD),
        text("b, away from a text: drawn downwards", SMALL, 13, 1, TAIL),
    ], 4)  # fmt: skip


def strengths(edits: Edits) -> Image.Image:
    """A bar chart of a_l (positive up) and b_l (positive down)."""
    chart = Image.new("RGB", (SMALL, SMALL), PAPER)
    draw = ImageDraw.Draw(chart)
    most = max([abs(value) for value in (*edits.head, *edits.tail)] + [1e-9])
    step, middle = SMALL / len(edits.head), SMALL // 2
    draw.rectangle((0, 0, SMALL - 1, SMALL - 1), None, (200, 200, 200))
    draw.line((0, middle, SMALL, middle), INK)
    for block, (a, b) in enumerate(zip(edits.head, edits.tail, strict=True)):
        for value, colour, shift in ((a, HEAD, 0.12), (-b, TAIL, 0.52)):
            left, end = round((block + shift) * step), middle - round(value / most * (middle - 6))
            draw.rectangle((left, min(middle, end), left + max(1, round(0.36 * step)), max(middle, end)), colour)
    return chart


# --- on the photograph


def _scaled(found: Explanation, side: int) -> Image.Image:
    ratio = side / max(found.photo.size)
    size = (max(1, round(found.photo.width * ratio)), max(1, round(found.photo.height * ratio)))
    return found.photo.resize(size, Image.Resampling.LANCZOS)


def _tinted(found: Explanation, photo: Image.Image, values: torch.Tensor) -> Image.Image:
    """Every patch (L) tinted by its value, from the least to the greatest of them."""
    tints = photo.copy()
    draw = ImageDraw.Draw(tints)
    low, high = float(values.min()), float(values.max())
    for i, value in enumerate(values.tolist()):
        draw.rectangle(_box(found, photo, found.view.patch(i, found.grid)),
                       _between((value - low) / (high - low) if high > low else 0.5))  # fmt: skip
    return Image.blend(photo.convert("L").convert("RGB"), tints, TINT)


def _seen(found: Explanation, photo: Image.Image, inside: Image.Image) -> Image.Image:
    """`inside` where the model sees the photograph, the photograph faded elsewhere, a line between them."""
    if not _is_cut(found):
        return inside
    faded = Image.blend(photo, Image.new("RGB", photo.size, PAPER), 0.72)
    mask, box = Image.new("L", photo.size, 0), _box(found, photo, found.view)
    ImageDraw.Draw(mask).rectangle(box, 255)
    shown = Image.composite(inside, faded, mask)
    ImageDraw.Draw(shown).rectangle(box, None, INK)
    return shown


def _is_cut(found: Explanation) -> bool:
    view = found.view
    return max(view.left, view.top, found.photo.width - view.right, found.photo.height - view.bottom) >= 1


def _box(found: Explanation, photo: Image.Image, part: View) -> tuple[int, int, int, int]:
    """First and last pixel, across and down, of a part of the photograph on its scaled copy."""
    x, y = photo.width / found.photo.width, photo.height / found.photo.height
    left, top = max(0, round(part.left * x)), max(0, round(part.top * y))
    right, bottom = min(photo.width, round(part.right * x)), min(photo.height, round(part.bottom * y))
    return left, top, max(left, right - 1), max(top, bottom - 1)


def _between(warmth: float) -> Colour:
    red, green, blue = (round(c + (w - c) * warmth) for c, w in zip(COLD, WARM, strict=True))
    return red, green, blue


def _scale(width: int) -> Image.Image:
    """The colours from least to most similar, with words at both ends."""
    least, most = text("least", 50, 13), text("most", 50, 13)
    bar = Image.new("RGB", (width - least.width - most.width - 8, 12), PAPER)
    draw = ImageDraw.Draw(bar)
    for x in range(bar.width):
        draw.line((x, 0, x, bar.height), _between(x / max(1, bar.width - 1)))
    return _beside([least, bar, most], 4)


# --- images beside and below each other


def _beside(images: Sequence[Image.Image], gap: int = MARGIN) -> Image.Image:
    size = (sum(image.width for image in images) + gap * (len(images) - 1), max(image.height for image in images))
    sheet, left = Image.new("RGB", size, PAPER), 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width + gap
    return sheet


def _below(images: Sequence[Image.Image], gap: int = GAP // 2) -> Image.Image:
    size = (max(image.width for image in images), sum(image.height for image in images) + gap * (len(images) - 1))
    sheet, top = Image.new("RGB", size, PAPER), 0
    for image in images:
        sheet.paste(image, (0, top))
        top += image.height + gap
    return sheet


def _in_rows(cells: Sequence[Image.Image], width: int) -> list[Image.Image]:
    """Cells beside each other, as many a row as the width has room for."""
    rows: list[list[Image.Image]] = [[]]
    for cell in cells:
        if rows[-1] and sum(c.width + MARGIN for c in rows[-1]) + cell.width > width:
            rows.append([])
        rows[-1].append(cell)
    return [_beside(row) for row in rows]


def _framed(sheet: Image.Image) -> Image.Image:
    paper = Image.new("RGB", (sheet.width + 2 * MARGIN, sheet.height + 2 * MARGIN), PAPER)
    paper.paste(sheet, (MARGIN, MARGIN))
    return paper
