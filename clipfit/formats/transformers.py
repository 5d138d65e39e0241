"""A folder that the transformers library loads without a network: CLIPModel and CLIPProcessor, or SigLIP's."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from clipfit.config.outputs import FormatOptions
from clipfit.formats import bpe, consumer, proof, renaming, siglip
from clipfit.formats.card import Usage
from clipfit.formats.proof import Pictures, Proof
from clipfit.formats.stored import OPENED, OPENING
from clipfit.formats.subject import DTYPES, Subject, write_about
from clipfit.model.named import Additions
from clipfit.model.sources import Source
from clipfit.runs import files
from clipfit.runs.run import Run

SCRIPT = "_consume_transformers.py"
WEIGHTS, CONFIG, PICTURES = "model.safetensors", "config.json", "preprocessor_config.json"
RESAMPLE = {"bicubic": 3, "random": 3, "bilinear": 2}  # Pillow's numbers; open_clip evaluates "random" as bicubic

# what CLIPModel has a place for, in model_cfg; anything else must be as if it were not there
IMAGE = ("image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size")
TEXT = ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "pool_type", "eos_id")
END_ID = 49407
USAGE = f"""
With transformers 4 or 5, offline, in this folder:

```python
import json

import torch
from PIL import Image, ImageOps
from transformers import CLIPModel, CLIPProcessor

with open("clipfit.json", encoding="utf-8") as file:
    about = json.load(file)
model = CLIPModel.from_pretrained(".").eval()
processor = CLIPProcessor.from_pretrained(".", backend="pil")  # transformers 4: use_fast=False in place of backend
texts = [about["template"].replace("{{}}", name) for name in about["classes"]]
{OPENING}inputs = processor(text=texts, images=[image], return_tensors="pt", padding=True)
with torch.no_grad():
    probabilities = model(**inputs).logits_per_image.softmax(1)[0]
print(about["classes"][probabilities.argmax()])
```

The image processor that resizes by Pillow sees what clipfit saw; how far the fast one of torchvision is, proof.json
says (`further`). {OPENED}
"""
SEVERAL = """
`clipfit.json` lists several `templates`, and a class is the mean of its texts. So, after the above:

```python
texts = [template.replace("{}", name) for template in about["templates"] for name in about["classes"]]
with torch.no_grad():
    found = model(**processor(text=texts, images=[image], return_tensors="pt", padding=True))
classes = found.text_embeds.unflatten(0, (len(about["templates"]), -1)).mean(0)
classes /= classes.norm(dim=1, keepdim=True)
probabilities = (model.logit_scale.exp() * found.image_embeds @ classes.T).softmax(1)[0]
print(about["classes"][probabilities.argmax()])
```
"""
WITHOUT_EFFECT = ("patch_dropout", "output_tokens", "pad_id")  # in evaluation, or where no id behind the end counts
USUAL = {
    "pool_type": ("tok",),
    "hf_model_pretrained": (True,),
    "pos_embed_type": ("learnable", "sin_cos_2d"),
    "proj_type": ("linear",),
}


class TransformersFolder:
    """Weights, architecture, tokenizer and preprocessing under the names of the transformers library."""

    name = "transformers"
    libraries = ("transformers",)

    def holds(self, run: Run, additions: Additions, options: FormatOptions) -> str | None:
        """A plain CLIP, or a SigLIP, whose towers and preprocessing the library knows."""
        if additions.edits:
            return "edits of patch tokens"
        return "context vectors" if additions.context else unlike_clip(run.source)

    def write(self, subject: Subject, folder: Path) -> None:
        """Raises OutputError where the place cannot be written or has no room."""
        source, dtype = subject.model.source, DTYPES[subject.options.dtype]
        files.require_room(folder, subject.model.bytes)
        of_siglip, kind = siglip.is_siglip(source), str(dtype).removeprefix("torch.")
        names = siglip.renamed if of_siglip else renamed
        tensors = {name: t.to(dtype) for name, t in names(subject.model.state())}
        files.write_tensors(folder / WEIGHTS, tensors, {}, {"format": "pt"})  # without which the library refuses it
        if of_siglip:
            files.write_json(folder / CONFIG, siglip.config(subject.model, kind))
            siglip.write_texts(folder, source)
        else:
            files.write_json(folder / CONFIG, clip_config(source, subject.model.scale, kind))
            bpe.write_for_clip(folder, source)
        files.write_json(folder / PICTURES, image_processor(source, "Siglip" if of_siglip else "CLIP"))
        write_about(subject, folder)

    def usage(self, subject: Subject, folder: Path) -> Usage:
        """By CLIPModel and CLIPProcessor, or SigLIP's."""
        usage = USAGE + (SEVERAL if len(subject.run.templates) > 1 else "")
        if not siglip.is_siglip(subject.model.source):
            return Usage("transformers", usage)
        told = usage.replace("CLIPModel", "SiglipModel").replace("CLIPProcessor", "SiglipProcessor")
        if siglip.needs_5(subject.model.source):
            told = told.replace("transformers 4 or 5", "transformers 5")
        return Usage("transformers", told.replace("padding=True", 'padding="max_length", truncation=True'))

    def prove(self, subject: Subject, folder: Path, pictures: Pictures) -> Proof:
        """The library's logits, of the pixels that clipfit saw, and of the shots as its processor opens them.

        Raises:
            ClipfitError: they differ, or the processor makes other ids of the texts or other pixels of a picture.
        """
        return proof.prove(subject, pictures, functools.partial(consumer.consume, SCRIPT, folder))


