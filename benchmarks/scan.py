"""What it takes to find the images of large trees: train/<class>/<file> for `adapt`, a folder of folders for `predict`.

    python benchmarks/scan.py [--files 10000 100000 1000000]

Files are empty: nothing is decoded, names alone are read, and the shots are drawn. Each reading is a process of its
own; memory is the most that it held beyond what it had before it began. "bare" is Python's own walk through the tree,
which keeps nothing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

CLASSES = 1000
UNIT = 1 if sys.platform == "darwin" else 1024
GIB = 2**30
Told = multiprocessing.SimpleQueue  # of (files, seconds of the processor, kilobytes)


def tree(root: Path, files: int) -> Path:
    """As many files in each of CLASSES classes, one inode for a class: file systems need not have a million free."""
    for number in range(CLASSES):
        folder = root / "train" / f"class {number:04d}"
        folder.mkdir(parents=True)
        first = folder / "image_000000.jpg"
        first.touch()
        for k in range(1, files // CLASSES):
            os.link(first, folder / f"image_{k:06d}.jpg")
    return root


def bare(root: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(root))


def for_adapt(root: Path) -> int:
    """What `adapt` does before it decodes: find all, draw 16 of each class."""
    from clipfit.data import layout
    from clipfit.data.shots import select

    found = layout.read(root)
    select(found, 16, seed=0)
    return len(found.train)


def for_predict(root: Path) -> int:
    from clipfit.data.stream import Inputs

    return sum(1 for _ in Inputs([root]))


def _measure(read: Callable[[Path], int], root: Path, told: Told) -> None:
    import clipfit.data.layout
    import clipfit.data.shots
    import clipfit.data.stream  # noqa: F401  # so that what modules take is there before

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    count = read(root)
    told.put((count, time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


def measured(read: Callable[[Path], int], root: Path) -> tuple[int, float, float]:
    """Files found, seconds of the processor, GiB."""
    context = multiprocessing.get_context("spawn")
    told = context.SimpleQueue()
    process = context.Process(target=_measure, args=(read, root, told))
    process.start()
    count, seconds, memory = told.get()
    process.join()
    return count, seconds, memory * UNIT / GIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    args = parser.parse_args()
    print(f"{CLASSES} classes, Python {sys.version.split()[0]}, one process, seconds of the processor\n")
    print("| files | bare walk, s | `adapt`, s | over bare | GiB | `predict`, s | over bare | GiB |")
    print("|---|---|---|---|---|---|---|---|")
    for files in args.files:
        with tempfile.TemporaryDirectory() as place:
            root = tree(Path(place), files)
            (n, walk, _), (m, adapt, kept), (k, predict, held) = (
                measured(read, root) for read in (bare, for_adapt, for_predict)
            )
            assert n == m == k == files, (n, m, k)
            print(f"| {files:,} | {walk:.2f} | {adapt:.1f} | {adapt / walk:.0f} | {kept:.2f} | "
                  f"{predict:.1f} | {predict / walk:.0f} | {held:.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
