"""docs/models.md says what the layers of the installed open_clip's architectures say."""

from __future__ import annotations

import re
import runpy
from importlib.metadata import version
from pathlib import Path

import open_clip
import pytest

from clipfit.model.facts import facts_of

DOCS = Path(__file__).parent.parent / "docs"
# one of each kind, quickly laid out; the slow test compares all
SOME = ("RN50", "ViT-B-32", "ViT-B-16-SigLIP2", "PE-Core-T-16-384", "MobileCLIP-B", "MobileCLIP2-S0", "EVA02-B-16",
        "ViTamin-S", "roberta-ViT-B-32", "ViT-L-14-CLIPA", "convnext_tiny", "EVA01-g-14")  # fmt: skip


@pytest.fixture(scope="module")
def page() -> str:
    text = (DOCS / "models.md").read_text("utf-8")
    if f"open_clip {version('open_clip_torch')} lists" not in text:
        pytest.skip("the page is of another version of open_clip")
    return text


def test_the_page_lists_what_open_clip_lists(page):
    rows = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    refused = re.findall(r"`([^`]+)`", page.split("Not adapted:")[1])
    ours = {name for name in open_clip.list_models() if name.startswith("Little-")}  # other tests' own
    assert sorted(rows + refused) == sorted(set(open_clip.list_models()) - ours)


@pytest.mark.parametrize("name", SOME)
def test_a_row_says_what_the_layers_say(page, name):
    numbered = re.findall(r"^\d+\. (.*)$", page, re.MULTILINE)
    expected = runpy.run_path(str(DOCS / "models.py"))["row"](
        name, facts_of(open_clip.get_model_config(name)), numbered
    )
    assert expected in page.splitlines()


@pytest.mark.slow
def test_the_page_is_up_to_date(page):
    assert runpy.run_path(str(DOCS / "models.py"))["page"]() == page
