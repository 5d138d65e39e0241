"""N processes are one process: the same gradient, the same run, the same figures, and one message where it fails."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Result
from processes import Found, together, torchrun
from safetensors.torch import load_file
from test_objectives import NAMES
from test_step import LABELS, Hungry, a_batch, forget, gradient_of, in_double, plainly

import clipfit
from clipfit import AdaptConfig, adapt, interrupts, ranks
from clipfit.errors import ClipfitError, DataError, UsageError
from clipfit.methods import METHODS, Group
from clipfit.methods.batch import Batch
from clipfit.model import loading, sharding
from clipfit.model.clip import Clip
from clipfit.ranks import Ranks
from clipfit.rows.spool import Spool
from clipfit.streams import Rows
from clipfit.training.saving import Saving
from clipfit.training.state import Trained
from clipfit.training.step import TEXTS, Fitting, accumulate
from clipfit.verbs import adapt as adapt_verb

SIZES = [1, 2, None]


def the_share_of(clip: Clip, labels: list[int] = LABELS) -> Batch:
    """What this process has of the batch that one process has."""
    whole = a_batch(clip, labels)
    own = ranks.here().computed(len(labels))
    return Batch.of(whole.images[own.start : own.stop], labels, whole.image_rows, own)


def without(trained) -> set[str]:
    return {name for name, p in trained.items() if p.grad is None}


def require_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.norm() > 0
    assert ((found - expected).norm() / expected.norm()).item() <= 1e-10


def gradients_together(count: int, models, method: str, tuning: str, context: str | None, labels) -> list[Found]:
    """By size of part; the same to the bit in all processes."""

    def work() -> Found:
        with in_double(models["vit"], method, tuning, context) as (objective, trained):
            found = {}
            for size in SIZES:
                loss = accumulate(objective, the_share_of(objective.clip, labels), size)
                found[f"{size} loss"] = torch.tensor(loss.total)
                lacking = without(trained)
                found[f"{size} without"] = torch.tensor([name in lacking for name in trained])
                found[f"{size} gradient"] = gradient_of(trained)
            return found

    first, *others = together(count, work)
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)
    return [{key.split()[1]: first[key] for key in first if key.startswith(f"{size} ")} for size in SIZES]


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("count", "tuning", "context"),
    [(2, "full", "a photo of a "), (2, "lora", None), (3, "full", None), (3, "lora", "a photo of a ")],
)
def test_processes_have_the_gradient_of_one(models, method, tuning, context, count):
    assert len(NAMES) > TEXTS  # so that texts come in parts too
    with in_double(models["vit"], method, tuning, context) as (objective, trained):
        batch = a_batch(objective.clip)
        loss = accumulate(objective, batch).total
        lacking = [name in without(trained) for name in trained]
        gradient_of(trained)
        expected = plainly(objective, batch, trained)
    for found in gradients_together(count, models, method, tuning, context, LABELS):
        require_same(found["gradient"], expected)
        assert found["loss"].item() == pytest.approx(loss, rel=1e-6)
        assert found["without"].tolist() == lacking


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("labels", [LABELS, [2, 2, 2]], ids=["uneven", "fewer images than processes"])
@pytest.mark.parametrize("method", METHODS)
def test_weights_in_shares_have_it_too(models, method, labels):
    """Each block computes in all processes as often, whatever their shares of the rows."""

    def work() -> Found:
        with (
            in_double(models["vit"], method, "full") as (objective, trained),
            sharding.sharded(objective.clip, objective.teacher),
        ):
            now = {name: objective.clip.named_parameters().get(name, p) for name, p in trained.items()}
            assert 2 * sum(map(ranks.in_shares, now.values())) > len(now)
            if objective.teacher:
                assert any(map(ranks.in_shares, objective.teacher.visual.parameters()))
            found = {}
            for size in SIZES:
                accumulate(objective, the_share_of(objective.clip, labels), size)
                gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in now.values()]
                whole = [g.full_tensor() if ranks.in_shares(g) else g for g in gradients]
                found[f"{size} gradient"] = torch.cat([g.flatten() for g in whole])
                forget(now)
            return found

    with in_double(models["vit"], method, "full") as (objective, trained):
        accumulate(objective, a_batch(objective.clip, labels))
        expected = gradient_of(trained)
    first, *others = together(4, work)
    for size in SIZES:
        require_same(first[f"{size} gradient"], expected)
        assert all(torch.equal(first[f"{size} gradient"], other[f"{size} gradient"]) for other in others)


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_one_class_has_it_too(models, method):
    """Without negatives, and with fewer images and texts than processes."""
    labels = [2, 2, 2]
    with in_double(models["vit"], method, "full") as (objective, trained):
        accumulate(objective, a_batch(objective.clip, labels))
        lacking = [name in without(trained) for name in trained]
        expected = gradient_of(trained)
    for found in gradients_together(4, models, method, "full", None, labels):
        require_same(found["gradient"], expected)
        assert found["without"].tolist() == lacking


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("hungry", [0, 2])
def test_where_one_runs_out_of_memory_all_halve_their_parts(models, hungry):
    """Wherever it is in its step when another one does."""
    with in_double(models["vit"], "cite+atha", "full") as (objective, trained):
        expected = plainly(objective, a_batch(objective.clip), trained)

    def work() -> Found:
        with in_double(models["vit"], "cite+atha", "full") as (objective, trained):
            said: list[str] = []
            holds = 1 if ranks.here().rank == hungry else 100
            hungrily = Hungry(objective, holds, torch.OutOfMemoryError("CUDA out of memory."))
            fitting = Fitting(hungrily, None, said.append)
            for _ in range(2):
                fitting.accumulate(the_share_of(objective.clip), lambda: gradient_of(trained))
            assert len(said) == 1, said
            assert "images are encoded 1 at a time" in said[0]  # of 3 at most
            return {"gradient": gradient_of(trained)}

    for found in together(3, work):
        require_same(found["gradient"], expected)


def test_one_image_that_does_not_fit_one_process_is_said_by_all(models):
    def work() -> Found:
        with in_double(models["vit"], "flyp", "full") as (objective, _):
            holds = 0 if ranks.here().rank == 1 else 100
            hungrily = Hungry(objective, holds, MemoryError("no room"))
            with pytest.raises(UsageError, match="one image at a time does not fit the memory"):
                Fitting(hungrily, None).accumulate(the_share_of(objective.clip), lambda: None)
            return {}

    together(2, work)


def test_shares_are_all_rows_in_order():
    for count, rows in ((1, 5), (2, 5), (3, 2), (4, 4)):
        shares = [Ranks(rank, count).share(rows) for rank in range(count)]
        assert [row for share in shares for row in share] == list(range(rows))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert max(map(len, shares)) == Ranks(0, count).most(rows)


def test_gradients_of_any_size_and_type_are_summed(monkeypatch):
    """Large ones alone, small ones together, as many as there is room for; where there is none at all, none is made."""
    monkeypatch.setattr(ranks, "SMALL", 50)
    monkeypatch.setattr(ranks, "TOGETHER", 20)

    def work() -> Found:
        rank = ranks.here().rank
        lying = torch.nn.Parameter(torch.zeros(9, 8).T)  # which NCCL would not take
        lying.grad = torch.arange(72.0).view(9, 8).T
        ranks.here().sum_gradients([lying])
        assert torch.equal(lying.grad, 2 * torch.arange(72.0).view(9, 8).T)
        shapes = [(3,), (60,), (2, 4), (15,), (70,), (), (30,), (1,)]
        parameters = [torch.nn.Parameter(torch.zeros(s, dtype=torch.float64 if len(s) == 2 else None)) for s in shapes]
        for k, parameter in enumerate(parameters[:-1]):
            if k != 2 or rank:
                parameter.grad = torch.full_like(parameter, 10**rank * (k + 1))
        ranks.here().sum_gradients(parameters)
        assert parameters[-1].grad is None
        return {str(k): p.grad.flatten() for k, p in enumerate(parameters[:-1])}

    for found in together(2, work):
        assert [set(tensor.tolist()) for _, tensor in sorted(found.items())] == [
            {11.0}, {22.0}, {30.0}, {44.0}, {55.0}, {66.0}, {77.0}
        ]  # fmt: skip


def test_rows_keep_their_numbers():
    assert Rows(3, (7, 8, 9)).of(range(1, 3)) == Rows(3, (8, 9))


# ---- a whole command


def files_of(run: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in run.iterdir() if p.name not in ("timing.json", "files.json")}


def far(first: Path, second: Path, start: Path) -> float:
    """How far apart two runs' weights are, as a share of how far they went. AdamW makes a step of rounding errors."""
    one, other, before = (load_file(path) for path in (first, second, start))
    apart = torch.cat([(one[name] - other[name]).flatten().double() for name in before])
    went = torch.cat([(one[name] - before[name]).flatten().double() for name in before])
    return (apart.norm() / went.norm()).item()


