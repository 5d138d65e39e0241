"""`adapt --save-every` and `--resume`: whatever stops it, going on ends with the bytes of an undisturbed run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import signal
from pathlib import Path

import pytest
import torch
from kills import ends_with, hidden

from clipfit import AdaptConfig, adapt, interrupts
from clipfit.errors import UsageError
from clipfit.methods import METHODS
from clipfit.runs.run import open_run
from clipfit.training import step

QUICK = {"epochs": 2, "batch_size": 5}
OTHERS = [(m, t) for t in ("full", "lora") for m in METHODS if (m, t) != ("cite", "full")]


def config(shots: Path, model: str, output: Path, method: str = "cite", tuning: str = "full", **given) -> AdaptConfig:
    recipe = {**QUICK, **given.pop("recipe", {})}
    return AdaptConfig(shots, method, model, tuning=tuning, output=output, recipe=recipe, **given)


def digests(run: Path) -> dict[str, str]:
    names = (p for p in run.iterdir() if p.name != "timing.json" and p.is_file())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in names}


class Trial:
    """One method and tuning, undisturbed once, then killed and gone on as often as asked."""

    def __init__(self, shots: Path, model: str, place: Path, method: str, tuning: str, **more):
        self.target = place / "run"
        self.given, self.more = (shots, model, self.target, method, tuning), more
        whole = adapt(config(shots, model, place / "whole", method, tuning, **more)).run
        self.expected = digests(whole)

    def moments(self, kind: str) -> int:
        """How many there are in a run that nothing disturbs, which ends with the same bytes though it saves."""
        count = ends_with(lambda: adapt(config(*self.given, save_every=1, **self.more)), None, kind)
        self.ended_well()
        return count

    def killed(self, at: int, kind: str, number: int = signal.SIGKILL) -> int:
        with interrupts.raising():
            ended = ends_with(lambda: adapt(config(*self.given, save_every=1, **self.more)), at, kind, number)
        assert not self.target.exists() or open_run(self.target).notes == ()  # nothing, or a whole run
        adapt(config(*self.given, resume=True, **self.more))
        self.ended_well()
        return ended

    def ended_well(self) -> None:
        assert digests(self.target) == self.expected
        assert hidden(self.target.parent) == set()
        for file in self.target.iterdir():
            file.unlink()
        self.target.rmdir()


@pytest.fixture
def cite(flat, models, tmp_path) -> Trial:
    return Trial(flat, models["vit"], tmp_path, "cite", "full")


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(cite):
    total = cite.moments("calls")
    for at in random.Random(0).sample(range(1, total + 1), 3):
        assert cite.killed(at, "calls") == -signal.SIGKILL


@pytest.mark.slow
def test_killed_at_25_moments_it_goes_on_to_the_same_bytes(cite):
    total = cite.moments("calls")
    ends = [cite.killed(at, "calls") for at in random.Random(1).sample(range(1, total + 1), 25)]
    assert ends == [-signal.SIGKILL] * 25
    print(f"adapt killed at {len(ends)} random moments of {total}: all went on to the same bytes")


@pytest.mark.slow
def test_killed_at_every_rename_it_goes_on_to_the_same_bytes(cite):
    total = cite.moments("renames")
    assert total >= 10
    ends = [cite.killed(at, "renames") for at in range(1, total + 1)]
    assert ends == [-signal.SIGKILL] * total
    print(f"adapt killed at each of {total} renames: all went on to the same bytes")


@pytest.mark.slow
def test_killed_in_its_folds_it_goes_on_to_the_same_bytes(flat, models, tmp_path):
    trial = Trial(flat, models["vit"], tmp_path, "cite", "full", alpha="auto")
    totals = {kind: trial.moments(kind) for kind in ("calls", "renames")}
    moments = [("renames", at) for at in range(1, totals["renames"] + 1)]
    moments += [("calls", at) for at in random.Random(4).sample(range(totals["calls"] // 3, totals["calls"] + 1), 12)]
    assert [trial.killed(at, kind) for kind, at in moments] == [-signal.SIGKILL] * len(moments)
    print(f"adapt --alpha auto killed at {len(moments)} moments, {totals['renames']} of them renames: the same bytes")


def test_killed_between_the_parts_of_a_batch_it_goes_on_to_the_same_bytes(flat, models, tmp_path):
    parts = {"micro_batch": 2, "gradient_checkpointing": True, "epochs": 1}
    trial = Trial(flat, models["vit"], tmp_path, "cite+atha", "lora", recipe=parts)
    total = trial.moments("calls")
    assert trial.killed(random.Random(5).randrange(total // 2, total), "calls") == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize(("method", "tuning"), OTHERS, ids="-".join)
def test_every_method_and_tuning_goes_on_to_the_same_bytes(flat, models, tmp_path, method, tuning):
    trial = Trial(flat, models["vit"], tmp_path, method, tuning)
    total = trial.moments("calls")
    for at in random.Random(2).sample(range(total // 3, total + 1), 3):
        assert trial.killed(at, "calls") == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_told_to_end_it_keeps_its_state_and_goes_on(cite, number):
    total = cite.moments("calls")
    for at in random.Random(3).sample(range(total // 2, total * 9 // 10), 2):
        assert cite.killed(at, "calls", number) == -1000 - 128 - number


def test_told_to_end_in_training_it_says_what_is_kept(flat, models, tmp_path):
    class Stopping:
        def say(self, text: str) -> None:
            pass

        def step(self, report) -> None:
            if report.step == 2:
                raise interrupts.Stopped(signal.SIGTERM)

    with pytest.raises(interrupts.Stopped) as stopped:
        adapt(config(flat, models["vit"], tmp_path / "run", save_every=100), Stopping())
    assert "step 2 is kept in" in str(stopped.value)
    assert (tmp_path / ".run.resume/state.safetensors").exists()
    assert not (tmp_path / "run").exists()


class Steps:
    """Which steps were taken, and what was said."""

    def __init__(self, stop_after: int | None = None):
        self.said: list[str] = []
        self.taken: list[int] = []
        self.stop_after = stop_after

    def say(self, text: str) -> None:
        self.said.append(text)

    def step(self, report) -> None:
        self.taken.append(report.step)
        if report.step == self.stop_after:
            raise KeyboardInterrupt


@pytest.fixture
def stopped(flat, models, tmp_path):
    """The given of a run that was stopped after step 2 of 6, its state kept."""
    given = (flat, models["vit"], tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        adapt(config(*given, save_every=2), Steps(stop_after=2))
    return given


def test_it_goes_on_after_the_last_step_that_is_kept(stopped):
    going_on = Steps()
    adapt(config(*stopped, resume=True), going_on)
    assert going_on.taken == [3, 4, 5, 6]
    assert any("going on from" in text for text in going_on.said)


def test_after_memory_ran_out_it_goes_on_with_the_parts_that_fitted(flat, models, tmp_path, monkeypatch):
    """Whole batches again would be other roundings, where nothing else takes the memory any more."""
    usual, full = step.gradient, [3, 3]  # a step of each of two runs finds the memory full

    def gradient(objective, batch, size=None, tokens=None):
        if size is None and full and batch.image_rows.step + 1 == full[0]:
            full.pop()
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return usual(objective, batch, size, tokens)

    monkeypatch.setattr(step, "gradient", gradient)
    undisturbed = adapt(config(flat, models["vit"], tmp_path / "undisturbed")).run
    given = (flat, models["vit"], tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        adapt(config(*given, save_every=1), Steps(stop_after=4))
    assert full == []
    resumed = adapt(config(*given, resume=True)).run
    assert digests(resumed) == digests(undisturbed)
    lines = [json.loads(line) for line in (resumed / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("micro_batch") for line in lines] == [None, None, 2, 2, 2, 2]


def test_without_resume_it_starts_anew(stopped, tmp_path):
    anew = Steps()
    adapt(config(*stopped), anew)
    assert anew.taken == [1, 2, 3, 4, 5, 6]
    assert hidden(tmp_path) == set()


def test_with_nothing_saved_it_starts_anew_and_on_a_finished_run_it_says_so(flat, models, tmp_path):
    given, first, again = (flat, models["vit"], tmp_path / "run"), Steps(), Steps()
    made = adapt(config(*given, resume=True), first)
    before = digests(tmp_path / "run")
    found = adapt(config(*given, resume=True), again)
    assert len(first.taken) == 6
    assert again.taken == []
    assert any("is finished already" in text for text in again.said)
    assert (found.losses, found.on_shots, found.steps) == (made.losses, made.on_shots, made.steps)
    assert digests(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"seed": 1}, "config.seed was 0 and is 1"),
        ({"alpha": 0.25}, "config.alpha was 0.5 and is 0.25"),
        ({"method_options": {"scl_weight": 0.5}}, "config.method_options.scl_weight was 0.7 and is 0.5"),
    ],
)
def test_other_options_are_refused_with_the_difference(stopped, changed, words):
    with pytest.raises(UsageError) as refused:
        adapt(config(*stopped, resume=True, **changed))
    assert words in str(refused.value)


def test_a_finished_run_of_other_options_is_refused(flat, models, tmp_path):
    given = (flat, models["vit"], tmp_path / "run")
    adapt(config(*given))
    with pytest.raises(UsageError, match=r"the run .*config.seed was 0 and is 3"):
        adapt(config(*given, resume=True, seed=3))


def test_changed_shots_are_refused(stopped, tmp_path):
    import shutil

    from conftest import picture

    copy = tmp_path / "copy"
    shutil.copytree(stopped[0], copy / "pets")
    given = (copy / "pets", stopped[1], tmp_path / "other")
    with pytest.raises(KeyboardInterrupt):
        adapt(config(*given, save_every=2), Steps(stop_after=2))
    picture(77).save(copy / "pets/dog/0.png")
    with pytest.raises(UsageError, match=r"shots\[\d+\].sha256 was"):
        adapt(config(*given, resume=True))


def test_an_overwritten_run_stays_until_the_new_one_is_whole(flat, models, tmp_path):
    """And --resume goes on to replace it, as the command that was stopped would have."""
    given = (flat, models["vit"], tmp_path / "run")
    adapt(config(*given))
    old = digests(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        adapt(config(*given, seed=9, overwrite=True, save_every=1), Steps(stop_after=3))
    assert digests(tmp_path / "run") == old
    adapt(config(*given, seed=9, resume=True))
    assert json.loads((tmp_path / "run/config.json").read_text())["seed"] == 9
    assert hidden(tmp_path) == set()


def test_one_command_can_be_given_again_until_it_is_done(flat, models, tmp_path):
    """--overwrite beside --resume: what is this command's is gone on with, or finished; all else is replaced."""
    undisturbed = digests(adapt(config(flat, models["vit"], tmp_path / "undisturbed")).run)
    run = adapt(config(flat, models["vit"], tmp_path / "run", recipe={"epochs": 1})).run
    older = digests(run)
    both = config(flat, models["vit"], run, save_every=1, overwrite=True, resume=True)

    def taken(stop_after: int | None = None) -> list[int]:
        steps = Steps(stop_after)
        with pytest.raises(KeyboardInterrupt) if stop_after else contextlib.nullcontext():
            adapt(both, steps)
        return steps.taken

    assert taken(stop_after=2) == [1, 2]
    assert digests(run) == older
    assert taken() == [3, 4, 5, 6]
    assert digests(run) == undisturbed
    assert taken() == []
    assert digests(run) == undisturbed

    with pytest.raises(KeyboardInterrupt):  # a state of another command lies there, and what it was to replace is torn
        adapt(config(flat, models["vit"], run, save_every=1, overwrite=True, recipe={"epochs": 3}), Steps(3))
    (run / "shots.jsonl").write_text("")
    assert taken() == [1, 2, 3, 4, 5, 6]
    assert digests(run) == undisturbed
    assert hidden(tmp_path) == set()


