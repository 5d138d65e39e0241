"""A finished run, opened: what `adapt` wrote and the other commands read, checked against what was written."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from clipfit.ensemble import interpolate
from clipfit.errors import DataError, ModelError, OutputError, UsageError
from clipfit.model.clip import Clip
from clipfit.model.loading import go_on, reload
from clipfit.model.named import Additions
from clipfit.model.sources import LOCAL_DIR, Source, folder_of
from clipfit.prompts import Templates
from clipfit.runs import files, manifest, place
from clipfit.runs.record import (
    ANCESTORS,
    CLASSES,
    CONFIG,
    FINETUNED,
    FOLDS,
    METRICS,
    MODEL,
    SHOTS,
    TIMING,
    ClassRecord,
    RunRecord,
    typed,
)

SMALL = (CONFIG, CLASSES, SHOTS, METRICS)


@dataclass(frozen=True)
class Run:
    """A finished run: where it is, and its config.json, classes.json and shots.jsonl."""

    path: Path
    record: RunRecord
    base: tuple[str, ...]  # class names in order
    names: Mapping[str, str]  # folder → class name
    shots: Sequence[Mapping[str, Any]]
    inputs: Mapping[str, str]  # where, as an absolute path, what it was made from was then
    digests: Mapping[str, str]  # what files.json says; {} in format 1
    notes: tuple[str, ...]  # what one should know of it

    def place(self, name: str) -> Path | None:
        """`shots`, `classes` or `image_root`: where it was, or, where it no longer is, as it was given."""
        given = getattr(self.record, name)
        return self._still(name) or (Path(given) if given else None)

    def _still(self, name: str) -> Path | None:
        known = self.inputs.get(name)
        return Path(known) if known and Path(known).exists() else None

    @property
    def needed(self) -> list[Path]:
        """The run, and the files its pre-trained weights come from."""
        return [self.path, *filter(None, (self._still(name) for name in ("model", "pretrained")))]

    @property
    def evaluations(self) -> Path:
        """The folder of its evaluations, each a sealed folder of its own."""
        return self.path / place.EVALUATIONS

    @property
    def source(self) -> Source:
        """The pre-trained weights."""
        return self.record.pretrained

    @property
    def additions(self) -> Additions:
        """What the run's models have beyond open_clip's CLIP."""
        return self.record.additions

    @property
    def method(self) -> str:
        return self.record.method

    @property
    def template(self) -> str:
        """The one that it was trained with."""
        return self.record.recipe.template

    @property
    def templates(self) -> Templates:
        """Those whose mean text a class is, in evaluation and prediction."""
        return self.record.all_templates

    @property
    def alpha(self) -> float:
        return self.record.alpha

    @property
    def folds(self) -> dict[str, Any]:
        """Its folds.json; empty where it has none. Raises ModelError for a damaged one."""
        found = files.read_json(self._vouched(FOLDS)) if (self.path / FOLDS).is_file() else {}
        return found if isinstance(found, dict) else {}

    @property
    def val(self) -> list[dict[str, Any]]:
        """Images that α was chosen by or a forecast made of, as lines of shots.jsonl. Raises as `folds`."""
        return list(self.folds.get("val", []))

    @property
    def ancestors(self) -> list[dict[str, Any]]:
        """As such lines, what the runs that it goes on from were made with. Raises ModelError for a damaged file."""
        return files.read_lines(self._vouched(ANCESTORS)) if ANCESTORS in self.digests else []

    def _vouched(self, name: str) -> Path:
        if name in self.digests:
            manifest.verify(self.path, [name])
        return self.path / name

    def digest(self, name: str) -> str:
        """The SHA-256 (hexadecimal) of a file of the run, as recorded; of the file as it is in format 1."""
        return self.digests.get(name) or manifest.digest_of(self.path / name)

    def require_unchanged(self) -> None:
        """Raises OutputError where another run has taken the place: what was found out of this one is not its own."""
        if self.digests and (not manifest.is_sealed(self.path) or manifest.read(self.path) != self.digests):
            raise OutputError(f"{self.path} was replaced by another run meanwhile.")

    def pretrained(self, device: torch.device | str = "cpu") -> Clip:
        """The model at α = 0: pre-trained, with what the method adds attached without effect; or the parent's.

        Raises:
            ModelError: its weights cannot be had, or are not the recorded ones.
        """
        if self.record.parent:
            return self._of_parent(device)
        source, folder, file = self.source, self._still("model"), self._still("pretrained")
        if folder:
            source = replace(source, model=f"{LOCAL_DIR}{folder}")
        if file:
            source = replace(source, pretrained=str(file))
        return reload(source, device, self.additions)

    def _of_parent(self, device: torch.device | str) -> Clip:
        """What the run was adapted on from; its digest in our record vouches for it, not what it says of itself."""
        folder = Path(self.inputs.get("model") or folder_of(self.source.model) or "")
        place.recover(folder)
        state, _ = files.read_tensors(folder / MODEL)
        return go_on(self.source, state, self.additions, device=device)

    def finetuned(self) -> dict[str, torch.Tensor]:
        """θ at α = 1. Raises ModelError where the file is not the one that was written."""
        return self._weights(FINETUNED, 1.0)

    def state(self, alpha: float) -> dict[str, torch.Tensor]:
        """θ at α; the pre-trained weights are loaded only where they are needed.

        Raises:
            ModelError: a weight file is not the one that was written; or the pre-trained weights are needed and are
                missing or not the recorded ones.
        """
        if alpha == 1:
            return self.finetuned()
        if alpha == self.alpha:
            return self._weights(MODEL, alpha)
        return interpolate(self.pretrained().state(), self.finetuned(), alpha)

    def _weights(self, name: str, alpha: float) -> dict[str, torch.Tensor]:
        def check(data: bytes) -> None:
            if name in self.digests:
                manifest.require_digest(self.path / name, hashlib.sha256(data).hexdigest(), self.digests[name])

        state, about = files.read_tensors(self.path / name, check)
        self.require_described(name, about, alpha)
        return state

    def require_described(self, name: str, about: Mapping[str, Any], alpha: float) -> None:
        """Raises ModelError where the metadata inside a weight file is not what the run's other files say."""
        mine = {"alpha": alpha, "method": self.method, "classes": list(self.base), "template": self.template,
                "templates": list(self.templates)}  # fmt: skip
        about = {"templates": [about.get("template")], **about}  # runs of before had one alone
        for key, value in mine.items():
            if about.get(key) != value:
                raise ModelError(
                    f"{self.path / name} does not belong to this run: its {key} is {_short(about.get(key))}, that of "
                    f"the run {_short(value)}; {manifest.HELP}."
                )


