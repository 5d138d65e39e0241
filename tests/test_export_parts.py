"""`export --format onnx` and `--format torch`: parts as programs, proved by a consumer that has that library alone."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import picture
from families import make_family

import clipfit
from clipfit import ExportConfig, export
from clipfit.config.outputs import FORMATS, FormatOptions
from clipfit.errors import UsageError
from clipfit.formats import _preprocess, consumer, parts, subject
from clipfit.formats import torch as torch_format
from clipfit.formats.subject import in_effect, subject_of
from clipfit.measure.calibration import Temperature
from clipfit.runs.run import open_run

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
FILES = {"onnx": "model.onnx", "torch": "model.pt2"}
newer = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9), reason="an older torch pickles, which is refused"
)
BOTH = ["onnx", pytest.param("torch", marks=newer)]


@pytest.fixture(scope="module")
def atha_run(split, models, tmp_path_factory) -> Path:
    """Never written to."""
    from clipfit import AdaptConfig, adapt

    output = tmp_path_factory.mktemp("runs") / "animals-atha"
    return adapt(AdaptConfig(split, method="atha", model=models["vit"], output=output)).run


def ours(run: Path, x: torch.Tensor) -> torch.Tensor:
    """clipfit's own logits among the base classes: (n, C)."""
    opened = open_run(run)
    subject = subject_of(opened, opened.alpha, in_effect(opened, opened.alpha), "", ExportConfig().format_options)
    tokens = subject.model.tokenize([f"a photo of a {name}" for name in opened.base])
    with torch.no_grad():
        u, t = subject.model.encode(x, tokens)
    return subject.model.logits(u, t)


def session(folder: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])


def test_a_classifier_of_a_run_with_edits_takes_any_number_of_pictures(cli, atha_run, tmp_path):
    """The graph holds class tokens and edits; the batch is free, one picture and none of the tracing's two among it."""
    done = cli("export", atha_run, "--format", "onnx", "--json")
    assert done.code == 0, done.stderr
    proof = done.document["proof"]
    assert proof["consumer"].startswith("onnxruntime")
    assert proof["identical_pixels"]["same_labels"] == proof["files"]["same_labels"] == 6
    assert proof["seen_otherwise"] == []
    graph = session(tmp_path / done.document["output"])
    x = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = ours(atha_run, x)
    for size in (1, 7):
        logits, probabilities = graph.run(["logits", "probabilities"], {"pixels": x[:size].numpy()})
        np.testing.assert_allclose(logits, expected[:size], atol=1e-4)
        np.testing.assert_allclose(probabilities, expected[:size].softmax(1), atol=1e-5)


@newer
def test_edits_make_the_difference(atha_run, tmp_path, monkeypatch):
    """Without them the same weights give other logits than the proof allows."""
    monkeypatch.chdir(tmp_path)
    usual = parts.traced

    def plain(part):
        part.module.edits.forward = lambda patches, *_: patches.float()
        try:
            return usual(part)
        finally:
            del part.module.edits.forward

    monkeypatch.setattr(parts, "traced", plain)
    with pytest.raises(Exception, match="reads another model"):
        export(ExportConfig(atha_run, format="torch"))


@pytest.mark.parametrize("format", BOTH)
@pytest.mark.parametrize("part", ["image", "text"])
def test_towers(cli, split_run, tmp_path, format, part):
    done = cli("export", split_run, "--format", format, "--part", part, "--json")
    assert done.code == 0, done.stderr
    assert done.document["output"] == f"exports/animals-cite-{format}-0.5-{part}"
    proof = done.document["proof"]
    assert proof["identical_pixels"]["same_labels"] == 6
    assert (proof["files"] is None) == (part == "text")
    names = {path.name for path in (tmp_path / done.document["output"]).iterdir()}
    assert names >= {FILES[format], "clipfit.json", "README.md", "proof.json"}
    assert ("tokenizer.json" in names, "preprocess.py" in names) == (part == "text", part == "image")


