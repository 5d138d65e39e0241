"""The code in README.md of an export: followed to the letter, it finds what the run does, of any picture."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from conftest import picture
from hubs import list_little
from PIL import Image, ImageOps

import clipfit
from clipfit import AdaptConfig, ExportConfig, adapt, export
from clipfit.config.outputs import FORMATS
from clipfit.data.images import upright
from clipfit.formats import FORMATS as FORMATS_MADE
from clipfit.formats import _preprocess
from clipfit.formats.proof import Agreement, Proof
from clipfit.formats.stored import OPENING, ORIENTATION

PROOF = Proof("open_clip 3.2.0", "shots", Agreement(6, 1.25e-5, 6, 1.0, 6, 6), None, ())


@pytest.fixture
def run(split_run, tmp_path):
    """A copy, beside which there is room."""
    return Path(shutil.copytree(split_run, tmp_path / "animals-cite", ignore=shutil.ignore_patterns("evaluations")))


def ramp(across: int, down: int) -> Image.Image:
    """Grey, brighter to the right."""
    return Image.fromarray(np.tile(np.linspace(0, 255, across).astype(np.uint8), (down, 1)))


# pictures of which half of what is cut off is rounded by all alike


def plain(path: Path) -> None:
    picture(7, (40, 34)).save(path)


def turned(path: Path) -> None:
    """As a phone writes it."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    ramp(40, 34).convert("RGB").save(path, "JPEG", exif=exif, quality=95)


def transparent(path: Path) -> None:
    """Little by little, over what nobody is to see."""
    image = picture(7, (40, 34))
    image.putalpha(ramp(40, 34))
    image.save(path, "PNG")


def of_a_palette(path: Path) -> None:
    """One of its colours is transparent."""
    picture(7, (40, 34)).quantize(4).save(path, "PNG", transparency=1)


KINDS = (plain, turned, transparent, of_a_palette)


def run_code(folder: Path, monkeypatch, kind: Callable[[Path], None] = plain, **given: object) -> dict[str, Any]:
    """Carry out what the card of an export says, in its folder; the names that its Python has then.

    kind: of image.jpg. given: what FOLDER or FILE stands for in a command, as the card explains.
    """
    kind(folder / "image.jpg")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "preprocess", raising=False)
    names: dict[str, Any] = {}
    for language, code in re.findall(r"```(sh|python)\n(.*?)```", Path("README.md").read_text("utf-8"), re.DOTALL):
        if language == "sh":
            python, script, *arguments = shlex.split(re.sub(r"\$\(python (.*?)\)(?=/)", said_by_python, code))
            assert python == "python"
            assert {"FOLDER", "FILE"} & set(arguments) == set(given)
            monkeypatch.setattr(sys, "argv", [script, *(str(given.get(one, one)) for one in arguments)])
            runpy.run_path(script, run_name="__main__")
        else:
            exec(code, names)
    return names


def said_by_python(told: re.Match[str]) -> str:
    """What the shell puts in place of $(python …)."""
    command = [sys.executable, *shlex.split(told[1])]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


WHOLE = [name for name, takes in FORMATS.items() if not takes.part]
OF_PARTS = [(name, part) for name, takes in FORMATS.items() for part in takes.part]


@pytest.mark.parametrize("format", WHOLE)
def test_the_code_of_the_card_runs(run, models, monkeypatch, capsys, format):
    """Of a whole model it prints the class that the run takes the picture for."""
    if format == "transformers":
        pytest.importorskip("transformers")
    folder = export(ExportConfig(run, format=format, output=run.parent / "out")).output
    given = {"FOLDER": models["vit"].removeprefix("local-dir:")} if format == "difference" else {}
    model, far = clipfit.load(run), 1e-3 if format == "difference" else 1e-4
    for kind in KINDS:
        capsys.readouterr()
        names = run_code(folder, monkeypatch, kind, **given)
        assert capsys.readouterr().out.strip() == model.predict("image.jpg")[0].label, kind
        expected = model.logits("image.jpg").softmax(1)
        torch.testing.assert_close(names["probabilities"][None], expected, atol=far, rtol=0)


def restores(made: Path, monkeypatch, **given: object) -> str:
    """A run's export as a difference: the card, whose command and code find what the run does."""
    folder = export(ExportConfig(made, format="difference", output=made.parent / "out")).output
    names, model = run_code(folder, monkeypatch, **given), clipfit.load(made)
    expected = model.logits(folder / "image.jpg").softmax(1)
    torch.testing.assert_close(names["probabilities"][None], expected, atol=1e-3, rtol=0)
    return " ".join((folder / "README.md").read_text("utf-8").split())


