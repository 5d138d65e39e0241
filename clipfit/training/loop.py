"""The one optimisation loop. It knows no method and no terminal."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipfit.data.images import Images
from clipfit.errors import NonFiniteError
from clipfit.events import StepReport
from clipfit.methods import Group, Objective
from clipfit.methods.batch import Batch
from clipfit.model.clip import Clip
from clipfit.streams import Rows
from clipfit.training.input import Schedule
from clipfit.training.state import Trained


def train(
    clip: Clip,
    objective: Objective,
    images: Images,
    schedule: Schedule,
    on_step: Callable[[StepReport], None] = lambda report: None,
    more: Sequence[Group] = (),
) -> None:
    """Minimise the objective over the trainable weights of the model and the objective's own, in place.

    AdamW (SGD for what asks for it) with cosine annealing to zero over all steps. `more`: what is trained beyond the
    weights and the objective's own parameters.

    Raises:
        NonFiniteError: a loss is not a finite number.
    """
    recipe, steps = schedule.recipe, schedule.steps
    trained = Trained.of(clip, [*objective.groups, *more], recipe)
    for step in range(steps):
        annealed = 0.5 * (1 + math.cos(math.pi * step / steps))
        epoch, views = schedule.step(step)
        x = clip.normalize(schedule.crops(images, epoch, views, clip.image_size))  # (B, 3, H, W)
        batch = Batch.of(x, [schedule.labels[view % len(images)] for view in views], Rows(step, tuple(views)))
        terms = objective.terms(objective.embed(batch), batch)
        total = sum((term.weight * term.value for term in terms.values()), torch.zeros((), device=clip.device))
        losses = {name: term.value.item() for name, term in terms.items()}  # a CPU–GPU sync
        if not math.isfinite(total.item()):
            raise NonFiniteError(f"step {step + 1}: the loss is not finite ({losses}); try a lower --learning-rate.")
        trained.zero_grad()
        total.backward()
        trained.step(annealed)
        rate = recipe.learning_rate * annealed
        on_step(StepReport(step + 1, steps, epoch + 1, len(views), rate, losses, total.item()))


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
