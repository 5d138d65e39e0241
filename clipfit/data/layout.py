"""Reading labelled images from a folder, a split folder, a manifest or a CoOp split file."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from clipfit.data.files import require_regular
from clipfit.data.folders import PARTS, Row, read_folder
from clipfit.data.manifests import read_file
from clipfit.data.names import ClassNames, name_rule
from clipfit.data.objections import ObjectionError, Objections, object_to
from clipfit.errors import DataError, UsageError


@dataclass(frozen=True)
class Sample:
    """One labelled image: where it is, where it is said to be (relative), and its class name."""

    path: Path
    source: str
    label: str


@dataclass(frozen=True)
class LabelledImages:
    """What a place holds, by part. A part is None where the place does not have it.

    `names` maps the place's own labels (folder names) to class names; its order is the order of the classes.
    `val` is neither trained on nor reported as a test: it is kept for choosing α.
    `notes` are sentences for the user: what was left out, or kept apart.
    """

    train: tuple[Sample, ...]
    test: tuple[Sample, ...] | None
    names: Mapping[str, str]
    val: tuple[Sample, ...] | None = None
    notes: tuple[str, ...] = ()

    def names_of(self, classes: Collection[str]) -> dict[str, str]:
        """Label → class name of these classes alone, in order."""
        return {label: name for label, name in self.names.items() if name in classes}


def read(
    place: Path,
    class_file: Path | None = None,
    image_root: Path | None = None,
    objections: Objections | None = None,
) -> LabelledImages:
    """Find the labelled images at `place`.

    Args:
        place: `<class>/*.jpg`, `{train,val,test}/<class>/*.jpg` (train may be lacking), a manifest (.csv, .jsonl) or
            a CoOp split (.json).
        class_file: class names by folder name; without one, underscores become spaces, and dashes of folder names.
        image_root: what relative paths in a manifest or split file start from (default: the file's folder).
        objections: a list for what would be raised of one class or image, to go on without it: an empty class, names
            that are one, an image with two labels.

    Raises:
        DataError: nothing is there, a class is empty, the class file does not match, or an image has two labels.
        UsageError: an image_root for a folder.
    """
    if not place.exists() and not place.is_symlink():
        raise DataError(f"there is no {place}: expected a folder of class folders, a manifest or a CoOp split file.")
    if not place.is_dir():
        require_regular(place, "the place of the images,")
    elif image_root is not None:
        raise UsageError(f"an image root belongs to a manifest or split file, but {place} is a folder: leave it out.")
    found = read_folder(place, objections) if place.is_dir() else read_file(place, image_root or place.parent)

    rows = {part: _each_once(found.parts[part], place, objections) for part in PARTS if part in found.parts}
    if not rows.get("train") and not rows.get("test"):
        raise DataError(_nothing(place, rows.get("val", [])))
    labels = dict.fromkeys((*found.order, *(row.label for part in rows.values() for row in part)))
    names = ClassNames.of(list(labels), class_file, name_rule(place), objections).by_label
    samples = {part: tuple(Sample(row.path, row.source, names[row.label]) for row in rows[part]) for part in rows}
    notes = list(found.notes)
    if samples.get("val"):
        count = len(samples["val"])
        notes.append(f"{count} images of a validation part are kept apart: neither trained on nor tested")
    return LabelledImages(samples.get("train", ()), samples.get("test"), names, samples.get("val"), tuple(notes))


def _nothing(place: Path, val: list[Row]) -> str:
    if val:
        return f"{place} holds validation images alone: expected a part to train on or to test."
    return f"{place} holds no labelled images: expected one folder a class with images inside."


def _spelt_alike(path: Path) -> str:
    """The same for ./a, x/../a and a, whatever the last one links to."""
    return os.path.join(os.path.realpath(path.parent), path.name) if ".." in path.parts else os.path.abspath(path)


def _each_once(rows: Iterable[Row], place: Path, objections: Objections | None) -> list[Row]:
    """Rows without repetitions. Raises DataError for an image that has two labels."""
    by_path: dict[object, Row] = {}
    key: Callable[[Path], object] = (lambda path: path) if place.is_dir() else _spelt_alike
    for row in rows:
        before = by_path.setdefault(key(row.path), row)
        if before.label != row.label:
            message = f"{place} labels {row.source} both {before.label!r} and {row.label!r}: choose one."
            object_to(ObjectionError("two-labels", message, (row.source,), (before.label, row.label)), objections)
    return list(by_path.values())
