"""One safetensors file: the weights at α in fp32, bf16 or fp16, and in its metadata all that is needed to use them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import torch

from clipfit.config.outputs import FormatOptions
from clipfit.errors import ClipfitError
from clipfit.formats import proof, unpacked
from clipfit.formats.card import Usage
from clipfit.formats.open_clip import OpenClipFolder, classifying
from clipfit.formats.proof import Pictures, Proof
from clipfit.formats.stored import OPENED
from clipfit.formats.subject import DTYPES, Subject, about, write_about
from clipfit.model.named import Additions
from clipfit.model.tokenizing import write_tokenizer
from clipfit.runs import files
from clipfit.runs.run import Run

SCRIPT = "_consume_safetensors.py"
WEIGHTS, TOKENIZER = "model.safetensors", "tokenizer"  # the latter a folder, where there is one to keep
USAGE = f"""
`model.safetensors` holds the weights by open_clip's names, and as JSON in its metadata, under `clipfit`, the
architecture, the preprocessing, the classes and the template. With open_clip 3.2 or newer, in this folder:

```python
import json
import shutil
from pathlib import Path

import open_clip
import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file

with safe_open("model.safetensors", "pt") as file:
    about = json.loads(file.metadata()["clipfit"])
    state = {{name: file.get_tensor(name) for name in file.keys()}}
folder, source = Path("for_open_clip"), about["pretrained"]
folder.mkdir(exist_ok=True)
config = {{key: source[key] for key in ("model_cfg", "preprocess_cfg")}}
(folder / "open_clip_config.json").write_text(json.dumps(config))
save_file(state, folder / "open_clip_model.safetensors")
if Path("tokenizer").is_dir():  # of the transformers library
    shutil.copytree("tokenizer", folder, dirs_exist_ok=True)

{classifying("for_open_clip")}```

open_clip computes in fp32, whatever the type in the file. {OPENED}
"""


class SafetensorsFile:
    """The weights by open_clip's names, self-describing."""

    name = "safetensors"
    libraries = ()

    def holds(self, run: Run, additions: Additions, options: FormatOptions) -> str | None:
        """Any plain CLIP."""
        return OpenClipFolder().holds(run, additions, options)

    def write(self, subject: Subject, folder: Path) -> None:
        """Raises OutputError where the place cannot be written or has no room."""
        state = reduced(subject.model.state(), DTYPES[subject.options.dtype])
        files.require_room(folder, sum(t.numel() * t.element_size() for t in state.values()))
        files.write_tensors(folder / WEIGHTS, state, about(subject))
        write_tokenizer(subject.model.source, folder / TOKENIZER)
        write_about(subject, folder)

    def prove(self, subject: Subject, folder: Path, pictures: Pictures) -> Proof:
        """open_clip's logits, of the architecture and the weights that the file holds.

        Raises:
            ClipfitError: it holds other tensors or another α than it should, or the logits differ by more than the
                type may cost.
        """
        state, described = files.read_tensors(folder / WEIGHTS)
        expected = reduced(subject.model.state(), DTYPES[subject.options.dtype])
        same = state.keys() == expected.keys() and all(torch.equal(t, expected[name]) for name, t in state.items())
        if not same or described.get("alpha") != subject.alpha:
            raise ClipfitError(f"{WEIGHTS} holds another model than was written; the export is not kept: try again.")
        unpacking = functools.partial(unpacked.consume, SCRIPT, [str((folder / WEIGHTS).absolute())])
        return proof.prove(subject, pictures, unpacking)

    def usage(self, subject: Subject, folder: Path) -> Usage:
        """By open_clip."""
        return Usage("open_clip", USAGE)


def reduced(state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Floating-point tensors in a type; single numbers stay as they are.

    log τ⁻¹ and a bias count for every logit, and cost nothing: in bf16 100 would be 98.9.
    """
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() and tensor.numel() > 1 else tensor
        for name, tensor in state.items()
    }
