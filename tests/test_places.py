"""Folders and lists as users have them: validation parts, strays, files that are no images, pipes, broken links."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import make_classes, picture

from clipfit import DataError
from clipfit.data import files, layout
from clipfit.data.names import ClassNames, name_rule, read_new_classes
from clipfit.data.shots import select
from clipfit.prompts import name_of_folder, name_of_label

# ---- a third part


def parts(root: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        make_classes(root / name, {"cat": 2, "dog": 1}, seed=seed)
    return root


@pytest.mark.parametrize("name", ["val", "valid", "validation", "VAL"])
def test_a_validation_folder_is_kept_apart_and_said(tmp_path, name):
    found = layout.read(parts(tmp_path, "train", name, "test"))
    assert [len(part) for part in (found.train, found.val, found.test)] == [3, 3, 3]
    assert {sample.source.split("/")[0] for sample in found.val} == {name}
    assert found.notes == ("3 images of a validation part are kept apart: neither trained on nor tested",)
    assert {s.path for s in select(found, None, 0).shots} == {s.path for s in found.train}


def test_a_validation_folder_is_no_test(tmp_path):
    found = layout.read(parts(tmp_path, "Training", "valid"))
    assert (len(found.train), found.test, len(found.val)) == (3, None, 3)
    found = layout.read(parts(tmp_path / "other", "train", "testing"))
    assert (len(found.test), found.val) == (3, None)
    shutil.rmtree(tmp_path / "Training")
    shutil.rmtree(tmp_path / "other")
    with pytest.raises(DataError, match="holds validation images alone"):
        layout.read(tmp_path)


@pytest.mark.parametrize("split", ["val", "valid", "Validation"])
def test_a_validation_split_in_a_manifest(tmp_path, split):
    (tmp_path / "m.csv").write_text(f"path,label,split\na.png,cat,\nb.png,dog,{split}\nc.png,cat,test\n")
    found = layout.read(tmp_path / "m.csv")
    assert [[s.source for s in part] for part in (found.train, found.val, found.test)] == [
        ["a.png"], ["b.png"], ["c.png"]
    ]  # fmt: skip
    assert "1 images of a validation part" in found.notes[0]


def test_the_same_part_twice(tmp_path):
    with pytest.raises(DataError, match=r"val and .*validation are the same part of a split: keep one of them"):
        layout.read(parts(tmp_path, "train", "val", "validation"))


def test_parts_without_class_folders_are_no_classes(tmp_path):
    """Images sorted into train/ and test/ but not by class would be learnt as two classes of those names."""
    make_classes(tmp_path, {"test": 2, "train": 2})
    with pytest.raises(DataError, match=r"holds test/ and train/, but no class folders inside: expected .*test/<cla"):
        layout.read(tmp_path)


# ---- CoOp


def coop(file: Path, **lists: list[list[object]]) -> Path:
    file.write_text(json.dumps({"train": [], "test": [], **lists}))
    return file


def test_the_classes_of_a_coop_split_are_in_the_order_of_their_numbers(tmp_path):
    """The papers' base and new halves follow the numbers, not the order of first appearance."""
    train = [["c.jpg", 2, "cat"], ["a.jpg", 0, "yak"], ["b.jpg", 10, "bee"]]
    found = layout.read(coop(tmp_path / "s.json", train=train, val=[["d.jpg", 1, "elk"]], test=[["e.jpg", 2, "cat"]]))
    assert list(found.names) == ["yak", "elk", "cat", "bee"]
    assert [sample.source for sample in found.train] == ["c.jpg", "a.jpg", "b.jpg"]
    assert select(found, None, seed=0).base == ("yak", "cat", "bee")
    assert [sample.label for sample in found.val] == ["elk"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (["b.jpg", 0, "dog"], "calls class 0 both 'cat' and 'dog'"),
        (["b.jpg", 1, "cat"], "numbers the class 'cat' both 0 and 1"),
        (["b.jpg", "1", "dog"], r"has \['b.jpg', '1', 'dog'\] in `test`: expected"),
        (["b.jpg", 1, " "], "expected .path, class number, class name"),
    ],
)
def test_coop_labels_that_contradict_each_other(tmp_path, entry, message):
    with pytest.raises(DataError, match=message):
        layout.read(coop(tmp_path / "s.json", train=[["a.jpg", 0, "cat"]], test=[entry]))


# ---- what is left out is named


