"""Which images are copies of others: of the same bytes, or of the same decoded pixels (a JPEG saved as BMP)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torchvision.transforms.functional import pil_to_tensor

from clipfit.data.images import content_hash, decode, header_size, pixel_hash
from clipfit.data.layout import Sample
from clipfit.errors import DataError

Size = tuple[int, int]  # pixels, short side first


@dataclass(frozen=True)
class Fingerprint:
    """What tells an image from others: SHA-256 of its file, SHA-256 of its pixels, its sides (short one first)."""

    sha256: str
    pixels: str
    size: Size


def fingerprint(sample: Sample, image: torch.Tensor) -> Fingerprint:
    """Of a sample that decodes to `image`: (3, H, W) uint8."""
    short, long = sorted(image.shape[1:])
    return Fingerprint(content_hash(sample.path), pixel_hash(image), (short, long))


@dataclass(frozen=True)
class Known:
    """Images to recognise: hashes of their files, of their pixels, and their sizes."""

    files: frozenset[str]
    pixels: frozenset[str]
    sizes: frozenset[Size]

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]]) -> Known:
        """From the lines of a run's shots.jsonl; those of older runs have hashes of files alone."""
        lines = list(records)
        with_pixels = [line for line in lines if "pixels" in line]
        return cls(
            files=frozenset(line["sha256"] for line in lines),
            pixels=frozenset(line["pixels"] for line in with_pixels),
            sizes=frozenset((min(line["size"]), max(line["size"])) for line in with_pixels),
        )

    def __contains__(self, identity: Identity) -> bool:
        return identity.file in self.files or identity.content in self.pixels


@dataclass(frozen=True)
class Identity:
    """`content` is the same for copies among the images that were identified together, and for those of known ones."""

    file: str
    content: str


def identify(samples: Sequence[Sample], known: Known, grey_bits: int | None) -> list[Identity]:
    """Who is who. An image is decoded only where another one, or a known one, has its size; one that cannot be read
    is told by its file, a missing one by its path."""
    with ThreadPoolExecutor(4) as pool:
        files = list(pool.map(_file_hash, samples))
        first = first_of_each(files)
        sizes = dict(zip(first, pool.map(lambda i: header_size(samples[i].path), first), strict=True))
        of_size: dict[Size | None, list[int]] = defaultdict(list)
        for i, size in sizes.items():
            of_size[size].append(i)
        alike = [i for size, them in of_size.items() if size and (len(them) > 1 or size in known.sizes) for i in them]
        pixels = dict(zip(alike, pool.map(lambda i: _pixels(samples[i], grey_bits), alike), strict=True))
    content = {files[i]: pixels.get(i) or files[i] for i in first}
    return [Identity(file, content[file]) for file in files]


def first_of_each(keys: Sequence[Hashable]) -> list[int]:
    """The index of the first occurrence of every key, in order."""
    first: dict[Hashable, int] = {}
    for i, key in enumerate(keys):
        first.setdefault(key, i)
    return list(first.values())


def _file_hash(sample: Sample) -> str:
    return content_hash(sample.path) if sample.path.is_file() else str(sample.path)


def _pixels(sample: Sample, grey_bits: int | None) -> str | None:
    try:
        return pixel_hash(pil_to_tensor(decode(sample.path, grey_bits)))
    except DataError:
        return None
