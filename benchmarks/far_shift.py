"""How far ATHA's edits turn the embeddings of the pre-trained clipfit-tiny: `python benchmarks/far_shift.py`.

What adapting does to the same images is a plan: `clipfit benchmark benchmarks/far_shift.toml`.
"""

from dataclasses import replace
from pathlib import Path

import digits
import torch

from clipfit import Recipe
from clipfit.config.edits import EditSettings
from clipfit.data import layout
from clipfit.data.images import decode
from clipfit.model.loading import load
from clipfit.model.named import Additions
from clipfit.prompts import prompts

HERE = Path(__file__).parent


@torch.no_grad()
def turn() -> None:
    """The angle between an image's embedding with the edits of untrained strengths and without them."""
    usual = EditSettings()
    print("| images | strengths | median angle | 95% of images below |\n|---|---|---|---|")
    for data in (digits.flat(), HERE / "tasks/silhouettes"):
        found = layout.read(data)
        model = load("clipfit-tiny")
        pictures = [model.geometry(decode(sample.path)) for sample in (*found.train, *(found.test or ()))]
        images = model.normalize(torch.stack(pictures))  # (n, 3, H, W)
        plain = model.encode_image(images)  # (n, D)
        tokens = model.tokenize(prompts(found.names.values(), Recipe().template))
        for times in (1, 10, 100):
            head, tail = times * usual.head_strength, times * usual.tail_strength
            model = model.with_additions(Additions(replace(usual, head_strength=head, tail_strength=tail)))
            model.edits.start()
            edited, _ = model.encode(images, tokens)
            angles = 2 * ((plain - edited).norm(dim=1) / 2).asin().rad2deg()  # (n,); a cosine near 1 is too coarse
            print(f"| {data.name} | {times} × | {angles.median():.2f}° | {angles.quantile(0.95):.2f}° |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    turn()
