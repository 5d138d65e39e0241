"""What a run is measured on: images that were not shots, their class names, and the new classes among them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clipfit.config import EvaluateConfig
from clipfit.data import layout
from clipfit.data.copies import Known, first_of_each, identify
from clipfit.data.files import resolved
from clipfit.data.images import Views, content_hash
from clipfit.data.layout import LabelledImages, Sample
from clipfit.data.names import read_new_classes, shortened, some
from clipfit.data.stream import Inputs, is_no_input, is_passing
from clipfit.errors import DataError, UsageError
from clipfit.prompts import excluding, key_of
from clipfit.runs.run import Run


@dataclass(frozen=True)
class TestSet:
    """Images labelled with base or new class names. `held_out` False: the base images are the shots themselves."""

    samples: tuple[Sample, ...]
    new: tuple[str, ...]
    held_out: bool
    notes: tuple[str, ...]


def assemble(run: Run, config: EvaluateConfig, views: Views) -> TestSet:
    """The images of the run's own folder that were not shots, its test part, or those of `config.data`.

    Classes are matched by name, never by position: a test folder that lacks a class must not shift the labels.

    Args:
        views: keep what is decoded to tell copies apart.

    Raises:
        DataError: nothing fits, or a listed new class has no images where test images were provided.
    """
    own = config.data is None
    place = config.data or run.place("shots")
    assert place is not None
    found = _read(run, config, place, own)
    listed = read_new_classes(config.new_classes) if config.new_classes else None
    names = _names(run, found, listed or (), own_names=config.classes is not None)
    candidates, notes = _candidates(run, found, place, own, views)
    candidates = [_called(sample, names) for sample in candidates]
    if listed is None:
        present = {sample.label for sample in candidates}
        new = tuple(excluding((name for name in dict.fromkeys(names.values()) if name in present), run.base))
    else:
        new = tuple(excluding(listed, run.base))
        _require_images(run, candidates, new, config, provided=not own or found.test is not None)
        notes += _notes_on(listed, new, found)

    wanted = {*run.base, *new}
    samples = [sample for sample in candidates if sample.label in wanted]
    if len(samples) < len(candidates):
        notes.append(f"{len(candidates) - len(samples)} images of classes that are neither base nor new were left out")
    if not samples and not own:
        raise DataError(f"{place} holds no image of a base or new class; base classes: {some(run.base)}.")

    on_shots = own and not any(sample.label in run.base for sample in samples)
    if on_shots:
        shots = {shot["path"] for shot in run.shots}
        samples += [_called(sample, names) for sample in found.train if sample.source in shots]
        notes.append("base accuracy is measured on the shots: no evidence of generalisation")
    if not any(sample.label in new for sample in samples):
        classes = f"for {some(new)}" if new else "for each new class"
        add = f"add images as {place}/test/<class>/ or " if found.test is not None and place.is_dir() else ""
        notes.append(f"no new accuracy: {add}pass --data, with folders {classes}")
    return TestSet(tuple(samples), new, not on_shots, (*found.notes, *notes))


def unadapted(config: EvaluateConfig) -> tuple[tuple[str, ...], TestSet]:
    """What a model that nobody adapted is measured on: base classes, and the images of `config.data`, copies too.

    The classes that are listed as new stand apart from the others, as they will when those are trained on.

    Raises:
        DataError: nothing is there, or a listed class has no images.
    """
    assert config.data is not None
    found = layout.read(config.data, config.classes, config.image_root)
    listed = read_new_classes(config.new_classes) if config.new_classes else ()
    spelling = {key_of(name): name for name in listed}
    samples = [replace(s, label=spelling.get(key_of(s.label), s.label)) for s in found.test or found.train]
    names = tuple(dict.fromkeys(spelling.get(key_of(name), name) for name in found.names.values()))
    present = {sample.label for sample in samples}
    if without := [name for name in listed if name not in present]:
        raise DataError(f"{config.new_classes} names classes without images in {config.data}: {some(without)}.")
    base = tuple(excluding((name for name in names if name in present), listed))
    return base, TestSet(tuple(samples), listed, True, found.notes)


def each_once(test: TestSet, views: Views) -> TestSet:
    """Without copies of images. `views` keep what is decoded for it."""
    identities = identify(test.samples, Known.of(()), views.grey_bits, views.keep, shared=True)
    distinct = first_of_each([(one.content, s.label) for one, s in zip(identities, test.samples, strict=True)])
    notes = _left_out(copies=len(test.samples) - len(distinct))
    return replace(test, samples=tuple(test.samples[k] for k in distinct), notes=(*test.notes, *notes))


@dataclass(frozen=True)
class OtherSet:
    """Images of another place, none of them a shot, and its classes; unread: rows of a list that have no image."""

    samples: tuple[Sample, ...]
    classes: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def labelled(run: Run, place: Path, views: Views) -> OtherSet:
    """All classes of another labelled place, those among them that the run was trained on in its spelling.

    Args:
        views: as in `assemble`.

    Raises:
        DataError: nothing is there but shots, or one class alone.
    """
    found = layout.read(place)
    names = _names(run, found, (), own_names=False)
    present = {sample.label for sample in (found.train if found.test is None else found.test)}
    classes = tuple(dict.fromkeys(name for own, name in names.items() if own in present))
    if len(classes) < 2:
        raise DataError(f"{place} has one class alone, {some(classes)}: expected two or more to tell apart.")
    samples, notes = _candidates(run, found, place, False, views)
    called = tuple(_called(sample, names) for sample in samples)
    return OtherSet(called, classes, notes=tuple(f"{place}: {note}" for note in (*found.notes, *notes)))


def unlabelled(run: Run, place: Path, skip_bad: bool, views: Views) -> OtherSet:
    """The images of a folder, of a list or of a pattern, or one image, without labels.

    Args:
        views: as in `assemble`.

    Raises:
        DataError: nothing is there but shots; a list cannot be read, or has a row without a path (unless such are
            skipped). UsageError: an archive, or stdin.
    """
    if is_no_input(place):
        raise DataError(f"there is no {place}: expected a folder of images, a list of their paths, or one image.")
    if is_passing(place):
        raise UsageError(f"{place} can be read but once, and is measured at every α: unpack it, or give a list.")
    inputs = Inputs([place])
    inputs.require_lists()
    images = list(inputs)
    wrong = [image.error for image in images if image.error is not None]
    if wrong and not skip_bad:
        raise DataError(f"{wrong[0].rstrip('.')}: put it right or pass --skip-bad-images.")
    found = tuple(Sample(image.path, image.name, "") for image in images if image.path is not None)
    if not found:
        raise DataError(f"{place} holds no image.")
    samples, notes = _candidates(run, LabelledImages(found, None, {}), place, False, views)
    if inputs.left_out:
        notes.append(f"{inputs.left_out} files that are not called as images are were left out")
    unread = tuple(image.name for image in images if image.error is not None)
    return OtherSet(tuple(samples), unread=unread, notes=tuple(f"{place}: {note}" for note in notes))


def _read(run: Run, config: EvaluateConfig, place: Path, own: bool) -> LabelledImages:
    if not own:
        return layout.read(place, config.classes, config.image_root)
    if not place.exists():
        raise DataError(f"{place}, which {run.path} was made from, is no longer there: pass --data with images.")
    class_file, image_root = config.classes or run.place("classes"), config.image_root or run.place("image_root")
    found = layout.read(place, class_file, image_root)
    _require_own(run, found, place)
    return found


def _require_own(run: Run, found: LabelledImages, place: Path) -> None:
    """Raises DataError for a folder that has the name of the run's own, but none of its shots."""
    recorded = {(shot["path"], shot["sha256"]) for shot in run.shots}
    named = {shot["path"] for shot in run.shots}
    there = (s for s in found.train if s.source in named and s.path.is_file())
    if not any((s.source, content_hash(s.path)) in recorded for s in there):
        raise DataError(f"{place} holds none of the shots of {run.path}: pass --data with images to measure it on.")


