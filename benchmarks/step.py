"""What a training step costs over its floor: the image tower forward and backward, and the frozen tower's forward.

    python benchmarks/step.py [--batch 32] [--classes 10 1000] [--methods cite atha] [--turns 5] [--threads 1]

ViT-B-32 with random weights. The floor is eager fp32 and nothing else: no text, no loss, no optimiser; of methods
without a teacher it is without the frozen tower. Each turn takes the floor and every row once, one after another, so
that what else runs on the machine falls on all of them; ratios are medians over turns, of the processor's own count of
its time. "parts" are what a step of cite has beside its image towers, over the same floor. --compile adds the floor
under torch.compile, and the seconds that it takes to begin.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import open_clip
import torch

from clipfit.config import Recipe
from clipfit.methods import METHODS, Embeddings, Objective, Seen, Task
from clipfit.methods.batch import Batch
from clipfit.model import devices
from clipfit.model.clip import Clip, FrozenImageTower
from clipfit.model.loading import load
from clipfit.model.named import Additions
from clipfit.model.sources import Source, quiet
from clipfit.prompts import prompts
from clipfit.streams import Rows
from clipfit.training.state import Trained
from clipfit.training.step import Fitting, weighted

CPU = torch.device("cpu")


def clip_of(model: str, method: str, device: torch.device = CPU) -> Clip:
    """A CLIP with random weights, and what a method adds to it."""
    row = METHODS[method]
    additions = Additions(row.edits(row.configure({})))
    if model == "clipfit-tiny":
        return load(model, device=device).with_additions(additions)
    torch.manual_seed(0)
    with quiet():
        built = open_clip.create_model(model)
    source = Source(model, None, "", open_clip.get_model_config(model), open_clip.get_model_preprocess_cfg(built))
    return Clip(built, source, device, additions)


@dataclass
class Step:
    """A step of a method on a batch that is ready."""

    objective: Objective
    fitting: Fitting
    trained: Trained
    batch: Batch

    @classmethod
    def of(cls, model: str, method: str, classes: int, size: int, precision: str, device: torch.device = CPU) -> Step:
        clip = clip_of(model, method, device)
        clip.precision = precision
        row = METHODS[method]
        tokens = clip.tokenize(prompts([f"thing number {k}" for k in range(classes)], "a photo of a {}."))
        objective = row.build(Task(clip, tokens), row.configure({}))
        trained = Trained.of(clip, objective.groups, Recipe(learning_rate=1e-9))
        images = torch.randn(size, 3, *clip.image_size, generator=torch.Generator().manual_seed(0)).to(device)
        labels = [k * max(1, classes // size) % classes for k in range(size)]  # as many classes as there can be
        batch = Batch.of(images, labels, Rows(0, tuple(range(size))))
        return cls(objective, Fitting(objective, None), trained, batch)

    def __call__(self) -> None:
        self.fitting.accumulate(self.batch, self.trained.zero_grad)
        self.trained.step(1.0)


def floor_of(visual: Any, images: torch.Tensor, frozen: Any = None) -> Callable[[], None]:
    """The image tower forward and backward, and beside it a frozen one's forward."""

    def run() -> None:
        for parameter in visual.parameters():
            parameter.grad = None
        visual(images).sum().backward()
        if frozen is not None:
            frozen(images)

    return run


def parts_of(step: Step) -> dict[str, Callable[[], None]]:
    """What a step has beside the image towers."""
    objective, batch = step.objective, step.batch
    clip, rows = objective.clip, objective.classes(batch)
    with torch.no_grad():
        u = clip.encode_image(batch.images[:1]).expand(len(batch.labels), -1)

    def texts() -> None:
        clip.read(objective.tokens[list(rows.numbers)], rows).embeddings.sum().backward()

    def losses() -> None:
        t = objective.teacher_t[list(rows.numbers)].clone().requires_grad_()
        seen = Seen(u.detach().clone().requires_grad_())
        weighted(objective.terms(Embeddings(seen, t, u), batch)).backward()

    def update() -> None:
        step.trained.step(1.0)

    return {"texts": texts, "losses": losses, "update": update}


def measured(work: dict[str, Callable[[], None]], turns: int) -> dict[str, float]:
    """Median seconds of the processor for each, all taken in turn; the first turn warms up."""
    found: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(turns + 1):
        for name, run in work.items():
            before = time.process_time()
            run()
            if turn:
                found[name].append(time.process_time() - before)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 1000])
    parser.add_argument("--methods", nargs="+", default=["cite"], choices=list(METHODS))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    fast = devices.resolve_precision("auto", CPU)
    types = ["fp32"] if fast == "fp32" else ["fp32", fast]
    print(f"{args.model}, batch {args.batch}, {args.threads} threads, torch {torch.__version__}, "
          f"bf16 products: {'fast' if fast == 'bf16' else 'none'}, medians of {args.turns} turns\n")  # fmt: skip

    print("| step | classes | precision | floor, s | over the floor |\n|---|---|---|---|---|")
    for method in args.methods:
        for classes in args.classes:
            for precision in types:
                step = Step.of(args.model, method, classes, args.batch, precision)
                tower = step.objective.clip
                tower.precision = "fp32"
                frozen = FrozenImageTower(tower) if step.objective.teacher else None
                tower.precision = precision
                seconds = measured(
                    {"floor": floor_of(tower.model.visual, step.batch.images, frozen), "step": step}, args.turns
                )
                print(f"| {method} | {classes} | {precision} | {seconds['floor']:.2f} | "
                      f"**{seconds['step'] / seconds['floor']:.3f}** |", flush=True)  # fmt: skip
    _parts(args)
    if args.compile:
        _compiled(args)


def _parts(args: argparse.Namespace) -> None:
    step = Step.of(args.model, "cite", args.classes[0], args.batch, "fp32")
    tower = step.objective.clip
    whole = {"floor": floor_of(tower.model.visual, step.batch.images, FrozenImageTower(tower)), "step": step}
    seconds = measured({**whole, **parts_of(step)}, args.turns)
    print(f"\nparts of cite, {args.classes[0]} classes\n\n| part | over the floor |\n|---|---|")
    for name in ("texts", "losses", "update"):
        print(f"| {name} | {seconds[name] / seconds['floor']:.4f} |")


def _compiled(args: argparse.Namespace) -> None:
    tower = clip_of(args.model, "finetune").model.visual
    images = torch.randn(args.batch, 3, *clip_of(args.model, "finetune").image_size)
    compiled = torch.compile(tower)
    began = time.perf_counter()
    floor_of(compiled, images)()
    took = time.perf_counter() - began
    seconds = measured({"eager": floor_of(tower, images), "compiled": floor_of(compiled, images)}, args.turns)
    print(f"\ntorch.compile: {seconds['compiled'] / seconds['eager']:.3f} of eager, forward and backward, "
          f"after {took:.0f} s to begin ({took / seconds['eager']:.0f} steps)")  # fmt: skip


if __name__ == "__main__":
    main()
