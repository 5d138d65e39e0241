"""Labelled images in folders: one folder a class, alone or inside train/, test/ and val/."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from clipfit.data.files import HEIF_ADVICE, HEIF_SUFFIXES, by_kind, example, has_image_suffix, is_image, visible, walk
from clipfit.data.objections import ObjectionError, Objections, object_to
from clipfit.errors import DataError

PARTS = ("train", "test", "val")
# what a part may be called, in any case
PART_NAMES = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "val",
    "valid": "val",
    "validation": "val",
}


class Row(NamedTuple):
    """One labelled image as a place lists it: where it is, as written there, and its label."""

    path: Path
    source: str
    label: str


@dataclass
class Found:
    """What a place lists: rows by part, labels in the order of the classes where the place has one, notes."""

    parts: dict[str, list[Row]]
    order: Sequence[str] = ()
    notes: list[str] = field(default_factory=list)


@dataclass
class _Aside:
    """What is no labelled image: files inside class folders, and images beside them."""

    inside: list[Path] = field(default_factory=list)
    beside: list[Path] = field(default_factory=list)


def read_folder(place: Path, objections: Objections | None = None) -> Found:
    """Images by class folder and part.

    Raises:
        DataError: a class folder without images, a part where a class is expected, or two folders of one part.
    """
    parts, aside = _parts(place), _Aside()
    if not parts:
        _require_classes(place)
        found = Found({"train": _class_folders(place, aside, objections)})
    else:
        found = Found({part: _class_folders(root, aside, objections) for part, root in parts.items()})
        aside.beside += [path for path in visible(place) if has_image_suffix(path) and not path.is_dir()]
        found.notes += _folders_beside(place, parts)
    if aside.beside and not any(found.parts.values()):
        raise DataError(
            f"{place} holds {_images(len(aside.beside))} {example(aside.beside)}, but none in a class folder: "
            f"expected {place}/<class>/."
        )
    if aside.beside:
        found.notes.append(
            f"{_images(len(aside.beside))} beside the class folders left out {example(aside.beside)}: "
            "only what is inside a class folder has a label"
        )
    if aside.inside:
        files = "1 file" if len(aside.inside) == 1 else f"{len(aside.inside)} files"
        found.notes.append(f"{files} in class folders left out: {by_kind(aside.inside)}")
    return found


def _subfolders(folder: Path) -> list[Path]:
    return [path for path in visible(folder) if path.is_dir()]


def _parts(place: Path) -> dict[str, Path]:
    """The folders of a split by part; none where class folders stand beside test images but no training images."""
    parts: dict[str, Path] = {}
    for folder in _subfolders(place):
        part = PART_NAMES.get(folder.name.lower())
        if part is None or not _subfolders(folder):
            continue
        if part in parts:
            raise DataError(f"{parts[part]} and {folder} are the same part of a split: keep one of them.")
        parts[part] = folder
    classes = [folder for folder in _subfolders(place) if folder.name.lower() not in PART_NAMES]
    return parts if "train" in parts or not classes else {}


def _require_classes(place: Path) -> None:
    folders = _subfolders(place)
    if folders and all(folder.name.lower() in PART_NAMES for folder in folders):
        names = " and ".join(f"{folder.name}/" for folder in folders)
        raise DataError(f"{place} holds {names}, but no class folders inside: expected {folders[0]}/<class>/.")


def _class_folders(root: Path, aside: _Aside, objections: Objections | None) -> list[Row]:
    """Images by class folder; what is none is added to `aside`."""
    rows: list[Row] = []
    aside.beside += [path for path in visible(root) if has_image_suffix(path) and not path.is_dir()]
    for folder in _subfolders(root):
        if folder.name.lower() in PART_NAMES and _subfolders(folder):
            raise DataError(
                f"{folder} looks like a part of a split, not like a class: expected {root}/train/<class>/ and "
                f"{root}/test/<class>/, or class folders alone."
            )
        images, others = _apart(walk(folder))
        if not images:
            empty = ObjectionError("empty-class", _without_images(folder, others), classes=(folder.name,))
            object_to(empty, objections)
        aside.inside += others
        within = len(root.parent.parts)
        rows += [Row(path, "/".join(path.parts[within:]), folder.name) for path in images]
    return rows


def _apart(paths: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Images, and what is none."""
    images: list[Path] = []
    others: list[Path] = []
    for path in paths:
        (images if is_image(path) else others).append(path)
    return images, others


def _without_images(folder: Path, others: Sequence[Path]) -> str:
    if any(path.suffix.lower() in HEIF_SUFFIXES and path.is_file() for path in others):
        return f"class folder {folder} holds no images that can be read without pillow-heif: {HEIF_ADVICE}."
    but = f" but {by_kind(others)}" if others else ""
    return f"class folder {folder} holds no images{but}: add some or remove the folder."


def _folders_beside(place: Path, parts: Mapping[str, Path]) -> list[str]:
    """What to say of folders with images that stand beside the parts of a split."""
    beside = [folder for folder in _subfolders(place) if folder not in parts.values()]
    beside = [folder for folder in beside if any(has_image_suffix(path) for path in walk(folder))]
    if not beside:
        return []
    names = " and ".join(f"{folder.name}/" for folder in parts.values())
    count = "1 folder" if len(beside) == 1 else f"{len(beside)} folders"
    return [
        f"{count} of images beside {names} left out {example(beside)}: "
        f"a class stands inside a part, as {next(iter(parts.values())).name}/<class>/"
    ]


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"
