"""`predict --resume`: killed at any moment and started again, it ends with the bytes of an undisturbed run."""

from __future__ import annotations

import csv
import functools
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import kills
import pytest
import torch
from conftest import Cli
from test_predict import images

from clipfit import DataError, PredictConfig, UsageError, predict
from clipfit.report.html import Thumbnails
from clipfit.verbs import predict as verb

OUTPUTS = ("rows.jsonl", "rows.csv")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nine images, one of them broken; tmp_path is the current folder."""
    monkeypatch.chdir(tmp_path)
    images(tmp_path / "in", 9)
    (tmp_path / "in/4.png").write_bytes(b"")
    return tmp_path


def config(run: Path, output: str, **options: object) -> PredictConfig:
    given = {"output": Path(output), "embeddings": Path("e.npy"), "html": Path("p.html"), "batch_size": 2, **options}
    return PredictConfig((run, Path("in")), **given)


def done(asked: PredictConfig) -> dict[str, bytes]:
    """Carry it out; every file that it leaves, but locks."""
    predict(asked, gallery=Thumbnails(a_class=2))
    return written()


def written() -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path().iterdir() if p.is_file() and p.suffix != ".lock"}


def clean() -> None:
    for path in Path().iterdir():
        if path.name != "in":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_torn_spool_goes_on_to_the_same_bytes(folder, split_run, output):
    """As a kill leaves it: rows and vectors of any length, whole lines or not."""
    expected = done(config(split_run, output))
    state = Path(f".{output}.resume")
    clean()
    with pytest.raises(KeyboardInterrupt):
        predict(config(split_run, output), progress=StopsAt(8), gallery=Thumbnails(a_class=2))
    assert not Path(output).exists()
    rows, vectors = (state / "rows.jsonl").read_bytes(), (state / "vectors.f32").read_bytes()
    assert rows.count(b"\n") == 8
    for cut_rows, cut_vectors in (
        (0, len(vectors)),
        (1, 7),
        (rows.index(b"\n", 800), len(vectors)),
        (len(rows), 4 * 32 * 5),
    ):
        (state / "rows.jsonl").write_bytes(rows[:cut_rows])
        (state / "vectors.f32").write_bytes(vectors[:cut_vectors])
        kept = shutil.copytree(state, "kept")
        assert done(config(split_run, output, resume=True)) == expected
        assert not state.exists()
        clean_but(kept, state)


@pytest.mark.parametrize(("file", "batch"), [("rows.jsonl", 2), ("rows.jsonl", 0), ("vectors.f32", 1)])
def test_damage_to_what_is_kept_is_done_anew(folder, split_run, file, batch):
    """A letter of a label, which stays JSON; a number of an embedding. What is before it is kept."""
    expected = done(config(split_run, "rows.jsonl"))
    clean()
    with pytest.raises(KeyboardInterrupt):
        predict(config(split_run, "rows.jsonl"), progress=StopsAt(6), gallery=Thumbnails(a_class=2))
    path = Path(".rows.jsonl.resume") / file
    data = bytearray(path.read_bytes())
    row = 2 * batch
    at = (
        4 * 32 * row if file == "vectors.f32" else data.index(b'"label": "', sum(map(len, data.splitlines(True)[:row])))
    )
    data[at + 10] ^= 1
    path.write_bytes(data)
    heard = Hears()
    predict(config(split_run, "rows.jsonl", resume=True), progress=heard, gallery=Thumbnails(a_class=2))
    assert f"going on after {row} rows" in heard.said
    assert written() == expected


class Hears:
    """What progress is told."""

    def __init__(self):
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def step(self, report: object) -> None:
        pass

    def count(self, report: object) -> None:
        pass


class StopsAt:
    """A Ctrl-C, or a kill, after so many rows."""

    def __init__(self, rows: int, killed: bool = False):
        self.rows, self.killed = rows, killed

    def say(self, text: str) -> None:
        pass

    def step(self, report: object) -> None:
        pass

    def count(self, report) -> None:
        if report.done >= self.rows:
            if self.killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt


def clean_but(kept: Path | str, state: Path) -> None:
    """Everything away, and the state as it was kept in its place."""
    aside = shutil.move(kept, "in/kept")
    clean()
    shutil.move(aside, state)


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_kill_at_a_rename_goes_on_to_the_same_bytes(folder, split_run, at):
    """The renames of the job, the vectors, the page and the rows."""
    expected = done(config(split_run, "rows.jsonl"))
    clean()
    asked = config(split_run, "rows.jsonl")
    assert kills.ends_with(lambda: done(asked), at, "renames") == -9
    assert done(config(split_run, "rows.jsonl", resume=True)) == expected


def test_what_is_there_is_neither_replaced_nor_lost_unasked(cli: Cli, folder, split_run):
    with pytest.raises(KeyboardInterrupt):
        predict(config(split_run, "o.jsonl", html=None), progress=StopsAt(4))
    with pytest.raises(UsageError, match="--resume to go on"):
        predict(config(split_run, "o.jsonl", html=None))
    with pytest.raises(UsageError, match=r"alpha was 0\.5 and is 1"):
        predict(config(split_run, "o.jsonl", html=None, resume=True, alpha=1.0))
    picture = Path("in/0.png").rename("in/00.png")
    with pytest.raises(DataError, match=r"row 1 was of in/0\.png, now it is of in/00\.png"):
        predict(config(split_run, "o.jsonl", html=None, resume=True))
    picture.rename("in/0.png")
    assert predict(config(split_run, "o.jsonl", html=None, resume=True)).counts.rows == 9
    before = written()
    assert "finished already" in cli("predict", split_run, "in", "--output", "o.jsonl", "--resume").stderr
    with pytest.raises(UsageError, match=r"o\.jsonl exists already"):
        predict(config(split_run, "o.jsonl", html=None))
    assert written() == before
    assert predict(config(split_run, "o.jsonl", html=None, overwrite=True, top=1)).counts.rows == 9
    assert len(json.loads(Path("o.jsonl").read_text().splitlines()[0])["top"]) == 1


def test_an_unfinished_replacement_leaves_the_old_rows(folder, split_run):
    done(config(split_run, "o.jsonl"))
    before = written()
    with pytest.raises(KeyboardInterrupt):
        predict(config(split_run, "o.jsonl", overwrite=True, top=1), progress=StopsAt(4), gallery=Thumbnails(a_class=2))
    assert written() == before
    after = done(config(split_run, "o.jsonl", resume=True, top=1))
    assert after["o.jsonl"] != before["o.jsonl"]
    assert not Path(".o.jsonl.resume").exists()


def test_a_replacement_that_is_killed_before_its_first_row_is_not_finished(folder, split_run, monkeypatch):
    """Where it only loads the model: what lies there are the rows of another command."""
    before = done(config(split_run, "o.jsonl"))
    asked = {"top": 1, "html": None, "embeddings": None}
    with monkeypatch.context() as patched:
        patched.setattr(verb, "_loaded", lambda *given: os.kill(os.getpid(), signal.SIGKILL))
        replacing = config(split_run, "o.jsonl", overwrite=True, **asked)
        assert kills.ends_with(lambda: predict(replacing), None, "calls") == -9
    assert written() == before
    assert predict(config(split_run, "o.jsonl", resume=True, **asked)).counts.rows == 9
    assert {len(json.loads(line)["top"]) for line in Path("o.jsonl").read_text().splitlines()} == {0, 1}

    with pytest.raises(UsageError, match="no classes of its own"):
        predict(PredictConfig((Path("in"),), model="clipfit-tiny", output=Path("o.jsonl"), overwrite=True))
    assert not Path(".o.jsonl.resume").exists()


@pytest.mark.parametrize("at", ["_loaded", "_carry_out"])
def test_a_command_that_fails_leaves_finished_rows_finished(folder, split_run, monkeypatch, at):
    before = done(config(split_run, "o.jsonl"))

    def failing(*given):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patched:
        patched.setattr(verb, at, failing)
        with pytest.raises(torch.OutOfMemoryError):
            predict(config(split_run, "o.jsonl", overwrite=True, top=1))
    assert predict(config(split_run, "o.jsonl", resume=True)).counts.rows is None
    assert written() == before


def test_what_is_finished_has_all_that_is_asked_for(folder, split_run):
    predict(config(split_run, "o.jsonl", html=None, embeddings=None))
    with pytest.raises(UsageError, match=r"o\.jsonl is finished, but there is no e\.npy: pass --overwrite"):
        predict(config(split_run, "o.jsonl", html=None, resume=True))


def test_nothing_that_is_needed_is_replaced(folder, split_run, tmp_path):
    Path("names.csv").write_text("bee\ncow\n")
    for option in ("classes", "add_classes", "templates"):
        with pytest.raises(UsageError, match=r"names\.csv is needed"):
            predict(config(split_run, "names.csv", overwrite=True, **{option: Path("names.csv")}))
    run = Path(shutil.copytree(split_run, tmp_path / "run"))
    for name in ("metrics.jsonl", "shots.jsonl"):
        with pytest.raises(UsageError, match="is a part of "):
            predict(PredictConfig((split_run, Path("in")), output=run / name, overwrite=True))
    (tmp_path / "files.json").write_text('{"mine": "o.jsonl"}')
    assert predict(PredictConfig((run, Path("in")), output=run / "rows.jsonl")).counts.rows == 9


def test_a_row_of_csv_is_a_row_whatever_a_file_is_called(folder, split_run):
    Path("in/0.png").rename("in/0\r.png")
    Path("in/1.png").rename('in/1\r,\n".png')
    predict(PredictConfig((split_run, Path("in")), output=Path("o.csv")))
    with Path("o.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    assert {row["path"] for row in rows} == {str(path) for path in Path("in").iterdir()}


def test_another_image_root_is_another_job(folder, split_run):
    Path("list.csv").write_text("path\n" + "".join(f"{k}.png\n" for k in range(9)))
    asked = PredictConfig((split_run, Path("list.csv")), output=Path("o.csv"), image_root=Path("wrong"), batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        predict(asked, progress=StopsAt(4))
    with pytest.raises(UsageError, match="image_root was 'wrong' and is 'in'"):
        predict(replace(asked, image_root=Path("in"), resume=True))


@pytest.mark.slow
def test_ten_kills_end_with_the_same_bytes(folder, split_run):
    """SIGKILL at ten moments spread over the calls of one run, each gone on with; at ten in a row of one output; and
    between any two batches."""
    asked, again = config(split_run, "rows.csv"), config(split_run, "rows.csv", resume=True)
    count = kills.ends_with(lambda: done(asked), None, "calls")
    expected = written()
    clean()
    outcomes = []
    for k in range(1, 11):
        outcomes.append(kills.ends_with(lambda: done(asked), count * k // 11, "calls"))
        assert done(again) == expected
        clean()
    assert outcomes.count(-9) >= 9  # threads' calls are not counted, so that the last moments may vary
    killed = [kills.ends_with(lambda: done(again), count * k // 12, "calls") for k in range(1, 11)]
    assert done(again) == expected
    for rows in (2, 4, 6, 8):
        clean()
        stops = StopsAt(rows, killed=True)
        killed_so = functools.partial(predict, asked, progress=stops, gallery=Thumbnails(2))
        assert kills.ends_with(killed_so, None, "calls") == -9
        assert done(again) == expected
    print(f"killed {outcomes.count(-9)} of 10, then {killed.count(-9)} times in a row: the same bytes")
