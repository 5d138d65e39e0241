"""Where a folder that clipfit writes goes, and how it gets there: at every instant one whole folder exists.

Beside a folder `run` there may be, hidden, each with one meaning and all but the last two cleared away by `recover`:

    .run.123.part   half-written, by process 123
    .run.old        whole: what `run` was, until the new one is in its place
    .run.gone       the remains of what was replaced, being deleted
    .run.new        whole: to be moved into `run` file by file, where it cannot be renamed to it (a mount point)
    .run.moving     the same, once what clipfit wrote of the old one is deleted
    .run.resume     saved state of a training, the caller's
    .run.lock       held by the process that writes `run`

Where nothing can be made beside it, these lie inside it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from clipfit.errors import ClipfitError, ModelError, OutputError, UsageError
from clipfit.interrupts import keeping, waiting
from clipfit.runs import files, manifest
from clipfit.runs.files import flush, writing

RUNS = Path("runs")
EVALUATIONS = "evaluations"  # in a run: folders with a files.json of their own, which go with the run
FORMAT_1 = (
    "classes.json", "shots.jsonl", "metrics.jsonl", "finetuned.safetensors", "model.safetensors", "timing.json",
    "config.json",
)  # fmt: skip
_LEFT = re.compile(r"\.(?P<name>.+)\.(old|gone|new|moving|\d+\.part)")
_USED = re.compile(r"\..+\.(lock|\d+\.part)")
_IMMOVABLE = (errno.EBUSY, errno.EXDEV)  # a mount point, or a folder in a lower layer of an overlay

Say = Callable[[str], None]


def _silent(text: str) -> None:
    pass


@dataclass(frozen=True)
class _Place:
    """A resolved path for a folder, and what is hidden beside it."""

    target: Path

    @property
    def home(self) -> Path:
        """Where they lie: in the parent; in the folder itself if it is a mount point, or its parent read-only."""
        fixed = os.path.ismount(self.target) or not os.access(self.target.parent, os.W_OK)
        return self.target if self.target.is_dir() and fixed else self.target.parent

    def hidden(self, kind: str) -> Path:
        return self.home / f".{self.target.name}.{kind}"

    @property
    def left(self) -> list[Path]:
        """What processes that have ended may have left."""
        with contextlib.suppress(OSError):
            found = [(path, _LEFT.fullmatch(path.name)) for path in self.home.iterdir()]
            return sorted(path for path, match in found if match and match["name"] == self.target.name)
        return []

    @property
    def occupied(self) -> bool:
        """Whether something is there that is not ours to ignore; an empty folder is free."""
        if not self.target.is_dir():
            return os.path.lexists(self.target)
        return any(not path.name.startswith(f".{self.target.name}.") for path in self.target.iterdir())

    def free_name(self) -> Path:
        """The first of run.old-1, run.old-2, … that is not there."""
        number = 1
        while os.path.lexists(self.home / f"{self.target.name}.old-{number}"):
            number += 1
        return self.home / f"{self.target.name}.old-{number}"


def target_folder(shots: Path, method: str, output: Path | None, overwrite: bool, inputs: Iterable[Path]) -> Path:
    """Where the run goes: `runs/<folder>-<method>` unless told otherwise.

    Raises:
        UsageError: it exists and `overwrite` is not set, it exists and is no run, it holds an input, or it would be
            taken for a class of the shots.
    """
    path = output or RUNS / f"{shots.resolve().stem if shots.is_file() else shots.resolve().name}-{method}"
    recover(path)
    occupied = _Place(path.resolve()).occupied
    if occupied and not overwrite:
        raise UsageError(f"{path} exists already: pass --overwrite to replace it or --output for another place.")
    if occupied and not _is_run(path):
        raise UsageError(f"{path} is no run of clipfit's, so --overwrite will not delete it: choose another place.")
    files.require_kept(path, inputs)
    files.require_outside(path, shots)
    return path


def require_room(target: Path, size: int) -> None:
    """Raises OutputError where a folder of `size` bytes cannot be made for the target, or its disk is too full."""
    files.require_room(_Place(target.resolve()).home, size)


def resume_folder(target: Path) -> Path:
    """Where the state of an unfinished run is saved; removed when the run is complete or replaced, by nothing else."""
    return _Place(target.resolve()).hidden("resume")


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Within: no other process builds the target. May be nested.

    Raises:
        UsageError: another process does. OutputError: the lock cannot be made.
    """
    place = _Place(target.resolve())
    missing, file = files.missing_of(place.home), place.hidden("lock")
    lock = FileLock(file, is_singleton=True)  # one a process, so that it can be taken again
    files.make_folder(place.home)
    with writing(target):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UsageError(
                f"{target} is being written by another process: wait for it, or choose another place with --output."
            ) from None
    try:
        yield
    finally:
        if missing and [path.name for path in place.home.iterdir()] == [file.name]:
            file.unlink()  # nothing was written: leave no folder that was not there
        lock.release()
        files.remove_empty(missing)


