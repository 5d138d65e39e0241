"""What a run is measured on: images that were not shots, their class names, and the new classes among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipfit.config import EvaluateConfig
from clipfit.data import layout
from clipfit.data.images import content_hash
from clipfit.data.layout import LabelledImages, Sample
from clipfit.data.names import read_new_classes
from clipfit.errors import DataError
from clipfit.prompts import excluding, key_of
from clipfit.runs.record import Run


@dataclass(frozen=True)
class TestSet:
    """Images labelled with base or new class names. `held_out` False: the base images are the shots themselves."""

    samples: tuple[Sample, ...]
    new: tuple[str, ...]
    held_out: bool
    notes: tuple[str, ...]


def assemble(run: Run, config: EvaluateConfig) -> TestSet:
    """The images of the run's own folder that were not shots, its test part, or those of `config.data`.

    Classes are matched by name, never by position: a test folder that lacks a class must not shift the labels.

    Raises:
        DataError: nothing fits, or a listed new class has no images where test images were provided.
    """
    own = config.data is None
    place = config.data or run.place("shots")
    assert place is not None
    class_file = config.classes or (run.place("classes") if own else None)
    image_root = config.image_root or (run.place("image_root") if own else None)
    if own and not place.exists():
        raise DataError(f"{place}, which {run.path} was made from, is no longer there: pass --data with images.")
    found = layout.read(place, class_file, image_root)
    if own:
        _require_own(run, found, place)
    candidates, notes = _candidates(run, found, own)
    new, label_of = _label_sets(run, found, candidates, config, notes)

    samples = [Sample(s.path, s.source, label_of[s.label]) for s in candidates if s.label in label_of]
    if len(samples) < len(candidates):
        notes.append(f"{len(candidates) - len(samples)} images of classes that are neither base nor new were left out")
    if not samples and not own:
        raise DataError(f"{place} holds no image of a base or new class; base classes: {', '.join(run.base[:8])}.")

    on_shots = own and not any(s.label in run.base for s in samples)
    if on_shots:
        shots = {shot["path"] for shot in run.shots}
        samples += [Sample(s.path, s.source, label_of[s.label]) for s in found.train if s.source in shots]
        notes.append("base accuracy is measured on the shots: no evidence of generalisation")
    if not any(s.label in new for s in samples):
        wanted = f"for {_some(new)}" if new else "for each new class"
        add = f"add images as {place}/test/<class>/ or " if found.test is not None and place.is_dir() else ""
        notes.append(f"no new accuracy: {add}pass --data, with folders {wanted}")
    return TestSet(tuple(samples), new, not on_shots, tuple(notes))


def _candidates(run: Run, found: LabelledImages, own: bool) -> tuple[list[Sample], list[str]]:
    """Images that may be measured on: no shot, and no copy of one under another name."""
    paths = {*(shot["path"] for shot in run.shots), *run.config["skipped"]}
    contents = {shot["sha256"] for shot in run.shots}
    if found.test is not None:
        candidates = list(found.test)
    else:
        candidates = [s for s in found.train if not own or s.source not in paths]
    content = [content_hash(s.path) if s.path.is_file() else str(s.path) for s in candidates]
    fresh = {(c, s.label): s for c, s in reversed(list(zip(content, candidates, strict=True))) if c not in contents}
    notes, shown = [], sum(c in contents for c in content)
    copies = len(candidates) - shown - len(fresh)
    if shown:
        notes.append(f"{shown} images have the very content of a shot and were left out")
    if copies:
        notes.append(f"{copies} images have the very content of another and were counted once")
    return list(reversed(fresh.values())), notes


def _require_own(run: Run, found: LabelledImages, place: Path) -> None:
    """Raises DataError for a folder that has the name of the run's own, but none of its shots."""
    recorded = {(shot["path"], shot["sha256"]) for shot in run.shots}
    named = {shot["path"] for shot in run.shots}
    there = (s for s in found.train if s.source in named and s.path.is_file())
    if not any((s.source, content_hash(s.path)) in recorded for s in there):
        raise DataError(f"{place} holds none of the shots of {run.path}: pass --data with images to measure it on.")


def _label_sets(
    run: Run, found: LabelledImages, candidates: Sequence[Sample], config: EvaluateConfig, notes: list[str]
) -> tuple[tuple[str, ...], Mapping[str, str]]:
    """The new classes, and each of the place's class names as a base or new class name (others are absent)."""
    # a folder that the run has a name for keeps it in another place too, unless a class file names that place's own
    known = {} if config.classes else run.names
    known_as = {name: known.get(folder, name) for folder, name in found.names.items()}
    present = {s.label for s in candidates}
    if config.new_classes is None:
        new = tuple(excluding((mine for name, mine in known_as.items() if name in present), run.base))
    else:
        listed = read_new_classes(config.new_classes)
        new = tuple(excluding(listed, run.base))
        if not new:
            raise DataError(f"every class in {config.new_classes} was trained on: there is none that is new.")
        if len(new) < len(listed):
            trained = [name for name in listed if name not in new]
            notes.append(f"{_some(trained)}: listed as new, but trained on; counted as base")
    by_key = {key_of(name): name for name in (*run.base, *new)}
    label_of = {name: by_key[key_of(mine)] for name, mine in known_as.items() if key_of(mine) in by_key}
    if config.new_classes is not None:
        provided = config.data is not None or found.test is not None
        without = [name for name in new if name not in {label_of.get(p) for p in present}]
        # a folder of shots alone may lack all of them: then the new accuracy is null, and a note says so
        if without and (provided or len(without) < len(new)):
            raise DataError(
                f"{config.new_classes} names {len(without)} new class(es) without images: {_some(without)}; "
                f"add a folder of images for each to {config.data or run.config['shots']}, or take the names out."
            )
    return new, label_of


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