def test_files_that_are_no_images_are_named_by_kind(tmp_path, without_heif):
    without_heif()
    root = make_classes(tmp_path / "pets", {"cat": 1, "dog": 1})
    (root / "cat" / "0.png").rename(root / "cat" / "0.JFIF")
    for name in ("notes.txt", "more.txt", "1.heic", ".DS_Store", "README"):
        (root / "dog" / name).touch()
    (root / "dog" / "gone.png").symlink_to(root / "nowhere.png")
    (root / "dog" / "linked").symlink_to(root / "cat")
    os.mkfifo(root / "dog" / "p.png")
    found = layout.read(root)
    assert len(found.train) == 2
    assert found.notes == (
        "7 files in class folders left out: 1 .heic (1.heic): install clipfit[heif]; 1 other (README); "
        "1 broken link (gone.png); 1 linked folder (linked); 2 .txt (more.txt, …); 1 pipe (p.png)",
    )


def test_heic_is_an_image_where_it_can_be_read(tmp_path):
    pytest.importorskip("pillow_heif")
    root = make_classes(tmp_path / "pets", {"cat": 1, "dog": 1})
    (root / "dog" / "1.HEIC").touch()
    assert [s.source for s in layout.read(root).train] == ["pets/cat/0.png", "pets/dog/0.png", "pets/dog/1.HEIC"]


def test_images_beside_the_class_folders_are_named(tmp_path):
    root = parts(tmp_path / "pets", "train", "test")
    for place in (root, root / "train"):
        picture(1).save(place / "stray.png")
        (place / "readme.txt").touch()
    (note,) = layout.read(root).notes
    assert note == (
        "2 images beside the class folders left out (stray.png, …): only what is inside a class folder has a label"
    )


def test_class_folders_beside_the_parts_are_named(tmp_path):
    root = parts(tmp_path / "pets", "train", "test")
    make_classes(root, {"bird": 2})
    (root / "docs").mkdir()
    (note,) = layout.read(root).notes
    assert note == (
        "1 folder of images beside test/ and train/ left out (bird): a class stands inside a part, as test/<class>/"
    )


def test_the_notes_are_said_by_both_commands(cli, models, tmp_path):
    root = parts(tmp_path / "pets", "train", "validation")
    (root / "train" / "dog" / "notes.txt").touch()
    made = cli("adapt", root, "--model", models["vit"])
    assert made.code == 0, made.stderr
    record = cli("evaluate", "--json").document
    for said in (made.stderr, " ".join(record["notes"])):
        assert "1 file in class folders left out: 1 .txt (notes.txt)" in said
        assert "3 images of a validation part are kept apart: neither trained on nor tested" in said
    assert record["held_out"] is False  # the validation part is no test
    assert record["alphas"][0]["base"]["n"] == 3


# ---- wrong causes


def test_images_without_class_folders(tmp_path):
    picture(0).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"holds 1 image \(a.png\), but none in a class folder: expected .*/<class>/"):
        layout.read(tmp_path)


def test_a_folder_of_heic_alone(tmp_path, without_heif):
    without_heif()
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.HEIC").touch()
    with pytest.raises(DataError, match=r"cat holds no images that can be read without .*: install clipfit\[heif\]"):
        layout.read(tmp_path)


def test_a_class_of_broken_links(tmp_path):
    make_classes(tmp_path, {"cat": 1})
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "a.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"dog holds no images but 1 broken link \(a.png\)"):
        layout.read(tmp_path)
    (tmp_path / "list.csv").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"list.csv is a broken link: .*nowhere is not there"):
        layout.read(tmp_path / "list.csv")


def test_long_lists_of_names_are_cut(tmp_path):
    (tmp_path / "names.txt").write_text("a\n")
    with pytest.raises(DataError) as error:
        ClassNames.of([f"class {k}" for k in range(499)], tmp_path / "names.txt")
    assert "'class 4' and 494 more" in str(error.value)
    assert len(str(error.value)) < 300


# ---- what is no file is never opened

Pipe = Callable[[Path], Path]


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    """Makes pipes that nobody fills: whoever opens one finds it empty, and does not wait for ever."""
    pipes: list[tuple[Path, threading.Thread, threading.Event]] = []

    def feed(path: Path, stop: threading.Event) -> None:
        while not stop.is_set():
            path.open("wb").close()  # waits for a reader

    def make(path: Path) -> Path:
        os.mkfifo(path)
        stop = threading.Event()
        thread = threading.Thread(target=feed, args=(path, stop), daemon=True)
        pipes.append((path, thread, stop))
        thread.start()
        return path

    yield make
    for path, thread, stop in pipes:
        stop.set()
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        thread.join()


