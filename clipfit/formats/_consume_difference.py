"""Adds a difference to the pre-trained weights that it was taken from: writes a folder that open_clip loads.

    python restore.py DIFFERENCE FOLDER [--alpha 0.5] [--model NAME or FOLDER] [--pretrained TAG or FILE]

Needs torch, safetensors and open_clip alone. DIFFERENCE is the folder of difference.safetensors, whose README.md says
where the pre-trained weights are to be had. The file has for every tensor that changed either NAME, or NAME.up and
NAME.down, whose product it is; and as JSON in its metadata, under `clipfit`, by which number each is to be multiplied:

    weights at α  =  pre-trained  +  α · scale · (NAME, or NAME.up @ NAME.down)
"""

import argparse
import hashlib
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

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


def pretrained_weights(model: str, pretrained: str | None) -> dict[str, torch.Tensor]:
    """Of a folder, of hf-hub:OWNER/NAME, or of a name of open_clip's with a tag or a weight file, also as TAG:FILE.

    How they were trained (TAG, the activation) does not matter here: the difference says it of the model as a whole.
    Raises whatever open_clip does, and ValueError.
    """
    folder, file = Path(model.removeprefix("local-dir:")).expanduser(), (pretrained or "").partition(":")[2]
    if model.replace("/", "-") in open_clip.list_models():
        if pretrained and not Path(pretrained).is_file() and Path(file).is_file():
            pretrained = file
    elif pretrained:
        raise ValueError("--pretrained goes with a name of open_clip's")
    elif folder.is_dir():
        model = f"local-dir:{folder}"
    elif not model.startswith("hf-hub:"):
        raise ValueError("here is no such folder, and open_clip has no model of that name")
    logging.disable()  # what open_clip logs and warns of: what matters is in its errors
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return open_clip.create_model(model, pretrained=pretrained, require_pretrained=True).state_dict()
    finally:
        logging.disable(logging.NOTSET)


def refuse(why: str) -> NoReturn:
    print(why, file=sys.stderr)
    sys.exit(4)


def main(asked: argparse.Namespace) -> None:
    with safe_open(asked.difference / "difference.safetensors", "pt") as file:
        about = json.loads(file.metadata()["clipfit"])
        stored = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    alpha = about["alpha"] if asked.alpha is None else asked.alpha
    base = about["base"]
    model = asked.model or base["model"]
    pretrained = asked.pretrained or (None if asked.model else base["pretrained"])
    named = f"{model} / {pretrained}" if pretrained else model
    try:
        weights = pretrained_weights(model, pretrained)
    except Exception as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")[:300]
        refuse(f"The pre-trained weights {named} cannot be loaded ({said}): README.md says how to name them.")
    if sha256(weights) != base["sha256"]:
        refuse(f"{named} has other weights than the difference was taken from: README.md says how to name those.")
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
    parser.add_argument("--model", help="a folder, hf-hub:OWNER/NAME, or a name of open_clip's")
    parser.add_argument("--pretrained", help="of a name of open_clip's: a tag, or a weight file")
    given = parser.parse_args()
    if given.alpha is not None and not 0 <= given.alpha <= 1:  # NaN is not, either
        parser.error(f"--alpha must be from 0 to 1; found {given.alpha}")
    if not (given.difference / "difference.safetensors").is_file():
        parser.error(f"{given.difference} has no difference.safetensors")
    main(given)
