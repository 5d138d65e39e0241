"""`predict` by every runtime over a bare loop of decoding and eager fp32: ViT-B-32, random weights, 500 x 375 JPEGs.

    python benchmarks/predict.py [--images 64] [--batch 32] [--repeat 3] [--runtimes "torch auto" …]
                                 [--transformers FOLDER]
    python benchmarks/predict.py --decoders

Each turn takes, in one process and one after another: decoding alone, the forward pass alone (by torch, eager, in
fp32), and the verb from files to a file by each runtime. Bare is what the first two take when neither waits for
anything, images / (decode + forward); ratios are medians over turns. Both are given by the clock and by the processor's
own count: where other work shares the machine only the latter means anything, with OMP_NUM_THREADS=1, for threads that
wait for others spin. Loading, and writing the tower as a graph, are not timed: no image changes them. --transformers is
an export of that format, run by its zero-shot pipeline.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

import clipfit
from clipfit import PredictConfig, predict
from clipfit.data.ahead import ahead
from clipfit.data.images import decode
from clipfit.data.stream import Input
from clipfit.model import devices
from clipfit.predictor import Predictor

SHOTS = Path(__file__).parent.parent / "examples" / "shots"
RUNTIMES = ("torch auto", "torch fp32", "onnxruntime fp32", "openvino auto")
CLASSES = 100


def photographs(folder: Path, count: int) -> list[Path]:
    """JPEGs with edges, gradients and noise, of about the size on disk that photographs of 500 x 375 have."""
    draw, drawings = np.random.default_rng(0), sorted(SHOTS.rglob("*.png"))
    folder.mkdir()
    slope = np.linspace(0, 60, 500)[None, :, None] + np.linspace(0, 40, 375)[:, None, None]
    for k in range(count):
        with Image.open(drawings[k % len(drawings)]) as opened:
            picture = np.asarray(opened.convert("RGB").resize((500, 375), Image.Resampling.BICUBIC), np.float64)
        picture = picture * 0.6 + slope + draw.normal(0, 6, picture.shape)
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / f"{k:05d}.jpg", quality=90)
    return sorted(folder.iterdir())


def random_model(folder: Path, name: str = "ViT-B-32") -> Path:
    """A model with random weights, as a folder that every command takes for --model."""
    folder.mkdir()
    torch.manual_seed(0)
    config = open_clip.get_model_config(name)
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}), "utf-8")
    return folder


def seconds(work: Callable[[], object]) -> np.ndarray:
    """By the clock, and of this process's threads on the processor."""
    started = np.array([time.perf_counter(), time.process_time()])
    work()
    return np.array([time.perf_counter(), time.process_time()]) - started


def models(folder: Path, classes: int, runtimes: Sequence[str]) -> dict[str, Predictor]:
    """The model by "RUNTIME PRECISION", its graph written and its texts read."""
    found = {}
    for name in runtimes:
        runtime, precision = name.split()
        names = [f"thing {k}" for k in range(classes)]
        model = clipfit.load(folder, classes=names, runtime=runtime, precision=precision, device="cpu")
        model.predict(np.zeros((224, 224, 3), np.uint8))
        found[f"{name} ({model.clip.features})"] = model
    return found


def bare(folder: Path, classes: int, files: list[Path], batch: int) -> dict[str, Callable[[], object]]:
    """Decoding alone and the forward pass alone."""
    [model] = models(folder, classes, ["torch fp32"]).values()
    views, candidates = torch.stack([model.view(file) for file in files]), model.candidates()
    return {
        "decode": lambda: list(ahead([Input(str(f), f) for f in files], lambda i: model.view(i.path), 2 * batch)),
        "forward": lambda: [model.judged(part, candidates) for part in views.split(batch)],
    }


def predicted(model: Predictor, folder: Path, work: Path, batch: int) -> Callable[[], object]:
    """The verb as the command line calls it, but for loading the model and reading the texts: once, however many."""
    names = PredictConfig((work / "images",), model=str(folder), classes=work / "names.txt", batch_size=batch,
                          output=work / "rows.jsonl", overwrite=True)  # fmt: skip

    def run() -> object:
        with mock.patch.object(clipfit.predictor, "load", return_value=model):
            return predict(names)

    return run


