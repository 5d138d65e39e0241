"""Zero-shot accuracy of a model folder on the probe: python evaluate.py DATA [MODEL]   (MODEL: clipfit-tiny)

50 classes fixed in probe.py, each among all 50; pictures from sets that were never trained on; Wilson 95% intervals.
Prints a Markdown table.
"""

import sys
from pathlib import Path

import torch

from clipfit.measure.metrics import wilson_interval
from clipfit.model.loading import load
from clipfit.prompts import prompts
from icons import Icons
from probe import CLASSES, STYLES, probe


@torch.no_grad()
def main(data: Path, model: str) -> None:
    held, backbone = Icons(data / "held"), load(model)
    text = backbone.encode_text(backbone.tokenize(prompts(CLASSES, "a photo of a {}")))
    print("| style | sets | images | top-1 | 95% interval |\n|---|---|---|---|---|")
    for style, (at, labels) in probe(held).items():
        pictures = [held.plain(part) * 255 for part in at.split(128)]
        u = torch.cat([backbone.encode_image(backbone.normalize(p.round().to(torch.uint8))) for p in pictures])
        right, n = int((u @ text.T).argmax(1).eq(labels).sum()), len(labels)
        low, high = wilson_interval(right, n)
        print(f"| {style} | {', '.join(STYLES[style])} | {n} | {right / n:.1%} | {low:.1%} – {high:.1%} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "clipfit-tiny")