def errors(results: list[Result]) -> list[str]:
    """What all of them have to say of how they ended."""
    words = ("error:", "interrupted:", "terminated:", "Traceback")
    return [line for result in results for line in result.stderr.splitlines() if line.startswith(words)]


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, rank: int | None, action: Callable[[], None]) -> None:
    """Have it done before the step-th step of a process (None: of every one), from 1."""
    usual, done = Trained.step, []

    def stepped(self: Trained, annealed: float) -> None:
        done.append(annealed)
        if len(done) == step and ranks.here().rank in (rank, ranks.here().rank if rank is None else rank):
            action()
        usual(self, annealed)

    monkeypatch.setattr(Trained, "step", stepped)


@pytest.mark.parametrize("method", ["cite", pytest.param("cite+atha", marks=pytest.mark.slow)])
def test_processes_write_one_run_which_is_that_of_one(flat, models, tmp_path, method):
    more = ["--method", method, "--model", models["vit"], "--json"]
    one = adapt(AdaptConfig(flat, method=method, model=models["vit"], output=tmp_path / "one")).run
    first, second = torchrun(tmp_path, 2, "adapt", flat, *more, "--output", "two")
    assert (first.code, second.code) == (0, 0), first.stderr + second.stderr
    assert (second.stdout, second.stderr) == ("", "")
    assert first.document["run"] == "two"
    assert "step 6/6" in first.stderr
    assert {p.name for p in (tmp_path / "two").iterdir()} == {p.name for p in one.iterdir()}
    start = Path(models["vit"].removeprefix("local-dir:")) / "open_clip_model.safetensors"
    for name in ("finetuned.safetensors", "model.safetensors"):
        assert far(one / name, tmp_path / "two" / name, start) < 0.05
    again = torchrun(tmp_path, 2, "adapt", flat, *more, "--output", "again")
    assert again[0].code == 0
    assert files_of(tmp_path / "two") == files_of(tmp_path / "again")


