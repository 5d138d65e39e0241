"""Shots are told from held-out images by bytes, by pixels and by path, and copies count once."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_classes, picture
from PIL import Image
from processes import Found, together

from clipfit import EvaluateConfig, evaluate, ranks
from clipfit.data import copies, images
from clipfit.data.copies import Known, first_of_each, identify
from clipfit.data.images import pixel_hash
from clipfit.data.layout import Sample


def as_bmp(folder: Path) -> Path:
    """Every picture of a folder saved anew: other bytes, the same pixels."""
    for file in sorted(folder.rglob("*.png")):
        Image.open(file).save(file.with_suffix(".bmp"))
        file.unlink()
    return folder


def measured(cli, run: Path, data: Path) -> tuple[int, list[str]]:
    """How many images of base classes were measured on, and what was said."""
    result = cli("evaluate", run, "--data", data, "--json")
    assert result.code == 0, result.stderr
    return result.document["alphas"][0]["base"]["n"], result.document["notes"]


@pytest.fixture
def decoded(monkeypatch) -> list[Path]:
    """What has been decoded, in any order."""
    usual, paths = images.decode, []

    def counted(path: Path, *given: Any, **more: Any) -> Image.Image:
        paths.append(path)
        return usual(path, *given, **more)

    for module in (images, copies):
        monkeypatch.setattr(module, "decode", counted)
    return paths


def test_shots_are_recorded_with_bytes_pixels_and_size(split_run, split):
    from torchvision.transforms.functional import pil_to_tensor

    for line in (split_run / "shots.jsonl").read_text().splitlines():
        shot = json.loads(line)
        assert shot["size"] == [36, 40]
        assert shot["pixels"] == pixel_hash(pil_to_tensor(Image.open(split / shot["path"])))
    ramp = torch.arange(24, dtype=torch.uint8)
    assert pixel_hash(ramp.reshape(3, 2, 4)) != pixel_hash(ramp.reshape(3, 4, 2))


def test_shots_saved_in_another_format_are_no_evidence(cli, split, split_run, tmp_path):
    data = as_bmp(Path(shutil.copytree(split / "train", tmp_path / "again")))
    cli("evaluate", split_run, "--data", data).fails(3, "every image in ", "again is a shot of ", "or a copy of one")
    picture(4711).save(data / "dog" / "other.png")
    count, notes = measured(cli, split_run, data)
    assert count == 1
    assert "6 images have the very content of a shot and were left out" in notes


def test_copies_in_another_format_count_once(cli, split, split_run, tmp_path):
    data = Path(shutil.copytree(split / "test", tmp_path / "animals"))
    before, _ = measured(cli, split_run, data)
    as_bmp(Path(shutil.copytree(split / "test", tmp_path / "more")))
    shutil.copytree(tmp_path / "more", data, dirs_exist_ok=True)
    after, notes = measured(cli, split_run, data)
    assert after == before
    assert "9 images have the very content of another and were counted once" in notes


def test_an_image_is_decoded_once_to_tell_copies_and_at_all_ratios(split, split_run, models, decoded, tmp_path):
    """All pictures have one size: each is decoded to know whether it is a copy."""
    test = Path(shutil.copytree(split / "test", tmp_path / "animals"))
    again = as_bmp(Path(shutil.copytree(split / "test", tmp_path / "again")))
    options = {"data": test, "alphas": (0.5, 1.0), "retain": (again,), "drift": again}
    expected = evaluate(EvaluateConfig(split_run, **options, cache_bytes=0)).as_json()
    twice, decoded[:] = len(decoded), []
    assert evaluate(EvaluateConfig(split_run, **options)).as_json() == expected
    paths = [*test.rglob("*.png"), *2 * list(again.rglob("*.bmp"))]
    assert sorted(decoded) == sorted(paths)
    assert twice > 2 * len(paths)  # what is not kept is decoded again, at every α

    model = EvaluateConfig(model=models["vit"], data=test)
    expected = evaluate(replace(model, cache_bytes=0)).as_json()
    decoded.clear()
    assert evaluate(model).as_json() == expected
    assert sorted(decoded) == sorted(test.rglob("*.png"))


def test_processes_share_the_work_of_telling_images_apart(tmp_path, decoded):
    files = []
    for k in range(7):
        files.append(tmp_path / f"{k}.png")
        picture(k % 5).save(files[-1])
    picture(1).save(tmp_path / "1.bmp")
    Image.new("RGB", (9, 7)).save(tmp_path / "small.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    files += [tmp_path / name for name in ("1.bmp", "small.png", "broken.png", "missing.png", "small.png")]
    samples = [Sample(file, file.name, "") for file in files]
    expected = identify(samples, Known.of([]), None)
    assert len({one.content for one in expected}) == 8  # five pictures, the small one, and two that cannot be read
    decoded.clear()

    def told() -> Found:
        assert identify(samples, Known.of([]), None, shared=True) == expected
        return {"decoded": torch.tensor([files.index(path) for path in decoded], dtype=torch.int64)}

    for count in (2, 3, 16):
        each = [found["decoded"].tolist() for found in together(count, told)]
        assert sorted(itertools.chain(*each)) == [0, 1, 2, 3, 4, 7]
        assert max(map(len, each)) <= -(-6 // count)
    assert ranks.here().count == 1
    assert identify(samples, Known.of([]), None, shared=True) == expected


def test_a_file_that_cannot_be_read_is_told_by_its_path(cli, split, split_run, tmp_path, monkeypatch):
    """And left out where that is asked for."""
    data = Path(shutil.copytree(split / "test", tmp_path / "animals"))
    locked = next(data.rglob("*.png"))

    def refusing(usual):
        def read(path: Any, *given: Any, **more: Any) -> Any:
            if path == locked:
                raise PermissionError(13, "Permission denied", str(path))
            return usual(path, *given, **more)

        return read

    monkeypatch.setattr(Path, "read_bytes", refusing(Path.read_bytes))
    monkeypatch.setattr(Image, "open", refusing(Image.open))
    assert identify([Sample(locked, "locked.png", "")], Known.of([]), None)[0].file == str(locked)
    cli("evaluate", split_run, "--data", data).fails(3, f"image {locked} cannot be read", "--skip-bad-images")
    result = cli("evaluate", split_run, "--data", data, "--skip-bad-images", "--json")
    assert result.code == 0, result.stderr
    assert [Path(path).name for path in result.document["skipped"]] == [locked.name]


def test_the_runs_own_folder_as_data_holds_its_shots_out_by_path(cli, models, flat, tmp_path):
    """Under whatever name it is reached, and although the shots' files are others by now."""
    root = Path(shutil.copytree(flat, tmp_path / "pets"))
    assert cli("adapt", root, "--shots", 2, "--model", models["vit"], "--output", "run").code == 0
    for k, line in enumerate((tmp_path / "run" / "shots.jsonl").read_text().splitlines()):
        picture(9000 + k).save(tmp_path / json.loads(line)["path"])
    (tmp_path / "link").symlink_to(root)
    for data in (root, tmp_path / "link", tmp_path / "pets" / ".." / "link"):
        count, notes = measured(cli, tmp_path / "run", data)
        assert count == 4
        assert "8 images are shots and were left out" in notes