def test_an_empty_folder_of_state_is_no_leave_to_replace_a_run(flat, models, tmp_path):
    """What a kill before the first state leaves."""
    given = (flat, models["vit"], tmp_path / "run")
    adapt(config(*given))
    before = digests(tmp_path / "run")
    (tmp_path / ".run.resume").mkdir()
    with pytest.raises(UsageError, match=r"the run .*config.seed was 0 and is 3"):
        adapt(config(*given, resume=True, seed=3))
    assert digests(tmp_path / "run") == before


def test_a_run_of_an_earlier_format_is_not_replaced(flat, models, tmp_path):
    given = (flat, models["vit"], tmp_path / "run")
    adapt(config(*given))
    (tmp_path / "run/files.json").unlink()
    record = json.loads((tmp_path / "run/config.json").read_text())
    (tmp_path / "run/config.json").write_text(json.dumps({**record, "format": 1}))
    before = digests(tmp_path / "run")
    with pytest.raises(UsageError, match=r"the run .* was made with other settings"):
        adapt(config(*given, resume=True, seed=3))
    assert digests(tmp_path / "run") == before


def test_a_finished_run_leaves_the_state_of_the_one_that_was_to_replace_it(flat, models, tmp_path):
    given = (flat, models["vit"], tmp_path / "run")
    adapt(config(*given))
    with pytest.raises(KeyboardInterrupt):
        adapt(config(*given, seed=9, overwrite=True, save_every=1), Steps(stop_after=3))
    adapt(config(*given, resume=True))  # finished: nothing to do
    going_on = Steps()
    adapt(config(*given, seed=9, resume=True), going_on)
    assert going_on.taken == [4, 5, 6]
