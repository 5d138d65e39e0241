"""`clipfit report`: one page, whole in itself; what it says is in the run's files, and names are only text in it."""

from __future__ import annotations

import html
import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Cli, picture
from PIL import Image

from clipfit import AdaptConfig, EvaluateConfig, ReportConfig, adapt, evaluate, report_on
from clipfit.errors import DataError, GuardError
from clipfit.measure import curves, evaluations, mistakes
from clipfit.measure.predictions import Predictions
from clipfit.report import plots
from clipfit.report.run_page import drawn
from clipfit.runs import manifest
from clipfit.runs.run import open_run
from clipfit.verbs.report import Account, Drawn

SCRIPT = "<script>alert(1)</script>"
NASTY = "&\"'><img src=x onerror=alert(2)>"
NAMES = ("bee", SCRIPT, "cow", "dog", "elk", NASTY)
TRAINED = NAMES[:4]


@pytest.fixture(scope="module")
def listed(tmp_path_factory) -> Path:
    """A manifest, because folders cannot be called so: three shots of four classes, two images of six to test."""
    root = tmp_path_factory.mktemp("report")
    rows = []
    for c, name in enumerate(NAMES):
        for k in range(5):
            part = "test" if k > 2 else "train"
            if part == "test" or name in TRAINED:
                picture(100 * c + k).save(root / f"{c}-{k}.png")
                rows.append({"path": f"{c}-{k}.png", "label": name, "split": part})
    (root / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root / "list.jsonl"


@pytest.fixture(scope="module")
def made(listed, models, tmp_path_factory) -> Path:
    """A run with folds, measured at three ratios, with images elsewhere. Never written to."""
    output = tmp_path_factory.mktemp("runs") / "listed-cite"
    config = AdaptConfig(listed, model=models["vit"], output=output, forecast=True, recipe={"epochs": 1})
    run = adapt(config).run
    evaluate(EvaluateConfig(run, alphas=(0.0, 0.5, 1.0), retain=(listed,), drift=listed.parent))
    return run


@pytest.fixture(scope="module")
def account(made, tmp_path_factory) -> Account:
    return account_of(ReportConfig(made, output=tmp_path_factory.mktemp("page") / "page.html"))


@pytest.fixture(scope="module")
def page(account) -> str:
    return drawn(account).page


def account_of(config: ReportConfig) -> Account:
    """What a page would be drawn from."""
    seen: list[Account] = []

    def keep(account: Account, _pictures: bool) -> Drawn:
        seen.append(account)
        return Drawn("")

    report_on(config, keep)
    return seen[0]


def text_of(page: str) -> str:
    """Without tags and white space between words."""
    return " ".join(html.unescape(re.sub(r"<(style|script|svg).*?</\1>|<[^>]+>", " ", page, flags=re.DOTALL)).split())


# ---- what it says


def test_figures_are_those_of_evaluate(account, page):
    found = json.loads((account.run.path / "evaluations/held-out/evaluation.json").read_text())
    row = {row["alpha"]: row for row in found["alphas"]}[0.5]
    text = text_of(page)
    for part in ("base", "new", "union"):
        of = row[part]
        assert f"{of['accuracy']:.1%} [{100 * of['low']:.0f}–{100 * of['high']:.0f}]" in text
        assert f"{of['n']} images of {len(of['per_class'])} classes, held-out images" in text
    assert f"{row['harmonic_mean']:.1%}" in text
    assert account.forecast is not None
    assert account.forecast.base is not None
    assert f"forecast {account.forecast.base.accuracy:.0%}" in text
    assert "What it cost elsewhere" in text
    assert "Guard: not shown to be worse than zero-shot CLIP on base, new, union." in text
    assert account.again.shell in text.replace(" \\ ", " ")
    pair = account.measured.pairs[0]
    assert f"{pair.one} {pair.other} {pair.mixed} {pair.one_as_other} of {pair.n_one}" in text
    assert sum(pair.mixed for pair in account.measured.pairs) == account.measured.wrong
    sizes = [len(made) for made in re.findall(r"<figure>.*?</figure>", page, re.DOTALL)]
    assert len(sizes) == 3 + 4 + 1  # α of base, new and both; three losses and their sum; reliability


def test_a_run_is_left_as_it_was_and_the_page_is_the_same_each_time(cli: Cli, made, tmp_path):
    before = manifest.read(made)
    first = cli("report", made, "--json")
    assert first.code == 0, first.stderr
    assert first.document["output"] == "reports/listed-cite.html"
    assert (first.document["evaluation"], first.document["alpha"]) == ("held-out", 0.5)
    data = (tmp_path / "reports/listed-cite.html").read_bytes()
    again = cli("report", made)
    assert again.code == 0, again.stderr
    assert (tmp_path / "reports/listed-cite.html").read_bytes() == data
    assert manifest.verify(made) == before
    assert {path.name for path in made.iterdir()} == {*before, "files.json", "timing.json", "evaluations"}


def test_something_else_is_never_replaced(cli: Cli, made, tmp_path):
    (tmp_path / "mine.html").write_text("<p>notes")
    cli("report", made, "--output", "mine.html").fails(2, "mine.html", "--output")
    assert (tmp_path / "mine.html").read_text() == "<p>notes"
    cli("report", made, "--output", tmp_path).fails(2, "no page of clipfit's")


def test_pictures_of_the_curves(cli: Cli, made, tmp_path):
    done = cli("report", made, "--png", "curves", "--mistakes", 0, "--json")
    assert done.code == 0, done.stderr
    names = {Path(path).name for path in done.document["pictures"]}
    assert names == {"alpha-base.png", "alpha-new.png", "alpha-both.png", "loss-dva.png", "loss-scl.png",
                     "loss-vld.png", "loss-total.png", "reliability.png"}  # fmt: skip
    for path in done.document["pictures"]:
        with Image.open(tmp_path / path) as image:
            assert min(image.size) > 500
    assert "None is shown." in (tmp_path / "reports/listed-cite.html").read_text("utf-8")


def test_nothing_was_measured_yet(cli: Cli, split_run, tmp_path):
    run = shutil.copytree(split_run, tmp_path / "it's", ignore=shutil.ignore_patterns("evaluations"))
    done = cli("report", run, "--json")
    assert done.code == 0, done.stderr
    assert done.document["evaluation"] is None
    text = text_of((tmp_path / "reports/it's.html").read_text("utf-8"))
    assert "Nothing was measured yet" in text
    assert "clipfit evaluate '" in text
    assert "it'\"'\"'s' --alphas 0:1:0.1" in text
    assert "Worst mistakes" not in text


def test_atha_and_lora_have_tables_of_their_own(cli: Cli, split, models, tmp_path):
    for name, arguments in {"atha": ["--method", "atha"], "lora": ["--method", "finetune", "--tuning", "lora"]}.items():
        run = cli("adapt", split, "--model", models["vit"], "--output", name, "--epochs", 1, *arguments)
        assert run.code == 0, run.stderr
        assert cli("evaluate", name).code == 0
        assert cli("report", name).code == 0
        text = text_of((tmp_path / f"reports/{name}.html").read_text("utf-8"))
        measured = json.loads((tmp_path / name / "evaluations/held-out/evaluation.json").read_text())
        assert f"{measured['alphas'][-1]['new']['accuracy']:.1%}" in text
        assert "forecast 9" not in text


def test_images_that_are_gone_are_said(cli: Cli, listed, made, tmp_path):
    """One of those to show, then the place itself; and other images than the run's own."""
    root = Path(shutil.copytree(listed.parent, tmp_path / "there"))
    whole = cli("report", made, "--data", root / "list.jsonl", "--json")
    assert whole.document["notes"] == []
    for file in root.glob("*-4.png"):
        file.unlink()
    some = cli("report", made, "--data", root / "list.jsonl", "--json")
    assert "are no longer there" in " ".join(some.document["notes"])
    none = cli("report", made, "--data", tmp_path / "nowhere", "--json")
    assert none.code == 0, none.stderr
    assert "can no longer be read" in " ".join(none.document["notes"])
    text = (tmp_path / "reports/listed-cite.html").read_text("utf-8")
    assert "data:image/jpeg" not in text
    assert "no picture" in text


def test_what_the_guard_says(account):
    for objection, state in (
        (GuardError("at α = 0.5, base is worse."), "bad"),
        (DataError("nothing held out."), "unsure"),
    ):
        text = drawn(replace(account, measured=replace(account.measured, objection=objection))).page
        assert f'<p class="guard {state}">Guard: {objection}</p>' in text


def test_a_thousand_classes(account):
    """The pairs that mix most, no table of a million cells."""
    names = tuple(f"class {c}" for c in range(1000))
    logits = torch.randn(3000, 1000, generator=torch.Generator().manual_seed(0))
    table = Predictions(tuple(map(str, range(3000))), names * 3, names, logits, 0.5, "a {}")
    confusion = table.confusion()
    rows = mistakes.class_rows(
        SimpleNamespace(base=table.accuracy()), SimpleNamespace(base=table.accuracy()), {"base": names}, {}, confusion
    )
    pairs = mistakes.mixed(table, 30)
    text = drawn(replace(account, measured=replace(account.measured, pairs=pairs, matrix=None, classes=rows))).page
    assert text.split('id="confusion"')[0].count("<td>base</td>") == 1000
    assert len(pairs) == 30
    assert "at most 30" in text
    assert 'class="matrix"' not in text


def test_matplotlib_is_named_where_it_is_missing(cli: Cli, made, monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *of: None if name == "matplotlib" else found(name, *of)
    )
    cli("report", made).fails(2, "matplotlib", "pip install 'clipfit[report]'")
    assert not (tmp_path / "reports").exists()


# ---- nothing in it is more than text


def test_names_are_text_and_nothing_is_fetched(page):
    assert page.count("<script") == 1
    assert SCRIPT not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<img src=x" not in page
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!data:image/jpeg;base64,|#)", page)
    assert "http" not in page.replace("http-equiv", "")
    assert "default-src 'none'" in page


def browse(page: Path, *flags: str, width: int = 1280) -> tuple[str, str]:
    """The page as headless chromium has it at the end, and what it said."""
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
         "--enable-logging=stderr", "--virtual-time-budget=3000", *flags, "--dump-dom", page.as_uri()],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_shows_it(page, tmp_path):
    """As it is, with its policy: its own script runs, no other does, and nothing is complained of."""
    (tmp_path / "page.html").write_text(page, "utf-8")
    dom, said = browse(tmp_path / "page.html")
    assert said == ""
    assert '<html lang="en" class="js">' in dom
    assert dom.count("<script") == 1


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_sorts_it(page, tmp_path):
    """By accuracy up and down, then by name; on a phone nothing is wider than the screen."""
    probe = """<script>addEventListener('load', () => {
      const table = document.querySelector('#classes table'), buttons = table.querySelectorAll('button');
      const column = (k) => [...table.tBodies[0].rows].map((row) => row.cells[k].textContent.trim());
      const found = {plain: column(0)};
      buttons[1].click(); found.up = column(1); found.state = buttons[1].parentElement.ariaSort;
      buttons[1].click(); found.down = column(1);
      buttons[0].click(); found.names = column(0);
      found.images = [...document.images].filter(i => i.complete && i.naturalWidth > 0).length;
      found.all = document.images.length;
      found.wide = document.documentElement.scrollWidth <= innerWidth;
      document.title = JSON.stringify(found)})</script>"""
    # only the probe lifts the policy, and it loads eagerly what the page loads when it is scrolled to
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page).replace('loading="lazy"', "")
    (tmp_path / "probe.html").write_text(text.replace("</body>", f"{probe}</body>"), "utf-8")
    dom, said = browse(tmp_path / "probe.html", width=500)
    assert said == ""
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title is not None
    found: Mapping[str, list[str]] = json.loads(html.unescape(title[1]))
    shares = [float(text.rstrip("%")) for text in found["up"]]
    assert len(shares) == 6
    assert shares == sorted(shares)
    assert [float(text.rstrip("%")) for text in found["down"]] == shares[::-1]
    assert sorted(found["plain"]) == sorted(found["names"]) == sorted(NAMES)
    assert found["names"] != found["plain"]
    assert found["state"] == "ascending"
    assert found["images"] == found["all"]
    assert found["all"] > 0
    assert found["wide"] is True


