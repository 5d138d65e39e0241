"""The shots that an adaptation is given: drawn, decoded and checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from clipfit.config import AdaptConfig
from clipfit.data import layout
from clipfit.data.augment import Enough
from clipfit.data.copies import Fingerprint, Known, fingerprint, first_of_each, identify
from clipfit.data.images import Geometry, ImageStore, Memory, Views, decode, grey_bits
from clipfit.data.layout import Sample
from clipfit.data.shot_images import ShotImages
from clipfit.data.shots import Selection, select
from clipfit.errors import DataError


@dataclass(frozen=True)
class ShotFiles:
    """Which images are shots, before any but those that a draw asked for is decoded."""

    selection: Selection
    names: Mapping[str, str]  # folder → name of the base classes
    unreadable: tuple[str, ...]  # passed over in the draw
    notes: tuple[str, ...]  # sentences for the user
    val: tuple[Sample, ...] = ()  # of the shots' classes, to choose α on

    @classmethod
    def of(cls, config: AdaptConfig) -> ShotFiles:
        """Draw them. No held-out image is opened. Raises DataError or UsageError."""
        found = layout.read(config.shots, config.classes, config.image_root)
        unreadable: list[str] = []

        def readable(sample: Sample) -> bool:
            try:
                decode(sample.path)
            except DataError:
                unreadable.append(sample.source)
                return False
            return True

        def every(_sample: Sample) -> bool:
            return True

        usable = readable if config.skip_bad_images else every
        selection = select(found, config.shots_per_class, config.seed, usable, config.balance)
        notes = (*found.notes, *selection.notes)
        val = tuple(sample for sample in found.val or () if sample.label in selection.base)
        return cls(selection, found.names_of(selection.base), tuple(unreadable), notes, val)

    @property
    def counts(self) -> list[int]:
        """Shots of each class."""
        return list(Counter(sample.label for sample in self.selection.shots).values())


@dataclass(frozen=True)
class Shots:
    """Decoded shots: image i is of class `base[labels[i]]`."""

    images: ShotImages
    labels: tuple[int, ...]
    base: tuple[str, ...]
    names: Mapping[str, str]  # folder → name of the base classes
    prints: tuple[Fingerprint, ...]
    skipped: tuple[str, ...]
    grey_bits: int | None  # of all 16-bit greys among them

    @classmethod
    def of(
        cls,
        chosen: ShotFiles,
        config: AdaptConfig,
        geometry: Geometry,
        enough: Enough,
    ) -> Shots:
        """Decode and check them.

        Args:
            geometry: a picture as the model wants it. enough: what training needs of one.

        Raises:
            DataError: an image cannot be read (unless such are skipped), a class is left without any, or an image has
                two labels.
        """
        base = chosen.selection.base
        bits = grey_bits(chosen.selection.shots)
        memory = Memory(config.cache_bytes)
        images = ShotImages(chosen.selection.shots, memory, geometry, enough, config.skip_bad_images, bits)
        left = {sample.label for sample in images.samples}
        if gone := [name for name in base if name not in left]:
            raise DataError(f"no readable image is left of class {gone[0]!r}: replace its broken images.")
        prints = tuple(images.prints)
        _require_one_label_each(images.samples, prints)
        place = {name: i for i, name in enumerate(base)}
        labels = tuple(place[sample.label] for sample in images.samples)
        skipped = (*images.skipped, *chosen.unreadable)
        return cls(images, labels, base, chosen.names, prints, skipped, bits)

    def __len__(self) -> int:
        return len(self.images)

    def unseen(self, samples: Sequence[Sample], geometry: Geometry, skip_bad: bool) -> Unseen | None:
        """Those of the samples that are no copies of shots, each once, cut to size; None where none is left.

        Raises:
            DataError: one cannot be read, unless such are skipped.
        """
        known, prints = Known.of(self.lines()), dict[Path, Fingerprint]()
        views = Views(geometry, self.grey_bits, self.images.memory)

        def keep(sample: Sample, picture: Image.Image) -> None:
            prints[sample.path] = fingerprint(sample, pil_to_tensor(picture))
            views.keep(sample, picture)

        def view(sample: Sample) -> torch.Tensor:
            if sample.path not in prints:
                keep(sample, decode(sample.path, self.grey_bits))
            return views.read(sample)

        identities = identify(samples, known, self.grey_bits, keep)
        others = [i for i, identity in enumerate(identities) if identity not in known]
        distinct = first_of_each([(identities[i].content, samples[i].label) for i in others])
        fresh = [samples[others[k]] for k in distinct]
        store = ImageStore(fresh, self.images.memory, view, skip_bad)
        views.forget()  # those of copies
        return Unseen(store, tuple(prints[sample.path] for sample in store.samples)) if len(store) else None

    def lines(self) -> list[dict[str, Any]]:
        """What shots.jsonl says of each."""
        return _lines(self.images.samples, self.prints)


@dataclass(frozen=True)
class Unseen:
    """Images that are no shots, each once, in a model's geometry."""

    images: ImageStore
    prints: tuple[Fingerprint, ...]

    def lines(self) -> list[dict[str, Any]]:
        """As those of shots.jsonl."""
        return _lines(self.images.samples, self.prints)


def _lines(samples: Sequence[Sample], prints: Sequence[Fingerprint]) -> list[dict[str, Any]]:
    return [
        {"path": sample.source, "class": sample.label, **asdict(found), "size": list(found.size)}
        for sample, found in zip(samples, prints, strict=True)
    ]


def _require_one_label_each(samples: Sequence[Sample], prints: Sequence[Fingerprint]) -> None:
    first: dict[str, Sample] = {}
    for sample, found in zip(samples, prints, strict=True):
        other = first.setdefault(found.pixels, sample)
        if other.label != sample.label:
            raise DataError(
                f"{other.source} ({other.label!r}) and {sample.source} ({sample.label!r}) are the same image: "
                "remove the one that is labelled wrongly."
            )
