"""Which images every step sees, and how: order and crops from streams of their own, in no generator's state."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clipfit import streams
from clipfit.config import Recipe
from clipfit.data.augment import random_resized_crop
from clipfit.data.images import Images


@dataclass(frozen=True)
class Schedule:
    """The views of every step; view v of n images is image v mod n, seen for the (v div n)-th time in its epoch.

    An epoch shows every image once, in an order of its own. `balance`: as many views of every class as the largest has
    images, so that images of smaller classes come again; which of them once more than others is drawn anew each epoch.

    Batches are of even size (33 images in batches of at most 32: 17 and 16), for AdamW takes nearly a full step from a
    batch of one.
    """

    labels: Sequence[int]
    recipe: Recipe
    seed: int
    balance: bool = False

    @property
    def steps(self) -> int:
        """Of the whole training."""
        return self.recipe.epochs * self._steps_an_epoch

    @property
    def _steps_an_epoch(self) -> int:
        return math.ceil(len(self._views(0)) / self.recipe.batch_size)

    def step(self, number: int) -> tuple[int, list[int]]:
        """Of step `number`, from 0: its epoch, from 0, and its views."""
        epoch, place = divmod(number, self._steps_an_epoch)
        views = self._views(epoch)
        order = torch.randperm(len(views), generator=streams.generator(self.seed, "order", epoch))
        return epoch, [views[i] for i in order.tensor_split(self._steps_an_epoch)[place].tolist()]

    def _views(self, epoch: int) -> list[int]:
        count = len(self.labels)
        if not self.balance:
            return list(range(count))
        members: dict[int, list[int]] = defaultdict(list)
        for image, label in enumerate(self.labels):
            members[label].append(image)
        most = max(map(len, members.values()))
        views: list[int] = []
        for label, images in members.items():
            rounds, rest = divmod(most, len(images))
            views += [image + count * repetition for repetition in range(rounds) for image in images]
            drawn = torch.randperm(len(images), generator=streams.generator(self.seed, "balance", epoch, label))
            views += [images[i] + count * rounds for i in drawn[:rest].tolist()]
        return views

    def crops(self, images: Images, epoch: int, views: Sequence[int], size: tuple[int, int]) -> torch.Tensor:
        """Random resized crops of the images of the views, each from its own stream: (B, 3, H, W) uint8."""
        scale, ratio = self.recipe.crop_scale, self.recipe.crop_ratio
        own = ((view % len(images), streams.generator(self.seed, "crop", epoch, view)) for view in views)
        return torch.stack([random_resized_crop(images[i], size, scale, ratio, stream) for i, stream in own])
