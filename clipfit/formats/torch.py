"""A part of the model as a program of `torch.export`, `model.pt2`: for torch alone, with nothing pickled in it."""

from __future__ import annotations

import functools
import zipfile
from pathlib import Path

import torch

from clipfit.config.outputs import FormatOptions
from clipfit.errors import UsageError
from clipfit.formats import consumer, parts, proof
from clipfit.formats.card import Usage
from clipfit.formats.proof import Pictures, Proof
from clipfit.formats.stored import OPENED
from clipfit.formats.subject import Subject, write_about
from clipfit.model.named import Additions
from clipfit.runs import files
from clipfit.runs.run import Run

SCRIPT, MODEL, FACTS = "_consume_torch.py", "model.pt2", "facts.json"
_TENSORS = ("/weight_", "/tensor_")  # entries of bare numbers, whatever these are


class TorchProgram:
    """A part as a program with a free batch dimension."""

    name = "torch"
    libraries = ()

    def holds(self, run: Run, additions: Additions, options: FormatOptions) -> str | None:
        """A classifier holds every run."""
        return parts.unheld(additions, options)

    def write(self, subject: Subject, folder: Path) -> None:
        """Raises OutputError where the place has no room, UsageError where this torch would pickle something."""
        files.require_room(folder, 2 * subject.model.bytes)
        part = parts.part_of(subject)
        program = parts.traced(part)
        program.example_inputs = None  # they would be pickled
        with files.writing(folder), parts.quiet():
            torch.export.save(program, folder / MODEL, extra_files={FACTS: files.json_text(part.facts)})
        require_nothing_pickled(folder / MODEL)
        parts.write_beside(subject, folder)
        write_about(subject, folder)

    def usage(self, subject: Subject, folder: Path) -> Usage:
        """By torch.export."""
        return Usage("torch", TEXT_EXAMPLE if subject.options.part == "text" else f"{PIXELS_EXAMPLE}\n{OPENED}")

    def prove(self, subject: Subject, folder: Path, pictures: Pictures) -> Proof:
        """The program's logits in a process of torch alone. Raises ClipfitError where they differ."""
        return proof.prove(subject, pictures, functools.partial(consumer.consume, SCRIPT, folder))


def require_nothing_pickled(path: Path) -> None:
    """Raises UsageError where the archive has an entry that only unpickling could read."""
    with zipfile.ZipFile(path) as archive:
        pickled = [entry.filename for entry in archive.infolist() if _is_pickled(archive, entry)]
    if pickled:
        raise UsageError(
            f"torch {torch.__version__} pickles in such a program ({Path(pickled[0]).name}), and clipfit writes no "
            "pickles: --format torch needs torch 2.9 or newer; or choose --format onnx."
        )


def _is_pickled(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bool:
    """By its beginning: a pickle's, or that of the archive that torch.save writes."""
    if any(start in entry.filename for start in _TENSORS):
        return entry.filename.endswith(".pt")
    with archive.open(entry) as opened:
        return opened.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


PIXELS_EXAMPLE = """
With torch, NumPy and Pillow, in this folder (`preprocess.py` is part of the export):

```python
import json, torch
from PIL import Image
from preprocess import pixels

extra = {"facts.json": ""}
program = torch.export.load("model.pt2", extra_files=extra).module()
facts = json.loads(extra["facts.json"])
found = program(torch.from_numpy(pixels(Image.open("image.jpg"), facts["preprocess"]))[None])
```

`found` is logits and probabilities over `facts["classes"]` of a classifier; embeddings, of unit norm, of a tower.
"""
TEXT_EXAMPLE = """
With torch and tokenizers, in this folder:

```python
import torch
from tokenizers import Tokenizer

program = torch.export.load("model.pt2").module()
ids = [text.ids for text in Tokenizer.from_file("tokenizer.json").encode_batch(["a photo of a cat"])]
found = program(torch.tensor(ids))  # embeddings (n, D), of unit norm
```
"""
