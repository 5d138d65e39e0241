"""adapt → evaluate → export through the command line, for every method of the table."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from conftest import make_classes, picture
from PIL import Image
from safetensors.torch import load_file

from clipfit import AdaptConfig, EvaluateConfig, ExportConfig, adapt, evaluate, export
from clipfit.methods import METHODS
from clipfit.model import loading
from clipfit.runs import files, manifest

RUN_FILES = {
    "classes.json", "config.json", "files.json", "finetuned.safetensors", "metrics.jsonl", "model.safetensors",
    "shots.jsonl", "timing.json",
}  # fmt: skip


def logits(model: torch.nn.Module, preprocess, files: list[Path], names: list[str]) -> torch.Tensor:
    """open_clip's logits, with nothing of clipfit in between: (n, C)."""
    images = torch.stack([preprocess(Image.open(file).convert("RGB")) for file in files])
    tokens = open_clip.SimpleTokenizer(context_length=16)([f"a photo of a {name}" for name in names])
    with torch.no_grad():
        return model.get_logits(images, tokens)[0]


PLAIN = [name for name, method in METHODS.items() if method.edits(method.configure({})) is None]


@pytest.mark.parametrize("model", ["vit", "resnet"])
@pytest.mark.parametrize("method", PLAIN)
def test_every_method_adapts_and_evaluates(cli, models, split, tmp_path, method, model):
    made = cli("adapt", split, "--method", method, "--model", models[model], "--alpha", 0.25, "--json")
    assert made.code == 0, made.stderr
    record = made.document
    assert record["run"] == f"runs/animals-{method}"
    assert (record["method"], record["model"]) == (method, models[model])
    assert (record["classes"], record["shots"], record["steps"]) == (3, 6, 4)
    assert record["losses"]
    assert all(isinstance(v, float) for v in record["losses"].values())
    assert record["seconds"] > 0
    run = tmp_path / record["run"]
    assert {p.name for p in run.iterdir()} == RUN_FILES

    measured = cli("evaluate", "--alphas", "1,0.25", "--json")
    assert measured.code == 0, measured.stderr
    rows = measured.document["alphas"]
    assert [row["alpha"] for row in rows] == [0.0, 0.25, 1.0]
    assert all((row["base"]["n"], row["new"]["n"], row["union"]["n"]) == (5, 4, 9) for row in rows)
    assert rows[0]["agreement_with_zero_shot"] == 1.0

    before = load_file(Path(models[model].removeprefix("local-dir:")) / "open_clip_model.safetensors")
    finetuned, ensemble = (load_file(run / f"{name}.safetensors") for name in ("finetuned", "model"))
    moved = [name for name, t in finetuned.items() if not torch.equal(t, before[name])]
    assert any(name.startswith("visual.") for name in moved)
    assert any(name.startswith("transformer.") for name in moved) == (method != "vision only")
    for name, t in before.items():
        if t.is_floating_point():
            torch.testing.assert_close(ensemble[name], 0.75 * t + 0.25 * finetuned[name], atol=1e-6, rtol=1e-5)