# ---- images


def _candidates(
    run: Run, found: LabelledImages, place: Path, own: bool, views: Views
) -> tuple[list[Sample], list[str]]:
    """Images that may be measured on: no shot and no copy of one, each once; and what to say of the others."""
    provided = found.train if found.test is None else found.test
    of_adapt = _files(run, [shot["path"] for shot in run.shots])
    if own:
        of_adapt |= _files(run, run.record.skipped)
    others = [sample for sample in provided if resolved(sample.path) not in of_adapt]
    val, ancestors = run.val, run.ancestors  # whatever it was made with is no evidence of it
    known, shots, of_val = Known.of([*run.shots, *val, *ancestors]), Known.of(run.shots), Known.of(val)
    identities = identify(others, known, views.grey_bits, views.keep, shared=True)
    unseen = [i for i, identity in enumerate(identities) if identity not in known]
    copies = sum(identity in shots for identity in identities)
    judged = sum(identity in of_val and identity not in shots for identity in identities)
    distinct = first_of_each([(identities[i].content, others[i].label) for i in unseen])
    if provided and not unseen and not own:
        or_val = " or an image of its val part" if val else ""
        or_val += " or of a run that it goes on from" if ancestors else ""
        raise DataError(
            f"every image in {place} is a shot of {run.path}{or_val}, or a copy of one: pass images that it was not "
            "made with."
        )
    return [others[unseen[k]] for k in distinct], _left_out(
        shots=0 if own and found.test is None else len(provided) - len(others),
        copies_of_shots=copies,
        of_val=judged,
        of_ancestors=len(others) - len(unseen) - copies - judged,
        copies=len(unseen) - len(distinct),
    )


