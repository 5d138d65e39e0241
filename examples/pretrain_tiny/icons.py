"""The prepared icons: drawing batches with random colours, crops and stretches."""

import collections
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F


class Icons:
    """Pictures of one part ("train" or "held"), with their set, name and concept."""

    def __init__(self, folder: Path):
        self.mono = torch.from_numpy(np.load(folder / "mono.npy"))  # (N, 64, 64) uint8
        self.colour = torch.from_numpy(np.load(folder / "colour.npy"))  # (M, 64, 64, 4) uint8
        rows = json.loads((folder / "index.json").read_text())
        self.sets, self.names, self.concepts = (list(column) for column in zip(*rows, strict=True))

    def __len__(self) -> int:
        return len(self.concepts)

    def rgba(self, at: torch.Tensor) -> torch.Tensor:
        """(n,) indices → (n, 4, 64, 64) float in 0…1; one-colour icons are black."""
        out = torch.zeros(len(at), 4, 64, 64)
        is_mono = at < len(self.mono)
        out[is_mono, 3] = self.mono[at[is_mono]].float() / 255
        coloured = self.colour[at[~is_mono] - len(self.mono)].permute(0, 3, 1, 2).float() / 255
        coloured[:, :3] /= coloured[:, 3:].clamp(min=1 / 255)  # resvg's colours are premultiplied by alpha
        out[~is_mono] = coloured.clamp(max=1)
        return out

    def plain(self, at: torch.Tensor) -> torch.Tensor:
        """As drawn, on white: (n, 3, 64, 64) in 0…1."""
        rgba = self.rgba(at)
        return rgba[:, :3] * rgba[:, 3:] + 1 - rgba[:, 3:]


class Sampler:
    """Draws a concept (rarer ones nearly as often), then a set that draws it, then one of its pictures.

    A coloured set counts `colour` times: most sets have one colour.
    """

    def __init__(self, icons: Icons, colour: int = 3):
        by_concept: dict[str, dict[str, list[int]]] = collections.defaultdict(lambda: collections.defaultdict(list))
        for i, (prefix, concept) in enumerate(zip(icons.sets, icons.concepts, strict=True)):
            by_concept[concept][prefix].append(i)
        self.vocabulary = sorted(by_concept)
        self.weights = torch.tensor([len(by_concept[c]) for c in self.vocabulary]).float() ** 0.5
        times = lambda pictures: colour if pictures[0] >= len(icons.mono) else 1  # noqa: E731
        self.pictures = [[p for p in by_concept[c].values() for _ in range(times(p))] for c in self.vocabulary]

    def draw(self, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """→ picture indices (n,), concept indices (n,)."""
        labels = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        u = torch.rand(n, 2, generator=generator).tolist()
        at = []
        for label, (a, b) in zip(labels.tolist(), u, strict=True):
            sets = self.pictures[label]
            chosen = sets[int(a * len(sets))]
            at.append(chosen[int(b * len(chosen))])
        return torch.tensor(at), labels


def augment(rgba: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(n, 4, 64, 64) in 0…1 → (n, 3, 64, 64) in 0…1.

    60% stay as drawn on white (black, for one-colour icons); the rest get random paint and ground. Crop, stretch and
    a small rotation by one bilinear resampling.
    """
    n = len(rgba)
    uniform = lambda *shape, low=0.0, high=1.0: torch.rand(*shape, generator=generator) * (high - low) + low  # noqa: E731
    alpha, paint = rgba[:, 3:], rgba[:, :3]
    one_colour = (paint.flatten(1).amax(1) == 0)[:, None, None, None]
    repaint = (uniform(n) > 0.6)[:, None, None, None]
    ground = torch.where(repaint, uniform(n, 3, 1, 1), torch.ones(n, 3, 1, 1))
    tint = uniform(n, 3, 1, 1)
    contrast = (tint - ground).abs().amax(1, keepdim=True) < 0.3
    tint = torch.where(contrast, 1 - ground.round(), tint)
    jitter = paint * uniform(n, 3, 1, 1, low=0.7, high=1.2) + uniform(n, 3, 1, 1, low=-0.15, high=0.15)
    paint = torch.where(repaint, torch.where(one_colour, tint, jitter), paint)
    image = paint * alpha + ground * (1 - alpha)

    zoom = uniform(n, low=0.75, high=1.2)
    stretch = uniform(n, low=-0.15, high=0.15).exp()
    angle = uniform(n, low=-0.15, high=0.15)
    shift = uniform(n, 2, low=-0.12, high=0.12)
    a, b = zoom * stretch, zoom / stretch
    theta = torch.stack(
        [
            torch.stack([a * angle.cos(), -b * angle.sin(), shift[:, 0]], 1),
            torch.stack([a * angle.sin(), b * angle.cos(), shift[:, 1]], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, [n, 3, 64, 64], align_corners=False)
    image = F.grid_sample(image - ground, grid, align_corners=False) + ground  # beyond the edge: ground
    return image.clamp(0, 1)
