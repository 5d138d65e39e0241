"""`evaluate` by every runtime over a bare loop of decoding and eager fp32: ViT-B-32, random weights, 500 x 375 JPEGs.

    python benchmarks/evaluate.py [--images 64] [--batch 32] [--repeat 3] [--runtimes "torch auto" "torch fp32" …]

As benchmarks/predict.py, whose rows these are. What is timed is the verb, from files to figures, among 10 classes; not
timed are loading and writing the graph, which no image changes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import predict as benchmark

from clipfit import EvaluateConfig, evaluate
from clipfit.engines import Engine
from clipfit.model import loading
from clipfit.predictor import Predictor

CLASSES = 10


def labelled(files: list[Path], folder: Path) -> Path:
    """The files in class folders, turn by turn."""
    for k, file in enumerate(files):
        place = folder / f"thing {k % CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        file.rename(place / file.name)
    return folder


def row(model: Predictor, folder: Path, data: Path, batch: int) -> Callable[[], object]:
    """The verb as the command line calls it, but for loading the model and writing its graph."""
    config = EvaluateConfig(model=str(folder), data=data, batch_size=batch)

    def run() -> object:
        with mock.patch.object(loading, "load", return_value=model.clip), mock.patch.object(Engine, "attach"):
            return evaluate(config)

    return run


def main() -> None:
    args = benchmark.parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        data = labelled(benchmark.photographs(work / "images", args.images), work / "data")
        files = sorted(data.rglob("*.jpg"))
        place = benchmark.random_model(work / "model")
        models = benchmark.models(place, CLASSES, args.runtimes)
        rows = {f"evaluate, {name}": row(model, place, data, args.batch) for name, model in models.items()}
        print(benchmark.receipt(args))
        benchmark.table({**benchmark.bare(place, CLASSES, files, args.batch), **rows}, args)


if __name__ == "__main__":
    main()
