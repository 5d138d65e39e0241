"""Layouts, class files and the draw of shots."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from conftest import make_classes, picture

from clipfit import DataError
from clipfit.data import layout
from clipfit.data.layout import LabelledImages, Sample
from clipfit.data.names import ClassNames, read_new_classes
from clipfit.data.shots import select
from clipfit.errors import UsageError
from clipfit.prompts import key_of, name_of_folder, prompts


def labels(samples) -> list[tuple[str, str]]:
    return [(s.source, s.label) for s in samples]


# ---- names


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("golden_retriever", "golden retriever"),
        ("Ant-Lion", "Ant Lion"),
        ("__a--b_ c ", "a b c"),
        ("owl", "owl"),
        ("Straße", "Straße"),
    ],
)
def test_folder_names_become_class_names(folder, name):
    assert name_of_folder(folder) == name


def test_case_underscores_and_spaces_do_not_tell_names_apart():
    assert key_of("Golden_Retriever") == key_of("golden  retriever") == key_of("golden-retriever")
    assert key_of("golden retrievers") != key_of("golden retriever")


def test_prompts_fill_the_template_in_order():
    assert prompts(["a b", "c"], "art of {}.") == ["art of a b.", "art of c."]


def test_class_file_with_tabs_gives_names_and_the_order_of_the_classes(tmp_path):
    file = tmp_path / "classes.txt"
    file.write_text("n03\ttabby cat\n\nn01 \t goldfish\nn99\tunused\n", "utf-8")
    names = ClassNames.of(["n01", "n03"], file).by_label
    assert list(names.items()) == [("n03", "tabby cat"), ("n01", "goldfish")]


def test_class_file_of_names_alone(tmp_path):
    file = tmp_path / "classes.txt"
    file.write_text("﻿Tabby Cat\nred_fish\n", "utf-8")  # with a byte order mark, as Windows writes it
    names = ClassNames.of(["red-fish", "tabby_cat"], file).by_label
    assert list(names.items()) == [("tabby_cat", "Tabby Cat"), ("red-fish", "red fish")]


def test_class_file_in_json(tmp_path):
    file = tmp_path / "classes.json"
    file.write_text(json.dumps({"b": "bee", "a": "ant"}))
    assert list(ClassNames.of(["a", "b"], file).by_label.items()) == [("b", "bee"), ("a", "ant")]


def test_a_class_file_that_does_not_match_shows_both_sides(tmp_path):
    file = tmp_path / "classes.txt"
    file.write_text("cat\nhound\n")
    with pytest.raises(DataError, match="no name for 'dog'; no folder for 'hound'"):
        ClassNames.of(["cat", "dog"], file)
    with pytest.raises(DataError, match="no name for 'a', 'b', 'c', 'd', 'e' and 1 more; no folder for 'cat', 'hound'"):
        ClassNames.of(list("abcdef"), file)


@pytest.mark.parametrize(
    ("suffix", "text", "message"),
    [
        (".txt", "a\tfox\nb\tFox\n", "'a' and 'b' are both called 'Fox': a class name must be unique"),
        (".txt", "\n \n", "names no class: expected a line"),
        (".json", "{}", "names no class: expected a line"),
        (".json", "{", "is not JSON"),
        (".json", '["a", "b"]', "must be one JSON object"),
        (".json", '{"a": 1, "b": "x"}', "must be one JSON object"),
        (".txt", "a\tfox\na\twolf\nb\tbee\n", "names 'a' twice"),
        (".txt", "a\t\nb\tbee\n", "gives 'a' an empty name"),
        (".json", '{"a": " ", "b": "x"}', "gives 'a' an empty name"),
        (".json", r'{"a": "\ud800", "b": "x"}', "gives 'a' a name that is no UTF-8"),
    ],
)
def test_class_files_that_cannot_be_used(tmp_path, suffix, text, message):
    file = tmp_path / f"classes{suffix}"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        ClassNames.of(["a", "b"], file)


def test_class_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"class file .*none\.txt does not exist"):
        ClassNames.of(["a"], tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes("Bär".encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8 text"):
        ClassNames.of(["a"], tmp_path / "latin.txt")


def test_two_folders_of_one_name_are_refused():
    with pytest.raises(DataError, match="'red_fox' and 'Red-Fox' are both called 'Red Fox'"):
        ClassNames.of(["red_fox", "Red-Fox"], None)


def test_new_classes_are_read_in_order_and_once_each(tmp_path):
    file = tmp_path / "new.txt"
    file.write_text("\nzebra\n Ant lion \n")
    assert read_new_classes(file) == ("zebra", "Ant lion")
    file.write_text("ice_cream\tice cream\nn02\tt-shirt\n")  # a class file: its names
    assert read_new_classes(file) == ("ice cream", "t-shirt")
    (tmp_path / "new.json").write_text('{"n01": "zebra", "n02": "yak"}')
    assert read_new_classes(tmp_path / "new.json") == ("zebra", "yak")
    file.write_text("zebra\nZEBRA\n")
    with pytest.raises(DataError, match="unique"):
        read_new_classes(file)
    file.write_text("zebra\nyak\nzebra\n")
    with pytest.raises(DataError, match="names 'zebra' twice"):
        read_new_classes(file)
    file.write_text(" \n")
    with pytest.raises(DataError, match="names no class"):
        read_new_classes(file)


# ---- layouts


def test_a_folder_of_class_folders(tmp_path):
    root = make_classes(tmp_path / "pets", {"red_fish": 1, "cat": 2})
    (root / "cat" / "deeper").mkdir()
    picture(9).save(root / "cat" / "deeper" / "X.JPEG")
    (root / "cat" / "notes.txt").write_text("no image")
    (root / "cat" / ".hidden.png").write_bytes(b"")
    (root / ".cache").mkdir()
    (root / "loose.png").write_bytes(b"")
    found = layout.read(root)
    assert labels(found.train) == [
        ("pets/cat/0.png", "cat"),
        ("pets/cat/1.png", "cat"),
        ("pets/cat/deeper/X.JPEG", "cat"),
        ("pets/red_fish/0.png", "red fish"),
    ]
    assert found.test is None
    assert dict(found.names) == {"cat": "cat", "red_fish": "red fish"}
    assert all(s.path.is_file() for s in found.train)


def test_train_and_test_folders(split):
    found = layout.read(split)
    assert {s.label for s in found.train} == {"bee", "cow", "dog"}
    assert {s.label for s in found.test} == {"Ant Lion", "cow", "dog", "elk"}
    assert found.train[0].source == "train/bee/0.png"
    assert not {s.path for s in found.train} & {s.path for s in found.test}
    assert list(found.names) == ["bee", "cow", "dog", "Ant-Lion", "elk"]


def test_parts_in_capitals_and_a_test_part_alone(tmp_path):
    make_classes(tmp_path / "Train", {"a": 1})
    make_classes(tmp_path / "TEST", {"a": 1, "b": 2})
    found = layout.read(tmp_path)
    assert labels(found.train) == [("Train/a/0.png", "a")]
    assert len(found.test) == 3
    shutil.rmtree(tmp_path / "Train")
    found = layout.read(tmp_path)
    assert found.train == ()
    assert labels(found.test) == [("TEST/a/0.png", "a"), ("TEST/b/0.png", "b"), ("TEST/b/1.png", "b")]
    with pytest.raises(DataError, match="test images alone"):
        select(found, None, 0)


@pytest.mark.parametrize("parts", [("a", "b", "test"), ("a", "b", "Validation")])
def test_a_part_of_a_split_is_never_a_class(tmp_path, parts):
    for part in parts:
        make_classes(tmp_path / part if len(part) > 1 else tmp_path, {"a" if len(part) > 1 else part: 1})
    with pytest.raises(DataError, match="looks like a part of a split, not like a class"):
        layout.read(tmp_path)


def test_an_image_root_belongs_to_a_file(flat):
    with pytest.raises(UsageError, match="is a folder: leave it out"):
        layout.read(flat, image_root=flat)


def test_a_train_folder_alone(tmp_path):
    make_classes(tmp_path / "train", {"a": 1, "b": 1})
    assert layout.read(tmp_path).test is None


def test_classes_that_happen_to_be_called_train_and_test(tmp_path):
    make_classes(tmp_path, {"train": 2, "bus": 2})
    found = layout.read(tmp_path)
    assert {s.label for s in found.train} == {"train", "bus"}


ROWS = [("x/1.png", "red_cat"), ("x/2.png", "dog"), ("y/3.png", "dog")]


def write_manifest(file: Path, rows, split: list[str | None] | None) -> Path:
    records = [{"path": p, "label": c} for p, c in rows]
    for record, part in zip(records, split or [], strict=False):
        record["split"] = part or ""
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(r) + "\n\n" for r in records))
    else:
        with file.open("w", newline="", encoding="utf-8-sig") as stream:
            writer = csv.DictWriter(stream, records[0])
            writer.writeheader()
            writer.writerows(records)
    return file


@pytest.mark.parametrize("name", ["shots.csv", "shots.jsonl"])
def test_manifests_without_a_split(tmp_path, name):
    file = write_manifest(tmp_path / name, ROWS, None)
    found = layout.read(file)
    assert labels(found.train) == [("x/1.png", "red cat"), ("x/2.png", "dog"), ("y/3.png", "dog")]
    assert found.train[0].path == tmp_path / "x" / "1.png"
    assert found.test is None
    assert layout.read(file, image_root=Path("/elsewhere")).train[0].path == Path("/elsewhere/x/1.png")


@pytest.mark.parametrize("name", ["shots.csv", "shots.jsonl"])
def test_manifests_with_a_split(tmp_path, name):
    found = layout.read(write_manifest(tmp_path / name, ROWS, ["train", None, "test"]))
    assert [s.label for s in found.train] == ["red cat", "dog"]
    assert labels(found.test) == [("y/3.png", "dog")]


def test_labels_of_files_keep_their_dashes(tmp_path):
    """As in CoOp, whose prompts say "737-200"; only what is a folder's name loses them."""
    record = {"train": [["a.jpg", 0, "737-200"], ["b.jpg", 1, "polka-dotted_thing"]], "test": []}
    (tmp_path / "split.json").write_text(json.dumps(record))
    assert [s.label for s in layout.read(tmp_path / "split.json").train] == ["737-200", "polka-dotted thing"]