def test_a_mistake_that_all_see_is_said_once(flat, models, tmp_path):
    for mistake in (["--batch-size", "0"], ["--classes", "missing.txt"]):
        results = torchrun(tmp_path, 2, "adapt", flat, "--model", models["vit"], *mistake, "--json")
        assert results[0].code == 2 if mistake[1] == "0" else 3
        assert len(errors(results)) == 1
        assert results[0].document["error"]["code"] == results[0].code
        assert results[1].stdout == ""
        assert not (tmp_path / "runs").exists()


def test_a_mistake_that_one_alone_sees_before_they_meet_is_said(flat, models, tmp_path, monkeypatch):
    usual, wait_for_all = clipfit.adapt_config, ranks._wait_for_all
    os.mkfifo(tmp_path / "waits")

    def mistaken(values: Mapping[str, Any]) -> AdaptConfig:
        if os.environ["RANK"] == "1":
            (tmp_path / "waits").read_text()  # when the other is there
            raise UsageError("this machine has no such folder.")
        return usual(values)

    def waiting(count: int) -> None:
        (tmp_path / "waits").write_text("")
        wait_for_all(count)

    monkeypatch.setattr(clipfit, "adapt_config", mistaken)
    monkeypatch.setattr(ranks, "_wait_for_all", waiting)
    monkeypatch.setattr(ranks, "PATIENCE", 0.1)
    results = torchrun(tmp_path, 2, "adapt", flat, "--model", models["vit"], "--output", "run")
    assert [result.code for result in results] == [128 + signal.SIGTERM, UsageError.exit_code]
    assert errors(results) == [
        "terminated: nothing was written",  # by torchrun, while it waited for the other
        "error: process 1: this machine has no such folder.",
    ]
    assert not (tmp_path / "run").exists()


