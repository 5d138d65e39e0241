"""Cross-domain few-shot episodes: adapt from the pre-trained model in each, and compare methods over the same ones."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from clipfit import methods
from clipfit.adaptation import Adaptation
from clipfit.config import AdaptConfig, EpisodesConfig, Recipe
from clipfit.data import layout
from clipfit.data.copies import Known, first_of_each, identify
from clipfit.data.images import Chosen, Images, ImageStore, Viewed, grey_bits
from clipfit.ensemble import interpolate
from clipfit.errors import DataError, UsageError
from clipfit.events import Progress, Silent
from clipfit.measure import scoring
from clipfit.measure.metrics import Estimate, accuracy, estimate
from clipfit.methods.declared import adapt_config, adapt_options
from clipfit.model import devices, loading
from clipfit.model.clip import Clip
from clipfit.prompts import Templates
from clipfit.runs import files
from clipfit.version import __version__

ZERO_SHOT = "zero-shot"
RECORD = "episodes.json"


@dataclass(frozen=True)
class Contender:
    """What is compared: `zero-shot`, or a method, perhaps `+lora`, perhaps with settings (`atha+lora:lora_rank=4`)."""

    spec: str
    config: AdaptConfig | None  # None: zero-shot

    @classmethod
    def parse(cls, spec: str) -> Contender:
        """Raises UsageError for a method, an option or a setting that there is not, or a value of another type."""
        if spec == ZERO_SHOT:
            return cls(spec, None)
        name, _, text = spec.partition(":")
        pairs = [pair.partition("=") for pair in re.split(r",(?![^\[]*\])", text) if pair]  # not within [0.5,1]
        given = {key: _value(value) for key, _, value in pairs}
        options = adapt_options()
        for key in given:
            if key in options and options[key].part == "adapt" and key != "context":
                raise UsageError(f"{key} is no setting of a method: it is the same for all episodes.")
        tuning = "lora" if name.endswith("+lora") else "full"
        config = adapt_config({"shots": Path(), "method": name.removesuffix("+lora"), "tuning": tuning, **given})
        return cls(spec, config)


@dataclass(frozen=True)
class Episode:
    """Classes, and indices of images: support[c] are the shots of class c, query[c] what is measured on."""

    number: int
    classes: tuple[str, ...]
    support: tuple[tuple[int, ...], ...]
    query: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class EpisodeRow:
    """A method at a number of shots and a ratio α: its accuracy, and its paired gain over zero-shot CLIP."""

    method: str
    shots: int
    alpha: float
    accuracy: Estimate
    gain: Estimate


@dataclass(frozen=True)
class EpisodeReport:
    """What `evaluate --episodes` measured; rows say over how many finished episodes."""

    config: EpisodesConfig
    rows: tuple[EpisodeRow, ...]

    def as_json(self) -> dict[str, Any]:
        """The document of `evaluate --episodes --json`."""
        c = self.config
        settings = {"data": str(c.data), "model": c.model, "way": c.way, "query": c.query, "episodes": c.episodes,
                    "seed": c.seed, "output": str(c.output)}  # fmt: skip
        return {**settings, "rows": [asdict(row) for row in self.rows]}


def episodes(config: EpisodesConfig, progress: Progress | None = None) -> EpisodeReport:
    """Measure methods on seeded episodes of a labelled folder. A finished episode is never run again.

    Several processes may share the work (`part`): each takes the episodes of its number.

    Raises:
        ClipfitError: see errors.
    """
    progress = progress or Silent()
    contenders = [Contender.parse(spec) for spec in config.contenders]
    files.require_outside(config.output, config.data)
    found = layout.read(config.data, config.classes, config.image_root)
    clip = loading.load(config.model, config.pretrained, devices.resolve_device(config.device))
    clip.precision = devices.resolve_precision(config.precision, clip.device)
    for note in found.notes:
        progress.say(note)
    samples = [*found.train, *(found.test or ())]
    bits = grey_bits(samples)
    images = ImageStore(samples, config.cache_bytes, skip_bad=config.skip_bad_images, grey_bits=bits)
    contents = [identity.content for identity in identify(images.samples, Known.of([]), bits)]
    distinct = first_of_each(contents)  # no image is support and query at once, not even under two names
    if len(distinct) < len(images):
        progress.say(f"{len(images) - len(distinct)} images have the very content of another and were left out")
    labels = [images.samples[i].label for i in distinct]
    _require_same_settings(config, clip, [f"{label} {contents[i]}" for label, i in zip(labels, distinct, strict=True)])
    pool = Chosen(images, distinct)

    part, parts = config.part
    for number in range(part - 1, config.episodes, parts):
        for shots, contender in itertools.product(config.shots, contenders):
            path = path_of(config.output, contender.spec, shots, number)
            if not path.exists():
                progress.say(f"episode {number + 1} of {config.episodes}, {shots}-shot, {contender.spec}")
                episode = draw(labels, config, shots, number)
                measured = _run(config, clip, pool, episode, contender)
                files.write_json(path, {"classes": episode.classes, "accuracy": measured})
    return EpisodeReport(config, tuple(_rows(config)))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def draw(labels: Sequence[str], config: EpisodesConfig, shots: int, number: int) -> Episode:
    """Episode `number`: the same classes and query images at every number of shots, more shots containing fewer.

    Raises:
        DataError: fewer than `way` classes have enough images.
    """
    need = config.room + config.query
    by_class: dict[str, list[int]] = defaultdict(list)
    for i, label in enumerate(labels):
        by_class[label].append(i)
    enough = sorted(name for name, at in by_class.items() if len(at) >= need)
    if len(enough) < config.way:
        raise DataError(
            f"{config.way}-way episodes need {config.way} classes of at least {need} images ({config.room} shots "
            f"and {config.query} queries), but {config.data} has {len(enough)}: lower --way, --shots or --query."
        )
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + number)
    classes = [enough[k] for k in torch.randperm(len(enough), generator=generator)[: config.way].tolist()]
    support, query = [], []
    for name in classes:
        order = [by_class[name][k] for k in torch.randperm(len(by_class[name]), generator=generator).tolist()]
        query.append(tuple(order[: config.query]))
        support.append(tuple(order[config.query : config.query + shots]))
    return Episode(number, tuple(classes), tuple(support), tuple(query))


def _run(
    config: EpisodesConfig, clip: Clip, images: Images, episode: Episode, contender: Contender
) -> dict[str, float]:
    """Accuracy on the query images at every α asked for; at α = 0 alone for zero-shot CLIP."""
    if contender.config is None:
        templates = (Recipe.resolved(clip.source.adapt_defaults, "", {}).template,)
        return {"0": _accuracy(clip, images, episode, templates, config.batch_size)}
    method = methods.find(contender.config.method)
    options = method.configure(contender.config.method_options)
    shots = [len(at) for at in episode.support]
    seeded = replace(contender.config, seed=config.seed + episode.number)
    adaptation = Adaptation.resolve(method, options, seeded, clip.source.adapt_defaults, shots)
    model = clip.with_additions(adaptation.additions, copied=True)
    pretrained = model.snapshot()
    support = Chosen(images, [i for at in episode.support for i in at])
    labels = [c for c, count in enumerate(shots) for _ in range(count)]
    adaptation.run(model, episode.classes, support, labels, pretrained)
    finetuned = model.snapshot()
    measured = {}
    for alpha in config.alphas:
        model.load_state(interpolate(pretrained, finetuned, alpha))
        measured[f"{alpha:g}"] = _accuracy(model, images, episode, adaptation.templates, config.batch_size)
    return measured


def _accuracy(model: Clip, images: Images, episode: Episode, templates: Templates, batch_size: int) -> float:
    t, z = scoring.texts(model, episode.classes, templates)
    at = [i for part in episode.query for i in part]
    u = scoring.image_embeddings(model, Viewed(images, model.geometry), at, batch_size, z)
    actual = [name for name, part in zip(episode.classes, episode.query, strict=True) for _ in part]
    return accuracy(scoring.best_names(u, t, episode.classes), actual).value


def _require_same_settings(config: EpisodesConfig, clip: Clip, images: Sequence[str]) -> None:
    """Write down what the results depend on beside a contender's settings; a folder of other results is refused."""
    source = clip.source  # but for its name: a folder that moved holds the same model
    record = {
        "clipfit": __version__, "weights": source.sha256, "model_cfg": source.model_cfg,
        "preprocess_cfg": source.preprocess_cfg, "adapt_defaults": source.adapt_defaults,
        "device": clip.device.type, "precision": clip.precision,
        "images": hashlib.sha256("\n".join(images).encode()).hexdigest(), "way": config.way, "query": config.query,
        "most_shots": config.room, "seed": config.seed, "alphas": config.alphas,
    }  # fmt: skip
    file = config.output / RECORD
    if not file.exists() and not any(config.output.glob("*-shot--*.json")):
        files.make_folder(config.output)
        files.write_json(file, record)
    found, mine = files.read_json(file), json.loads(json.dumps(record))
    other = [key for key in mine if found.get(key) != mine[key]]
    if other:
        raise UsageError(f"{config.output} holds episodes of other {', '.join(other)}: choose another --output.")