def test_shots_of_a_manifest_and_of_a_split_are_held_out_by_path(cli, models, split, tmp_path):
    root = Path(shutil.copytree(split, tmp_path / "animals"))
    rows = [f"{p.relative_to(root)},{p.parent.name}" for p in sorted(root.glob("train/*/*.png"))]
    (tmp_path / "m.csv").write_text("path,label\n" + "\n".join(rows))
    for shots in ((root,), ("m.csv", "--image-root", root)):
        assert cli("adapt", *shots, "--model", models["vit"], "--output", "run", "--overwrite").code == 0
        for k, file in enumerate(sorted(root.glob("train/*/*.png"))):
            picture(9000 + k).save(file)
        cli("evaluate", "run", "--data", root / "train").fails(3, "every image in ", "train is a shot of run")


def test_runs_of_before_know_the_bytes_of_their_shots_alone(cli, split, split_run, tmp_path):
    run = Path(shutil.copytree(split_run, tmp_path / "run"))
    shots = [json.loads(line) for line in (run / "shots.jsonl").read_text().splitlines()]
    old = [{key: shot[key] for key in ("path", "class", "sha256")} for shot in shots]
    (run / "shots.jsonl").write_text("".join(json.dumps(shot) + "\n" for shot in old))
    (run / "config.json").write_text(json.dumps({**json.loads((run / "config.json").read_text()), "format": 1}))
    (run / "files.json").unlink()
    data = Path(shutil.copytree(split / "train", tmp_path / "again"))
    cli("evaluate", run, "--data", data).fails(3, "every image in ", "run, or a copy of one")
    assert measured(cli, run, as_bmp(data))[0] == 6


def test_one_picture_in_two_classes_is_refused_in_another_format_too(cli, models, tmp_path):
    root = make_classes(tmp_path / "pets", {"cat": 2, "dog": 2})
    Image.open(root / "cat" / "0.png").save(root / "dog" / "again.bmp")
    cli("adapt", root, "--model", models["vit"]).fails(3, "again.bmp ('dog') are the same image")


def test_the_first_of_each():
    assert first_of_each(["b", "a", "b", "c", "a"]) == [0, 1, 3]


@pytest.mark.parametrize("damage", [b"", b"no image"])
def test_images_that_cannot_be_read_are_told_by_their_bytes(cli, split, split_run, tmp_path, damage):
    data = Path(shutil.copytree(split / "test", tmp_path / "animals"))
    (data / "cow" / "0.png").write_bytes(damage)
    cli("evaluate", split_run, "--data", data).fails(3, "0.png cannot be read", "--skip-bad-images")
    record = cli("evaluate", split_run, "--data", data, "--skip-bad-images", "--json").document
    assert record["skipped"] == ["animals/cow/0.png"]