def test_the_card_of_a_difference_says_where_the_weights_of_clipfit_tiny_are(split, monkeypatch, tmp_path):
    monkeypatch.setattr(type(FORMATS_MADE["difference"]), "prove", lambda *_: PROOF)  # which would take its time
    quick = {"recipe": {"epochs": 1, "batch_size": 4}, "output": tmp_path / "run"}
    made = adapt(AdaptConfig(split, "finetune", "clipfit-tiny", shots_per_class=1, **quick)).run
    assert "clipfit-tiny, a folder inside the clipfit package" in restores(made, monkeypatch)


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_the_card_of_a_difference_asks_for_the_weight_file(cli, split, models, monkeypatch, tmp_path, quick_gelu):
    """That a tag's activation is the run's, whatever the architecture's own is, shows in what the card's code finds."""
    name = f"Little-{'quick' if quick_gelu else 'slow'}-card"
    list_little(tmp_path, name)
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: ["theirs"])
    monkeypatch.setattr(open_clip, "get_pretrained_cfg",
                        lambda name, tag: {"quick_gelu": quick_gelu} if tag == "theirs" else {})  # fmt: skip
    (tmp_path / "w").mkdir()
    file = Path(models["vit"].removeprefix("local-dir:")) / "open_clip_model.safetensors"
    shutil.copy(file, tmp_path / "w" / "mine.safetensors")
    told = ("--model", name, "--pretrained", "theirs:w/mine.safetensors", "--epochs", 1, "--output", "run")
    assert cli("adapt", split, *told).code == 0
    said = restores(tmp_path / "run", monkeypatch, FILE=file)
    assert "`FILE` is the weight file that the run was made from, then called `mine.safetensors`" in said
    assert f"names of `{name}`" in said
    monkeypatch.chdir(tmp_path)  # where the recorded file is, as TAG:FILE
    monkeypatch.setattr(sys, "argv", ["restore.py", "out", "again"])
    runpy.run_path("out/restore.py", run_name="__main__")
    assert Path("again/open_clip_config.json").read_text() == Path("out/restored/open_clip_config.json").read_text()


def test_the_card_of_a_difference_asks_for_an_export_of_the_run_it_goes_on_from(cli, split, run, monkeypatch, tmp_path):
    assert cli("adapt", split, "--model", run, "--epochs", 1, "--output", "run").code == 0
    assert cli("export", run, "--output", "before").code == 0
    said = restores(tmp_path / "run", monkeypatch, FOLDER=tmp_path / "before")
    assert "adapted on from, then called `animals-cite`" in said


def test_the_code_of_the_card_averages_several_templates(cli, split, models, monkeypatch, tmp_path, capsys):
    pytest.importorskip("transformers")
    (tmp_path / "templates.txt").write_text("a photo of a {}\na drawing of the {}\n")
    told = ("--model", models["vit"], "--templates", "templates.txt", "--output", "run")
    assert cli("adapt", split, *told).code == 0
    folder = export(ExportConfig(tmp_path / "run", format="transformers", output=tmp_path / "out")).output
    capsys.readouterr()
    names = run_code(folder, monkeypatch)
    model = clipfit.load(tmp_path / "run")
    torch.testing.assert_close(names["probabilities"][None], model.logits("image.jpg").softmax(1), atol=1e-4, rtol=0)
    assert capsys.readouterr().out.split()[-1] == model.predict("image.jpg")[0].label


@pytest.mark.parametrize(("format", "part"), OF_PARTS)
def test_the_code_of_the_card_of_a_part_runs(run, monkeypatch, format, part):
    """It finds what the run does: of the classifier logits and probabilities, of a tower embeddings."""
    for library in FORMATS_MADE[format].libraries:
        pytest.importorskip(library)
    folder = export(ExportConfig(run, format=format, part=part, output=run.parent / "out")).output
    model = clipfit.load(run)
    single = part != "classifier" and format == "torch"  # a program of one output gives it bare
    for kind in KINDS[: 1 if part == "text" else None]:
        names = run_code(folder, monkeypatch, kind)
        found = [torch.as_tensor(one).detach() for one in ([names["found"]] if single else names["found"])]
        if part == "classifier":
            logits = model.logits("image.jpg")
            expected = [logits, logits.softmax(1)]
            assert tuple(names["facts"]["classes"]) == model.classes
        else:
            expected = [model.embed_images("image.jpg") if part == "image" else model.embed_texts("a photo of a cat")]
        for mine, theirs in zip(expected, found, strict=True):
            torch.testing.assert_close(theirs, mine, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV"])
def test_what_cards_open_is_what_clipfit_decodes(mode, monkeypatch):
    """To the byte, turned or not, whatever the picture is stored as."""
    image = picture(3, (24, 16))
    if mode in ("LA", "RGBA", "RGBa"):
        image.putalpha(ramp(24, 16))
    image = image.quantize(8).convert(mode) if mode in ("P", "PA") else image.convert(mode)
    constants = {"size": [16, 16], "mean": [0.5] * 3, "std": [0.2] * 3, "interpolation": "bicubic",
                 "resize_mode": "shortest", "fill_color": 0}  # fmt: skip
    monkeypatch.setattr(Image, "open", lambda _: image)
    for orientation, size in ((1, (24, 16)), (6, (16, 24))):
        image.getexif()[ORIENTATION] = orientation
        names: dict[str, Any] = {"Image": Image, "ImageOps": ImageOps}
        exec(OPENING, names)
        decoded = upright(image)
        assert decoded.size == size
        assert np.array_equal(names["image"], decoded)
        assert np.array_equal(_preprocess.pixels(image, constants), _preprocess.pixels(decoded, constants))