def path_of(output: Path, spec: str, shots: int, number: int) -> Path:
    """Where an episode's result is kept, below the folder of all."""
    name = re.sub(r"[^\w+=.,-]", "-", spec.replace(":", "--"))
    if name != spec.replace(":", "--"):  # two specs must not share a file
        name += f"-{hashlib.sha256(spec.encode()).hexdigest()[:8]}"
    return output / f"{name}--{shots}-shot--{number:05d}.json"


def _rows(config: EpisodesConfig) -> Iterator[EpisodeRow]:
    """Means over the episodes that are finished, gains over those that zero-shot has finished too."""
    for shots in config.shots:
        measured = {spec: finished(config.output, spec, shots, config.episodes) for spec in config.contenders}
        plain = {n: r["0"] for n, r in measured.get(ZERO_SHOT, {}).items()}
        for spec, results in measured.items():
            for alpha in next(iter(results.values()), {}):
                values = {n: r[alpha] for n, r in results.items()}
                gains = [value - plain[n] for n, value in values.items() if n in plain and spec != ZERO_SHOT]
                yield EpisodeRow(spec, shots, float(alpha), estimate(list(values.values())), estimate(gains))


def finished(output: Path, spec: str, shots: int, count: int) -> dict[int, dict[str, float]]:
    """Of the first `count` episodes those that are finished: number → α → accuracy."""
    paths = {n: path_of(output, spec, shots, n) for n in range(count)}
    return {n: files.read_json(path)["accuracy"] for n, path in paths.items() if path.exists()}
