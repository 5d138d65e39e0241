"""`adapt --overwrite`: whatever stops it, one whole run is there at every instant, and nothing is left over."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
from kills import ends_with, hidden
from test_resume import digests

from clipfit import AdaptConfig, adapt, interrupts
from clipfit.runs.run import open_run

QUICK = {"epochs": 1, "batch_size": 6}


class Trial:
    """A run that is there, another that is to replace it, and a note that the user put beside the old one's files."""

    def __init__(self, shots: Path, model: str, place: Path):
        self.shots, self.model, self.place, self.target = shots, model, place, place / "run"
        adapt(self.config(seed=0, output=self.target))
        self.old = digests(self.target)
        self.new = digests(adapt(self.config(seed=1, output=place / "new")).run)
        (self.target / "notes.txt").write_text("mine")

    def config(self, seed: int, output: Path, **given) -> AdaptConfig:
        return AdaptConfig(self.shots, "finetune", self.model, seed=seed, output=output, recipe=QUICK, **given)

    def replaced(self, at: int | None, moments: str, number: int = signal.SIGKILL) -> int:
        """Overwrite, stopped at a moment; check; put everything back as it was."""
        config = self.config(1, self.target, overwrite=True)
        with interrupts.raising():
            ended = ends_with(lambda: adapt(config), at, moments, number)
        self.require_one_whole_run()
        return ended

    def require_one_whole_run(self) -> None:
        run = open_run(self.target)  # as every next command does
        run.state(1.0)
        run.state(run.alpha)
        found = {name: digest for name, digest in digests(run.path).items() if name != "notes.txt"}
        assert found in (self.old, self.new)
        assert hidden(self.place) == set()
        notes = [*self.place.glob("run*/notes.txt")]
        assert [note.read_text() for note in notes] == ["mine"]
        assert (notes[0].parent == self.target) == (found == self.old)
        adapt(self.config(0, self.target, overwrite=True))
        for folder in self.place.glob("run.old-*"):
            (folder / "notes.txt").unlink()
            folder.rmdir()
        (self.target / "notes.txt").write_text("mine")


@pytest.fixture
def trial(flat, models, tmp_path) -> Trial:
    return Trial(flat, models["vit"], tmp_path)


def test_killed_in_replacing_a_run_one_whole_run_is_there(trial):
    total = trial.replaced(None, "renames")
    for at in range(total - 2, total + 1):  # the moves themselves: the others write files of a folder that is hidden
        assert trial.replaced(at, "renames") == -signal.SIGKILL


@pytest.mark.slow
def test_killed_at_every_rename_one_whole_run_is_there(trial):
    total = trial.replaced(None, "renames")
    assert [trial.replaced(at, "renames") for at in range(1, total + 1)] == [-signal.SIGKILL] * total
    print(f"adapt --overwrite killed at each of {total} renames: one whole run every time, nothing left over")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "times"), [(signal.SIGKILL, 25), (signal.SIGTERM, 5), (signal.SIGINT, 5)])
def test_stopped_at_any_moment_one_whole_run_is_there(trial, number, times):
    total = trial.replaced(None, "calls")
    moments = random.Random(number).sample(range(1, total + 1), times)
    ends = [trial.replaced(at, "calls", number) for at in moments]
    killed = -number if number == signal.SIGKILL else -1000 - 128 - number
    assert all(end == killed for end in ends)
    print(f"adapt --overwrite stopped by signal {number} at {times} moments of {total}: one whole run every time")
