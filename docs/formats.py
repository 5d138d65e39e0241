"""Writes docs/formats.md, and takes half an hour of one core: `python docs/formats.py`.

Every format of `export`, read back by its consumer, of runs of every kind.
"""

from __future__ import annotations

import platform
import shlex
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import open_clip
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from clipfit.cli import application
from clipfit.config import outputs
from clipfit.config.outputs import FormatOptions
from clipfit.data.images import decode
from clipfit.errors import UsageError
from clipfit.formats import FORMATS, difference, proof, require_held
from clipfit.formats.proof import Agreement, Pictures
from clipfit.formats.subject import Subject, in_effect, subject_of
from clipfit.measure import scoring
from clipfit.model.edits import share
from clipfit.runs.run import Run, open_run

ROOT = Path(__file__).parent.parent
PAGE = Path(__file__).with_suffix(".md")
SHOTS = "examples/shots"
PICTURES = 32
PLAIN_VIT = ("ViT-B-32", "ViT-B-32-quickgelu")
# by title: what `adapt` is told; random/ has models with random weights
SUBJECTS = {
    "cite": "--model clipfit-tiny --shots 4 --epochs 2",
    "ViT-B-32": "--model random/ViT-B-32 --method finetune --shots 1 --epochs 1 --batch-size 12 --learning-rate 1e-4",
    "ViT-B-32-quickgelu": "--model random/ViT-B-32-quickgelu --method finetune --shots 1 --epochs 1 --batch-size 12 "
    "--learning-rate 1e-4",
    "SigLIP": "--model random/siglip --method finetune --shots 1 --epochs 1",
    "ATHA": "--model clipfit-tiny --method atha --shots 4 --epochs 2",
    "LoRA": "--model clipfit-tiny --tuning lora --shots 4 --epochs 2",
    "context": "--model clipfit-tiny --method finetune --context --shots 4 --epochs 2",
}
HEAD = """# Formats: what their consumers read

Written by `python docs/formats.py`. Each cell is a run exported at α = 0.5, read back by the library named beside it in
a process that does not import clipfit, and compared with the run on the same pixels of {pictures} drawings of the
example: the largest difference of a cosine · how many of the {pictures} best labels are the same · how many of these
best labels lead by more than twice the difference. In every cell the latter are all among the former.

In fp32 no cosine may differ by more than {fp32:g}, in fp16 by {fp16:g}, in bf16 by {bf16:g}. A `difference`, which is
proved at α = 1 too, may move a logit by {logit:g}: of clipfit-tiny a cosine by {of_difference:.0e}. An export beyond
its bound is not kept. For int8 there is none: `export` shows its accuracy on the shots beside that before. `no`:
refused, for the reason below. How small they are: [formats_sizes.md](formats_sizes.md).

"""
FOOT = """
{reasons}

## Token edits

An `ATHA` run edits the patches most and least like a class text, so that another rounding can choose other patches
before it shows in any logit. Of {selections} choices (head or tail of each block and picture, where its strength is not
0), so many are others in the consumer's own computation than in the run's:

{table}

## How it was made

On {machine}, one thread, Python {python}, torch {torch}; random weights by seed 0 (`tests/families.py`: SigLIP's
architecture with two blocks of width 64, ViT-B-32 at full size). The drawings are the first of each class of
`examples/shots/train`, then the second, and so on. Each run by its command:

```sh
{commands}
```
"""


@dataclass(frozen=True)
class Row:
    """A line of the table: a format, and what is asked of it."""

    format: str
    options: FormatOptions

    @property
    def cells(self) -> tuple[str, str, str]:
        """What names it; how a difference is stored is chosen by measuring."""
        kind = "chosen" if self.format == "difference" else self.options.quantize or self.options.dtype
        return f"`{self.format}`", self.options.part or "", kind


