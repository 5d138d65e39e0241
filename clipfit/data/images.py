"""Decoding: every mode Pillow reads becomes upright 8-bit RGB; decoded images are kept up to a budget."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import math
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms.functional import pil_to_tensor

from clipfit import ranks
from clipfit.data.ahead import ahead, cores
from clipfit.data.augment import Enough
from clipfit.data.files import FORMATS, HEIF_ADVICE, heif_is_installed, require_regular
from clipfit.data.layout import Sample
from clipfit.errors import DataError

T = TypeVar("T")
Geometry = Callable[[Image.Image], torch.Tensor]  # an RGB picture as a model wants it: (3, H, W) uint8
LONGEST = 500  # long side over short: models want the short side resized, and a longer picture would fill the memory


def decode(
    path: Path, grey_bits: int | None = None, data: bytes | None = None, enough: Enough | None = None
) -> Image.Image:
    """An image file as an upright RGB picture; transparency shows white, grey of more than 8 bits is scaled to 8.

    Args:
        data: the file's bytes where they are in memory (a member of an archive); `path` is then but its name.
        grey_bits: how many bits greys of more than 8 have; brighter values clip. Files do not say how many of their
            16 bits are used (12 of an X-ray, say): without it, an image's own brightest pixel decides.
        enough: what training needs of it: a larger picture is reduced to that, from JPEG's own scaled decoding, which
            costs less. None: every pixel.

    Raises:
        DataError: the file is missing, no regular file or no readable image, or has a picture that is too long.
    """
    with _opened(path, data) as image:
        sides = enough.of_larger(*image.size) if enough else None
        if sides and image.mode in ("L", "RGB"):
            image.draft(None, sides)  # an eighth, a quarter or half of its sides, not below these; JPEG alone has it
        image.load()
        picture = upright(image, grey_bits)
        if sides is None:
            return picture
        short, long = sorted(sides)
        turned = (short, long) if picture.width <= picture.height else (long, short)
        return picture.resize(turned, Image.Resampling.BICUBIC)


def upright(picture: Image.Image, grey_bits: int | None = None) -> Image.Image:
    """A picture of any mode as `decode` gives it: turned by its EXIF, 8-bit RGB."""
    return _rgb(ImageOps.exif_transpose(picture), grey_bits)


def grey_bits(samples: Iterable[Sample]) -> int | None:
    """The depth of greys of more than 8 bits: the even number of bits, at least 8, that holds the brightest pixel of
    all. None where there are no such images; those that cannot be read do not count."""
    return max(filter(None, (_own_bits(sample.path) for sample in samples)), default=None)


def header_size(path: Path) -> tuple[int, int] | None:
    """The sides of an image in pixels, short one first, without decoding it; None if it cannot be read."""
    try:
        with _opened(path) as image:
            return min(image.size), max(image.size)
    except DataError:
        return None


def content_hash(path: Path) -> str:
    """SHA-256 of the file, hexadecimal. Raises DataError for what is no regular file, or cannot be read."""
    require_regular(path, "image")
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"image {path} cannot be read ({error.strerror or error}).") from error


def pixel_hash(image: torch.Tensor) -> str:
    """SHA-256 over width, height and RGB bytes of an image (3, H, W) uint8, hexadecimal: the same for every file
    that decodes to the same picture."""
    rows = image.permute(1, 2, 0).contiguous()  # (H, W, 3)
    digest = hashlib.sha256(f"{rows.shape[1]}x{rows.shape[0]}:".encode())
    digest.update(rows.numpy().data)
    return digest.hexdigest()


def require_short(picture: Image.Image) -> None:
    """Raises ValueError for a picture so long that it would fill the memory, resized as a model wants it."""
    short, long = sorted(picture.size)
    if long > LONGEST * short:
        raise ValueError(f"{picture.width} x {picture.height} pixels are too long to resize")


@contextlib.contextmanager
def _opened(path: Path, data: bytes | None = None) -> Iterator[Image.Image]:
    """The file's header, read by a listed format's decoder alone. What decoders raise inside becomes a DataError."""
    if data is None:
        require_regular(path, "image")
    try:
        with Image.open(path if data is None else io.BytesIO(data), formats=_formats(heif_is_installed())) as image:
            # Pillow only warns of these; turning its warning into an error is not safe with several threads
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels are too many")
            require_short(image)
            yield image
    except UnidentifiedImageError as error:
        raise DataError(f"image {path} cannot be read: {_what_it_is(path, data)}.") from error
    except (OSError, SyntaxError, ValueError, ArithmeticError, EOFError, RuntimeError,
            Image.DecompressionBombError) as error:  # fmt: skip
        raise DataError(f"image {path} cannot be read ({error}).") from error


@functools.cache
def _formats(heif: bool) -> tuple[str, ...]:
    if heif:
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    names = (*FORMATS, "HEIF") if heif else FORMATS
    return tuple(name for name in names if name in Image.OPEN)  # older Pillows lack AVIF


def _what_it_is(path: Path, data: bytes | None) -> str:
    with path.open("rb") if data is None else io.BytesIO(data) as file:
        start = file.read(12)
    if start[4:8] == b"ftyp" and start[8:11] in (b"hei", b"hev", b"mif", b"msf") and not heif_is_installed():
        return f"it is HEIC inside; {HEIF_ADVICE}"
    return f"it is none of {', '.join(FORMATS)}"


def _is_deep_grey(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or image.mode in ("I", "F")


def _own_bits(path: Path) -> int | None:
    """The depth of one grey image of more than 8 bits; None of any other, and of shares of 1."""
    try:
        with _opened(path) as image:
            if not _is_deep_grey(image):
                return None
            values = np.asarray(image)
            return None if _are_shares(image, values) else _bits_for(values)
    except DataError:
        return None


def _are_shares(image: Image.Image, values: np.ndarray) -> bool:
    """Floating-point greys from 0 to 1."""
    return image.mode == "F" and 0 < values.max(initial=0) <= 1


def _bits_for(values: np.ndarray) -> int:
    """The even number of bits, at least 8, that holds the brightest. Raises ValueError for NaN, and an
    ArithmeticError for infinity."""
    return max(8, 2 * math.ceil(math.log2(max(float(values.max(initial=0)), 1) + 1) / 2))


def _rgb(image: Image.Image, grey_bits: int | None) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if _is_deep_grey(image):
        values = np.asarray(image, dtype=np.float64)
        own_bits = _bits_for(values)  # always: it refuses what is no number
        white = 1 if _are_shares(image, values) else 2 ** (grey_bits or own_bits) - 1
        return Image.fromarray((values * (255 / white)).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "La", "RGBa", "RGBA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        paper = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(paper, rgba).convert("RGB")
    return image.convert("RGB")


class Images(Protocol):
    """Numbered uint8 images (3, H, W)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> torch.Tensor: ...


