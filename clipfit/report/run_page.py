"""`report`: one page on a run that needs nothing else, and no network."""

from __future__ import annotations

import base64
import hashlib
import io
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from clipfit.data.images import decode
from clipfit.errors import ClipfitError, DataError
from clipfit.measure import curves
from clipfit.measure.figures import PARTS, AlphaResult
from clipfit.measure.forecast import Expected
from clipfit.measure.metrics import Accuracy, Difference
from clipfit.model.sources import LOCAL_DIR
from clipfit.report import plots
from clipfit.report.html import percent
from clipfit.text import printable
from clipfit.verbs.report import MARK, NEAREST, Account, Drawn, Measured

SIDE = 160  # pixels of a thumbnail
WORDS = {"base": "base classes", "new": "new classes", "union": "base and new together"}


def drawing() -> Callable[[Account, bool], Drawn]:
    """What `report_on` draws with. Raises UsageError where matplotlib is missing."""
    plots.require_installed()
    return drawn


def drawn(account: Account, pictures: bool = False) -> Drawn:
    """The page, and its curves as PNG where those are wanted; the same account gives the same bytes."""
    figures = {key: list(made) for key, made in _figures(account).items()}
    document: Mapping[str, Any] = account.measured.document if account.measured else {}
    script = files("clipfit.report").joinpath("sort.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = (
        _environment()
        .get_template("run.html")
        .render(
            account=account,
            measured=account.measured,
            mark=MARK,
            script=script,
            script_hash=f"sha256-{digest}",
            title=printable(account.name),
            summary=_summary(account),
            cards=list(_cards(account)),
            guard=_guard(account.measured) if account.measured else None,
            figures={key: [(one.title, plots.svg(one.draw)) for one in made] for key, made in figures.items()},
            worth=list(_worth(account.measured)) if account.measured else [],
            mistakes=list(_mistakes(account)),
            nearest=NEAREST,
            side=SIDE,
            command="\n".join(printable(line) for line in account.again.shell.split("\n")),
            evaluate=printable(shlex.join(["clipfit", "evaluate", str(account.run.path), "--alphas", "0:1:0.1"])),
            settings=list(_settings(account)),
            retained=document.get("retain") or (),  # those of before have neither
            drift=document.get("drift"),
            notes=[*account.notes, *account.folds.get("notes", ()), *document.get("notes", ())],
            many=40,
        )
    )
    if not pictures:
        return Drawn(page)
    every = [(one.file, plots.png(one.draw)) for made in figures.values() for one in made]
    return Drawn(page, dict(every))


# ---- figures


@dataclass(frozen=True)
class Figure:
    """A picture, what stands above it, and its file."""

    title: str
    file: str
    draw: plots.Drawing


def _figures(account: Account) -> dict[str, Iterator[Figure]]:
    return {"alpha": _of_alpha(account), "losses": _of_losses(account), "reliability": _of_reliability(account)}


def _of_alpha(account: Account) -> Iterator[Figure]:
    measured, alpha = account.measured, account.run.alpha
    document: Mapping[str, Any] = measured.document if measured else {"alphas": ()}
    test = {part: curves.measured(document, part) for part in (*PARTS, "harmonic_mean")}
    what = "test" if measured and measured.held_out else "the shots"
    left_out = "val part" if account.folds.get("images") == "val" else "folds of the shots"
    for part, other in (("base", left_out), ("new", "folds of the classes")):
        folds = curves.of_folds(account.folds, part)
        if test[part] or folds:
            label = what if part == "base" else "test"
            draw = plots.accuracies(test[part], folds, alpha, label, other)
            yield Figure(WORDS[part], plots.file_name("alpha", part), draw)
    if test["union"]:
        draw = plots.accuracies(test["union"], test["harmonic_mean"], alpha, "both together", "harmonic mean")
        yield Figure("base and new", plots.file_name("alpha", "both"), draw)


def _of_losses(account: Account) -> Iterator[Figure]:
    for curve in account.losses:
        yield Figure(printable(curve.name), plots.file_name("loss", curve.name), plots.loss(curve))


