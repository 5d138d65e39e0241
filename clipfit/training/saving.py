"""Saved state of an unfinished training: everything that its next step depends on, in one file that is whole or absent.

No generator's state is part of it: every random stream is made anew from the seed and an index (streams.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clipfit import interrupts, ranks
from clipfit.errors import ModelError, UsageError
from clipfit.events import StepReport
from clipfit.model.weights import state_sha256
from clipfit.runs import files
from clipfit.training.state import Trained

FILE = "state.safetensors"


@dataclass(frozen=True)
class Saving:
    """Where the state is kept, and of what.

    every: optimiser steps between two; None: only when the training is stopped, and at its end.
    resume: whether to go on from a state that is there; without it the first one that is saved replaces it.
    Of several processes the first writes and removes it, and all read it.

    identity: what must be the same for a training to go on from a saved state: config.json's record, the shots, …
    """

    folder: Path
    every: int | None
    identity: Mapping[str, Any]
    resume: bool = True

    @property
    def path(self) -> Path:
        return self.folder / FILE

    @property
    def found(self) -> bool:
        """Whether there is a state to go on from."""
        return self.resume and self.path.exists()

    def save(self, trained: Trained, reports: Sequence[StepReport]) -> None:
        """Keep the state after the last report's step. Raises OutputError."""
        tensors = trained.tensors()  # by all processes, for what is in shares is put together
        if not ranks.here().leads:
            return
        files.make_folder(self.folder)
        about = {"identity": self.identity, "reports": [report.as_json() for report in reports]}
        files.write_tensors(self.path, tensors, {**about, "sha256": _digest(tensors, about)})

    @contextlib.contextmanager
    def kept(self, trained: Trained, reports: Sequence[StepReport]) -> Iterator[None]:
        """Where the block is interrupted, keep the state of the last finished step and say so in the exception.

        Not where weights are in shares, for processes are interrupted in different steps: see `words`.
        """
        try:
            yield
        except KeyboardInterrupt as stop:
            if reports and ranks.here().leads and not trained.in_shares:
                with contextlib.suppress(KeyboardInterrupt), interrupts.waiting():  # a second signal: it ends already
                    self.save(trained, reports)
                    step = f"step {len(reports)} is kept in {self.folder}"
                    stop.args = (f"{step}; the same command with --resume goes on",)
            raise

    def words(self) -> str:
        """Of the state that is there, for who is stopped; "" where there is none."""
        return f"{self.path} is kept; the same command with --resume goes on from it" if self.has_own else ""

    def due(self, step: int, steps: int) -> bool:
        """Whether to save after step `step` (from 1); the last one always, so that a kill in writing costs nothing."""
        return step == steps or (self.every is not None and step % self.every == 0)

    def clear(self) -> None:
        """Remove the state, for its run is complete; one of another training is left alone."""
        if ranks.here().leads and self.has_own:
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def has_own(self) -> bool:
        """Whether a state of this very training is there."""
        with contextlib.suppress(ModelError):
            return not differences(files.read_metadata(self.path).get("identity", {}), self.identity)
        return False

    def restore(self, trained: Trained) -> list[StepReport]:
        """Go back to the saved state, if there is one; the reports of the steps that need not be done again.

        Raises:
            UsageError: it is the state of another training. ModelError: it is damaged.
        """
        if not self.found:
            return []
        tensors, about = files.read_tensors(self.path)
        if about.pop("sha256", None) != _digest(tensors, about):
            raise ModelError(f"{self.path} is damaged: remove {self.folder} and start anew, without --resume.")
        require_same(about["identity"], self.identity, f"the saved state in {self.folder}")
        trained.restore(tensors)
        return [StepReport(**report) for report in about["reports"]]


def require_same(found: Mapping[str, Any], mine: Mapping[str, Any], what: str) -> None:
    """Raises UsageError that shows where two records differ."""
    if different := differences(found, mine):
        shown = ", ".join(f"{key} was {before!r} and is {now!r}" for key, (before, now) in list(different.items())[:3])
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise UsageError(
            f"{what} was made with other settings: {shown}{more}; give the same ones, or leave --resume out to start "
            "anew."
        )


def differences(found: Mapping[str, Any], mine: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Where two records differ: "recipe.epochs" → what it was, what it is. None: it has no such entry."""
    before, now = dict(_leaves(found)), dict(_leaves(mine))
    keys = [key for key in before | now if before.get(key) != now.get(key)]
    return {key: (before.get(key), now.get(key)) for key in keys}


def _digest(tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> str:
    text = json.dumps(about, sort_keys=True) + state_sha256(tensors)
    return hashlib.sha256(text.encode()).hexdigest()


def _leaves(record: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """("recipe.epochs", 20), … of nested mappings and lists."""
    if isinstance(record, Mapping):
        for key, value in record.items():
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    elif isinstance(record, (list, tuple)):
        for number, value in enumerate(record):
            yield from _leaves(value, f"{name}[{number}]")
    else:
        yield name, record
