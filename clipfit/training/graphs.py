"""Steps' gradients as CUDA graphs: what a step launches is recorded for every shape of batch, and then launched whole.

A step is thousands of kernels, most of them so small that a GPU waits for the processor to launch the next. Recorded,
they are the same kernels of the same numbers.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from clipfit import interrupts, ranks
from clipfit.errors import first_line
from clipfit.methods import Objective
from clipfit.methods.batch import Batch
from clipfit.model import text_tower

ROOM = 0.1  # share of the memory that recordings leave
MOST = 32  # shapes: a batch may have fewer classes than images, and the text of a long name more tokens
COLUMNS = ("images", "labels", "present", "classes", "counts")  # the tensors of a Batch

Losses = dict[str, torch.Tensor]
Gradient = Callable[[Batch, torch.Tensor], Losses]
Replay = Callable[[], None]


@dataclass(frozen=True)
class Recorded:
    """The gradient of one shape. `batch`, `tokens`: where it reads its inputs; `losses`: where they are afterwards."""

    replay: Replay
    batch: Batch
    tokens: torch.Tensor
    losses: Losses

    def __call__(self, batch: Batch, tokens: torch.Tensor) -> Losses:
        for name in COLUMNS:
            getattr(self.batch, name).copy_(getattr(batch, name), non_blocking=True)
        self.tokens.copy_(tokens, non_blocking=True)
        self.replay()
        return self.losses


class Recorder:
    """Records the gradient of whole batches when their shape comes for the second time.

    On the current GPU alone, for what runs on another is not recorded; not where adapters draw a dropout of its own for
    every step, nor where several processes wait for one another, nor with a text tower of the transformers library.
    """

    def __init__(
        self,
        objective: Objective,
        parameters: Sequence[torch.nn.Parameter],
        gradient: Gradient,
        say: Callable[[str], None] = lambda text: None,
    ):
        """`gradient`: of a batch beside the tokens of its classes, added to the parameters; losses are not read.

        `say` is told where there is an end to it.
        """
        self._objective, self._parameters, self._gradient, self._say = objective, parameters, gradient, say
        clip = objective.clip
        plain = clip.adapters is None and text_tower.own(clip.model) is not None  # others may wait for the GPU
        self.works = plain and ranks.here().count == 1 and _is_current(clip.device)
        self._seen: Counter[tuple[Any, ...]] = Counter()
        self._recorded: dict[tuple[Any, ...], Recorded] = {}
        self._images: dict[torch.Size, torch.Tensor] = {}  # where all shapes of so many images read them
        self._gradients: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._pool: Any = None

    def __call__(self, batch: Batch) -> Losses | None:
        """Losses, their gradient in the parameters, which have none before; None where it is to be taken as usual."""
        if not self.works:
            return None
        objective = self._objective
        tokens = objective.clip.placed(objective.tokens[list(objective.classes(batch).numbers)])
        shape = (batch.images.shape, batch.present.shape, tokens.shape)
        self._seen[shape] += 1
        if shape not in self._recorded:
            if self._seen[shape] == 1 or len(self._recorded) == MOST:
                return None
            found = self._recordable(batch, tokens)
            if isinstance(found, str):
                self.stop(found)  # here, for what was raised held what it was raised from
                return None
            self._recorded[shape] = found
        losses = self._recorded[shape](batch, tokens)
        self._put_gradients()
        return losses

    def stop(self, why: str) -> None:
        """Record no more, and give back what it holds."""
        self.works = False
        self._say(f"steps are no longer recorded as CUDA graphs ({why}): the same numbers, in more time")
        for held in (self._recorded, self._images, self._gradients):
            held.clear()
        self._pool = None
        for parameter in self._parameters:
            parameter.grad = None
        gc.collect()
        torch.cuda.empty_cache()

    @property
    def holds(self) -> bool:
        """Whether there is memory that `stop` gives back."""
        return bool(self._recorded)

    def _recordable(self, batch: Batch, tokens: torch.Tensor) -> Recorded | str:
        """Why not, where a kernel cannot be recorded, or little memory would be left for all else."""
        try:
            with interrupts.waiting():  # nothing can be said or saved in the middle of it
                found = self._record(batch, tokens)
        except RuntimeError as error:
            return first_line(error)
        return found if self._leaves_room() else f"less than {ROOM:.0%} of the memory would be left"

    def _record(self, batch: Batch, tokens: torch.Tensor) -> Recorded:
        images = self._images.setdefault(batch.images.shape, batch.images.clone())
        own = replace(batch, **{name: getattr(batch, name).clone() for name in COLUMNS[1:]}, images=images)
        self._gradient(own, tokens)  # some kernels make themselves ready when a shape is first computed
        moved = {p: p.grad for p in self._parameters if p.grad is not None}
        self._gradients = self._gradients or moved
        if moved.keys() != self._gradients.keys():
            raise RuntimeError("other parameters have a gradient than before")
        self._put_gradients()

        def gradient() -> Losses:
            torch._foreach_zero_(list(self._gradients.values()))
            return self._gradient(own, tokens)

        replay, losses = self._recording(gradient)
        return Recorded(replay, own, tokens, losses)

    def _recording(self, work: Callable[[], Losses]) -> tuple[Replay, Losses]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                losses = work()
        finally:
            torch.cuda.set_stream(stream)  # torch leaves it where a recording fails
        self._pool = graph.pool()
        return graph.replay, losses

    def _leaves_room(self) -> bool:
        free, whole = torch.cuda.mem_get_info()
        return free > ROOM * whole

    def _put_gradients(self) -> None:
        for parameter, gradient in self._gradients.items():
            parameter.grad = gradient


def _is_current(device: torch.device) -> bool:
    return device.type == "cuda" and (device.index is None or device.index == torch.cuda.current_device())
