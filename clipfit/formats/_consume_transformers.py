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


def main(folder: str, exchange: Path) -> None:
    request = json.loads((exchange / "request.json").read_text("utf-8"))
    tensors = load_file(exchange / "request.safetensors")
    torch.set_num_threads(request["threads"])
    of_siglip = json.loads((Path(folder) / "config.json").read_text("utf-8"))["model_type"] == "siglip"
    model = (SiglipModel if of_siglip else CLIPModel).from_pretrained(folder).eval()
    processor, fast = processors(folder, SiglipProcessor if of_siglip else CLIPProcessor)

    def logits(pixels: torch.Tensor) -> torch.Tensor:
        found = [model(input_ids=tensors["tokens"], pixel_values=part) for part in pixels.split(16)]
        images = torch.cat([output.image_embeds for output in found]).float()  # (n, D)
        scaled = model.logit_scale.float().exp() * images @ found[0].text_embeds.float().T  # (n, C)
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
        "file_logits": logits(own) if request["files"] else torch.empty(0, len(request["texts"])),
    }
    if request["files"]:
        answer[f"further: {FAST}"] = logits(other)
    save_file({name: tensor.contiguous() for name, tensor in answer.items()}, exchange / "answer.safetensors")
    record = {"consumer": f"transformers {transformers.__version__}", "errors": errors}
    (exchange / "answer.json").write_text(json.dumps(record), "utf-8")


if __name__ == "__main__":
    with torch.no_grad():
        main(sys.argv[1], Path(sys.argv[2]))