def test_an_error_of_one_process_ends_all_with_its_message(flat, models, tmp_path, monkeypatch):
    def fails() -> None:
        raise DataError("the disk of this process is gone.")

    at_step(monkeypatch, 2, 1, fails)
    results = torchrun(tmp_path, 3, "adapt", flat, "--model", models["vit"], "--output", "run")
    assert all(result.code != 0 for result in results)
    assert results[1].code == DataError.exit_code
    assert errors(results) == ["error: process 1: the disk of this process is gone."]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_ends_all(flat, models, tmp_path, monkeypatch, killed):
    at_step(monkeypatch, 2, killed, lambda: os.kill(os.getpid(), signal.SIGKILL))
    results = torchrun(tmp_path, 2, "adapt", flat, "--model", models["vit"], "--output", "run")
    assert results[killed].code == -signal.SIGKILL
    assert results[1 - killed].code == 128 + signal.SIGTERM
    assert len(errors(results)) == (1 if killed else 0)  # torchrun itself reports it
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_interrupted_processes_keep_one_state_and_go_on_to_the_same_bytes(flat, models, tmp_path, monkeypatch):
    command = ["adapt", flat, "--model", models["vit"], "--save-every", "100", "--output"]
    assert torchrun(tmp_path, 2, *command, "whole")[0].code == 0
    with monkeypatch.context() as patch:
        at_step(patch, 4, None, lambda: os.kill(os.getpid(), signal.SIGINT))
        results = torchrun(tmp_path, 2, *command, "run")
    assert results[0].code in (130, 143)  # where the other one is so much faster that torchrun's SIGTERM comes first
    assert len(errors(results)) == 1
    assert re.match(r"(interrupted|terminated): step [34] is kept in", errors(results)[0])
    assert (tmp_path / ".run.resume" / "state.safetensors").exists()
    results = torchrun(tmp_path, 2, *command, "run", "--resume")
    assert results[0].code == 0, results[0].stderr
    assert files_of(tmp_path / "run") == files_of(tmp_path / "whole")
    assert not (tmp_path / ".run.resume").exists()
    assert "is finished already" in torchrun(tmp_path, 2, *command, "run", "--resume")[0].stderr


@pytest.mark.slow
def test_another_number_of_processes_does_not_go_on_from_a_state(flat, models, tmp_path, monkeypatch):
    command = ["adapt", flat, "--model", models["vit"], "--save-every", "1", "--output", "run"]
    at_step(monkeypatch, 4, None, lambda: os.kill(os.getpid(), signal.SIGINT))
    torchrun(tmp_path, 2, *command)
    results = torchrun(tmp_path, 3, *command, "--resume")
    assert results[0].code == UsageError.exit_code
    assert len(errors(results)) == 1
    assert "config.processes was 2 and is 3" in errors(results)[0]


