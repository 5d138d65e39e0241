"""Adapting on from a run: it is α = 0 of the new one, and nothing of it is lost or taken for something else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import picture
from safetensors.torch import load_file, save_file

from clipfit import AdaptConfig, UsageError, adapt
from clipfit.model import loading, weights
from clipfit.runs.run import open_run

Parent = Callable[..., Path]


@pytest.fixture(scope="session")
def made(flat: Path, models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A run of a method with options, made once; never written to."""
    runs: dict[str, Path] = {}

    def make(method: str, **options: Any) -> Path:
        key = f"{method} {options}"
        if key not in runs:
            output = tmp_path_factory.mktemp("parents") / "parent"
            runs[key] = adapt(AdaptConfig(flat, method, model=models["vit"], output=output, **options)).run
        return runs[key]

    return make


@pytest.fixture
def parent(made: Parent, tmp_path: Path) -> Parent:
    """The same, copied to `parent` in the working directory, where a test may spoil it."""

    def copied(method: str = "cite", **options: Any) -> Path:
        return Path(shutil.copytree(made(method, **options), tmp_path / "parent"))

    return copied


def config(run: str) -> dict[str, Any]:
    return dict(json.loads((Path(run) / "config.json").read_text()))


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_run_at_its_ratio_is_alpha_0_of_the_new_one(cli, flat, parent, tuning):
    old = parent(alpha=0.3)
    ensemble = load_file(old / "model.safetensors")
    made = cli("adapt", flat, "--model", "parent", "--tuning", tuning, "--epochs", 1, "--output", "on", "--json")
    assert made.code == 0, made.stderr
    run = open_run(Path("on"))
    assert same(dict(run.pretrained().state()), ensemble)
    assert same(run.state(0.0), ensemble)
    assert not same(run.finetuned(), ensemble)
    source, written = run.source, config("on")
    assert (source.model, source.pretrained) == ("local-dir:parent", None)
    assert source.sha256 == weights.state_sha256(ensemble)
    assert source.model_cfg == open_run(old).source.model_cfg
    assert written["parent"] == {"sha256": sha256((old / "model.safetensors").read_bytes()).hexdigest(), "alpha": 0.3}
    rows = {row["alpha"]: row for row in cli("evaluate", "on", "--alphas", "0,0.5", "--json").document["alphas"]}
    before = cli("evaluate", "parent", "--json").document["alphas"][-1]
    assert before["alpha"] == 0.3
    assert rows[0.0]["base"] == before["base"]


def test_names_of_a_run(cli, flat, parent):
    old = parent()
    for number, name in enumerate(("./parent", str(old))):
        made = cli("adapt", flat, "--model", name, "--epochs", 1, "--output", f"on{number}")
        assert made.code == 0, made.stderr
    assert [config(f"on{n}")["pretrained"]["model"] for n in range(2)] == ["local-dir:parent", f"local-dir:{old}"]


def test_the_same_command_gives_the_same_bytes(cli, flat, parent):
    parent()
    for name in ("a", "b"):
        assert cli("adapt", flat, "--model", "parent", "--epochs", 1, "--output", name).code == 0
    for file in Path("a").iterdir():
        if file.name != "timing.json":
            assert file.read_bytes() == (Path("b") / file.name).read_bytes(), file.name


def test_a_run_of_a_run(cli, flat, parent):
    parent()
    for before, after in (("parent", "second"), ("second", "third")):
        assert cli("adapt", flat, "--model", before, "--epochs", 1, "--output", after).code == 0
    assert same(open_run(Path("third")).state(0.0), load_file("second/model.safetensors"))