@contextlib.contextmanager
def building(target: Path, overwrite: bool, say: Say = _silent) -> Iterator[Path]:
    """A folder that appears at `target`, sealed, when the block ends well; else it leaves nothing.

    Args:
        overwrite: what is there by then is replaced; without it, kept. An empty folder is always replaced.
        say: is told where the files went that clipfit had not written.

    Raises:
        OutputError: it cannot be made or moved into place. UsageError: it is there by now, and is not to be replaced;
            or another process builds it.
    """
    place = _Place(target.resolve())  # behind a link is what has to be replaced
    with locked(target), writing(target):
        _recover(place, target, say)
        part = place.hidden(f"{os.getpid()}.part")
        try:
            part.mkdir()
            yield part
            manifest.seal(part)
            if place.occupied and not overwrite:
                raise UsageError(f"{target} was written by another process meanwhile; it is kept, and this one is not.")
            moved = False
            with keeping(lambda: whole(target) if moved else ""), waiting():
                _put(place, part)
                moved = True
                _finish(place, target, say)
                shutil.rmtree(place.hidden("resume"), ignore_errors=True)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def whole(target: Path) -> str:
    """Of what is there, for who is stopped after it."""
    return f"{target} is written and whole"


def recover(target: Path, say: Say = _silent) -> None:
    """Finish what an ended process left undone: put a whole run back, or the rest of a replaced one away.

    Raises:
        UsageError: another process is moving it right now, or a run and something else have the same name.
        OutputError: it cannot be moved.
    """
    place = _Place(target.resolve())
    if not place.left or FileLock(place.hidden("lock"), is_singleton=True).is_locked:  # by this process: it will
        return
    try:
        with locked(target), writing(target):
            _recover(place, target, say)
    except (UsageError, OutputError):
        if not _is_whole(place.target):
            raise  # else it can be read, though another process trains, or the disk is read-only


def recover_all(folder: Path) -> None:
    """`recover` whatever lies in the folder, as far as it can be."""
    found = [_LEFT.fullmatch(path.name) for path in folder.glob(".*") if path.is_dir()]
    for name in sorted({match["name"] for match in found if match}):
        with contextlib.suppress(ClipfitError):
            recover(folder / name)


def _recover(place: _Place, shown: Path, say: Say) -> None:
    """Under the lock: whoever left something has ended."""
    for path in place.left:
        if path.suffix == ".part":
            shutil.rmtree(path)
    old = place.hidden("old")
    with waiting():
        if old.exists() and not place.occupied:
            _rename(old, place.target)
        if old.exists() and not _is_whole(place.target):
            raise UsageError(f"{shown} is no run of clipfit's, but {old} is one: move one of them to another place.")
        _finish(place, shown, say)


def _put(place: _Place, part: Path) -> None:
    """Move a sealed folder to its name, what is there to `.old`; or, where neither can be, the new one to `.new`."""
    old = place.hidden("old")
    try:
        if place.home == place.target:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        if place.occupied:
            _rename(place.target, old)
        _rename(part, place.target)
    except OSError as error:
        if old.exists() and not place.occupied:
            _rename(old, place.target)
        if error.errno not in _IMMOVABLE:
            raise
        _rename(part, place.hidden("new"))


