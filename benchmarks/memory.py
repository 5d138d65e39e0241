"""What a training step holds in memory: the whole batch at once, in parts, and with blocks computed again.

    python benchmarks/memory.py [--batch 64] [--parts 16 8] [--classes 10] [--method cite]

ViT-B-32 with random weights, a step (not the first) in a process of its own for each row; its peak is what the system
says of it (ru_maxrss). "held" is what no part of a batch changes: weights, gradient, two moments and, of cite, the
frozen image tower; "beyond" is the peak less that and less a process that has loaded torch and clipfit, over the whole
batch's.
"""

import argparse
import contextlib
import multiprocessing
import resource
import sys

import torch

from clipfit.config import Recipe
from clipfit.methods import METHODS, Task
from clipfit.methods.batch import Batch
from clipfit.model import checkpointing
from clipfit.model.clip import Clip
from clipfit.model.named import Additions
from clipfit.model.sources import Source, quiet
from clipfit.prompts import prompts
from clipfit.streams import Rows
from clipfit.training.state import Trained
from clipfit.training.step import Fitting

MODEL = "ViT-B-32"
UNIT = 1 if sys.platform == "darwin" else 1024


def peak() -> int:
    """Bytes, of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT


def step(method: str, classes: int, batch: int, part: int | None, checkpoint: bool) -> tuple[int, int, int]:
    """Bytes at most: before there was a model, held by weights and what is kept of each, and after a step."""
    import open_clip

    torch.set_num_threads(1)
    before = peak()
    with quiet():
        model = open_clip.create_model(MODEL)
    source = Source(MODEL, None, "", open_clip.get_model_config(MODEL), open_clip.get_model_preprocess_cfg(model))
    row = METHODS[method]
    options = row.configure({})
    clip = Clip(model, source, torch.device("cpu"), Additions(row.edits(options)))
    tokens = clip.tokenize(prompts([f"thing number {k}" for k in range(classes)], "a photo of a {}"))
    objective = row.build(Task(clip, tokens), options)
    trained = Trained.of(clip, objective.groups, Recipe(learning_rate=1e-9))
    fitting = Fitting(objective, part)
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, *clip.image_size, generator=draw)
    made = Batch.of(images, [k % classes for k in range(batch)], Rows(0, tuple(range(batch))))

    for parameter in trained.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    trained.step(1.0)  # now there are moments
    with checkpointing.checkpointed(clip) if checkpoint else contextlib.nullcontext():
        fitting.accumulate(made, trained.zero_grad)
    trained.step(1.0)
    weights = sum(p.numel() * p.element_size() for p in clip.model.parameters())
    teacher = sum(p.numel() * p.element_size() for p in model.visual.parameters()) if objective.teacher else 0
    return before, 4 * weights + teacher, peak()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--parts", type=int, nargs="+", default=[16, 8])
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--method", default="cite")
    args = parser.parse_args()
    print(f"{MODEL}, {args.method}, batch {args.batch}, {args.classes} classes, torch {torch.__version__}, cpu\n")
    print("| `--micro-batch` | `--gradient-checkpointing` | peak, GiB | held, GiB | beyond |\n|---|---|---|---|---|")
    rows = [(None, False), *((part, False) for part in args.parts), (None, True), (args.parts[-1], True)]
    whole = 0.0
    for part, checkpoint in rows:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            before, held, most = pool.apply(step, (args.method, args.classes, args.batch, part, checkpoint))
        beyond = most - before - held
        whole = whole or beyond
        gib = (f"{bytes_ / 2**30:.2f}" for bytes_ in (most, held))
        print(
            f"| {part or ''} | {'yes' if checkpoint else ''} | {' | '.join(gib)} | {beyond / whole:.2f} |", flush=True
        )


if __name__ == "__main__":
    main()
