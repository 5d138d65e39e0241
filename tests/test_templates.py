"""Several templates: a class is the mean of its unit-norm texts, brought back to unit norm."""

from __future__ import annotations

import copy
import json
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import oracles
import pytest
import torch
from conftest import Cli, picture
from test_predict import images, rows_of

import clipfit
from clipfit import (
    AdaptConfig,
    EvaluateConfig,
    ExportConfig,
    PredictConfig,
    UsageError,
    adapt,
    evaluate,
    export,
    predict,
)
from clipfit.config.edits import EditSettings
from clipfit.errors import ClipfitError
from clipfit.formats import consumer
from clipfit.measure import evaluations, scoring
from clipfit.model import templates
from clipfit.model.named import Additions
from clipfit.model.weights import state_sha256
from clipfit.prompts import prompts
from clipfit.rows import tables
from clipfit.runs import files
from clipfit.runs.run import open_run

LIST = ("a photo of a {}", "{}, an icon", "100% {} {0}")
NAMES = ["bee", "a {} b", "{0}", "50% %s", "red fox"]


@pytest.fixture(scope="session")
def listed(tmp_path_factory) -> Path:
    """LIST as a file; never written to."""
    file = tmp_path_factory.mktemp("lists") / "templates.txt"
    file.write_text("".join(f"{template}\n" for template in LIST), "utf-8")
    return file


@pytest.fixture(scope="session")
def listed_run(split, models, listed, tmp_path_factory) -> Path:
    """A run of atha with the list; never written to."""
    output = tmp_path_factory.mktemp("runs") / "animals-listed"
    return adapt(AdaptConfig(split, method="atha", model=models["vit"], output=output, templates=listed)).run


def copied(run: Path, target: Path) -> Path:
    return Path(shutil.copytree(run, target, ignore=shutil.ignore_patterns("evaluations")))


# ---- the mean


def unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / oracles.dot(vector, vector).sqrt()


def test_a_class_is_the_mean_of_its_unit_norm_texts(vit):
    found = scoring.texts(vit, NAMES, LIST)
    assert found.class_tokens is None
    for row, name in zip(found.embeddings, NAMES, strict=True):
        alone = [vit.encode_text(vit.tokenize([name.join(template.split("{}"))]))[0].double() for template in LIST]
        expected = unit(sum(map(unit, alone)) / len(LIST))
        torch.testing.assert_close(row.double(), expected, atol=1e-6, rtol=0)
        assert (row.double() - unit(alone[0])).abs().max() > 0.01


def test_one_template_is_no_mean(vit):
    tokens = vit.tokenize(prompts(NAMES, LIST[1]))
    assert torch.equal(scoring.texts(vit, NAMES, LIST[1:2]).embeddings, vit.read(tokens).embeddings)


def test_class_tokens_come_from_the_mean_of_inner_features(vit):
    edited = vit.with_additions(Additions(EditSettings(text_block=0)))
    found = scoring.texts(edited, NAMES, LIST)
    model = copy.deepcopy(vit.model).double()
    f = [oracles.inner_features(model, vit.tokenize(prompts(NAMES, template)), 0) for template in LIST]
    expected = oracles.class_tokens(model, sum(f) / len(LIST))
    torch.testing.assert_close(found.class_tokens.double(), expected, atol=1e-4, rtol=1e-4)
    apart = sum(oracles.class_tokens(model, part / part.norm(dim=1, keepdim=True)) for part in f) / len(LIST)
    assert (found.class_tokens.double() - apart).abs().max() > 0.1  # nor the mean of unit-norm ones


def test_many_classes_are_read_in_parts(vit, monkeypatch):
    """Memory holds 512 texts, however many classes there are and templates."""
    monkeypatch.setattr(scoring, "TEXTS_AT_ONCE", 4)
    names, seen = [f"class {k}" for k in range(10)], []
    edited = vit.with_additions(Additions(EditSettings()))
    whole = [scoring.texts(edited, [name], LIST) for name in names]
    tokenize = edited.tokenize
    monkeypatch.setattr(edited, "tokenize", lambda texts: seen.append(len(texts)) or tokenize(texts))
    found = scoring.texts(edited, names, LIST)
    assert seen == [4] * 6 + [2] * 3
    torch.testing.assert_close(found.embeddings, torch.cat([one.embeddings for one in whole]))
    torch.testing.assert_close(found.class_tokens, torch.cat([one.class_tokens for one in whole]), atol=1e-4, rtol=1e-4)


# ---- the list


def test_a_file_is_read_line_by_line(tmp_path):
    file = tmp_path / "templates.txt"
    file.write_bytes("\ufeffa photo of a {}\r\n\r\n  ein Bär: {}\t\r\n{} {x} {0} 100%".encode())
    assert templates.read(file) == ("a photo of a {}", "ein Bär: {}", "{} {x} {0} 100%")


