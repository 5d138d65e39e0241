"""Which images every step sees, and how: order and crops from streams of their own, in no generator's state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from clipfit import streams
from clipfit.config import Recipe
from clipfit.data.augment import random_resized_crop
from clipfit.data.images import Images


def batches(count: int, recipe: Recipe, seed: int) -> Iterator[tuple[int, list[int]]]:
    """(epoch from 0, indices of a batch): every image once an epoch, in an order of its own each epoch."""
    for epoch in range(recipe.epochs):
        order = torch.randperm(count, generator=streams.generator(seed, "order", epoch)).tolist()
        for start in range(0, count, recipe.batch_size):
            yield epoch, order[start : start + recipe.batch_size]


def crops(
    images: Images, chosen: Sequence[int], size: tuple[int, int], recipe: Recipe, seed: int, epoch: int
) -> torch.Tensor:
    """Random resized crops of the chosen images, each from its own stream of the epoch: (B, 3, H, W) uint8."""
    return torch.stack([
        random_resized_crop(
            images[i], size, recipe.crop_scale, recipe.crop_ratio, streams.generator(seed, "crop", epoch, i)
        )
        for i in chosen
    ])  # fmt: skip
