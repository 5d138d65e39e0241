"""Bad input: one sentence on stderr, the right exit code, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_classes, make_model
from PIL import Image
from safetensors.torch import load_file, save_file

from clipfit.cli import main
from clipfit.methods import METHODS
from clipfit.methods.finetune import METHOD as FINETUNE
from clipfit.methods.finetune import Finetune
from clipfit.model import loading
from clipfit.model.clip import Clip
from clipfit.runs import files


@pytest.fixture
def shots(tmp_path, flat) -> Path:
    """A copy of the flat folder that a test may spoil."""
    return Path(shutil.copytree(flat, tmp_path / "pets"))


@pytest.fixture
def acting(monkeypatch) -> Callable[..., tuple[str, str]]:
    """Options for plain fine-tuning that does something once the losses of a step are known."""

    def method(act: Callable[[Clip], object]) -> tuple[str, str]:
        class Acting(Finetune):
            def terms(self, e, batch):
                found = super().terms(e, batch)
                act(self.clip)
                return found

        monkeypatch.setitem(METHODS, "acting", replace(FINETUNE, name="acting", build=Acting))
        return "--method", "acting"

    return method


def raising(error: BaseException) -> Callable[[Clip], object]:
    def act(_clip: Clip) -> None:
        raise error

    return act


def nothing_written(tmp_path: Path) -> bool:
    return not (tmp_path / "runs").exists()


# ---- the data: 3


def test_a_missing_folder(cli):
    cli("adapt", "nowhere").fails(3, "there is no nowhere: expected a folder of class folders")


def test_an_empty_folder(cli, tmp_path):
    (tmp_path / "pets").mkdir()
    cli("adapt", "pets").fails(3, "pets holds no labelled images: expected one folder a class")


def test_a_class_folder_without_images(cli, shots):
    (shots / "zebra").mkdir()
    (shots / "zebra" / "readme.txt").write_text("soon")
    cli("adapt", shots).fails(3, "zebra holds no images but 1 .txt (readme.txt): add some or remove the folder")


def test_one_class_only(cli, tmp_path):
    cli("adapt", make_classes(tmp_path / "pets", {"cat": 2})).fails(3, "at least two classes", "only 'cat'")


def test_fewer_images_than_shots(cli, shots, models):
    """As in CoOp, a class gives up to K images; which ones give fewer is said."""
    (shots / "owl" / "0.png").unlink()
    made = cli("adapt", shots, "--shots", 3, "--model", models["vit"], "--json")
    assert made.document["shots"] == 11
    assert "1 class has fewer than 3 images, so that every one is a shot: 'owl' 2" in made.stderr


def test_an_unreadable_image_is_named_or_skipped(cli, shots, models):
    (shots / "owl" / "1.png").write_bytes(b"\x89PNG but not really")
    command = ("adapt", shots, "--model", models["vit"])
    cli(*command).fails(3, "pets/owl/1.png cannot be read", "--skip-bad-images")
    made = cli(*command, "--skip-bad-images", "--json")
    assert made.code == 0
    assert made.document["skipped"] == ["pets/owl/1.png"]
    assert made.document["shots"] == 11
    assert "1 unreadable skipped (pets/owl/1.png)" in made.stderr
    # what could not be read was no shot, but is no held-out image either
    for flags in ((), ("--skip-bad-images",)):
        measured = cli("evaluate", "--json", *flags)
        assert measured.code == 0, measured.stderr
        assert measured.document["held_out"] is False
        assert measured.document["alphas"][0]["base"]["n"] == 11


def test_shots_are_drawn_among_readable_images_where_bad_ones_are_skipped(cli, shots, models):
    (shots / "owl" / "0.png").write_bytes(b"")
    (shots / "dog" / "2.png").write_bytes(b"")
    skipped: set[str] = set()
    for seed in range(3):
        made = cli("adapt", shots, "--shots", 2, "--skip-bad-images", "--model", models["vit"], "--seed", seed,
                   "--overwrite", "--json")  # fmt: skip
        assert made.document["shots"] == 8, made.stderr
        skipped |= set(made.document["skipped"])
    assert skipped == {"pets/owl/0.png", "pets/dog/2.png"}  # where one was drawn
    made = cli("adapt", shots, "--shots", 3, "--skip-bad-images", "--model", models["vit"], "--overwrite", "--json")
    assert made.document["shots"] == 10
    assert "2 classes have fewer than 3 images, so that every one is a shot: 'dog' 2, 'owl' 2" in made.stderr


def test_one_image_in_two_classes(cli, shots, models):
    shutil.copy(shots / "owl" / "0.png", shots / "dog" / "an owl.png")
    cli("adapt", shots, "--model", models["vit"]).fails(
        3, "pets/dog/an owl.png ('dog') and pets/owl/0.png ('owl') are the same image"
    )


def test_a_class_folder_whose_name_is_no_text(cli, shots, models):
    os.rename(shots / "owl", os.fsencode(shots) + b"/caf\xe9")
    cli("adapt", shots, "--model", models["vit"]).fails(3, "has a name that is no UTF-8: rename it, or give --classes")


def test_an_image_of_too_many_pixels_is_one_sentence(shots, models, monkeypatch, capsys):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr("sys.argv", ["clipfit", "adapt", str(shots), "--model", models["vit"]])
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 3
    assert "pixels are too many" in capsys.readouterr().err
    assert not [w for w in warned if issubclass(w.category, Image.DecompressionBombWarning)]


def test_a_picture_that_would_fill_the_memory_when_it_is_resized(cli, shots, models, split, split_run, tmp_path):
    """A line of pixels: a file of a few bytes, of which a model's short side would make gigabytes."""
    test = Path(shutil.copytree(split / "test", tmp_path / "test"))
    for place in (shots, test):
        for grey, name in enumerate(("long", "longer")):  # two of one size: they are looked at to tell copies apart
            Image.new("L", (60_000, 1), grey).save(place / "dog" / f"{name}.png")
    words = "long.png cannot be read (60000 x 1 pixels are too long to resize)"
    for command in (("adapt", shots, "--model", models["vit"]), ("evaluate", split_run, "--data", test)):
        cli(*command).fails(3, words, "--skip-bad-images")
        done = cli(*command, "--skip-bad-images", "--json")
        assert done.code == 0, done.stderr
        assert [Path(path).name for path in done.document["skipped"]] == ["long.png", "longer.png"]
    cli("check", shots, "--model", models["vit"]).fails(3, words)


