"""What token editing costs: a step of atha over a step of plain fine-tuning, ViT-B-32 with random weights.

    python benchmarks/atha_cost.py [--classes 5 100] [--batch 8] [--repeat 7]

Both steps (forward, backward, AdamW) are timed in turns in one run; ratios of medians. "images" leaves the text tower
out of both: class tokens and text embeddings are given. "texts" is what reading the class texts takes with the class
tokens over what it takes without, and "share" how much of an atha step that reading is.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import open_clip
import torch
import torch.nn.functional as F

from clipfit.config.edits import EditSettings
from clipfit.model.clip import Clip
from clipfit.model.named import Additions
from clipfit.model.sources import Source, quiet
from clipfit.prompts import prompts

MODEL = "ViT-B-32"


def random_backbone(edited: bool, device: torch.device) -> Clip:
    torch.manual_seed(0)
    with quiet():
        model = open_clip.create_model(MODEL)
    source = Source(MODEL, None, "", open_clip.get_model_config(MODEL), open_clip.get_model_preprocess_cfg(model))
    backbone = Clip(model, source, device)
    if edited:
        backbone = backbone.with_additions(Additions(EditSettings()))
        backbone.edits.start()
    return backbone


def medians(steps: list[Callable[[], object]], repeat: int) -> list[float]:
    """Seconds of each step, the steps in turns; the first turn does not count."""
    times: list[list[float]] = [[] for _ in steps]
    for turn in range(repeat + 1):
        for mine, step in zip(times, steps, strict=True):
            started = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                mine.append(time.perf_counter() - started)
    return [statistics.median(mine) for mine in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[5, 100])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=7)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plain, edited = (random_backbone(e, device) for e in (False, True))
    images = torch.randn(args.batch, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(device)

    def stepper(backbone: Clip, tokens: torch.Tensor, read_texts: bool) -> Callable[[], object]:
        moving = [*backbone.model.parameters(), *(backbone.edits.parameters() if backbone.edits else ())]
        optimiser = torch.optim.AdamW([p for p in moving if p.requires_grad], lr=1e-9)
        labels = torch.arange(args.batch, device=device) % len(tokens)
        with torch.no_grad():
            given = backbone.read(tokens)

        def step() -> None:
            t, z = backbone.read(tokens) if read_texts else given
            u = backbone.encode_image(images, z)
            optimiser.zero_grad(set_to_none=True)
            F.cross_entropy(backbone.scale * u @ t.T, labels).backward()
            optimiser.step()

        return step

    def reader(backbone: Clip, tokens: torch.Tensor) -> Callable[[], object]:
        return lambda: backbone.read(tokens).embeddings.sum().backward()

    print(f"{MODEL}, batch {args.batch}, {device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| classes | step | images | texts | share |\n|---|---|---|---|---|")
    for classes in args.classes:
        tokens = plain.tokenize(prompts([f"thing number {k}" for k in range(classes)], "a photo of a {}"))
        whole = medians([stepper(b, tokens, True) for b in (plain, edited)], args.repeat)
        seen = medians([stepper(b, tokens, False) for b in (plain, edited)], args.repeat)
        read = medians([reader(b, tokens) for b in (plain, edited)], args.repeat)
        ratios = " | ".join(f"{after / before:.3f}" for before, after in (whole, seen, read))
        print(f"| {classes} | {ratios} | {read[1] / whole[1]:.0%} |", flush=True)


if __name__ == "__main__":
    main()