def test_clips_own_list():
    own = templates.read("clip")
    assert (len(own), len(set(own))) == (80, 80)
    assert {"a photo of a {}.", "a tattoo of the {}."} < set(own)
    assert templates.given(list(own)) == templates.given("clip") == templates.read(Path("clip"))


BROKEN = {
    "a photo of a cat": "must have {}, which stands for the class name, exactly once in each; found 'a photo of a cat'",
    "a {}\n{} and {}": "exactly once in each; found '{} and {}'",
    "a {}\nb {}\n a {} ": "must have each template once; found 'a {}' 2 times",
    "": "is empty: expected a line like `a photo of a {}`",
    "\n \r\n": "is empty",
    "a \x1b[2J{}": "must have no control characters",
    "a \xe4{}": "is not UTF-8 text",
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_list_that_is_none_is_refused(cli: Cli, split, split_run, models, tmp_path, text):
    (tmp_path / "t.txt").write_bytes(text.encode("latin-1"))
    images(tmp_path / "in", 1)
    for command in (("adapt", split, "--model", models["vit"]), ("evaluate", split_run), ("predict", split_run, "in")):
        cli(*command, "--templates", "t.txt").fails(3, "t.txt", BROKEN[text])
    assert not (tmp_path / "runs").exists()


def test_a_list_that_is_not_there_and_one_beside_a_template(cli: Cli, split_run, tmp_path):
    cli("evaluate", split_run, "--templates", "gone.txt").fails(3, "file of templates gone.txt")
    cli("predict", split_run, tmp_path, "--template", "a {}", "--templates", "clip").fails(2, "give one of them")
    for wrong, words in (([], "at least one"), (["a {}", "a {}"], "each template once"), (["a"], "exactly once")):
        with pytest.raises(UsageError, match=words):
            clipfit.load(split_run, templates=wrong)
    with pytest.raises(UsageError, match="give one of them"):
        clipfit.load(split_run, template="a {}", templates=["a {}"])


# ---- adapt


def test_one_template_in_a_file_is_that_template(cli: Cli, split, models, tmp_path):
    (tmp_path / "one.txt").write_text("an icon of a {}\n")
    for name, given in (("one", ("--templates", "one.txt")), ("same", ("--template", "an icon of a {}"))):
        assert cli("adapt", split, "--model", models["vit"], "--output", name, *given).code == 0
    first, second = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir() if file.name != "timing.json"}
        for name in ("one", "same")
    )
    assert first == second
    listed, own = (cli("evaluate", "one", "--json", *given).document for given in (("--templates", "one.txt"), ()))
    assert listed == own
    assert Path(own["kept"]).name == "held-out"


def test_the_list_is_in_the_run(listed_run):
    """Training takes the first alone; everything that names images takes all."""
    run = open_run(listed_run)
    assert (run.template, run.templates) == (LIST[0], LIST)
    documents = {name: json.loads((listed_run / f"{name}.json").read_text()) for name in ("config", "classes")}
    assert documents["config"]["recipe"]["template"] == documents["classes"]["template"] == LIST[0]
    assert documents["config"]["templates"] == documents["classes"]["templates"] == list(LIST)
    assert files.read_metadata(listed_run / "model.safetensors")["templates"] == list(LIST)
    model = clipfit.load(listed_run)
    assert (model.templates, model.template) == (LIST, LIST[0])
    expected = scoring.texts(model.clip, run.base, LIST)
    assert torch.equal(model.candidates().texts.embeddings, expected.embeddings)
    assert torch.equal(model.candidates().texts.class_tokens, expected.class_tokens)


def test_training_takes_the_first_unless_told_otherwise(cli: Cli, split, models, listed, tmp_path):
    def weights(*given):
        assert cli("adapt", split, "--model", models["vit"], "--output", "run", "--overwrite", *given).code == 0
        return state_sha256(files.read_tensors(tmp_path / "run/finetuned.safetensors")[0])

    first, other = weights("--template", LIST[0]), weights("--template", "the {}")
    assert weights("--templates", listed) == first != other
    assert weights("--templates", listed, "--template", "the {}") == other
    run = open_run(tmp_path / "run")
    assert (run.template, run.templates) == ("the {}", LIST)


def test_a_run_that_is_adapted_on_hands_its_list_down(cli: Cli, split, listed_run, tmp_path):
    def adapted(start, output, *given):
        command = ("adapt", split, "--model", start, "--method", "atha", "--output", output, *given)
        assert cli(*command).code == 0
        return open_run(tmp_path / output)

    assert adapted(listed_run, "child").templates == LIST
    assert adapted("child", "grandchild").templates == LIST
    alone = adapted("child", "alone", "--template", "the {}")
    assert (alone.template, alone.templates) == ("the {}", ("the {}",))
    assert adapted("alone", "after").templates == ("the {}",)


