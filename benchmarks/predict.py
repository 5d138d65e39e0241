"""What `predict` leaves of what the cores can give: ViT-B-32 with random weights, JPEGs of 500 x 375.

    python benchmarks/predict.py [--images 256] [--repeat 5] [--transformers FOLDER] [--onnxruntime]
    python benchmarks/predict.py --decoders

Each turn times, in one process and one after another: decoding alone (all cores), the forward pass alone (all cores),
and `predict` from files to a file. Bare is what both take when neither waits for anything, images / (decode +
forward); ratios are medians over turns. Both are given by the clock and by the processor's own count: where other work
shares the machine only the latter means anything, with OMP_NUM_THREADS=1, for threads that wait for others spin.
--transformers is an export of that format, run by its zero-shot pipeline; --onnxruntime the bare image tower there,
with the same decoding.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

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
from clipfit.predictor import Predictor

SHOTS = Path(__file__).parent.parent / "examples" / "shots"
BATCH = 64


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


def throughput(args: argparse.Namespace, work: Path) -> None:
    files = photographs(work / "images", args.images)
    (work / "names.txt").write_text("\n".join(f"thing {k}" for k in range(100)), "utf-8")
    folder = random_model(work / "model")
    model = clipfit.load(folder, classes=[f"thing {k}" for k in range(100)])
    views = torch.stack([model.view(file) for file in files])
    rows: dict[str, Callable[[], object]] = {
        "decode": lambda: list(ahead([Input(str(f), f) for f in files], lambda i: model.view(i.path), 2 * BATCH)),
        "forward": lambda: [model.judged(part, model.candidates()) for part in views.split(BATCH)],
        "clipfit predict": lambda: predicted(model, folder, work),
    }
    if args.onnxruntime:
        rows["bare onnxruntime"] = onnxruntime_row(model, files, work)
    if args.transformers:
        rows["transformers pipeline"] = transformers_row(args.transformers, files)
    times: dict[str, list[np.ndarray]] = {name: [] for name in rows}
    for turn in range(args.repeat + 1):
        for name, row in rows.items():
            took = seconds(row)
            if turn:  # the first one warms up
                times[name].append(took)
    bare = [d + f for d, f in zip(times["decode"], times["forward"], strict=True)]
    print(f"{args.images} images, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.repeat} turns\n")
    print("| | images/s | of bare | images/s of processor time | of bare |\n|---|---|---|---|---|")
    for name, took in {**times, "bare: decode, then forward": bare}.items():
        rates, shares = args.images / np.median(took, axis=0), np.median(np.divide(bare, took), axis=0)
        print(f"| {name} | {rates[0]:.1f} | {shares[0]:.2f} | {rates[1]:.1f} | {shares[1]:.2f} |")


def predicted(model: Predictor, folder: Path, work: Path) -> object:
    """The verb as the command line calls it, but for loading the model and reading the texts: once, however many."""
    names = PredictConfig((work / "images",), model=str(folder), classes=work / "names.txt", batch_size=BATCH,
                          output=work / "rows.jsonl", overwrite=True)  # fmt: skip
    load = clipfit.predictor.load
    clipfit.predictor.load = lambda *args, **kwargs: model
    try:
        return predict(names)
    finally:
        clipfit.predictor.load = load


def onnxruntime_row(model: Predictor, files: list[Path], work: Path) -> Callable[[], object]:
    import onnxruntime

    tower, place = model.clip.model.visual, work / "image.onnx"
    batch = torch.export.Dim("batch", min=1, max=4096)
    torch.onnx.export(tower, (torch.zeros(2, 3, 224, 224),), place, input_names=["pixels"], dynamo=True,
                      dynamic_shapes=({0: batch},), verbose=False)  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(place, options, providers=["CPUExecutionProvider"])

    def run() -> None:
        for start in range(0, len(files), BATCH):
            part = torch.stack([model.view(file) for file in files[start : start + BATCH]])
            session.run(None, {"pixels": model.clip.normalize(part).numpy()})

    return run


def transformers_row(folder: Path, files: list[Path]) -> Callable[[], object]:
    from transformers import pipeline

    pipe = pipeline("zero-shot-image-classification", model=str(folder))
    labels = [f"thing {k}" for k in range(100)]
    return lambda: pipe([str(file) for file in files], candidate_labels=labels, batch_size=BATCH)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--transformers", type=Path)
    parser.add_argument("--onnxruntime", action="store_true")
    parser.add_argument("--decoders", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        (decoders if args.decoders else throughput)(args, Path(work))


if __name__ == "__main__":
    main()
