"""`evaluate`: base, new and union accuracy at each ratio α, zero-shot always beside."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clipfit import engines, ranks
from clipfit.config import EvaluateConfig, Recipe
from clipfit.data.images import ImageStore, Memory, Views, grey_bits
from clipfit.data.layout import Sample
from clipfit.engines import Engine
from clipfit.ensemble import interpolate
from clipfit.errors import DataError, OutputError, UsageError
from clipfit.events import Progress, Silent
from clipfit.measure import evaluations, guard, held_out, scoring
from clipfit.measure.calibration import temperature_of
from clipfit.measure.figures import AlphaResult, Tables, figures, losses
from clipfit.measure.forgetting import Drift, Elsewhere, Retained
from clipfit.model import loading, preprocess, templates
from clipfit.model.clip import Clip
from clipfit.prompts import Templates
from clipfit.runs.run import Run, open_run


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured. `held_out` False: on the shots themselves, no evidence of generalisation.

    run: None where a pre-trained model was measured.
    features: the number type of the towers, fp32 or bf16, and what computed the image tower where it was not torch.
    kept: where the predictions lie, None where nowhere.
    """

    run: Path | None
    data: str
    method: str
    held_out: bool
    features: str
    base_classes: tuple[str, ...]
    new_classes: tuple[str, ...]
    rows: tuple[AlphaResult, ...]
    notes: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    kept: Path | None = None
    model: str | None = None
    templates: tuple[str, ...] = ()
    retain: tuple[Retained, ...] = ()
    drift: Drift | None = None

    def as_json(self) -> dict[str, Any]:
        """The document of `evaluate --json`."""
        return {
            "run": str(self.run) if self.run else None,
            "model": self.model,
            "data": self.data,
            "method": self.method,
            "held_out": self.held_out,
            "features": self.features,
            "base_classes": list(self.base_classes),
            "new_classes": list(self.new_classes),
            "templates": list(self.templates),
            "alphas": [row.as_json() for row in self.rows],
            "retain": [place.as_json() for place in self.retain],
            "drift": self.drift.as_json() if self.drift else None,
            "notes": list(self.notes),
            "skipped": list(self.skipped),
            "kept": str(self.kept) if self.kept else None,
        }


def evaluate(config: EvaluateConfig, progress: Progress | None = None) -> Evaluation:
    """Measure a run on held-out images, and keep the predictions in it.

    Several processes (within `ranks.joined()`) share the images; the first of them writes and reports.

    Raises:
        GuardError, DataError: the guard asked for stopped it, or could not judge it; `found` is the Evaluation.
        ClipfitError: see errors; the pre-trained weights are always needed, for zero-shot stands beside everything.
    """
    progress = progress if progress and ranks.here().leads else Silent()
    engines.require_installed(config.runtime)
    measured = _of_run(config, progress) if config.model is None else _of_model(config, config.model, progress)
    if objection := guard.objection(measured.rows, measured.held_out, config):
        objection.found = measured
        raise objection
    return measured


def _of_run(config: EvaluateConfig, progress: Progress) -> Evaluation:
    """A run beside zero-shot CLIP; kept in it."""
    run = open_run(config.run)
    asked = _asked(run, config)
    geometry, memory = preprocess.geometry(run.source.preprocess_cfg), Memory(config.cache_bytes)
    views_of = functools.partial(Views, geometry, run.record.grey_bits, memory)
    views = views_of()
    test = held_out.assemble(run, config, views)
    elsewhere, temperature = Elsewhere(run, config, views_of), temperature_of(run)
    clip, engine = _zero_shot(run, config, progress)
    decoded = functools.partial(_decoded, memory=memory, skip_bad=config.skip_bad_images, progress=progress)
    images = decoded(test.samples, views)
    elsewhere.decode(decoded, (*run.base, *test.new))
    tables = _score(clip, engine, run, images, test.new, asked, elsewhere, config, progress)
    rows = tuple(figures(stored, tables[0.0], run.base, test.new, temperature) for stored in tables.values())
    measured = Evaluation(
        run=run.path,
        data=str(config.data or run.record.shots),
        method=run.method,
        held_out=test.held_out,
        features=clip.features,
        base_classes=run.base,
        new_classes=test.new,
        rows=rows,
        notes=(*test.notes, *elsewhere.notes, *_on_templates(run, asked), *_on_losses(rows, run.alpha)),
        skipped=tuple(images.skipped),
        model=run.source.model,
        templates=asked,
        retain=elsewhere.retained(),
        drift=elsewhere.drift(),
    )
    return _kept(measured, tables, elsewhere, run, config.data)


def _decoded(samples: Sequence[Sample], views: Views, memory: Memory, skip_bad: bool, progress: Progress) -> ImageStore:
    progress.say(f"decoding {len(samples)} images")
    images = ImageStore(samples, memory, views.read, skip_bad, shared=True)
    views.forget()  # those of copies
    if not len(images):
        raise DataError(f"no readable image is left of the {len(samples)} to evaluate on: replace broken images.")
    return images


def _asked(run: Run, config: EvaluateConfig) -> Templates:
    """The templates that are listed, else the run's own. Raises UsageError where a run's context was learnt for one."""
    asked = templates.read(config.templates) if config.templates else run.templates
    if run.record.context is not None and asked != run.templates:
        raise UsageError(f"the words before the class were learnt for {run.template!r}: leave out --templates.")
    return asked


