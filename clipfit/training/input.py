"""Which images every step sees, and how: order and crops from streams of their own, in no generator's state."""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import torch

from clipfit import ranks, streams
from clipfit.config import Recipe
from clipfit.data import augment
from clipfit.data.ahead import ahead
from clipfit.data.images import Images

AHEAD = 2  # batches
TOGETHER = 8  # crops that a thread copies for a GPU: one alone takes less time than it takes to hand it over
CPU = torch.device("cpu")


class Input(NamedTuple):
    """What a step is given."""

    step: int  # from 0
    epoch: int  # from 0
    views: Sequence[int]
    own: range  # the places among the views that this process cuts
    crops: torch.Tensor  # (B, 3, H, W) uint8, of those alone; on the model's device where it is a GPU


class Early:
    """Inputs, of which the next one can be made before it is asked for; what goes wrong then is raised in its turn."""

    def __init__(self, inputs: Iterator[Input]):
        self._inputs = inputs
        self._ready: list[Input | Exception] = []

    def __iter__(self) -> Iterator[Input]:
        return self

    def __next__(self) -> Input:
        self.prepare()
        found = self._ready.pop()
        if isinstance(found, Exception):
            raise found
        return found

    def prepare(self) -> None:
        """Make the next one ready, if none is."""
        if not self._ready:
            try:
                self._ready.append(next(self._inputs))
            except Exception as error:  # that there are no more, too
                self._ready.append(error)


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
        members = self._members
        views = len(members) * max(map(len, members.values())) if self.balance else len(self.labels)
        return math.ceil(views / self.recipe.batch_size)

    @functools.cached_property
    def _members(self) -> Mapping[int, Sequence[int]]:
        """The images of each label."""
        members: dict[int, list[int]] = defaultdict(list)
        for image, label in enumerate(self.labels):
            members[label].append(image)
        return members

    def batches(self, first: int = 0) -> Iterator[tuple[int, list[int]]]:
        """Of every step, from `first` on (from 0): its epoch, from 0, and its views."""
        epoch, steps_before = divmod(first, self._steps_an_epoch)
        steps = ((e, views) for e in range(epoch, self.recipe.epochs) for views in self._epoch(e))
        return itertools.islice(steps, steps_before, None)

    def _epoch(self, epoch: int) -> list[list[int]]:
        """The views of each of its steps."""
        views = self._views(epoch)
        order = torch.randperm(len(views), generator=streams.generator(self.seed, "order", epoch))
        return [[views[i] for i in part.tolist()] for part in order.tensor_split(self._steps_an_epoch)]

    def _views(self, epoch: int) -> list[int]:
        count = len(self.labels)
        if not self.balance:
            return list(range(count))
        most = max(map(len, self._members.values()))
        views: list[int] = []
        for label, images in self._members.items():
            rounds, rest = divmod(most, len(images))
            views += [image + count * repetition for repetition in range(rounds) for image in images]
            drawn = torch.randperm(len(images), generator=streams.generator(self.seed, "balance", epoch, label))
            views += [images[i] + count * rounds for i in drawn[:rest].tolist()]
        return views

    def crop(self, images: Images, epoch: int, view: int, size: tuple[int, int]) -> torch.Tensor:
        """A random resized crop of the image of a view, from a stream of its own: (3, H, W) uint8."""
        return augment.resized(self._cut(images, epoch, view), size)

    def _cut(self, images: Images, epoch: int, view: int) -> torch.Tensor:
        """The crop before it is resized: (3, h, w) uint8."""
        own = streams.generator(self.seed, "crop", epoch, view)
        image = images[view % len(images)]
        return augment.random_crop(image, self.recipe.crop_scale, self.recipe.crop_ratio, own)

    def inputs(
        self, images: Images, size: tuple[int, int], first: int = 0, device: torch.device = CPU
    ) -> Generator[Input, None, None]:
        """What steps from `first` on are given, in order; read and cut in threads while the caller takes a step.

        Two batches are cut ahead. To be closed where it is left before its end.

        Args:
            size: of crops, (H, W). device: where the model is. A GPU resizes the crops itself, from memory that it
                copies from without being waited for.

        Raises:
            DataError: an image that is read again cannot be; in the step that needs it.
        """

        here, on_gpu = ranks.here(), device.type == "cuda"
        at_once = TOGETHER if on_gpu else 1

        def listed() -> Iterator[tuple[int, list[int], list[int]]]:
            for epoch, views in self.batches(first):
                own = [views[row] for row in here.computed(len(views))]
                yield from ((epoch, views, own[k : k + at_once]) for k in range(0, len(own), at_once))

        def cut(item: tuple[int, list[int], list[int]]) -> list[torch.Tensor]:
            epoch, _, some = item
            if on_gpu:
                return [self._cut(images, epoch, view).contiguous() for view in some]
            return [self.crop(images, epoch, view, size) for view in some]

        crops: list[torch.Tensor] = []
        steps = itertools.count(first)
        most = math.ceil(AHEAD * here.most(self.recipe.batch_size) / at_once)
        with closing(ahead(listed(), cut, most)) as found:
            for (epoch, views, _), some in found:
                crops += some
                own = here.computed(len(views))
                if len(crops) == len(own):
                    joined = augment.resized_on(device, crops, size) if on_gpu else torch.stack(crops)
                    yield Input(next(steps), epoch, views, own, joined)
                    crops = []
