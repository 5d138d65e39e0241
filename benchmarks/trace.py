"""The same bytes before and after: what every method and tuning writes at a fixed seed, as hashes.

    python benchmarks/trace.py > before.txt      # then change the code
    python benchmarks/trace.py | diff before.txt -

A refactor shows no difference: the same losses at every step, and the same weights at α = 1 and 0.5. Hashes hold for
one machine, one thread and one version of torch; they are compared, never kept.
"""

import hashlib
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from clipfit import AdaptConfig, adapt

SHOTS = Path(__file__).parent.parent / "examples/shots/train"
RECIPE = {"epochs": 2, "batch_size": 10}  # 24 shots: batches of unequal size
RUNS = [
    *(
        (method, tuning, False)
        for tuning in ("full", "lora")
        for method in ("cite", "atha", "cite+atha", "finetune", "flyp")
    ),
    ("finetune", "full", True),
]


def weights(path: Path) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    torch.set_num_threads(1)
    for method, tuning, context in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            run = adapt(
                AdaptConfig(
                    shots=SHOTS, method=method, model="clipfit-tiny", shots_per_class=2, tuning=tuning,
                    context=context, recipe=RECIPE, output=Path(folder) / "run",
                )
            ).run  # fmt: skip
            losses = hashlib.sha256((run / "metrics.jsonl").read_bytes()).hexdigest()
            found = [losses, weights(run / "finetuned.safetensors"), weights(run / "model.safetensors")]
        name = f"{method} {tuning}{' context' if context else ''}"
        print(f"{name:<20}", *(digest[:16] for digest in found), flush=True)


if __name__ == "__main__":
    main()
