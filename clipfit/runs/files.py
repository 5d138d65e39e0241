"""Files on disk: safetensors with self-describing metadata, JSON, and writes that are complete or absent."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from clipfit.errors import DataError, ModelError, UsageError

METADATA_KEY = "clipfit"  # one key of sorted JSON: several keys would be written in random order


def write_tensors(path: Path, state: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and metadata; the same input gives the same bytes.

    Raises:
        DataError: the disk is full or the place cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    header = {METADATA_KEY: _json(metadata)}
    _atomically(path, lambda part: save_file(tensors, part, header))


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors on the CPU, and the metadata that write_tensors gave them ({} if there is none).

    Raises:
        ModelError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), json.loads(metadata.get(METADATA_KEY, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as a clipfit checkpoint: {error}.") from error


def write_json(path: Path, record: Any) -> None:
    """Sorted keys, two spaces, a newline at the end."""
    write_text(path, json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line."""
    write_text(path, "".join(_json(record) + "\n" for record in records))


def write_text(path: Path, text: str) -> None:
    """Raises DataError when the place cannot be written."""
    # a file name that is no UTF-8 has lone surrogates in Python: written as \udc…, which JSON reads back as the same
    _atomically(path, lambda part: part.write_bytes(text.encode("utf-8", "backslashreplace")))


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
        DataError: it cannot be made or written in, or the disk is too full.
    """
    missing = _missing(folder)
    make_folder(folder)
    try:
        with tempfile.TemporaryDirectory(prefix=".", dir=folder):
            pass
    except OSError as error:
        raise DataError(f"{folder} cannot be written in: {error.strerror or error}.") from error
    finally:
        _remove_empty(missing)
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    if free < size:
        raise DataError(f"{folder} needs {size / 1e6:.0f} MB, but its disk has {free / 1e6:.0f} MB left: make room.")


def make_folder(folder: Path) -> None:
    """Make the folder where it is missing. Raises DataError when it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder} cannot be created: {error.strerror or error}.") from error


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


@contextlib.contextmanager
def building(target: Path, replace: bool) -> Iterator[Path]:
    """A folder that appears at `target` when the block ends well; else it leaves nothing.

    Args:
        replace: what is there by then is deleted; without it, kept.

    Raises:
        DataError: it cannot be made or moved into place. UsageError: it is there by now, and is not to be replaced.
    """
    shown, target = target, target.resolve()  # behind a link is what has to be replaced
    part, missing = target.with_name(f".{target.name}.{os.getpid()}.part"), _missing(target.parent)
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        if target.exists() and not replace:
            raise UsageError(f"{shown} was written by another process meanwhile; it is kept, and this one is not.")
        if target.exists():
            shutil.rmtree(target)
        part.rename(target)
    except OSError as error:
        raise DataError(f"{shown} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        _remove_empty(missing)


def _missing(folder: Path) -> list[Path]:
    """What would have to be made for the folder to exist, the folder itself first."""
    return [place for place in (folder, *folder.parents) if not place.exists()]


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _atomically(path: Path, write: Callable[[Path], object]) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # several processes may write the same file
    try:
        write(part)
        part.chmod(0o666 & ~_umask())  # safetensors makes its files unreadable for others
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"{path} cannot be written: {reason}.") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _json(record: Any) -> str:
    text = json.dumps(record, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace").decode("utf-8")  # lone surrogates: see write_text