def receipt(args: argparse.Namespace) -> str:
    """What the table is of."""
    fast = "fast" if devices.resolve_precision("auto", torch.device("cpu")) == "bf16" else "none"
    versions = [f"{name} {version(name)}" for name in ("torch", "onnxruntime", "openvino") if find_spec(name)]
    return (
        f"ViT-B-32, {args.images} images, batch {args.batch}, {', '.join(versions)}, {torch.get_num_threads()} "
        f"threads, bf16 products: {fast}, medians of {args.repeat} turns\n"
    )


def table(rows: dict[str, Callable[[], object]], args: argparse.Namespace) -> None:
    """All rows in turn, and each beside decoding and the forward pass together."""
    times: dict[str, list[np.ndarray]] = {name: [] for name in rows}
    for turn in range(args.repeat + 1):
        for name, row in rows.items():
            took = seconds(row)
            if turn:  # the first one warms up
                times[name].append(took)
    both = [d + f for d, f in zip(times["decode"], times["forward"], strict=True)]
    shown = {
        "decode": times.pop("decode"),
        "forward": times.pop("forward"),
        "bare: decode, then forward": both,
        **times,
    }
    print("| | images/s | of bare | images/s of processor time | of bare |\n|---|---|---|---|---|")
    for name, took in shown.items():
        rates, shares = args.images / np.median(took, axis=0), np.median(np.divide(both, took), axis=0)
        print(f"| {name} | {rates[0]:.1f} | {shares[0]:.2f} | {rates[1]:.1f} | {shares[1]:.2f} |")


def throughput(args: argparse.Namespace, work: Path) -> None:
    files = photographs(work / "images", args.images)
    (work / "names.txt").write_text("\n".join(f"thing {k}" for k in range(CLASSES)), "utf-8")
    folder = random_model(work / "model")
    rows = bare(folder, CLASSES, files, args.batch)
    for name, model in models(folder, CLASSES, args.runtimes).items():
        rows[f"predict, {name}"] = predicted(model, folder, work, args.batch)
    if args.transformers:
        rows["transformers pipeline"] = transformers_row(args.transformers, files, args.batch)
    print(receipt(args))
    table(rows, args)


def transformers_row(folder: Path, files: list[Path], batch: int) -> Callable[[], object]:
    from transformers import pipeline

    pipe = pipeline("zero-shot-image-classification", model=str(folder))
    labels = [f"thing {k}" for k in range(CLASSES)]
    return lambda: pipe([str(file) for file in files], candidate_labels=labels, batch_size=batch)


def decoders(args: argparse.Namespace, work: Path) -> None:
    """Images a second on one core, and how many images differ from Pillow's in a pixel."""
    import simplejpeg
    import torchvision

    files = photographs(work / "images", args.images)
    found: dict[str, Callable[[Path], np.ndarray]] = {
        "Pillow, as `decode` does": lambda file: np.asarray(decode(file)),
        "simplejpeg": lambda file: simplejpeg.decode_jpeg(file.read_bytes()),
        "torchvision": lambda file: torchvision.io.decode_jpeg(
            torchvision.io.read_file(str(file)), torchvision.io.ImageReadMode.RGB
        ).permute(1, 2, 0).numpy(),
    }  # fmt: skip
    pixels = [np.asarray(decode(file)) for file in files]
    print("| decoder | images/s, one core | images that differ | by at most |\n|---|---|---|---|")
    for name, read in found.items():
        took = np.median([seconds(lambda: [read(file) for file in files]) for _ in range(args.repeat)], axis=0)[1]  # noqa: B023
        apart = [np.abs(read(f).astype(int) - p).max() for f, p in zip(files, pixels, strict=True)]
        print(f"| {name} | {len(files) / took:.0f} | {sum(a > 0 for a in apart)} of {len(files)} | {max(apart)} |")


def parser(about: str | None) -> argparse.ArgumentParser:
    """The options of the tables."""
    found = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--images", type=int, default=64)
    found.add_argument("--batch", type=int, default=32)
    found.add_argument("--repeat", type=int, default=3)
    found.add_argument("--runtimes", nargs="+", default=RUNTIMES)
    return found


def main() -> None:
    given = parser(__doc__)
    given.add_argument("--transformers", type=Path)
    given.add_argument("--decoders", action="store_true")
    args = given.parse_args()
    with tempfile.TemporaryDirectory() as work:
        (decoders if args.decoders else throughput)(args, Path(work))


if __name__ == "__main__":
    main()
