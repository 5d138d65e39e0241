"""What kind of file something is: images that clipfit reads, files to leave out, and what must never be opened."""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from clipfit.errors import DataError

# Pillow's name of each format that is read, with the endings its files have; a format that stands not here is never
# tried: Pillow would start Ghostscript for PostScript, whatever the file is called
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "PPM": (".ppm", ".pgm", ".pbm"),
    "JPEG2000": (".jp2",),
    "AVIF": (".avif",),
    "ICO": (".ico",),
    "TGA": (".tga",),  # last: it has no signature to be known by
}
SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)
HEIF_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
HEIF_ADVICE = "install clipfit[heif]"

_KINDS = (
    (stat.S_ISREG, "file"),
    (stat.S_ISDIR, "folder"),
    (stat.S_ISFIFO, "pipe"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
)


@functools.cache  # a look through all of Python's folders, for every one of a million files
def heif_is_installed() -> bool:
    """Whether HEIC and HEIF photographs can be read."""
    return find_spec("pillow_heif") is not None


def has_image_suffix(path: Path) -> bool:
    """Whether a file's ending is that of an image, readable with what is installed or not."""
    return path.suffix.lower() in SUFFIXES | HEIF_SUFFIXES


def is_image(path: Path) -> bool:
    """Whether it is a regular file whose ending says that it can be read as an image."""
    readable = SUFFIXES | HEIF_SUFFIXES if heif_is_installed() else SUFFIXES
    return path.suffix.lower() in readable and path.is_file()


def require_regular(path: Path, what: str) -> None:
    """Refuse what is no regular file, before it is opened: reading a pipe or a device may never end.

    Args:
        what: what it is to the user ("image", "class file"); the message starts with it.

    Raises:
        DataError: it is missing, a broken link, a folder, a pipe, a socket or a device.
    """
    try:
        kind = _kind_of_mode(path.stat().st_mode)
    except FileNotFoundError as error:
        if path.is_symlink():
            raise DataError(f"{what} {path} is a broken link: {os.readlink(path)} is not there.") from error
        raise DataError(f"{what} {path} does not exist.") from error
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise DataError(f"{what} {path} cannot be read ({getattr(error, 'strerror', None) or error}).") from error
    if kind != "file":
        raise DataError(f"{what} {path} is a {kind}: expected a regular file; save what it holds in one.")


def resolved(path: Path) -> Path:
    """Where it really is; as it stands where that cannot be said, for who opens it is told why."""
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError):  # a loop of links, a null byte
        return path.absolute()


def _kind_of_mode(mode: int) -> str:
    return next((kind for is_kind, kind in _KINDS if is_kind(mode)), "special file")


def walk(folder: Path) -> Iterator[Path]:
    """Everything inside that is no folder and not hidden, sorted; links to folders are given, not followed.

    Raises:
        DataError: a folder that may not be read.
    """
    found: list[Path] = []
    for root, folders, files in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        found += [Path(root, name) for name in (*files, *links) if not name.startswith(".")]
    yield from sorted(found)


def visible(folder: Path) -> list[Path]:
    """What a folder holds but hidden things, sorted. Raises DataError for one that may not be read."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        _refuse(error)
        raise


def _refuse(error: OSError) -> None:
    raise DataError(f"folder {error.filename} cannot be read: {error.strerror}.") from error


def by_kind(paths: Sequence[Path]) -> str:
    """Files that are no images, counted by kind with an example: "10 .heic (a.heic, …): install clipfit[heif]"."""
    kinds: dict[str, list[Path]] = {}
    for path in paths:
        kinds.setdefault(_kind(path), []).append(path)
    return "; ".join(_counted(kind, found) for kind, found in kinds.items())


def example(paths: Sequence[Path]) -> str:
    """The first one's name, and whether there are more: "(notes.txt, …)"."""
    return f"({paths[0].name}{', …' if len(paths) > 1 else ''})"


def _kind(path: Path) -> str:
    try:
        kind = _kind_of_mode(path.stat().st_mode)
    except OSError:
        kind = "broken link" if path.is_symlink() else "unreadable file"
    if kind == "file":
        return path.suffix.lower() or "other"
    return "linked folder" if kind == "folder" else kind


def _counted(kind: str, found: Sequence[Path]) -> str:
    plural = "s" if len(found) > 1 and not kind.startswith(".") else ""
    advice = f": {HEIF_ADVICE}" if kind in HEIF_SUFFIXES else ""
    return f"{len(found)} {kind}{plural} {example(found)}{advice}"
