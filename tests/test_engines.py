"""`--runtime`: what computes the image tower in torch's place, with torch's embeddings and labels."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from conftest import Cli, picture
from families import save_model, shrunk_cfg
from test_predict import images

from clipfit import AdaptConfig, EvaluateConfig, ModelError, UsageError, adapt, engines, evaluate, load, predict
from clipfit.config.predict import PredictConfig
from clipfit.engines import sessions
from clipfit.events import Silent
from clipfit.formats import onnx
from clipfit.formats.parts import Part
from clipfit.measure import evaluations
from clipfit.model import devices
from clipfit.model.weights import state_sha256
from clipfit.predictor import Predictor

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
        key = f"{state_sha256(part.module.state_dict())} {inputs}"
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
