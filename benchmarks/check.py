"""How long `check` takes: JPEGs of 500 x 375 in a temporary folder, with the embedded model.

    python benchmarks/check.py [--images 10000] [--classes 100]

Prints the seconds by the clock and on the processor, and the most memory that the process held.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
from pathlib import Path

import torch
from predict import photographs, seconds

from clipfit import CheckConfig, check


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--classes", type=int, default=100)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        for k, file in enumerate(photographs(Path(work) / "images", args.images)):
            folder = Path(work) / "shots" / f"thing {k % args.classes}"
            folder.mkdir(parents=True, exist_ok=True)
            file.rename(folder / file.name)
        clock, processor = seconds(lambda: check(CheckConfig(Path(work) / "shots", model="clipfit-tiny")))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{args.images} images of {args.classes} classes, {os.cpu_count()} cores, torch {torch.__version__}: "
          f"{clock:.0f} s by the clock, {processor:.0f} s on the processor, at most {memory:.1f} GiB")  # fmt: skip


if __name__ == "__main__":
    main()
