"""`report`: what is known of a run, gathered for one page: forecast, measurements, mistakes, how to make it again."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from clipfit import again, predictor
from clipfit.again import Again
from clipfit.config import EvaluateConfig
from clipfit.config.report import ReportConfig
from clipfit.data import layout
from clipfit.errors import ClipfitError, DataError, OutputError, UsageError
from clipfit.events import Progress, Silent
from clipfit.measure import curves, evaluations, guard, mistakes
from clipfit.measure.calibration import temperature_of
from clipfit.measure.curves import LossCurve
from clipfit.measure.evaluations import HELD_OUT, ON_SHOTS, OTHER_TEMPLATES, StoredEvaluation
from clipfit.measure.figures import AlphaResult, figures, parts_of
from clipfit.measure.forecast import Forecast, forecast_of
from clipfit.measure.mistakes import ClassRow, Matrix, Mistake, Pair
from clipfit.measure.reliability import Bin, Reliability
from clipfit.predictor import Predictor
from clipfit.runs import files
from clipfit.runs.record import METRICS
from clipfit.runs.run import Run, open_run

# not inside the run: a page is none of its facts, and would be put aside when it is replaced
REPORTS = Path("reports")
MARK = "clipfit report"  # in a page's head: whose it is, so that nothing else is ever replaced
PAIRS = 30
WHOLE_MATRIX = 30  # names
NEAREST = 3
ALL_SHOTS = 2000  # beyond it, only shots of the classes that the mistakes are about are looked at
BATCH = 64


@dataclass(frozen=True)
class NearShot:
    """A shot and its cosine with an image. file: None where it is no longer there."""

    path: str
    label: str
    cosine: float
    file: Path | None


@dataclass(frozen=True)
class ShownMistake:
    """A wrong answer, where its image is (None: gone), and the shots that are most like it."""

    mistake: Mistake
    file: Path | None
    nearest: tuple[NearShot, ...] = ()


@dataclass(frozen=True)
class Measured:
    """One stored evaluation at one α, beside zero-shot CLIP.

    part: "union" where images of new classes were measured, else "base": what the confusion, the diagram and the
    mistakes are of. objection: the guard's, None where it has none. matrix: None where there are too many names.
    """

    name: str
    document: Mapping[str, Any]
    row: AlphaResult
    zero_shot: AlphaResult
    objection: ClipfitError | None
    part: str
    pairs: Sequence[Pair]
    matrix: Matrix | None
    classes: Sequence[ClassRow]
    bins: Sequence[Bin]
    bins_before: Sequence[Bin]
    mistakes: Sequence[ShownMistake] = ()
    wrong: int = 0  # in all

    @property
    def held_out(self) -> bool:
        """Whether base was measured on images that were not shots."""
        return bool(self.document["held_out"])


@dataclass(frozen=True)
class Account:
    """All that a page says. folds: folds.json, empty where there is none. measured: None where nothing was."""

    run: Run
    forecast: Forecast | None
    folds: Mapping[str, Any]
    losses: Sequence[LossCurve]
    measured: Measured | None
    again: Again
    notes: Sequence[str]

    @property
    def name(self) -> str:
        """The run's."""
        return self.run.path.resolve().name


