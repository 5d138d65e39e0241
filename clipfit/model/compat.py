"""Everything of open_clip's that is not part of its documented interface, in one place.

A version of open_clip that moves one of these names breaks this file and no other.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from open_clip.factory import _find_checkpoint_in_dir
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from open_clip.transformer import VisionTransformer, text_global_pool

from clipfit.errors import ModelError

Tensor = torch.Tensor


class Head(NamedTuple):
    """What a vision transformer ends with: projᵀ after the affine part of `ln_post`."""

    proj: Tensor  # (V, D)
    weight: Tensor  # (V,)
    bias: Tensor  # (V,)


def require_patch_tokens(model: Any, name: str) -> None:
    """Raises ModelError for an image tower that is not open_clip's own vision transformer or pools in another way."""
    visual = model.visual
    if isinstance(visual, VisionTransformer) and visual.attn_pool is None:
        return
    pooled = " with attentional pooling" if isinstance(visual, VisionTransformer) else ""
    kind = type(getattr(visual, "trunk", visual)).__name__
    raise ModelError(
        "token editing needs the patch tokens and the linear head of open_clip's vision transformer, but the image "
        f"tower of {name} is a {kind}{pooled}: take a ViT."
    )


def image_blocks(model: Any) -> Sequence[torch.nn.Module]:
    """The blocks of a vision transformer; each is called with tokens (B, 1 + L, V)."""
    blocks: Sequence[torch.nn.Module] = model.visual.transformer.resblocks
    return blocks


def text_blocks(model: Any) -> Sequence[torch.nn.Module]:
    """The blocks of the text tower."""
    blocks: Sequence[torch.nn.Module] = model.transformer.resblocks
    return blocks


def towers(model: Any) -> dict[str, Sequence[Any]]:
    """The blocks of both towers; none where a tower is no transformer of open_clip's own."""
    both = {"image": getattr(model.visual, "transformer", None), "text": model.transformer}
    return {name: getattr(tower, "resblocks", ()) for name, tower in both.items()}


def head(model: Any) -> Head:
    """The head of the vision transformer."""
    visual = model.visual
    return Head(visual.proj, visual.ln_post.weight, visual.ln_post.bias)


def patch_grid(model: Any) -> tuple[int, int]:
    """Rows and columns of patches of a vision transformer."""
    rows, columns = model.visual.grid_size
    return int(rows), int(columns)


def image_size(model: Any) -> tuple[int, int]:
    """Height and width, in pixels, of the images that the model takes."""
    size = model.visual.image_size
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def ends(model: Any, tokens: Tensor) -> Tensor:
    """Where the end of each text stands: token ids (n, context length) → (n,) int64."""
    eos = model.text_eos_id if model.text_pool_type == "eos" else tokens.amax(1, keepdim=True)
    return (tokens == eos).int().argmax(1)


def pools_at_end(model: Any) -> bool:
    """Whether a text's features are those of its end-of-text token."""
    return model.text_pool_type in ("argmax", "eos")


def cut(model: Any, tokens: Tensor) -> Tensor:
    """Token ids without the columns behind the longest text's end, where that changes nothing.

    Under a causal mask nothing behind the end-of-text token can change its features; several times faster for class
    names.
    """
    if model.attn_mask is None or not pools_at_end(model):
        return tokens
    return tokens[:, : int(ends(model, tokens).max()) + 1]


def text_features(model: Any, tokens: Tensor, context: Tensor | None, inner_block: int | None) -> list[Tensor]:
    """Text features (n, D) of the last block, then of block `inner_block` through the same norm and projection.

    open_clip's `encode_text` refuses a shorter sequence than the full context, hence these lines.

    Args:
        tokens: (n, length) token ids; length at most the context's. context: (words, width), embeddings that stand in
            place of those of the first tokens behind the start of the text.
    """
    length, dtype = tokens.shape[1], model.transformer.get_cast_dtype()
    mask = None if model.attn_mask is None else model.attn_mask[:length, :length]
    x = model.token_embedding(tokens).to(dtype)  # (n, length, width)
    if context is not None:
        words = context.to(dtype).expand(len(x), -1, -1)
        x = torch.cat([x[:, :1], words, x[:, 1 + words.shape[1] :]], 1)
    x = x + model.positional_embedding[:length].to(dtype)
    if inner_block is None:
        outputs = [model.transformer(x, attn_mask=mask)]  # (n, length, width)
    else:
        last, inner = model.transformer.forward_intermediates(x, attn_mask=mask, indices=[inner_block])
        outputs = [last, *inner]
    pooled = (text_global_pool(model.ln_final(h), tokens, model.text_pool_type, model.text_eos_id) for h in outputs)
    return [_projected(model.text_projection, features) for features in pooled]


def _projected(projection: Any, features: Tensor) -> Tensor:
    if projection is None:
        return features
    out: Tensor = projection(features) if isinstance(projection, torch.nn.Linear) else features @ projection
    return out


# ---- what loading goes by


def model_class(model_cfg: Mapping[str, Any]) -> str:
    """The name of the class that open_clip would build: CLIP, CustomTextCLIP or CoCa."""
    if not (model_cfg.get("custom_text") or model_cfg["text_cfg"].get("hf_model_name")):
        return "CLIP"
    return "CoCa" if "multimodal_cfg" in model_cfg else "CustomTextCLIP"


def build(model_cfg: Mapping[str, Any]) -> open_clip.CLIP:
    """A CLIP with random weights, as open_clip's create_model builds it; no other weights are fetched for a tower."""
    cfg = copy.deepcopy({key: value for key, value in model_cfg.items() if key != "custom_text"})
    if "timm_model_name" in cfg["vision_cfg"]:
        cfg["vision_cfg"]["timm_model_pretrained"] = False
    return open_clip.CLIP(**cfg)


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


def hub_tokenizer(place: str, mode: str | None, options: Mapping[str, Any]) -> Any:
    """open_clip's wrapper of a tokenizer of the transformers library, from a folder or by name."""
    return HFTokenizer(place, tokenizer_mode=mode, **options)
