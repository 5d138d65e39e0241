"""A consumer of an exported program: torch and nothing of clipfit or open_clip, in a process of its own.

    python _consume_torch.py MODEL_FOLDER REQUEST_FOLDER

Reads request.json and request.safetensors, writes answer.json and answer.safetensors beside them.
"""

import json
import runpy
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize


def mean_of(texts: torch.Tensor, templates: int) -> torch.Tensor:
    """Unit-norm texts (T·C, D), one template after the other → classes (C, D): means, brought back to unit norm."""
    return texts if templates == 1 else normalize(texts.unflatten(0, (templates, -1)).mean(0), dim=1)


def main(folder: Path, exchange: Path) -> None:
    request = json.loads((exchange / "request.json").read_text("utf-8"))
    tensors = load_file(exchange / "request.safetensors")
    torch.set_num_threads(request["threads"])
    extra = {"facts.json": ""}
    program = torch.export.load(folder / "model.pt2", extra_files=extra).module()
    facts = json.loads(extra["facts.json"])

    def logits(given: torch.Tensor) -> torch.Tensor:
        """(n, C): the program's own, or by the embeddings of the tower that it is not."""
        if facts["part"] == "classifier":
            return torch.cat([program(some)[0] for some in given.split(16)])
        embeddings = torch.cat([program(some) for some in given.split(16)])
        if facts["part"] == "text":
            classes = mean_of(embeddings, request["templates"])
            return tensors["scale"] * tensors["image_embeddings"] @ classes.T + tensors["bias"]
        return tensors["scale"] * embeddings @ tensors["text_embeddings"].T + tensors["bias"]

    answer = {"logits": logits(tensors["tokens" if facts["part"] == "text" else "pixels"])}
    errors: dict[str, str] = {}
    if facts["part"] != "text":
        see = runpy.run_path(str(folder / "preprocess.py"))["pixels"]
        probe = see(Image.fromarray(tensors["probe"].numpy()), facts["preprocess"])
        answer |= {"probe": torch.from_numpy(probe), "file_pixels": torch.full_like(tensors["pixels"], torch.nan)}
        for index, file in enumerate(request["files"]):
            try:
                with Image.open(file) as opened:
                    answer["file_pixels"][index] = torch.from_numpy(see(opened, facts["preprocess"]))
            except Exception as error:  # whatever a decoder says: clipfit names the file
                errors[str(index)] = f"{type(error).__name__}: {error}"
        if request["files"]:
            answer["file_logits"] = logits(answer["file_pixels"])
    save_file({name: tensor.contiguous() for name, tensor in answer.items()}, exchange / "answer.safetensors")
    record = {"consumer": f"torch {torch.__version__}", "errors": errors}
    (exchange / "answer.json").write_text(json.dumps(record), "utf-8")


if __name__ == "__main__":
    with torch.no_grad():
        main(Path(sys.argv[1]), Path(sys.argv[2]))