# ---- parts of it


def table(labels: str, logits: list[list[float]], names: str = "abc") -> Predictions:
    ids = tuple(f"{k}.png" for k in range(len(labels)))
    return Predictions(ids, tuple(labels), tuple(names), torch.tensor(logits), 0.5, "{}")


def test_pairs_that_mix():
    one = {"a": [1.0, 0.0, 0.0], "b": [0.0, 1.0, 0.0], "c": [0.0, 0.0, 1.0]}
    found = table("aaabbcc", [one[name] for name in "abbabbc"])
    pairs = mistakes.mixed(found, 9)
    assert [(p.one, p.other, p.one_as_other, p.other_as_one, p.n_one, p.n_other) for p in pairs] == [
        ("a", "b", 2, 1, 3, 2), ("c", "b", 1, 0, 2, 2)
    ]  # fmt: skip
    assert mistakes.mixed(found, 1) == pairs[:1]
    assert mistakes.matrix(found).counts == ((1, 2, 0), (1, 1, 0), (0, 1, 1))


def test_worst_mistakes_are_the_most_certain():
    found = table("abca", [[0.0, 2.0, 0.0], [0.0, 5.0, 0.0], [4.0, 0.0, 1.0], [0.0, 2.0, 0.0]])
    before = table("abca", [[1.0, 0.0, 0.0]] * 4)
    worst = mistakes.worst(found, 9, zero_shot=before, top=2)
    assert [(one.id, one.label, one.before) for one in worst] == [
        ("2.png", "c", "a"), ("0.png", "a", "a"), ("3.png", "a", "a")
    ]  # fmt: skip
    p = torch.tensor([4.0, 0.0, 1.0]).softmax(0).tolist()
    assert worst[0].own == pytest.approx(p[2])
    assert [name for name, _ in worst[0].top] == ["a", "c"]
    assert [value for _, value in worst[0].top] == pytest.approx([p[0], p[2]])
    assert mistakes.worst(found, 1, temperature=2.0)[0].top[0][1] == pytest.approx(
        torch.tensor([2.0, 0.0, 0.5]).softmax(0)[0].item()
    )