def _on_templates(run: Run, asked: Templates) -> list[str]:
    if asked == run.templates:
        return []
    count = f"{len(asked)} templates" if len(asked) > 1 else "the template"
    return [f"texts are made with {count} of --templates, in place of the run's own"]


def _of_model(config: EvaluateConfig, model: str, progress: Progress) -> Evaluation:
    """What a pre-trained model makes of images, before anything is adapted; nothing is kept."""
    listed = templates.read(config.templates) if config.templates else None
    base, test = held_out.unadapted(config)
    device = engines.device_of(config.runtime, config.device)
    progress.say(f"loading {model} on {device}")
    clip = loading.load(model, config.pretrained, device)
    _choose_engine(clip, config, progress).attach(clip)
    memory = Memory(config.cache_bytes)
    views = Views(clip.geometry, grey_bits(test.samples), memory)
    test = held_out.each_once(test, views)
    images = _decoded(test.samples, views, memory, config.skip_bad_images, progress)
    of_model = Recipe.resolved(clip.source.adapt_defaults, "", {}).template
    texts_by = listed or (of_model,)
    table = scoring.tables(clip, images, base, test.new, texts_by, 0.0, config.batch_size)
    return Evaluation(
        run=None,
        data=str(config.data),
        method="zero-shot",
        held_out=test.held_out,
        features=clip.features,
        base_classes=base,
        new_classes=test.new,
        rows=(figures(table, table, base, test.new),),
        notes=test.notes,
        skipped=tuple(images.skipped),
        model=model,
        templates=texts_by,
    )


def _zero_shot(run: Run, config: EvaluateConfig, progress: Progress) -> tuple[Clip, Engine]:
    device = engines.device_of(config.runtime, config.device)
    progress.say(f"loading {run.source.model} on {device}")
    clip = run.pretrained(device)
    return clip, _choose_engine(clip, config, progress)


def _choose_engine(clip: Clip, config: EvaluateConfig, progress: Progress) -> Engine:
    """What is fast here, not what was so where the run was made."""
    engine = engines.engine_of(config.runtime, config.precision, clip)
    progress.say(f"features are computed in {engine}")
    return engine


def _score(
    clip: Clip,
    engine: Engine,
    run: Run,
    images: ImageStore,
    new: Sequence[str],
    asked: Templates,
    elsewhere: Elsewhere,
    config: EvaluateConfig,
    progress: Progress,
) -> dict[float, Tables]:
    """The tables of every α, zero-shot's first; has a look elsewhere at each, and leaves the CLIP at the last."""
    pretrained = clip.snapshot()
    finetuned = {name: tensor.to(clip.device) for name, tensor in run.finetuned().items()}
    tables = {}
    for alpha in sorted({0.0, *(config.alphas if config.alphas is not None else (run.alpha,))}):
        progress.say(f"evaluating at α = {alpha:g}")
        clip.load_state(interpolate(pretrained, finetuned, alpha))
        engine.attach(clip)
        tables[alpha] = scoring.tables(clip, images, run.base, new, asked, alpha, config.batch_size)
        elsewhere.look(clip, asked, alpha, config.batch_size)
    return tables


def _on_losses(rows: Sequence[AlphaResult], chosen: float) -> list[str]:
    """What an accuracy over all images may hide, at the run's own α, or the last where that was not asked for."""
    row = next((row for row in rows if row.alpha == chosen), rows[-1])
    lost = losses(row, rows[0])
    if not lost:
        return []
    count = sum(len(part.per_class) for part in (row.base, row.new) if part)
    where = f"{len(lost)} of {count} classes"
    named = ", ".join(f"{loss.name} {100 * loss.before:.0f} → {100 * loss.after:.0f} %" for loss in lost[:5])
    more = " …" if len(lost) > 5 else ""
    return [f"at α = {row.alpha:g}, fewer images are right in {where} than by zero-shot: {named}{more}"]


def _kept(
    measured: Evaluation, tables: Mapping[float, Tables], elsewhere: Elsewhere, run: Run, data: Path | None
) -> Evaluation:
    """Store the evaluation in the run; where that cannot be, a note says so."""
    folder = (
        run.path
        / evaluations.FOLDER
        / evaluations.name_of(data, measured.held_out, measured.templates == run.templates)
    )
    document = measured.as_json()
    for of_this_machine in ("run", "model", "kept"):
        del document[of_this_machine]
    place = data or run.place("shots")
    document["data"] = folder.name
    document["notes"] = [note.replace(str(place), folder.name) for note in measured.notes]
    for entry in filter(None, [*document["retain"], document["drift"]]):
        here, entry["data"] = entry["data"], Path(entry["data"]).name
        document["notes"] = [note.replace(f"{here}: ", f"{entry['data']}: ") for note in document["notes"]]
    if not ranks.here().leads:
        return measured
    try:
        run.require_unchanged()
        evaluations.write(folder, document, tables, elsewhere.tables)
    except OutputError as error:
        return replace(measured, notes=(*measured.notes, f"the predictions were not kept: {error}"))
    except UsageError:
        reason = f"another process is writing {folder}"
        return replace(measured, notes=(*measured.notes, f"the predictions were not kept: {reason}."))
    return replace(measured, kept=folder)
