"""What is done to a model, and doing it: the part of an adaptation that knows no files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from clipfit import methods
from clipfit.config import AdaptConfig, Recipe, settings
from clipfit.config.lora import LoraSettings
from clipfit.data.images import Images
from clipfit.events import StepReport
from clipfit.methods import Method
from clipfit.model import lora
from clipfit.model.clip import Additions, Clip
from clipfit.prompts import prompts
from clipfit.training import loop


@dataclass(frozen=True)
class Plan:
    """A method with its options, how the weights move, and which: all of them, or adapters (LoRA)."""

    method: Method
    options: Any
    recipe: Recipe
    adapters: LoraSettings | None
    shots_per_class: int
    learn_context: bool = False

    @property
    def additions(self) -> Additions:
        """What the model must have beyond open_clip's CLIP."""
        words = self.recipe.template.split("{}")[0] if self.learn_context else None
        return Additions(self.method.edits(self.options), words)

    @property
    def tuning(self) -> str:
        return "full" if self.adapters is None else "lora"

    def record(self) -> dict[str, Any]:
        """What config.json says of it."""
        return {
            "method": self.method.name,
            "method_options": asdict(self.options),
            "tuning": self.tuning,
            "lora": asdict(self.adapters) if self.adapters else None,
            "recipe": asdict(self.recipe),
        }


def plan(method: Method, options: Any, config: AdaptConfig, own: Mapping[str, Any], counts: Sequence[int]) -> Plan:
    """Fill in what was not given: from the paper, from the model's own settings, and from the number of shots.

    Args:
        own: the model's own (Source.adapt_defaults). counts: shots of each class.
    """
    most = max(counts)
    if config.tuning == "full":
        recipe = Recipe.resolved(own, method.name, config.recipe)
        return Plan(method, options, recipe, None, most, config.context)
    lora_recipe = method.lora.recipe(most, sum(counts), config.recipe.get("batch_size"))
    recipe = Recipe.resolved(own, method.name, config.recipe, lora_recipe)
    return Plan(method, options, recipe, adapters(method, config), most, config.context)


def adapters(method: Method, config: AdaptConfig) -> LoraSettings:
    """The method's own under low-rank tuning, but for what is given. Raises UsageError."""
    return replace(method.lora.settings, **settings(LoraSettings, config.lora, "LoRA"))


def fit(
    backbone: Clip,
    plan: Plan,
    names: Sequence[str],
    images: Images,
    labels: Sequence[int],
    seed: int,
    on_step: Callable[[StepReport], None] = lambda report: None,
) -> None:
    """Carry it out on images of the classes `names`, in place; adapters are merged into plain weights at the end.

    Context vectors are trained as in ATHA's code, by SGD at 2e-3 with momentum 0.9 and decay 5e-4.

    Raises:
        NonFiniteError: a loss is not a finite number. ModelError: a tower without what LoRA adapts.
    """
    tokens = backbone.tokenize(prompts(names, plan.recipe.template))
    objective = plan.method.build(methods.Task(backbone, tokens, plan.tuning, plan.shots_per_class), plan.options)
    beside = [] if backbone.context is None else [methods.Extra([backbone.context], 2e-3, 5e-4, momentum=0.9)]
    generator = torch.Generator(backbone.device).manual_seed(seed)
    moving = lora.adapted(backbone.model, plan.adapters, generator) if plan.adapters else contextlib.nullcontext()
    with moving, loop.deterministic(backbone.device):
        loop.train(backbone, objective, images, labels, plan.recipe, seed, on_step, beside)
