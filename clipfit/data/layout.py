"""Reading labelled images from a folder, a train/test folder, a manifest or a CoOp split file."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipfit.data.names import ClassNames
from clipfit.errors import DataError, UsageError
from clipfit.prompts import name_of_folder, name_of_label

# what Pillow opens and people keep photographs in
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp",
    ".ppm", ".pgm", ".pbm", ".jp2", ".avif", ".tga", ".ico",
)  # fmt: skip
PARTS = ("train", "test")
LIKE_PARTS = (*PARTS, "training", "testing", "val", "valid", "validation")  # no names of classes


@dataclass(frozen=True)
class Sample:
    """One labelled image: where it is, where it is said to be (relative), and its class name."""

    path: Path
    source: str
    label: str


@dataclass(frozen=True)
class LabelledImages:
    """What a place holds. `test` is None where the place makes no difference between training and test images.

    `names` maps the place's own labels (folder names) to class names; its order is the order of the classes.
    `ignored` counts files in class folders whose endings are not those of images.
    """

    train: tuple[Sample, ...]
    test: tuple[Sample, ...] | None
    names: Mapping[str, str]
    ignored: int = 0


def read(place: Path, class_file: Path | None = None, image_root: Path | None = None) -> LabelledImages:
    """Find the labelled images at `place`.

    Args:
        place: `<class>/*.jpg`, `{train,test}/<class>/*.jpg` (train may be lacking), a manifest (.csv, .jsonl) or a
            CoOp split (.json).
        class_file: class names by folder name; without one, underscores become spaces, and dashes of folder names.
        image_root: what relative paths in a manifest or split file start from (default: the file's folder).

    Raises:
        DataError: nothing is there, a class is empty, the class file does not match, or an image has two labels.
        UsageError: an image_root for a folder.
    """
    if not place.exists():
        raise DataError(f"there is no {place}: expected a folder of class folders, a manifest or a CoOp split file.")
    ignored: list[Path] = []
    if place.is_file():
        parts = _read_file(place, image_root or place.parent)
    elif image_root is not None:
        raise UsageError(f"an image root belongs to a manifest or split file, but {place} is a folder: leave it out.")
    else:
        split = {p.name.lower(): p for p in _visible(place) if p.name.lower() in PARTS and _folders(p)}
        if split and not (set(split) == {"test"} and _others(place)):
            parts = {part: _read_folder(folder, ignored) for part, folder in split.items()}
        else:
            parts = {"train": _read_folder(place, ignored)}

    train = _each_once(parts.get("train", []), place)
    test = _each_once(parts["test"], place) if "test" in parts else None
    if not train and not test:
        raise DataError(f"{place} holds no labelled images: expected one folder a class with images inside.")
    labels = list(dict.fromkeys(label for _, _, label in [*train, *(test or [])]))
    own = name_of_label if place.is_file() else name_of_folder
    names = ClassNames.of(labels, class_file, own).by_label
    named = lambda rows: tuple(Sample(path, source, names[label]) for path, source, label in rows)  # noqa: E731
    return LabelledImages(named(train), None if test is None else named(test), names, len(ignored))


Row = tuple[Path, str, str]  # path, path as written, label


def _visible(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []


def _folders(folder: Path) -> list[Path]:
    return [p for p in _visible(folder) if p.is_dir()]


def _others(place: Path) -> list[Path]:
    """Folders that are no part of a split."""
    return [p for p in _folders(place) if p.name.lower() not in LIKE_PARTS]


def _each_once(rows: list[Row], place: Path) -> list[Row]:
    """Rows without repetitions. Raises DataError for an image that has two labels."""
    by_path: dict[Path, Row] = {}
    for row in rows:
        before = by_path.setdefault(row[0], row)
        if before[2] != row[2]:
            raise DataError(f"{place} labels {row[1]} both {before[2]!r} and {row[2]!r}: an image has one class.")
    return list(by_path.values())


def _read_folder(root: Path, ignored: list[Path]) -> list[Row]:
    """Images by class folder; files that are none are added to `ignored`."""
    rows: list[Row] = []
    for folder in _folders(root):
        if folder.name.lower() in LIKE_PARTS and _folders(folder):
            raise DataError(
                f"{folder} looks like a part of a split, not like a class: expected {root}/train/<class>/ and "
                f"{root}/test/<class>/, or class folders alone."
            )
        files = [p for p in sorted(folder.rglob("*")) if not p.is_dir()]
        files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
        images = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()]
        ignored += [p for p in files if p.suffix.lower() not in IMAGE_SUFFIXES or not p.is_file()]
        if not images:
            raise DataError(f"class folder {folder} holds no images: add some or remove the folder.")
        rows += [(p, p.relative_to(root.parent).as_posix(), folder.name) for p in images]
    return rows


def _read_file(file: Path, root: Path) -> dict[str, list[Row]]:
    suffix = file.suffix.lower()
    try:
        if suffix == ".json":
            return _read_coop(file, json.loads(file.read_text("utf-8-sig")), root)
        if suffix == ".jsonl":
            records = [json.loads(line) for line in file.read_text("utf-8-sig").split("\n") if line.strip()]
            return _read_manifest(file, records, root)
        if suffix == ".csv":
            with file.open(newline="", encoding="utf-8-sig") as lines:
                return _read_manifest(file, csv.DictReader(lines), root)
    except (csv.Error, AttributeError, KeyError, TypeError, ValueError) as error:  # JSON and UTF-8: ValueErrors
        raise DataError(f"{file} cannot be read as {suffix[1:]}: {error}.") from error
    raise DataError(f"{file} is no folder and no .csv, .jsonl or CoOp .json file.")


def _read_manifest(file: Path, records: Iterable[Mapping[str, Any]], root: Path) -> dict[str, list[Row]]:
    """path,label[,split] with split "train" or "test"; without that column every row may be a shot."""
    parts: dict[str, list[Row]] = {}
    for number, record in enumerate(records, 1):
        if any(record.get(key) in (None, "") for key in ("path", "label")):
            raise DataError(f"row {number} of {file} needs `path` and `label`; it has {sorted(map(str, record))}.")
        split = record.get("split") or "train"
        if split not in PARTS:
            raise DataError(f"row {number} of {file} has split {split!r}: expected train or test.")
        parts.setdefault(split, []).append((root / record["path"], str(record["path"]), str(record["label"])))
    return parts


def _read_coop(file: Path, split: Any, root: Path) -> dict[str, list[Row]]:
    """{"train": [[path, index, class name], …], "val": …, "test": …}: the format of the eleven benchmark sets.

    The validation part is read by nothing: CLIP-CITE uses the last step, not the best.
    """
    if not isinstance(split, dict) or not all(isinstance(split.get(part), list) for part in PARTS):
        raise DataError(f"{file} is no CoOp split: expected `train` and `test`, lists of [path, 0, name].")
    rows = lambda part: [(root / path, path, name) for path, _, name in split[part]]  # noqa: E731
    return {"train": rows("train"), "test": rows("test")}
