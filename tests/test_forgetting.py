"""`evaluate --retain` and `--drift`: what an adaptation cost elsewhere, with labels and without."""

from __future__ import annotations

import csv
import math
import shutil
from pathlib import Path

import oracles
import pytest
import torch
from conftest import Cli, make_classes, picture
from PIL import Image

import clipfit
from clipfit import AdaptConfig, EvaluateConfig, UsageError, adapt, evaluate
from clipfit.measure import evaluations
from clipfit.runs.run import open_run

ALPHAS = (0.0, 0.5, 1.0)


@pytest.fixture
def run(split_run, tmp_path) -> Path:
    """A copy, which may be measured."""
    return Path(shutil.copytree(split_run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluations")))


@pytest.fixture
def stream(tmp_path) -> Path:
    """Five images in a folder and one below it, none a shot."""
    for k in range(6):
        file = tmp_path / "stream" / ("deeper" if k == 5 else "") / f"{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(500 + k).save(file)
    return tmp_path / "stream"


# ---- labelled


def test_other_folders_are_measured_within_their_own_classes(run, flat, tmp_path):
    """Before and after, on the same images; by the table that `predict` would give."""
    tools = make_classes(tmp_path / "tools", {"saw": 2, "axe": 3}, seed=7)
    found = evaluate(EvaluateConfig(run, retain=(flat, tools), alphas=ALPHAS))
    assert [place.data for place in found.retain] == [str(flat), str(tools)]
    assert found.retain[0].classes == ("dog", "fish", "owl", "tabby cat")
    for place in found.retain:
        right = {}
        for row in place.rows:
            table = evaluations.read(found.kept).retained(found.retain.index(place), row.alpha)
            logits = clipfit.load(run, alpha=row.alpha, classes=place.classes).logits(
                [Path(place.data).parent / source for source in table.ids]
            )
            right[row.alpha] = [
                place.classes[i] == label for i, label in zip(logits.argmax(1).tolist(), table.labels, strict=True)
            ]
            # six pets have the very pixels of shots
            assert row.accuracy.n == len(right[0.0]) == {"pets": 6, "tools": 5}[Path(place.data).name]
            assert row.accuracy.right == sum(right[row.alpha])
            gain = (sum(right[row.alpha]) - sum(right[0.0])) / row.accuracy.n
            assert row.against_zero_shot.difference == pytest.approx(gain)
            assert row.against_zero_shot.low <= gain <= row.against_zero_shot.high
        first = place.rows[0].against_zero_shot
        assert (first.difference, first.low, first.high) == (0.0, 0.0, 0.0)


def test_what_is_kept_names_no_place_of_this_machine(cli: Cli, run, flat):
    document = cli("evaluate", run, "--retain", flat, "--drift", flat / "dog", "--json").document
    (place,) = document["retain"]
    assert place["data"] == str(flat)
    assert [row["alpha"] for row in place["alphas"]] == [0, 0.5]
    kept = evaluations.read(Path(document["kept"])).document
    (entry,) = kept["retain"]
    assert (entry["data"], kept["drift"]["data"]) == ("pets", "dog")
    for row, stored in zip(place["alphas"], entry["alphas"], strict=True):
        assert row == {key: value for key, value in stored.items() if key != "tables"}
        assert set(row) >= {"alpha", "accuracy", "n", "low", "high", "macro", "per_class", "against_zero_shot"}
    assert str(flat) not in (Path(document["kept"]) / "evaluation.json").read_text()
    plain = cli("evaluate", run, "--json").document
    assert (plain["retain"], plain["drift"]) == ([], None)


def test_base_classes_count_there_too_and_shots_never(run, split, tmp_path):
    """A folder with the run's classes, a shot, a copy of one in another format, and one image twice."""
    place = make_classes(tmp_path / "more", {"Cow": 2, "elk": 2}, seed=9)
    shutil.copy(split / "train/cow/0.png", place / "Cow/shot.png")
    with Image.open(split / "train/bee/0.png") as shot:
        shot.save(place / "elk/shot.bmp")
    shutil.copy(place / "elk/0.png", place / "elk/again.png")
    found = evaluate(EvaluateConfig(run, retain=(place,)))
    (other,) = found.retain
    assert other.classes == ("cow", "elk")
    assert other.rows[0].accuracy.n == 4
    said = [note for note in found.notes if note.startswith(f"{place}: ")]
    assert [note.split(": ", 1)[1].split(" ", 2)[0] for note in said] == ["2", "1"]


def test_the_test_part_of_another_split_is_what_counts(run, tmp_path):
    place = tmp_path / "other"
    make_classes(place / "train", {"ant": 3, "owl": 3}, seed=11)
    make_classes(place / "test", {"ant": 1, "owl": 2}, seed=12)
    (other,) = evaluate(EvaluateConfig(run, retain=(place,))).retain
    assert other.rows[0].accuracy.n == 3


def test_templates_and_edits_hold_elsewhere_too(split, models, flat, tmp_path):
    """Under ATHA an image is seen beside the classes of its own folder."""
    config = AdaptConfig(split, method="atha", model=models["vit"], output=tmp_path / "run")
    run = adapt(config).run
    (tmp_path / "words.txt").write_text("a {}\nthe {}\n")
    found = evaluate(EvaluateConfig(run, retain=(flat,), alphas=(1.0,), templates=tmp_path / "words.txt"))
    table = evaluations.read(found.kept).retained(0, 1.0)
    model = clipfit.load(run, alpha=1, classes=table.candidates, templates=["a {}", "the {}"])
    torch.testing.assert_close(model.logits([flat.parent / source for source in table.ids]), table.logits)


# ---- without labels


def test_drift_is_that_of_the_naive_loop(run, stream):
    found = evaluate(EvaluateConfig(run, drift=stream, alphas=ALPHAS)).drift
    assert (found.n, found.classes) == (6, ("bee", "cow", "dog", "Ant Lion", "elk"))
    paths = [*(stream / f"{k}.png" for k in range(5)), stream / "deeper/5.png"]
    before = None
    for row in found.rows:
        model = clipfit.load(run, alpha=row.alpha, classes=found.classes)
        u = model.embed_images(paths).double()
        t = model.embed_texts([f"a photo of a {name}" for name in found.classes]).double()
        cosines = [[float(oracles.dot(image, text)) for text in t] for image in u]
        before = before or (u, cosines)
        changes = sorted(
            abs(now - then) for a, b in zip(cosines, before[1], strict=True) for now, then in zip(a, b, strict=True)
        )
        assert row.mean_change == pytest.approx(sum(changes) / len(changes), abs=1e-6)
        assert row.p95_change == pytest.approx(changes[math.ceil(0.95 * len(changes)) - 1], abs=1e-6)
        alike = [float(oracles.dot(a, b)) for a, b in zip(u, before[0], strict=True)]
        assert row.image_cosine == pytest.approx(sum(alike) / len(alike), abs=1e-6)
        best = [[row.index(max(row)) for row in rows] for rows in (cosines, before[1])]
        assert row.best_changed == sum(a != b for a, b in zip(*best, strict=True)) / 6
    assert found.rows[-1].mean_change > 0.001


def test_nothing_moves_at_alpha_0(cli: Cli, run, stream):
    document = cli("evaluate", run, "--drift", stream, "--alphas", "0", "--json").document
    (row,) = document["drift"]["alphas"]
    assert row == {"alpha": 0, "mean_change": 0, "p95_change": 0, "image_cosine": 1, "best_changed": 0}


def test_a_list_a_pattern_and_one_image(run, stream, monkeypatch):
    rows = [["path"], ["0.png"], [""], ["1.png"]]
    with (stream / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    with pytest.raises(clipfit.DataError, match=r"line 3 .* has no path .*--skip-bad-images"):
        evaluate(EvaluateConfig(run, drift=stream / "list.csv"))
    listed = evaluate(EvaluateConfig(run, drift=stream / "list.csv", skip_bad_images=True)).drift
    assert (listed.n, len(listed.skipped)) == (2, 1)
    monkeypatch.chdir(stream)
    assert evaluate(EvaluateConfig(run, drift=Path("[0-3].png"))).drift.n == 4
    assert evaluate(EvaluateConfig(run, drift=stream / "4.png")).drift.n == 1
    found = evaluate(EvaluateConfig(run, drift=stream))
    assert any("1 files that are not called as images are" in note for note in found.notes)


def test_shots_do_not_count_and_copies_once(run, split, stream):
    shutil.copy(split / "train/cow/0.png", stream / "shot.png")
    shutil.copy(stream / "0.png", stream / "again.png")
    found = evaluate(EvaluateConfig(run, drift=stream))
    assert found.drift.n == 6
    assert sum(note.startswith(f"{stream}: 1 images") for note in found.notes) == 2


# ---- what cannot be measured


def test_places_that_cannot_be_measured_on(cli: Cli, run, split, stream, tmp_path):
    (tmp_path / "empty").mkdir()
    make_classes(tmp_path / "one", {"ant": 2})
    (tmp_path / "a.tar").write_bytes(b"")
    for options, code, words in (
        (("--retain", "gone"), 3, ("there is no gone",)),
        (("--retain", "empty"), 3, ("empty",)),
        (("--retain", "one"), 3, ("one has one class alone, 'ant'",)),
        (("--retain", split / "train"), 3, ("is a shot",)),
        (("--drift", "gone"), 3, ("there is no gone: expected a folder of images",)),
        (("--drift", "gone.png"), 3, ("gone.png",)),
        (("--drift", "empty"), 3, ("empty holds no image",)),
        (("--drift", split / "train"), 3, ("is a shot",)),
        (("--drift", "a.tar"), 2, ("read but once",)),
        (("--drift", "-"), 2, ("read but once",)),
        (("--drift", "*.jpg"), 3, ("no file is called like",)),
    ):
        cli("evaluate", run, *options).fails(code, *words)
    assert not (run / "evaluations").exists()
    for given in ({"retain": (stream,)}, {"drift": stream}):
        with pytest.raises(UsageError, match="compare with zero-shot CLIP"):
            EvaluateConfig(model="clipfit-tiny", data=stream, **given)


def test_broken_images_are_named_or_skipped(cli: Cli, run, stream, tmp_path):
    place = make_classes(tmp_path / "tools", {"saw": 2, "axe": 2}, seed=7)
    for folder in (place / "saw", stream):
        (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for option, folder in (("--retain", place), ("--drift", stream)):
        cli("evaluate", run, option, folder).fails(3, "broken.png", "--skip-bad-images")
    done = cli("evaluate", run, "--retain", place, "--drift", stream, "--skip-bad-images", "--json")
    (retained,) = done.document["retain"]
    assert (retained["alphas"][0]["n"], retained["skipped"]) == (4, ["tools/saw/broken.png"])
    assert (done.document["drift"]["n"], done.document["drift"]["skipped"]) == (6, [str(stream / "broken.png")])
    assert f"retained of {place}: 2 classes, 4 images" in done.stderr
    assert f"drift on {stream}: 6 images beside 5 classes" in done.stderr
    assert done.stderr.count("1 unreadable images were skipped") == 2
    tables = [line for line in done.stderr.split("retained of")[1].splitlines() if str(tmp_path) not in line]
    assert max(map(len, tables)) <= 80


def test_a_run_is_measured_elsewhere_with_nothing_held_out(flat, models, stream, tmp_path):
    """Its own images are all shots; the other place is held out all the same."""
    run = adapt(AdaptConfig(flat, model=models["vit"], output=tmp_path / "run")).run
    place = make_classes(tmp_path / "tools", {"saw": 2, "axe": 2}, seed=7)
    found = evaluate(EvaluateConfig(run, retain=(place,), drift=stream))
    assert not found.held_out
    assert (found.retain[0].rows[0].accuracy.n, found.drift.n) == (4, 6)
    assert open_run(run).base == found.drift.classes
