"""What an objective is given at every step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from clipfit.streams import Rows


@dataclass(frozen=True)
class Batch:
    """B images with their labels, and which U of the C classes are among them (known before anything is computed).

    image_rows, present_rows: what random numbers of the images and of the present classes' texts go by.
    own: which of the B images are in `images`: among several processes each has its share, and the labels of all.
    """

    images: torch.Tensor  # (B, 3, H, W) float32, normalised; of `own` alone
    labels: torch.Tensor  # (B,) int64 in [0, C)
    present: torch.Tensor  # (U,) int64: the distinct labels, ascending
    classes: torch.Tensor  # (B,) int64 in [0, U): each label's place in `present`
    counts: torch.Tensor  # (U,) int64: images of each class in `present`
    image_rows: Rows
    present_rows: Rows
    own: range

    @classmethod
    def of(cls, images: torch.Tensor, labels: Sequence[int], rows: Rows, own: range | None = None) -> Batch:
        """A batch on the images' device; labels and `rows` are those of all images, `own` (None: all) those here."""
        counts = sorted(Counter(labels).items())
        place = {label: position for position, (label, _) in enumerate(counts)}

        def tensor(values: Sequence[int]) -> torch.Tensor:
            return torch.tensor(values).to(images.device, non_blocking=True)

        return cls(
            images, tensor(labels), tensor([label for label, _ in counts]), tensor([place[label] for label in labels]),
            tensor([count for _, count in counts]), rows, Rows(rows.step, tuple(place)),
            range(len(labels)) if own is None else own,
        )  # fmt: skip

    def split(self, size: int | None) -> list[Batch]:
        """Parts of the images that are here, of at most `size`, as even as they go; None: one part.

        `present` stays that of the whole.
        """
        if len(self.own) == len(self.labels) and (size is None or size >= len(self.own)):
            return [self]
        rows = self.image_rows.of(self.own).split(size)
        sizes = [len(part.numbers) for part in rows]
        here = slice(self.own.start, self.own.stop)
        columns = (tensor.split(sizes) for tensor in (self.images, self.labels[here], self.classes[here]))
        return [
            replace(self, images=images, labels=labels, classes=classes, image_rows=part, own=range(len(labels)))
            for images, labels, classes, part in zip(*columns, rows, strict=True)
        ]

    def text_rows(self, classes: int) -> Rows:
        """Of the texts of all C classes."""
        return Rows(self.image_rows.step, tuple(range(classes)))
