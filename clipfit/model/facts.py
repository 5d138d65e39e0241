"""What clipfit can do with an architecture, told from its layers, which are laid out without memory for weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from clipfit.model import compat, text_tower
from clipfit.model.image_tower import lacks_patches
from clipfit.model.lora import lacks_attention


@dataclass(frozen=True)
class Facts:
    """Of an architecture. `atha`, `lora`: what is missing for token editing and adapters; None where nothing is.

    parameters: of both towers; None where the text tower's configuration is not on this machine. image_size: height
    and width, pixels. trims: class names cost no more than their own length.
    """

    kind: str  # open_clip's class
    parameters: int | None
    image_size: tuple[int, int]
    atha: str | None
    lora: str | None
    trims: bool
    logit_bias: bool


def facts_of(model_cfg: Mapping[str, Any]) -> Facts:
    """The facts of a configuration of open_clip's; it is built with open_clip, on torch's meta device.

    Raises:
        Exception: open_clip cannot build it.
    """
    kind = compat.model_class(model_cfg)
    foreign = model_cfg["text_cfg"].get("hf_model_name")
    with torch.device("meta"):
        model = compat.build(_with_own_text(model_cfg) if foreign else model_cfg)
    no_text = "the text tower is one of the transformers library" if foreign else None
    image = lacks_patches(model)
    return Facts(
        kind=kind,
        parameters=None if foreign else sum(p.numel() for p in model.parameters()),
        image_size=compat.image_size(model),
        atha=f"the image tower {image}" if image else no_text,
        lora=lacks_attention(model) or no_text,
        trims=True if foreign else text_tower.trims(model),
        logit_bias=model.logit_bias is not None,
    )


def _with_own_text(model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The same image tower beside a text tower whose configuration is here."""
    text = {k: v for k, v in model_cfg["text_cfg"].items() if not k.startswith("hf_")}
    return {**copy.deepcopy(dict(model_cfg)), "text_cfg": text, "custom_text": True}
