"""`predict --engine ray`: the rows of one process, from workers of which one is killed on the way."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import picture

from clipfit import predict
from clipfit.config.predict import PredictConfig
from clipfit.events import CountReport, Silent


def test_what_it_needs_is_said(cli, split_run, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else found(name))
    cli("predict", split_run, "a.png", "--engine", "ray").fails(2, "--engine ray needs Ray", "clipfit[ray]")
    cli("predict", split_run, "a.png", "--engine", "ray", "--html", "page.html").fails(2, "--html", "--engine ray")


def test_what_lies_in_an_archive_is_refused(cli, split_run, tmp_path):
    pytest.importorskip("ray")
    picture(1).save("a.png")
    with tarfile.open("shard.tar", "w") as archive:
        archive.add("a.png")
    cli("predict", split_run, "shard.tar", "--engine", "ray").fails(2, "shard.tar/a.png lies in an archive", "unpack")


def workers() -> list[int]:
    """Processes below this one in which Ray keeps a worker."""
    parents, found = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if b"Worker" in (folder / "cmdline").read_bytes() and b"ray::" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:  # gone since
            continue
    return [pid for pid in found if os.getpid() in ancestors(pid, parents)]


def ancestors(pid: int, parents: dict[int, int]) -> set[int]:
    seen = set()
    while pid in parents and pid not in seen:
        seen.add(pid)
        pid = parents[pid]
    return seen


class Killing(Silent):
    """Kills one of the workers after the first rows."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.killed: int | None = None
        self.most = 0

    def count(self, report: CountReport) -> None:
        self.seen = workers()
        self.most = max(self.most, len(self.seen))
        if self.killed is None:
            self.killed = self.seen[0]
            os.kill(self.killed, signal.SIGKILL)


@pytest.mark.slow
def test_the_rows_of_one_process_though_a_worker_is_killed(split_run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 2}')  # so many workers
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for k in range(60):
        picture(k).save(f"in/{k:02}.png")
    Path("in/17.png").write_text("no picture")
    killing, rows, vectors = Killing(), {}, {}
    for engine, progress in (("local", None), ("ray", killing)):
        given, files = (split_run, Path("in"), Path("missing.png")), {"embeddings": Path(f"{engine}.npy")}
        files["output"] = Path(f"{engine}.jsonl")
        predict(PredictConfig(given, batch_size=2, engine=engine, device="cpu", **files), progress=progress)
        rows[engine] = [json.loads(line) for line in Path(f"{engine}.jsonl").read_text().splitlines()]
        vectors[engine] = np.load(f"{engine}.npy")
    assert capsys.readouterr().out == ""
    assert killing.killed is not None
    assert killing.most == 2
    assert killing.killed not in killing.seen
    assert len(rows["local"]) == len(rows["ray"]) == 61
    for mine, theirs in zip(rows["local"], rows["ray"], strict=True):
        assert mine["probability"] == pytest.approx(theirs["probability"], abs=1e-5)
        assert [top["label"] for top in mine["top"]] == [top["label"] for top in theirs["top"]]
        numbers = dict.fromkeys(("probability", "top"))
        assert {**mine, **numbers} == {**theirs, **numbers}
    assert [row["path"] for row in rows["ray"] if row["error"]] == ["in/17.png", "missing.png"]
    np.testing.assert_allclose(vectors["ray"], vectors["local"], atol=1e-6, equal_nan=True)
