"""The one optimisation loop. It knows no method and no terminal."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipfit.config import Recipe
from clipfit.data.augment import random_resized_crop
from clipfit.data.images import Images
from clipfit.errors import NonFiniteError
from clipfit.events import StepReport
from clipfit.methods import Group, Objective
from clipfit.methods.batch import Batch
from clipfit.model.clip import Clip
from clipfit.training.state import Trained


def train(
    clip: Clip,
    objective: Objective,
    images: Images,
    labels: Sequence[int],
    recipe: Recipe,
    seed: int,
    on_step: Callable[[StepReport], None] = lambda report: None,
    more: Sequence[Group] = (),
) -> None:
    """Minimise the objective over the trainable weights of the model and the objective's own, in place.

    AdamW (SGD for what asks for it) with cosine annealing to zero over all steps; the order of images and their crops
    come from `seed`. `more`: what is trained beyond the weights and the objective's own parameters.

    Raises:
        NonFiniteError: a loss is not a finite number.
    """
    trained = Trained.of(clip, [*objective.groups, *more], recipe)
    steps = recipe.epochs * math.ceil(len(images) / recipe.batch_size)
    for step, (epoch, chosen) in enumerate(batches(len(images), recipe, seed)):
        annealed = 0.5 * (1 + math.cos(math.pi * step / steps))
        x = clip.normalize(views(images, chosen, clip.image_size, recipe, seed, step))  # (B, 3, H, W)
        batch = Batch.of(x, [labels[i] for i in chosen])
        terms = objective.terms(objective.embed(batch), batch)
        total = sum((term.weight * term.value for term in terms.values()), torch.zeros((), device=clip.device))
        losses = {name: term.value.item() for name, term in terms.items()}  # a CPU–GPU sync
        if not math.isfinite(total.item()):
            raise NonFiniteError(f"step {step + 1}: the loss is not finite ({losses}); try a lower --learning-rate.")
        trained.zero_grad()
        total.backward()
        trained.step(annealed)
        rate = recipe.learning_rate * annealed
        on_step(StepReport(step + 1, steps, epoch + 1, len(chosen), rate, losses, total.item()))


@contextlib.contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Deterministic kernels where torch has them; on the CPU all are, for a fixed number of threads."""
    # under warn_only the fused attention kernels of CUDA stay as they are: sums in any order in the backward pass
    attention = sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else contextlib.nullcontext()
    filling: Any = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode(), filling.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    filling.fill_uninitialized_memory = False  # costs time, not bits
    try:
        with attention:
            yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        filling.fill_uninitialized_memory = before[1]


def batches(count: int, recipe: Recipe, seed: int) -> Iterator[tuple[int, list[int]]]:
    """(epoch from 0, indices of a batch): every image once an epoch, in an order of its own each epoch."""
    for epoch in range(recipe.epochs):
        order = torch.randperm(count, generator=_generator(seed, 0, epoch)).tolist()
        for start in range(0, count, recipe.batch_size):
            yield epoch, order[start : start + recipe.batch_size]


def views(
    images: Images, batch: Iterable[int], size: tuple[int, int], recipe: Recipe, seed: int, step: int
) -> torch.Tensor:
    """Random resized crops of the batch's images: (B, 3, H, W) uint8."""
    generator = _generator(seed, 1, step)
    return torch.stack(
        [random_resized_crop(images[i], size, recipe.crop_scale, recipe.crop_ratio, generator) for i in batch]
    )


def _generator(seed: int, stream: int, index: int) -> torch.Generator:
    """An independent stream for every purpose and step, so that any step can be repeated on its own."""
    mixed = torch.Generator().manual_seed(seed)
    base = int(torch.randint(2**40, (), generator=mixed))
    return torch.Generator().manual_seed((base + 2 * index + stream) % 2**63)