def test_images_that_an_ancestor_was_made_with_are_no_evidence(cli, split, flat, models, tmp_path):
    """Though the ancestor has gone: the first one's shots are the test images of the last one."""
    first = ("adapt", split / "test", "--model", models["vit"], "--alpha", 0.5, "--epochs", 1, "--output", "first")
    assert cli(*first).code == 0
    assert cli("adapt", flat, "--model", "first", "--epochs", 1, "--output", "second").code == 0
    assert cli("adapt", split / "train", "--model", "second", "--epochs", 1, "--output", "third").code == 0
    own = len((Path("second") / "shots.jsonl").read_text().splitlines())
    counted = len((Path("first") / "shots.jsonl").read_text().splitlines())
    assert len((Path("third") / "ancestors.jsonl").read_text().splitlines()) == own + counted
    assert not (Path("first") / "ancestors.jsonl").exists()
    shutil.rmtree("first")
    words = (" or of a run that it goes on from, or a copy of one",)
    cli("evaluate", "third", "--data", split / "test").fails(3, *words)
    data = Path(shutil.copytree(split / "test", tmp_path / "data"))
    new = next(data.rglob("*.png"))
    picture(4711).save(new.with_name("new.png"))
    measured = cli("evaluate", "third", "--data", data, "--json").document
    assert (
        f"{counted} images were used to make the run that this one goes on from, and were left out" in measured["notes"]
    )
    (Path("third") / "ancestors.jsonl").write_text("")
    cli("evaluate", "third", "--data", data).fails(4, "ancestors.jsonl is not as clipfit wrote it")


def test_template_and_recipe_are_taken_over_unless_others_are_given(cli, flat, parent):
    parent(recipe={"template": "an icon of a {}", "epochs": 1})
    assert cli("adapt", flat, "--model", "parent", "--output", "on").code == 0
    recipe = config("on")["recipe"]
    assert recipe["template"] == "an icon of a {}"
    assert recipe["epochs"] == 2  # the model's own, not what the run was told
    assert recipe["batch_size"] == 4
    assert cli("adapt", flat, "--model", "parent", "--output", "other", "--template", "{} it is").code == 0
    assert config("other")["recipe"]["template"] == "{} it is"


def test_the_run_is_found_from_elsewhere(cli, flat, parent, tmp_path, monkeypatch):
    parent()
    assert cli("adapt", flat, "--model", "parent", "--epochs", 1, "--output", "on").code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    measured = cli("evaluate", "../on", "--alpha", 0.25, "--json")
    assert measured.code == 0, measured.stderr
    (tmp_path / "on" / "timing.json").unlink()  # a run is complete without it
    assert cli("evaluate", "../on", "--alpha", 0.25, "--json").code == 4
    monkeypatch.chdir(tmp_path)
    assert cli("evaluate", "on", "--alpha", 0.25, "--json").code == 0


def test_a_run_that_changed_or_is_gone_is_no_alpha_0(cli, flat, parent, made):
    old = parent()
    assert cli("adapt", flat, "--model", "parent", "--epochs", 1, "--output", "on").code == 0
    file = old / "model.safetensors"
    state = load_file(file)
    save_file({**state, "logit_scale": state["logit_scale"] + 1e-3}, file)
    cli("evaluate", "on").fails(4, "the weights of local-dir:parent changed since the run was made")
    shutil.rmtree(old)
    cli("evaluate", "on").fails(4, "model.safetensors cannot be read")


def test_a_run_that_was_being_replaced_is_put_back(cli, flat, parent):
    old = parent()
    old.rename(".parent.old")
    assert cli("adapt", flat, "--model", "./parent", "--epochs", 1, "--output", "on").code == 0
    old.rename(".parent.old")
    assert cli("evaluate", "on", "--json").code == 0
    assert old.is_dir()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_run_is_not_adapted_on(cli, flat, parent, name):
    file = parent() / name
    whole = bytearray(file.read_bytes())
    whole[-20] ^= 1
    file.write_bytes(whole)
    cli("adapt", flat, "--model", "parent", "--output", "on").fails(4, name)
    assert not Path("on").exists()


def test_a_run_has_its_own_weights_and_is_not_replaced_while_it_is_needed(cli, flat, parent):
    parent()
    cli("adapt", flat, "--model", "parent", "--pretrained", "openai").fails(2, "leave --pretrained openai out")
    cli("adapt", flat, "--model", "parent", "--output", "parent", "--overwrite").fails(2, "parent is needed")


def test_only_adapt_goes_on_from_a_run(cli, flat, made):
    run = made("cite")
    with pytest.raises(UsageError, match=r"parent is a run, which only `adapt` goes on from: export it"):
        loading.load(str(run))
    cli("evaluate", "--data", flat, "--model", run).fails(2, "is a run, which only `adapt` goes on")


