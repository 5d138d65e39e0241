"""Every random number from one seed: a stream for each purpose and index, so that any part of the work draws its own.

numpy's SeedSequence mixes the seed with the purpose and the index; the streams are independent of one another and of
the order in which they are used. No stream is ever continued: what has an index of its own has a stream of its own,
hence nothing of a generator's state needs to be saved.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
import torch

# the place in this list is part of every stream: append, never reorder
PURPOSES = ("order", "crop", "adapters", "image dropout", "text dropout", "balance", "folds", "episodes")


def stream_seed(seed: int, purpose: str, *index: int) -> int:
    """The seed of a stream: a 63-bit integer."""
    sequence = np.random.SeedSequence(seed, spawn_key=(PURPOSES.index(purpose), *index))
    return int(sequence.generate_state(1, np.uint64)[0]) >> 1


def generator(seed: int, purpose: str, *index: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator at the start of a stream, for example ("crop", epoch, view)."""
    return torch.Generator(device).manual_seed(stream_seed(seed, purpose, *index))


class Rows(NamedTuple):
    """Which rows of a step's work a tensor holds: images by view, or texts by class. Streams go by these numbers."""

    step: int
    numbers: tuple[int, ...]

    def of(self, places: range) -> Rows:
        """Those at the given places."""
        return Rows(self.step, tuple(self.numbers[place] for place in places))

    def split(self, size: int | None) -> list[Rows]:
        """Parts of at most `size` rows, as even as they go; one part where it is None."""
        count = len(self.numbers)
        parts = 1 if size is None else math.ceil(count / size)
        ends = [count * part // parts for part in range(parts + 1)]
        return [Rows(self.step, self.numbers[a:b]) for a, b in itertools.pairwise(ends)]