def test_rows_that_stand_twice_and_labels_that_are_numbers(tmp_path):
    file = tmp_path / "m.jsonl"
    rows = [{"path": "a.png", "label": 0}, {"path": "b.png", "label": 1}, {"path": "a.png", "label": 0}]
    file.write_text("\ufeff" + "\n".join(map(json.dumps, rows)), "utf-8")  # with a byte order mark
    assert labels(layout.read(file).train) == [("a.png", "0"), ("b.png", "1")]
    file.write_text("\n".join(map(json.dumps, [*rows, {"path": "b.png", "label": 0}])))
    with pytest.raises(DataError, match=r"labels b.png both '1' and '0': choose one"):
        layout.read(file)
    file.write_text("\n".join(json.dumps({"path": path, "label": 0}) for path in ("./a.png", f"{tmp_path}/x/../a.png")))
    assert len(layout.read(file).train) == 1  # however it is spelt
    (tmp_path / "elsewhere/inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to("elsewhere/inner")
    rows = [{"path": "a.png", "label": 0}, {"path": "link/../a.png", "label": 1}]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert len(layout.read(file).train) == 2  # another one, elsewhere


def test_a_manifest_of_test_images(tmp_path):
    (tmp_path / "m.csv").write_text("path,label,split\na.png,cat,test\n")
    found = layout.read(tmp_path / "m.csv")
    assert (found.train, labels(found.test)) == ((), [("a.png", "cat")])


def test_a_coop_split_file(tmp_path):
    file = tmp_path / "split_zhou_Pets.json"
    record = {
        "train": [["a/1.jpg", 0, "abyssinian"], ["b/1.jpg", 1, "basset_hound"]],
        "val": [["a/2.jpg", 0, "abyssinian"]],
        "test": [["b/3.jpg", 1, "basset_hound"], ["c/1.jpg", 2, "chihuahua"]],
    }
    file.write_text(json.dumps(record))
    found = layout.read(file, image_root=tmp_path / "images")
    assert labels(found.train) == [("a/1.jpg", "abyssinian"), ("b/1.jpg", "basset hound")]
    assert labels(found.test) == [("b/3.jpg", "basset hound"), ("c/1.jpg", "chihuahua")]
    assert found.train[0].path == tmp_path / "images" / "a" / "1.jpg"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "m.csv",
            "file,label\na.png,cat\n",
            "needs the columns `path` and `label` in its first line; it has file, lab",
        ),
        ("m.csv", "path,label\na.png,cat\nb.png,\n", "line 3 of .* has no `label`: every image needs"),
        ("m.csv", "path,label,split\na.png,cat,dev\n", "line 2 of .* has split 'dev': expected train, val or test"),
        ("m.csv", "path,label,label\na.png,cat,dog\n", "has two columns `label` in its first line"),
        (
            "m.jsonl",
            '{"path": "a.png", "label": "cat", "split": ["test"]}\n',
            r"line 1 of .* has split \['test'\]: exp",
        ),
        ("m.jsonl", '{"path": "a.png", "label": "cat", "split": false}\n', "line 1 of .* has split False: expected"),
        ("m.csv", "", "m.csv is empty: expected a first line `path,label`"),
        ("m.csv", "path,label\n", "m.csv lists no images"),
        ("m.jsonl", "\n", "m.jsonl lists no images"),
        ("m.csv", "path,label\na.png,  \n", "line 2 of .* has a blank `label`"),
        ("m.jsonl", '{"path": "a.png", "label": " "}', "line 1 of .* has a blank `label`"),
        ("m.csv", "path,label,split\na.png,cat,val\n", "holds validation images alone"),
        ("m.jsonl", '{"path": "a.png", "label": 1}\n\n\n{"path":\n', "line 4 of .*m.jsonl is not JSON"),
        ("m.jsonl", '\n\n{"path": "a.png"}\n', "line 3 of .*m.jsonl has no `label`"),
        ("m.jsonl", '["a.png", "cat"]\n', "line 1 of .*m.jsonl is no object"),
        ("m.json", "{}", "is no CoOp split: expected `train` and `test`"),
        ("m.json", '{"train": [["a.png", 0]], "test": []}', r"has \['a.png', 0\] in `train`: expected"),
        ("m.json", "{", "m.json cannot be read as json"),
        ("m.json", "[]", "is no CoOp split"),
        ("shot_1-seed_1.json", '{"train": {"data": []}, "test": {"data": []}}', "is no CoOp split"),
        ("m.txt", "a.png cat", "is no folder and no .csv, .jsonl or CoOp .json file"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, text, message):
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        layout.read(file)


