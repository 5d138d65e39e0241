"""What `clipfit evaluate` does before its first forward pass, over the bare imports of torch and open_clip.

    python benchmarks/startup.py [--turns 5]

A run of clipfit-tiny on the example's shots is made first. Each turn then starts, in processes of their own, one after
another: Python that imports torch and open_clip; `clipfit evaluate` of the run on the example's test images, which ends
where the first text or image would go into the model; and `clipfit --version`. Seconds are the processor's count of
each whole process, medians over turns. The test images are opened and decoded within: what that alone takes is a row.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SHOTS = Path(__file__).parent.parent / "examples" / "shots"
END = "import os; os._exit(0)"  # where `clipfit evaluate` is ended too: what a process clears away does not count
BARE = "import torch, open_clip; " + END
COMMAND_LINE = """
import os, sys, torch, open_clip, rich.console, rich.progress, typer
app = typer.Typer()
@app.command()
def end(number: int = 1):
    os._exit(0)
sys.argv[1:] = []
app()
"""
VERSION = "import sys; sys.argv[1:] = ['--version']; from clipfit.cli import main; main()"
EVALUATE = """
import os, sys, clipfit
from clipfit.cli import main
def end(*given, **more):
    os._exit(0)
def loaded(name, usual=clipfit.__getattr__):
    found = usual(name)
    from clipfit.model.clip import Clip
    Clip.text_features = Clip._embedded = end
    return found
clipfit.__getattr__ = loaded
sys.argv[1:] = ["evaluate", sys.argv[1]]
main()
"""
DECODE = (
    """
import sys
from pathlib import Path
import torch, open_clip
from clipfit.data import layout
from clipfit.data.images import decode
for sample in layout.read(Path(sys.argv[1])).test:
    decode(sample.path)
"""
    + END
)


def seconds(program: str, *arguments: str) -> float:
    """Of the processor, in all threads of a Python that runs a program to its end."""
    before = os.times()
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "run"
        given = ["adapt", str(SHOTS), "--model", "clipfit-tiny", "--epochs", "1", "--output", str(run)]
        subprocess.run([sys.executable, "-m", "clipfit", *given], capture_output=True, check=True)
        programs = {
            "python": (END,),
            "clipfit --version": (VERSION,),
            "import torch, open_clip": (BARE,),
            "… and a command of typer's, and rich": (COMMAND_LINE,),
            "… and decode the test images": (DECODE, str(SHOTS)),
            "clipfit evaluate, up to its first forward pass": (EVALUATE, str(run)),
        }
        found: dict[str, list[float]] = {name: [] for name in programs}
        for _ in range(args.turns):
            for name, program in programs.items():
                found[name].append(seconds(*program))
    bare = statistics.median(found["import torch, open_clip"])
    print(f"Python {sys.version.split()[0]}, one thread, medians of {args.turns} turns\n")
    print("| process | seconds | beyond torch and open_clip |\n|---|---|---|")
    for name, times in found.items():
        print(f"| {name} | {statistics.median(times):.2f} | {statistics.median(times) - bare:+.2f} |")


if __name__ == "__main__":
    main()
