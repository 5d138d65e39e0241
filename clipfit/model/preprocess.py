"""How a model wants its pictures: open_clip's preprocessing, checked before it is used."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from clipfit.errors import ModelError
from clipfit.model import compat

Geometry = Callable[[Image.Image], torch.Tensor]  # an RGB picture as a model wants it: (3, H, W) uint8
INTERPOLATIONS = ("bicubic", "bilinear", "random")  # open_clip evaluates "random" as bicubic
RESIZE_MODES = ("shortest", "longest", "squash")


def settings(given: Mapping[str, Any], place: str = "preprocess_cfg") -> dict[str, Any]:
    """What is given over open_clip's defaults, as JSON's types; `size` is the model's own and set with it.

    Args:
        given: null, and keys that open_clip does not know, count as not given. place: what errors name.

    Raises:
        ModelError: a value that open_clip cannot use; says key, expected and found.
    """
    if not isinstance(given, Mapping):
        raise ModelError(f"{place} must be an object; found {given!r}.")
    cfg = json.loads(json.dumps(compat.preprocess_cfg(given)))
    for key, (holds, expected) in _RULES.items():
        if not holds(cfg[key]):
            raise ModelError(f"{place}.{key} must be {expected}; found {cfg[key]!r}.")
    return dict(cfg)


def geometry(cfg: Mapping[str, Any]) -> Geometry:
    """What open_clip's own evaluation transform does before ToTensor and Normalize."""
    steps = compat.evaluation_transform(cfg)
    kinds = [type(step).__name__ for step in steps]
    if not kinds[-2].endswith("ToTensor") or kinds[-1] != "Normalize":
        raise ModelError(f"this open_clip preprocesses in an unknown way ({', '.join(kinds)}); please report it.")
    return functools.partial(_view, steps=steps[:-2])


def _view(picture: Image.Image, steps: Sequence[Any]) -> torch.Tensor:
    for step in steps:
        picture = step(picture)
    return pil_to_tensor(picture)


class Scale:
    """Pixels as a model wants them, by the mean and standard deviation of its settings."""

    def __init__(self, cfg: Mapping[str, Any], device: torch.device):
        self._device = device
        self._mean, self._std = (torch.tensor(cfg[key], device=device).view(-1, 1, 1) for key in ("mean", "std"))

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images (B, 3, H, W) → float32, on the device."""
        return (images.to(self._device, non_blocking=True) / 255).sub_(self._mean).div_(self._std)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _three_numbers(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_number, value))


def _three_positive_numbers(value: Any) -> bool:
    return _three_numbers(value) and min(value) > 0


def _colour(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255


_RULES: dict[str, tuple[Callable[[object], bool], str]] = {
    "mode": (("RGB",).__contains__, "'RGB'"),
    "mean": (_three_numbers, "three numbers"),
    "std": (_three_positive_numbers, "three numbers above 0"),
    "interpolation": (INTERPOLATIONS.__contains__, f"one of {', '.join(INTERPOLATIONS)}"),
    "resize_mode": (RESIZE_MODES.__contains__, f"one of {', '.join(RESIZE_MODES)}"),
    "fill_color": (_colour, "a whole number from 0 to 255"),
}