def test_a_file_that_is_no_text(tmp_path):
    file = tmp_path / "m.csv"
    file.write_bytes(b"path,label\n\xff\xfe,cat\n")
    with pytest.raises(DataError, match="cannot be read as csv"):
        layout.read(file)


# ---- the draw


def samples(counts: dict[str, int]) -> tuple[Sample, ...]:
    return tuple(Sample(Path(f"/{c}/{k}"), f"{c}/{k}", c) for c, n in counts.items() for k in range(n))


def images(train: dict[str, int], test: dict[str, int] | None = None) -> LabelledImages:
    names = {c: c for c in [*train, *(test or {})]}
    return LabelledImages(samples(train), None if test is None else samples(test), names)


def test_k_shots_of_every_class():
    found = images({"a": 5, "b": 9, "c": 3})
    chosen = select(found, 3, seed=4)
    assert [sum(s.label == c for s in chosen.shots) for c in "abc"] == [3, 3, 3]
    assert chosen.base == ("a", "b", "c")
    assert len(set(chosen.shots)) == 9


def test_the_draw_depends_on_the_seed_alone():
    found = images({"a": 9, "b": 9, "c": 9})
    assert select(found, 2, seed=1) == select(found, 2, seed=1)
    draws = {select(found, 2, seed=s).shots for s in range(40)}
    assert len(draws) > 30
    assert {s.source for draw in draws for s in draw if s.label == "a"} == {f"a/{k}" for k in range(9)}


