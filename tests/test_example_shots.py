"""The example's pictures are what every tool takes them for."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

SHOTS = Path(__file__).parent.parent / "examples" / "shots"


def test_the_examples_pictures_are_plain_rgb():
    """open_clip's transform resizes before it converts: of a palette's numbers it makes other pictures."""
    files = sorted(SHOTS.rglob("*.png"))
    assert len(files) == 418
    for file in files:
        with Image.open(file) as opened:
            assert (opened.mode, opened.info) == ("RGB", {}), file