def _of_reliability(account: Account) -> Iterator[Figure]:
    if (measured := account.measured) is not None:
        label = f"α = {measured.row.alpha:g}"
        draw = plots.reliability(measured.bins, measured.bins_before, label)
        yield Figure(WORDS[measured.part], plots.file_name("reliability"), draw)


# ---- the headline


def _summary(account: Account) -> str:
    run, record = account.run, account.run.record
    counts = Counter(shot["class"] for shot in run.shots).values()
    a_class = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    chosen = f", chosen for {record.goal}" if record.goal else ""
    return (
        f"{record.method} ({record.tuning} tuning) on {_model(account)}: {len(run.shots)} shots of {len(run.base)} "
        f"classes, {a_class} a class; α = {run.alpha:g}{chosen}"
    )


def _model(account: Account) -> str:
    """Without the folders of whose machine it was made on."""
    source = account.run.source
    local = source.model.startswith(LOCAL_DIR)
    name = Path(source.model.removeprefix(LOCAL_DIR)).name if local else source.model
    return f"{name} / {Path(source.pretrained).name}" if source.pretrained else name


@dataclass(frozen=True)
class Card:
    """What is known of one part: lines of text, the large one first."""

    title: str
    large: str
    interval: str
    lines: tuple[str, ...]
    verdict: str  # "better", "worse" or ""


def _cards(account: Account) -> Iterator[Card]:
    measured, forecast = account.measured, account.forecast
    for part in PARTS:
        accuracy: Accuracy | None = getattr(measured.row, part) if measured else None
        foretold: Expected | None = getattr(forecast, part, None) if forecast else None
        if accuracy is None and foretold is None:
            continue
        held_out = measured is not None and (measured.held_out or part == "new")
        lines, verdict = [], ""
        if measured and accuracy:
            classes = len(accuracy.per_class)
            where = "held-out images" if held_out else "the shots themselves: no evidence of generalisation"
            lines.append(f"{accuracy.n} images of {classes} classes, {where}")
            found, difference = _beside(measured, part)
            lines.append(found)
            verdict = difference.verdict if difference else ""
        if foretold:
            lines.append(_foretold(foretold, accuracy if held_out else None))
        large = f"{accuracy.value:.1%}" if accuracy else "not measured"
        yield Card(WORDS[part], large, _interval(accuracy.interval) if accuracy else "", tuple(lines), verdict)
    if measured and measured.row.harmonic_mean is not None and measured.zero_shot.harmonic_mean is not None:
        now, before = measured.row.harmonic_mean, measured.zero_shot.harmonic_mean
        lines = [f"zero-shot {before:.1%}, {_points(now - before)} points"] if measured.row.alpha else []
        yield Card("harmonic mean of base and new", f"{now:.1%}", "", tuple(lines), "")


def _beside(measured: Measured, part: str) -> tuple[str, Difference | None]:
    before = getattr(measured.zero_shot, part)
    d = measured.row.against_zero_shot.get(part)
    if d is None or not measured.row.alpha:
        return "this is zero-shot CLIP", None
    verdict = d.verdict or "no difference shown"
    return (
        f"zero-shot {before.value:.1%}; difference {_points(d.difference)} [{_points(d.low)} {_points(d.high)}] "
        f"points: {verdict}"
    ), d


def _foretold(foretold: Expected, accuracy: Accuracy | None) -> str:
    text = (
        f"forecast {foretold.accuracy:.0%} {_interval((foretold.low, foretold.high))} among {foretold.classes} classes "
        f"(zero-shot {foretold.zero_shot:.0%})"
    )
    if accuracy is None or len(accuracy.per_class) != foretold.classes:
        return text
    if foretold.low <= accuracy.value <= foretold.high:
        return f"{text}: what was measured lies within"
    return f"{text}: what was measured lies {'below' if accuracy.value < foretold.low else 'above'}"


def _guard(measured: Measured) -> tuple[str, str]:
    """Its state, for the style, and a sentence."""
    objection: ClipfitError | None = measured.objection
    if objection is None:
        parts = [part for part in measured.row.against_zero_shot if measured.held_out or part == "new"]
        if not measured.row.alpha:
            return "unsure", "Guard: only zero-shot CLIP was measured, there is nothing to compare."
        return "good", f"Guard: not shown to be worse than zero-shot CLIP on {', '.join(parts)}."
    state = "unsure" if isinstance(objection, DataError) else "bad"
    return state, f"Guard: {objection}"