@pytest.mark.parametrize(
    "arguments",
    [
        ("adapt", "PIPE"),
        ("adapt", "FLAT", "--classes", "PIPE"),
        ("evaluate", "RUN", "--data", "PIPE"),
        ("evaluate", "RUN", "--new-classes", "PIPE"),
        ("evaluate", "RUN", "--data", "FLAT", "--classes", "PIPE"),
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_a_pipe_is_refused_wherever_it_is_named(cli, pipe, flat, split_run, tmp_path, arguments):
    places = {"PIPE": pipe(tmp_path / "pipe.csv"), "FLAT": flat, "RUN": split_run}
    cli(*(places.get(argument, argument) for argument in arguments)).fails(3, "pipe.csv is a pipe: expected a regular")


def test_a_pipe_in_a_manifest_is_refused(cli, pipe, models, split_run, tmp_path):
    picture(0).save(tmp_path / "a.png")
    pipe(tmp_path / "p.png")
    (tmp_path / "m.csv").write_text("path,label\na.png,dog\np.png,cow\n")
    for command in (("adapt", "m.csv", "--model", models["vit"]), ("evaluate", split_run, "--data", "m.csv")):
        cli(*command).fails(3, "image p.png is a pipe: expected a regular file")


# ---- names


def test_what_is_written_in_a_list_keeps_its_dashes(tmp_path):
    """Only names of folders lose them; underscores belong in no sentence."""
    file = tmp_path / "new.txt"
    file.write_text("ice_cream\nt-shirt\n")
    assert read_new_classes(file) == ("ice cream", "t-shirt")
    assert list(ClassNames.of(["ice-cream", "t_shirt"], file).by_label.items()) == [
        ("ice-cream", "ice cream"), ("t_shirt", "t-shirt")
    ]  # fmt: skip
    assert ClassNames.of(["t-shirt"], None).by_label["t-shirt"] == "t shirt"
    (tmp_path / "odd.csv").mkdir()
    assert name_rule(tmp_path / "odd.csv") is name_rule(tmp_path / "pets") is name_of_folder
    assert name_rule(tmp_path / "m.jsonl") is name_rule(tmp_path / "split_zhou.json") is name_of_label


def test_a_class_is_called_as_it_is_listed(cli, split_run, tmp_path):
    """Where that makes another prompt, it is said: figures with and without a list may differ."""
    (tmp_path / "new.txt").write_text("Ant-Lion\nELK\n")
    listed = cli("evaluate", split_run, "--new-classes", "new.txt", "--json").document
    assert listed["new_classes"] == ["Ant-Lion", "ELK"]
    assert listed["alphas"][0]["new"]["n"] == 4
    assert "spelt as listed, which may change figures: 'Ant-Lion' (not 'Ant Lion')" in listed["notes"]
    found = cli("evaluate", split_run, "--json").document
    (tmp_path / "new.txt").write_text("ant lion\nelk\n")
    again = cli("evaluate", split_run, "--new-classes", "new.txt", "--json").document
    assert not any("spelt" in note for note in again["notes"])
    assert [row["new"]["accuracy"] for row in again["alphas"]] == [row["new"]["accuracy"] for row in found["alphas"]]


@pytest.mark.parametrize("folder", ["___", "-", "\x1b\x07", "\u200b"])
def test_a_class_needs_a_name(folder):
    with pytest.raises(DataError, match="has a name without any letter: rename it, or give --classes"):
        ClassNames.of(["cat", folder], None)
    assert ClassNames.of(["cat", "\x1b[2J"], None).by_label["\x1b[2J"] == "\x1b[2J"  # as it is on the disk


def test_a_list_holds_no_control_characters(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("cat\nbad\x0b\x1b[2J\n")
    with pytest.raises(DataError, match=r"gives 'bad\\x0b\\x1b\[2J' a name with a control character: take it out"):
        read_new_classes(file)
    file.write_text("cat\r\n\x1b[2J\tclear screen\r\n")  # but it can name a folder that has some
    assert ClassNames.of(["cat", "\x1b[2J"], file).by_label["\x1b[2J"] == "clear screen"


def test_the_exact_label_goes_before_its_other_spellings(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("red-fox\tvixen\nred_fox\tfox\n")
    assert dict(ClassNames.of(["red_fox", "red-fox"], file).by_label) == {"red-fox": "vixen", "red_fox": "fox"}


def test_the_names_of_some_classes(split):
    assert layout.read(split).names_of(["dog", "Ant Lion"]) == {"dog": "dog", "Ant-Lion": "Ant Lion"}


def test_every_file_is_looked_at_once(tmp_path, monkeypatch, without_heif):
    """A tree may have a million."""
    without_heif()
    root, looks, specs = make_classes(tmp_path / "pets", {"cat": 5, "dog": 4}), [], []
    is_file, find_spec = Path.is_file, files.find_spec
    monkeypatch.setattr(Path, "is_file", lambda path: looks.append(path) or is_file(path))
    monkeypatch.setattr(files, "find_spec", lambda name: specs.append(name) or find_spec(name))
    assert len(layout.read(root).train) == 9
    assert sum(path.suffix == ".png" for path in looks) == 9
    assert len(specs) == 1
