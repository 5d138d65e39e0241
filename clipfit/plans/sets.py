"""The labelled sets of a plan: their classes in order, the halves of them, shots, and what is measured on."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from clipfit.config.plan import SetRow
from clipfit.data import layout
from clipfit.data.layout import LabelledImages, Sample
from clipfit.data.names import read_text
from clipfit.data.shots import select
from clipfit.errors import ClipfitError, DataError
from clipfit.model import templates
from clipfit.plans.contenders import require_settings
from clipfit.prompts import Templates

HALVES = ("base", "new")


@dataclass(frozen=True)
class Part:
    """Images of a set, and the classes that they are told apart among. `figure`: the column of the accuracy."""

    of: str
    figure: str
    samples: tuple[Sample, ...]
    candidates: tuple[str, ...]

    @property
    def labels(self) -> list[int]:
        """Of every image the number of its class among the candidates."""
        place = {name: i for i, name in enumerate(self.candidates)}
        return [place[sample.label] for sample in self.samples]


@dataclass(frozen=True)
class LabelledSet:
    """A set of a plan, read. Classes are in the order of a split's integer labels, else in that of its folders."""

    name: str
    row: SetRow
    images: LabelledImages
    templates: Templates

    @classmethod
    def read(cls, name: str, row: SetRow) -> LabelledSet:
        """Raises DataError or UsageError, the set named."""
        try:
            require_settings(row.settings)
            own = row.templates == (templates.OWN,)
            listed = templates.given(templates.OWN if own else row.templates) if row.templates else ()
            return cls(name, row, layout.read(row.data, row.classes, row.image_root), listed)
        except ClipfitError as error:
            raise type(error)(f"set {name}: {error}") from None

    @property
    def classes(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(self.images.names.values())

    @property
    def trained(self) -> tuple[str, ...]:
        """Those with training images."""
        there = {sample.label for sample in self.images.train}
        return tuple(name for name in self.classes if name in there)

    @property
    def base(self) -> tuple[str, ...]:
        """The first ⌈C/2⌉ classes; where the set itself keeps classes for the test alone, all others.

        Base and new are halves by the order of the integer labels in CoOp's protocol (arXiv 2203.05557, section 4.1).
        """
        if self.images.test is not None and len(self.trained) < len(self.classes):
            return self.trained
        return self.classes[: (len(self.classes) + 1) // 2]

    @property
    def new(self) -> tuple[str, ...]:
        """The classes that are not base."""
        base = set(self.base)
        return tuple(name for name in self.classes if name not in base)

    def part(self, figure: str, classes: Sequence[str]) -> Part:
        """The test images of some classes, told apart among those. Raises DataError where there are none."""
        wanted = set(classes)
        samples = tuple(sample for sample in self.images.test or () if sample.label in wanted)
        if not samples:
            half = f" of its {figure} classes" if figure.endswith(HALVES) else ""
            raise DataError(f"set {self.name} has no test images{half}, so nothing can be measured.")
        return Part(self.name, figure, samples, tuple(classes))

    def halves(self, prefix: str = "") -> tuple[Part, ...]:
        """What is measured on in base-to-new: each half within its own classes."""
        return self.part(f"{prefix}{HALVES[0]}", self.base), self.part(f"{prefix}{HALVES[1]}", self.new)

    def shots(self, classes: Collection[str], per_class: int | None, seed: int) -> tuple[Sample, ...]:
        """K images a class, as `adapt --shots-per-class K --seed S` draws them; or CoOp's own draw, where it is given.

        Raises:
            DataError: there are none, of fewer than two classes, or the list names images that the set does not have.
        """
        train = tuple(sample for sample in self.images.train if sample.label in classes)
        if self.row.few_shot and per_class is not None:
            return self._listed(train, classes, per_class, seed)
        try:
            return select(replace(self.images, train=train), per_class, seed).shots
        except DataError as error:
            raise DataError(f"set {self.name}: {error}") from None

    def _listed(
        self, train: Iterable[Sample], classes: Collection[str], per_class: int, seed: int
    ) -> tuple[Sample, ...]:
        file = self._list(per_class, seed)
        by_tail = {PurePosixPath(sample.source).as_posix(): sample for sample in train}
        found: dict[str, Sample] = {}
        for entry in _entries(file):
            path, name = PurePosixPath(entry["impath"]), str(entry["classname"])
            if self.images.names.get(name, name) not in classes:
                continue
            tails = ("/".join(path.parts[k:]) for k in range(len(path.parts)))
            sample = next((by_tail[tail] for tail in tails if tail in by_tail), None)
            if sample is None or sample.label != self.images.names.get(name, name):
                what = "calls it otherwise" if sample else "does not have it"
                raise DataError(f"{file} lists {path} as {name!r}, but the set {self.name} {what}.")
            found[sample.source] = sample
        if lacking := [name for name in classes if name not in {sample.label for sample in found.values()}]:
            raise DataError(f"{file} lists no shot of class {lacking[0]!r} of the set {self.name}.")
        order = {name: i for i, name in enumerate(self.classes)}
        return tuple(sorted(found.values(), key=lambda sample: order[sample.label]))  # stable: as they are listed

    def _list(self, per_class: int, seed: int) -> Path:
        return Path((self.row.few_shot or "").replace("{shots}", str(per_class)).replace("{seed}", str(seed)))

    def drawn(self, per_class: int | None, seed: int) -> str | None:
        """SHA-256 of CoOp's list of the shots; None where the seed draws them. Raises DataError where it is missing."""
        if not self.row.few_shot or per_class is None:
            return None
        file = self._list(per_class, seed)
        return hashlib.sha256(_text_of(file).encode()).hexdigest()

    def fingerprint(self) -> str:
        """SHA-256 of the list of its images, by part: name, class, bytes in the file. They are not opened."""
        digest = hashlib.sha256(json.dumps(list(self.classes)).encode("utf-8", "surrogatepass"))
        for part in (self.images.train, self.images.test or ()):
            digest.update(b"\n\n")
            for sample in part:
                size = sample.path.stat().st_size if sample.path.is_file() else -1
                digest.update(json.dumps([sample.source, sample.label, size]).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def counts_of(samples: Sequence[Sample], classes: Sequence[str]) -> list[int]:
    """Images of each class."""
    counted = Counter(sample.label for sample in samples)
    return [counted[name] for name in classes]


def _entries(file: Path) -> list[Mapping[str, Any]]:
    """The training part of a few-shot list: {"train": {"data": [{"impath", "label", "classname"}, …]}, …}."""
    text = _text_of(file)
    try:
        entries = json.loads(text)["train"]["data"]
        assert all(isinstance(entry["impath"], str) and isinstance(entry["classname"], str) for entry in entries)
    except (ValueError, KeyError, TypeError, AssertionError):
        raise DataError(
            f'{file} is no list of shots: expected {{"train": {{"data": [{{"impath", "label", "classname"}}, …]}}}}.'
        ) from None
    return list(entries)


def _text_of(file: Path) -> str:
    return read_text(file, "the list of shots")
