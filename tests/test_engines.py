"""`--runtime`: what computes the image tower in torch's place, with torch's embeddings and labels."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Cli, picture
from families import save_model, shrunk_cfg
from test_predict import images

from clipfit import (
    AdaptConfig,
    EvaluateConfig,
    ExportConfig,
    ModelError,
    UsageError,
    adapt,
    engines,
    evaluate,
    export,
    load,
    predict,
    predictor,
)
from clipfit.config.predict import PredictConfig
from clipfit.engines import sessions
from clipfit.events import Silent
from clipfit.formats import onnx, subject
from clipfit.formats.parts import Part
from clipfit.measure import evaluations
from clipfit.measure.calibration import Temperature
from clipfit.model import devices
from clipfit.model.weights import state_sha256
from clipfit.predictor import Predictor
from clipfit.runs.files import encoded, json_text

OTHERS = tuple(name for name in engines.RUNTIMES if name != engines.TORCH)
CLASSES = ("bee", "cow", "dog", "a sign", "umbrella")
ROUNDING = 1e-5  # of a cosine

others = pytest.mark.parametrize("runtime", OTHERS)


@pytest.fixture(autouse=True)
def _both_are_here() -> None:
    for library in ("onnxruntime", "openvino", "onnx", "onnxscript"):
        pytest.importorskip(library)


_WRITTEN: dict[str, bytes] = {}


@pytest.fixture(autouse=True)
def _a_graph_is_written_once(monkeypatch) -> None:
    """The same weights and inputs are written once for all tests: it is what takes the time."""

    def write_graph(part: Part, path: Path) -> None:
        inputs = [(name, x.shape[0]) for name, x in zip(part.inputs, part.examples, strict=True)]
        key = f"{state_sha256(part.module.state_dict())} {inputs} {json_text(part.facts)}"
        if key not in _WRITTEN:
            in_earnest(part, path)
            _WRITTEN[key] = path.read_bytes()
        path.write_bytes(_WRITTEN[key])

    in_earnest = onnx.write_graph
    monkeypatch.setattr(onnx, "write_graph", write_graph)


@pytest.fixture(scope="module")
def atha_run(split: Path, models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapt(AdaptConfig(split, "atha", models["vit"], output=tmp_path_factory.mktemp("runs") / "atha")).run


def pictures(count: int) -> list[object]:
    return [picture(seed) for seed in range(count)]


def require_same(found: Predictor, expected: Predictor, classes: tuple[str, ...] | None = None) -> None:
    """Cosines are the same but for rounding, and labels where the best leads by more than that can move."""
    for count in (0, 1, 67):  # 64 at once, and then a short batch
        given = pictures(count)
        mine, theirs = found.logits(given, classes), expected.logits(given, classes)
        scale = float(expected.clip.scale)
        assert mine.shape == theirs.shape
        if count:
            difference = float((mine - theirs).abs().max()) / scale
            assert difference < ROUNDING
            best = theirs.topk(2, dim=1)
            sure = (best.values[:, 0] - best.values[:, 1]) / scale > 2 * difference
            assert sure.sum() > count / 2
            assert mine.argmax(1)[sure].equal(best.indices[sure, 0])


# ---- the same embeddings and labels


@pytest.mark.slow
@others
def test_clipfit_tiny_is_the_same(runtime):
    found = load("clipfit-tiny", classes=CLASSES, runtime=runtime)
    assert found.clip.features == f"fp32 by {runtime}"
    require_same(found, load("clipfit-tiny", classes=CLASSES))


@pytest.mark.slow
@others
def test_a_vit_b_32_of_two_blocks_is_the_same(runtime, tmp_path):
    model = save_model(tmp_path / "model", shrunk_cfg("ViT-B-32", tmp_path))
    require_same(load(model, classes=CLASSES, runtime=runtime), load(model, classes=CLASSES))


@pytest.mark.slow
@others
def test_a_run_is_the_same_at_every_ratio(runtime, split_run):
    found, expected = load(split_run, runtime=runtime), load(split_run)
    require_same(found, expected)
    require_same(found.at(1.0), expected.at(1.0))
    assert found.at(1.0).clip.features == f"fp32 by {runtime}"


@pytest.mark.slow
@others
def test_edited_patch_tokens_go_by_the_candidates(runtime, atha_run):
    found, expected = load(atha_run, runtime=runtime), load(atha_run)
    for classes in (None, ("cow", "lion", "bee"), CLASSES):
        require_same(found, expected, classes)


def test_weights_that_change_take_the_graph_of_the_old_ones_with_them(vit):
    engines.engine_of("onnxruntime", "auto", vit).attach(vit)
    assert vit.features == "fp32 by onnxruntime"
    vit.load_state(vit.snapshot())
    assert vit.features == "fp32"


# ---- the verbs


class Said(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.mark.slow
@others
@pytest.mark.parametrize("run_of", ["split_run", "atha_run"])
def test_evaluate_keeps_the_same_tables_and_says_by_what(runtime, run_of, request, split):
    run, said = request.getfixturevalue(run_of), Said()
    tables = {}
    for chosen in (engines.TORCH, runtime):
        measured = evaluate(EvaluateConfig(run, alphas=(0.0, 0.5), runtime=chosen), said)
        assert measured.kept is not None
        stored = evaluations.read(measured.kept)
        tables[chosen] = {(alpha, part): table for alpha in (0.0, 0.5) for part, table in stored.tables(alpha).items()}
    assert measured.features == measured.as_json()["features"] == f"fp32 by {runtime}"
    assert f"features are computed in fp32 by {runtime}" in said.lines
    assert tables[runtime].keys() == tables[engines.TORCH].keys()
    for where, table in tables[runtime].items():
        assert table.features == f"fp32 by {runtime}"
        assert torch.allclose(table.logits, tables[engines.TORCH][where].logits, atol=1e-3)
    assert not torch.allclose(tables[runtime][0.0, "union"].logits, tables[runtime][0.5, "union"].logits, atol=1e-3)


@pytest.mark.slow
@others
def test_evaluate_measures_a_pre_trained_model(runtime, split, models):
    config = EvaluateConfig(model=models["vit"], data=split / "test", runtime=runtime)
    assert evaluate(config).features == f"fp32 by {runtime}"


@others
def test_predict_names_what_torch_does_and_a_broken_image_is_a_row(runtime, split_run, cli: Cli):
    images(Path("in"), 5)
    Path("in/2.png").write_bytes(b"no picture")
    rows = {}
    for chosen in (engines.TORCH, runtime):
        name = f"{chosen}.jsonl"
        asked = ("--output", name, "--batch-size", "2", "--runtime", chosen, "--json")
        told = json.loads(cli("predict", split_run, "in", *asked).stdout)
        rows[chosen] = [json.loads(line) for line in Path(name).read_text("utf-8").splitlines()]
        assert told["features"] == ("fp32" if chosen == engines.TORCH else f"fp32 by {chosen}")
        assert told["errors"] == 1
    for mine, theirs in zip(rows[runtime], rows[engines.TORCH], strict=True):
        assert [mine[key] for key in ("path", "label", "error")] == [theirs[key] for key in ("path", "label", "error")]
        assert mine["probability"] == (theirs["probability"] and pytest.approx(theirs["probability"], abs=1e-5))


class StopsAt(Silent):
    def __init__(self, row: int) -> None:
        self.row = row

    def count(self, report) -> None:
        if report.done >= self.row:
            raise KeyboardInterrupt


@others
def test_rows_of_another_runtime_are_not_gone_on_with(runtime, split_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images(tmp_path / "in", 5)
    asked = {"output": Path("rows.jsonl"), "batch_size": 2}
    with pytest.raises(KeyboardInterrupt):
        predict(PredictConfig((split_run, Path("in")), runtime=runtime, **asked), progress=StopsAt(4))
    with pytest.raises(UsageError, match=f"runtime was '{runtime}' and is 'torch'"):
        predict(PredictConfig((split_run, Path("in")), resume=True, **asked))
    predict(PredictConfig((split_run, Path("in")), runtime=runtime, resume=True, **asked))
    gone_on = Path("rows.jsonl").read_bytes()
    predict(PredictConfig((split_run, Path("in")), runtime=runtime, overwrite=True, **asked))
    assert Path("rows.jsonl").read_bytes() == gone_on


# ---- what is refused


@others
def test_what_it_needs_is_said(runtime, split_run, split, cli: Cli, monkeypatch):
    found = importlib.util.find_spec
    for library in (runtime, "onnx"):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, lib=library: None if name == lib else found(name))
        extra = "clipfit[openvino]" if runtime == "openvino" else "clipfit[onnx]"
        told = f"--runtime {runtime} needs {library}, which cannot be imported here: pip install '{extra}'."
        cli("predict", split_run, split / "test", "--runtime", runtime).fails(2, told)
        cli("evaluate", split_run, "--runtime", runtime).fails(2, told)


def test_types_that_it_does_not_compute_in_are_refused(split_run, atha_run, monkeypatch):
    with pytest.raises(UsageError, match="onnxruntime does not compute in bf16 here, for it has no products in bf16"):
        load(split_run, runtime="onnxruntime", precision="bf16")
    monkeypatch.setattr(sessions, "openvino_has_bf16", lambda: False)
    with pytest.raises(UsageError, match="for the processor has none: leave --precision out"):
        load(split_run, runtime="openvino", precision="bf16")
    monkeypatch.setattr(sessions, "openvino_has_bf16", lambda: True)
    with pytest.raises(UsageError, match="rank patch tokens in bf16"):
        load(atha_run, runtime="openvino", precision="bf16")


def test_auto_follows_the_processor_and_the_library(split_run, atha_run, monkeypatch):
    monkeypatch.setattr(devices, "multiplies_bf16", lambda device: True)
    monkeypatch.setattr(devices, "LARGE", 0)
    for openvino, expected in ((True, "bf16 by openvino"), (False, "fp32 by openvino")):
        monkeypatch.setattr(sessions, "openvino_has_bf16", lambda said=openvino: said)
        assert load(split_run, runtime="openvino").clip.features == expected
    assert load(atha_run, runtime="openvino").clip.features == "fp32 by openvino"
    assert load(split_run, runtime="onnxruntime").clip.features == "fp32 by onnxruntime"
    assert load(split_run, runtime="openvino", precision="fp32").clip.features == "fp32 by openvino"


@others
def test_it_is_for_the_processor(runtime, split_run, monkeypatch):
    monkeypatch.setattr(devices, "resolve_device", torch.device)
    with pytest.raises(UsageError, match=f"--runtime {runtime} computes on the processor: leave out --device cuda"):
        load(split_run, runtime=runtime, device="cuda")


@others
def test_a_tower_that_is_no_graph_is_a_sentence(runtime, split_run, monkeypatch):
    def refuses(part: object, path: Path) -> None:
        raise RuntimeError("no translation")

    monkeypatch.setattr(onnx, "write_graph", refuses)
    with pytest.raises(ModelError, match=r"cannot be written as an ONNX graph .*no translation.*leave --runtime out"):
        load(split_run, runtime=runtime).predict(picture(1))


# ---- an export in the format onnx


@pytest.fixture(scope="module")
def exports(split_run, atha_run, tmp_path_factory) -> Callable[..., Path]:
    """An export of a run in the format onnx, made once."""
    root, made = tmp_path_factory.mktemp("exports"), {}

    def exported(run: Path = split_run, **options: str) -> Path:
        key = f"{run.name}-{'-'.join(options.values())}"
        if key not in made:
            made[key] = export(ExportConfig(run, format="onnx", output=root / key, **options)).output
        return made[key]

    return exported


def require_same_logits(found: Predictor, expected: Predictor, of_cosine: float = ROUNDING) -> None:
    """Of any number of pictures, and what else a model says of itself."""
    for count in (0, 1, 67):
        mine, theirs = found.logits(pictures(count)), expected.logits(pictures(count))
        assert mine.shape == theirs.shape
        assert torch.allclose(mine, theirs, rtol=0, atol=of_cosine * float(expected.clip.scale))
    assert (found.classes, found.alpha, found.templates) == (expected.classes, expected.alpha, expected.templates)
    assert found.view(picture(1)).equal(expected.view(picture(1)))


@others
def test_an_export_names_what_its_run_does(runtime, split_run, exports):
    found = load(exports(), runtime=runtime)
    assert found.model.features == f"fp32 by {runtime}"
    require_same_logits(found, load(split_run))


def test_without_a_word_an_export_is_computed_by_what_proved_it(exports):
    assert load(exports()).model.features == "fp32 by onnxruntime"


@pytest.mark.slow
@others
@pytest.mark.parametrize(
    ("made", "options", "of_cosine"),
    [
        ({"method": "atha"}, {}, ROUNDING),
        ({"method": "finetune", "context": True}, {}, ROUNDING),
        ({"tuning": "lora"}, {}, ROUNDING),
        ({"templates": Path("templates.txt")}, {}, ROUNDING),
        ({}, {"dtype": "fp16"}, 2e-3),
        ({}, {"quantize": "int8"}, 0.1),
    ],
    ids=["atha", "context", "lora", "templates", "fp16", "int8"],
)
def test_exports_of_every_kind_of_run(runtime, made, options, of_cosine, split, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("templates.txt").write_text("a photo of a {}\na {} in a drawing\n{}\n", "utf-8")
    run = adapt(AdaptConfig(split, model=models["vit"], output=tmp_path / "run", **made)).run
    found = load(export(ExportConfig(run, format="onnx", **options)).output, runtime=runtime)
    assert found.model.features == f"{options.get('quantize', 'fp32')} by {runtime}"
    require_same_logits(found, load(run), of_cosine)


@others
def test_predict_takes_an_export_and_gives_a_row_an_image(runtime, split_run, exports, cli: Cli):
    images(Path("in"), 5)
    Path("in/2.png").write_bytes(b"no picture")
    rows = {}
    for name, given in (("run", (split_run,)), ("export", (exports(), "--runtime", runtime))):
        done = cli("predict", *given, "in", "--output", f"{name}.jsonl", "--batch-size", "2", "--json")
        assert done.code == 0, done.stderr
        rows[name] = [json.loads(line) for line in Path(f"{name}.jsonl").read_text("utf-8").splitlines()]
    assert json.loads(done.stdout)["features"] == f"fp32 by {runtime}"
    assert [row["label"] for row in rows["export"]] == [row["label"] for row in rows["run"]]
    assert [row["error"] for row in rows["export"]] == [row["error"] for row in rows["run"]]
    assert [row["error"] is None for row in rows["run"]] == [True, True, False, True, True]


def test_some_of_an_exports_classes_in_any_order(split_run, exports):
    found, expected = load(exports()), load(split_run)
    for names in (("dog", "bee"), ("dog", "cow", "bee")):
        mine, theirs = found.logits(picture(3), names), expected.logits(picture(3), names)
        assert torch.allclose(mine, theirs, atol=1e-3)
    assert found.among(("dog", "bee")).predict(picture(3))[0].label in ("dog", "bee")


def test_what_an_export_cannot_do_is_said(exports, split, cli: Cli, tmp_path):
    picture(1).save("a.png")
    Path("names.txt").write_text("lion\n", "utf-8")
    folder = exports()
    for given, said in (
        (("--classes", "names.txt"), "has no text of 'lion': give the run, or an export in the format open_clip"),
        (("--add-classes", "names.txt"), "has no text of 'lion'"),
        (("--template", "a sketch of a {}"), "has them by other templates"),
        (("--embeddings", "e.npy"), "gives logits among its classes and no embeddings: give the run"),
        (("--alpha", "0.25"), "there is no other ratio to take it at"),
        (("--runtime", "torch"), "is a graph, which torch does not compute: leave out --runtime torch"),
        (("--precision", "bf16"), "onnxruntime does not compute in bf16"),
    ):
        cli("predict", folder, "a.png", *given).fails(2, said)
    cli("check", split, "--model", folder).fails(2, "graph")
    found = load(folder)
    assert found.at(0.5) is found
    with pytest.raises(UsageError, match="no embeddings"):
        found.embed_images(picture(1))
    with pytest.raises(UsageError, match="no embeddings"):
        found.embed_texts("a cat")


@pytest.mark.slow
def test_exports_of_a_tower_and_fewer_classes_beside_edits_are_refused(exports, atha_run):
    for part in ("image", "text"):
        with pytest.raises(UsageError, match=f"of the {part} tower alone: give one with --part classifier, the run"):
            load(exports(part=part))
    with pytest.raises(UsageError, match="sees images by the light of all of them"):
        load(exports(atha_run)).logits(picture(1), ("dog", "bee"))
    with pytest.raises(UsageError, match="its products in int8: leave --precision out"):
        load(exports(quantize="int8"), precision="fp32")


def test_damage_to_an_export_is_refused(exports, cli: Cli, tmp_path):
    picture(1).save("a.png")
    folder = tmp_path / "copy"
    shutil.copytree(exports(), folder)
    for name in ("model.onnx", "clipfit.json", "files.json"):
        whole = (folder / name).read_bytes()
        for at in (len(whole) // 100, len(whole) // 2, -2):
            flipped = bytearray(whole)
            flipped[at] ^= 1
            (folder / name).write_bytes(flipped)
            cli("predict", folder, "a.png").fails(4, "copy/" if name == "files.json" else name)
        (folder / name).write_bytes(whole)
    assert cli("predict", folder, "a.png").code == 0
    (folder / "model.onnx").unlink()
    assert cli("predict", folder, "a.png").code != 0


@others
def test_a_graph_that_a_library_does_not_know_is_a_sentence(runtime, exports, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(exports(), folder)
    (folder / "model.onnx").write_bytes(b"no graph")
    digests = json.loads((folder / "files.json").read_text("utf-8"))
    digests["model.onnx"] = hashlib.sha256(b"no graph").hexdigest()
    (folder / "files.json").write_bytes(encoded(json_text(digests)))
    with pytest.raises(ModelError, match=f"{runtime} cannot compute model.onnx .*: choose another --runtime"):
        load(folder, runtime=runtime)


@pytest.mark.slow
def test_the_temperature_of_a_run_holds_for_exactly_its_classes(split_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = Temperature(2.5, 0.5, ("dog", "cow", "bee"), "a photo of a {}")
    for module in (subject, predictor):
        monkeypatch.setattr(module, "temperature_of", lambda run: made)
    found, expected = load(export(ExportConfig(split_run, format="onnx")).output), load(split_run)
    for classes in (None, ("dog", "bee")):
        mine, theirs = found.predict(picture(1), classes=classes)[0], expected.predict(picture(1), classes=classes)[0]
        assert (mine.label, mine.calibrated) == (theirs.label, theirs.calibrated) == (mine.label, classes is None)
        assert mine.probability == pytest.approx(theirs.probability, abs=1e-5)
