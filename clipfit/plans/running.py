"""Doing a cell: what it trains on, what it is measured on, and both."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from clipfit.config.plan import BenchmarkConfig, Plan
from clipfit.data.copies import Known, first_of_each, identify
from clipfit.data.images import ImageStore, Memory, Views, decoded, grey_bits
from clipfit.data.layout import Sample
from clipfit.ensemble import interpolate
from clipfit.errors import ClipfitError, UsageError
from clipfit.events import Progress
from clipfit.measure import scoring
from clipfit.model.clip import Clip
from clipfit.plans import episodes
from clipfit.plans.cells import Cell, Result, identity_of, in_episodes
from clipfit.plans.contenders import Contender
from clipfit.plans.sets import LabelledSet, Part, counts_of
from clipfit.version import __version__

SAME_GRADIENT = ("micro_batch", "gradient_checkpointing", "shard")  # settings that change what a result costs alone
TRAINING = 2  # to be raised where the same settings train otherwise: cells of before are not mixed with those of now
LOOKED_AT = 2000  # training images, for the depth of greys: ImageNet has a million
STORES = 4  # decoded test images of so many parts are kept


@dataclass(frozen=True)
class Work:
    """What a cell trains on, and what it is measured on."""

    classes: tuple[str, ...]
    shots: tuple[Sample, ...]
    parts: tuple[Part, ...]


class Bench:
    """A plan's sets and its model; does cells, and knows what their results depend on."""

    def __init__(
        self,
        plan: Plan,
        contenders: Mapping[str, Contender],
        sets: Mapping[str, LabelledSet],
        targets: Mapping[str, LabelledSet],
        clip: Clip,
        config: BenchmarkConfig,
        progress: Progress,
    ):
        self.plan, self.contenders, self.sets, self.targets = plan, contenders, sets, targets
        self.clip, self._config = clip, config
        self._say = progress.say
        self._prints = {name: found.fingerprint() for name, found in {**sets, **targets}.items()}
        self._bits = {
            name: grey_bits(found.images.train[:: 1 + len(found.images.train) // LOOKED_AT])
            for name, found in sets.items()
        }
        self._pools: dict[str, list[Sample]] = {}
        self._decoded = Decoded(config.cache_bytes)
        self._identities: dict[tuple[str, str, int | None, str | None], str] = {}
        self._possible: set[tuple[str, str]] = set()  # rows of sets that this model can be adapted by

    # ---- what a cell is

    def work(self, cell: Cell) -> Work:
        """The protocols, one after another (arXiv 2407.04003, section 4; 2605.29776)."""
        found, figure = self.sets[cell.set], "accuracy"
        if in_episodes(self.plan):
            return self._episode(cell)
        if self.plan.protocol == "bng":  # train on the base half, test each half within its own classes
            return self._training(cell, found.base, found.halves())
        if self.plan.protocol == "cdg":  # train on the base half, test on the halves of other sets
            others = self.targets.items()
            return self._training(cell, found.base, [p for name, other in others for p in other.halves(f"{name} ")])
        parts = [found.part(figure, found.trained)]
        if self.plan.protocol == "dg":  # the same classes in other domains; each within its own classes
            parts[0] = found.part(cell.set, found.trained)
            parts += [other.part(name, other.classes) for name, other in self.targets.items()]
        return self._training(cell, found.trained, parts)

    def _training(self, cell: Cell, classes: tuple[str, ...], parts: Sequence[Part]) -> Work:
        plain = self.contenders[cell.method].values is None
        shots = () if plain else self.sets[cell.set].shots(classes, cell.shots, cell.seed or 0)
        return Work(classes, shots, tuple(parts))

    def _episode(self, cell: Cell) -> Work:
        pool, number = self._pool(cell.set), cell.seed or 0
        drawn = episodes.draw([s.label for s in pool], self.plan, cell.shots or 0, number)
        shots = tuple(pool[i] for at in drawn.support for i in at)
        queries = tuple(pool[i] for at in drawn.query for i in at)
        return Work(drawn.classes, shots, (Part(cell.set, "accuracy", queries, drawn.classes),))

    def _pool(self, name: str) -> list[Sample]:
        """All images of a set, copies of one picture once: none is shot and query at a time, under two names."""
        if name not in self._pools:
            images = self.sets[name].images
            samples = [*images.train, *(images.test or ())]
            distinct = first_of_each([found.content for found in identify(samples, Known.of([]), grey_bits(samples))])
            if len(distinct) < len(samples):
                self._say(f"{name}: {len(samples) - len(distinct)} images are copies of others and were left out")
            self._pools[name] = [samples[i] for i in distinct]
        return self._pools[name]

    def identity(self, cell: Cell) -> str:
        """Of all that its result depends on but its seed: another plan, model, set or version has other cells."""
        plain, found = self.contenders[cell.method].values is None, self.sets[cell.set]
        listed = None if plain or in_episodes(self.plan) else found.drawn(cell.shots, cell.seed or 0)
        key = (cell.set, cell.method, cell.shots, listed)
        if key not in self._identities:  # episodes are thousands of cells
            self._identities[key] = self._identity(cell, listed)
        return self._identities[key]

    def _identity(self, cell: Cell, listed: str | None) -> str:
        plan, source, contender = self.plan, self.clip.source, self.contenders[cell.method]
        found = self.sets[cell.set]
        settings = None
        if contender.values is not None:
            counts = [cell.shots] if cell.shots else counts_of(found.images.train, found.classes)
            try:
                resolved = contender.resolved(source.adapt_defaults, found.row.settings, found.templates, counts, 0)
                if (cell.set, cell.method) not in self._possible:
                    resolved.require_blocks(self.clip.with_additions(resolved.additions))
                    self._possible.add((cell.set, cell.method))
            except UsageError as error:
                raise UsageError(f"set {cell.set}, row {cell.method}: {error}") from None
            settings = {**asdict(resolved), "method": resolved.method.name}
            settings["recipe"] = {k: v for k, v in settings["recipe"].items() if k not in SAME_GRADIENT}
        drawn = [plan.way, plan.query, max(plan.shots), plan.seeds[0]] if in_episodes(plan) else listed
        targets = {name: [self._prints[name], other.templates] for name, other in self.targets.items()}
        return identity_of({
            "clipfit": __version__, "training": TRAINING, "weights": source.sha256, "model_cfg": source.model_cfg,
            "preprocess_cfg": source.preprocess_cfg, "adapt_defaults": source.adapt_defaults,
            "device": self.clip.device.type, "precision": self.clip.precision, "protocol": plan.protocol,
            "set": self._prints[cell.set], "templates": found.templates, "targets": targets, "drawn": drawn,
            "alphas": plan.alphas if settings else None, "settings": settings,
        })  # fmt: skip

    # ---- doing it

    def run(self, cell: Cell) -> Result:
        """Adapt, and measure at every α; zero-shot CLIP at 0 alone.

        Raises:
            ClipfitError: it cannot be done; the cell is named.
        """
        try:
            return self._run(cell, self.work(cell))
        except ClipfitError as error:
            raise type(error)(f"{cell.text}: {error}") from None

    def _run(self, cell: Cell, work: Work) -> Result:
        contender, found, defaults = self.contenders[cell.method], self.sets[cell.set], self.clip.source.adapt_defaults
        labels = {part.figure: torch.tensor(part.labels, dtype=torch.int32) for part in work.parts}

        def measured(clip: Clip) -> dict[str, torch.Tensor]:
            return {part.figure: self._predicted(clip, part, cell.set, contender) for part in work.parts}

        if contender.values is None:
            return Result(0, labels, {0.0: measured(self.clip)})
        counts = counts_of(work.shots, work.classes)
        seed = (cell.seed or 0) + (self.plan.seeds[0] if in_episodes(self.plan) else 0)
        adaptation = contender.resolved(defaults, found.row.settings, found.templates, counts, seed)
        model = self.clip.with_additions(adaptation.additions, copied=True)
        pretrained = model.snapshot()
        adaptation.require_distinct(model, work.classes)
        read = functools.partial(decoded, grey_bits=self._bits[cell.set], enough=adaptation.enough(model))
        images = ImageStore(work.shots, Memory(self._config.cache_bytes), read, skip_bad=None)
        order = {name: i for i, name in enumerate(work.classes)}
        adaptation.run(model, work.classes, images, [order[s.label] for s in work.shots], pretrained)
        finetuned = model.snapshot()
        predicted = {}
        for alpha in self.plan.alphas:
            model.load_state(interpolate(pretrained, finetuned, alpha))
            predicted[alpha] = measured(model)
        return Result(len(work.shots), labels, predicted)

    def _predicted(self, clip: Clip, part: Part, trained: str, contender: Contender) -> torch.Tensor:
        """The number of the class that each image is given: (n,) int32. Another set has its own templates, or these."""
        listed = {**self.sets, **self.targets}[part.of].templates or self.sets[trained].templates
        templates = contender.templates(self.clip.source.adapt_defaults, listed)
        t, z = scoring.texts(clip, part.candidates, templates)  # (C, D)
        images = self._decoded.images(part.samples, self._bits[trained], clip.geometry)
        u = scoring.image_embeddings(clip, images, range(len(images)), self._config.batch_size, z)  # (n, D)
        return (u @ t.T).argmax(1).to(torch.int32)


class Decoded:
    """Test images, decoded and cut to size; those of the last few parts are kept."""

    def __init__(self, budget: int):
        """`budget`: bytes for all of them."""
        self._budget = budget
        self._stores: dict[tuple[int | None, tuple[Sample, ...]], ImageStore] = {}

    def images(self, samples: tuple[Sample, ...], bits: int | None, geometry: Callable[..., Any]) -> ImageStore:
        """Of a part, at a depth of grey."""
        key = (bits, samples)
        found = self._stores.pop(key, None) or ImageStore(
            samples, Memory(self._budget // STORES), Views(geometry, bits).read, skip_bad=None
        )
        self._stores[key] = found
        while len(self._stores) > STORES:
            self._stores.pop(next(iter(self._stores)))
        return found
