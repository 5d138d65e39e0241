"""Running a consumer of an export: its own library, in a process that does not import clipfit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from clipfit.errors import ClipfitError, OutputError
from clipfit.runs import files

SCRIPTS = Path(__file__).parent
FURTHER, FURTHER_PROBE = "further: ", "probe: "  # before the names of such logits and probes in the answer


@dataclass(frozen=True)
class Request:
    """What a consumer is asked: logits of pixels among texts, and of files as it decodes them itself.

    pixels: (n, 3, H, W) float32, normalised. probe: (h, w, 3) uint8, an RGB picture that it is to preprocess.
    texts: the prompts of C classes by the first of T templates, then by the next; a class is the mean of its unit-norm
    texts, brought back to unit norm. tokens: their ids (T·C, context length) int64. plain_texts: the same as open_clip
    repairs them before it reads them (HTML entities, quotes). files: n image files in the order of the pixels, or none.
    For a consumer that has one tower alone, what the other one gives: image_embeddings (n, D) and text_embeddings
    (C, D), of unit norm, scale, τ⁻¹, and bias, 0 where the model has none.
    """

    pixels: torch.Tensor
    probe: torch.Tensor
    texts: Sequence[str]
    plain_texts: Sequence[str]
    tokens: torch.Tensor
    files: Sequence[Path]
    image_embeddings: torch.Tensor
    text_embeddings: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor
    templates: int  # T


@dataclass(frozen=True)
class Answer:
    """What it answers: logits (n, C), the probe as it preprocesses it (3, H, W), and the same of its own decoding.

    file_pixels (n, 3, H, W) and file_logits are not finite where a file could not be opened; `errors` says why, by
    index. Probe and files are None where what was exported takes no pictures. tokens: the ids of texts, then of
    plain_texts, by its own tokenizer (2·T·C, context length), where it has one. further: logits (n, C) of the same
    pixels or files by another way that a consumer may take, by what that is; further_probes: the probe by such a way.
    """

    consumer: str  # its library and version
    logits: torch.Tensor
    probe: torch.Tensor | None
    file_pixels: torch.Tensor | None
    file_logits: torch.Tensor | None
    tokens: torch.Tensor | None
    errors: Mapping[int, str]
    further: Mapping[str, torch.Tensor]
    further_probes: Mapping[str, torch.Tensor]


def consume(script: str, folder: Path, request: Request) -> Answer:
    """Ask a consumer (a script beside this file) for what it makes of an exported folder.

    Raises:
        ClipfitError: it fails. OutputError: there is no room for what is exchanged with it.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="clipfit-") as exchange:
            return _exchanged(SCRIPTS / script, folder, request, Path(exchange))
    except OSError as error:
        place = tempfile.gettempdir()
        raise OutputError(f"the export cannot be tried out in {place}: {error.strerror or error}.") from error


def _exchanged(script: Path, folder: Path, request: Request, exchange: Path) -> Answer:
    tensors = {name: t for name, t in vars(request).items() if isinstance(t, torch.Tensor)}
    files.write_tensors(exchange / "request.safetensors", tensors, {})
    asked = {
        "texts": list(request.texts), "plain_texts": list(request.plain_texts),
        "files": [str(file.absolute()) for file in request.files], "templates": request.templates,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    # in ASCII: what a file is called need not be UTF-8
    (exchange / "request.json").write_text(json.dumps(asked), "ascii")
    start(script, [str(folder.absolute()), str(exchange)], exchange)
    found, record = files.read_tensors(exchange / "answer.safetensors")[0], files.read_json(exchange / "answer.json")
    errors = {int(index): text for index, text in record["errors"].items()}
    further, probes = (
        {name.removeprefix(start): t for name, t in found.items() if name.startswith(start)}
        for start in (FURTHER, FURTHER_PROBE)
    )
    return Answer(record["consumer"], found["logits"], found.get("probe"), found.get("file_pixels"),
                  found.get("file_logits"), found.get("tokens"), errors, further, probes)  # fmt: skip


def start(script: Path, arguments: Sequence[str], exchange: Path) -> None:
    """Run a script in a process of its own. Raises ClipfitError where it fails."""
    copied = shutil.copy(script, exchange)  # beside it, `import open_clip` would find clipfit's file of that name
    command = [sys.executable, copied, *arguments]
    done = subprocess.run(command, cwd=exchange, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        said = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise ClipfitError(f"the export cannot be read back ({said}); it is not kept: please report it.")