def test_names_that_no_file_can_have(cli, shots, models, split_run, tmp_path):
    long, deep = "cat, " * 60, "[" * 100_000
    for command in (("adapt", long), ("evaluate", split_run, "--data", long), ("predict", split_run, long)):
        cli(*command).fails(2, "is too long to be the name of a file")
    (shots / "loop.png").symlink_to("loop.png")
    for path in ("a\\u0000b.jpg", "\\ud800.jpg", "loop.png"):
        (shots / "m.jsonl").write_text(f'{{"path": "{path}", "label": "dog"}}\n')
        cli("evaluate", split_run, "--data", shots / "m.jsonl").fails(3, "image ", "jpg" if "jpg" in path else "loop")
    rows = [f'{{"path": "{path}", "label": "dog"}}' for path in ("a\\u0000b.jpg", "loop.png", "dog/0.png", "dog/1.png")]
    (shots / "m.jsonl").write_text("\n".join([*rows, '{"path": "owl/0.png", "label": "owl"}']))
    made = cli("adapt", shots / "m.jsonl", "--skip-bad-images", "--model", models["vit"], "--output", "odd", "--json")
    assert len(made.document["skipped"]) == 2, made.stderr
    assert cli("evaluate", "odd", "--json").document["held_out"] is False
    for name in ("m.jsonl", "m.json"):
        (shots / name).write_text(deep)
        cli("adapt", shots / name).fails(3, name, "JSON" if name == "m.jsonl" else "json")
    (tmp_path / "names.json").write_text(deep)
    cli("adapt", shots, "--classes", tmp_path / "names.json").fails(3, "names.json is not JSON")


def test_a_class_that_loses_all_its_images(cli, shots, models):
    for file in (shots / "owl").iterdir():
        file.write_bytes(b"")
    cli("adapt", shots, "--model", models["vit"], "--skip-bad-images").fails(
        3, "no readable image is left of class 'owl'"
    )


def test_unreadable_images_in_an_evaluation(cli, split_run, tmp_path):
    data = make_classes(tmp_path / "data", {"dog": 2}, seed=3)
    (data / "dog" / "0.png").write_bytes(b"")
    cli("evaluate", split_run, "--data", data).fails(3, "dog/0.png cannot be read")
    record = cli("evaluate", split_run, "--data", data, "--skip-bad-images", "--json").document
    assert record["skipped"] == ["data/dog/0.png"]
    assert record["alphas"][0]["base"]["n"] == 1
    (data / "dog" / "1.png").write_bytes(b"")
    cli("evaluate", split_run, "--data", data, "--skip-bad-images").fails(3, "no readable image")


