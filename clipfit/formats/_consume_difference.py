"""Adds a difference to the pre-trained weights that it was taken from: writes a folder that open_clip loads.

    python restore.py DIFFERENCE FOLDER [--alpha 0.5] [--model NAME] [--pretrained TAG or FILE]

Needs torch, safetensors and open_clip alone. DIFFERENCE is the folder of difference.safetensors. That file has for
every tensor that changed either NAME, or NAME.up and NAME.down, whose product it is; and as JSON in its metadata, under
`clipfit`, by which number each is to be multiplied:

    weights at α  =  pre-trained  +  α · scale · (NAME, or NAME.up @ NAME.down)
"""

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import open_clip
import torch
from safetensors import safe_open
from safetensors.torch import save_file


def sha256(state: Mapping[str, torch.Tensor]) -> str:
    """Of names, types, shapes and bytes of all tensors, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def main(asked: argparse.Namespace) -> None:
    with safe_open(asked.difference / "difference.safetensors", "pt") as file:
        about = json.loads(file.metadata()["clipfit"])
        stored = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    alpha = about["alpha"] if asked.alpha is None else asked.alpha
    base = about["base"]
    model, pretrained = (asked.model, asked.pretrained) if asked.model else (base["model"], base["pretrained"])
    weights = open_clip.create_model(model, pretrained=pretrained).state_dict()
    if sha256(weights) != base["sha256"]:
        print(f"{model} has other weights than the difference was taken from: name them with --model.", file=sys.stderr)
        sys.exit(4)
    for name, scale in about["scales"].items() if alpha else ():
        change = stored[name] if name in stored else stored[f"{name}.up"] @ stored[f"{name}.down"]
        weights[name] = (weights[name].float() + alpha * scale * change.reshape(weights[name].shape)).to(weights[name])
    asked.folder.mkdir(parents=True, exist_ok=True)
    config = {key: about["pretrained"][key] for key in ("model_cfg", "preprocess_cfg")}
    (asked.folder / "open_clip_config.json").write_text(json.dumps(config), "utf-8")
    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(contiguous, asked.folder / "open_clip_model.safetensors")
    if (asked.difference / "tokenizer").is_dir():  # of the transformers library
        shutil.copytree(asked.difference / "tokenizer", asked.folder, dirs_exist_ok=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("difference", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--alpha", type=float, help="0 is the pre-trained model, 1 the fine-tuned one")
    parser.add_argument("--model", help="a name of open_clip's, or local-dir:FOLDER")
    parser.add_argument("--pretrained", help="a tag of open_clip's, or a weight file")
    main(parser.parse_args())