def test_nearest_shots():
    u, v = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.6, 0.8], [1.0, 0.0], [0.6, -0.8]])
    [[first, *others]] = mistakes.nearest(u, v, 3)
    assert first == (2, 1.0)
    assert [k for k, _ in others] == [1, 3]


def test_losses_are_thinned_by_means():
    lines = [{"step": k + 1, "losses": {"a": float(k), "b": 1.0}, "total": k + 1.0} for k in range(10)]
    a, b, total = curves.losses(lines, most=4)
    assert (a.name, b.name, total.name) == ("a", "b", "total")
    assert (a.steps_a_point, a.values, a.steps) == (3, (1.0, 4.0, 7.0, 9.0), (2.0, 5.0, 8.0, 10.0))
    assert [curve.name for curve in curves.losses([{"step": 1, "losses": {"ce": 2.0}, "total": 2.0}])] == ["ce"]


def test_the_evaluation_that_says_most_is_taken(made, tmp_path):
    """Held out before others, with the run's own templates before others; then the newest."""
    run = Path(shutil.copytree(made, tmp_path / "run"))
    assert evaluations.newest(open_run(run)).folder.name == "held-out"
    folder = run / "evaluations"
    for name, changes in {"shots": {"held_out": False}, "held-out-templates": {"templates": ["{}"]}}.items():
        document = json.loads((folder / "held-out/evaluation.json").read_text()) | changes
        (folder / name).mkdir()
        (folder / name / "evaluation.json").write_text(json.dumps(document))
        manifest.seal(folder / name)
    assert evaluations.newest(open_run(run)).folder.name == "held-out"
    shutil.rmtree(folder / "held-out")
    assert evaluations.newest(open_run(run)).folder.name == "held-out-templates"
    shutil.rmtree(folder / "held-out-templates")
    assert evaluations.newest(open_run(run)).folder.name == "shots"
    shutil.rmtree(folder)
    assert evaluations.newest(open_run(run)) is None


def test_drawings_take_the_colours_of_the_page_and_are_the_same_each_time():
    draw = plots.loss(curves.LossCurve("a", (1.0, 2.0), (0.5, 0.25), 1))
    assert plots.svg(draw) == plots.svg(draw)
    assert plots.png(draw) == plots.png(draw)
    assert "currentColor" in plots.svg(draw)
    assert "var(--first)" in plots.svg(draw)
    assert not re.search(r"#[0-9a-f]{6}\b|#[0-9a-f]{3}\b;", re.sub(r'(href="|url\()#\w+', "", plots.svg(draw)))
    assert plots.file_name("loss", "../x y") == "loss-x-y.png"
