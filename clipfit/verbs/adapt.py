"""`adapt`: a folder of shots in, an ensembled CLIP out."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import open_clip
import torch
import torchvision

from clipfit import interrupts, methods, outlook, ranks
from clipfit.adaptation import Adaptation
from clipfit.config import AdaptConfig
from clipfit.data.loaded import ShotFiles, Shots, Unseen
from clipfit.ensemble import State, interpolate
from clipfit.errors import ClipfitError, DataError, ModelError, NonFiniteError, UsageError
from clipfit.events import Progress, Silent, StepReport
from clipfit.folding import Subject
from clipfit.measure.folds import FEWEST_CLASSES
from clipfit.measure.forecast import Forecast, forecast_of
from clipfit.model import devices, loading, sources
from clipfit.model.clip import Clip
from clipfit.prompts import prompts
from clipfit.runs import files, manifest, place, start
from clipfit.runs.record import CONFIG, FOLDS, METRICS, MODEL, TIMING, RunFacts, RunRecord, Versions, write_run
from clipfit.runs.run import open_run
from clipfit.training.saving import Saving, differences, require_same
from clipfit.verbs import on_shots
from clipfit.verbs.on_shots import OnShots
from clipfit.version import __version__

UNKNOWN = -1.0  # a ratio that is still to be chosen


@dataclass(frozen=True)
class AdaptResult:
    """What `adapt` did. `seconds`: of this call. `losses`: of the last step, by name."""

    run: Path
    method: str
    model: str
    classes: int
    shots: int
    steps: int
    losses: dict[str, float]
    seconds: float
    alpha: float
    on_shots: OnShots
    skipped: tuple[str, ...]
    forecast: Forecast | None = None

    def as_json(self) -> dict[str, Any]:
        """The document of `adapt --json`."""
        return {**asdict(self), "run": str(self.run), "skipped": list(self.skipped)}


@dataclass(frozen=True)
class Job:
    """An adaptation made ready: the model as it was pre-trained, the shots, and the record that config.json will be."""

    target: Path
    inputs: Mapping[str, Path]  # what the run is made from, as absolute paths
    val: Unseen | None  # images to choose α on, where there are any and it is to be chosen
    adaptation: Adaptation
    clip: Clip
    shots: Shots
    record: RunRecord
    ancestors: Sequence[Mapping[str, Any]]  # what the run that it goes on from was made with

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a saved state, or a finished run, to be this one's."""
        return {"config": _asked(self.record), "shots": self.shots.lines(), "classes": list(self.shots.base)}


def _asked(record: RunRecord) -> dict[str, Any]:
    """config.json but for a ratio that was not asked for, which is found out later."""
    return {**record.to_json(), **({"alpha": None} if record.goal else {})}


def adapt(config: AdaptConfig, progress: Progress | None = None) -> AdaptResult:
    """Fine-tune a pre-trained CLIP on shots and write a run.

    Several processes (within `ranks.joined()`) share the work of each step; the first of them writes and reports.

    No image but the shots is ever opened: held-out images influence nothing.

    Raises:
        ClipfitError: see errors; nothing but a saved state, where one was asked for, is left behind then.
    """
    here, started = ranks.here(), time.monotonic()
    progress = progress if progress and here.leads else Silent()
    method = methods.find(config.method)
    origin = start.find(config.model, config.pretrained)
    inputs = _inputs(config)
    chosen = ShotFiles.of(config)
    for note in (*origin.notes, *chosen.notes):
        progress.say(note)
    replacing = config.overwrite or config.resume  # what is there is looked at before anything is done to it
    target = Path(
        here.told(
            lambda: str(place.target_folder(config.shots, method.name, config.output, replacing, inputs.values()))
        )
    )
    with place.locked(target) if here.leads else contextlib.nullcontext():
        job = _ready(config, origin, chosen, target, inputs, progress)
        before = on_shots.accuracy(job.clip, job.shots, job.record)
        for note in on_shots.notes(before, job.shots, job.record):
            progress.say(note)
        saving = Saving(place.resume_folder(target), config.save_every, job.identity, config.resume)
        if config.resume and config.overwrite and not saving.has_own:
            saving = replace(saving, resume=False)
        _require_one_job(job, saving)
        done = _finished(job, saving, config.overwrite) if config.resume else None
        if done:
            progress.say(f"{target} is finished already: nothing is left to do")
            job.clip.load_state(open_run(target).state(done.alpha))
        else:
            with interrupts.keeping(saving.words):
                done = _carry_out(config, job, saving, progress, started)
        with interrupts.keeping(lambda: place.whole(target)):
            after = on_shots.accuracy(job.clip, job.shots, job.record)
    return AdaptResult(
        run=target,
        method=method.name,
        model=config.model,
        classes=len(job.shots.base),
        shots=len(job.shots),
        steps=done.reports[-1].steps,
        losses=done.reports[-1].losses,
        seconds=time.monotonic() - started,
        alpha=done.alpha,
        on_shots=OnShots(before, after),
        skipped=job.shots.skipped,
        forecast=done.forecast,
    )


