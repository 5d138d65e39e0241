"""`predict` on twenty thousand images: a row each, in order, in the memory that two thousand take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import ROOT

pytestmark = pytest.mark.slow
SHOTS = sorted((ROOT / "examples" / "shots").rglob("*.png"))


def farm(folder: Path, count: int, broken: int) -> Path:
    """Links to the example's images under many names, every so many of them cut short."""
    folder.mkdir()
    for k in range(count):
        place = folder / f"{k // 1000:03d}" / f"{k:06d}.png"
        place.parent.mkdir(exist_ok=True)
        if k % (count // broken) == 7:
            place.write_bytes(SHOTS[k % len(SHOTS)].read_bytes()[:100])
        else:
            place.symlink_to(SHOTS[k % len(SHOTS)])
    return folder


def peak(run: Path, folder: Path, *options: str) -> tuple[int, list[dict]]:
    """Kilobytes at most, and the rows."""
    command = [
        sys.executable,
        "-m",
        "clipfit",
        "predict",
        str(run),
        str(folder),
        "--output",
        f"{folder}.jsonl",
        *options,
    ]
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0
    with open(f"{folder}.jsonl", encoding="ascii") as file:
        return usage.ru_maxrss, [json.loads(line) for line in file]


@pytest.mark.parametrize("options", [(), ("--html", "--embeddings", "--abstain-below")], ids=["rows", "all"])
def test_memory_does_not_grow_with_the_images(split_run, tmp_path, options):
    peaks = {}
    for count, broken in ((2_000, 5), (20_000, 50)):
        folder = farm(tmp_path / str(count), count, broken)
        values = {"--html": f"{folder}.html", "--embeddings": f"{folder}.npy", "--abstain-below": "0.4"}
        given = [word for flag in options for word in (flag, values[flag])]
        peaks[count], rows = peak(split_run, folder, *given)
        assert [row["path"] for row in rows] == [str(path) for path in sorted(folder.rglob("*.png"))]
        assert sum(row["error"] is not None for row in rows) == broken
    print(f"peak {peaks[2_000] / 1024:.0f} MiB for 2,000 images and {peaks[20_000] / 1024:.0f} MiB for 20,000")
    assert peaks[20_000] < 1.1 * peaks[2_000]