def test_a_run_describes_itself(split_run, split, models):
    config = json.loads((split_run / "config.json").read_text())
    assert config["shots"] == str(split)
    assert config["recipe"]["epochs"] == 2  # the model's own
    assert config["recipe"]["learning_rate"] == 1e-3
    assert config["recipe"]["weight_decay"] == 0.1  # the paper's
    assert config["method_options"] == {"dva_weight": 1.0, "literal_scl": False, "scl_weight": 0.7, "vld_weight": 0.1}
    assert config["pretrained"]["sha256"] == loading.load(models["vit"]).source.sha256
    assert set(config["versions"]) >= {"torch", "open_clip", "python"}
    classes = json.loads((split_run / "classes.json").read_text())
    assert classes["base"] == ["bee", "cow", "dog"]
    shots = [json.loads(line) for line in (split_run / "shots.jsonl").read_text().splitlines()]
    assert [s["path"] for s in shots] == [f"train/{c}/{k}.png" for c in ("bee", "cow", "dog") for k in (0, 1)]
    assert len({s["sha256"] for s in shots}) == 6
    steps = [json.loads(line) for line in (split_run / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps] == [1, 2, 3, 4]
    assert set(steps[0]["losses"]) == {"dva", "scl", "vld"}
    assert steps[0]["losses"]["vld"] == pytest.approx(0, abs=1e-6)
    assert steps[-1]["losses"]["vld"] > 1e-5


def test_a_run_that_reads_back_wrong_is_not_kept(cli, split, models, tmp_path, monkeypatch):
    usual = files.read_tensors

    def damaged(path):
        state, metadata = usual(path)
        return {**state, "text_projection": state["text_projection"] + 1e-3}, metadata

    monkeypatch.setattr(files, "read_tensors", damaged)
    cli("adapt", split, "--model", models["vit"]).fails(1, "does not give the model's features when it is read again")
    assert not (tmp_path / "runs").exists()


def test_the_callers_recipe_goes_before_the_models_own(split, models, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(models["vit"].removeprefix("local-dir:"), folder)
    own = {"recipe": {"epochs": 2, "batch_size": 4}, "methods": {"flyp": {"epochs": 3, "crop_scale": [0.5, 1]}}}
    (folder / "clipfit.json").write_text(json.dumps({"adapt": own}))

    def recipe(method: str, **given) -> dict:
        output = tmp_path / f"{method}{len(given)}"
        adapt(AdaptConfig(split, method, f"local-dir:{folder}", output=output, recipe=given))
        return json.loads((output / "config.json").read_text())["recipe"]

    assert recipe("finetune")["epochs"] == 2
    assert recipe("flyp")["epochs"] == 3
    assert recipe("flyp", epochs=1)["epochs"] == 1
    assert recipe("flyp", epochs=1, batch_size=6)["crop_scale"] == [0.5, 1]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_figures_are_those_of_open_clip_and_a_loop(split, split_run, tmp_path, alpha):
    """Right answers by class, counted without clipfit; `bee` has no test image, which must not shift the others."""
    row = next(r for r in evaluate(EvaluateConfig(split_run, alphas=(alpha,))).rows if r.alpha == alpha)
    folder = export(ExportConfig(split_run, alpha=alpha, output=tmp_path / "model")).output
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    names = {"Ant-Lion": "Ant Lion", "cow": "cow", "dog": "dog", "elk": "elk"}

    def right(candidates: list[str], folders: list[str]) -> dict[str, tuple[int, int]]:
        counts = {}
        for name in folders:
            files = sorted((split / "test" / name).glob("*.png"))
            best = logits(model.eval(), preprocess, files, candidates).argmax(1).tolist()
            counts[names[name]] = (sum(candidates[b] == names[name] for b in best), len(files))
        return counts

    base, new = ["bee", "cow", "dog"], ["Ant Lion", "elk"]
    assert row.base.per_class == right(base, ["cow", "dog"])
    assert row.new.per_class == right(new, ["Ant-Lion", "elk"])
    assert row.union.per_class == right(base + new, list(names))
    b, n = row.base.value, row.new.value
    assert row.harmonic_mean == (pytest.approx(2 * b * n / (b + n)) if b + n else 0)


def test_the_keys_that_scripts_rely_on(cli, split_run):
    record = cli("evaluate", split_run, "--json").document
    assert set(record) == {
        "run", "data", "method", "held_out", "features", "base_classes", "new_classes", "alphas", "notes", "skipped",
        "kept", "model", "templates", "retain", "drift",
    }  # fmt: skip
    assert record["held_out"] is True
    assert record["base_classes"] == ["bee", "cow", "dog"]
    assert record["new_classes"] == ["Ant Lion", "elk"]
    assert [row["alpha"] for row in record["alphas"]] == [0.0, 0.5]
    for row in record["alphas"]:
        assert set(row) == {
            "alpha", "base", "new", "harmonic_mean", "union", "agreement_with_zero_shot", "against_zero_shot",
        }  # fmt: skip
        for part in ("base", "new", "union"):
            assert 0 <= row[part]["accuracy"] <= 1
            assert set(row[part]) == {
                "accuracy", "n", "low", "high", "macro", "per_class", "top5", "temperature", "calibrated",
                "calibration_error", "calibration_error_by_chance", "coverage",
            }  # fmt: skip
            assert [set(c) for c in row[part]["coverage"]] == [{"coverage", "n", "accuracy", "least_probability"}] * 3
            assert row[part]["coverage"][0]["accuracy"] == row[part]["accuracy"]
            assert row[part]["low"] <= row[part]["accuracy"] <= row[part]["high"]
            difference = row["against_zero_shot"][part]
            assert set(difference) == {"difference", "low", "high", "mcnemar_p"}
            assert difference["low"] <= difference["difference"] <= difference["high"]
            assert sum(c["n"] for c in row[part]["per_class"].values()) == row[part]["n"]


def test_people_read_tables_on_stderr_and_stdout_stays_empty(cli, split_run):
    for flags in ((), ("--per-class",)):
        result = cli("evaluate", split_run, "--alphas", "0:1:0.5", *flags)
        assert (result.code, result.stdout) == (0, "")
        for word in ("zero-shot", "held-out images", "3 classes", "5 images", "4 images"):
            assert word in result.stderr
        assert ("elk (new)" in result.stderr) == bool(flags)


def test_names_with_brackets_are_shown_as_they_are(cli, split_run, tmp_path):
    data = make_classes(tmp_path / "ph[old]", {"dog": 1, "frog": 1, "fox": 1}, seed=3)
    (tmp_path / "names.txt").write_text("dog\nfrog\tfrog [/b]\nfox\tfox [red]\n")
    result = cli("evaluate", split_run, "--data", data, "--classes", "names.txt", "--per-class")
    assert result.code == 0, result.stderr
    for name in ("ph[old]", "frog [/b] (new)", "fox [red] (new)"):
        assert name in result.stderr


def test_new_classes_are_matched_by_name(cli, split_run, tmp_path):
    (tmp_path / "new.txt").write_text("ELK\nant_lion\n")
    record = cli("evaluate", split_run, "--new-classes", "new.txt", "--json").document
    assert record["new_classes"] == ["ELK", "ant lion"]
    assert {k: v["n"] for k, v in record["alphas"][0]["new"]["per_class"].items()} == {"ELK": 2, "ant lion": 2}
    (tmp_path / "new.txt").write_text("elk\nDOG\n")
    record = cli("evaluate", split_run, "--new-classes", "new.txt", "--json").document
    assert record["new_classes"] == ["elk"]
    assert record["alphas"][0]["base"]["n"] == 5
    notes = " ".join(record["notes"])
    assert "'DOG': listed as new, but trained on; counted as base" in notes
    assert "2 images of classes that are neither base nor new were left out" in notes


def test_other_images_than_the_runs_own(cli, split_run, tmp_path):
    make_classes(tmp_path / "more", {"DOG": 3, "yak": 2}, seed=7)
    record = cli("evaluate", split_run, "--data", "more", "--json").document
    assert record["data"] == "more"
    assert record["held_out"] is True
    row = record["alphas"][0]
    assert {k: v["n"] for k, v in row["base"]["per_class"].items()} == {"dog": 3}
    assert {k: v["n"] for k, v in row["new"]["per_class"].items()} == {"yak": 2}


def test_shots_under_another_name_are_no_evidence(cli, split, split_run, tmp_path):
    """The shots themselves, passed as --data, are left out: only the image that is none is counted."""
    shutil.copytree(split / "train", tmp_path / "again")
    picture(4711).save(tmp_path / "again" / "dog" / "other.png")
    record = cli("evaluate", split_run, "--data", "again", "--json").document
    assert record["alphas"][0]["base"]["n"] == 1
    assert "6 images have the very content of a shot and were left out" in record["notes"]
    cli("evaluate", split_run, "--data", split / "train").fails(3, "every image in ", "train is a shot of ")


def test_a_flat_folder_ends_well_and_says_what_is_missing(cli, models, flat, tmp_path):
    assert cli("adapt", flat, "--model", models["vit"]).code == 0
    (tmp_path / "classes.txt").write_text("zebra\nyak\n")
    result = cli("evaluate", "--new-classes", "classes.txt", "--json")
    assert result.code == 0, result.stderr
    record = result.document
    assert record["held_out"] is False
    for row in record["alphas"]:
        assert row["base"]["n"] == 12
        assert row["new"] is row["union"] is row["harmonic_mean"] is None
        assert 0 <= row["agreement_with_zero_shot"] <= 1
    notes = " ".join(record["notes"])
    assert "base accuracy is measured on the shots: no evidence of generalisation" in notes
    assert (
        "no new accuracy: pass --data, with folders for 'zebra', 'yak'" in notes
    )  # class folders beside test/ are refused
    assert "on the shots" in result.stderr


def test_shots_drawn_from_a_flat_folder_hold_the_others_out(cli, models, flat):
    made = cli("adapt", flat, "--model", models["vit"], "--shots", 2, "--seed", 5, "--json")
    assert made.document["shots"] == 8
    record = cli("evaluate", "--json").document
    assert record["held_out"] is True
    assert record["alphas"][0]["base"]["n"] == 4
    assert all(c["n"] == 1 for c in record["alphas"][0]["base"]["per_class"].values())


def test_manifests_and_class_files_go_all_the_way(cli, models, flat, tmp_path):
    rows = [f"{p.relative_to(flat)},{p.parent.name}" for p in sorted(flat.rglob("*.png"))]
    (tmp_path / "m.csv").write_text("path,label\n" + "\n".join(rows))
    (tmp_path / "names.txt").write_text("owl\tbarn owl\nfish\tgold fish\ndog\tdog\ntabby_cat\ttabby\n")
    made = cli("adapt", "m.csv", "--classes", "names.txt", "--image-root", flat, "--shots", 1, "--model", models["vit"])
    assert made.code == 0, made.stderr
    assert (tmp_path / "runs" / "m-cite").is_dir()
    record = cli("evaluate", "--json").document
    assert record["base_classes"] == ["barn owl", "gold fish", "dog", "tabby"]
    assert record["alphas"][0]["base"]["n"] == 8

    # the run's names hold for the same folders elsewhere, a class file of that place before them
    more = make_classes(tmp_path / "more", {"owl": 2, "tabby_cat": 3, "barn owl": 1, "yak": 1}, seed=7)
    (more / "barn owl").rename(more / "zebu")
    record = cli("evaluate", "--data", more, "--json").document
    counts = {name: c["n"] for name, c in record["alphas"][0]["base"]["per_class"].items()}
    assert counts == {"barn owl": 2, "tabby": 3}
    assert record["new_classes"] == ["yak", "zebu"]
    (tmp_path / "theirs.txt").write_text("owl\tsnowy owl\nzebu\tbarn owl\ntabby_cat\ttabby\nyak\tyak\n")
    record = cli("evaluate", "--data", more, "--classes", "theirs.txt", "--json").document
    counts = {name: c["n"] for name, c in record["alphas"][0]["base"]["per_class"].items()}
    assert counts == {"barn owl": 1, "tabby": 3}
    assert record["new_classes"] == ["snowy owl", "yak"]


def test_adapting_opens_no_image_but_the_shots(models, flat, tmp_path):
    """Held-out images may be anything: the bytes of the run stay the same."""
    root = tmp_path / "pets"
    shutil.copytree(flat, root)
    config = AdaptConfig(root, model=models["vit"], shots_per_class=1, output=tmp_path / "a")
    adapt(config)
    shots = {json.loads(line)["path"] for line in (tmp_path / "a" / "shots.jsonl").read_text().splitlines()}
    for file in root.rglob("*.png"):
        if file.relative_to(tmp_path).as_posix() not in shots:
            file.write_bytes(b"no image at all")
    adapt(AdaptConfig(root, model=models["vit"], shots_per_class=1, output=tmp_path / "b"))
    for name in RUN_FILES - {"timing.json"}:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_existing_run_is_only_replaced_when_asked(cli, models, flat, tmp_path):
    command = ("adapt", flat, "--model", models["vit"], "--output", "out")
    assert cli(*command).code == 0
    before = (tmp_path / "out" / "config.json").read_bytes()
    cli(*command, "--seed", 1).fails(2, "out exists already", "--overwrite", "--output")
    assert (tmp_path / "out" / "config.json").read_bytes() == before
    assert cli(*command, "--seed", 1, "--overwrite").code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["seed"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.lock", "out"]


def test_overwrite_never_deletes_what_clipfit_did_not_write(cli, models, flat, split_run, tmp_path):
    theirs = tmp_path / "precious"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("…")
    (theirs / "config.json").write_text("{}")  # many tools write one
    for command in (("adapt", flat, "--model", models["vit"]), ("export", split_run)):
        cli(*command, "--output", theirs, "--overwrite").fails(2, "precious", "--overwrite will not delete it")
        assert (theirs / "thesis.txt").is_file()


def test_overwrite_never_deletes_what_it_is_made_from(cli, models, flat, split_run, tmp_path):
    data = tmp_path / "data"  # a manifest, called as the shots of a run are, beside its images
    shutil.copytree(flat, data / "images")
    rows = [{"path": str(p.relative_to(data)), "label": p.parent.name} for p in sorted(data.rglob("*.png"))]
    (data / "shots.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (data / "config.json").write_text("{}")
    command = ("adapt", data / "shots.jsonl", "--model", models["vit"], "--output", data, "--overwrite")
    cli(*command).fails(2, "will not delete it")
    (data / "finetuned.safetensors").touch()
    cli(*command).fails(2, "would be replaced, but", "shots.jsonl is needed")

    run = tmp_path / "runs" / "pets-cite"  # the model that is adapted lies in the run that would be replaced
    assert cli("adapt", flat, "--model", models["vit"]).code == 0
    assert cli("export", "--output", run / "mine").code == 0
    model = f"local-dir:{run}/mine"
    cli("adapt", flat, "--model", model, "--overwrite").fails(2, "mine is needed")
    assert cli("adapt", flat, "--model", model, "--output", "second").code == 0
    cli("export", "second", "--output", run / "mine", "--overwrite").fails(2, "is needed")
    assert len(list(data.rglob("*.png"))) == 12
    assert (run / "mine" / "open_clip_model.safetensors").is_file()


def test_a_run_behind_a_link_and_one_in_the_current_folder(cli, models, flat, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    for _ in range(2):
        made = cli("adapt", flat, "--model", models["vit"], "--output", "out", "--overwrite")
        assert made.code == 0, made.stderr
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "model.safetensors").is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    made = cli("adapt", flat, "--model", models["vit"], "--output", ".", "--overwrite")
    assert made.code == 0, made.stderr
    assert (tmp_path / "here" / "model.safetensors").is_file()


def test_nothing_is_written_among_the_shots(cli, models, flat, tmp_path, monkeypatch):
    """`adapt .` would make runs/ one of the classes of the next command."""
    shutil.copytree(flat, tmp_path / "pets")
    monkeypatch.chdir(tmp_path / "pets")
    cli("adapt", ".", "--model", models["vit"]).fails(2, "be read as one of its classes", "--output")
    plan = Path("../plan.toml")
    plan.write_text(
        f"model = {json.dumps(models['vit'])}\nprotocol = 'fsl'\n[methods.zero-shot]\n[sets.x]\ndata = 'pets'"
    )
    cli("benchmark", plan).fails(2, "be read as one of its classes")
    assert cli("adapt", ".", "--model", models["vit"], "--output", "../run").code == 0
    assert sorted(p.name for p in Path().iterdir()) == ["dog", "fish", "owl", "tabby_cat"]


def test_a_run_finds_what_it_was_made_from(cli, models, flat, tmp_path, monkeypatch):
    """From any folder; where another folder has its name, or it is gone, that is said."""
    shutil.copytree(flat, tmp_path / "a" / "pets")
    shutil.copytree(models["vit"].removeprefix("local-dir:"), tmp_path / "a" / "model")
    make_classes(tmp_path / "b" / "pets", {"tabby_cat": 3, "dog": 3, "fish": 3, "owl": 3}, seed=9)
    monkeypatch.chdir(tmp_path / "a")
    assert cli("adapt", "pets", "--shots", 2, "--model", "local-dir:model").code == 0
    here = cli("evaluate", "runs/pets-cite", "--json").document
    monkeypatch.chdir(tmp_path / "b")
    there = cli("evaluate", "../a/runs/pets-cite", "--json").document
    assert there["alphas"] == here["alphas"]

    (tmp_path / "a" / "pets").rename(tmp_path / "a" / "moved")
    cli("evaluate", "../a/runs/pets-cite").fails(3, "pets holds none of the shots of ../a/runs/pets-cite", "--data")
    (tmp_path / "b" / "pets").rename(tmp_path / "b" / "others")
    cli("evaluate", "../a/runs/pets-cite").fails(3, "is no longer there: pass --data")
    (tmp_path / "a" / "runs" / "pets-cite" / "timing.json").unlink()
    (tmp_path / "a" / "moved").rename(tmp_path / "a" / "pets")
    monkeypatch.chdir(tmp_path / "a")
    assert cli("evaluate", "runs/pets-cite", "--json").document["alphas"] == here["alphas"]


def test_copies_are_counted_once(cli, split, split_run, tmp_path):
    data = tmp_path / "animals"
    shutil.copytree(split / "test", data)
    before = cli("evaluate", split_run, "--data", data, "--json").document
    for file in sorted(data.rglob("*.png")):
        shutil.copy(file, file.with_name(f"copy-{file.name}"))
    after = cli("evaluate", split_run, "--data", data, "--json").document
    assert after["alphas"] == before["alphas"]
    assert [note for note in after["notes"] if note not in before["notes"]] == [
        "9 images have the very content of another and were counted once"
    ]


def test_the_newest_run_is_taken(cli, split_run, tmp_path):
    for age, name in enumerate(["newest", "older", "oldest"]):
        shutil.copytree(split_run, tmp_path / "runs" / name)
        os.utime(tmp_path / "runs" / name / "files.json", (10_000 - age, 10_000 - age))
    shutil.copytree(split_run, tmp_path / "runs" / ".half.part")  # what a killed process leaves
    (tmp_path / "runs" / "empty").mkdir()
    assert cli("evaluate", "--json").document["run"] == "runs/newest"
    assert cli("export", "--json").document["run"] == "runs/newest"


def test_without_any_run(cli, tmp_path):
    cli("evaluate").fails(2, "no run is named and runs/ holds none", "clipfit adapt SHOTS")
    cli("export", "nowhere").fails(2, "there is no run nowhere")
    (tmp_path / "half").mkdir()
    cli("evaluate", "half").fails(3, "half is no finished run")


def test_alpha_one_needs_no_pre_trained_weights_and_others_do(cli, split, models, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(models["vit"].removeprefix("local-dir:"), folder)
    assert cli("adapt", split, "--model", f"local-dir:{folder}", "--output", "run").code == 0
    shutil.rmtree(folder)
    assert cli("export", "run", "--alpha", 1).code == 0
    assert cli("export", "run").code == 0  # the run's own ratio is stored
    cli("export", "run", "--alpha", 0.3).fails(4, "has no weights")
    cli("evaluate", "run").fails(4, "has no weights")


def test_a_run_of_another_format_is_refused(cli, split_run, tmp_path):
    shutil.copytree(split_run, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps({**config, "format": 99}))
    manifest.seal(tmp_path / "run")
    cli("evaluate", "run").fails(4, "run format 99; this clipfit reads 1 and 2")