def test_processes_that_come_to_different_weights_write_no_run(flat, models, tmp_path, monkeypatch):
    usual = Trained.step

    def astray(self: Trained, annealed: float) -> None:
        usual(self, annealed)
        with torch.no_grad():
            next(iter(self.parameters.values())).add_(1e-3 * ranks.here().rank)

    monkeypatch.setattr(Trained, "step", astray)
    results = torchrun(tmp_path, 2, "adapt", flat, "--model", models["vit"], "--output", "run")
    assert results[0].code == ClipfitError.exit_code
    assert len(errors(results)) == 1
    assert "the 2 processes came to different weights" in errors(results)[0]
    assert not (tmp_path / "run").exists()


def test_the_first_alone_keeps_a_state(tmp_path):
    def work() -> Found:
        saving = Saving(tmp_path / str(ranks.here().rank), 1, {})
        saving.save(Trained([Group({"a": torch.nn.Parameter(torch.zeros(2))})], 1.0), [])
        assert saving.path.exists() == ranks.here().leads
        return {}

    together(2, work)


def test_weights_that_differ_are_noticed():
    def work() -> Found:
        parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.zeros(2))]
        ranks.here().require_same(parameters)
        with torch.no_grad():
            parameters[1][0] += ranks.here().rank
        with pytest.raises(ClipfitError, match="the 2 processes came to different weights"):
            ranks.here().require_same(parameters)
        return {}

    together(2, work)


def test_what_the_first_finds_is_told_to_all():
    found = {"é": [1, None, "\U0001f431"], "": 0.1}

    def work() -> Found:
        assert ranks.here().told(lambda: found if ranks.here().leads else pytest.fail("asked twice")) == found
        assert ranks.here().told(lambda: "") == ""
        return {}

    together(3, work)


def test_commands_that_share_no_work_are_done_by_the_first(tmp_path):
    first, second = torchrun(tmp_path, 2, "models", "--json")
    assert first.code == second.code == 0
    assert first.document
    assert second.stdout == second.stderr == ""


@pytest.mark.slow
def test_torchrun_itself(flat, models, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "clipfit", "adapt",
               str(flat), "--model", models["vit"], "--output", "run", "--json"]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1
    assert (tmp_path / "run" / "config.json").exists()
    failed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert failed.returncode != 0
    assert failed.stderr.count("error: run exists already") == 1
    assert "terminated:" not in failed.stderr


# ---- measuring


def test_processes_measure_what_one_does_to_the_bit(split_run, split, tmp_path):
    """Each decodes its share, and a batch is the same whoever encodes it."""
    runs = [shutil.copytree(split_run, tmp_path / name) for name in ("one", "three")]
    options = ["--data", split / "test", "--alphas", "0,0.5", "--batch-size", "2", "--retain", split / "test", "--json"]
    alone = torchrun(tmp_path, 1, "evaluate", runs[0], *options)
    shared = torchrun(tmp_path, 3, "evaluate", runs[1], *options)
    assert [result.code for result in (*alone, *shared)] == [0] * 4, shared[0].stderr
    assert all(result.stdout == result.stderr == "" for result in shared[1:])
    found, expected = shared[0].document, alone[0].document
    assert {k: v for k, v in found.items() if k not in ("run", "kept")} == {
        k: v for k, v in expected.items() if k not in ("run", "kept")
    }
    one, three = ({p.name: p.read_bytes() for p in (run / "evaluations" / "test").iterdir()} for run in runs)
    assert {name for name in one if one[name] != three[name]} <= {"timing.json"}


def test_an_image_that_cannot_be_read_is_what_it_is_to_one_process(split_run, split, tmp_path):
    run = shutil.copytree(split_run, tmp_path / "run")
    data = shutil.copytree(split / "test", tmp_path / "data")
    (data / "elk" / "1.png").write_bytes(b"no image")
    command = ["evaluate", run, "--data", data, "--json"]
    results = torchrun(tmp_path, 2, *command)
    assert results[0].code == DataError.exit_code
    [said] = errors(results)
    assert said.startswith("error: image ")
    assert "--skip-bad-images" in said
    results = torchrun(tmp_path, 2, *command, "--skip-bad-images")
    assert results[0].code == 0, results[0].stderr
    assert results[0].document["skipped"] == ["data/elk/1.png"]


