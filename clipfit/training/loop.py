"""The one optimisation loop. It knows no method and no terminal."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipfit import interrupts, ranks
from clipfit.data.images import Images
from clipfit.events import StepReport
from clipfit.methods import Group, Objective
from clipfit.methods.batch import Batch
from clipfit.model import devices
from clipfit.model.clip import Clip
from clipfit.streams import Rows
from clipfit.training.input import Early, Schedule
from clipfit.training.saving import Saving
from clipfit.training.state import Trained
from clipfit.training.step import Fitting

KERNELS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def train(
    clip: Clip,
    objective: Objective,
    images: Images,
    schedule: Schedule,
    on_step: Callable[[StepReport], None] = lambda report: None,
    say: Callable[[str], None] = lambda text: None,
    more: Sequence[Group] = (),
    saving: Saving | None = None,
) -> list[StepReport]:
    """Minimise the objective over the trainable weights of the model and the objective's own, in place.

    AdamW (SGD for what asks for it) with cosine annealing to zero over all steps.

    Args:
        say: is told what one should know. more: what is trained beyond the weights and the objective's own parameters.
        saving: where a saved state is gone on from, and the state kept as training goes on.

    Returns:
        A report of every step, of those done before a saved state too (`on_step` is not told of these again).

    Raises:
        NonFiniteError: a loss is not a finite number. UsageError: the memory does not hold one image.
        ClipfitError: several processes end with different weights.
    """
    recipe, steps = schedule.recipe, schedule.steps
    trained = Trained.of(clip, [*objective.groups, *more], recipe)
    reports = saving.restore(trained) if saving else []
    fewer = reports[-1].micro_batch if reports else None
    fitting = Fitting(objective, fewer or recipe.micro_batch, say)
    keeping = saving.kept(trained, reports) if saving else contextlib.nullcontext()
    inputs = schedule.inputs(images, clip.image_size, len(reports), clip.device)
    with keeping, ranks.noticing(), contextlib.closing(inputs):
        early = Early(inputs)
        for step, epoch, views, own, crops in early:
            annealed = 0.5 * (1 + math.cos(math.pi * step / steps))
            labels = [schedule.labels[view % len(images)] for view in views]
            batch = Batch.of(clip.normalize(crops), labels, Rows(step, tuple(views)), own)
            loss = fitting.accumulate(batch, trained.zero_grad, early.prepare)
            rate = recipe.learning_rate * annealed
            fewer = fitting.size if fitting.size != recipe.micro_batch else None
            report = StepReport(step + 1, steps, epoch + 1, len(views), rate, loss.terms, loss.total, fewer)
            with interrupts.waiting():  # a step is done whole and reported, or not at all
                trained.step(annealed)
                reports.append(report)
            on_step(report)
            if saving and saving.due(step + 1, steps):
                saving.save(trained, reports)
    trained.zero_grad()
    ranks.here().require_same(list(trained.parameters.values()))
    return reports


@contextlib.contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Deterministic kernels where torch has them; on the CPU all are, for a fixed number of threads.

    On a GPU by torch's strict mode, in which alone the fused kernels of attention add up in a fixed order backward;
    see `step.settle_for_warnings` for what has no such kernel.
    """
    strict = device.type == "cuda"
    attention = sdpa_kernel(list(KERNELS)) if strict else contextlib.nullcontext()  # puts back what is changed within
    filling: Any = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode(), filling.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    filling.fill_uninitialized_memory = False  # costs time, not bits
    try:
        with attention, devices.current(device):  # on which alone steps are recorded
            yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        filling.fill_uninitialized_memory = before[1]