# ---- tables


def _worth(measured: Measured) -> Iterator[dict[str, str | list[str]]]:
    """What probabilities are worth, a row a part and ratio."""
    rows: list[tuple[str, AlphaResult]] = [("zero-shot", measured.zero_shot)]
    if measured.row.alpha:
        rows.append((f"α = {measured.row.alpha:g}", measured.row))
    for part in PARTS:
        for label, row in rows:
            if part in row.certainty:
                c = row.certainty[part]
                yield {
                    "part": part, "model": label,
                    "covered": [f"{covered.accuracy:.1%}" for covered in c.coverage],
                    "top5": "–" if c.top5 is None else f"{c.top5:.1%}",
                    "error": f"{100 * c.calibration_error:.1f} ({100 * c.error_by_chance:.1f})",
                    "temperature": f"{c.temperature:.2f}, found on folds" if c.calibrated else "1",
                }  # fmt: skip


def _mistakes(account: Account) -> Iterator[dict[str, Any]]:
    bits = account.run.record.grey_bits
    kept: dict[Path, str | None] = {}

    def thumbnail(file: Path | None) -> str | None:
        if file is not None and file not in kept:
            kept[file] = _jpeg(file, bits)
        return kept[file] if file else None

    for shown in account.measured.mistakes if account.measured else ():
        one = shown.mistake
        yield {
            "picture": thumbnail(shown.file),
            "short": printable("/".join(one.id.split("/")[-2:])),
            "path": printable(one.id),
            "label": printable(one.label),
            "own": percent(one.own),
            "top": [(printable(name), percent(p)) for name, p in one.top],
            "before": None if one.before is None else printable(one.before),
            "before_right": one.before == one.label,
            "nearest": [
                {"picture": thumbnail(near.file), "label": printable(near.label), "same": near.label == one.label,
                 "cosine": f"{near.cosine:.2f}", "path": printable(near.path)}
                for near in shown.nearest
            ],
        }  # fmt: skip


def _jpeg(file: Path, grey_bits: int | None) -> str | None:
    try:
        picture = decode(file, grey_bits)
    except DataError:
        return None
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=80)
    return base64.b64encode(data.getvalue()).decode("ascii")


def _settings(account: Account) -> Iterator[tuple[str, str]]:
    """config.json in rows; what is nothing is left out."""
    run, record = account.run, account.run.record
    yield "model", f"{_model(account)}, SHA-256 of its tensors {run.source.sha256}"
    for group, values in (
        ("recipe", asdict(record.recipe)),
        ("method", record.method_options),
        ("lora", asdict(record.lora) if record.lora else {}),
    ):
        for key, value in values.items():
            if value is not None:
                yield f"{group}: {key}", _plain(value)
    if len(run.templates) > 1:
        yield "templates", f"the mean of {len(run.templates)}: {'; '.join(run.templates[:5])} …"
    for key in ("alpha", "goal", "seed", "shots_per_class", "balance", "context", "device", "precision", "threads",
                "grey_bits"):  # fmt: skip
        value = getattr(record, key)
        if value is not None and value is not False:
            yield key, _plain(value)
    if record.skipped:
        yield "skipped", f"{len(record.skipped)} images that could not be read"
    if run.source.pretrained is None and record.parent:
        yield "adapted on from", f"a run at α = {record.parent.alpha:g}, SHA-256 {record.parent.sha256}"
    versions = {"clipfit": record.clipfit, **asdict(record.versions)}
    yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _interval(bounds: tuple[float, float]) -> str:
    return f"[{100 * bounds[0]:.0f}–{100 * bounds[1]:.0f}]"


def _points(share: float) -> str:
    text = f"{100 * share:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=jinja2.FunctionLoader(lambda name: files("clipfit.report").joinpath(name).read_text("utf-8")),
    )  # fmt: skip
    environment.filters["printable"] = lambda value: printable(str(value))
    environment.filters["points"] = _points
    environment.filters["share"] = lambda value: f"{value:.1%}"
    return environment