@pytest.mark.slow
def test_processes_share_the_folds(flat, models, tmp_path):
    more = ["--model", models["vit"], "--alpha", "auto", "--save-every", "100", "--json"]
    alone = torchrun(tmp_path, 1, "adapt", flat, *more, "--output", "one")
    shared = torchrun(tmp_path, 2, "adapt", flat, *more, "--output", "two")
    assert shared[0].code == 0, shared[0].stderr
    found, expected = shared[0].document, alone[0].document
    for part in ("base", "new"):
        assert found["forecast"][part]["zero_shot"] == pytest.approx(expected["forecast"][part]["zero_shot"], abs=1e-6)
        assert found["forecast"][part]["accuracy"] == pytest.approx(expected["forecast"][part]["accuracy"], abs=0.2)
    assert (tmp_path / "two" / "folds.json").exists()


def test_processes_share_the_cells_of_a_plan(split, models, tmp_path):
    """Each does some, and the first writes the tables when all are done."""
    (tmp_path / "plan.toml").write_text(
        f"""
        protocol = "fsl"
        model = "{models["vit"]}"
        shots = [1]
        seeds = [1, 2, 3]
        [sets.animals]
        data = "{split}"
        [methods.zero-shot]
        [methods.flyp]
        method = "flyp"
        """
    )
    results = torchrun(tmp_path, 2, "benchmark", "plan.toml", "--output", "out", "--json")
    assert [result.code for result in results] == [0, 0], results[0].stderr
    found = results[0].document
    assert found["done"] == found["finished"] == found["cells"] == 4
    assert (tmp_path / "out" / "table.md").exists()
    assert results[1].stdout == results[1].stderr == ""


# ---- predicting


def test_processes_name_images_as_one_does_to_the_byte(split_run, split, tmp_path):
    """Whoever judges a batch; what cannot be read is a row of its own, and the last round is no whole one."""
    data = shutil.copytree(split / "test", tmp_path / "data")
    (data / "elk" / "1.png").write_bytes(b"no image")
    count = sum(path.is_file() for path in data.rglob("*"))
    command = ["predict", split_run, "data", "--batch-size", "2", "--json"]
    for processes in (1, 2, 3):
        names = f"{processes}.jsonl", f"{processes}.npy", f"{processes}.html"
        results = torchrun(
            tmp_path, processes, *command, "--output", names[0], "--embeddings", names[1], "--html", names[2]
        )
        assert [result.code for result in results] == [0] * processes, results[0].stderr
        assert all(result.stdout == result.stderr == "" for result in results[1:])
        assert (results[0].document["rows"], results[0].document["errors"]) == (count, 1)
        for name, first in zip(names, ("1.jsonl", "1.npy", "1.html"), strict=True):
            assert (tmp_path / name).read_bytes() == (tmp_path / first).read_bytes()
    assert count % 4


def test_several_processes_go_on_with_rows(split_run, split, tmp_path):
    command = ["predict", split_run, split / "test", "--batch-size", "2", "--output", "rows.jsonl"]
    [result] = torchrun(tmp_path, 1, *command)
    assert result.code == 0, result.stderr
    rows = (tmp_path / "rows.jsonl").read_bytes()
    (tmp_path / "rows.jsonl").unlink()

    def stopped(self, lines, vectors):
        append(self, lines, vectors)
        os.kill(os.getpid(), signal.SIGKILL)

    append, Spool.append = Spool.append, stopped
    try:
        results = torchrun(tmp_path, 2, *command)
    finally:
        Spool.append = append
    assert results[0].code == -signal.SIGKILL
    assert (tmp_path / ".rows.jsonl.resume").is_dir()
    results = torchrun(tmp_path, 2, *command, "--resume")
    assert results[0].code == 0, results[0].stderr
    assert "going on after 2 rows" in results[0].stderr
    assert (tmp_path / "rows.jsonl").read_bytes() == rows
    results = torchrun(tmp_path, 2, *command, "--resume")
    assert "finished already" in results[0].stderr
    assert [result.code for result in results] == [0, 0]


