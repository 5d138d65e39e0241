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
from clipfit.methods import Extra, Objective
from clipfit.model.clip import Clip


def train(
    backbone: Clip,
    objective: Objective,
    images: Images,
    labels: Sequence[int],
    recipe: Recipe,
    seed: int,
    on_step: Callable[[StepReport], None] = lambda report: None,
    beside: Sequence[Extra] = (),
) -> None:
    """Minimise the objective over the trainable weights of the backbone and the objective's own, in place.

    AdamW (SGD for what asks for it) with cosine annealing to zero over all steps; the order of images and their crops
    come from `seed`. `beside`: what is trained beyond the weights and the objective's own parameters.

    Raises:
        NonFiniteError: a loss is not a finite number.
    """
    optimisers = optimisers_of(backbone, [*objective.extra, *beside], recipe)
    groups = [group for optimiser in optimisers for group in optimiser.param_groups]
    peaks = [group["lr"] for group in groups]
    steps = recipe.epochs * math.ceil(len(images) / recipe.batch_size)
    for step, (epoch, batch) in enumerate(batches(len(images), recipe, seed)):
        annealed = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * annealed
        x = backbone.normalize(views(images, batch, backbone.image_size, recipe, seed, step))  # (B, 3, H, W)
        y = torch.tensor([labels[i] for i in batch], device=backbone.device)  # (B,)
        terms = objective(x, y)
        total = sum((term.weight * term.value for term in terms.values()), torch.zeros((), device=backbone.device))
        losses = {name: term.value.item() for name, term in terms.items()}
        if not math.isfinite(total.item()):
            raise NonFiniteError(f"step {step + 1}: the loss is not finite ({losses}); try a lower --learning-rate.")
        for optimiser in optimisers:
            optimiser.zero_grad(set_to_none=True)
        total.backward()
        for optimiser in optimisers:
            optimiser.step()
        rate = recipe.learning_rate * annealed
        on_step(StepReport(step + 1, steps, epoch + 1, len(batch), rate, losses, total.item()))


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


def optimisers_of(backbone: Clip, extra: Sequence[Extra], recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW for the weights and most of what is trained beside them; SGD with momentum for what asks for it."""
    by_adamw = [e for e in extra if e.momentum is None]
    optimisers: list[torch.optim.Optimizer] = [torch.optim.AdamW(parameter_groups(backbone, by_adamw, recipe))]
    for e in extra:
        if e.momentum is not None:
            rate = e.rate(recipe.learning_rate)
            optimisers.append(torch.optim.SGD(e.parameters, rate, e.momentum, weight_decay=e.weight_decay))
    return optimisers


def parameter_groups(backbone: Clip, extra: Iterable[Extra], recipe: Recipe) -> list[dict[str, object]]:
    """The recipe's weight decay on matrices; none on norms and biases (vectors and scalars)."""
    moving = [p for p in backbone.model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in moving if p.ndim >= 2], [p for p in moving if p.ndim < 2]
    groups: list[dict[str, object]] = [
        {"params": matrices, "lr": recipe.learning_rate, "weight_decay": recipe.weight_decay},
        {"params": vectors, "lr": recipe.learning_rate, "weight_decay": 0.0},
    ]
    for e in extra:
        rate = e.rate(recipe.learning_rate)
        groups.append({"params": list(e.parameters), "lr": rate, "weight_decay": e.weight_decay})
    return groups


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
    crop = lambda i: random_resized_crop(images[i], size, recipe.crop_scale, recipe.crop_ratio, generator)  # noqa: E731
    return torch.stack([crop(i) for i in batch])


def _generator(seed: int, stream: int, index: int) -> torch.Generator:
    """An independent stream for every purpose and step, so that any step can be repeated on its own."""
    mixed = torch.Generator().manual_seed(seed)
    base = int(torch.randint(2**40, (), generator=mixed))
    return torch.Generator().manual_seed((base + 2 * index + stream) % 2**63)
