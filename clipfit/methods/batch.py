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
    """

    images: torch.Tensor  # (B, 3, H, W) float32, normalised
    labels: torch.Tensor  # (B,) int64 in [0, C)
    present: torch.Tensor  # (U,) int64: the distinct labels, ascending
    classes: torch.Tensor  # (B,) int64 in [0, U): each label's place in `present`
    counts: torch.Tensor  # (U,) int64: images of each class in `present`
    image_rows: Rows
    present_rows: Rows

    @classmethod
    def of(cls, images: torch.Tensor, labels: Sequence[int], rows: Rows) -> Batch:
        """A batch on the images' device; `rows` are the images'."""
        counts = sorted(Counter(labels).items())
        place = {label: position for position, (label, _) in enumerate(counts)}

        def tensor(values: Sequence[int]) -> torch.Tensor:
            return torch.tensor(values).to(images.device, non_blocking=True)

        return cls(
            images, tensor(labels), tensor([label for label, _ in counts]), tensor([place[label] for label in labels]),
            tensor([count for _, count in counts]), rows, Rows(rows.step, tuple(place)),
        )  # fmt: skip

    def split(self, size: int | None) -> list[Batch]:
        """Parts of at most `size` images, as even as they go; `present` stays that of the whole. None: one part."""
        count = len(self.labels)
        if size is None or size >= count:
            return [self]
        rows = self.image_rows.split(size)
        sizes = [len(part.numbers) for part in rows]
        columns = (tensor.split(sizes) for tensor in (self.images, self.labels, self.classes))
        return [
            replace(self, images=images, labels=labels, classes=classes, image_rows=part)
            for images, labels, classes, part in zip(*columns, rows, strict=True)
        ]

    def text_rows(self, classes: int) -> Rows:
        """Of the texts of all C classes."""
        return Rows(self.image_rows.step, tuple(range(classes)))
