"""A picture of what a model sees: patches tinted by how much they look like a class text, and the edits' strengths."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont

from clipfit.model.edits import Look
from clipfit.verbs.explain import Explanation

SIDE, GAP, LINE = 224, 12, 18  # pixels
INK, PAPER, HEAD, TAIL = (30, 30, 30), (255, 255, 255), (0, 150, 70), (205, 30, 60)
COLD, WARM = (60, 100, 220), (250, 200, 40)  # least and most text-like patch of a panel
TINT = 0.55
Draw = ImageDraw.ImageDraw


def picture(found: Explanation) -> Image.Image:
    """The image, a panel for every chosen block, and a bar chart of a_l (up) and b_l (down).

    Head patches are framed in green, tail patches in red; a panel's colours go from its least to its most text-like
    patch, whose similarities stand below it.
    """
    panels = [_plain(found), *(_panel(found, look) for look in found.looks.values()), _strengths(found)]
    captions = [_prediction(found), *(_caption(found, b, look) for b, look in found.looks.items()), _legend(found)]
    width = len(panels) * (SIDE + GAP) + GAP
    sheet = Image.new("RGB", (width, SIDE + 2 * GAP + 3 * LINE), PAPER)
    draw = ImageDraw.Draw(sheet)
    for k, (panel, lines) in enumerate(zip(panels, captions, strict=True)):
        left = GAP + k * (SIDE + GAP)
        sheet.paste(panel, (left, GAP))
        for row, (line, colour) in enumerate(lines):
            draw.text((left, SIDE + GAP + 4 + row * LINE), _fitting(line), colour, ImageFont.load_default(13))
    return sheet


def _fitting(line: str, most: int = 34) -> str:
    return line if len(line) <= most else line[: most - 1] + "…"


def _plain(found: Explanation) -> Image.Image:
    return found.seen.resize((SIDE, SIDE), Image.Resampling.NEAREST)


def _panel(found: Explanation, look: Look) -> Image.Image:
    panel = _plain(found)
    draw = ImageDraw.Draw(panel, "RGBA")
    rows, columns = found.grid
    low, high = float(look.similarity.min()), float(look.similarity.max())
    for i, similarity in enumerate(look.similarity.tolist()):
        row, column = divmod(i, columns)
        box = (column * SIDE // columns, row * SIDE // rows,
               (column + 1) * SIDE // columns - 1, (row + 1) * SIDE // rows - 1)  # fmt: skip
        warmth = (similarity - low) / (high - low) if high > low else 0.5
        tint = tuple(round(c + (w - c) * warmth) for c, w in zip(COLD, WARM, strict=True))
        frame = HEAD if look.head[i] else TAIL if look.tail[i] else None
        draw.rectangle(box, (*tint, round(255 * TINT)), frame, 2 if frame else 0)
    return panel


def _strengths(found: Explanation) -> Image.Image:
    panel = Image.new("RGB", (SIDE, SIDE), PAPER)
    draw = ImageDraw.Draw(panel)
    most = max([abs(v) for v in (*found.head, *found.tail)] + [1e-9])
    step, middle = SIDE / len(found.head), SIDE // 2
    draw.line((0, middle, SIDE, middle), INK)
    for block, (a, b) in enumerate(zip(found.head, found.tail, strict=True)):
        for value, colour, shift in ((a, HEAD, 0.1), (-b, TAIL, 0.5)):
            left, end = round((block + shift) * step), middle - round(value / most * (middle - 4))
            draw.rectangle((left, min(middle, end), left + max(1, round(0.35 * step)), max(middle, end)), colour)
    return panel


def _prediction(found: Explanation) -> list[tuple[str, tuple[int, int, int]]]:
    order = sorted(range(len(found.classes)), key=lambda c: -found.probabilities[c])[:2]
    return [(found.image.name, INK)] + [(f"{found.classes[c]} {found.probabilities[c]:.0%}", INK) for c in order]


def _caption(found: Explanation, block: int, look: Look) -> list[tuple[str, tuple[int, int, int]]]:
    top = int(look.similarity.argmax())
    low, high = float(look.similarity.min()), float(look.similarity.max())
    return [
        (f"block {block}: cosine {low:.2f} to {high:.2f}", INK),
        (f"a = {found.head[block]:.3g}, head {int(look.head.sum())} patches", HEAD),
        (f"b = {found.tail[block]:.3g}, tail {int(look.tail.sum())}; top: {found.classes[int(look.best[top])]}", TAIL),
    ]


def _legend(found: Explanation) -> list[tuple[str, tuple[int, int, int]]]:
    return [(f"strengths, blocks 0 to {len(found.head) - 1}", INK), ("a, towards the best text", HEAD),
            ("b, away from the worst text", TAIL)]  # fmt: skip