# ---- runs with edits of patch tokens, or context vectors


def test_a_run_of_atha_goes_on_from_its_strengths(cli, flat, parent):
    old = load_file(parent("atha", alpha=0.5) / "model.safetensors")
    assert old["clipfit.head"].any()
    made = cli("adapt", flat, "--model", "parent", "--method", "atha", "--strength-rate", 1e-9, "--epochs", 1,
               "--output", "on", "--json")  # fmt: skip
    assert made.code == 0, made.stderr
    run = open_run(Path("on"))
    assert same(run.state(0.0), old)
    for name in ("clipfit.head", "clipfit.tail"):
        torch.testing.assert_close(run.finetuned()[name], old[name], atol=1e-6, rtol=0)
    row = cli("evaluate", "on", "--alphas", "0", "--json").document["alphas"][0]
    assert row["base"] == cli("evaluate", "parent", "--json").document["alphas"][-1]["base"]


def test_the_edits_of_a_run_adapted_on_are_in_effect_at_alpha_0(cli, flat, parent):
    parent("atha")
    assert cli("adapt", flat, "--model", "parent", "--method", "atha", "--epochs", 1, "--output", "on").code == 0
    assert cli("export", "parent", "--alpha", 0, "--output", "plain").code == 0
    cli("export", "on", "--alpha", 0, "--output", "exported").fails(2, "edits of patch tokens")


def test_atha_goes_on_from_a_plain_run(cli, flat, parent):
    old = load_file(parent("cite") / "model.safetensors")
    assert cli("adapt", flat, "--model", "parent", "--method", "atha", "--epochs", 1, "--output", "on").code == 0
    state = open_run(Path("on")).state(0.0)
    assert not state.pop("clipfit.head").any()
    assert not state.pop("clipfit.tail").any()
    assert same(state, old)
    assert open_run(Path("on")).finetuned()["clipfit.head"].any()


def test_another_method_would_lose_the_additions(cli, flat, parent, models):
    parent("atha")
    for method in ("cite", "cite+atha"):
        cli("adapt", flat, "--model", "parent", "--method", method).fails(
            2, f"parent has edits of patch tokens of atha, which only atha can go on with, not {method}",
            f"take --method atha, or adapt {models['vit']} itself",
        )  # fmt: skip


def test_edits_go_on_only_as_they_were_made(cli, flat, parent):
    parent("atha")
    command = ("adapt", flat, "--model", "parent", "--method", "atha", "--epochs", 1, "--output", "on")
    cli(*command, "--head-ratio", 0.3).fails(2, "give the same options", "head_ratio 0.1 (found 0.3)")
    cli(*command, "--head-block", 0).fails(2, "head_block 1 (found 0)")
    assert cli(*command, "--head-block", 1).code == 0


def test_context_vectors_go_on(cli, flat, parent):
    old = load_file(parent("cite", context=True) / "model.safetensors")
    command = ("adapt", flat, "--model", "parent", "--epochs", 1, "--output", "on")
    cli(*command, "--context", "--method", "finetune").fails(
        2, "parent has context vectors of cite, which only cite can go on with, not finetune"
    )
    cli(*command).fails(2, "has context vectors, which can only go on as they were made", "(found None)")
    cli(*command, "--context", "--template", "the {}").fails(2, "context 'a photo of a ' (found 'the ')")
    assert cli(*command, "--context").code == 0
    run = open_run(Path("on"))
    assert same(run.state(0.0), old)
    assert not torch.equal(run.finetuned()["clipfit.context"], old["clipfit.context"])
    cli("export", "on", "--alpha", 0, "--output", "exported").fails(2, "context vectors")


def test_adapters_need_attention_in_a_run_too(cli, flat, models, tmp_path):
    run = adapt(AdaptConfig(flat, model=models["resnet"], output=tmp_path / "parent", recipe={"epochs": 1})).run
    refused = cli("adapt", flat, "--model", run, "--tuning", "lora", "--output", "on")
    refused.fails(4, "--tuning lora needs two")
    assert "decoding" not in refused.stderr  # it was said at once
    cli("adapt", flat, "--model", run, "--method", "atha", "--output", "on").fails(4, "take a model such as ViT-B-16")
