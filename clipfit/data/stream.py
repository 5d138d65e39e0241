"""Unlabelled images without end: files, folders, globs, paths on stdin, lists and archives, one after another.

Nothing is kept of what was given, so that memory does not grow with the number of images; of a folder, the names in
it are held while they are given in order. What is wrong with one input is said in its place, and the stream goes on.
"""

from __future__ import annotations

import glob
import io
import os
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from clipfit.data import lists
from clipfit.data.files import HEIF_SUFFIXES, SUFFIXES, require_regular
from clipfit.errors import DataError, first_line

STDIN = Path("-")
ARCHIVES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
MOST_BYTES = 2**29  # of one member of an archive


@dataclass(frozen=True)
class Input:
    """One image to be read: what it is called, and where it is; or `error`, why it cannot be read.

    data: its bytes, where it lies in an archive.
    """

    name: str
    path: Path | None = None
    data: bytes | None = None
    error: str | None = None


class Inputs:
    """The images of several places, in their order; may be iterated again where no place is stdin."""

    def __init__(
        self,
        places: Sequence[Path],
        column: str = "path",
        image_root: Path | None = None,
        stdin: BinaryIO | None = None,
    ):
        """`column`: of the paths in lists. `image_root`: where relative paths of lists and stdin start."""
        self._places, self._column, self._root, self._stdin = places, column, image_root, stdin
        self.left_out = 0  # files of folders that are not called as images are

    def require_lists(self) -> None:
        """Raises DataError for a list that is missing or lacks the column, UsageError where it cannot be read here."""
        for place in self._places:
            if lists.is_list(place):
                lists.require_column(place, self._column)

    def count(self) -> int | None:
        """How many there are, where that can be said without reading the images."""
        if any(place == STDIN or _is_archive(place) or _has_magic(place) for place in self._places):
            return None
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[Input]:
        self.left_out = 0
        for place in self._places:
            yield from self._of(place)

    def _of(self, place: Path) -> Iterator[Input]:
        if place == STDIN:
            yield from self._of_stdin()
        elif _has_magic(place):
            found = _like(place)
            for path in found:
                yield from self._named(Path(path))
            if not found:
                yield Input(str(place), error=f"no file is called like {place}.")
        else:
            yield from self._named(place)

    def _named(self, place: Path) -> Iterator[Input]:
        if lists.is_list(place):
            for name, error in lists.paths(place, self._column):
                yield Input(name, error=error) if error else Input(name, (self._root or place.parent) / name)
        elif _is_archive(place) and not place.is_dir():
            yield from _of_archive(place)
        elif place.is_dir() and not _is_called_as_image(place):
            yield from self._inside(place)
        else:
            yield Input(str(place), place)

    def _inside(self, folder: Path) -> Iterator[Input]:
        """Everything that is called as an image is, whatever it is: what is none becomes an error in its place."""
        try:
            names = sorted(os.listdir(folder))
        except OSError as error:
            yield Input(str(folder), error=f"folder {folder} cannot be read: {error.strerror}.")
            return
        for name in names:
            path = folder / name
            if name.startswith("."):
                continue
            if _is_called_as_image(path):
                yield Input(str(path), path)
            elif path.is_dir() and not path.is_symlink():
                yield from self._inside(path)
            else:
                self.left_out += 1

    def _of_stdin(self) -> Iterator[Input]:
        for line in _lines(self._stdin or (sys.stdin.buffer if sys.stdin else io.BytesIO())):
            name = os.fsdecode(line)
            yield Input(name, (self._root or Path()) / name)


def is_no_input(place: Path) -> bool:
    """Whether nothing is there, and nothing says that an image, a list or an archive should be."""
    named = _is_called_as_image(place) or _is_archive(place) or lists.is_list(place) or place == STDIN
    return not (named or glob.has_magic(str(place)) or os.path.lexists(place))


def is_passing(place: Path) -> bool:
    """Whether a place is gone through once, in its order: stdin, an archive."""
    return place == STDIN or (_is_archive(place) and not place.is_dir())


def _like(pattern: Path) -> list[str]:
    """What is called like a pattern, sorted; ** goes into no links to folders, which may lead in circles.

    As for the shell, names that begin with a dot are meant where the pattern says so.
    """
    if "**" not in pattern.parts:
        return sorted(glob.iglob(str(pattern), recursive=True))
    parts = [part if part == "**" else part.replace("**", "*") for part in pattern.parts]
    known = next(k for k, part in enumerate(parts) if glob.has_magic(part))
    start, rest = Path(*parts[:known]), parts[known:]
    found = [os.path.relpath(path, start) for path in start.glob("/".join(rest + ["*"] * (rest[-1] == "**")))]
    if not any(part.startswith(".") for part in rest):
        found = [name for name in found if not any(part.startswith(".") for part in Path(name).parts)]
    paths = sorted(str(start / name) for name in found)
    return [path for path in paths if not os.path.isdir(path)] if rest[-1] == "**" else paths


def _has_magic(place: Path) -> bool:
    """Whether it is a pattern; a file that is really called so is itself."""
    return glob.has_magic(str(place)) and not os.path.lexists(place)


def _is_archive(place: Path) -> bool:
    return place.name.lower().endswith(ARCHIVES)


def _is_called_as_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES | HEIF_SUFFIXES


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """Paths a line; with a null byte before the first newline (`find -print0`) they end in null bytes."""
    end, rest = b"", b""
    read = getattr(stream, "read1", stream.read)  # what is there, without waiting for more
    while piece := read(2**16):
        rest += piece
        if not end and (b"\0" in rest or b"\n" in rest):
            end = b"\0" if b"\0" in rest else b"\n"
        if end:
            *whole, rest = rest.split(end)
            yield from filter(None, (line.removesuffix(b"\r") if end == b"\n" else line for line in whole))
    yield from filter(None, [rest.removesuffix(b"\r")])


def _of_archive(place: Path) -> Iterator[Input]:
    """The images among an archive's members, in its order; nothing is ever unpacked onto a disk."""
    try:
        require_regular(place, "archive")
        with tarfile.open(place, "r|*", errors="surrogateescape") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # tarfile would keep a record of every one
                if not member.isdir() and _is_called_as_image(Path(member.name)):
                    yield _member(archive, member, f"{place}/{member.name}")
    except DataError as error:
        yield Input(str(place), error=str(error))
    except (tarfile.TarError, OSError, EOFError, ValueError, TypeError) as error:  # TypeError: of 3 bytes, as gzip
        yield Input(str(place), error=f"archive {place} is damaged ({first_line(error)}): what follows is not read.")


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> Input:
    if not member.isreg():
        return Input(name, error=f"image {name} is a link or a device inside an archive: expected a file.")
    if member.size > MOST_BYTES:
        return Input(name, error=f"image {name} has {member.size} bytes: more than {MOST_BYTES} are not read at once.")
    file = archive.extractfile(member)
    return Input(name, Path(name), file.read() if file else b"")
