"""Texts that stand for several numbers. A ValueError says what is expected."""

from __future__ import annotations

from collections.abc import Iterable

MOST = 1000  # steps between two ratios: each is a pass over all images
BOUNDED = ("base", "new", "union", "hm")  # what `evaluate --require` takes a bound for; hm: the harmonic mean


def parse_alpha(text: str) -> float | None:
    """A ratio; None for "auto"."""
    try:
        return None if text == "auto" else float(text)
    except ValueError:
        raise ValueError("a ratio between 0 and 1, or auto") from None


def parse_alphas(text: str) -> tuple[float, ...]:
    """ "0:1:0.1" (first:last:step, the last included where a step meets it) or "0,0.5,1" → the ratios."""
    try:
        if ":" not in text:
            return tuple(float(part) for part in text.split(","))
        first, last, step = (float(part) for part in text.split(":"))
        if step <= 0 or last < first:
            raise ValueError
        count = round((last - first) / step)
    except (ValueError, OverflowError):
        raise ValueError("first:last:step (0:1:0.1) or a list (0,0.5,1)") from None
    if count > MOST:
        raise ValueError(f"of {MOST} steps at most")
    return tuple(round(first + k * step, 10) for k in range(count + 1) if first + k * step <= last + 1e-9)


def parse_bounds(texts: Iterable[str]) -> dict[str, float]:
    """ "base:0.85,new:0.6", in one text or several → {"base": 0.85, "new": 0.6}."""
    bounds: dict[str, float] = {}
    for text in ",".join(texts).split(",") if texts else ():
        part, _, least = text.strip().partition(":")
        try:
            bound = float(least)
        except ValueError:
            bound = -1.0
        if part not in BOUNDED or part in bounds or not 0 <= bound <= 1:
            raise ValueError(f"a fraction of 1 for {', '.join(BOUNDED)}, each once (base:0.85,new:0.6)")
        bounds[part] = bound
    return bounds


def parse_numbers(text: str) -> tuple[int, ...]:
    """ "1,5" → (1, 5)."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError("one whole number or several (5, or 1,5)") from None


def parse_part(text: str) -> tuple[int, int]:
    """ "2/3" → (2, 3)."""
    try:
        part, parts = (int(number) for number in text.split("/"))
        return part, parts
    except ValueError:
        raise ValueError("k/n (1/2 and 2/2 for two processes)") from None
