"""The same command gives the same bytes: two processes, two output folders, one thread."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name != "timing.json"}


def test_two_processes_write_the_same_bytes(models, split, tmp_path):
    documents = []
    for name in ("first", "second"):
        command = [
            sys.executable, "-m", "clipfit", "adapt", split, "--model", models["vit"], "--seed", "3", "--json",
            "--output", tmp_path / name,
        ]  # fmt: skip
        # hash seeds differ, so that no order comes from a set
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": str(len(documents) + 1)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n") == 1
        documents.append(json.loads(done.stdout))
    first, second = digests(tmp_path / "first"), digests(tmp_path / "second")
    assert first == second
    assert set(first) == {
        "classes.json", "config.json", "files.json", "finetuned.safetensors", "metrics.jsonl", "model.safetensors",
        "shots.jsonl",
    }  # fmt: skip
    assert documents[0]["losses"] == documents[1]["losses"]
    for file in (tmp_path / "first").iterdir():  # absolute paths of the output live in timing.json alone
        assert (str(tmp_path / "first").encode() in file.read_bytes()) == (file.name == "timing.json")