@dataclass(frozen=True)
class Drawn:
    """A page, and curves as PNG files by name."""

    page: str
    pictures: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Reported:
    """Where the page is, and what it is of. evaluation: None where nothing was measured."""

    output: Path
    run: Path
    evaluation: str | None
    alpha: float
    pictures: tuple[Path, ...]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The document of `report --json`."""
        return {
            "output": str(self.output), "run": str(self.run), "evaluation": self.evaluation, "alpha": self.alpha,
            "pictures": [str(path) for path in self.pictures], "notes": list(self.notes),
        }  # fmt: skip


def report_on(
    config: ReportConfig, draw: Callable[[Account, bool], Drawn], progress: Progress | None = None
) -> Reported:
    """Write one page on a run: of its newest held-out evaluation, of another where there is none, or of none.

    Args:
        draw: (account, whether pictures are wanted too) → page, see report.run_page.

    Raises:
        ClipfitError: see errors. What is gone from the disk (images) is said on the page, what is damaged is refused.
    """
    progress = progress or Silent()
    run = open_run(config.run)
    output = config.output or REPORTS / f"{run.path.resolve().name}.html"
    _require_own(output)
    account = _account(run, config, progress)
    drawn = draw(account, config.png is not None)
    files.make_folder(output.parent)
    files.write_text(output, drawn.page)
    pictures = _write_pictures(config.png, drawn.pictures) if config.png else ()
    measured = account.measured
    return Reported(
        output,
        run.path,
        measured.name if measured else None,
        measured.row.alpha if measured else run.alpha,
        pictures,
        tuple(account.notes),
    )


def _require_own(output: Path) -> None:
    """Raises UsageError for a place that holds something else than a page of ours."""
    if not output.exists():
        return
    try:
        ours = output.is_file() and MARK.encode() in output.open("rb").read(1024)
    except OSError as error:
        raise OutputError(f"{output} cannot be read: {error.strerror or error}.") from error
    if not ours:
        raise UsageError(
            f"{output} is no page of clipfit's, so it is not replaced: choose another place with --output."
        )


def _write_pictures(folder: Path, pictures: Mapping[str, bytes]) -> tuple[Path, ...]:
    files.make_folder(folder)
    for name, data in pictures.items():
        files.atomically(folder / name, functools.partial(Path.write_bytes, data=data))
    return tuple(folder / name for name in pictures)


def _account(run: Run, config: ReportConfig, progress: Progress) -> Account:
    stored, notes = evaluations.newest(run), list(run.notes)
    measured = None
    if stored:
        progress.say(f"reading the evaluation {stored.folder.name} of {run.path}")
        measured = _measured(run, stored, config, notes, progress)
    return Account(
        run,
        forecast_of(run),
        run.folds,
        curves.losses(files.read_lines(run.path / METRICS)),
        measured,
        again.command_of(run),
        notes,
    )


def _measured(
    run: Run, stored: StoredEvaluation, config: ReportConfig, notes: list[str], progress: Progress
) -> Measured:
    document = stored.document
    new = tuple(document["new_classes"])
    alpha = run.alpha if run.alpha in stored.alphas else max(stored.alphas)
    if alpha != run.alpha:
        notes.append(f"the run's own α = {run.alpha:g} was not measured: figures are those of α = {alpha:g}")
    at_zero, at_alpha = stored.tables(0.0), stored.tables(alpha)
    temperature = temperature_of(run)
    zero_shot = figures(at_zero, at_zero, run.base, new, temperature)
    row = figures(at_alpha, at_zero, run.base, new, temperature) if alpha else zero_shot
    now, before = parts_of(at_alpha, run.base, new), parts_of(at_zero, run.base, new)
    part = "union" if "union" in now else next(iter(now))
    table, sure = now[part], row.certainty[part]
    wrong = mistakes.worst(table, config.mistakes, sure.temperature, before[part])
    confusion = table.confusion()
    return Measured(
        name=stored.folder.name,
        document=document,
        row=row,
        zero_shot=zero_shot,
        objection=guard.objection(
            (zero_shot, row) if alpha else (zero_shot,),
            document["held_out"],
            EvaluateConfig(run.path, fail_if_worse=True),
        ),
        part=part,
        pairs=mistakes.mixed(table, PAIRS),
        matrix=mistakes.matrix(table) if len(table.candidates) <= WHOLE_MATRIX else None,
        classes=mistakes.class_rows(row, zero_shot, {"base": run.base, "new": new}, _shots(run), confusion),
        bins=Reliability.of(table, sure.temperature).bins(),
        bins_before=Reliability.of(before[part], zero_shot.certainty[part].temperature).bins(),
        mistakes=_shown(run, stored.folder.name, wrong, config, notes, progress) if wrong else (),
        wrong=sum(count for (label, name), count in confusion.items() if label != name),
    )


def _shots(run: Run) -> Counter[str]:
    return Counter(shot["class"] for shot in run.shots)


# ---- the pictures of mistakes, and the shots that are most like them


def _shown(
    run: Run, evaluation: str, wrong: Sequence[Mistake], config: ReportConfig, notes: list[str], progress: Progress
) -> list[ShownMistake]:
    own_place = run.place("shots")
    of_run = _files(own_place, run.place("classes"), run.place("image_root"))
    if evaluation.removesuffix(OTHER_TEMPLATES) in (HELD_OUT, ON_SHOTS) and config.data is None:
        there = of_run
    elif config.data is not None:
        there = _files(config.data, None, None)
    else:
        there = {}
        notes.append(
            f"the images of {evaluation} are not the run's own: --data DIR says where they are, for thumbnails"
        )
    files_of = [there.get(one.id) for one in wrong]
    if there and None in files_of:
        notes.append(f"{files_of.count(None)} of the {len(wrong)} images of the worst mistakes are no longer there")
    if not there and evaluation in (HELD_OUT, ON_SHOTS):
        notes.append(f"the place of the images, {config.data or own_place}, can no longer be read: no thumbnails")
    found = [file for file in files_of if file is not None]
    if not found:
        return [ShownMistake(one, None) for one in wrong]
    progress.say(f"looking for the shots that are most like {len(found)} images")
    model = predictor.load(run.path, device=config.device)
    near = _nearest(model, found, _candidates(run, wrong, of_run, notes))
    return [
        ShownMistake(one, file, near.get(file, ()) if file else ()) for one, file in zip(wrong, files_of, strict=True)
    ]


def _files(place: Path | None, class_file: Path | None, image_root: Path | None) -> dict[str, Path]:
    """Where the images of a place are, by what its listing calls them; empty where it can no longer be read."""
    try:
        found = layout.read(place, class_file, image_root) if place else None
    except ClipfitError:
        return {}
    parts = (found.train, found.test or (), found.val or ()) if found else ()
    return {sample.source: sample.path for part in parts for sample in part if sample.path.is_file()}


def _candidates(
    run: Run, wrong: Sequence[Mistake], there: Mapping[str, Path], notes: list[str]
) -> list[tuple[Mapping[str, Any], Path]]:
    """The shots to compare with, and where they are."""
    shots = [(shot, there[shot["path"]]) for shot in run.shots if shot["path"] in there]
    if not shots:
        notes.append("the shots are no longer where they were: none is shown beside the mistakes")
    if len(shots) > ALL_SHOTS:
        about = {name for one in wrong for name in (one.label, *(name for name, _ in one.top))}
        shots = [(shot, file) for shot, file in shots if shot["class"] in about]
        notes.append("nearest shots are looked for among the classes that an image is of or was thought to be of")
    return shots


def _nearest(
    model: Predictor, images: Sequence[Path], shots: Sequence[tuple[Mapping[str, Any], Path]]
) -> dict[Path, tuple[NearShot, ...]]:
    """By image; what cannot be read has none, and is none."""
    read, u = _embedded(model, images)
    read_shots, v = _embedded(model, [file for _, file in shots])
    if not read or not read_shots:
        return {}
    by_file = {file: shot for shot, file in shots}
    rows = mistakes.nearest(u, v, NEAREST)
    return {
        file: tuple(
            NearShot(by_file[read_shots[k]]["path"], by_file[read_shots[k]]["class"], cosine, read_shots[k])
            for k, cosine in row
        )
        for file, row in zip(read, rows, strict=True)
    }


def _embedded(model: Predictor, paths: Iterable[Path]) -> tuple[list[Path], torch.Tensor]:
    """Those that can be read, and their unit-norm embeddings (n, D) by the run's model."""
    candidates = model.candidates() if model.clip.edits else None
    read: list[Path] = []
    parts: list[torch.Tensor] = []
    views: list[torch.Tensor] = []

    def encode() -> None:
        if views:
            parts.append(model.embedded(torch.stack(views), candidates))
            views.clear()

    for path in dict.fromkeys(paths):
        try:
            views.append(model.view(path))
        except DataError:
            continue
        read.append(path)
        if len(views) == BATCH:
            encode()
    encode()
    return read, torch.cat(parts) if parts else torch.empty(0, model.clip.embed_dim)
