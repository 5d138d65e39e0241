"""Nothing that a user names steers the terminal."""

from __future__ import annotations

import pytest

from clipfit.text import printable


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("\x1b[2J", r"\x1b[2J"),
        ("a\nb\rc\td", r"a\nb\rc\td"),
        ("\x9b31m", r"\x9b31m"),  # CSI in one character of C1
        ("\x00\x07\x7f", r"\x00\x07\x7f"),
        ("exe\u202egpj", r"exe\u202egpj"),  # what follows would run from right to left
        ("\u2066\u200f\u061c", r"\u2066\u200f\u061c"),
        ("\u2028\u2029", r"\u2028\u2029"),
        ("caf\udce9", r"caf\udce9"),  # a byte of a name that is no UTF-8
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_what_would_steer_a_terminal_is_shown(raw, shown):
    assert printable(raw) == shown
    assert printable(printable(raw)) == shown


@pytest.mark.parametrize(
    "text", ["tabby cat", "a\\b", "Größe 5 µm", "猫\u3000犬", "10\u00a0€", "می\u200cخواهم", "👩\u200d🔬", "é"]
)
def test_words_of_every_language_stay(text):
    assert printable(text) == text
