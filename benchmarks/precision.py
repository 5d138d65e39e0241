"""Whether α curves in bf16 are those in fp32: three methods, four tasks, three seeds.

    python benchmarks/precision.py run fp32 | bf16   cells of benchmarks/precision.toml, in benchmarks/results/precision
    python benchmarks/precision.py report            the table of docs/memory.md, from what was run

A processor without instructions for bf16 emulates its products, tens to hundreds of times slower than in fp32. There,
`run bf16` makes of each product one of fp32 of the same bf16 numbers, rounded to bf16 when it is done: what processors
with such instructions compute, which add up in fp32 (but for the order of sums, and attention's inner rounding).
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from clipfit import BenchmarkConfig, benchmark
from clipfit.measure.metrics import harmonic_mean
from clipfit.model.devices import multiplies_bf16
from clipfit.plans.figures import Tables

PLAN = Path(__file__).parent / "precision.toml"
RESULTS = Path(__file__).parent / "results/precision"
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
ATTENTION = "_scaled_dot_product"


class ProductsInFp32(TorchDispatchMode):
    """Products of bf16 tensors are done in fp32, and their results rounded to bf16."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        kwargs = kwargs or {}
        tensors = [t for t in args if isinstance(t, torch.Tensor)]
        if not (name in PRODUCTS or name.startswith(ATTENTION)) or not any(t.dtype == torch.bfloat16 for t in tensors):
            return func(*args, **kwargs)
        found = func(*tree_map(_wide, args), **tree_map(_wide, kwargs))
        # attention's second result, a logarithm of sums, is float32 in every type
        if name.startswith(ATTENTION) and "backward" not in name:
            return (_narrow(found[0]), *found[1:])
        return tree_map(_narrow, found)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value


def _narrow(value: Any) -> Any:
    return value.bfloat16() if isinstance(value, torch.Tensor) and value.dtype == torch.float32 else value


def run(precision: str) -> None:
    emulated = precision == "bf16" and not multiplies_bf16(torch.device("cpu"))
    with ProductsInFp32() if emulated else contextlib.nullcontext():
        benchmark(BenchmarkConfig(PLAN, output=RESULTS, precision=precision, device="cpu"), Shown())


class Shown:
    """Cells on stderr."""

    def say(self, text: str) -> None:
        import sys

        print(text, file=sys.stderr, flush=True)

    def step(self, report: object) -> None:
        pass


def curves(tables: Tables, task: str, method: str) -> list[list[float]]:
    """HM in percent: seed → ratio."""
    lines = [line for line in tables.lines() if (line["set"], line["method"]) == (task, method)]
    return [
        [
            100 * harmonic_mean(line["base"]["accuracy"], line["new"]["accuracy"])
            for line in sorted(lines, key=lambda line: float(line["alpha"]))
            if line["seed"] == seed
        ]
        for seed in tables.plan.seeds
    ]


def report() -> None:
    """Differences of HM at each ratio; the mean over ratios, and the largest."""
    both = {
        precision: benchmark(
            BenchmarkConfig(PLAN, output=RESULTS, precision=precision, device="cpu", dry_run=True)
        ).tables
        for precision in ("fp32", "bf16")
    }
    plan = both["fp32"].plan
    print("| task | method | bf16 beside fp32, the same seed: mean / largest | another seed, fp32: mean / largest |")
    print("|---|---|---|---|")
    types, seeds = [], []
    for task in plan.sets:
        for method in plan.methods:
            one, other = (curves(both[precision], task, method) for precision in ("fp32", "bf16"))
            between_types = [abs(a - b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)]
            pairs = [(one[i], one[j]) for i in range(len(one)) for j in range(i)]
            between_seeds = [abs(a - b) for x, y in pairs for a, b in zip(x, y, strict=True)]
            types += between_types
            seeds += between_seeds
            print(f"| {task} | {method} | {_shown(between_types)} | {_shown(between_seeds)} |")
    print(f"| all | all | **{_shown(types)}** | **{_shown(seeds)}** |")


def _shown(differences: list[float]) -> str:
    return f"{statistics.mean(differences):.2f} / {max(differences):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("precision", nargs="?", choices=("fp32", "bf16"), default="fp32")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.command == "report":
        report()
    else:
        run(args.precision)


if __name__ == "__main__":
    main()