def test_a_class_file_that_does_not_match(cli, shots, tmp_path):
    (tmp_path / "names.txt").write_text("dog\nfish\nowl\nhamster\n")
    cli("adapt", shots, "--classes", "names.txt").fails(3, "no name for 'tabby_cat'; no folder for 'hamster'")


def test_new_classes_without_images(cli, split_run, tmp_path):
    (tmp_path / "new.txt").write_text("elk\nunicorn\n")
    cli("evaluate", split_run, "--new-classes", "new.txt").fails(3, "names 1 new class(es) without images: 'unicorn'")
    (tmp_path / "new.txt").write_text("dog\n")
    cli("evaluate", split_run, "--new-classes", "new.txt").fails(3, "every class in new.txt was trained on")
    cli("evaluate", split_run, "--new-classes", "none.txt").fails(3, "class file none.txt does not exist")


def test_data_of_which_nothing_fits(cli, split_run, tmp_path):
    make_classes(tmp_path / "other", {"zebra": 1}, seed=9)
    (tmp_path / "new.txt").write_text("yak\n")
    cli("evaluate", split_run, "--data", "other", "--new-classes", "new.txt").fails(3, "without images: 'yak'")
    cli("evaluate", split_run, "--data", "nowhere").fails(3, "there is no nowhere")


def test_a_full_disk_is_found_before_training(cli, shots, models, tmp_path, monkeypatch, acting):
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda place: usage(10**12, 10**12, 10**6))
    method = acting(lambda clip: pytest.fail("trained before looking"))
    cli("adapt", shots, "--model", models["vit"], *method).fails(
        7, "runs needs ", " MB, but its disk has 1 MB left: make room"
    )
    assert nothing_written(tmp_path)


def test_room_for_saved_states_is_looked_for_too(cli, shots, models, monkeypatch):
    """Two of them, one in place of the other, each of weights and two moments."""
    size = sum(t.numel() * t.element_size() for t in loading.load(models["vit"]).state().values())
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda place: usage(10**12, 10**12, 3 * size))
    command = ("adapt", shots, "--model", models["vit"], "--method", "finetune", "--epochs", 1)
    cli(*command, "--save-every", 1).fails(7, "make room")
    assert cli(*command).code == 0


@pytest.mark.parametrize("old", [False, True], ids=["first run", "over an old run"])
def test_a_disk_that_fills_up_while_writing(cli, shots, models, tmp_path, monkeypatch, old):
    command = ("adapt", shots, "--model", models["vit"])
    if old:
        assert cli(*command).code == 0
        before = {p.name: p.read_bytes() for p in (tmp_path / "runs" / "pets-cite").iterdir()}

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    cli(*command, "--overwrite").fails(7, "finetuned.safetensors cannot be written: No space left on device")
    if old:
        assert {p.name: p.read_bytes() for p in (tmp_path / "runs" / "pets-cite").iterdir()} == before
        assert {p.name for p in (tmp_path / "runs").iterdir()} == {"pets-cite", ".pets-cite.lock"}
    else:
        assert nothing_written(tmp_path)


def test_a_place_that_cannot_be_written(cli, shots, models, tmp_path):
    (tmp_path / "file").write_text("")
    cli("adapt", shots, "--model", models["vit"], "--output", "file/run").fails(7, "file cannot be created")


def test_a_place_without_permission_is_found_before_training(cli, shots, models, tmp_path, monkeypatch, acting):
    def denied(**options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files.tempfile, "TemporaryDirectory", denied)  # whoever is root may write anywhere
    method = acting(lambda clip: pytest.fail("trained before looking"))
    cli("adapt", shots, "--model", models["vit"], *method).fails(7, "runs cannot be written in: Permission denied")
    assert nothing_written(tmp_path)


def test_a_damaged_run(cli, split_run, tmp_path):
    run = Path(shutil.copytree(split_run, tmp_path / "run"))
    (run / "finetuned.safetensors").write_bytes(b"damaged")
    cli("evaluate", run).fails(4, "finetuned.safetensors is not as clipfit wrote it: expected SHA-256")
    (run / "classes.json").write_text("{")
    cli("evaluate", run).fails(4, "classes.json is not as clipfit wrote it: expected SHA-256")


