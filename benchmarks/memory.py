"""What a training step holds in memory: the whole batch at once, in parts, and with blocks computed again.

    python benchmarks/memory.py [--batch 64] [--parts 16 8] [--classes 10] [--method cite] [--whole]

ViT-B-32 with random weights, a step (not the first) in a process of its own for each row; its peak is what the system
says of it (ru_maxrss). "held" is what no part of a batch changes: weights, gradient, two moments and, of cite, the
frozen image tower; "beyond" is the peak less that and less a process that has loaded torch and clipfit, over the whole
batch's. Below, the whole of `adapt`, from files to a run read back, over a step with nothing but what it must hold:
those four, the frozen tower, and what the image tower computes of the batch.
"""

import argparse
import contextlib
import copy
import multiprocessing
import resource
import sys
import tempfile
from pathlib import Path

import torch
from predict import photographs, random_model
from step import Step, clip_of

from clipfit.model import checkpointing
from clipfit.training.step import Fitting

MODEL = "ViT-B-32"
UNIT = 1 if sys.platform == "darwin" else 1024


def peak() -> int:
    """Bytes, of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT


def step(method: str, classes: int, batch: int, part: int | None, checkpoint: bool) -> tuple[int, int, int]:
    """Bytes at most: before there was a model, held by weights and what is kept of each, and after a step."""
    torch.set_num_threads(1)
    before = peak()
    made = Step.of(MODEL, method, classes, batch, "fp32")
    made.fitting = Fitting(made.objective, part)
    for parameter in made.trained.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    made.trained.step(1.0)  # now there are moments
    clip = made.objective.clip
    with checkpointing.checkpointed(clip) if checkpoint else contextlib.nullcontext():
        made()
    weights = sum(p.numel() * p.element_size() for p in clip.model.parameters())
    visual = clip.model.visual.parameters()
    teacher = sum(p.numel() * p.element_size() for p in visual) if made.objective.teacher else 0
    return before, 4 * weights + teacher, peak()


def bare(batch: int) -> tuple[int, int]:
    """Bytes at most: before there was a model, and after a step of image towers and AdamW alone."""
    torch.set_num_threads(1)
    before = peak()
    model = clip_of(MODEL, "finetune").model
    frozen = copy.deepcopy(model.visual).requires_grad_(False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)
    images = torch.randn(batch, 3, 224, 224)
    for _ in range(2):
        optimiser.zero_grad()
        for parameter in model.transformer.parameters():
            parameter.grad = torch.zeros_like(parameter)  # of the text tower, whose products are left out
        for parameter in (model.token_embedding.weight, model.positional_embedding, model.text_projection):
            parameter.grad = torch.zeros_like(parameter)
        frozen(images)
        model.visual(images).sum().backward()
        optimiser.step()
    return before, peak()


def whole(root: Path, batch: int, method: str) -> tuple[int, int]:
    """Bytes at most: before there was a model, and after `adapt`, of two epochs."""
    from clipfit import AdaptConfig, adapt

    torch.set_num_threads(1)
    before = peak()
    recipe = {"epochs": 2, "batch_size": batch}
    adapt(AdaptConfig(root / "shots", method, str(root / "model"), recipe=recipe, output=root / "run", device="cpu"))
    return before, peak()


def compared(batch: int, method: str) -> None:
    """The table of the whole command, on two batches of JPEGs."""
    print(f"\n{MODEL}, batch {batch}: beyond a process that has loaded torch and clipfit\n")
    print("| what | peak, GiB | over the bare step |\n|---|---|---|")
    found = {}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        random_model(root / "model")
        for number, picture in enumerate(photographs(root / "pictures", 2 * batch)):
            folder = root / "shots" / f"thing number {number % 10}"
            folder.mkdir(parents=True, exist_ok=True)
            picture.rename(folder / picture.name)
        for name, work, given in (
            ("bare step", bare, (batch,)),
            (f"adapt --method {method}", whole, (root, batch, method)),
        ):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                before, most = pool.apply(work, given)
            found[name] = most - before
            print(f"| {name} | {found[name] / 2**30:.2f} | {found[name] / found['bare step']:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--parts", type=int, nargs="+", default=[16, 8])
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--method", default="cite")
    parser.add_argument("--whole", action="store_true", help="the last table alone")
    args = parser.parse_args()
    if args.whole:
        compared(args.batch, args.method)
        return
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
    compared(args.batch, args.method)


if __name__ == "__main__":
    main()
