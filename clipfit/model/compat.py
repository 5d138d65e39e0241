"""Everything of open_clip's that is not part of its documented interface: here, image_tower.py and text_tower.py.

A version of open_clip that moves one of these names breaks these files and no other.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import open_clip
from open_clip.factory import _find_checkpoint_in_dir
from open_clip.tokenizer import HFTokenizer, _tokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

Model: TypeAlias = open_clip.CLIP | open_clip.CustomTextCLIP


def recorded_size(model: Model) -> int | list[int]:
    """`size` as a preprocess_cfg has it: a side of the square, or height and width."""
    size: Any = model.visual.image_size
    return size if isinstance(size, int) else [int(side) for side in size]


def image_size(model: Model) -> tuple[int, int]:
    """Height and width, in pixels, of the images that the model takes."""
    size: Any = model.visual.image_size
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def model_class(model_cfg: Mapping[str, Any]) -> str:
    """The name of the class that open_clip would build: CLIP, CustomTextCLIP or CoCa."""
    if not (model_cfg.get("custom_text") or model_cfg["text_cfg"].get("hf_model_name")):
        return "CLIP"
    return "CoCa" if "multimodal_cfg" in model_cfg else "CustomTextCLIP"


def lacks_towers(model_cfg: Mapping[str, Any]) -> str | None:
    """Why a configuration is not one of an image tower beside a text tower, as in "is a CoCa"; None where it is."""
    if "vision_cfg" not in model_cfg:
        return "has no image tower"
    if "text_cfg" not in model_cfg or "genlip_cfg" in model_cfg:  # the latter writes texts, and encodes none
        return "has no text tower"
    return "is a CoCa, whose captioner would be lost" if "multimodal_cfg" in model_cfg else None


def build(model_cfg: Mapping[str, Any]) -> Model:
    """A model with random weights, as open_clip's create_model builds it; no other weights are fetched for a tower."""
    cfg = copy.deepcopy({key: value for key, value in model_cfg.items() if key != "custom_text"})
    if cfg["vision_cfg"].get("timm_model_name"):
        cfg["vision_cfg"]["timm_model_pretrained"] = False
    if cfg["text_cfg"].get("hf_model_name"):
        cfg["text_cfg"]["hf_model_pretrained"] = False
    kind = open_clip.CLIP if model_class(model_cfg) == "CLIP" else open_clip.CustomTextCLIP
    return kind(**cfg)


def checkpoint_in(folder: Path) -> Path | None:
    """The weight file that open_clip takes from a model folder."""
    found = _find_checkpoint_in_dir(folder)
    return Path(found) if found else None


def preprocess_cfg(given: Mapping[str, Any]) -> dict[str, Any]:
    """What is given over open_clip's defaults."""
    return merge_preprocess_dict(PreprocessCfg(), dict(given))


def evaluation_transform(cfg: Mapping[str, Any]) -> list[Any]:
    """The steps by which open_clip makes a picture its model's input."""
    return list(image_transform_v2(PreprocessCfg(**cfg), is_train=False).transforms)


def plain_tokenizer(options: Mapping[str, Any]) -> open_clip.SimpleTokenizer:
    """open_clip's own. Its vocabulary takes a while to read, and was read for the usual one with open_clip itself."""
    if set(options) > {"context_length"}:
        return open_clip.SimpleTokenizer(**options)
    tokenizer = copy.copy(_tokenizer)
    tokenizer.context_length = options["context_length"]
    return tokenizer


def hub_tokenizer(place: str, mode: str | None, options: Mapping[str, Any]) -> Any:
    """open_clip's wrapper of a tokenizer of the transformers library, from a folder or by name."""
    return HFTokenizer(place, tokenizer_mode=mode, **options)