def open_run(path: Path | None) -> Run:
    """The run at `path`, or the newest below runs/. Its small files are checked here, its weights when they are read.

    Raises:
        UsageError: there is none. DataError: it is not finished. ModelError: it is damaged.
    """
    path = path or newest()
    place.recover(path)
    if not path.is_dir():
        raise UsageError(f"there is no run {path}: `clipfit adapt SHOTS` makes one below {place.RUNS}/.")
    digests: Mapping[str, str] = {}
    if manifest.is_sealed(path):
        digests = manifest.verify(path, SMALL)
    elif not (path / MODEL).is_file():
        raise DataError(f"{path} is no finished run: it has no {MODEL}; run `clipfit adapt` again.")
    record = RunRecord.from_json(files.read_json(path / CONFIG), path / CONFIG)
    if not digests and record.format != 1:
        raise ModelError(f"{path / manifest.NAME} is missing: {manifest.HELP}.")
    notes = [] if digests else [f"{path} was made by an earlier clipfit (run format 1): damage to it may go unnoticed"]
    classes = typed(files.read_json(path / CLASSES), ClassRecord, path / CLASSES)
    shots = typed(files.read_lines(path / SHOTS), list[dict[str, Any]], path / SHOTS)
    inputs = _inputs(path / TIMING, notes)
    run = Run(path, record, classes.base, classes.names, shots, inputs, digests, tuple(notes))
    run.require_described(MODEL, files.read_metadata(path / MODEL), run.alpha)
    return run


def newest() -> Path:
    """The run below runs/ that was finished last. Raises UsageError where there is none."""
    place.recover_all(place.RUNS)
    found = [(folder, _finished(folder)) for folder in place.RUNS.glob("*") if not folder.name.startswith(".")]
    done = [(when, folder.name, folder) for folder, when in found if when is not None]
    if not done:
        raise UsageError(f"no run is named and {place.RUNS}/ holds none: `clipfit adapt SHOTS` makes one.")
    return max(done)[-1]


def _finished(folder: Path) -> int | None:
    """When its last file was written, in ns: the manifest, or in format 1 the model. None: it is no finished run."""
    last = folder / (manifest.NAME if manifest.is_sealed(folder) else MODEL)
    return last.stat().st_mtime_ns if (folder / MODEL).is_file() else None


def _inputs(timing: Path, notes: list[str]) -> Mapping[str, str]:
    """Where the run's inputs were; a run is complete without timing.json, which nothing vouches for."""
    if not timing.exists():
        return {}
    try:
        inputs = files.read_json(timing)["inputs"]
        return {name: str(found) for name, found in inputs.items()}
    except (DataError, LookupError, TypeError, AttributeError):
        notes.append(f"{timing} is damaged and was not used")
        return {}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
