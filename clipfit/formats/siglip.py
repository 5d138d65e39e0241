"""SigLIP as the transformers library has it: what SiglipModel and SiglipProcessor read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from clipfit.formats import bpe, renaming
from clipfit.model.clip import Clip
from clipfit.model.sources import LOCAL_DIR, Source
from clipfit.model.tokenizing import is_of_transformers, write_tokenizer
from clipfit.runs import files

# timm's image towers of SigLIP that pool their patches by attention; those with "gap" in their names do not
TRUNK = re.compile(r"vit_[a-z0-9]+_patch\d+_siglip_\d+")
IMAGE = ("image_size", "timm_model_name", "timm_model_pretrained", "timm_pool", "timm_proj")
TEXT = (
    "context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "no_causal_mask", "proj_bias", "pool_type",
    "norm_kwargs", "act_kwargs", "hf_tokenizer_name", "tokenizer_kwargs", "pad_id",
)  # fmt: skip
NEEDED = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}  # of the text tower
TOKENIZER_CONFIG = "tokenizer_config.json"


def is_siglip(source: Source) -> bool:
    """Whether the image tower is one of SigLIP's, by the name of its architecture."""
    name = str(source.model_cfg["vision_cfg"].get("timm_model_name") or "")
    if name.startswith(LOCAL_DIR):  # timm's own form of an architecture of other sizes
        file = Path(name.removeprefix(LOCAL_DIR)) / "config.json"
        name = json.loads(file.read_text("utf-8")).get("architecture", "") if file.is_file() else ""
    return bool(TRUNK.fullmatch(name.partition(".")[0]))


def unlike_siglip(source: Source) -> str | None:
    """None, or what of a model with SigLIP's image tower SiglipModel has no place for."""
    image, text = source.model_cfg["vision_cfg"], source.model_cfg["text_cfg"]
    if (image.get("timm_pool"), image.get("timm_proj")) != ("map", "none"):
        return "an image tower of SigLIP's with a projection or a pooling of another kind"
    for key, value in NEEDED.items():
        if text.get(key) != value:
            return f"a text tower with {key} {text.get(key)!r} beside an image tower of SigLIP's"
    for where, cfg, known in (("an image", image, IMAGE), ("a text", text, TEXT)):
        if strange := [key for key, value in cfg.items() if value and key not in known]:
            return f"{where} tower with {strange[0]} {cfg[strange[0]]!r}"
    return None


def needs_5(source: Source) -> bool:
    """Whether transformers 4 cannot read it: open_clip's own tokenizer, which it fails to copy, or pictures cropped."""
    return not is_of_transformers(source) or source.preprocess_cfg.get("resize_mode") != "squash"


def config(clip: Clip, dtype: str) -> dict[str, Any]:
    """config.json of SiglipModel: sizes, activations and norms as the layers have them."""
    model: Any = clip.model
    trunk, text = model.visual.trunk, model.text
    block, first = trunk.blocks[0], text.transformer.resblocks[0]
    return {
        "architectures": ["SiglipModel"], "model_type": "siglip", "dtype": dtype, "torch_dtype": dtype,
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": trunk.embed_dim,
            "intermediate_size": block.mlp.fc1.out_features, "num_hidden_layers": len(trunk.blocks),
            "num_attention_heads": block.attn.num_heads, "num_channels": 3, "image_size": clip.image_size[0],
            "patch_size": trunk.patch_embed.patch_size[0], "hidden_act": _activation(block.mlp.act),
            "layer_norm_eps": trunk.norm.eps,
        },
        "text_config": {
            "model_type": "siglip_text_model", "hidden_size": text.ln_final.weight.numel(),
            "intermediate_size": first.mlp.c_fc.out_features, "num_hidden_layers": len(text.transformer.resblocks),
            "num_attention_heads": first.attn.num_heads, "vocab_size": text.token_embedding.num_embeddings,
            "max_position_embeddings": len(text.positional_embedding), "hidden_act": _activation(first.mlp.gelu),
            "layer_norm_eps": text.ln_final.eps, "projection_size": clip.embed_dim,
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        },
    }  # fmt: skip