def _left_out(
    shots: int = 0, copies_of_shots: int = 0, of_val: int = 0, of_ancestors: int = 0, copies: int = 0
) -> list[str]:
    said = [
        (shots, "are shots and were left out"),
        (copies_of_shots, "have the very content of a shot and were left out"),
        (of_val, "are of the val part, on which the run was judged when it was made, and were left out"),
        (of_ancestors, "were used to make the run that this one goes on from, and were left out"),
        (copies, "have the very content of another and were counted once"),
    ]
    return [f"{count} images {what}" for count, what in said if count]


def _files(run: Run, sources: Iterable[str]) -> set[Path]:
    """Where images of the run's own place are on this disk."""
    place, image_root = run.place("shots"), run.place("image_root")
    assert place is not None
    if not place.is_dir():
        return {resolved((image_root or place.parent) / source) for source in sources}
    # sources start at the folder of a split, or at the parent of a folder of classes
    return {
        resolved(next(filter(os.path.exists, (place / source, place.parent / source)), place)) for source in sources
    }


# ---- class names


def _names(run: Run, found: LabelledImages, listed: Sequence[str], own_names: bool) -> dict[str, str]:
    """Class names of the place → the one name that each class has in this evaluation.

    A folder that the run has a name for keeps it in another place too, unless that place has a class file of its own
    (`own_names`). Then base classes are spelt as in training, new ones as in the list.
    """
    of_run = {} if own_names else run.names
    spelling = {key_of(name): name for name in (*listed, *run.base)}
    names = {name: of_run.get(folder, name) for folder, name in found.names.items()}
    return {name: spelling.get(key_of(known_as), known_as) for name, known_as in names.items()}


def _called(sample: Sample, names: Mapping[str, str]) -> Sample:
    return replace(sample, label=names[sample.label])


def _notes_on(listed: Sequence[str], new: Sequence[str], found: LabelledImages) -> list[str]:
    """Of a list of new classes: those that are not new, and those whose prompt is another one than without the list."""
    notes = []
    trained = [name for name in listed if name not in new]
    if trained:
        notes.append(f"{some(trained)}: listed as new, but trained on; counted as base")
    of_place = {key_of(name): name for name in found.names.values()}
    pairs = [(name, of_place.get(key_of(name), name)) for name in new]
    respelt = [f"{name!r} (not {own!r})" for name, own in pairs if name.casefold() != own.casefold()]
    if respelt:
        notes.append(f"spelt as listed, which may change figures: {shortened(respelt)}")
    return notes


def _require_images(
    run: Run, candidates: Sequence[Sample], new: Sequence[str], config: EvaluateConfig, provided: bool
) -> None:
    """Raises DataError where no listed class is new, or one has no images. A folder of shots alone may lack all of
    them (`provided` False): then the new accuracy is null, and a note says so."""
    if not new:
        raise DataError(f"every class in {config.new_classes} was trained on: there is none that is new.")
    present = {sample.label for sample in candidates}
    without = [name for name in new if name not in present]
    if without and (provided or len(without) < len(new)):
        raise DataError(
            f"{config.new_classes} names {len(without)} new class(es) without images: {some(without)}; "
            f"add a folder of images for each to {config.data or run.record.shots}, or take the names out."
        )
