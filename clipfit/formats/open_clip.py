"""A folder that `open_clip.create_model_and_transforms("local-dir:FOLDER")` loads, and clipfit with --model."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from clipfit.config.outputs import FormatOptions
from clipfit.errors import ClipfitError
from clipfit.formats import consumer, proof
from clipfit.formats.card import Usage
from clipfit.formats.proof import Pictures, Proof
from clipfit.formats.stored import OPENED, OPENING
from clipfit.formats.subject import ABOUT, Subject, about, write_about
from clipfit.model.named import Additions
from clipfit.model.tokenizing import write_tokenizer
from clipfit.model.weights import state_sha256
from clipfit.runs import files
from clipfit.runs.run import Run

SCRIPT = "_consume_open_clip.py"
WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"

READING = """import json

import open_clip
import torch
from PIL import Image, ImageOps

with open("clipfit.json", encoding="utf-8") as file:
    about = json.load(file)
"""
CLASSIFYING = f"""{OPENING}model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenize = open_clip.get_tokenizer("local-dir:FOLDER")
model.eval()
with torch.no_grad():
    texts = [tokenize([one.replace("{{}}", name) for name in about["classes"]]) for one in about["templates"]]
    text_features = sum(model.encode_text(text, normalize=True) for text in texts)
    text_features /= text_features.norm(dim=1, keepdim=True)
    image_features = model.encode_image(preprocess(image)[None], normalize=True)
    probabilities = (model.logit_scale.exp() * image_features @ text_features.T).softmax(1)[0]
print(about["classes"][probabilities.argmax()])
"""


def reading(folder: str) -> str:
    """Python that classifies an image by a folder of open_clip's and the clipfit.json of the export."""
    return READING + classifying(folder)


def classifying(folder: str) -> str:
    """The same, where `about` is what clipfit.json says."""
    return CLASSIFYING.replace("FOLDER", folder)


USAGE = f"""
With [open_clip](https://github.com/mlfoundations/open_clip) 3.2 or newer, in this folder:

```python
{reading(".")}```

{OPENED}

With clipfit, to adapt it on: `clipfit adapt SHOTS --model FOLDER`.
"""


class OpenClipFolder:
    """Weights, architecture and preprocessing under open_clip's names, and beside them what clipfit knows of them."""

    name = "open_clip"
    libraries = ()

    def holds(self, run: Run, additions: Additions, options: FormatOptions) -> str | None:
        """Any plain CLIP."""
        if additions.edits:
            return "edits of patch tokens"
        return "context vectors" if additions.context else None

    def write(self, subject: Subject, folder: Path) -> None:
        """Raises OutputError where the place cannot be written or has no room."""
        model, source = subject.model, subject.model.source
        files.require_room(folder, model.bytes)
        files.write_tensors(folder / WEIGHTS, model.state(), about(subject))
        files.write_json(folder / CONFIG, {"model_cfg": source.model_cfg, "preprocess_cfg": source.preprocess_cfg})
        write_tokenizer(source, folder)
        write_about(subject, folder, state_sha256(model.state()))

    def prove(self, subject: Subject, folder: Path, pictures: Pictures) -> Proof:
        """open_clip's logits, of the pixels that clipfit saw, and of the shots as open_clip itself decodes them.

        Raises:
            ClipfitError: the files hold other tensors or another α than they should, or open_clip's logits differ.
        """
        _require_written(subject, folder)
        return proof.prove(subject, pictures, functools.partial(consumer.consume, SCRIPT, folder))

    def usage(self, subject: Subject, folder: Path) -> Usage:
        return Usage("open_clip", USAGE)


def _require_written(subject: Subject, folder: Path) -> None:
    """What no logit shows: every tensor (the embedding of a word that no class has, say), and the recorded α."""
    state, metadata = files.read_tensors(folder / WEIGHTS)
    expected = subject.model.state()
    if state.keys() != expected.keys() or not all(torch.equal(t, expected[name]) for name, t in state.items()):
        raise ClipfitError(f"{WEIGHTS} holds other tensors than were written; the export is not kept: try again.")
    for record in (metadata, files.read_json(folder / ABOUT)):
        if record.get("alpha") != subject.alpha:
            raise ClipfitError(
                f"the export records α = {record.get('alpha')}, but {subject.alpha} was asked for; it is not kept: "
                "please report it."
            )
