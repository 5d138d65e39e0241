"""Texts that stand for several numbers. A ValueError says what is expected."""

from __future__ import annotations


def parse_alphas(text: str) -> tuple[float, ...]:
    """ "0:1:0.1" (first:last:step, the last included where a step meets it) or "0,0.5,1" → the ratios."""
    try:
        if ":" not in text:
            return tuple(float(part) for part in text.split(","))
        first, last, step = (float(part) for part in text.split(":"))
        if step <= 0 or last < first:
            raise ValueError
        count = round((last - first) / step)
        return tuple(round(first + k * step, 10) for k in range(count + 1) if first + k * step <= last + 1e-9)
    except (ValueError, OverflowError):
        raise ValueError("first:last:step (0:1:0.1) or a list (0,0.5,1)") from None


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
