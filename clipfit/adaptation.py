"""What is done to a model, and doing it: the part of an adaptation that knows no files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from clipfit.config import AdaptConfig, Recipe, settings
from clipfit.config.lora import LoraSettings
from clipfit.data.augment import Enough
from clipfit.data.images import Images
from clipfit.errors import DataError, UsageError
from clipfit.events import StepReport
from clipfit.methods import Group, Method, Objective, ShotCounts, Task
from clipfit.model import checkpointing, lora, sharding, templates
from clipfit.model.clip import Clip
from clipfit.model.named import Additions
from clipfit.prompts import Templates, prompts
from clipfit.training import loop
from clipfit.training.input import Schedule
from clipfit.training.saving import Saving


@dataclass(frozen=True)
class Adaptation:
    """A method with its options, how the weights move, and which: all of them, or adapters (LoRA)."""

    method: Method
    options: Any
    recipe: Recipe
    adapters: LoraSettings | None
    shots_per_class: int  # of the class that has most
    seed: int
    learn_context: bool = False
    balance: bool = False
    listed: Templates | None = None  # whose mean text a class is where images are named; None: the recipe's template

    @classmethod
    def resolve(
        cls,
        method: Method,
        options: Any,
        config: AdaptConfig,
        model_defaults: Mapping[str, Any],
        counts: Sequence[int],
    ) -> Adaptation:
        """Fill in what was not given: from the paper, from the model's own settings, and from the number of shots.

        Args:
            model_defaults: Source.adapt_defaults. counts: shots of each class.

        Raises:
            DataError: the file of templates is not as it must be. UsageError: a list of them beside learnt context.
        """
        listed = _listed(config, model_defaults)
        shots = ShotCounts(max(counts), sum(counts), config.recipe.get("batch_size"))
        if config.tuning == "full":
            adapters, lora_recipe = None, None
        else:
            adapters, lora_recipe = lora_settings(method, config), method.lora.recipe(shots)
        recipe = Recipe.resolved(model_defaults, method.name, config.recipe, lora_recipe)
        if listed and config.recipe.get("template") is None:
            recipe = recipe.changed({"template": listed[0]})
        if listed == (recipe.template,):
            listed = None
        if listed and config.context:
            raise UsageError(
                f"--context learns vectors in place of the words of {recipe.template!r} alone, but other templates are "
                "listed too: leave out --context or --templates, or give --template alone."
            )
        most = shots.of_largest_class
        return cls(method, options, recipe, adapters, most, config.seed, config.context, config.balance, listed)

    @property
    def templates(self) -> Templates:
        """Those whose mean text a class is where images are named; training takes the recipe's alone."""
        return self.listed or (self.recipe.template,)

    @property
    def additions(self) -> Additions:
        """What the model must have beyond open_clip's CLIP."""
        words = self.recipe.template.split("{}")[0] if self.learn_context else None
        return Additions(self.method.edits(self.options), words)

    def enough(self, clip: Clip) -> Enough:
        """What training needs of a picture: it is kept reduced to that where it is much larger."""
        return Enough.of(clip.image_size, self.recipe.crop_scale, self.recipe.crop_ratio)

    @property
    def tuning(self) -> str:
        return "full" if self.adapters is None else "lora"

    def run(
        self,
        clip: Clip,
        names: Sequence[str],
        images: Images,
        labels: Sequence[int],
        pretrained: Mapping[str, torch.Tensor] | None = None,
        on_step: Callable[[StepReport], None] = lambda report: None,
        say: Callable[[str], None] = lambda text: None,
        saving: Saving | None = None,
    ) -> list[StepReport]:
        """Adapt a model to images of the classes `names`, in place; adapters are merged into plain weights at the end.

        Context vectors are trained as in ATHA's code, by SGD at 2e-3 with momentum 0.9 and decay 5e-4.

        Args:
            pretrained: the model's weights as they are now, where a copy is kept anyway; it is only read.
            say, saving: see loop.train.

        Raises:
            NonFiniteError: a loss is not a finite number. UsageError: the memory does not hold one image.
            ModelError: a tower without what LoRA adapts, or without blocks where they are to be checkpointed.
        """
        tokens = clip.tokenize(prompts(names, self.recipe.template))
        task = Task(clip, tokens, self.tuning, self.shots_per_class, pretrained)
        objective = self.method.build(task, self.options)
        context = [] if clip.context is None else [Group({"clipfit.context": clip.context}, 2e-3, 5e-4, momentum=0.9)]
        with (
            self._adapters_on(clip), self._in_shares(clip, objective), self._checkpointed(clip),
            loop.deterministic(clip.device),
        ):  # fmt: skip
            schedule = Schedule(labels, self.recipe, self.seed, self.balance)
            return loop.train(clip, objective, images, schedule, on_step, say, context, saving)

    def require_distinct(self, clip: Clip, names: Sequence[str]) -> None:
        """Raises DataError for two classes whose texts are the same to the model: cut at its context, or by tokens."""
        first: dict[tuple[int, ...], str] = {}
        for name, row in zip(names, clip.tokenize(prompts(names, self.recipe.template)).tolist(), strict=True):
            other = first.setdefault(tuple(row), name)
            if other != name:
                raise DataError(
                    f"classes {other[:60]!r} and {name[:60]!r} are the same {len(row)} tokens to this model, "
                    "which cuts longer texts: give one of them another name with --classes, or a shorter --template."
                )

    def require_blocks(self, clip: Clip) -> None:
        """Raises ModelError where a tower lacks the blocks asked for, UsageError where they cannot be shared out."""
        if self.recipe.gradient_checkpointing:
            checkpointing.require_blocks(clip.model)
        if self.recipe.shard:
            sharding.require_shares(clip.model, self.tuning)

    def _in_shares(self, clip: Clip, objective: Objective) -> contextlib.AbstractContextManager[None]:
        return sharding.sharded(clip, objective.teacher) if self.recipe.shard else contextlib.nullcontext()

    def _checkpointed(self, clip: Clip) -> contextlib.AbstractContextManager[None]:
        return checkpointing.checkpointed(clip) if self.recipe.gradient_checkpointing else contextlib.nullcontext()

    def _adapters_on(self, clip: Clip) -> contextlib.AbstractContextManager[None]:
        if self.adapters is None:
            return contextlib.nullcontext()
        return lora.adapted(clip, self.adapters, self.seed)


def _listed(config: AdaptConfig, model_defaults: Mapping[str, Any]) -> Templates | None:
    """The list that is given; where neither it nor a template is, that of the run which is adapted on."""
    if config.templates is not None:
        return templates.read(config.templates)
    inherited = model_defaults.get("templates")
    return tuple(inherited) if inherited and config.recipe.get("template") is None else None


def lora_settings(method: Method, config: AdaptConfig) -> LoraSettings:
    """The method's own under low-rank tuning, but for what is given. Raises UsageError."""
    return replace(method.lora.settings, **settings(LoraSettings, config.lora, "LoRA"))
