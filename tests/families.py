"""open_clip's model families with random weights, shrunk by configuration: folders that plain open_clip loads too."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from conftest import PREPROCESS, QUICK, TEXT
from safetensors.torch import save_file

from clipfit.model import compat

# a family's timm architecture, with what makes it small; images are of 32 pixels unless told otherwise
SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
TRUNKS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # name: (timm's architecture, arguments, how open_clip's configurations use it)
    "siglip": ("vit_base_patch16_siglip_224", SMALL_VIT, {"timm_pool": "map", "timm_proj": "none"}),
    "pe": ("vit_pe_core_base_patch16_224", {**SMALL_VIT, "ref_feat_shape": [4, 4], "attn_pool_num_heads": 2},
           {"timm_pool": "map", "timm_proj": ""}),
    "mobileclip-b": ("vit_base_mci_224", {"img_size": 32, "depth": 2}, {"timm_pool": "token", "timm_proj": None}),
    "mobileclip-s": ("fastvit_mci0", {"layers": [1, 1, 1, 1], "embed_dims": [16, 32, 32, 64]},
                     {"timm_pool": "avg", "timm_proj": None, "image_size": 64}),
    "eva02": ("eva02_base_patch16_clip_224", {**SMALL_VIT, "ref_feat_shape": [4, 4]},
              {"timm_pool": "token", "timm_proj": None}),
    "vitamin": ("vitamin_small_224", {"img_size": 64, "depth": 2}, {"timm_proj": "linear", "image_size": 64}),
    "convnext": ("convnext_tiny", {"depths": [1, 1, 1, 1], "dims": [16, 16, 32, 32]},
                 {"timm_pool": "", "timm_proj": "linear", "image_size": 64}),
}  # fmt: skip
SIGLIP_TEXT = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
TEXTS: dict[str, dict[str, Any]] = {"siglip": SIGLIP_TEXT, "mobileclip-s": {"no_causal_mask": True}}
FAMILIES = tuple(TRUNKS)
EDITED = ("mobileclip-b", "eva02", "vitamin")  # by which tokens can be edited
ADAPTED = ("siglip", "pe", *EDITED)  # and adapters put on
TRIMMED = tuple(name for name in FAMILIES if name not in TEXTS)


def timm_folder(folder: Path, architecture: str, arguments: dict[str, Any]) -> str:
    """timm's own form of an architecture with other arguments than its name says: what `timm_model_name` is then."""
    folder.mkdir(parents=True, exist_ok=True)
    usual = timm.models.get_pretrained_cfg(architecture).to_dict()
    about = {
        key: usual[key]
        for key in ("first_conv", "classifier", "pool_size", "input_size", "fixed_input_size")
        if usual.get(key)
    }
    record = {"architecture": architecture, "pretrained_cfg": about, "model_args": arguments}
    (folder / "config.json").write_text(json.dumps(record), "utf-8")
    return f"local-dir:{folder}"


def family_cfg(name: str, folder: Path) -> dict[str, Any]:
    """A model_cfg of the family; what its image tower needs is written into the folder."""
    architecture, arguments, vision = TRUNKS[name]
    trunk = timm_folder(folder / "timm", architecture, arguments)
    cfg: dict[str, Any] = {
        "embed_dim": 64 if name == "siglip" else 32,
        "vision_cfg": {"image_size": 32, "timm_model_name": trunk, **vision},
        "text_cfg": {**TEXT, **TEXTS.get(name, {})},
        "custom_text": name != "convnext",
    }  # fmt: skip
    return {**cfg, "init_logit_bias": -10.0} if name == "siglip" else cfg


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights by which different pictures and texts have different features, and statistics unlike a fresh layer's."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("logit_"):
                continue
            if name.endswith(("token_embedding.weight", "positional_embedding")):
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
            elif name.startswith("visual.") and parameter.ndim >= 2:  # timm's start so small that all pictures are one
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * fan_in**-0.5)
            elif parameter.ndim < 2:  # norms and biases, layer scales: around where they are, far from 0
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
        for name, buffer in model.named_buffers():
            if "running_mean" in name:
                buffer.copy_(torch.rand(buffer.shape, generator=draw) * 0.4 - 0.2)
            elif "running_var" in name:
                buffer.copy_(torch.rand(buffer.shape, generator=draw) * 0.4 + 0.8)


