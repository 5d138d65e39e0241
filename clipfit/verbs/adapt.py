"""`adapt`: a folder of shots in, an ensembled CLIP out."""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
import torchvision

from clipfit import methods
from clipfit.adaptation import Adaptation
from clipfit.config import AdaptConfig, Recipe
from clipfit.data import layout
from clipfit.data.copies import Fingerprint, fingerprint
from clipfit.data.images import ImageStore, Viewed, decode
from clipfit.data.layout import Sample
from clipfit.data.shots import Selection, select
from clipfit.ensemble import interpolate
from clipfit.errors import ClipfitError, DataError, NonFiniteError
from clipfit.events import Progress, Silent, StepReport
from clipfit.measure import scoring
from clipfit.measure.metrics import accuracy
from clipfit.model import devices, loading, sources
from clipfit.model.clip import Clip
from clipfit.prompts import prompts
from clipfit.runs import files
from clipfit.runs.place import building, require_room, target_folder
from clipfit.runs.record import RunFacts, RunRecord, Versions, write_run
from clipfit.version import __version__


@dataclass(frozen=True)
class AdaptResult:
    """What `adapt` did. Accuracies are on the shots themselves: no evidence of generalisation."""

    run: Path
    method: str
    model: str
    classes: int
    shots: int
    steps: int
    losses: dict[str, float]
    seconds: float
    alpha: float
    zero_shot_accuracy: float
    adapted_accuracy: float
    skipped: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The document of `adapt --json`."""
        return {**asdict(self), "run": str(self.run), "skipped": list(self.skipped)}


def adapt(config: AdaptConfig, progress: Progress | None = None) -> AdaptResult:
    """Fine-tune a pre-trained CLIP on shots and write a run.

    No image but the shots is ever opened: held-out images influence nothing.

    Raises:
        ClipfitError: see errors; nothing is left behind then.
    """
    progress, started = progress or Silent(), time.monotonic()
    method = methods.find(config.method)
    options = method.configure(config.method_options)
    inputs = _inputs(config)
    images = layout.read(config.shots, config.classes, config.image_root)
    unreadable: list[str] = []
    selection = select(images, config.shots_per_class, config.seed, _passing(config, unreadable))
    for note in (*images.notes, *selection.notes):
        progress.say(note)
    target = target_folder(config.shots, method.name, config.output, config.overwrite, inputs.values())

    origin = sources.find(config.model, config.pretrained)
    counts = list(Counter(sample.label for sample in selection.shots).values())
    plan = Adaptation.resolve(method, options, config, origin.adapt_defaults, counts)
    progress.say(f"loading {config.model}")
    device = devices.resolve_device(config.device)
    backbone = loading.fetch(origin, device, plan.additions, adapters=plan.adapters is not None)
    backbone.precision = devices.resolve_precision(config.precision, device)
    require_room(target, 2 * backbone.bytes)  # now, not after hours of training
    pretrained = backbone.snapshot("cpu")

    progress.say(f"decoding {len(selection.shots)} shots of {len(selection.base)} classes")
    shots, prints = _decoded(config, selection, unreadable)
    zero_shot = accuracy_on_shots(backbone, shots, selection, plan.recipe)

    reports: list[StepReport] = []

    def on_step(report: StepReport) -> None:
        reports.append(report)
        progress.step(report)

    progress.say(f"{method.name}, {plan.tuning} tuning, on {backbone.device} in {backbone.precision}")
    began = time.monotonic()
    place = {name: i for i, name in enumerate(selection.base)}
    labels = [place[sample.label] for sample in shots.samples]
    plan.run(backbone, selection.base, shots, labels, pretrained, on_step)
    training_seconds = time.monotonic() - began

    finetuned = backbone.snapshot("cpu")
    _require_finite(finetuned)
    ensemble = interpolate(pretrained, finetuned, config.alpha)
    backbone.load_state(ensemble)
    adapted = accuracy_on_shots(backbone, shots, selection, plan.recipe)

    progress.say(f"writing {target}")
    facts = RunFacts(
        record=_record(config, plan, backbone, shots),
        base=selection.base,
        names=images.names,
        shots=[{"path": s.source, "class": s.label, **asdict(p)} for s, p in zip(shots.samples, prints, strict=True)],
        steps=[asdict(report) for report in reports],
        scale=backbone.scale.item(),
    )
    with building(target, config.overwrite, progress.say) as folder:
        write_run(folder, facts, finetuned, ensemble)
        _prove(folder / "model.safetensors", backbone)
        seconds = time.monotonic() - started
        _write_timing(folder, target, inputs, seconds, training_seconds, sum(r.images for r in reports))
    last = reports[-1]
    return AdaptResult(
        target, method.name, config.model, len(selection.base), len(shots), last.steps, last.losses, seconds,
        config.alpha, zero_shot, adapted, tuple(shots.skipped),
    )  # fmt: skip


def accuracy_on_shots(backbone: Clip, shots: ImageStore, selection: Selection, recipe: Recipe) -> float:
    """Share of the shots, seen whole, that the base classes' texts name rightly."""
    t, z = scoring.texts(backbone, selection.base, recipe.template)
    whole = Viewed(shots, backbone.geometry)
    u = scoring.image_embeddings(backbone, whole, range(len(shots)), batch_size=64, class_tokens=z)
    names = scoring.best_names(u, t, selection.base)
    return accuracy(names, [sample.label for sample in shots.samples]).value


