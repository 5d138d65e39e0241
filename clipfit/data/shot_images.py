"""The pictures of shots: what training cuts its crops out of, and what everything that measures sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from clipfit.data.augment import Enough
from clipfit.data.copies import Fingerprint, fingerprint
from clipfit.data.images import Geometry, Memory, decode, decoded, readable
from clipfit.data.layout import Sample


class _Seen(NamedTuple):
    """Of one file, read once."""

    print: Fingerprint
    image: torch.Tensor
    view: torch.Tensor | None  # of a picture that is kept reduced


class ShotImages:
    """What training cuts: image i, (3, H, W) uint8; whole, or what is `enough` of a large photograph.

    It follows from the file, the model's size and the recipe's crops alone: beyond the budget it is read again, to the
    same pixels. `views` is what measuring sees: every picture whole, in the model's geometry.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        memory: Memory,
        geometry: Geometry,
        enough: Enough,
        skip_bad: bool = False,
        grey_bits: int | None = None,
    ):
        """Reads them all. `memory`: for what is kept. Raises DataError for one that is not to be left out."""
        self.memory = memory
        self._geometry, self._enough, self._grey_bits = geometry, enough, grey_bits
        self._kept: dict[int, torch.Tensor] = {}
        self._views: dict[int, torch.Tensor] = {}
        self.samples: list[Sample] = []
        self.prints: list[Fingerprint] = []
        self.skipped: list[str] = []
        self.views = _Views(self)
        for index, (sample, seen) in enumerate(readable(samples, self._see, skip_bad, self.skipped)):
            self.samples.append(sample)
            self.prints.append(seen.print)
            if memory.takes(seen.image):
                self._kept[index] = seen.image
            if seen.view is not None and memory.takes(seen.view):
                self._views[index] = seen.view

    def _see(self, sample: Sample) -> _Seen:
        picture = decode(sample.path, self._grey_bits)
        whole = pil_to_tensor(picture)
        found = fingerprint(sample, whole)
        if self._stays_whole(found):
            return _Seen(found, whole, None)
        return _Seen(found, self._reduced(sample), self._geometry(picture))

    def _stays_whole(self, found: Fingerprint) -> bool:
        return self._enough.of_larger(*found.size) is None

    def _reduced(self, sample: Sample) -> torch.Tensor:
        return decoded(sample, self._grey_bits, self._enough)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> torch.Tensor:
        """What training sees of shot `index`. Raises DataError where it is read again and cannot be."""
        kept = self._kept.get(index)
        if kept is not None:
            return kept
        if self._stays_whole(self.prints[index]):
            return decoded(self.samples[index], self._grey_bits)
        return self._reduced(self.samples[index])

    def view(self, index: int) -> torch.Tensor:
        """Shot `index` in the model's geometry, from all of its pixels: uint8. Raises DataError as above."""
        if index in self._views:
            return self._views[index]
        if index in self._kept and self._stays_whole(self.prints[index]):
            return self._geometry(to_pil_image(self._kept[index]))
        return self._geometry(decode(self.samples[index].path, self._grey_bits))


class _Views:
    """Every shot as measuring sees it."""

    def __init__(self, images: ShotImages):
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._images.view(index)
