"""Where a model's patches lie on a picture, and which class text each of them looks like in the end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from clipfit.model import compat
from clipfit.model.clip import Clip, Texts
from clipfit.model.image_tower import patch_tower
from clipfit.model.sources import Source


@dataclass(frozen=True)
class View:
    """The part of a picture that a model sees, in the picture's pixels; it reaches beyond it where padding is added."""

    left: float
    top: float
    right: float
    bottom: float

    def patch(self, index: int, grid: tuple[int, int]) -> View:
        """Patch `index` of a grid of (rows, columns), counted row by row."""
        row, column = divmod(index, grid[1])
        height, width = (self.bottom - self.top) / grid[0], (self.right - self.left) / grid[1]
        left, top = self.left + column * width, self.top + row * height
        return View(left, top, left + width, top + height)


def view_of(source: Source, width: int, height: int) -> View:
    """What the model's preprocessing leaves of a picture, as open_clip's evaluation transform resizes and crops it."""
    cfg = source.preprocess_cfg
    size = cfg.get("size") or source.model_cfg["vision_cfg"].get("image_size", 224)
    rows, columns = (size, size) if isinstance(size, int) else size
    mode = cfg.get("resize_mode") or "shortest"
    if mode == "squash":
        return View(0, 0, width, height)
    ratio = (max if mode == "longest" else min)(height / rows, width / columns)  # pixels of the picture a model pixel
    (left, right), (top, bottom) = _seen(width, columns, ratio), _seen(height, rows, ratio)
    return View(left, top, right, bottom)


def _seen(length: int, size: int, ratio: float) -> tuple[float, float]:
    """First and last pixel of a side that is resized by a ratio, then cropped or padded in the middle to a size."""
    resized = round(length / ratio)
    cut = round((resized - size) / 2) if resized > size else -((size - resized) // 2)
    return cut * length / resized, (cut + size) * length / resized


def require_patches(source: Source) -> None:
    """Raises ModelError for an image tower without patch tokens; its layers are looked at, without their weights."""
    with torch.device("meta"):
        model = compat.build(source.model_cfg)
    patch_tower(model, source.model, "explain")


@torch.no_grad()
def likeness(model: Clip, images: torch.Tensor, texts: Texts) -> torch.Tensor:
    """Cosine of every patch's final feature with every class text: images (B, 3, H, W) → (B, L, C), float32.

    The final feature of a patch is what would become the image's embedding if the patch stood in the class token's
    place: the last block's output through the final norm and projection. It was never trained to match a text, and has
    by then taken in the whole picture through attention.
    """
    last: list[torch.Tensor] = []
    tower = model.patch_tower
    handle = tower.blocks[-1].register_forward_hook(lambda _module, _args, out: last.append(out))
    try:
        model.encode_image(images, texts.class_tokens)
    finally:
        handle.remove()
    patches = tower.project(last[0][:, tower.prefix :].float())  # (B, L, D)
    return F.normalize(patches, dim=-1) @ texts.embeddings.to(patches).T
