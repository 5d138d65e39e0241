"""What `adapt` takes into a run and says of it, beside the training itself."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import make_classes, picture
from PIL import Image

from clipfit import AdaptConfig, adapt
from clipfit.errors import DataError

QUICK = {"epochs": 1, "batch_size": 8}


def test_accuracies_on_the_shots_stand_where_no_gate_takes_them_for_a_result(cli, split, models):
    made = cli("adapt", split, "--model", models["vit"], "--json")
    assert made.code == 0, made.stderr
    assert set(made.document["on_shots"]) == {"zero_shot_accuracy", "adapted_accuracy"}
    assert not [key for key in made.document if "accuracy" in key]
    assert {"run", "method", "model", "classes", "shots", "steps", "losses", "seconds", "alpha", "skipped"} <= set(
        made.document
    )


def test_test_folders_leave_no_trace_in_a_run(models, tmp_path):
    """Runs that differ in test images and labels alone have the same bytes."""
    written = []
    for name, seed in (("first", 5), ("second", 6)):
        place = make_classes(tmp_path / name / "shots/train", {"ant": 2, "bee": 2}).parent
        make_classes(place / "test", {"ant": 2, f"only {name}": 3}, seed)
        run = adapt(AdaptConfig(place, "finetune", models["vit"], output=tmp_path / name / "run", recipe=QUICK)).run
        written.append({p.name: p.read_bytes() for p in run.iterdir() if p.name not in ("timing.json", "files.json")})
    first, second = written
    assert json.loads(first["classes.json"])["names"] == {"ant": "ant", "bee": "bee"}
    for file, content in first.items():
        assert content.replace(b"/first/", b"/second/") == second[file], file


def test_classes_that_are_the_same_tokens_to_the_model_are_refused(models, tmp_path):
    """The little model reads 16 tokens: what names say behind them, it cannot see."""
    long = "a very long name of a class that goes on and on until the context of the model is full of it "
    place = make_classes(tmp_path / "long", {long + "cat": 2, long + "dog": 2})
    with pytest.raises(DataError, match=r"are the same 16 tokens to this model.*--classes"):
        adapt(AdaptConfig(place, "finetune", models["vit"], output=tmp_path / "run", recipe=QUICK))
    assert not (tmp_path / "run").exists()


def test_balanced_epochs_show_every_class_equally_often(models, tmp_path):
    place = make_classes(tmp_path / "pets", {"cat": 5, "dog": 2})
    config = AdaptConfig(place, "finetune", models["vit"], output=tmp_path / "run", recipe=QUICK, balance=True)
    run = adapt(config).run
    assert json.loads((run / "config.json").read_text())["balance"] is True
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum(step["images"] for step in steps) == 10


def test_one_depth_of_greys_is_found_on_the_shots_and_recorded(models, tmp_path):
    place = make_classes(tmp_path / "xrays", {"hand": 2, "knee": 2})
    deep = np.full((32, 32), 900, np.uint16)
    Image.fromarray(deep).save(place / "hand/2.png")
    Image.fromarray(deep * 4).save(place / "knee/2.png")  # needs 12 bits
    run = adapt(AdaptConfig(place, "finetune", models["vit"], output=tmp_path / "run", recipe=QUICK)).run
    assert json.loads((run / "config.json").read_text())["grey_bits"] == 12
    plain = make_classes(tmp_path / "colour", {"hand": 2, "knee": 2})
    picture(3).save(plain / "hand/3.jpg")
    run = adapt(AdaptConfig(plain, "finetune", models["vit"], output=tmp_path / "other", recipe=QUICK)).run
    assert json.loads((run / "config.json").read_text())["grey_bits"] is None
