"""`adapt --alpha auto` and `--forecast`: what the shots alone say, in a run."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_classes, picture
from PIL import Image

import clipfit
from clipfit import AdaptConfig, adapt
from clipfit.data import copies, images, loaded
from clipfit.ensemble import interpolate
from clipfit.errors import UsageError
from clipfit.events import Silent
from clipfit.measure.folds import RATIOS
from clipfit.methods import METHODS
from clipfit.runs.run import open_run

FOLDS = "folds.json"


@pytest.fixture(scope="module")
def shots(tmp_path_factory) -> Path:
    """Five classes of four images, and other images to test. Never written to."""
    root = tmp_path_factory.mktemp("auto") / "pets"
    make_classes(root / "train", {"bee": 4, "cow": 4, "dog": 4, "elk": 4, "fox": 4})
    make_classes(root / "test", {"bee": 2, "gnu": 2}, seed=1)
    return root


@pytest.fixture(scope="module")
def run(shots, models, tmp_path_factory) -> Path:
    """Never written to."""
    output = tmp_path_factory.mktemp("runs") / "auto"
    return adapt(AdaptConfig(shots, model=models["vit"], output=output, alpha="auto")).run


def document(run: Path) -> dict:
    return json.loads((run / FOLDS).read_text("utf-8"))


def bytes_of(run: Path) -> dict[str, bytes]:
    """Every file but timing.json."""
    return {p.name: p.read_bytes() for p in run.iterdir() if p.is_file() and p.name != "timing.json"}


def test_json_has_the_number_chosen_and_the_forecast(cli, shots, models, tmp_path):
    done = cli("adapt", shots, "--model", models["vit"], "--alpha", "auto", "--output", tmp_path / "run", "--json")
    assert done.code == 0, done.stderr
    assert done.document["alpha"] in RATIOS
    base, new = done.document["forecast"]["base"], done.document["forecast"]["new"]
    assert base.keys() == new.keys() == {"accuracy", "low", "high", "zero_shot", "classes"}
    assert (base["classes"], new["classes"]) == (5, 2)
    for part in (base, new):
        assert 0 <= part["low"] <= part["accuracy"] <= part["high"] <= 1
    assert "expect" in done.stderr
    assert "new images of the 5 classes" in done.stderr


def test_the_run_is_the_plain_one_but_for_the_ratio(run, shots, models, tmp_path):
    plain = adapt(AdaptConfig(shots, model=models["vit"], output=tmp_path / "plain", alpha=document(run)["alpha"])).run
    for name in ("finetuned.safetensors", "metrics.jsonl", "shots.jsonl", "classes.json"):
        assert (run / name).read_bytes() == (plain / name).read_bytes()
    mine, theirs = open_run(run), open_run(plain)
    assert mine.alpha == document(run)["alpha"] == theirs.alpha
    assert document(run)["features"] == mine.record.precision == "fp32"
    for name, tensor in interpolate(mine.pretrained().state(), mine.finetuned(), mine.alpha).items():
        assert torch.equal(tensor, mine.state(mine.alpha)[name])
    assert (mine.record.goal, mine.record.forecast) == ("both", True)
    assert (theirs.record.goal, theirs.record.forecast) == (None, False)
    assert not (plain / FOLDS).exists()


def test_what_was_found_stands_in_the_run_and_damage_to_it_is_noticed(run, tmp_path):
    found = document(run)
    assert [row["alpha"] for row in found["curves"]["base"]] == list(RATIOS)
    assert (found["images"], found["goal"], found["curves"]["new"][0]["n"]) == ("folds", "both", 20)
    copy = shutil.copytree(run, tmp_path / "copy")
    text = (copy / FOLDS).read_text("utf-8")
    (copy / FOLDS).write_text(text.replace('"alpha": 0.', '"alpha": 1.', 1), "utf-8")
    with pytest.raises(clipfit.ModelError, match=FOLDS):
        clipfit.load(copy)


def test_probabilities_are_calibrated_at_that_ratio_for_those_classes(run):
    model = clipfit.load(run)
    at = document(run)["temperature"]["value"]
    [found] = model.predict(picture(1))
    assert found.calibrated
    assert found.probability == pytest.approx((model.logits(picture(1)) / at).softmax(1).max().item(), abs=1e-6)
    assert not model.predict(picture(1), classes=["ant", "bee"])[0].calibrated
    other = 0.0 if model.alpha else 1.0
    assert not model.at(other).predict(picture(1))[0].calibrated


def test_a_ratio_that_is_given_gets_a_forecast_at_itself(cli, shots, models, tmp_path):
    arguments = ("adapt", shots, "--model", models["vit"], "--alpha", "0.25", "--forecast", "--json")
    done = cli(*arguments, "--output", tmp_path / "run")
    assert done.code == 0, done.stderr
    found = document(tmp_path / "run")
    assert done.document["alpha"] == found["alpha"] == found["temperature"]["alpha"] == 0.25
    assert found["goal"] is None
    [row] = [row for row in found["curves"]["base"] if row["alpha"] == 0.25]
    assert done.document["forecast"]["base"]["accuracy"] == row["accuracy"]


def test_one_shot_a_class_foretells_other_classes_alone(shots, models, tmp_path):
    found = adapt(AdaptConfig(shots, model=models["vit"], output=tmp_path / "run", alpha="auto", shots_per_class=1))
    assert found.forecast is not None
    assert found.forecast.base is None
    assert found.forecast.new is not None
    assert document(found.run)["temperature"] is None
    assert "one shot a class" in document(found.run)["notes"][0]


def test_few_classes_are_chosen_for_themselves(models, tmp_path):
    three = make_classes(tmp_path / "three", {"bee": 4, "cow": 4, "dog": 4})
    found = adapt(AdaptConfig(three, model=models["vit"], output=tmp_path / "run", alpha="auto"))
    assert found.forecast is not None
    assert found.forecast.new is None
    assert document(found.run)["goal"] == "base"
    with pytest.raises(UsageError, match="--goal new needs 4 classes"):
        adapt(AdaptConfig(three, model=models["vit"], output=tmp_path / "other", alpha="auto", goal="new"))
    nothing = adapt(
        AdaptConfig(three, model=models["vit"], output=tmp_path / "nothing", alpha="auto", shots_per_class=1)
    )
    assert (nothing.alpha, nothing.forecast.base, nothing.forecast.new) == (0.5, None, None)
    assert "nothing to choose α by" in document(nothing.run)["notes"][0]


def test_images_of_a_val_part_take_the_place_of_left_out_shots(shots, models, tmp_path):
    """They are scored with the adapted model itself; a copy of a shot among them does not count."""
    mine = shutil.copytree(shots, tmp_path / "pets")
    make_classes(mine / "val", {"bee": 3, "cow": 2, "owl": 2}, seed=2)
    shutil.copy(mine / "train/bee/0.png", mine / "val/bee/copy.png")
    found = adapt(AdaptConfig(mine, model=models["vit"], output=tmp_path / "run", alpha="auto"))
    written = document(found.run)
    assert written["images"] == "val"
    assert written["notes"] == ["5 images of the val part stand for new images of these classes"]
    assert {row["n"] for row in written["curves"]["base"]} == {5}
    assert {row["n"] for row in written["curves"]["new"]} == {20}
    pictures = [*sorted((mine / "val/bee").glob("?.png")), *sorted((mine / "val/cow").glob("*.png"))]
    named = clipfit.load(found.run).predict(pictures)
    right = sum(one.label == path.parent.name for one, path in zip(named, pictures, strict=True))
    assert found.forecast.base.accuracy == right / 5


def test_images_that_alpha_was_chosen_on_are_no_evidence(cli, shots, models, tmp_path):
    mine = shutil.copytree(shots, tmp_path / "pets")
    make_classes(mine / "val", {"bee": 3, "cow": 2}, seed=2)
    run = adapt(AdaptConfig(mine, model=models["vit"], output=tmp_path / "run", alpha="auto")).run
    assert [line["path"] for line in document(run)["val"]] == [
        f"val/{name}.png" for name in ("bee/0", "bee/1", "bee/2", "cow/0", "cow/1")
    ]
    cli("evaluate", run, "--data", mine / "val").fails(3, "is a shot of ", " or an image of its val part, or a copy of")
    for k in range(3):
        Image.open(mine / f"val/bee/{k}.png").save(mine / f"test/bee/again{k}.bmp")  # other bytes, the same pixels
    measured = cli("evaluate", run, "--json").document
    assert measured["alphas"][0]["base"]["n"] == 2
    words = "3 images are of the val part, on which the run was judged when it was made, and were left out"
    assert measured["notes"].count(words) == 1
    given = adapt(AdaptConfig(mine, model=models["vit"], output=tmp_path / "given", alpha=0.5)).run
    assert cli("evaluate", given, "--data", mine / "val", "--json").document["alphas"][0]["base"]["n"] == 5


def test_a_val_image_is_decoded_once(shots, models, tmp_path, monkeypatch):
    """To tell it from shots, for its record, and to be seen by the model at every ratio."""
    mine = shutil.copytree(shots, tmp_path / "pets")
    make_classes(mine / "val", {"bee": 2, "cow": 1}, seed=2)
    picture(7, (50, 40)).save(mine / "val/cow/large.png")  # nothing else has its size
    usual, paths = images.decode, []

    def counted(path, *given, **more):
        paths.append(path)
        return usual(path, *given, **more)

    for module in (images, copies, loaded):
        monkeypatch.setattr(module, "decode", counted)
    adapt(AdaptConfig(mine, model=models["vit"], output=tmp_path / "run", alpha="auto"))
    assert sorted(path for path in paths if "val" in path.parts) == sorted((mine / "val").rglob("*.png"))


def test_a_val_image_that_cannot_be_read_is_refused_before_anything_is_trained(shots, models, tmp_path):
    mine = shutil.copytree(shots, tmp_path / "pets")
    make_classes(mine / "val", {"bee": 1}, seed=4)
    (mine / "val/bee/broken.png").write_bytes(b"no image")
    config = AdaptConfig(mine, model=models["vit"], output=tmp_path / "run", alpha="auto")
    with pytest.raises(clipfit.DataError, match=r"broken\.png"):
        adapt(config, NoSteps())
    assert adapt(dataclasses.replace(config, alpha=0.5)).alpha == 0.5  # which needs no val part, and opens none
    skipping = adapt(dataclasses.replace(config, skip_bad_images=True, overwrite=True))
    assert document(skipping.run)["curves"]["base"][0]["n"] == 1
    assert document(skipping.run)["notes"] == [
        "1 images of the val part stand for new images of these classes; 1 could not be read"
    ]


class NoSteps(Silent):
    def step(self, report) -> None:
        raise AssertionError("a step was taken")


@pytest.mark.parametrize(
    "options",
    [{}, {"alpha": "auto"}, {"alpha": "auto", "val": True}, {"alpha": "auto", "goal": "new", "balance": True},
     {"alpha": 0.3, "forecast": True}, {"alpha": "auto", "shots_per_class": 1}],
    ids=str,
)  # fmt: skip
def test_test_images_and_labels_leave_no_trace(options, shots, models, tmp_path, monkeypatch):
    """Two folders that differ in nothing but test/: the same bytes of every file."""
    written, val = [], options.get("val")
    options = {key: value for key, value in options.items() if key != "val"}
    for k in range(2):
        place = tmp_path / str(k)
        mine = shutil.copytree(shots, place / "pets")
        if val:
            make_classes(mine / "val", {"bee": 2, "cow": 2}, seed=3)
        if k:
            shutil.rmtree(mine / "test")
            make_classes(mine / "test", {"cow": 5, "yak": 1, "zebra": 3}, seed=9)
            (mine / "test/yak/broken.png").write_bytes(b"no image")
        monkeypatch.chdir(place)
        written.append(bytes_of(adapt(AdaptConfig(Path("pets"), model=models["vit"], **options)).run))
    assert written[0] == written[1]


class Stops(Silent):
    """Interrupts when it is told of what."""

    def __init__(self, what: str, after: int = 0):
        self.what, self.after, self.seen = what, after, False

    def say(self, text: str) -> None:
        self.seen = self.seen or text.startswith(self.what)
        if self.seen and not self.after:
            raise KeyboardInterrupt

    def step(self, report) -> None:
        if self.seen and report.step == self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("what", "after"), [("fold 1", 0), ("fold 1", 2), ("fold 2", 0), ("fold 3", 1), ("fold 4", 2), ("writing", 0)]
)
def test_folds_are_gone_on_with_to_the_same_bytes(what, after, run, shots, models, tmp_path):
    config = {"model": models["vit"], "output": tmp_path / "run", "alpha": "auto", "save_every": 1}
    with pytest.raises(KeyboardInterrupt):
        adapt(AdaptConfig(shots, **config), Stops(what, after))
    assert not (tmp_path / "run").exists()
    again = Heard()
    adapt(AdaptConfig(shots, **config, resume=True), again)
    assert bytes_of(tmp_path / "run") == bytes_of(run)
    done = int(what[-1]) - 1 if what.startswith("fold") else 4
    assert [line[:6] for line in again.lines if line.startswith("fold")] == [f"fold {k + 1}" for k in range(done, 4)]
    assert not list(tmp_path.glob(".run.resume"))


class Heard(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_a_finished_run_is_finished_with_auto_too(run, shots, models, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    before = bytes_of(copy)
    heard = Heard()
    found = adapt(AdaptConfig(shots, model=models["vit"], output=copy, alpha="auto", resume=True), heard)
    assert any("finished already" in line for line in heard.lines)
    assert found.alpha == document(run)["alpha"]
    assert found.forecast is not None
    assert bytes_of(copy) == before


@pytest.mark.parametrize("options", [{"tuning": "lora"}, {"context": True}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_and_tuning_has_folds(method, options, shots, models, tmp_path):
    config = AdaptConfig(
        shots, method, models["vit"], output=tmp_path / "run", alpha="auto", recipe={"epochs": 1}, **options
    )
    found = adapt(config)
    assert found.forecast is not None
    zero = document(found.run)["curves"]["base"][0]
    assert zero["accuracy"] == found.forecast.base.zero_shot == found.on_shots.zero_shot_accuracy


def test_a_goal_belongs_to_a_ratio_that_is_chosen():
    with pytest.raises(UsageError, match="--goal new belongs to --alpha auto"):
        AdaptConfig(Path("x"), goal="new")
    with pytest.raises(UsageError, match="alpha must be a ratio between 0 and 1, or auto; found 'best'"):
        AdaptConfig(Path("x"), alpha="best")
