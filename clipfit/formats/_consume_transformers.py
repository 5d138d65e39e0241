"""A consumer of an exported folder: the transformers library and nothing of clipfit, in a process of its own.

    python _consume_transformers.py MODEL_FOLDER REQUEST_FOLDER

Reads request.json and request.safetensors, writes answer.json and answer.safetensors beside them.
"""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # a folder must do

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPProcessor, SiglipModel, SiglipProcessor

NEW = int(transformers.__version__.split(".")[0]) >= 5
FAST = "the fast image processor"
Processor = CLIPProcessor | SiglipProcessor


def processors(folder: str, kind: type[Processor]) -> tuple[Processor, Processor]:
    """With the image processor that Pillow resizes for, and with torchvision's."""
    if NEW:
        return kind.from_pretrained(folder, backend="pil"), kind.from_pretrained(folder)
    return kind.from_pretrained(folder), kind.from_pretrained(folder, use_fast=True)


def ids(processor: Processor, texts: list[str]) -> torch.Tensor:
    """(n, context length); of CLIP 0 behind the first end of text, where no id counts. Of SigLIP all count."""
    found = processor(text=texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    if isinstance(processor, SiglipProcessor):
        return found
    is_end = found == processor.tokenizer.eos_token_id
    return found.masked_fill(is_end.cumsum(1) > is_end.int(), 0)


def mean_of(texts: torch.Tensor, templates: int) -> torch.Tensor:
    """Unit-norm texts (T·C, D), one template after the other → classes (C, D): means, brought back to unit norm."""
    return texts if templates == 1 else normalize(texts.unflatten(0, (templates, -1)).mean(0), dim=1)


def main(folder: str, exchange: Path) -> None:
    request = json.loads((exchange / "request.json").read_text("utf-8"))
    tensors = load_file(exchange / "request.safetensors")
    torch.set_num_threads(request["threads"])
    of_siglip = json.loads((Path(folder) / "config.json").read_text("utf-8"))["model_type"] == "siglip"
    model = (SiglipModel if of_siglip else CLIPModel).from_pretrained(folder).eval()
    processor, fast = processors(folder, SiglipProcessor if of_siglip else CLIPProcessor)

    one = {"input_ids": tensors["tokens"][:1], "pixel_values": tensors["pixels"][:1]}
    read = [model(**{**one, "input_ids": part}).text_embeds for part in tensors["tokens"].split(512)]
    texts = mean_of(torch.cat(read).float(), request["templates"])  # (C, D)

    def logits(pixels: torch.Tensor) -> torch.Tensor:
        found = [model(**{**one, "pixel_values": part}).image_embeds for part in pixels.split(16)]
        scaled = model.logit_scale.float().exp() * torch.cat(found).float() @ texts.T  # (n, C)
        return scaled + model.logit_bias.float() if of_siglip else scaled

    def seen(picture: Image.Image, by: Processor = processor) -> torch.Tensor:
        return by(images=picture, return_tensors="pt")["pixel_values"][0]

    errors: dict[str, str] = {}
    own, other = (torch.full_like(tensors["pixels"], torch.nan) for _ in range(2))  # (n, 3, H, W)
    for index, file in enumerate(request["files"]):
        try:
            with Image.open(file) as opened:
                own[index], other[index] = seen(opened), seen(opened, fast)
        except Exception as error:  # whatever a decoder says: clipfit names the file
            errors[str(index)] = f"{type(error).__name__}: {error}"
    probe = Image.fromarray(tensors["probe"].numpy())
    answer = {
        "logits": logits(tensors["pixels"]),
        "tokens": ids(processor, [*request["texts"], *request["plain_texts"]]),
        "probe": seen(probe),
        f"probe: {FAST}": seen(probe, fast),
        "file_pixels": own,
        "file_logits": logits(own) if request["files"] else torch.empty(0, len(texts)),
    }
    if request["files"]:
        answer[f"further: {FAST}"] = logits(other)
    save_file({name: tensor.contiguous() for name, tensor in answer.items()}, exchange / "answer.safetensors")
    record = {"consumer": f"transformers {transformers.__version__}", "errors": errors}
    (exchange / "answer.json").write_text(json.dumps(record), "utf-8")


if __name__ == "__main__":
    with torch.no_grad():
        main(sys.argv[1], Path(sys.argv[2]))