def test_where_nobody_reads_the_rows_of_the_first_all_end_well(split_run, split, tmp_path, monkeypatch):
    def head(self, lines, vectors):
        raise BrokenPipeError

    def impatient(seconds: float) -> None:
        waits.append(seconds)
        if waits.count(0.05) > 100:  # for words that will not come
            os._exit(99)
        usual(seconds)

    usual, waits = time.sleep, []
    monkeypatch.setattr(Spool, "append", head)
    monkeypatch.setattr(ranks, "PATIENCE", 1e9)
    monkeypatch.setattr(ranks.time, "sleep", impatient)
    results = torchrun(tmp_path, 3, "predict", split_run, split / "test", "--batch-size", "2", "--output", "rows.jsonl")
    assert [(result.code, errors([result])) for result in results] == [(0, [])] * 3


def test_what_processes_do_not_share_is_said_once(split_run, split, tmp_path):
    with tarfile.open(tmp_path / "some.tar", "w") as archive:
        archive.add(split / "test", "test")
    [said] = errors(torchrun(tmp_path, 2, "predict", split_run, "some.tar"))
    assert "some.tar/test" in said
    assert "unpack it" in said


# ---- weights in shares


@pytest.mark.parametrize("method", ["cite", "atha"])
def test_adapt_in_shares_writes_the_run_of_one_process(flat, models, tmp_path, method):
    """The same but for rounding, which AdamW makes much of where a gradient is nearly 0."""
    command = ["adapt", flat, "--method", method, "--model", models["vit"], "--gradient-checkpointing", "--epochs", "2"]
    [alone] = torchrun(tmp_path, 1, *command, "--output", "one")
    results = torchrun(tmp_path, 2, *command, "--shard", "--micro-batch", "3", "--output", "two")
    assert [alone.code, *(result.code for result in results)] == [0] * 3, results[0].stderr
    assert json.loads((tmp_path / "two" / "config.json").read_text())["recipe"]["shard"] is True
    one, two = (load_file(tmp_path / name / "finetuned.safetensors") for name in ("one", "two"))
    start = loading.load(models["vit"]).state()
    assert one.keys() == two.keys()
    moved = sum((one[name] - start[name]).double().square().sum() for name in start)
    apart = sum((one[name] - two[name]).double().square().sum() for name in start)
    assert (apart / moved).sqrt() < 0.05


def test_what_cannot_be_in_shares_is_said(flat, models, tmp_path):
    command = ["adapt", flat, "--model", models["vit"], "--shard", "--output", "run"]
    [alone] = torchrun(tmp_path, 1, *command)
    assert (alone.code, "torchrun" in alone.stderr) == (2, True)
    results = torchrun(tmp_path, 2, *command, "--tuning", "lora")
    [said] = errors(results)
    assert "--tuning full" in said
    assert results[0].code == 2


@pytest.mark.parametrize(
    ("signum", "step", "said"),
    [
        (signal.SIGINT, 4, r"(interrupted|terminated): \S*state.safetensors is kept"),
        (signal.SIGINT, 2, "(interrupted|terminated): nothing was written"),  # before the first state
        (signal.SIGKILL, 4, None),
    ],
)
def test_what_was_in_shares_goes_on_to_the_same_bytes(flat, models, tmp_path, monkeypatch, signum, step, said):
    command = ["adapt", flat, "--model", models["vit"], "--shard", "--save-every", "2", "--output"]
    assert torchrun(tmp_path, 2, *command, "whole")[0].code == 0
    with monkeypatch.context() as patch:
        at_step(patch, step, None, lambda: os.kill(os.getpid(), signum))
        results = torchrun(tmp_path, 2, *command, "run")
    assert all(result.code for result in results)
    if said:
        [only] = errors(results)
        assert re.match(said, only), only
    state = tmp_path / ".run.resume" / "state.safetensors"
    assert state.exists() == (step > 2)
    if state.exists():
        assert {name for name, tensor in load_file(state).items() if not tensor.numel()} == set()
    results = torchrun(tmp_path, 2, *command, "run", "--resume")
    assert results[0].code == 0, results[0].stderr
    assert ("going on from" in results[0].stderr) == (step > 2)
    assert files_of(tmp_path / "run") == files_of(tmp_path / "whole")
    assert not (tmp_path / ".run.resume").exists()