def test_metadata_of_another_list_is_noticed(listed_run, tmp_path):
    run = copied(listed_run, tmp_path / "run")
    (run / "files.json").unlink()
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "format": 1, "templates": list(LIST[:2])}))
    with pytest.raises(ClipfitError, match="its templates is"):
        open_run(run)


def test_learnt_context_stands_in_the_words_of_one_template(cli: Cli, split, models, listed, tmp_path):
    command = ("adapt", split, "--model", models["vit"], "--method", "finetune", "--context")
    cli(*command, "--templates", listed).fails(2, "--context learns vectors in place of the words", "leave out")
    assert cli(*command, "--output", "run").code == 0
    images(tmp_path / "in", 1)
    cli("evaluate", "run", "--templates", listed).fails(2, "were learnt for 'a photo of a {}'")
    cli("predict", "run", "in", "--templates", listed).fails(2, "were learnt for 'a photo of a {}'")


# ---- evaluate and predict


def test_evaluate_takes_a_list_in_place_of_the_runs(split_run, listed, tmp_path):
    run = copied(split_run, tmp_path / "run")
    own = evaluate(EvaluateConfig(run))
    other = evaluate(EvaluateConfig(run, templates=listed))
    assert (own.templates, other.templates) == (LIST[:1], LIST)
    assert (own.kept.name, other.kept.name) == ("held-out", "held-out-templates")
    assert any("3 templates of --templates" in note for note in other.notes)
    table = evaluations.read(other.kept).tables(0.5)["union"]
    assert (table.template, table.templates) == (LIST[0], LIST)
    model = clipfit.load(run, templates=LIST, classes=table.candidates)
    paths = [open_run(run).place("shots") / source for source in table.ids]
    torch.testing.assert_close(model.logits(paths), table.logits)
    assert not torch.allclose(model.logits(paths), evaluations.read(own.kept).tables(0.5)["union"].logits, atol=1e-3)
    assert evaluations.read(own.kept).tables(0.5)["union"].templates == LIST[:1]


def test_a_run_is_measured_by_its_own_list(listed_run, tmp_path):
    run = copied(listed_run, tmp_path / "run")
    own = evaluate(EvaluateConfig(run, alphas=(0.5, 1.0)))
    assert (own.templates, own.kept.name) == (LIST, "held-out")
    table = evaluations.read(own.kept).tables(1.0)["union"]
    paths = [open_run(run).place("shots") / source for source in table.ids]
    model = clipfit.load(run, alpha=1, classes=table.candidates)
    torch.testing.assert_close(model.logits(paths), table.logits)


def test_a_model_that_nobody_adapted(cli: Cli, split, models, listed):
    command = ("evaluate", "--model", models["vit"], "--data", split, "--json")
    assert cli(*command, "--templates", listed).document["templates"] == list(LIST)
    assert cli(*command).document["templates"] == [LIST[0]]


def test_predict_takes_a_list_in_place_of_the_runs(cli: Cli, split_run, listed, tmp_path):
    images(tmp_path / "in", 2)
    found = rows_of(cli("predict", split_run, "in", "--templates", listed))
    model = clipfit.load(split_run, templates=listed)
    for row, said in zip(found, model.predict([tmp_path / f"in/{k}.png" for k in range(2)]), strict=True):
        assert (row["label"], row["probability"]) == (said.label, pytest.approx(said.probability, rel=1e-5))
    assert found != rows_of(cli("predict", split_run, "in"))
    assert model.at(1.0).templates == model.among(["x"]).templates == LIST
    assert model.among(model.classes, "the {}").templates == ("the {}",)


def test_a_temperature_holds_for_the_very_list(cli: Cli, listed_run, listed, tmp_path):
    run = copied(listed_run, tmp_path / "run")
    images(tmp_path / "in", 1)
    document = {"value": 4.0, "alpha": 0.5, "classes": ["bee", "cow", "dog"], "template": LIST[0]}
    (tmp_path / "turned.txt").write_text("\n".join(reversed(LIST)))
    for kept, holds in (({"templates": LIST}, True), ({"templates": LIST[:2]}, False), ({}, False)):
        (run / "folds.json").write_text(json.dumps({"temperature": {**document, **kept}}))
        assert rows_of(cli("predict", run, "in"))[0]["calibrated"] == holds
        assert rows_of(cli("predict", run, "in", "--templates", listed))[0]["calibrated"] == holds
        assert not rows_of(cli("predict", run, "in", "--templates", "turned.txt"))[0]["calibrated"]
        assert rows_of(cli("predict", run, "in", "--template", LIST[0]))[0]["calibrated"] == (kept == {})