class Chosen:
    """Some images of others, numbered anew."""

    def __init__(self, images: Images, chosen: Sequence[int]):
        self._images, self._chosen = images, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._images[self._chosen[index]]


class Held(Chosen):
    """Chosen images, each held from when it was asked for."""

    def __init__(self, images: Images, chosen: Sequence[int]):
        super().__init__(images, chosen)
        self._held: dict[int, torch.Tensor] = {}

    def __getitem__(self, index: int) -> torch.Tensor:
        if index not in self._held:
            self._held[index] = super().__getitem__(index)
        return self._held[index]


def readable(
    samples: Sequence[Sample], read: Callable[[Sample], T], skip_bad: bool | None, skipped: list[str]
) -> Iterator[tuple[Sample, T]]:
    """Samples with what is read of them, in order, in threads. Those that cannot be read are left out, and counted.

    Args:
        skip_bad: leave them out; None: never, and the user has no such choice. skipped: gets their sources.

    Raises:
        DataError: one cannot be read, and is not to be left out.
    """
    with contextlib.closing(_attempts(samples, read)) as found:
        for sample, result in found:
            if isinstance(result, tuple):
                yield sample, result[0]
            elif skip_bad:
                skipped.append(sample.source)
            else:
                choice = "" if skip_bad is None else " or pass --skip-bad-images"
                raise DataError(f"{str(result)[:-1]}: replace it{choice}.") from result


