"""Files that are complete or absent, and the same bytes for the same content."""

from __future__ import annotations

import base64
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from clipfit import ModelError
from clipfit.errors import OutputError
from clipfit.runs import files

STATE = {"b": torch.arange(6, dtype=torch.float32).reshape(2, 3), "a": torch.tensor(7)}
ABOUT = {"template": "a photo of a {}", "classes": ["Bär", "犬"], "alpha": 0.5}


def test_tensors_and_metadata_come_back(tmp_path):
    file = tmp_path / "x.safetensors"
    files.write_tensors(file, STATE, ABOUT)
    state, about = files.read_tensors(file)
    assert about == ABOUT
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[name], t) and state[name].dtype == t.dtype for name, t in STATE.items())
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_two_processes_may_write_the_same_file(tmp_path, monkeypatch):
    file = tmp_path / "x.json"

    def meanwhile(part):
        part.write_text("mine")
        monkeypatch.setattr(os, "getpid", lambda: 2)
        files.write_json(file, {"by": "the other"})

    monkeypatch.setattr(os, "getpid", lambda: 1)
    files.atomically(file, meanwhile)
    assert file.read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


GOLDEN = """
4AAAAAAAAAB7Il9fbWV0YWRhdGFfXyI6eyJjbGlwZml0Ijoie1wiYWxwaGFcIjowLjUsXCJjbGFzc2VzXCI6W1wiQsOkclwiLFwi54qsXCJdLF
widGVtcGxhdGVcIjpcImEgcGhvdG8gb2YgYSB7fVwifSJ9LCJhIjp7ImR0eXBlIjoiSTY0Iiwic2hhcGUiOltdLCJkYXRhX29mZnNldHMiOlsw
LDhdfSwiYiI6eyJkdHlwZSI6IkYzMiIsInNoYXBlIjpbMiwzXSwiZGF0YV9vZmZzZXRzIjpbOCwzMl19fSAgICAgIAcAAAAAAAAAAAAAAAAAgD
8AAABAAABAQAAAgEAAAKBA
"""


def test_a_file_of_version_0_1_loads_for_ever(tmp_path):
    (tmp_path / "x").write_bytes(base64.b64decode(GOLDEN))
    state, about = files.read_tensors(tmp_path / "x")
    assert about == ABOUT
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[name], t) for name, t in STATE.items())


def test_the_same_content_gives_the_same_bytes(tmp_path):
    """Whatever the order in memory: metadata is one key of sorted JSON, for several would be in random order."""
    variants = [
        (STATE, ABOUT),
        (dict(reversed(STATE.items())), dict(reversed(ABOUT.items()))),
        ({"a": STATE["a"], "b": STATE["b"].T.contiguous().T}, ABOUT),
    ]
    written = set()
    for k, (state, about) in enumerate(variants):
        files.write_tensors(tmp_path / str(k), state, about)
        written.add((tmp_path / str(k)).read_bytes())
    assert len(written) == 1


def test_files_are_as_readable_as_any_other(tmp_path):
    before = os.umask(0o022)
    try:
        files.write_tensors(tmp_path / "x", STATE, {})
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644


def test_damaged_and_missing_files(tmp_path):
    file = tmp_path / "x"
    files.write_tensors(file, STATE, ABOUT)
    whole = file.read_bytes()
    for spoiled in (b"", whole[:20], whole[:-1], b"\0" * 100):
        file.write_bytes(spoiled)
        with pytest.raises(ModelError, match="cannot be read as a clipfit checkpoint"):
            files.read_tensors(file)
    with pytest.raises(ModelError, match="cannot be read as a clipfit checkpoint"):
        files.read_tensors(tmp_path / "none")


def test_json_is_sorted_and_readable(tmp_path):
    files.write_json(tmp_path / "x.json", {"b": "犬", "a": [1]})
    assert (tmp_path / "x.json").read_text("utf-8") == '{\n  "a": [\n    1\n  ],\n  "b": "犬"\n}\n'
    assert files.read_json(tmp_path / "x.json") == {"a": [1], "b": "犬"}


def test_lines_hold_any_text(tmp_path):
    records = [{"path": "a\u2028b"}, {"path": "no utf-8: \udcff"}, {"path": 'q"\\n'}]
    files.write_lines(tmp_path / "x.jsonl", records)
    assert files.read_lines(tmp_path / "x.jsonl") == records
    assert json.loads((tmp_path / "x.jsonl").read_bytes().split(b"\n")[0]) == records[0]


def test_what_a_killed_process_left_is_cleared_by_the_next_that_writes_the_file(tmp_path):
    file = tmp_path / "x.json"
    child = os.fork()
    if child == 0:
        sys.addaudithook(lambda event, _: os.kill(os.getpid(), signal.SIGKILL) if event == "os.rename" else None)
        files.write_text(file, "half")
    os.waitpid(child, 0)
    assert [p.suffix for p in tmp_path.iterdir()] == [".part"]
    files.write_text(tmp_path / "y.json", "another file")
    assert len(list(tmp_path.iterdir())) == 2
    files.write_text(file, "whole")
    assert {p.name for p in tmp_path.iterdir()} == {"x.json", "y.json"}


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "x.json"
    files.write_text(file, "old")

    def full(self, data):
        with self.open("wb") as stream:
            stream.write(data[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match=r"x\.json cannot be written: No space left on device"):
        files.write_text(file, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    assert file.read_text() == "old"
