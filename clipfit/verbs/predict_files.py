"""The files of `predict`: what may be replaced, what is finished, and where rows lie until they are whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from clipfit.config.predict import PredictConfig
from clipfit.data import lists
from clipfit.errors import ModelError, UsageError
from clipfit.rows.spool import Spool
from clipfit.runs import files, manifest, place


def spool_of(output: Path, width: int | None = None) -> Spool:
    """Where its rows lie until they are whole, with vectors of so many numbers."""
    return Spool(place.resume_folder(output), width)


def _targets(config: PredictConfig) -> list[Path]:
    return [file for file in (config.output, config.embeddings, config.html) if file]


def require_writable(config: PredictConfig, model: str | Path, places: tuple[Path, ...]) -> None:
    """Before anything is loaded. Raises UsageError, OutputError."""
    targets = _targets(config)
    if len({target.resolve() for target in targets}) < len(targets):
        raise UsageError("--output, --embeddings and --html must be different files.")
    if config.output and config.output.suffix.lower() == ".parquet":
        lists.require_parquet(str(config.output))
    listed = filter(None, (config.classes, config.add_classes, config.templates))
    needed = [*places, Path(model), *listed]
    for target in targets:
        if target.is_dir():
            raise UsageError(f"{target} is a folder: expected the name of a file.")
        files.require_kept(target, needed)
        _require_no_part(target)
        files.require_room(target.parent, 0)
        files.make_folder(target.parent)


def _require_no_part(target: Path) -> None:
    """Raises UsageError for a file of a run or of an export, without which that would be damaged."""
    own = target.resolve()
    for folder in own.parents:
        with contextlib.suppress(ModelError):  # it is neither
            if own.relative_to(folder).as_posix() in manifest.read(folder):
                raise UsageError(f"{target} is a part of {folder}: choose another place.")


def is_finished(config: PredictConfig) -> bool:
    """Whether there is nothing to go on with, for all is there. Raises UsageError where something asked for is not."""
    output = config.output
    if not (config.resume and output and output.exists()) or spool_of(output).has_rows:
        return False
    spool_of(output).remove()
    if lacking := next((target for target in _targets(config) if not target.exists()), None):
        raise UsageError(f"{output} is finished, but there is no {lacking}: pass --overwrite to make both.")
    return True


@contextlib.contextmanager
def claimed(output: Path | None) -> Iterator[None]:
    """Within: whoever is killed leaves word that an output which is there is to be replaced, and is not finished."""
    if output is None or not output.exists():
        yield
        return
    spool = spool_of(output)
    spool.claim()
    try:
        yield
    except Exception:  # nothing came of it
        if spool.job is None:
            spool.remove()
        raise


def require_free(config: PredictConfig) -> None:
    """Raises UsageError for what is there and is neither to be replaced nor to be gone on with."""
    if config.overwrite or config.resume:
        return
    for target in _targets(config):
        if target.exists():
            raise UsageError(f"{target} exists already: pass --overwrite to replace it, or choose another place.")
    if config.output and spool_of(config.output).job is not None:
        raise UsageError(
            f"rows of {config.output} are kept from a command that was stopped: pass --resume to go on, or "
            "--overwrite to start anew."
        )
