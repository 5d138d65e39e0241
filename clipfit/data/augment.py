"""The training view of an image: a random resized crop, nothing else (CLIP-CITE, arXiv 2407.04003)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

Box = tuple[int, int, int, int]
AT_ONCE = 2**25  # bytes of crops that a GPU is given in one piece


@dataclass(frozen=True)
class Enough:
    """How much of a picture crops can show: of more pixels than that even the smallest crop is an average.

    `area`: pixels at which the smallest crop is not enlarged. `side`: the least that the short side must have for it.
    """

    area: float
    side: int

    @classmethod
    def of(cls, size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]) -> Enough:
        """For random resized crops to `size`, (H, W).

        A crop of share s and ratio r of a picture of A pixels is √(s·A·r) wide and √(s·A/r) high.
        """
        height, width = size
        return cls(max(width**2 / ratio[0], height**2 * ratio[1]) / scale[0], max(size))

    def of_larger(self, width: int, height: int) -> tuple[int, int] | None:
        """The sides to which a picture is reduced, in the same order; None: it stays whole.

        That is where its sides are up to twice what is enough: small pictures keep their very pixels.
        """
        share = max(math.sqrt(self.area / (width * height)), self.side / min(width, height))
        return None if share >= 1 / 2 else (_ceil(width * share), _ceil(height * share))


def _ceil(side: float) -> int:
    """Without the rounding that makes 1050·(224/1050) more than 224."""
    return math.ceil(side - 1e-6)


def crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], generator: torch.Generator
) -> Box:
    """A random crop (top, left, height, width) as torchvision's RandomResizedCrop draws it, from our own generator.

    The area's share is uniform in `scale`, the aspect ratio log-uniform in `ratio`; after ten crops that do not fit,
    the largest centred one whose ratio does.
    """

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    for _ in range(10):
        area = height * width * uniform(*scale)
        aspect = math.exp(uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(height - h + 1, (), generator=generator))
            left = int(torch.randint(width - w + 1, (), generator=generator))
            return top, left, h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = (width, round(width / aspect)) if width / height < aspect else (round(height * aspect), height)
    w, h = max(1, min(w, width)), max(1, min(h, height))
    return (height - h) // 2, (width - w) // 2, h, w


def random_crop(
    image: torch.Tensor, scale: tuple[float, float], ratio: tuple[float, float], generator: torch.Generator
) -> torch.Tensor:
    """(3, H, W) → what of it a random box shows: (3, h, w), a view."""
    top, left, height, width = crop_box(image.shape[1], image.shape[2], scale, ratio, generator)
    return image[:, top : top + height, left : left + width]


def resized(crop: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(3, h, w) uint8 → (3, *size) uint8, bicubic with antialiasing."""
    return resize(crop, list(size), InterpolationMode.BICUBIC, antialias=True)


def resized_on(device: torch.device, crops: Sequence[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
    """Crops (3, h, w) uint8 of sides of their own → (B, 3, *size) uint8 on a GPU, without waiting for it.

    It rounds as the device does: a pixel may be one of 255 away from what `resized` makes of it.
    """
    parts = [_resized_together(device, some, size) for some in _in_parts(crops)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _resized_together(device: torch.device, crops: Sequence[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
    # in one piece, for each operation has its price; pinned now, for of batches to come memory need not be locked
    pixels = [crop.numel() for crop in crops]
    given = torch.empty(sum(pixels), dtype=torch.uint8, pin_memory=device.type == "cuda")
    # by numpy, in this thread: torch would share it with others, which wait for those that cut
    np.concatenate([crop.numpy().reshape(-1) for crop in crops], out=given.numpy())
    there = given.to(device, non_blocking=True).float().split(pixels)
    joined = torch.empty(len(crops), 3, *size, device=device)
    for place, crop, flat in zip(joined, crops, there, strict=True):
        place.copy_(F.interpolate(flat.view(1, *crop.shape), size, mode="bicubic", antialias=True)[0])
    return joined.round_().clamp_(0, 255).to(torch.uint8)


def _in_parts(crops: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Of few bytes, in order: beside a step a GPU has little memory left."""
    part: list[torch.Tensor] = []
    for crop in crops:
        if part and sum(map(torch.numel, part)) + crop.numel() > AT_ONCE:
            yield part
            part = []
        part.append(crop)
    yield part
