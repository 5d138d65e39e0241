"""A consumer of an exported folder: open_clip and nothing of clipfit, in a process of its own.

    python _consume_open_clip.py MODEL_FOLDER REQUEST_FOLDER

Reads request.json and request.safetensors, writes answer.json and answer.safetensors beside them.
"""

import json
import sys
from pathlib import Path

import open_clip
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize


def mean_of(texts: torch.Tensor, templates: int) -> torch.Tensor:
    """Unit-norm texts (T·C, D), one template after the other → classes (C, D): means, brought back to unit norm."""
    return texts if templates == 1 else normalize(texts.unflatten(0, (templates, -1)).mean(0), dim=1)


def main(folder: str, exchange: Path) -> None:
    request = json.loads((exchange / "request.json").read_text("utf-8"))
    tensors = load_file(exchange / "request.safetensors")
    torch.set_num_threads(request["threads"])
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(request["texts"])
    model.eval()

    parts = [model.encode_text(part, normalize=True) for part in tokens.split(512)]
    texts = mean_of(torch.cat(parts), request["templates"])  # (C, D)

    def logits(pixels: torch.Tensor) -> torch.Tensor:
        features = [model.encode_image(part, normalize=True) for part in pixels.split(16)]  # [(≤ 16, D)]
        scaled = model.logit_scale.exp() * torch.cat(features) @ texts.T  # (n, C)
        return scaled if model.logit_bias is None else scaled + model.logit_bias

    errors: dict[str, str] = {}
    seen = torch.full_like(tensors["pixels"], torch.nan)  # (n, 3, H, W)
    for index, file in enumerate(request["files"]):
        try:
            with Image.open(file) as opened:
                seen[index] = transform(opened)
        except Exception as error:  # whatever a decoder says: clipfit names the file
            errors[str(index)] = f"{type(error).__name__}: {error}"
    answer = {
        "logits": logits(tensors["pixels"]),
        "probe": transform(Image.fromarray(tensors["probe"].numpy())),
        "file_pixels": seen,
        "file_logits": logits(seen) if request["files"] else torch.empty(0, len(texts)),
    }
    save_file({name: tensor.contiguous() for name, tensor in answer.items()}, exchange / "answer.safetensors")
    record = {"consumer": f"open_clip {open_clip.__version__}", "errors": errors}
    (exchange / "answer.json").write_text(json.dumps(record), "utf-8")


if __name__ == "__main__":
    with torch.no_grad():
        main(sys.argv[1], Path(sys.argv[2]))