def _finish(place: _Place, shown: Path, say: Say) -> None:
    """The new folder has its name or is whole as `.new`: move it in, and put away what it replaces."""
    old, gone = place.hidden("old"), place.hidden("gone")
    aside = _move_in(place)
    if gone.exists():
        aside += _put_away(gone, place)
    if old.exists():
        _rename(old, gone)
        aside += _put_away(gone, place)
    for path in aside:
        say(f"{path} holds what clipfit had not written in the {shown} that was replaced")


def _put_away(gone: Path, place: _Place) -> list[Path]:
    """Delete what clipfit wrote; where something is left, give it another name, and say which."""
    _delete_written(gone)
    with contextlib.suppress(OSError):
        gone.rmdir()
        return []
    aside = place.free_name()
    _rename(gone, aside)
    return [aside]


def _move_in(place: _Place) -> list[Path]:
    """Move a whole folder into one that cannot be renamed, its manifest last; may be cut short and called again.

    What clipfit had not written there stays, but for what has one of the new names: where that went is given.
    """
    new, moving, aside = place.hidden("new"), place.hidden("moving"), place.free_name()
    if new.exists():
        _delete_written(place.target)
        _rename(new, moving)
    if manifest.is_sealed(moving):
        for name in (*manifest.read(moving), manifest.UNSEALED, manifest.NAME):
            path, to = moving / name, place.target / name
            if not path.exists():
                continue  # moved before, or there is none
            if os.path.lexists(to) and not (to.is_file() and manifest.digest_of(to) == manifest.digest_of(path)):
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.move(to, aside / name)
            to.parent.mkdir(parents=True, exist_ok=True)
            _move(path, to)
    if moving.exists():
        shutil.rmtree(moving)
    return [aside] if aside.exists() else []


def _move(path: Path, to: Path) -> None:
    """Rename a file, from one file system to another if need be, so that it appears whole."""
    try:
        os.replace(path, to)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        part = to.with_name(f".{to.name}.part")  # always replaced: who is cut short here does this again
        shutil.copyfile(path, part)
        flush(part)
        os.replace(part, to)
        path.unlink()
    flush(to.parent)


def _rename(path: Path, to: Path) -> None:
    if to.is_dir():
        to.rmdir()  # only an empty one is ever in the way
    os.rename(path, to)
    flush(to.parent)


def _is_run(folder: Path) -> bool:
    """Whether clipfit made it: whole, or with pieces missing."""
    named = all((folder / name).exists() for name in ("config.json", "shots.jsonl"))
    return named and (manifest.is_sealed(folder) or (folder / "finetuned.safetensors").exists())


def _is_whole(folder: Path) -> bool:
    return manifest.is_sealed(folder) or _is_format_1(folder)


def _is_format_1(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / "config.json").read_bytes())["format"] == 1)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _delete_written(folder: Path) -> None:
    """Delete what clipfit wrote in a folder, what names it last; folders go where that leaves them empty."""
    real = folder.resolve()
    written = [path for path in _written(folder) if real in (path.parent.resolve(), *path.parent.resolve().parents)]
    for path in written:
        path.unlink(missing_ok=True)
    for path in (folder / EVALUATIONS).glob(".*"):
        if _USED.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    above = {parent for path in written for parent in path.parents if folder in parent.parents}
    files.remove_empty(sorted({*above, folder / EVALUATIONS}, key=lambda parent: -len(parent.parts)))


def _written(folder: Path) -> list[Path]:
    """The files that clipfit wrote in a folder and in its evaluations; each folder's manifest after its files."""
    if not folder.is_dir() or folder.is_symlink():
        return []
    names: tuple[str, ...] = ()
    if manifest.is_sealed(folder):
        with contextlib.suppress(ModelError):  # damaged: then nothing is known to be ours
            names = (*manifest.read(folder), manifest.UNSEALED, manifest.NAME)
    elif _is_format_1(folder):
        names = FORMAT_1
    evaluations = [path for each in sorted(folder.glob(f"{EVALUATIONS}/*")) for path in _written(each)]
    return [*evaluations, *(folder / name for name in names)]
