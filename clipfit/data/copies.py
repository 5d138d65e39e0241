"""Which images are copies of others: of the same bytes, or of the same decoded pixels (a JPEG saved as BMP)."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from clipfit import ranks
from clipfit.data.ahead import ahead, cores
from clipfit.data.images import content_hash, decode, header_size, pixel_hash
from clipfit.data.layout import Sample
from clipfit.errors import DataError
from clipfit.ranks import Ranks

T = TypeVar("T")
Size = tuple[int, int]  # pixels, short side first
Keep = Callable[[Sample, Image.Image], None]


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


def identify(
    samples: Sequence[Sample], known: Known, grey_bits: int | None, keep: Keep | None = None, shared: bool = False
) -> list[Identity]:
    """Who is who. An image is decoded only where another one, or a known one, has its size; one that cannot be decoded
    is told by its file, a file that cannot be read by its path.

    Args:
        keep: is given what is decoded, in threads. shared: several processes share the work; all are told all of it.
    """
    headers = _found(samples, lambda sample: (_file_hash(sample), header_size(sample.path)), shared)
    files = [file for file, _ in headers]
    first = first_of_each(files)
    of_size: dict[Size | None, list[int]] = defaultdict(list)
    for i in first:
        size = headers[i][1]
        of_size[(size[0], size[1]) if size else None].append(i)
    known_or_many = (them for size, them in of_size.items() if size and (len(them) > 1 or size in known.sizes))
    alike = sorted(itertools.chain.from_iterable(known_or_many))
    hashes = _found([samples[i] for i in alike], lambda sample: _pixels(sample, grey_bits, keep), shared)
    pixels = dict(zip(alike, hashes, strict=True))
    content = {files[i]: pixels.get(i) or files[i] for i in first}
    return [Identity(file, content[file]) for file in files]


def _found(samples: Sequence[Sample], find: Callable[[Sample], T], shared: bool) -> list[T]:
    """What is found of each, of JSON's types, in threads."""
    here = ranks.here() if shared else Ranks()
    share = here.share(len(samples))
    with contextlib.closing(ahead(samples[share.start : share.stop], find, 2 * cores())) as finding:
        own = [found for _, found in finding]
    if here.count == 1:
        return own
    return [found for part in here.all_told(json.dumps(own)) for found in json.loads(part)]


def first_of_each(keys: Sequence[Hashable]) -> list[int]:
    """The index of the first occurrence of every key, in order."""
    first: dict[Hashable, int] = {}
    for i, key in enumerate(keys):
        first.setdefault(key, i)
    return list(first.values())


def _file_hash(sample: Sample) -> str:
    try:
        return content_hash(sample.path)
    except DataError:
        return str(sample.path)


def _pixels(sample: Sample, grey_bits: int | None, keep: Keep | None) -> str | None:
    try:
        picture = decode(sample.path, grey_bits)
    except DataError:
        return None
    if keep:
        keep(sample, picture)
    return pixel_hash(pil_to_tensor(picture))
