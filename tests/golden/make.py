"""Golden runs: run folders of every format, a few KB each, that must load for ever.

    python tests/golden/make.py inputs                  model/ and images/, from which the runs are made
    python tests/golden/make.py runs run-format-2       two runs of today's clipfit, into a folder that is not there yet
    python tests/golden/make.py expected run-format-2   what they hold and what they say of images/, into expected.json

A folder is made once, by the clipfit that introduced its format, and never again: a test that fails on it says that
runs which people have do not load any more. run-format-1 was made by commit ab2c080 (`PYTHONPATH` set to a checkout).

The model is random and has a vocabulary of 600, so that its tables are small: `merges.gz` has the first of CLIP's.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
EXPECTED = HERE / "expected.json"
MERGES = 600 - 2 * 256 - 2
CONFIG = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 4},
    "text_cfg": {
        "context_length": 32, "vocab_size": 600, "width": 8, "heads": 2, "layers": 2,
        "tokenizer_kwargs": {"bpe_path": "model/merges.gz"},
    },
    "quick_gelu": True,
}  # fmt: skip
PREPROCESS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic", "resize_mode": "shortest"}
QUICK = {"adapt": {"recipe": {"epochs": 3, "batch_size": 3, "learning_rate": 0.003}}}
RUNS = {"cite": ["--method", "cite"], "atha-context": ["--method", "atha", "--context"]}
CLASSES = {"train": ["bee", "red_fox", "cow"], "test": ["bee", "red_fox", "cow", "elk", "owl"]}


def inputs() -> None:
    import numpy as np
    import open_clip
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    (HERE / "model").mkdir()
    merges = gzip.decompress(Path(open_clip.tokenizer.default_bpe()).read_bytes()).decode().split("\n")[: 1 + MERGES]
    (HERE / "model/merges.gz").write_bytes(gzip.compress("\n".join(merges).encode(), mtime=0))
    torch.manual_seed(0)
    model = open_clip.CLIP(**CONFIG)
    with torch.no_grad():
        for name in ("token_embedding.weight", "positional_embedding"):
            model.get_parameter(name).mul_(20)  # as initialised, all texts would nearly be the same
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, HERE / "model/open_clip_model.safetensors")
    for name, document in {
        "open_clip_config.json": {"model_cfg": CONFIG, "preprocess_cfg": PREPROCESS},
        "clipfit.json": QUICK,
    }.items():
        (HERE / "model" / name).write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    draw = np.random.default_rng(0)
    for part, names in CLASSES.items():
        for name in names:
            folder = HERE / "images" / part / name
            folder.mkdir(parents=True)
            for k in range(2):
                blocks = draw.integers(0, 256, (4, 4, 3), np.uint8)
                Image.fromarray(blocks.repeat(5, 0).repeat(4, 1)).save(folder / f"{k}.png", optimize=True)


def clipfit(*arguments: str) -> Any:
    """What a command prints under --json, with the golden folder as the current one."""
    command = [sys.executable, "-m", "clipfit", *arguments, "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return json.loads(subprocess.run(command, cwd=HERE, env=environment, check=True, stdout=subprocess.PIPE).stdout)


def runs(where: str) -> None:
    (HERE / where).mkdir()
    for name, options in RUNS.items():
        run = f"{where}/{name}"
        clipfit("adapt", "images", "--model", "local-dir:model", "--output", run, *options)
        timing = HERE / run / "timing.json"  # the one file with names of the machine
        document = {**json.loads(timing.read_text("utf-8")), "inputs": {}, "run": run, "machine": "", "processor": ""}
        timing.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", "utf-8")
        measured = clipfit("evaluate", run, "--alphas", "0,0.5,1")
        remember(where, name, {"figures": measured["alphas"]})
    for lock in (HERE / where).rglob(".*.lock"):
        lock.unlink()


def digest(file: Path) -> str:
    """Of every tensor's name, type, shape and bytes."""
    from safetensors.torch import load_file

    found = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def expected(where: str) -> None:
    """Digests from the files themselves; logits, to the digits that any machine gives, from clipfit."""
    from clipfit import EvaluateConfig, evaluate
    from clipfit.measure.evaluations import read

    copy = Path(tempfile.mkdtemp()) / "golden"  # for `evaluate` writes into the run
    shutil.copytree(HERE, copy)
    os.chdir(copy)
    for name in RUNS:
        run = Path(where) / name
        kept = evaluate(EvaluateConfig(run, alphas=(0.0, 0.5, 1.0))).kept
        stored = read(kept)
        logits = {
            f"{alpha:g}": {part: table.logits.tolist() for part, table in stored.tables(alpha).items()}
            for alpha in stored.alphas
        }
        digests = {"0.5": digest(run / "model.safetensors"), "1": digest(run / "finetuned.safetensors")}
        remember(where, name, {"digests": digests, "logits": logits})


def remember(where: str, name: str, what: dict[str, Any]) -> None:
    known = json.loads(EXPECTED.read_text("utf-8")) if EXPECTED.exists() else {}
    known.setdefault(where, {}).setdefault(name, {}).update(what)
    EXPECTED.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    {"inputs": inputs, "runs": runs, "expected": expected}[sys.argv[1]](*sys.argv[2:])
