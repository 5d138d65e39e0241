"""The cells of a plan: each is one adaptation, or zero-shot CLIP, and one file, which is written once."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from clipfit.config.plan import Plan
from clipfit.errors import ModelError
from clipfit.model.weights import state_sha256
from clipfit.runs import files

FOLDER = "cells"
MOST = 100  # bytes of a cell's name that are names of the plan: file systems take 255 with all that stands around them


@dataclass(frozen=True)
class Cell:
    """A row of the tables on a set, at a number of shots (None: all) and a seed, or in an episode of that number.

    Zero-shot CLIP has no shots; but for episodes, no seed.
    """

    set: str
    method: str
    shots: int | None
    seed: int | None

    @property
    def text(self) -> str:
        """How a person is told of it."""
        parts = [self.set, self.method]
        parts += [f"{self.shots}-shot"] if self.shots is not None else []
        parts += [f"seed {self.seed}"] if self.seed is not None else []
        return ", ".join(parts)

    def file(self, output: Path, identity: str) -> Path:
        """Where it is kept: by its name, and by all that its result depends on. A long name is cut, never the seed."""
        name = re.sub(r"[^\w+=.,-]", "-", f"{self.set}--{self.method}").encode()[:MOST].decode("utf-8", "ignore")
        drawn = [f"{'all' if self.shots is None else self.shots}-shot"]
        drawn += [f"{self.seed:05d}"] if self.seed is not None else []
        return output / FOLDER / f"{name}--{'--'.join(drawn)}--{identity}.safetensors"


def cells_of(plan: Plan, zero_shot: frozenset[str]) -> list[Cell]:
    """Every cell, those that share test images one after another. `zero_shot`: the rows that adapt nothing."""
    found = []
    for name, seed in itertools.product(plan.sets, seeds_of(plan)):
        for shots, method in itertools.product(plan.shots or (None,), plan.methods):
            plain = method in zero_shot
            found.append(Cell(name, method, None if plain else shots, seed if in_episodes(plan) or not plain else None))
    return list(dict.fromkeys(found))


def seeds_of(plan: Plan) -> tuple[int, ...]:
    """The seeds; of episodes their numbers."""
    return tuple(range(plan.episodes)) if in_episodes(plan) else plan.seeds


def in_episodes(plan: Plan) -> bool:
    """Whether what is trained on and measured on is drawn anew for each seed."""
    return plan.protocol == "episodes"


def identity_of(facts: Mapping[str, Any]) -> str:
    """Twelve digits for all that a result depends on."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


@dataclass(frozen=True)
class Result:
    """What a cell measured, image by image.

    labels: column → the number of each image's class, (n,) int32. predicted: α → column → that of the class given.
    """

    images: int  # trained on
    labels: Mapping[str, torch.Tensor]
    predicted: Mapping[float, Mapping[str, torch.Tensor]]

    def right(self, alpha: float, figure: str) -> list[bool]:
        """Of every image of a column whether it was named rightly."""
        return [bool(right) for right in self.predicted[alpha][figure] == self.labels[figure]]

    def accuracy(self, alpha: float, figure: str) -> float:
        """The share of images named rightly."""
        return float((self.predicted[alpha][figure] == self.labels[figure]).double().mean())

    def write(self, file: Path, about: Mapping[str, Any]) -> None:
        """Complete or not at all. Raises OutputError."""
        tensors = {f"labels/{figure}": values for figure, values in self.labels.items()}
        for alpha, columns in self.predicted.items():
            tensors |= {f"predicted/{alpha:g}/{figure}": values for figure, values in columns.items()}
        files.write_tensors(file, tensors, {**about, "images": self.images, "sha256": state_sha256(tensors)})

    @classmethod
    def read(cls, file: Path) -> Result:
        """Raises ModelError for a file that is damaged."""
        try:
            tensors, about = files.read_tensors(file)
        except ModelError:
            tensors, about = {}, {}
        if about.get("sha256") != state_sha256(tensors):  # a flipped bit is another class, which no one would notice
            raise ModelError(f"the cell {file} is damaged: delete it, and the same command does it again.")
        labels: dict[str, torch.Tensor] = {}
        predicted: dict[float, dict[str, torch.Tensor]] = {}
        for name, values in tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "labels":
                labels[rest] = values
            else:
                alpha, _, figure = rest.partition("/")
                predicted.setdefault(float(alpha), {})[figure] = values
        return cls(about["images"], labels, predicted)


@contextlib.contextmanager
def claimed(file: Path) -> Iterator[bool]:
    """Within: whether this process is the one to make the file. Not where it is there, or another process makes it."""
    lock = FileLock(file.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield not file.exists()
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # who opened it meanwhile makes, at worst, the same file again
        lock.release()


@contextlib.contextmanager
def alone(output: Path) -> Iterator[None]:
    """Within: no other process writes the tables; waits for one that does."""
    with FileLock(output / ".tables.lock"):
        yield