def test_without_a_number_every_training_image_is_a_shot():
    chosen = select(images({"a": 2, "b": 3}), None, seed=0)
    assert len(chosen.shots) == 5


def test_the_shots_and_base_classes_are_those_of_the_training_part_alone():
    found = images({"a": 4, "b": 4}, {"b": 2, "z": 2})
    chosen = select(found, None, seed=0)
    assert set(chosen.shots) == set(found.train)
    assert chosen.base == ("a", "b")


def test_the_class_files_order_is_that_of_the_base_classes():
    found = LabelledImages(samples({"a": 1, "b": 1}), None, {"b": "b", "a": "a"})
    assert select(found, None, seed=0).base == ("b", "a")


def test_too_few_classes():
    with pytest.raises(DataError, match="at least two classes are needed to tell apart; found only 'a'"):
        select(images({"a": 3}), None, seed=0)
    with pytest.raises(DataError, match="found only 'a'"):  # a class of the test part is none to learn
        select(images({"a": 3}, {"b": 2}), None, seed=0)


def test_up_to_k_shots_and_which_classes_have_fewer():
    found = images({name: n for n, name in enumerate("abcdefgh", 1)})
    chosen = select(found, 7, seed=0)
    assert [sum(s.label == c for s in chosen.shots) for c in "abcdefgh"] == [1, 2, 3, 4, 5, 6, 7, 7]
    assert chosen.notes[0] == (
        "6 classes have fewer than 7 images, so that every one is a shot: 'a' 1, 'b' 2, 'c' 3, 'd' 4, 'e' 5 and 1 more"
    )
    assert select(found, 1, seed=0).notes == ()


def test_classes_of_unequal_size_are_named():
    assert select(images({"a": 5, "b": 3}), None, seed=0).notes == ()
    (note,) = select(images({"a": 5, "b": 6, "c": 3}), None, seed=0).notes
    assert note == ("'b' has 6 images and 'c' 3: training goes by the larger classes; --balance draws as many of each")
    assert select(images({"a": 5, "b": 6, "c": 3}), None, seed=0, balanced=True).notes == ()
    assert select(images({"a": 5, "b": 6, "c": 3}), 3, seed=0).notes == ()