def unlike_clip(source: Source) -> str | None:
    """None, or what of the architecture or the preprocessing the library's CLIP and SigLIP have no place for."""
    found = siglip.unlike_siglip(source) if siglip.is_siglip(source) else _unlike_plain(source.model_cfg)
    return found or _unlike_processor(source)


def _unlike_plain(model: Mapping[str, Any]) -> str | None:
    image, text = model["vision_cfg"], model["text_cfg"]
    if image.get("timm_model_name") or isinstance(image.get("layers"), list):
        kind = image.get("timm_model_name") or "ResNet"
        return f"an image tower that is no vision transformer of CLIP's ({kind})"
    if model.get("custom_text") or text.get("hf_model_name"):
        return "a text tower of another kind than CLIP's"
    for where, cfg, known in (("an image", image, IMAGE), ("a text", text, TEXT)):
        for key, value in cfg.items():
            if key not in known and not _as_usual(key, value):
                return f"{where} tower with {key} {value!r}"
    at_end = text.get("pool_type", "argmax") == "argmax" or (text["pool_type"], text.get("eos_id")) == ("eos", END_ID)
    if not at_end:
        return f"a text tower with pool_type {text['pool_type']!r}"
    if not bpe.is_plain(text):
        return "a text tower whose tokens are not CLIP's"
    return None


def _unlike_processor(source: Source) -> str | None:
    image, pictures = source.model_cfg["vision_cfg"], source.preprocess_cfg
    sizes = (image.get("image_size", 224), image.get("patch_size", 16), pictures.get("size", 224))
    if any(isinstance(size, list) and len(set(size)) != 1 for size in sizes):
        return "images that are not square"
    mode = pictures.get("resize_mode", "shortest")
    return None if mode in ("shortest", "squash") else f"a preprocessing with resize_mode {mode!r}"


def _as_usual(key: str, value: Any) -> bool:
    return not value or key in WITHOUT_EFFECT or value in USUAL.get(key, ())


def clip_config(source: Source, scale: torch.Tensor, dtype: str) -> dict[str, Any]:
    """config.json of CLIPModel."""
    model = source.model_cfg
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    image, text = {**_IMAGE_DEFAULTS, **model["vision_cfg"]}, {**_TEXT_DEFAULTS, **model["text_cfg"]}
    shared = {"hidden_act": activation, "projection_dim": model["embed_dim"], "layer_norm_eps": 1e-5}
    return {
        "architectures": ["CLIPModel"], "model_type": "clip", "dtype": dtype, "torch_dtype": dtype,
        "projection_dim": model["embed_dim"], "logit_scale_init_value": float(scale.log()),
        "vision_config": {
            **shared, "model_type": "clip_vision_model", "hidden_size": image["width"],
            "intermediate_size": int(image["width"] * image["mlp_ratio"]), "num_hidden_layers": image["layers"],
            "num_attention_heads": image["width"] // image["head_width"], "num_channels": 3,
            "image_size": _side(image["image_size"]), "patch_size": _side(image["patch_size"]),
        },
        "text_config": {
            **shared, "model_type": "clip_text_model", "hidden_size": text["width"],
            "intermediate_size": int(text["width"] * text["mlp_ratio"]), "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"], "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["context_length"],
            "bos_token_id": END_ID - 1, "eos_token_id": END_ID, "pad_token_id": END_ID,
        },
    }  # fmt: skip


_IMAGE_DEFAULTS = {"image_size": 224, "layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16}
_TEXT_DEFAULTS = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0}


def image_processor(source: Source, kind: str = "CLIP") -> dict[str, Any]:
    """preprocessor_config.json: open_clip's resize, crop and normalisation.

    kind: "Siglip" for SiglipProcessor; where pictures are cropped it has CLIP's image processor, its own cannot.
    """
    cfg = source.preprocess_cfg
    side = _side(cfg["size"])
    square = {"height": side, "width": side}
    shortest = cfg.get("resize_mode", "shortest") == "shortest"
    return {
        "image_processor_type": f"{'CLIP' if shortest else kind}ImageProcessor", "processor_class": f"{kind}Processor",
        "do_convert_rgb": True, "do_resize": True, "size": {"shortest_edge": side} if shortest else square,
        "resample": RESAMPLE[cfg["interpolation"]], "do_center_crop": shortest, "crop_size": square,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": list(cfg["mean"]), "image_std": list(cfg["std"]),
    }  # fmt: skip


def _side(size: Any) -> int:
    return int(size if isinstance(size, (int, float)) else size[0])


# ---- the names of weights

_OUTSIDE = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.proj": "visual_projection.weight",
}
_INSIDE = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}  # fmt: skip
_TRANSPOSED = ("text_projection", "visual.proj")  # open_clip multiplies by them from the right


def renamed(state: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """open_clip's tensors under the names that CLIPModel has for them. Raises KeyError for one that it has not."""
    for name, tensor in state.items():
        tower, inside, rest = name.rpartition("transformer.resblocks.")
        if not inside:
            yield renaming.named(name, _OUTSIDE), tensor.T if name in _TRANSPOSED else tensor
            continue
        number, _, inner = rest.partition(".")
        block = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}."
        if inner.startswith("attn.in_proj_"):  # of queries, keys and values at once
            yield from renaming.projections(block, inner.removeprefix("attn.in_proj_"), tensor)
        else:
            yield block + renaming.named(inner, _INSIDE), tensor