def save_model(folder: Path, cfg: dict[str, Any], preprocess: dict[str, Any] | None = None) -> str:
    """A folder of a model with random weights by its configuration: what `--model` takes."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = compat.build(copy.deepcopy(cfg))
    randomise(model)
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    record = {"model_cfg": cfg, "preprocess_cfg": preprocess or PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(record), "utf-8")
    (folder / "clipfit.json").write_text(json.dumps({"adapt": QUICK}), "utf-8")
    return f"local-dir:{folder}"


def make_family(name: str, root: Path) -> str:
    """A little model of the family."""
    return save_model(root / name, family_cfg(name, root / name))


def plain(folder: str) -> tuple[Any, Any]:
    """The model and its tokenizer as open_clip alone loads them."""
    return open_clip.create_model(folder).eval(), open_clip.get_tokenizer(folder)


# ---- every architecture of open_clip, shrunk


def two_tower_models() -> list[str]:
    """What open_clip lists, but for what has no image tower beside a text tower."""
    return [name for name in open_clip.list_models() if not compat.lacks_towers(open_clip.get_model_config(name))]


def shrunk_cfg(name: str, folder: Path) -> dict[str, Any]:
    """An architecture of open_clip's at its own width, image size and heads, two blocks deep, with a little tokenizer.

    What else it needs is written into the folder: its timm architecture, the transformers library's text tower.
    """
    cfg = open_clip.get_model_config(name)
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    if vision.get("timm_model_name"):
        architecture = vision["timm_model_name"]
        vision["timm_model_name"] = timm_folder(folder / "timm", architecture, _shallow(architecture))
    else:
        vision["layers"] = [1, 1, 1, 1] if isinstance(vision["layers"], list) else 2
    text["layers"] = 2
    if text.get("hf_tokenizer_name"):
        words_tokenizer(folder)
        text["hf_tokenizer_name"] = str(folder)
        text["vocab_size"] = len(WORDS)
    if text.get("hf_model_name"):
        text["hf_model_name"] = text_config(folder / "text", text["hf_model_name"])
    return cfg


def _shallow(architecture: str) -> dict[str, Any]:
    if architecture.startswith(("convnext", "swin")):
        return {"depths": [1, 1, 1, 1]}
    if architecture.startswith("fastvit"):
        return {"layers": [1] * (5 if architecture in ("fastvit_mci3", "fastvit_mci4") else 4)}
    return {"depth": 2}


WORDS = ["<s>", "<pad>", "</s>", "<unk>", *"a photo of bee cow dog ant lion elk the much longer class name".split()]


def words_tokenizer(folder: Path) -> None:
    """A tokenizer of whole words, in the transformers library's form."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(word, ids[word]) for word in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    special = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "cls_token": "<s>",
        "sep_token": "</s>",
    }
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def text_config(folder: Path, name: str) -> str:
    """The configuration of a text tower of the transformers library, of the kind that the name stands for."""
    from transformers import M2M100Config, MT5Config, RobertaConfig, XLMRobertaConfig

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    common = {"vocab_size": len(WORDS), "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    if "mt5" in name:
        config = MT5Config(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, **common)
    elif "nllb" in name:
        config = M2M100Config(d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2,
                              decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, **common)  # fmt: skip
    else:
        kind = XLMRobertaConfig if "xlm" in name else RobertaConfig
        config = kind(**size, max_position_embeddings=128, **common)
    config.save_pretrained(folder)
    return str(folder)