@dataclass(frozen=True)
class Cell:
    """A run in a format as its consumer reads it; or why the format cannot hold it."""

    consumer: str = ""
    found: Agreement | None = None
    scale: float = 1.0
    refused: str = ""

    def text(self, reasons: list[str]) -> str:
        """As the page has it; a reason is added where it is not among them."""
        if self.found is None:
            if self.refused not in reasons:
                reasons.append(self.refused)
            return f"no {reasons.index(self.refused) + 1}"
        return f"{self.found.largest_difference / self.scale:.0e} · {self.found.same_labels} · {self.found.clear}"


def rows() -> list[Row]:
    """Every format with each of its parts and types."""
    found = []
    for name, takes in outputs.FORMATS.items():
        for part in takes.part or (None,):
            found += [Row(name, FormatOptions(part, dtype)) for dtype in takes.dtype]
            found += [Row(name, FormatOptions(part, quantize=way)) for way in takes.quantize]
    return found


# ---- runs


def adapted(title: str, place: Path) -> Run:
    """A subject's run, made in the folder `place`."""
    told = SUBJECTS[title].replace("random/", f"{place}/random/")
    _make_random(title, place / "random")
    arguments = ["adapt", str(ROOT / SHOTS), *shlex.split(told), "--output", str(place / "runs" / title)]
    done = CliRunner().invoke(application(), arguments, prog_name="clipfit")
    if done.exit_code != 0:
        raise SystemExit(done.stderr)
    return open_run(place / "runs" / title)


def _make_random(title: str, folder: Path) -> None:
    sys.path.append(str(ROOT / "tests"))
    from families import make_family, save_model

    if title in PLAIN_VIT:
        save_model(folder / title, open_clip.get_model_config(title))
    elif title == "SigLIP":
        make_family("siglip", folder)


def drawings() -> list[Path]:
    """The first of every class, the second, …"""
    classes = [sorted(folder.iterdir()) for folder in sorted((ROOT / SHOTS / "train").iterdir()) if folder.is_dir()]
    return [file for several in zip(*classes, strict=False) for file in several][:PICTURES]


# ---- cells


class Exports:
    """A run's exports, each in a folder of its own below `place`; the model is built once."""

    def __init__(self, run: Run, place: Path):
        self.run, self.place = run, place
        self.additions = in_effect(run, run.alpha)
        self.subject = subject_of(run, run.alpha, self.additions, "", FormatOptions())
        views = [self.subject.model.geometry(decode(file, run.record.grey_bits)) for file in drawings()]
        self.pictures = Pictures(torch.stack(views))

    def cell(self, row: Row, folder: Path) -> Cell:
        """Written to the folder, which is empty, and read back."""
        chosen = FORMATS[row.format]
        try:
            require_held(chosen, self.run, self.additions, row.options)
        except UsageError as error:
            return Cell(refused=str(error))
        subject = replace(self.subject, format=row.format, options=row.options)
        chosen.write(subject, folder)
        made = chosen.prove(subject, folder, self.pictures)
        found = made.identical_pixels
        if found.clear_same_labels != found.clear:
            raise SystemExit(f"{row}: a label differs, though it leads by more than twice the difference")
        return Cell(made.consumer, found, float(subject.model.scale))


def cells(title: str, place: Path) -> tuple[dict[Row, Cell], dict[Row, tuple[int, int]]]:
    """A column, and of a run with token edits (changed, all) choices of patches in each row."""
    exports = Exports(adapted(title, place), place)
    column: dict[Row, Cell] = {}
    choices: dict[Row, tuple[int, int]] = {}
    for row in rows():
        with tempfile.TemporaryDirectory(dir=place) as folder:
            column[row] = exports.cell(row, Path(folder))
            if exports.additions.edits and column[row].found:
                choices[row] = changed_choices(exports.subject, Path(folder), exports.pictures)
        print(title, *row.cells, column[row].text([]), file=sys.stderr, flush=True)
    return column, choices


# ---- which patches are chosen