@pytest.mark.parametrize("format", FILES)
def test_towers_of_a_run_with_edits_are_refused_and_the_classifier_is_named(cli, atha_run, format):
    done = cli("export", atha_run, "--format", format, "--part", "image")
    done.fails(2, f"the format {format} with --part image cannot hold edits", "--format onnx --part classifier",
               "--format torch --part classifier")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("format", FILES)
def test_the_text_tower_holds_context_vectors(cli, split, models, format):
    told = ("--model", models["vit"], "--method", "finetune", "--context", "--epochs", 1, "--output", "run")
    assert cli("adapt", split, *told).code == 0
    done = cli("export", "run", "--format", format, "--part", "text", "--json")
    assert done.code == 0, done.stderr
    assert done.document["proof"]["identical_pixels"]["same_labels"] == 6
    cli("export", "run", "--format", "open_clip").fails(2, "cannot hold context vectors", f"--format {format} --part")


@pytest.mark.parametrize("format", BOTH)
def test_the_cards_own_code_reads_texts_as_the_run_does(cli, split, models, format, monkeypatch, tmp_path):
    """Where a text is read with what it is filled with too: no causal mask."""
    pytest.importorskip("tokenizers")
    told = ("--model", models["bidirectional"], "--method", "finetune", "--epochs", 1, "--output", "run")
    assert cli("adapt", split, *told).code == 0
    done = cli("export", "run", "--format", format, "--part", "text", "--json")
    assert done.code == 0, done.stderr
    folder = tmp_path / done.document["output"]
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text("utf-8"), re.DOTALL)
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        names: dict[str, Any] = {}
        exec(compile(code, "README.md", "exec"), names)
    found = torch.as_tensor(np.asarray(names["found"][0] if format == "onnx" else names["found"].detach()))
    expected = clipfit.load(tmp_path / "run").embed_texts(["a photo of a cat"])
    torch.testing.assert_close(found.reshape(expected.shape), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("format", BOTH)
def test_a_logit_bias_is_in_the_logits_of_every_part(cli, split, format, tmp_path):
    """SigLIP's: a consumer that takes the sigmoid needs it, and it cancels in the probabilities."""
    told = ("--model", make_family("siglip", tmp_path), "--epochs", 1, "--output", "run")
    assert cli("adapt", split, *told).code == 0
    for part in FORMATS[format].part:
        done = cli("export", "run", "--format", format, "--part", part, "--json")
        assert done.code == 0, done.stderr
        assert done.document["proof"]["identical_pixels"]["largest_difference"] < 1e-3


def test_the_metadata_says_what_a_consumer_needs(split_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = export(ExportConfig(split_run, format="onnx", alpha=1.0)).output
    told = {k: json.loads(v) for k, v in session(folder).get_modelmeta().custom_metadata_map.items()}
    assert told["classes"] == ["bee", "cow", "dog"]
    assert (told["alpha"], told["temperature"], told["calibrated"], told["part"]) == (1.0, 1.0, False, "classifier")
    assert told["preprocess"] == {"size": [32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4],
                                  "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0}  # fmt: skip
    text = (folder / "model.onnx").read_bytes()
    assert b"/site-packages/" not in text
    assert b".py" not in text


def test_probabilities_are_calibrated_where_the_runs_temperature_holds(split_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = open_run(split_run)
    made = Temperature(2.5, run.alpha, tuple(reversed(run.base)), run.template)
    monkeypatch.setattr(subject, "temperature_of", lambda run: made)
    folder = export(ExportConfig(split_run, format="onnx")).output
    logits, probabilities = session(folder).run(None, {"pixels": np.zeros((1, 3, 32, 32), np.float32)})
    np.testing.assert_allclose(probabilities, torch.tensor(logits / 2.5).softmax(1), atol=1e-6)
    told = session(folder).get_modelmeta().custom_metadata_map
    assert (told["temperature"], told["calibrated"]) == ("2.5", "true")
    told = parts.facts_of(subject_of(run, 1.0, in_effect(run, 1.0), "onnx", FormatOptions("classifier")))
    assert (told["temperature"], told["calibrated"]) == (1.0, False)


def test_int8_says_its_accuracy_beside_that_of_the_graph_it_was_made_from(cli, split_run, tmp_path):
    plain = cli("export", split_run, "--format", "onnx", "--json").document
    done = cli("export", split_run, "--format", "onnx", "--quantize", "int8", "--json")
    assert done.code == 0, done.stderr
    folder = tmp_path / done.document["output"]
    proof = done.document["proof"]
    before = proof["further"]["before quantisation"]
    assert before["largest_difference"] < 1e-4 < proof["identical_pixels"]["largest_difference"]
    assert None not in (before["accuracy"], proof["identical_pixels"]["accuracy"])
    assert "before quantisation" in done.stderr
    assert "% right" in done.stderr
    assert not list(folder.glob("float*"))
    smaller, larger = ((f / "model.onnx").stat().st_size for f in (folder, tmp_path / plain["output"]))
    assert smaller < 0.6 * larger
    assert session(folder).get_modelmeta().custom_metadata_map["part"] == '"classifier"'


@pytest.mark.slow
@pytest.mark.parametrize("format", FILES)
def test_fp16_halves_the_file_and_stays_close(cli, atha_run, tmp_path, format):
    sizes, far = [], []
    for dtype in ("fp32", "fp16"):
        told = cli("export", atha_run, "--format", format, "--dtype", dtype, "--json").document
        sizes.append((tmp_path / told["output"] / FILES[format]).stat().st_size)
        far.append(told["largest_difference"])
    assert sizes[0] - sizes[1] > 100_000  # of 240,000 in weights
    assert far[0] < far[1]


@newer
def test_nothing_is_pickled_in_a_program(split_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = export(ExportConfig(split_run, format="torch")).output
    with zipfile.ZipFile(folder / "model.pt2") as archive:
        contents = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    assert not [name for name, data in contents.items() if b"ctorch" in data or data[:2] in (b"PK", b"\x80\x02")]
    program = torch.export.load(folder / "model.pt2").module()
    assert program(torch.zeros(5, 3, 32, 32))[0].shape == (5, 3)


def test_a_torch_that_pickles_is_refused_with_the_version_that_is_needed(split_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = torch.export.save

    def pickling(program, path, **named):
        saved(program, path, **named)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("serialized_state_dict.pt", b"PK\x03\x04")

    monkeypatch.setattr(torch_format.torch.export, "save", pickling)
    with pytest.raises(UsageError, match=r"pickles in such a program .*needs torch 2\.9 or newer"):
        export(ExportConfig(split_run, format="torch"))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("format", FILES)
def test_the_consumer_is_a_process_of_its_own(split_run, consumers_run_here, monkeypatch, tmp_path, format):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(consumer, "start", consumers_run_here)
    proof = export(ExportConfig(split_run, format=format)).proof
    assert proof.identical_pixels.images == proof.identical_pixels.same_labels == 6


def test_the_consumer_of_a_graph_needs_no_torch():
    text = Path(consumer.SCRIPTS / "_consume_onnx.py").read_text()
    assert "import torch" not in text
    assert "from torch" not in text


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)], ids=str)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_preprocess_py_sees_what_open_clip_sees(mode, size, interpolation):
    """Of pictures of all shapes, to half a step of 255."""
    import open_clip.transform as of

    constants = {"size": list(size), "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "fill_color": 7,
                 "resize_mode": mode, "interpolation": interpolation}  # fmt: skip
    if mode == "shortest" and size[0] != size[1] and interpolation == "bilinear":
        pytest.skip("open_clip resizes these by bicubic whatever is said")
    theirs = of.image_transform_v2(of.PreprocessCfg(**constants), is_train=False)
    for k, shape in enumerate([(40, 36), (37, 80), (33, 33), (20, 24), (101, 34), (32, 32)]):
        image = picture(k, shape)
        found = _preprocess.pixels(image, constants)
        np.testing.assert_allclose(found, theirs(image), atol=1e-5)


def test_what_an_exporter_prints_is_no_data(capsys):
    with parts.quiet():
        print("Applied 13 of general pattern rewrite rules.")
    print("{}")
    assert capsys.readouterr().out == "{}\n"
