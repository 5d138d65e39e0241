"""README.md of an export: what it says is in the run's files, and no name of a user's is more than text in it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from markdown_it import MarkdownIt

from clipfit import EvaluateConfig, ExportConfig, evaluate, export
from clipfit.config.outputs import FormatOptions
from clipfit.formats import FORMATS as FORMATS_MADE
from clipfit.formats import card
from clipfit.formats import subject as formats_subject
from clipfit.formats.card import Usage
from clipfit.formats.proof import Agreement, Proof
from clipfit.formats.subject import Subject, subject_of
from clipfit.measure import evaluations
from clipfit.measure.calibration import Temperature
from clipfit.model.hub_name import hub_name
from clipfit.model.named import Additions
from clipfit.runs.run import open_run

HOSTILE = ["\x1b[2J", "---", "|", "<script>alert(1)</script>", "a\nb: c", "`", " `` ", "&lt;", "[x](//e.org)", "# 1"]
PLAIN = {"h1", "h2", "p", "ul", "li", "code", "a"}
PROOF = Proof("open_clip 3.2.0", "shots", Agreement(6, 1.25e-5, 6, 1.0, 6, 6), None, ())


@pytest.fixture
def run(split_run, tmp_path):
    """A copy, which may be measured."""
    return Path(shutil.copytree(split_run, tmp_path / "animals-cite", ignore=shutil.ignore_patterns("evaluations")))


def parts_of(text: str) -> tuple[dict, str]:
    """The header as YAML reads it, and the Markdown."""
    start, header, body = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(header), body


class Texts(HTMLParser):
    def __init__(self, rendered: str):
        super().__init__()
        self.tags, self.spans, self.cells, self._code = set(), [], 0, False
        self.feed(rendered)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.cells += tag == "td"
        if tag == "code":
            self.spans.append("")
            self._code = True

    def handle_endtag(self, tag):
        self._code = self._code and tag != "code"

    def handle_data(self, data):
        if self._code:
            self.spans[-1] += data


def rendered(body: str) -> Texts:
    return Texts(MarkdownIt("commonmark", {"html": True}).enable("table").render(body))


def subject(path: Path, **changes) -> Subject:
    made = subject_of(open_run(path), 0.5, Additions(), "open_clip", FormatOptions())
    return replace(made, run=replace(made.run, **changes))


def test_every_number_is_one_of_the_runs(run):
    measured = evaluate(EvaluateConfig(run, alphas=(0.0, 0.5))).as_json()
    folder = export(ExportConfig(run, output=run.parent / "out")).output
    header, body = parts_of((folder / "README.md").read_text("utf-8"))
    row = next(row for row in measured["alphas"] if row["alpha"] == 0.5)
    (model,) = header["model-index"]
    assert model["name"] == "animals-cite"
    (result,) = model["results"]
    assert result["task"]["type"] == header["pipeline_tag"] == "zero-shot-image-classification"
    values = {metric["name"]: metric["value"] for metric in result["metrics"]}
    assert values == {f"accuracy, {card.PARTS[part]}": row[part]["accuracy"] for part in ("base", "new", "union")}
    assert header["library_name"] == "open_clip"
    assert {"clip", "clipfit", "cite"} <= set(header["tags"])
    assert not {"license", "base_model"} & set(header)  # nobody knows them
    for part in ("base", "new", "union"):
        now, before, gain = row[part], measured["alphas"][0][part], row["against_zero_shot"][part]
        shown = [f"{100 * p['accuracy']:.1f} % [{100 * p['low']:.0f}–{100 * p['high']:.0f}]" for p in (before, now)]
        points = [f"{100 * gain[key]:+.1f}" for key in ("difference", "low", "high")]
        line = next(line for line in body.splitlines() if line.startswith(f"| {card.PARTS[part]} |"))
        assert f"| {now['n']} | {shown[0]} | {shown[1]} | {points[0]} [{points[1]}, {points[2]}] |" in line
    proof = json.loads((folder / "proof.json").read_text())
    assert f"by at most {proof['identical_pixels']['largest_difference']:.2g}, and" in body
    assert "6 images of 3 classes, 2 a class" in body
    assert rendered(body).cells == 3 * 6


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (None, "the classes below, or any others."),
        ("classifier", "it knows no others."),
        ("image", "turns images into"),
    ],
)
def test_what_a_part_can_be_asked_is_said(run, part, words):
    made = replace(subject(run), options=FormatOptions(part))
    introduction = card.card(made, Usage("onnx", ""), PROOF).partition("## Classes")[0]
    assert words in introduction
    assert ("any others" in introduction) == (part is None)


def test_what_was_not_measured_is_said_with_how_to(run):
    evaluate(EvaluateConfig(run, alphas=(1.0,)))
    text = card.card(subject(run), Usage("open_clip", ""), PROOF)
    assert "`clipfit evaluate RUN --alphas 0.5`" in text
    assert "None was measured" in text
    assert "it may be worse" in text
    assert "model-index" not in parts_of(text)[0]


def test_an_accuracy_on_the_shots_is_none(run, flat, cli):
    assert cli("adapt", flat, "--model", json.loads((run / "config.json").read_text())["pretrained"]["model"]).code == 0
    assert not evaluate(EvaluateConfig(Path("runs/pets-cite"))).held_out
    assert "None was measured" in card.card(subject(Path("runs/pets-cite")), Usage("open_clip", ""), PROOF)


def test_of_several_evaluations_the_newest_counts(run):
    first = evaluate(EvaluateConfig(run)).kept
    document = json.loads((first / evaluations.DOCUMENT).read_text())
    tables = {row["alpha"]: evaluations.read(first).tables(row["alpha"]) for row in document["alphas"]}
    evaluations.write(run / "evaluations" / "later", {**document, "data": "later"}, tables)
    assert "`later`" in card.card(subject(run), Usage("open_clip", ""), PROOF)
    evaluate(EvaluateConfig(run))
    assert "`held-out`" in card.card(subject(run), Usage("open_clip", ""), PROOF)


def test_an_evaluation_whose_writing_was_killed_is_none(run, cli):
    kept = evaluate(EvaluateConfig(run)).kept
    torn = kept.parent / ".held-out.4711.part"
    torn.mkdir()
    shutil.copy(kept / evaluations.DOCUMENT, torn)
    assert "`held-out`" in card.card(subject(run), Usage("open_clip", ""), PROOF)
    assert cli("report", run, "--output", "page.html").code == 0


def test_a_classifier_whose_probabilities_are_calibrated_says_so(run, monkeypatch):
    found = Temperature(2.0, open_run(run).alpha, open_run(run).base, open_run(run).template)
    for part in ("classifier", None):
        made = replace(subject(run), options=FormatOptions(part))
        assert "nobody calibrated them" in card.card(made, Usage("onnx", ""), PROOF)
        with monkeypatch.context() as patched:
            patched.setattr(formats_subject, "temperature_of", lambda run: found)
            assert ("nobody calibrated them" in card.card(made, Usage("onnx", ""), PROOF)) == (part is None)


def test_what_the_model_knows_less_well_is_named(run):
    kept = evaluate(EvaluateConfig(run)).kept
    document = json.loads((kept / evaluations.DOCUMENT).read_text())
    tables = {row["alpha"]: evaluations.read(kept).tables(row["alpha"]) for row in document["alphas"]}
    for row, value in zip(document["alphas"], (1.0, 0.5), strict=True):
        row["base"]["per_class"] = {"cow": {"accuracy": value, "n": 2}}
    evaluations.write(kept, document, tables)
    assert "`cow` 100 → 50 % of 2" in card.card(subject(run), Usage("open_clip", ""), PROOF)


def test_names_are_text(run):
    made = subject(run, base=tuple(HOSTILE))
    record = made.run.record
    recipe = replace(record.recipe, template="<b>{}|</b>")
    made = replace(made, run=replace(made.run, record=replace(record, recipe=recipe, shots="x/a: |\x1b---")))
    text = card.card(made, Usage("open_clip", "It loads."), PROOF)
    assert "\x1b" not in text
    _, body = parts_of(text)
    page = rendered(body)
    assert page.tags <= PLAIN
    shown = [name.replace("\x1b", "\\x1b").replace("\n", "\\n") for name in HOSTILE]
    assert [span for span in page.spans if span in shown] == shown
    assert "<b>{}|</b>" in page.spans


def test_the_header_holds_any_folders_name(run, tmp_path):
    odd = tmp_path / "a: 'b' |\x1b# ---"
    evaluate(EvaluateConfig(run))
    run.rename(odd)
    header, body = parts_of(card.card(subject(odd), Usage("open_clip", ""), PROOF))
    assert header["model-index"][0]["name"] == "a: 'b' |\\x1b# ---"
    assert rendered(body).tags <= PLAIN | {"table", "thead", "tbody", "tr", "th", "td"}


def test_no_folder_of_the_machine_is_told(run):
    text = card.card(subject(run), Usage("open_clip", ""), PROOF)
    folder = Path(json.loads((run / "config.json").read_text())["pretrained"]["model"].removeprefix("local-dir:"))
    assert f"`{folder.name}`" in text
    assert str(folder.parent) not in text
    assert str(run.parent) not in text


def test_a_logit_bias_is_explained(run):
    made = subject(run)
    assert "sigmoid" not in card.card(made, Usage("open_clip", ""), PROOF)
    made.model.model.logit_bias = torch.nn.Parameter(torch.tensor(-12.5))
    assert "a logit bias (-12.5)" in card.card(made, Usage("open_clip", ""), PROOF)


def test_the_pretrained_weights_are_named_where_they_are_published(run):
    source = open_run(run).source
    assert hub_name(source) is None
    assert hub_name(replace(source, model="hf-hub:owner/name")) == "owner/name"
    known = hub_name(replace(source, model="ViT-B/32", pretrained="laion2b_s34b_b79k"))
    assert known == open_clip.get_pretrained_cfg("ViT-B-32", "laion2b_s34b_b79k")["hf_hub"].rstrip("/")


def test_the_card_of_a_difference_leaves_to_open_clip_what_that_fetches(run):
    folder = export(ExportConfig(run, format="difference", output=run.parent / "out")).output
    for model, tag, words in (
        ("ViT-B-32", "openai", "names a folder of them instead, and `--pretrained FILE` a file."),
        ("hf-hub:owner/name", None, "names a folder of them instead."),
    ):
        made = subject(run)
        source = replace(made.run.source, model=model, pretrained=tag)
        made = replace(made, run=replace(made.run, record=replace(made.run.record, pretrained=source)))
        text = FORMATS_MADE["difference"].usage(made, folder).text
        assert "```sh\npython restore.py . restored --alpha 0.5\n```" in text
        assert words in " ".join(text.split())