def changed_choices(subject: Subject, folder: Path, pictures: Pictures) -> tuple[int, int]:
    """Of the run's choices of patches, how many are others in an export's own computation; and how many there are."""
    model, run = subject.model, subject.run
    pixels = model.normalize(pictures.images)
    _, looks = model.looks(pixels, scoring.texts(model, run.base, run.templates))
    assert model.edits
    settings, heads = model.edits.settings, model.edits.head.tolist()
    find = _orders_of_graph if (folder / "model.onnx").exists() else _orders_of_program
    changed = count = 0
    for look, order, strength in zip(looks, find(folder, pixels), heads, strict=True):
        length = order.shape[1]
        ends = ((look.head, slice(share(length, settings.head_ratio)) if strength else slice(0)),
                (look.tail, slice(length - share(length, settings.tail_ratio), length)))  # fmt: skip
        for mask, part in ends:
            chosen = torch.zeros_like(mask).scatter_(1, order[:, part], value=True)
            count += int(chosen.sum())
            changed += int((chosen & ~mask).sum())
    return changed, count


def _orders_of_graph(folder: Path, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Of every block, the patches from the most text-like on (B, L), as onnxruntime ranks them."""
    model = onnx.load(folder / "model.onnx")
    ranked = [node.output[1] for node in model.graph.node if node.op_type == "TopK"][::2]  # then each rank's patch
    model.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.INT64, None) for n in ranked)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(order) for order in session.run(ranked, {"pixels": pixels.numpy()})]


class _Sorts(TorchDispatchMode):
    """Keeps the indices of every sort."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[torch.Tensor] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket is torch.ops.aten.sort:
            self.found.append(result[1])
        return result


@torch.no_grad()
def _orders_of_program(folder: Path, pixels: torch.Tensor) -> list[torch.Tensor]:
    """The same of a program of torch.export."""
    program = torch.export.load(folder / "model.pt2").module()
    with _Sorts() as sorts:
        program(pixels)
    return sorts.found[::2]


# ---- the page


def table(columns: Mapping[str, Mapping[Row, Cell]], reasons: list[str]) -> Iterator[str]:
    """The lines of the large table."""
    yield from _lines(["format", "part", "type", "read back by", *columns])
    for row in rows():
        cells = [column[row] for column in columns.values()]
        by = next((cell.consumer for cell in cells if cell.consumer), "")
        yield _line([*row.cells, by, *(cell.text(reasons) for cell in cells)])


def _lines(headings: Iterable[str]) -> list[str]:
    names = list(headings)
    return [_line(names), "|---" * len(names) + "|"]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def page(columns: Mapping[str, Mapping[Row, Cell]], choices: Mapping[Row, tuple[int, int]]) -> str:
    """The whole text."""
    reasons: list[str] = []
    lines = list(table(columns, reasons))
    edited = _lines(["format", "part", "type", "other choices"])
    edited += [_line([*row.cells, str(changed)]) for row, (changed, _) in choices.items()]
    scale = next(iter(columns["cite"].values())).scale
    head = HEAD.format(
        pictures=PICTURES, **proof.BOUNDS, logit=difference.BOUND, of_difference=difference.BOUND / scale
    )  # fmt: skip
    return head + "\n".join(lines) + "\n" + FOOT.format(
        reasons="\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)),
        selections=f"{next(iter(choices.values()))[1]:,}", table="\n".join(edited), machine=_processor(),
        python=platform.python_version(), torch=version("torch"),
        commands="\n".join(f"clipfit adapt {SHOTS} {told}" for told in SUBJECTS.values()),
    )  # fmt: skip


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(": ")[1] for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"an {names[0]}" if names else platform.machine()


def main(place: Path) -> str:
    """The page, of runs, models and exports that are made in a folder."""
    columns, choices = {}, {}
    for title in SUBJECTS:
        columns[title], changed = cells(title, place)
        choices.update(changed)
    return page(columns, choices)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="clipfit-") as folder:
        PAGE.write_text(main(Path(folder)), "utf-8")