def _require_one_job(job: Job, saving: Saving) -> None:
    """Raises DataError where the processes have other shots, or other saved states: they would wait for one another."""
    if not ranks.agree((job.identity, saving.found)):
        raise DataError(
            "the processes do not find the same shots, classes, options and saved state: give all of them the same "
            "files, which no one changes."
        )


def _inputs(config: AdaptConfig) -> dict[str, Path]:
    """The files and folders that the run is made from, as absolute paths."""
    places = {"shots": config.shots, "classes": config.classes, "image_root": config.image_root}
    if (folder := sources.folder_of(config.model)) is not None:
        places["model"] = folder
    if (file := sources.weight_file(config.pretrained)) is not None:
        places["pretrained"] = file
    return {name: path.resolve() for name, path in places.items() if path}


def _ready(
    config: AdaptConfig,
    origin: start.Start,
    chosen: ShotFiles,
    target: Path,
    inputs: Mapping[str, Path],
    progress: Progress,
) -> Job:
    method = methods.find(config.method)
    options = method.configure(config.method_options)
    adaptation = Adaptation.resolve(method, options, config, origin.adapt_defaults, chosen.counts)
    progress.say(f"loading {config.model}")
    device = devices.resolve_device(config.device)
    clip = origin.load(method.name, adaptation.additions, adaptation.adapters is not None, device)
    clip.precision = devices.resolve_precision(config.precision, device, clip.model)
    adaptation.require_blocks(clip)
    # now, not after hours of training; a state is weights and two moments, and lies beside the one it replaces
    states = (9 if _looks(config) else 6) if config.save_every and adaptation.adapters is None else 0
    place.require_room(target, (2 + states) * clip.bytes)
    progress.say(f"decoding {len(chosen.selection.shots)} shots of {len(chosen.selection.base)} classes")
    shots = Shots.of(chosen, config, clip.geometry, adaptation.enough(clip))
    adaptation.require_distinct(clip, shots.base)
    record = replace(_record(config, adaptation, clip, shots), parent=origin.parent)
    val = shots.unseen(chosen.val, clip.geometry, config.skip_bad_images) if _looks(config) else None
    return Job(target, inputs, val, adaptation, clip, shots, record, origin.made_with)


def _record(config: AdaptConfig, adaptation: Adaptation, clip: Clip, shots: Shots) -> RunRecord:
    return RunRecord(
        clipfit=__version__,
        versions=Versions(
            python=platform.python_version(),
            torch=str(torch.__version__),
            torchvision=torchvision.__version__,
            open_clip=open_clip.__version__,
        ),
        shots=str(config.shots),
        shots_per_class=config.shots_per_class,
        classes=str(config.classes) if config.classes else None,
        image_root=str(config.image_root) if config.image_root else None,
        method=adaptation.method.name,
        method_options=asdict(adaptation.options),
        tuning=adaptation.tuning,
        lora=adaptation.adapters,
        recipe=adaptation.recipe,
        templates=adaptation.listed,
        balance=adaptation.balance,
        alpha=UNKNOWN if config.alpha is None else config.alpha,
        goal=_goal(config, len(shots.base)),
        forecast=_looks(config),
        seed=config.seed,
        device=clip.device.type,
        precision=clip.precision,
        edits=clip.additions.edits,
        context=clip.additions.context,
        threads=torch.get_num_threads(),
        processes=ranks.here().count,
        skipped=shots.skipped,
        grey_bits=shots.grey_bits,
        pretrained=clip.source,
    )


@dataclass(frozen=True)
class Done:
    """What a finished run is of."""

    reports: list[StepReport]
    alpha: float
    forecast: Forecast | None


def _finished(job: Job, saving: Saving, overwrite: bool) -> Done | None:
    """This very run where it is complete, and None where it has still to be made.

    Raises:
        UsageError: another run is there, and no saved state of one that was to replace it, nor leave to.
        ModelError: a damaged run is there, and no such state or leave.
    """
    replaced = saving.found or overwrite
    nothing_there = not (job.target / CONFIG).exists()
    if nothing_there or (replaced and not manifest.is_sealed(job.target)):
        return None
    try:
        run = open_run(job.target)
    except ModelError:
        if overwrite:
            return None
        raise
    found = {"config": _asked(run.record), "shots": list(run.shots), "classes": list(run.base)}
    if differences(found, job.identity):
        if not replaced:
            require_same(found, job.identity, f"the run {job.target}")
        return None
    saving.clear()
    reports = [StepReport(**line) for line in files.read_lines(run.path / METRICS)]
    return Done(reports, run.alpha, forecast_of(run))


