"""files.json: the SHA-256 of every file in a folder that clipfit wrote, so that damage is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from clipfit.errors import ModelError
from clipfit.runs.files import encoded, flush, json_text, writing

NAME = "files.json"
UNSEALED = "timing.json"  # times and paths differ each time; nothing that matters depends on them
HELP = "restore it from a copy, or run the command that made it again"


def seal(folder: Path) -> None:
    """Write files.json over every file in the folder but itself and timing.json, and have the disk hold them all.

    Raises:
        OutputError: a file cannot be read again, or the place cannot be written.
    """
    with writing(folder):
        inside = sorted(folder.rglob("*"))
        names = [path.relative_to(folder).as_posix() for path in inside if path.is_file()]
        digests = {name: digest_of(folder / name) for name in names if name not in (NAME, UNSEALED)}
        (folder / NAME).write_bytes(encoded(json_text(digests)))
        for path in (*inside, folder / NAME, folder):
            flush(path)


def is_sealed(folder: Path) -> bool:
    """Whether it has a files.json: a folder of ours without one is not complete (but for runs of format 1)."""
    return (folder / NAME).is_file()


def read(folder: Path) -> dict[str, str]:
    """Name (relative, with /) → SHA-256 (hexadecimal).

    Raises:
        ModelError: files.json is missing or damaged.
    """
    path = folder / NAME
    try:
        data = path.read_bytes()
        digests = json.loads(data)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}): {HELP}.") from error
    plain = isinstance(digests, dict) and all(isinstance(d, str) and _is_inside(n) for n, d in digests.items())
    if not plain or data != encoded(json_text(digests)):
        raise ModelError(f"{path} is not as clipfit wrote it: {HELP}.")
    return dict(digests)


def listed(folder: Path, name: str) -> str:
    """The SHA-256 of one file, as recorded. Raises ModelError where files.json is missing, damaged or lacks it."""
    digests = read(folder)
    if name not in digests:
        raise ModelError(f"{folder / NAME} does not list {name}: {HELP}.")
    return digests[name]


def verify(folder: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """Compare files with files.json, and give what that says.

    Args:
        names: those whose content is compared (None: all). That the others are there is always checked.

    Raises:
        ModelError: a file is missing or differs, or is not listed; or files.json is missing or damaged.
    """
    digests = read(folder)
    for name in digests:
        if not (folder / name).is_file():
            raise ModelError(f"{folder / name} is missing, but {NAME} lists it: {HELP}.")
    for name in digests if names is None else names:
        expected = listed(folder, name)
        try:
            found = digest_of(folder / name)
        except OSError as error:
            raise ModelError(f"{folder / name} cannot be read: {error.strerror or error}.") from error
        require_digest(folder / name, found, expected)
    return digests


def require_digest(path: Path, found: str, expected: str) -> None:
    """Raises ModelError where the SHA-256 (hexadecimal) of a file is not the one that was recorded."""
    if found != expected:
        raise ModelError(
            f"{path} is not as clipfit wrote it: expected SHA-256 {expected[:16]}…, found {found[:16]}…; {HELP}."
        )


def checking(folder: Path, name: str) -> Callable[[bytes], None]:
    """For files.read_tensors: raises ModelError for bytes that are not those of the file that files.json lists.

    Raises:
        ModelError: see listed.
    """
    expected = listed(folder, name)
    return lambda data: require_digest(folder / name, hashlib.sha256(data).hexdigest(), expected)


def digest_of(path: Path) -> str:
    """SHA-256 (hexadecimal) of a file, read in pieces. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and path.parts != ()