def _activation(layer: torch.nn.Module) -> str:
    """What the library calls it."""
    if type(layer).__name__ == "QuickGELU":
        return "quick_gelu"
    by_tanh = type(layer).__name__ == "GELUTanh" or getattr(layer, "approximate", "none") == "tanh"
    return "gelu_pytorch_tanh" if by_tanh else "gelu"


def write_texts(folder: Path, source: Source) -> None:
    """The tokenizer, which fills every text to the context's length: the last token is what is pooled.

    Raises:
        ModelError: it cannot be had. OutputError: the place cannot be written.
    """
    length = source.model_cfg["text_cfg"].get("context_length", 77)
    if not is_of_transformers(source):
        bpe.write_for_siglip(folder, source)
        return
    write_tokenizer(source, folder)
    record = json.loads((folder / TOKENIZER_CONFIG).read_text("utf-8"))
    # no attention mask: open_clip's tower reads what a text is filled with, too. tokenizer.json says all of how texts
    # are read; the class that transformers 5 would name is unknown to 4
    told = {"model_max_length": length, "model_input_names": ["input_ids"], "tokenizer_class": bpe.ANY_CLASS}
    special = {name: token for name, token in record.items() if name.endswith("_token")}
    files.write_json(folder / TOKENIZER_CONFIG, {**special, **told})


# ---- the names of weights

_OUTSIDE = {
    "text.token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "text.positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text.ln_final": "text_model.final_layer_norm",
    "text.text_projection": "text_model.head",
    "visual.trunk.patch_embed.proj": "vision_model.embeddings.patch_embedding",
    "visual.trunk.norm": "vision_model.post_layernorm",
    "visual.trunk.attn_pool.proj": "vision_model.head.attention.out_proj",
    "visual.trunk.attn_pool.norm": "vision_model.head.layernorm",
    "visual.trunk.attn_pool.mlp.fc1": "vision_model.head.mlp.fc1",
    "visual.trunk.attn_pool.mlp.fc2": "vision_model.head.mlp.fc2",
}
_INSIDE = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj", "norm1": "layer_norm1", "norm2": "layer_norm2", "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2", "attn.proj": "self_attn.out_proj",
}  # fmt: skip
_BLOCK = re.compile(r"(visual\.trunk\.blocks|text\.transformer\.resblocks)\.(\d+)\.(.+)")
_FUSED = re.compile(r"attn\.(?:qkv\.|in_proj_)(weight|bias)")  # queries, keys and values at once
_POOL = "visual.trunk.attn_pool"


def renamed(state: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """open_clip's tensors under the names that SiglipModel has for them. Raises KeyError for one that it has not."""
    yield "logit_scale", state["logit_scale"].reshape(1)
    yield "logit_bias", state.get("logit_bias", torch.zeros(())).reshape(1)
    yield "vision_model.embeddings.position_embedding.weight", state["visual.trunk.pos_embed"][0]
    yield "vision_model.head.probe", state[f"{_POOL}.latent"]
    for kind in ("weight", "bias"):
        both = [state[f"{_POOL}.{part}.{kind}"] for part in ("q", "kv")]
        yield f"vision_model.head.attention.in_proj_{kind}", torch.cat(both)
    done = ("logit_scale", "logit_bias", "visual.trunk.pos_embed", *(f"{_POOL}.{p}" for p in ("latent", "q", "kv")))
    for name, tensor in state.items():
        if name in done or name.rpartition(".")[0] in done:
            continue
        if inside := _BLOCK.fullmatch(name):
            yield from _of_block(inside, tensor)
        else:
            yield renaming.named(name, _OUTSIDE), tensor


def _of_block(inside: re.Match[str], tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    tower, number, inner = inside.groups()
    block = f"{'vision' if tower.startswith('visual') else 'text'}_model.encoder.layers.{number}."
    if fused := _FUSED.fullmatch(inner):
        yield from renaming.projections(block, fused[1], tensor)
    else:
        yield block + renaming.named(inner, _INSIDE), tensor