def _carry_out(config: AdaptConfig, job: Job, saving: Saving, progress: Progress, started: float) -> Done:
    """Train, and write the run; the model is the ensemble afterwards."""
    clip, shots, adaptation = job.clip, job.shots, job.adaptation
    pretrained = clip.snapshot("cpu")
    progress.say(f"{adaptation.method.name}, {adaptation.tuning} tuning, on {clip.device} in {clip.precision}")
    began = time.monotonic()
    if config.resume:
        progress.say(f"going on from {saving.folder}" if saving.found else "there is no saved state: from the start")
    kept = saving if config.save_every or saving.found else None
    reports = adaptation.run(
        clip, shots.base, shots.images, shots.labels, pretrained, progress.step, progress.say, kept
    )
    training_seconds = time.monotonic() - began

    finetuned = clip.snapshot("cpu") if job.record.forecast else {n: t.cpu() for n, t in clip.state().items()}
    _require_finite(finetuned)
    found = _look(config, job, pretrained, finetuned, progress, kept) if job.record.forecast else None
    record = replace(job.record, alpha=found.alpha) if found else job.record
    progress.say(f"writing {job.target}")
    steps = [report.as_json() for report in reports]
    facts = RunFacts(record, shots.base, shots.names, shots.lines(), steps, clip.scale.item(), job.ancestors)
    ensemble = interpolate(pretrained, finetuned, record.alpha)

    written = False

    def write() -> None:
        nonlocal written
        with place.building(job.target, config.overwrite or config.resume, progress.say) as folder:
            write_run(folder, facts, finetuned, ensemble)
            if found:
                val = {"val": job.val.lines()} if job.val else {}
                files.write_json(folder / FOLDS, {**found.as_json(), "features": clip.features, **val})
            clip.load_state(ensemble)  # not before: on the CPU `finetuned` is what the model holds
            _prove(folder / MODEL, clip)
            _write_timing(folder, job, time.monotonic() - started, training_seconds, sum(r.images for r in reports))
        written = True

    with interrupts.keeping(lambda: place.whole(job.target) if written else ""):
        ranks.here().told(write)
        if not ranks.here().leads:  # who writes has it
            clip.load_state(ensemble)
    return Done(reports, record.alpha, found.forecast if found else None)


def _look(
    config: AdaptConfig, job: Job, pretrained: State, finetuned: State, progress: Progress, saving: Saving | None
) -> outlook.Outlook:
    """What the shots, and the val part where there is one, say of images not seen."""
    shots = job.shots
    subject = Subject(job.adaptation, job.clip, pretrained, shots.base, shots.images, shots.images.views, shots.labels)
    contents = [found.pixels for found in shots.prints]
    val = job.val.images if job.val else None
    found = outlook.look(subject, contents, finetuned, val, config.alpha, job.record.goal, progress, saving)
    for note in found.notes:
        progress.say(note)
    return found


def _looks(config: AdaptConfig) -> bool:
    """Whether the shots are asked what to expect."""
    return config.forecast or config.alpha is None


def _goal(config: AdaptConfig, classes: int) -> str | None:
    """What α is chosen for; None where it is given. Raises UsageError for classes that are too few for it."""
    few = classes < FEWEST_CLASSES
    if config.goal in ("new", "both") and few:
        raise UsageError(
            f"--goal {config.goal} needs {FEWEST_CLASSES} classes, of which to leave some out; there are {classes}: "
            "give --goal base."
        )
    return None if config.alpha is not None else config.goal or ("base" if few else "both")


def _require_finite(state: Mapping[str, torch.Tensor]) -> None:
    bad = next((name for name, t in state.items() if t.is_floating_point() and not t.isfinite().all()), None)
    if bad:
        raise NonFiniteError(f"after training, {bad} holds a value that is not finite; try a lower --learning-rate.")


def _prove(path: Path, clip: Clip) -> None:
    """The written file, read by nothing but its own metadata, gives the features of the model in memory."""
    state, metadata = files.read_tensors(path)
    again = loading.rebuild(sources.Source(**metadata["pretrained"]), state, clip.additions, clip.device)
    again.precision = clip.precision
    tokens = clip.tokenize(prompts(metadata["classes"], metadata["template"]))
    grey = torch.full((1, 3, *clip.image_size), 127, dtype=torch.uint8)
    with torch.no_grad():
        read = again.encode(again.normalize(grey), tokens)
        written = clip.encode(clip.normalize(grey), tokens)
    if not all(map(torch.equal, read, written)):
        raise ClipfitError(f"{path} does not give the model's features when it is read again; please report this.")


def _write_timing(folder: Path, job: Job, seconds: float, training_seconds: float, images: int) -> None:
    files.write_json(
        folder / TIMING,
        {
            "seconds": seconds,
            "training_seconds": training_seconds,
            "images_per_second": images / training_seconds,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "run": str(job.target.resolve()),
            "inputs": {name: str(path) for name, path in job.inputs.items()},
            "machine": platform.platform(),
            "processor": platform.processor() or platform.machine(),
        },
    )
