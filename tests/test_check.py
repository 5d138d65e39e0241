"""`clipfit check`: every planted fault is found, and named in the document; a clean folder has no error."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_classes, picture
from PIL import Image, ImageFilter, ImageOps

from clipfit import CheckConfig, check
from clipfit.data.faults import near_copies
from clipfit.data.layout import Sample
from clipfit.errors import DataError
from clipfit.measure import suspicions
from clipfit.model import tokenizing
from clipfit.model.tokenizing import are_cut
from clipfit.verbs.check import Checked

EXAMPLE = Path(__file__).parent.parent / "examples" / "shots"
TINY = "clipfit-tiny"
CLASSES = ("airplane", "book", "camera", "fish", "key", "tree")


@pytest.fixture
def icons(tmp_path: Path) -> Path:
    """Six classes of the example, whose drawings clipfit-tiny knows: eight to train on, two to test on."""
    root = tmp_path / "icons"
    for part, count in (("train", 8), ("test", 2)):
        for name in CLASSES:
            (root / part / name).mkdir(parents=True)
            for file in sorted((EXAMPLE / part / name).iterdir())[:count]:
                shutil.copy(file, root / part / name)
    return root


def checked(place: Path, **options: object) -> Checked:
    return check(CheckConfig(place, model=TINY, **options))  # type: ignore[arg-type]


def found(result: Checked, kind: str) -> list[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    return [(f.severity, f.images, f.classes) for f in result.findings if f.kind == kind]


def first(folder: Path) -> Path:
    return sorted(folder.iterdir())[0]


def resaved(file: Path, to: Path, side: int, quality: int = 80) -> None:
    with Image.open(file) as opened:
        paper = Image.new("RGB", opened.size, "white")
        paper.paste(opened.convert("RGBA"), mask=opened.convert("RGBA"))
    paper.resize((side, side)).save(to, quality=quality)


def test_a_clean_folder_has_no_error_and_ends_with_0(cli, icons):
    result = cli("check", icons, "--model", TINY, "--json")
    assert result.code == 0
    document = result.document
    assert document["errors"] == 0
    assert "error" not in document
    assert document["images"] == 60
    assert document["classes"]["fish"] == {"train": 8, "test": 2}
    kinds = {finding["kind"] for finding in document["findings"]}
    assert kinds <= {"doubtful-label"}
    assert "no errors" in result.stderr


@pytest.mark.slow
def test_the_example_has_no_error_and_its_drawings_are_no_copies():
    result = checked(EXAMPLE)
    assert not result.errors
    assert {finding.kind for finding in result.findings} <= {"doubtful-label"}
    assert len(result.hints) <= 4


def test_copies_are_found_whatever_they_are_called_and_of_whatever_size(icons):
    fish, key = (first(icons / "train" / name) for name in ("fish", "key"))
    shutil.copy(fish, fish.parent / "again.png")
    resaved(key, key.parent / "smaller.jpg", 90)
    result = checked(icons)
    [(severity, images, classes)] = found(result, "duplicate")
    assert severity == "hint"
    assert set(images) == {f"train/fish/{fish.name}", "train/fish/again.png"}
    assert classes == ("fish",)
    [(severity, images, classes)] = found(result, "near-duplicate")
    assert severity == "hint"
    assert set(images) == {f"train/key/{key.name}", "train/key/smaller.jpg"}
    assert not result.errors


def test_a_leak_is_an_error_where_it_is_exact_and_a_hint_where_it_is_nearly_so(icons):
    fish, key = (first(icons / "train" / name) for name in ("fish", "key"))
    with Image.open(fish) as opened:
        opened.save(icons / "test" / "fish" / "other.webp", lossless=True, exact=True)  # other bytes, the same pixels
    resaved(key, icons / "test" / "key" / "other.jpg", 100)
    result = checked(icons)
    leaks = {severity: set(images) for severity, images, _ in found(result, "leak")}
    assert leaks == {
        "error": {f"train/fish/{fish.name}", "test/fish/other.webp"},
        "hint": {f"train/key/{key.name}", "test/key/other.jpg"},
    }
    with pytest.raises(DataError, match=r"1 error: .* are the same picture, in test and train; keep") as ended:
        result.require_no_errors()
    assert ended.value.found is result


def test_a_leak_into_a_validation_part_is_a_hint(icons):
    shutil.copytree(icons / "train" / "fish", icons / "val" / "fish")
    leaks = found(checked(icons), "leak")
    assert len(leaks) == 8
    assert {severity for severity, _, _ in leaks} == {"hint"}


def test_one_picture_under_two_labels_is_an_error_and_the_whole_report_is_printed(cli, icons):
    copied = first(icons / "train" / "fish")
    shutil.copy(copied, icons / "train" / "key" / "wrong.png")
    (icons / "train" / "tree" / "broken.png").write_bytes(b"no picture")
    (icons / "train" / "egg").mkdir()
    first(icons / "train" / "airplane").unlink()  # a hint, found before the other errors are
    result = cli("check", icons, "--model", TINY, "--json")
    assert result.code == 3
    document = result.document
    assert document["error"]["code"] == 3
    assert document["errors"] == 3
    by_kind = {finding["kind"]: finding for finding in document["findings"] if finding["severity"] == "error"}
    assert set(by_kind) == {"two-labels", "unreadable", "empty-class"}
    assert by_kind["two-labels"]["images"] == [f"train/fish/{copied.name}", "train/key/wrong.png"]
    assert by_kind["two-labels"]["classes"] == ["fish", "key"]
    assert by_kind["unreadable"]["images"] == ["train/tree/broken.png"]
    assert by_kind["empty-class"]["classes"] == ["egg"]
    assert all(finding["advice"] for finding in document["findings"])
    assert [finding["severity"] for finding in document["findings"][:4]] == ["error"] * 3 + ["hint"]
    for kind in by_kind:
        assert f"  {kind} (1): " in result.stderr
    assert result.stderr.splitlines()[-1].startswith(f"error: {icons} has 3 errors, the first: ")


def test_a_file_that_a_manifest_labels_twice_and_names_that_are_one(tmp_path, flat):
    rows = [(f"{name}/{k}.png", name) for name in ("dog", "fish") for k in range(3)]
    rows += [("dog/0.png", "fish"), ("owl/0.png", "Dog")]
    lines = [json.dumps({"path": path, "label": label}) for path, label in rows]
    (tmp_path / "m.jsonl").write_text("\n".join(lines), "utf-8")
    result = checked(tmp_path / "m.jsonl", image_root=flat)
    assert found(result, "two-labels") == [("error", ("dog/0.png",), ("dog", "fish"))]
    assert found(result, "same-name") == [("error", (), ("dog", "Dog"))]
    assert not found(result, "same-tokens")


def test_a_swapped_label_is_found_and_hardly_anything_else(icons):
    wrong = icons / "train" / "fish" / "swapped.png"
    first(icons / "train" / "tree").rename(wrong)
    doubtful = found(checked(icons), "doubtful-label")
    assert ("hint", ("train/fish/swapped.png",), ("fish", "tree")) in doubtful
    assert len(doubtful) <= 3


def test_labels_are_not_judged_by_a_model_that_knows_nothing_of_the_images(flat, models):
    result = check(CheckConfig(flat, model=models["vit"]))
    assert not found(result, "doubtful-label")
    assert any(note.startswith("labels were not judged: zero-shot names") for note in result.notes)


def test_blurred_tiny_and_blank_pictures(icons):
    train = icons / "train"
    with Image.open(first(train / "tree")) as opened:
        opened.convert("RGBA").resize((375, 500)).filter(ImageFilter.GaussianBlur(12)).save(train / "tree" / "soft.png")
    resaved(first(train / "book"), train / "book" / "small.png", 31)
    resaved(first(train / "fish"), train / "fish" / "large_enough.png", 32)
    Image.new("RGB", (300, 300), "red").save(train / "key" / "red.png")
    result = checked(icons)
    assert found(result, "blurred") == [("hint", ("train/tree/soft.png",), ("tree",))]
    assert found(result, "tiny") == [("hint", ("train/book/small.png",), ("book",))]
    assert found(result, "blank") == [("hint", ("train/key/red.png",), ("key",))]


def test_a_set_that_is_soft_throughout_is_not_called_blurred(tmp_path):
    for k in range(12):
        folder = tmp_path / "soft" / ("cell" if k % 2 else "void")
        folder.mkdir(parents=True, exist_ok=True)
        coarse = ImageOps.autocontrast(picture(k, (8, 8)))
        coarse.resize((300, 300), Image.Resampling.BICUBIC).save(folder / f"soft{k}.png")
    result = checked(tmp_path / "soft")
    assert not found(result, "blurred")
    make_classes(tmp_path / "soft", {"cell": 20}, seed=1)  # among sharp ones they are
    assert len(found(checked(tmp_path / "soft"), "blurred")) == 12


def test_names_that_the_model_confuses_cuts_or_cannot_tell_apart(icons, tmp_path):
    long = "very " * 14
    names = {
        "airplane": "Boeing 737-200", "book": "Boeing 737-300", "camera": "camera", "fish": f"{long}small fish",
        "key": f"{long}old key", "tree": "tree " * 10,  # of 16 tokens, as many as are read
    }  # fmt: skip
    (tmp_path / "names.txt").write_text("".join(f"{k}\t{name}\n" for k, name in names.items()), "utf-8")
    result = checked(icons, classes=tmp_path / "names.txt")
    assert found(result, "confusable-names") == [("hint", (), ("Boeing 737-200", "Boeing 737-300"))]
    assert found(result, "long-name") == [("hint", (), (names[k].strip(),)) for k in ("fish", "key")]
    assert found(result, "same-tokens") == [("error", (), (names["fish"], names["key"]))]


def test_counts_of_classes(icons):
    for file in sorted((icons / "train" / "tree").iterdir())[3:]:
        file.unlink()
    shutil.rmtree(icons / "test" / "book")
    for file in (icons / "train" / "key").iterdir():
        file.write_bytes(b"")
    result = checked(icons)
    assert found(result, "few-images") == [("hint", (), ("tree",))]
    assert found(result, "unbalanced") == [("hint", (), ("airplane", "tree"))]
    assert found(result, "untested") == [("hint", (), ("book",))]
    assert found(result, "empty-class") == [("error", (), ("key",))]
    assert len(found(result, "unreadable")) == 8
    assert result.counts["key"] == {"train": 0, "test": 2}


def test_one_class_alone_is_an_error(tmp_path):
    result = checked(make_classes(tmp_path / "one", {"cat": 3}))
    assert found(result, "few-classes") == [("error", (), ("cat",))]


def test_names_of_classes_and_files_are_shown_and_not_obeyed(cli, tmp_path, models, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    root = make_classes(tmp_path / "bad", {"cat\x1b[31m[bold]": 2, "dog": 2})
    copy = "[red]" + 12 * "\x1b" + "copy.png"  # each is four columns wide when it is shown
    shutil.copy(root / "dog" / "0.png", root / "cat\x1b[31m[bold]" / copy)
    result = cli("check", root, "--model", models["vit"])
    assert result.code == 3
    assert "\x1b[31m" not in result.stderr
    shown = [line for line in result.stderr.splitlines() if line.startswith("  ")]
    assert r"cat\x1b[31m[bold]/[red]" + 12 * r"\x1b" + "copy.png" in "".join(line.strip() for line in shown)
    assert len(shown) > 3
    assert max(map(len, shown)) <= 80


def test_many_classes_are_summed_up(cli, tmp_path, models):
    root = make_classes(tmp_path / "many", {f"thing {k}": 1 + k % 2 for k in range(41)})
    result = cli("check", root, "--model", models["vit"])
    assert "train: 61 images of 41 classes, 1 to 2 of each" in result.stderr
    assert "thing 40 " not in result.stderr


def test_labels_are_judged_in_every_block_of_images():
    draw = torch.Generator().manual_seed(0)
    labels = [k % 3 for k in range(2100)]
    images = torch.nn.functional.normalize(torch.eye(3)[labels] + 0.05 * torch.rand(2100, 3, generator=draw), dim=1)
    samples = [Sample(Path(f"{k}"), f"{k}", "abc"[label]) for k, label in enumerate(labels)]
    images[7] = torch.tensor([0.8, 0.0, 0.6])  # labelled b, and of no class for sure
    for k in (5, 1500, 2090):
        samples[k] = replace(samples[k], label="abc"[(labels[k] + 1) % 3])
    findings, reason = suspicions.doubtful_labels(samples, "abc", images, lambda u: 20 * u)
    assert reason is None
    assert [(f.images, f.classes) for f in findings] == [
        ((f"{k}",), ("abc"[(labels[k] + 1) % 3], "abc"[labels[k]])) for k in (5, 1500, 2090)
    ]


def test_a_text_is_cut_whether_or_not_the_tokenizer_ends_texts(vit, monkeypatch):
    def letters(texts: list[str], context_length: int = 8) -> torch.Tensor:
        return torch.tensor([[ord(c) for c in text[:context_length].ljust(context_length)] for text in texts])

    assert are_cut(vit.source, ["tree " * 14, "tree " * 15]) == [False, True]  # of 16 tokens, two stand for the ends
    monkeypatch.setattr(tokenizing, "tokenizer_of", lambda source: letters)
    assert are_cut(vit.source, ["", "abcdefgh", "abcdefghi"]) == [False, False, True]


def test_near_copies_in_several_blocks_are_one_group():
    """More than one block of near copies: one group."""
    draw = np.random.default_rng(0)
    one = draw.integers(0, 255, (16, 16, 3)).astype(np.int64)
    thumbs = [(one + draw.integers(-2, 3, one.shape)).clip(0, 255).astype(np.uint8) for _ in range(1500)]
    thumbs += [draw.integers(0, 255, one.shape).astype(np.uint8) for _ in range(700)]
    embeddings = torch.nn.functional.normalize(torch.ones(2200, 4), dim=1)
    assert near_copies(thumbs, embeddings) == [list(range(1500))]
    embeddings[1499] = torch.tensor([1.0, 0, 0, 0])
    assert near_copies(thumbs, embeddings) == [list(range(1499))]