def _inputs(config: AdaptConfig) -> dict[str, Path]:
    """The files and folders that the run is made from, as absolute paths."""
    places = {"shots": config.shots, "classes": config.classes, "image_root": config.image_root}
    if (folder := sources.folder_of(config.model)) is not None:
        places["model"] = folder
    if config.pretrained and Path(config.pretrained).is_file():
        places["pretrained"] = Path(config.pretrained)
    return {name: path.resolve() for name, path in places.items() if path}


def _passing(config: AdaptConfig, unreadable: list[str]) -> Callable[[Sample], bool]:
    """What a draw of K shots takes: every image, or, where bad ones are skipped, those that can be read."""

    def readable(sample: Sample) -> bool:
        try:
            decode(sample.path)
        except DataError:
            unreadable.append(sample.source)
            return False
        return True

    return readable if config.skip_bad_images else lambda sample: True


def _decoded(config: AdaptConfig, selection: Selection, unreadable: list[str]) -> tuple[ImageStore, list[Fingerprint]]:
    """The shots, and what tells them from others; what the draw passed over counts as skipped."""
    shots = ImageStore(selection.shots, config.cache_bytes, skip_bad=config.skip_bad_images)
    shots.skipped += unreadable
    _require_every_class(shots, selection)
    prints = [fingerprint(sample, shots[i]) for i, sample in enumerate(shots.samples)]
    _require_one_label_each(shots, prints)
    return shots, prints


def _require_one_label_each(shots: ImageStore, prints: Sequence[Fingerprint]) -> None:
    first: dict[str, Sample] = {}
    for sample, print_ in zip(shots.samples, prints, strict=True):
        other = first.setdefault(print_.pixels, sample)
        if other.label != sample.label:
            raise DataError(
                f"{other.source} ({other.label!r}) and {sample.source} ({sample.label!r}) are the same image: "
                "remove the one that is labelled wrongly."
            )


def _require_every_class(shots: ImageStore, selection: Selection) -> None:
    left = {sample.label for sample in shots.samples}
    gone = [name for name in selection.base if name not in left]
    if gone:
        raise DataError(f"no readable image is left of class {gone[0]!r}: replace its broken images.")


def _require_finite(state: dict[str, torch.Tensor]) -> None:
    bad = next((name for name, t in state.items() if t.is_floating_point() and not t.isfinite().all()), None)
    if bad:
        raise NonFiniteError(f"after training, {bad} holds a value that is not finite; try a lower --learning-rate.")


def _record(config: AdaptConfig, plan: Adaptation, backbone: Clip, shots: ImageStore) -> RunRecord:
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
        method=plan.method.name,
        method_options=asdict(plan.options),
        tuning=plan.tuning,
        lora=plan.adapters,
        recipe=plan.recipe,
        alpha=config.alpha,
        seed=config.seed,
        device=backbone.device.type,
        precision=backbone.precision,
        edits=backbone.additions.edits,
        context=backbone.additions.context,
        threads=torch.get_num_threads(),
        skipped=tuple(shots.skipped),
        pretrained=backbone.source,
    )


def _prove(path: Path, backbone: Clip) -> None:
    """The written file, read by nothing but its own metadata, gives the features of the model in memory."""
    state, metadata = files.read_tensors(path)
    source = sources.Source(**metadata["pretrained"])
    again = loading.rebuild(source, state, backbone.additions, backbone.device)
    again.precision = backbone.precision
    tokens = backbone.tokenize(prompts(metadata["classes"], metadata["template"]))
    grey = torch.full((1, 3, *backbone.image_size), 127, dtype=torch.uint8)
    with torch.no_grad():
        read = again.encode(again.normalize(grey), tokens)
        written = backbone.encode(backbone.normalize(grey), tokens)
    if not all(map(torch.equal, read, written)):
        raise ClipfitError(f"{path} does not give the model's features when it is read again; please report this.")


def _write_timing(
    folder: Path, target: Path, inputs: Mapping[str, Path], seconds: float, training_seconds: float, images: int
) -> None:
    files.write_json(
        folder / "timing.json",
        {
            "seconds": seconds,
            "training_seconds": training_seconds,
            "images_per_second": images / training_seconds,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "run": str(target.resolve()),
            "inputs": {name: str(path) for name, path in inputs.items()},
            "machine": platform.platform(),
            "processor": platform.processor() or platform.machine(),
        },
    )
