"""Single files on disk: safetensors with self-describing metadata, JSON, and writes that are complete or absent."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from glob import escape
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from clipfit.errors import DataError, ModelError, OutputError, UsageError

METADATA_KEY = "clipfit"  # one key of sorted JSON: several keys would be written in random order
_HOST = socket.gethostname().replace(".", "-")


def write_tensors(
    path: Path, state: Mapping[str, torch.Tensor], metadata: Mapping[str, Any], header: Mapping[str, str] | None = None
) -> None:
    """Write tensors and metadata, or another header of one key; the same input gives the same bytes.

    Raises:
        OutputError: the disk is full or the place cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    named = dict(header or {METADATA_KEY: _json(metadata)})
    atomically(path, lambda part: save_file(tensors, part, named))


def read_tensors(
    path: Path, check: Callable[[bytes], None] = lambda data: None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors on the CPU, and the metadata that write_tensors gave them ({} if there is none).

    Args:
        check: is shown the file's bytes before anything is made of them, and raises if they are not the right ones.

    Raises:
        ModelError: the file is missing or damaged.
    """
    try:
        data = path.read_bytes()  # once, so that what was checked is what is used: twice its size in memory until then
        check(data)
        return load(data), _metadata(data)
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as a clipfit checkpoint: {error}.") from error


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of write_tensors alone. Raises ModelError for a file that is missing, damaged or cut short."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
            header = file.read(int.from_bytes(start, "little"))
            end = max((part["data_offsets"][1] for part in json.loads(header).values() if "dtype" in part), default=0)
            if file.seek(0, os.SEEK_END) != 8 + len(header) + end:
                raise ValueError("it is not as long as its header says")
        return _metadata(start + header)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ModelError(f"{path} cannot be read as a clipfit checkpoint: {error}.") from error


def _metadata(data: bytes) -> dict[str, Any]:
    """From a safetensors file or its beginning: the length of the header in 8 bytes, then the header in JSON."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return dict(json.loads(header.get("__metadata__", {}).get(METADATA_KEY, "{}")))


def write_json(path: Path, record: Any) -> None:
    """Sorted keys, two spaces, a newline at the end. Raises OutputError when the place cannot be written."""
    write_text(path, json_text(record))


def json_text(record: Any) -> str:
    """What write_json writes."""
    return json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line. Raises OutputError when the place cannot be written."""
    write_text(path, "".join(_json(record) + "\n" for record in records))


def write_text(path: Path, text: str) -> None:
    """Raises OutputError when the place cannot be written."""
    atomically(path, lambda part: part.write_bytes(encoded(text)))


def encoded(text: str) -> bytes:
    """UTF-8. A name that is none has lone surrogates in Python: written as \\udc…, which JSON reads as the same."""
    return text.encode("utf-8", "backslashreplace")


def read_json(path: Path) -> Any:
    """Raises DataError when the file is missing or no JSON."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error


def read_lines(path: Path) -> list[Any]:
    """The records of write_lines. Raises DataError when the file is missing or no JSON lines."""
    try:
        return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error


def require_room(folder: Path, size: int) -> None:
    """Make sure that something can be made in the folder, and that `size` bytes are free there; leaves nothing.

    Raises:
        OutputError: it cannot be made or written in, or the disk is too full.
    """
    missing = missing_of(folder)
    make_folder(folder)
    try:
        with tempfile.TemporaryDirectory(prefix=".", dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"{folder} cannot be written in: {error.strerror or error}.") from error
    finally:
        remove_empty(missing)
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    if free < size:
        raise OutputError(f"{folder} needs {size / 1e6:.0f} MB, but its disk has {free / 1e6:.0f} MB left: make room.")


def make_folder(folder: Path) -> None:
    """Make the folder where it is missing. Raises OutputError when it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be created: {error.strerror or error}.") from error


def missing_of(folder: Path) -> list[Path]:
    """What would have to be made for the folder to exist, the folder itself first."""
    return [place for place in (folder, *folder.parents) if not place.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of the folders that are there and empty."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def require_kept(target: Path, needed: Iterable[Path]) -> None:
    """Raises UsageError where replacing the target would delete one of what is needed."""
    for path in needed:
        if target.resolve() in (path.resolve(), *path.resolve().parents):
            raise UsageError(f"{target} would be replaced, but {path} is needed: choose another place with --output.")


def require_outside(target: Path, images: Path) -> None:
    """Raises UsageError for a target inside a folder of images, where it would be read as a class."""
    if images.is_dir() and images.resolve() in target.resolve().parents:
        raise UsageError(
            f"{target} would lie inside {images} and be read as one of its classes: choose another place with --output."
        )


def flush(path: Path) -> None:
    """Have the disk hold what was written to a file, or what a folder lists, before we go on. Raises OSError."""
    if path.is_dir() and os.name != "posix":
        return  # there is no such thing elsewhere
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(shown: Path) -> Iterator[None]:
    """Within: an OSError is one of writing `shown`. Raises OutputError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise OutputError(f"{shown} cannot be written: {reason}.") from error


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the file, flush, rename; several processes may write the same file."""
    part = path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.part")
    try:
        with writing(path):
            _remove_parts_of_the_dead(path)
            write(part)
            part.chmod(0o666 & ~_umask())  # safetensors makes its files unreadable for others
            flush(part)
            os.replace(part, path)
            flush(path.parent)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _remove_parts_of_the_dead(path: Path) -> None:
    """Where a number is in use again, or the process ran on another host, its part file is left alone."""
    for part in path.parent.glob(f".{escape(path.name)}.{escape(_HOST)}.*.part"):
        number = part.name.split(".")[-2]
        if number.isdecimal() and part.is_file() and not _runs(int(number)):
            part.unlink(missing_ok=True)


def _runs(number: int) -> bool:
    if os.name != "posix":
        return True  # os.kill would end it there
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _json(record: Any) -> str:
    text = json.dumps(record, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace").decode("utf-8")  # lone surrogates: see write_text