def _attempts(
    samples: Sequence[Sample], read: Callable[[Sample], T]
) -> Generator[tuple[Sample, tuple[T] | DataError], None, None]:
    def attempt(sample: Sample) -> tuple[T] | DataError:
        try:
            return (read(sample),)
        except DataError as error:
            return error

    return ahead(samples, attempt, 2 * cores())


class Memory:
    """Bytes for decoded images, wherever they are kept. From any thread."""

    def __init__(self, budget: int):
        self._left, self._counting = budget, threading.Lock()

    def takes(self, image: torch.Tensor) -> bool:
        """Whether it holds another image, which then counts."""
        with self._counting:
            fits = image.numel() <= self._left
            self._left -= image.numel() if fits else 0
        return fits

    def loses(self, image: torch.Tensor) -> None:
        """One that it took counts no longer."""
        with self._counting:
            self._left += image.numel()


class Views:
    """Images as a model sees them; what was decoded for another reason is kept, in bytes, until it is read."""

    def __init__(self, geometry: Geometry, grey_bits: int | None, memory: Memory | None = None):
        self.grey_bits = grey_bits
        self._geometry, self._memory = geometry, memory or Memory(0)
        self._kept: dict[Path, torch.Tensor] = {}

    def keep(self, sample: Sample, picture: Image.Image) -> None:
        """The picture is what `decode` gives of the sample at this depth of grey. From any thread."""
        view = self._geometry(picture)
        if self._memory.takes(view):
            self._kept[sample.path] = view

    def forget(self) -> None:
        """Keep none of them any longer."""
        while self._kept:
            self._memory.loses(self._kept.popitem()[1])

    def read(self, sample: Sample) -> torch.Tensor:
        """In the model's geometry: (3, H, W) uint8. From any thread. Raises DataError as `decode`."""
        view = self._kept.pop(sample.path, None)
        if view is None:
            return self._geometry(decode(sample.path, self.grey_bits))
        self._memory.loses(view)
        return view


def decoded(sample: Sample, grey_bits: int | None = None, enough: Enough | None = None) -> torch.Tensor:
    """What `decode` gives of it: (3, H, W) uint8."""
    return pil_to_tensor(decode(sample.path, grey_bits, enough=enough))


class ImageStore:
    """Images of samples as uint8 tensors: read once, kept while there is memory for them, read again beyond it.

    Where it is `shared` by several processes, each reads and keeps its share.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        memory: Memory,
        read: Callable[[Sample], torch.Tensor] = decoded,
        skip_bad: bool | None = False,
        shared: bool = False,
    ):
        """read: from any thread. skip_bad: leave out what cannot be; None: never, and the user has no such choice."""
        self._read = read
        self._kept: dict[int, torch.Tensor] = {}
        self.samples: list[Sample] = []
        self.skipped: list[str] = []
        if shared and ranks.here().count > 1:
            self._share(samples, memory, skip_bad)
            return
        for sample, image in readable(samples, self._read, skip_bad, self.skipped):
            if memory.takes(image):
                self._kept[len(self.samples)] = image
            self.samples.append(sample)

    def _share(self, samples: Sequence[Sample], memory: Memory, skip_bad: bool | None) -> None:
        """Read this process's share; what cannot be read is known to all, and said as one process says it."""
        here = ranks.here()
        own = here.share(len(samples))
        unread, kept = torch.zeros(len(samples), dtype=torch.int32), {}
        for index, (_, result) in zip(own, _attempts(samples[own.start : own.stop], self._read), strict=True):
            if isinstance(result, DataError):
                unread[index] = 1
            elif memory.takes(result[0]):
                kept[index] = result[0]
        for index, (sample, bad) in enumerate(zip(samples, here.complete(unread).tolist(), strict=True)):
            if bad:
                list(readable([sample], self._read, skip_bad, self.skipped))  # once more, for what is wrong with it
                continue
            if index in kept:
                self._kept[len(self.samples)] = kept[index]
            self.samples.append(sample)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Image `index`: (3, H, W) uint8."""
        kept = self._kept.get(index)
        return kept if kept is not None else self._read(self.samples[index])