def test_rows_go_on_by_the_same_list_alone(cli: Cli, split_run, tmp_path, monkeypatch):
    images(tmp_path / "in", 2)
    config = PredictConfig((split_run, tmp_path / "in"), output=tmp_path / "out.jsonl", templates=Path("clip"))
    with monkeypatch.context() as patch:
        patch.setattr(tables, "publish", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            predict(config)
    command = ("predict", split_run, tmp_path / "in", "--output", tmp_path / "out.jsonl", "--resume")
    cli(*command).fails(2, "templates")
    assert cli(*command, "--templates", "clip").code == 0


# ---- exports


@pytest.fixture(scope="session")
def plain_run(split, models, listed, tmp_path_factory) -> Path:
    """A run of cite with the list; never written to."""
    output = tmp_path_factory.mktemp("runs") / "animals-plain"
    return adapt(AdaptConfig(split, model=models["vit"], output=output, templates=listed)).run


FORMATS = [
    "open_clip", "safetensors", "difference", "transformers",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("onnx-classifier", "onnx-text", "torch-text")),
]  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_is_proved_with_the_list(plain_run, tmp_path, monkeypatch, format):
    """A consumer that takes another text of a class than the mean is found out."""
    monkeypatch.chdir(tmp_path)
    name, _, part = format.partition("-")
    config = ExportConfig(plain_run, format=name, part=part or None)
    told = export(config)
    assert told.proof.identical_pixels.largest_difference < (1e-2 if name == "difference" else 1e-4)
    assert json.loads((told.output / "clipfit.json").read_text())["templates"] == list(LIST)
    assert f"the mean of {len(LIST)} unit-norm embeddings" in (told.output / "README.md").read_text("utf-8")
    if part == "classifier":
        return  # it has the texts inside
    start = consumer.start

    def by_the_first_alone(script, arguments, exchange):
        if (asked := exchange / "request.json").exists():
            request, (tensors, _) = json.loads(asked.read_text()), files.read_tensors(exchange / "request.safetensors")
            count = len(request["texts"]) // len(LIST)
            asked.write_text(json.dumps({**request, "texts": request["texts"][:count] * len(LIST)}))
            tensors["tokens"] = tensors["tokens"][:count].repeat(len(LIST), 1)
            files.write_tensors(exchange / "request.safetensors", tensors, {})
        start(script, arguments, exchange)

    monkeypatch.setattr(consumer, "start", by_the_first_alone)
    with pytest.raises(ClipfitError, match="reads another model"):
        export(replace(config, output=tmp_path / "wrong"))


@pytest.mark.parametrize("format", ["open_clip", "safetensors", "difference"])
def test_an_export_that_clipfit_loads_gives_the_runs_logits(plain_run, tmp_path, monkeypatch, format):
    monkeypatch.chdir(tmp_path)
    images(tmp_path, 2)
    folder = export(ExportConfig(plain_run, format=format)).output
    run, again = clipfit.load(plain_run), clipfit.load(folder)
    assert again.templates == LIST
    paths = [tmp_path / f"{k}.png" for k in range(2)]
    near = {"atol": 1e-2, "rtol": 1e-2} if format == "difference" else {}
    torch.testing.assert_close(again.logits(paths), run.logits(paths), **near)


@pytest.mark.slow
def test_a_classifier_of_atha_has_the_means_inside(listed_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = export(ExportConfig(listed_run, format="torch"))
    assert told.proof.identical_pixels.largest_difference < 1e-4


@pytest.mark.parametrize("format", ["open_clip", "safetensors", "transformers"])
def test_the_code_of_the_card_takes_the_mean(plain_run, tmp_path, monkeypatch, capsys, format):
    monkeypatch.chdir(tmp_path)
    folder = export(ExportConfig(plain_run, format=format)).output
    picture(7, (40, 40)).save(folder / "image.jpg", quality=100)
    monkeypatch.chdir(folder)
    names = {"texts": ["a cat"]}
    for code in re.findall(r"```python\n(.*?)```", Path("README.md").read_text("utf-8"), re.DOTALL):
        exec(code, names)
    expected = clipfit.load(plain_run).logits("image.jpg").softmax(1)
    torch.testing.assert_close(names["probabilities"].reshape(1, -1), expected, atol=1e-4, rtol=1e-3)
    capsys.readouterr()


def test_the_card_shows_what_was_measured_with_the_runs_own_list(split_run, listed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = copied(split_run, tmp_path / "run")
    evaluate(EvaluateConfig(run, templates=listed))
    assert "None was measured" in (export(ExportConfig(run)).output / "README.md").read_text("utf-8")
    evaluate(EvaluateConfig(run))
    told = export(ExportConfig(run, output=tmp_path / "again")).output
    assert "None was measured" not in (told / "README.md").read_text("utf-8")