def test_a_run_with_missing_pieces(cli, split_run, tmp_path):
    for name in ("shots.jsonl", "config.json", "classes.json"):
        run = Path(shutil.copytree(split_run, tmp_path / name.partition(".")[0]))
        (run / name).unlink()
        cli("evaluate", run).fails(4, f"{name} is missing, but files.json lists it")


# ---- usage: 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--method", "sight"), ("unknown method 'sight' (did you mean cite?)",)),
        (("--model", "ViT-B-61"), ("unknown model 'ViT-B-61'; did you mean ", "ViT-B-16")),
        (("--model", "clipfit-tyni"), ("did you mean clipfit-tiny",)),
        (("--model", "clipfit-tiny", "--pretrained", "openai"), ("clipfit-tiny has its own weights: leave --pretr",)),
        (("--pretrained", "open-ai"), ("'open-ai' is neither a file nor a pretrained tag of ViT-B-16",)),
        (("--alpha", "1.5"), ("alpha must lie between 0 and 1; found 1.5",)),
        (("--alpha", "nan"), ("alpha must lie between",)),
        (("--shots", "0"), ("shots_per_class (--shots) must be at least 1; found 0",)),
        (("--epochs", "0"), ("epochs must be at least 1; found 0",)),
        (("--learning-rate", "0"), ("learning_rate must be above 0 and below 1; found 0.0",)),
        (("--seed", "-1"), ("seed must lie between 0 and 9223372036854775807; found -1",)),
        (("--precision", "fp8"), ("precision must be one of auto, fp32, bf16; found 'fp8'",)),
        (("--device", "warp"), ("device 'warp' cannot be used here", "--device cpu")),
        (("--template", "a photo"), ("template must contain {} exactly once",)),
        (("--crop-scale", "0.9", "0.1"), ("crop_scale must be in ascending order; found (0.9, 0.1)",)),
        (("--method", "flyp", "--scl-weight", "1"), ("method flyp has no option 'scl_weight'",)),
        (("--scl-weight", "-1"), ("scl_weight must be at least 0; found -1.0",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) and value[0].startswith("--") else "",
)
def test_wrong_options_of_adapt(cli, flat, tmp_path, options, words):
    cli("adapt", flat, *options).fails(2, *words)
    assert nothing_written(tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--alpha", "1.5"), ("alphas must lie between 0 and 1; found 1.5",)),
        (("--alphas", "0:1"), ("alphas must be first:last:step (0:1:0.1) or a list (0,0.5,1); found '0:1'",)),
        (("--alphas", "0,2"), ("alphas must lie between", "found 2.0")),
        (("--alpha", "0.5", "--alphas", "0,1"), ("--alpha and --alphas exclude each other",)),
        (("--batch-size", "0"), ("batch_size must be at least 1",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) and value[0].startswith("--") else "",
)
def test_wrong_options_of_evaluate(cli, split_run, options, words):
    cli("evaluate", split_run, *options).fails(2, *words)


def test_wrong_options_of_export(cli, split_run):
    cli("export", split_run, "--format", "onyx").fails(2, "format must be one of open_clip, ", "found 'onyx'")
    cli("export", split_run, "--alpha", "-1").fails(2, "alpha must lie between")


# ---- the model: 4


def test_a_missing_model_folder(cli, flat):
    cli("adapt", flat, "--model", "local-dir:nowhere").fails(4, "nowhere is no model folder")


def test_weights_that_changed_since_the_run(cli, flat, tmp_path):
    folder = make_model(tmp_path / "model")
    assert cli("adapt", flat, "--model", "local-dir:model", "--output", "run").code == 0
    make_model(folder, seed=1)
    cli("evaluate", "run").fails(4, f"the weights of local-dir:{folder} changed since the run was made", "adapt again")
    cli("export", "run", "--alpha", 0).fails(4, "changed since the run was made")


# ---- numbers: 6


def spoiled(folder: Path) -> Path:
    make_model(folder)
    file = folder / "open_clip_model.safetensors"
    state = load_file(file)
    state["visual.ln_post.weight"].fill_(3e38)  # a number, but what it scales overflows
    save_file(state, file)
    return folder


def test_a_loss_that_is_no_number(cli, flat, tmp_path):
    spoiled(tmp_path / "model")
    cli("adapt", flat, "--model", "local-dir:model").fails(6, "step 1: the loss is not finite", "--learning-rate")
    assert nothing_written(tmp_path)


def test_weights_that_are_no_numbers_after_the_last_step(cli, flat, models, tmp_path, acting):
    method = acting(lambda clip: clip.model.visual.proj.data.fill_(float("inf")))  # its loss is finite still
    command = ("adapt", flat, "--model", models["vit"], "--epochs", 1, "--batch-size", 12, *method)
    cli(*command).fails(6, "after training, ", "is not finite")
    assert nothing_written(tmp_path)


# ---- interrupted: 130, and faults of our own: 1


@pytest.mark.parametrize("moment", ["training", "writing"])
def test_control_c_leaves_nothing(cli, flat, models, tmp_path, monkeypatch, acting, moment):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    method: tuple[str, ...] = ()
    if moment == "training":
        method = acting(interrupted)
    else:
        monkeypatch.setattr(files, "save_file", interrupted)
    result = cli("adapt", flat, "--model", models["vit"], "--json", *method)
    assert result.code == 130
    assert result.document == {"error": {"code": 130, "message": "interrupted: nothing was written"}}
    assert result.stderr.splitlines()[-1] == "interrupted: nothing was written"
    assert "Traceback" not in result.stderr
    assert nothing_written(tmp_path)


def test_a_device_that_is_too_small(cli, flat, models, acting):
    method = acting(raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")))
    cli("adapt", flat, "--model", models["vit"], *method).fails(2, "Tried to allocate 2.00 GiB): try --gradient-ch")


def test_a_device_that_is_too_small_to_measure_on(cli, flat, models, monkeypatch):
    def full(*_arguments, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Clip, "encode_image", full)
    found = cli("adapt", flat, "--model", models["vit"])
    found.fails(2, "Tried to allocate 2.00 GiB; make batches smaller")


def test_where_a_batch_does_not_fit_it_is_done_in_parts_and_said(cli, flat, models, acting):
    errors = [torch.OutOfMemoryError("CUDA out of memory.")]

    def once(_clip: Clip) -> None:
        if errors:
            raise errors.pop()

    done = cli("adapt", flat, "--model", models["vit"], *acting(once), "--batch-size", 6, "--epochs", 2)
    assert done.code == 0, done.stderr
    assert done.stderr.count("memory ran out") == 1
    words = " ".join(done.stderr.split())
    assert "memory ran out: from step 1 on, images are encoded 3 at a time" in words
    assert "--micro-batch 3 does so from the start" in words


def test_a_tower_that_has_no_blocks_is_said_before_training(cli, flat, models, acting):
    method = acting(lambda clip: pytest.fail("trained before looking"))
    found = cli("adapt", flat, "--model", models["resnet"], *method, "--gradient-checkpointing")
    found.fails(4, "the image tower is a ModifiedResNet: leave it out, and give --micro-batch")


def test_what_would_have_no_effect_is_refused(cli, split_run):
    cli("evaluate", split_run, "--model", "ViT-B-16").fails(2, "--model measures zero-shot CLIP", "leave the run out")


def test_a_fault_of_our_own_is_one_sentence_too(cli, flat, models, monkeypatch, acting):
    command = ("adapt", flat, "--model", models["vit"], *acting(raising(AssertionError("so it goes"))))
    monkeypatch.delenv("CLIPFIT_DEBUG", raising=False)
    cli(*command).fails(1, "a fault of clipfit's own (AssertionError: so it goes)")
    monkeypatch.setenv("CLIPFIT_DEBUG", "1")
    assert "Traceback" in cli(*command).stderr


def test_names_in_any_script(cli, models, tmp_path):
    """Class and file names beyond ASCII reach config, metadata and JSON, even file names that are no UTF-8."""
    root = make_classes(tmp_path / "Tiere", {"Bär": 2, "犬": 2})
    try:
        (root / "犬" / "0.png").rename(Path(str(root / "犬") + "/\udcff.png"))
    except OSError:
        pytest.skip("this file system wants UTF-8")
    made = cli("adapt", root, "--model", models["vit"], "--json")
    assert made.code == 0, made.stderr
    record = cli("evaluate", "--json").document
    assert record["base_classes"] == ["Bär", "犬"]
    assert record["alphas"][0]["base"]["n"] == 4
    assert json.loads((tmp_path / "runs" / "Tiere-cite" / "classes.json").read_text("utf-8"))["base"] == ["Bär", "犬"]
