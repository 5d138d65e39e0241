"""`predict --html`: one page, whole in itself, in which nothing that a user names is more than text."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import torch
from conftest import Cli
from test_predict import images

from clipfit.report.html import Thumbnails

NASTY = "<img src=x onerror=alert(1)>\x1b[31m&\"'\u202egpj.exe"


def row(path: str = "a.jpg", label: str | None = "cat", probability: float | None = 0.5, **others: object) -> dict:
    top = [{"label": label or "cat", "probability": probability}] if probability is not None else []
    return {"path": path, "label": label, "probability": probability, "top": top, "abstained": label is None and
            probability is not None, "error": None, "calibrated": False, **others}  # fmt: skip


def shown(rows: list[dict], **limits: int) -> str:
    gallery = Thumbnails(**limits)
    for k, one in enumerate(rows):
        if gallery.wants(one):
            gallery.add(one, None if one["error"] else torch.full((3, 8, 8), k, dtype=torch.uint8))
    return gallery.page()


def headings(page: str) -> list[str]:
    found = re.findall(r"<h2>(.*?)</h2>", page, re.DOTALL)
    return [" ".join(re.sub(r"<[^>]+>", " ", one).split()) for one in found]


def paths(page: str) -> list[str]:
    return re.findall(r'<p class="path" title="(.*?)">', page)


def test_abstentions_then_classes_least_certain_first_then_errors():
    page = shown(
        [
            row("a", "cat", 0.9), row("b", "dog", 0.8), row("c", None, 0.3), row("d", "dog", 0.6),
            row("e", None, None, error="broken"), row("f", None, 0.2), row("g", "dog", 0.6),
        ]
    )  # fmt: skip
    assert headings(page) == ["No label: below the least probability 2", "dog 3", "cat 1", "Could not be read 1"]
    assert paths(page) == ["f", "c", "d", "g", "b", "a", "e"]
    assert page.count("data:image/jpeg;base64,") == 6


def test_what_is_kept_is_bounded_and_the_least_certain():
    rows = [row(f"{k:03d}", "cat", (k * 37 % 100) / 100 + 0.001) for k in range(100)]
    page = shown(rows, a_class=4)
    assert headings(page) == ["cat 100, 4 shown"]
    assert paths(page) == [one["path"] for one in sorted(rows, key=lambda one: one["probability"])[:4]]
    many = shown([row(f"{k}", f"class {k % 50}", 0.5) for k in range(200)], at_most=60)
    assert len(paths(many)) == 60


def test_names_are_text_and_nothing_is_fetched():
    page = shown([row(NASTY, NASTY), row("b", None, None, error=NASTY)])
    assert "<img src=x" not in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!data:image/jpeg;base64,|#c\d)", page)
    assert "http" not in re.sub(r"http-equiv", "", page)
    assert "default-src 'none'" in page


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_shows_it(cli: Cli, split_run, tmp_path):
    """Headless chromium: every thumbnail is drawn, no script runs, nothing is wider than a phone."""
    images(tmp_path / "in", 3)
    (tmp_path / "in" / "<script>document.title='run'<\u2215script>.png").write_bytes(b"")
    assert cli("predict", split_run, "in", "--html", "p.html", "--abstain-below", 0.4).code == 0
    page = (tmp_path / "p.html").read_text("utf-8")
    assert len(paths(page)) == 4
    probe = tmp_path / "probe.html"
    script = (
        "<script>addEventListener('load',()=>{document.title=JSON.stringify({"
        "drawn:[...document.images].filter(i=>i.complete&&i.naturalWidth>0).length,"
        "wide:document.documentElement.scrollWidth<=innerWidth,title:document.title})})</script>"
    )
    # only the probe may run a script, and it loads eagerly what the page loads when it is scrolled to
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page).replace('loading="lazy"', "")
    probe.write_text(text.replace("</body>", f"{script}</body>"), "utf-8")
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=390,800",
         "--virtual-time-budget=5000", "--dump-dom", probe.as_uri()], capture_output=True, text=True,
        check=True, timeout=100,
    )  # fmt: skip
    found = re.search(r"<title>(.*?)</title>", done.stdout)
    assert found is not None
    title = found[1]
    assert '"drawn":3' in title
    assert '"wide":true' in title
    assert "4 images by predicted class" in title