# ---- what only goes wrong among several


def test_who_keeps_no_state_does_not_say_that_one_is_kept(tmp_path):
    saving = Saving(tmp_path / "none", None, {})
    with (
        ranks.among(Ranks(1, 2)), pytest.raises(ranks.Lost) as lost,
        interrupts.keeping(saving.words), saving.kept(None, ["a report"]),  # type: ignore[arg-type]
    ):  # fmt: skip
        raise ranks.Lost("gone")
    assert (str(lost.value), saving.folder.exists()) == ("", False)


def test_a_second_signal_does_not_make_it_forget_what_is_kept(tmp_path, monkeypatch):
    """torchrun sends SIGTERM to who is left once one of them has ended."""

    def read(_self: Saving) -> bool:
        signal.raise_signal(signal.SIGTERM)
        return True

    monkeypatch.setattr(Saving, "has_own", property(read))
    saving = Saving(tmp_path, None, {})
    with (
        interrupts.raising(), pytest.raises(interrupts.Stopped, match="is kept") as stopped,
        interrupts.keeping(saving.words),
    ):  # fmt: skip
        signal.raise_signal(signal.SIGINT)
    assert stopped.value.signum == signal.SIGINT


def test_weights_that_are_no_numbers_are_not_called_different():
    def work() -> Found:
        ranks.here().require_same([torch.tensor([1.0, torch.nan]), torch.tensor([2.0])])
        return {}

    together(2, work)


def test_processes_that_find_other_shots_do_not_begin(flat, models, tmp_path, monkeypatch):
    ready = adapt_verb._ready

    def other(*given):
        job = ready(*given)
        return replace(job, record=replace(job.record, seed=ranks.here().rank))

    monkeypatch.setattr(adapt_verb, "_ready", other)
    results = torchrun(tmp_path, 2, "adapt", flat, "--model", models["vit"], "--output", "run")
    [said] = errors(results)
    assert "do not find the same shots" in said
    assert results[0].code == DataError.exit_code
    assert not (tmp_path / "run").exists()


def test_a_process_that_is_killed_among_shares_is_no_fault(flat, models, tmp_path, monkeypatch):
    command = ["adapt", flat, "--model", models["vit"], "--shard", "--save-every", "2", "--output", "run"]
    at_step(monkeypatch, 4, 1, lambda: os.kill(os.getpid(), signal.SIGKILL))
    first, _ = torchrun(tmp_path, 2, *command)
    assert first.code == 128 + signal.SIGTERM
    [said] = errors([first])
    assert re.match(r"terminated: \S*state.safetensors is kept; the same command with --resume goes on from it", said)


def test_what_is_printed_while_processes_meet_is_dropped(capfd):
    with ranks._nothing_on_stdout():
        os.write(1, b"[Gloo] Rank 1 is connected\n")
    os.write(1, b"a row\n")
    assert capfd.readouterr().out == "a row\n"


def test_shares_in_bf16_are_proven_by_the_layers_that_computed_them(flat, models, tmp_path):
    command = ["adapt", flat, "--model", models["vit"], "--shard", "--precision", "bf16", "--output", "run"]
    results = torchrun(tmp_path, 2, *command)
    assert [result.code for result in results] == [0, 0], results[0].stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["precision"] == "bf16"
