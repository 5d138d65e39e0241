"""Reading labelled images from a folder, a train/test folder, a manifest or a CoOp split file."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipfit.data.names import ClassNames
from clipfit.errors import DataError

# what Pillow opens and people keep photographs in
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp",
    ".ppm", ".pgm", ".pbm", ".jp2", ".avif", ".tga", ".ico",
)  # fmt: skip


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
    """

    train: tuple[Sample, ...]
    test: tuple[Sample, ...] | None
    names: Mapping[str, str]


def read(place: Path, class_file: Path | None = None, image_root: Path | None = None) -> LabelledImages:
    """Find the labelled images at `place`.

    Args:
        place: `<class>/*.jpg`, `{train,test}/<class>/*.jpg`, a manifest (.csv, .jsonl) or a CoOp split (.json).
        class_file: class names by folder name; without one, underscores and dashes become spaces.
        image_root: what relative paths in a manifest or split file start from (default: the file's folder).

    Raises:
        DataError: nothing is there, a class is empty, or the class file does not match.
    """
    if not place.exists():
        raise DataError(f"there is no {place}: expected a folder of class folders, a manifest or a CoOp split file.")
    if place.is_file():
        parts = _read_file(place, image_root or place.parent)
    elif any(c.is_dir() for c in _visible(place / "train")):
        parts = {"train": _read_folder(place / "train")}
        if (place / "test").is_dir():
            parts["test"] = _read_folder(place / "test")
    else:
        parts = {"train": _read_folder(place)}

    train, test = parts["train"], parts.get("test")
    if not train:
        raise DataError(f"{place} holds no labelled images: expected one folder a class with images inside.")
    labels = list(dict.fromkeys(label for _, _, label in [*train, *(test or [])]))
    names = ClassNames.of(labels, class_file).by_label
    named = lambda rows: tuple(Sample(path, source, names[label]) for path, source, label in rows)  # noqa: E731
    return LabelledImages(named(train), None if test is None else named(test), names)


Row = tuple[Path, str, str]  # path, path as written, label


def _visible(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []


def _read_folder(root: Path) -> list[Row]:
    classes = [p for p in _visible(root) if p.is_dir()]
    rows: list[Row] = []
    for folder in classes:
        images = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()]
        images = [p for p in images if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
        if not images:
            raise DataError(f"class folder {folder} holds no images: add some or remove the folder.")
        rows += [(p, p.relative_to(root.parent).as_posix(), folder.name) for p in images]
    return rows


def _read_file(file: Path, root: Path) -> dict[str, list[Row]]:
    suffix = file.suffix.lower()
    try:
        if suffix == ".json":
            return _read_coop(json.loads(file.read_text("utf-8")), root)
        if suffix == ".jsonl":
            records = [json.loads(line) for line in file.read_text("utf-8").split("\n") if line.strip()]
            return _read_manifest(file, records, root)
        if suffix == ".csv":
            with file.open(newline="", encoding="utf-8-sig") as lines:
                return _read_manifest(file, csv.DictReader(lines), root)
    except (csv.Error, AttributeError, KeyError, TypeError, ValueError) as error:  # JSON and UTF-8: ValueErrors
        raise DataError(f"{file} cannot be read as {suffix[1:]}: {error}.") from error
    raise DataError(f"{file} is no folder and no .csv, .jsonl or CoOp .json file.")


def _read_manifest(file: Path, records: Iterable[Mapping[str, Any]], root: Path) -> dict[str, list[Row]]:
    """path,label[,split] with split "train" or "test"; without that column every row may be a shot."""
    parts: dict[str, list[Row]] = {"train": []}
    for number, record in enumerate(records, 1):
        if not record.get("path") or not record.get("label"):
            raise DataError(f"row {number} of {file} needs `path` and `label`; it has {sorted(map(str, record))}.")
        split = record.get("split") or "train"
        if split not in ("train", "test"):
            raise DataError(f"row {number} of {file} has split {split!r}: expected train or test.")
        parts.setdefault(split, []).append((root / record["path"], str(record["path"]), str(record["label"])))
    return parts


def _read_coop(split: Any, root: Path) -> dict[str, list[Row]]:
    """{"train": [[path, index, class name], …], "val": …, "test": …}: the format of the eleven benchmark sets.

    The validation part is read by nothing: CLIP-CITE uses the last step, not the best.
    """
    rows = lambda part: [(root / path, path, name) for path, _, name in split[part]]  # noqa: E731
    return {"train": rows("train"), "test": rows("test")}
