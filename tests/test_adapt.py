"""What `adapt` takes into a run and says of it, beside the training itself."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import make_classes, picture
from PIL import Image
from safetensors.torch import load_file

from clipfit import AdaptConfig, adapt
from clipfit.errors import DataError
from clipfit.runs.run import open_run

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


@pytest.mark.parametrize("method", ["cite", "cite+atha"])
def test_a_run_holds_the_fine_tuned_weights_and_their_average(split, models, tmp_path, method):
    """Of three files that could be one another: the fine-tuned weights are the same whatever α, the average is not."""
    runs = {
        alpha: open_run(adapt(AdaptConfig(split, method, models["vit"], alpha=alpha, output=tmp_path / f"{alpha}")).run)
        for alpha in (0.25, 1.0)
    }
    finetuned, whole = runs[0.25].finetuned(), runs[1.0].finetuned()
    assert finetuned.keys() == whole.keys()
    assert all(torch.equal(finetuned[name], whole[name]) for name in finetuned)
    pretrained = runs[0.25].pretrained().state()
    moved = [name for name in finetuned if not torch.equal(finetuned[name], pretrained[name])]
    assert len(moved) > len(finetuned) / 2
    state = load_file(runs[0.25].path / "model.safetensors")
    for name in finetuned:
        expected = 0.75 * pretrained[name].double() + 0.25 * finetuned[name].double()
        torch.testing.assert_close(state[name].double(), expected, rtol=1e-6, atol=1e-7)
