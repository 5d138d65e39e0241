"""Several processes at one task: which of them this one is, its share of the rows, and what all of them know.

They are started by torchrun, each with a number. Work is shared out by rows; what is computed of its rows by each is
given to all, and then all do the same with the same numbers. Process 0 leads: it alone writes and shows.

Nothing here imports torch when it is imported: the command line asks who speaks.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from clipfit.errors import ClipfitError, UsageError, first_line
from clipfit.interrupts import Stopped

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what it tells each of them
WAIT = timedelta(days=7)  # for one another: one that has ended is noticed, and one may write for long
SMALL = 2**20  # numbers of a gradient: those below are summed together, for each sum has its latency
TOGETHER = 2**24
COME, SPOKEN, ALL_IS_WELL = "come", "spoken", "all is well"  # messages between processes
PATIENCE = 8.0  # seconds that a process which fails waits for one that has more to say


class MemoryElsewhereError(MemoryError):
    """Another process ran out of memory: what this one does has to be done again, in smaller parts."""


class Lost(Stopped):
    """Another process ended in the middle of what all do together."""

    def __init__(self, reason: str):
        super().__init__(signal.SIGTERM)
        self.why = f"another process ended before its time ({reason})"


@dataclass(frozen=True)
class Ranks:
    """This process, `rank`, among `count` of them. Where there is one, all of this is nothing.

    Whatever is done together (`gather`, `complete`, `sum_gradients`, `told`, `fail`), all do in the same order.
    """

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and shows."""
        return self.rank == 0

    def share(self, rows: int) -> range:
        """The rows of so many that are this process's: contiguous, as even as they go, none where there are few."""
        return range(rows * self.rank // self.count, rows * (self.rank + 1) // self.count)

    def computed(self, rows: int) -> range:
        """Its share of the rows; where it has none the first of all, so that what it computes has its shape."""
        return self.share(rows) or range(1)

    def most(self, rows: int) -> int:
        """How many the process has that has most."""
        return math.ceil(rows / self.count)

    def gather(self, own: Tensor, rows: int) -> Tensor:
        """The rows of all processes, in order.

        Args:
            own: those of this one's share of `rows`; what is beyond its share is left out.

        Raises:
            MemoryElsewhereError: another process called `fail` instead. Lost: one ended.
        """
        if self.count == 1:
            return own
        share = self.share(rows)
        every = own.new_zeros(rows, *own.shape[1:])
        every[share.start : share.stop] = own[: len(share)]
        return self.complete(every)

    def complete(self, rows: Tensor) -> Tensor:
        """All rows, in place, of which each process has some and 0 in place of the others. Raises as `gather`."""
        if self.count > 1:
            self._go_on()
            self._summed(rows)  # beside zeros: to the bit
        return rows

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Each one's gradient becomes the sum of all processes', the same to the bit in all; none where none has one.

        Raises:
            MemoryElsewhereError: another process called `fail` instead. Lost: one ended.
            UsageError: there is no memory to sum in.
        """
        parameters = [parameter for parameter in parameters if not in_shares(parameter)]  # summed on their way
        if self.count == 1:
            return
        self._go_on()
        there = self._anywhere([parameter.grad is not None for parameter in parameters])
        try:
            gradients = [_gradient(p) for p, anywhere in zip(parameters, there, strict=True) if anywhere]
            for together in _bunches(gradients):
                self._sum_together(together)
        except MemoryError as error:
            raise _no_room(error) from error
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":
                raise
            raise _no_room(error) from error

    def told(self, find: Callable[[], T]) -> T:
        """What the first process finds, of JSON's types; the others wait for it and are told."""
        if self.count == 1:
            return find()
        found: T = json.loads(self.all_told(json.dumps(find()) if self.leads else "")[0])
        return found

    def all_told(self, own: str) -> list[str]:
        """What each process has to say, by its number; all are told all of it."""
        if self.count == 1:
            return [own]
        import torch

        letters = torch.frombuffer(bytearray(own.encode() or b" "), dtype=torch.uint8)
        lengths = self.gather(torch.tensor([len(letters)]), self.count).tolist()
        every = torch.zeros(sum(lengths), dtype=torch.uint8)
        first = sum(lengths[: self.rank])
        every[first : first + len(letters)] = letters
        self._summed(every)
        return [part.numpy().tobytes().decode() for part in every.split(lengths)]

    def require_same(self, parameters: Sequence[Tensor]) -> None:
        """Raises ClipfitError where they are not the same in all processes: told by the sum of each."""
        if self.count == 1:
            return
        import torch

        whole = [parameter for parameter in parameters if not in_shares(parameter)]
        sums = torch.stack([parameter.detach().double().sum().cpu() for parameter in whole])
        if not torch.isclose(self.gather(sums[None], self.count), sums, rtol=0, atol=0, equal_nan=True).all():
            raise ClipfitError(
                f"the {self.count} processes came to different weights, which must not be: run them on machines of one "
                "kind, with the same versions, or report it."
            )

    def fail(self) -> None:
        """In place of what the others do together next: they get MemoryElsewhereError."""
        if self.count > 1:
            with contextlib.suppress(MemoryElsewhereError):
                self._go_on(failed=True)

    def _sum_together(self, gradients: Sequence[Tensor]) -> None:
        import torch

        if len(gradients) == 1 and gradients[0].is_contiguous():
            self._summed(gradients[0])
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self._summed(flat)
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def _go_on(self, failed: bool = False) -> None:
        """Before all do something together. Raises MemoryElsewhereError where one has failed."""
        if self._anywhere([failed])[0]:
            raise MemoryElsewhereError("memory ran out in another process")

    def _anywhere(self, flags: Sequence[bool]) -> list[bool]:
        """Of every flag whether it is set in any process; never on a GPU, which would have to be waited for."""
        import torch

        every = torch.tensor(flags, dtype=torch.int32)
        self._summed(every)
        return [bool(count) for count in every.tolist()]

    @staticmethod
    def _summed(tensor: Tensor) -> None:
        from torch import distributed

        if not tensor.numel():
            return
        try:
            distributed.all_reduce(tensor)
        except RuntimeError as error:
            _wait_for_the_first()  # whoever ends the others, ends this one by a signal
            raise Lost(first_line(error)) from error


def _gradient(parameter: Tensor) -> Tensor:
    """Where there is none, zeros."""
    import torch

    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _bunches(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """In order: large ones alone, and of small ones many, of one type."""
    bunch: list[Tensor] = []
    for kind, some in itertools.groupby(gradients, lambda g: (g.dtype, g.device, g.numel() >= SMALL)):
        for gradient in some:
            if bunch and (kind[2] or sum(g.numel() for g in bunch) + gradient.numel() > TOGETHER):
                yield bunch
                bunch = []
            bunch.append(gradient)
        yield bunch
        bunch = []


def _no_room(error: BaseException) -> UsageError:
    return UsageError(
        f"the memory has no room to add up the gradients of all processes ({first_line(error)}): give --micro-batch, "
        "or --tuning lora."
    )


def in_shares(tensor: Tensor) -> bool:
    """Whether each process holds a part of it alone (torch's DTensor)."""
    return hasattr(tensor, "device_mesh")


_here = Ranks()
_store: Any = None  # what the processes can leave messages in, beside the group


def started() -> Ranks:
    """This process among those that torchrun started, by its environment; they need not work together (yet)."""
    if any(name not in os.environ for name in TORCHRUN):
        return Ranks()
    return Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def here() -> Ranks:
    """This process among those that work together."""
    return _here


def agree(own: object) -> bool:
    """Whether all that work together have the same here, as it is written out; asked before they go by it."""
    return len(set(_here.all_told(repr(own)))) == 1


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Within: the processes that torchrun started work together; where it started none, nothing is done."""
    global _store
    own = started()
    if own.count == 1:
        yield
        return
    import torch

    distributed: Any = torch.distributed
    _store = next(distributed.rendezvous("env://"))[0]
    _wait_for_all(own.count)
    with _nothing_on_stdout():
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=distributed.PrefixStore("group", _store),
            rank=own.rank,
            world_size=own.count,
            timeout=WAIT,
        )
    with among(own):
        yield
    distributed.destroy_process_group()  # not where it ended badly: others may be in the middle of something


def _wait_for_all(count: int) -> None:
    """Until that many have come here: torch's own waiting for them would not hear a signal.

    Raises:
        Lost: whoever held the store has ended.
    """
    try:
        _store.add(COME, 1)
        while _store.add(COME, 0) < count:
            time.sleep(0.02)
    except RuntimeError as error:
        raise Lost(first_line(error)) from error


@contextlib.contextmanager
def _nothing_on_stdout() -> Iterator[None]:
    """Within: what is printed there, by other languages' code too, is dropped. Some gloo's say whom they have met."""
    try:
        kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # it is closed
        yield
        return
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def may_speak(error: BaseException) -> bool:
    """Whether this process, which ends for that, is to say why, if no other has: there is one message, whoever fails.

    What stops all of them is for the first to say. Of errors the first has the word too; another process has it where
    the first has nothing to say for a while, unless it is told to end meanwhile. Whoever is still there after that
    while, without a store, was not ended by a first that failed.
    """
    own = started()
    if own.leads or isinstance(error, Lost):  # who lost another has waited
        return True
    if isinstance(error, KeyboardInterrupt):
        return False
    try:
        _wait_for_the_first()
        return True
    except KeyboardInterrupt:
        return False


def speaks() -> bool:
    """Take the word; whether no other process has had it, and then this one keeps it."""
    own = started()
    if own.count == 1 or _store is None:
        return True
    try:
        return bool(_store.add(SPOKEN, 1) == 1)
    except RuntimeError:  # whoever held the store has ended
        return own.leads


def _wait_for_the_first() -> None:
    """Until it has said why it ends, or that there is no more to say; not for ever."""
    end = time.monotonic() + PATIENCE
    with contextlib.suppress(RuntimeError):  # whoever held the store has ended
        while time.monotonic() < end and not (_store is not None and _store.check([SPOKEN])):
            time.sleep(0.05)  # a signal ends it, unlike the store's own waiting


@contextlib.contextmanager
def noticing() -> Iterator[None]:
    """Within: where torch itself does something together (with weights in shares), one that has ended is noticed too.

    Raises:
        Lost: one ended.
    """
    try:
        yield
    except RuntimeError as error:
        if _here.count == 1 or not _of_the_others(error):
            raise
        _wait_for_the_first()
        raise Lost(first_line(error)) from error


def _of_the_others(error: RuntimeError) -> bool:
    from torch import distributed

    return isinstance(error, distributed.DistError) or "gloo" in str(error)


def end_silently() -> None:
    """By the first: it ends before its time, and all is well (nobody reads its output any more)."""
    if _store is not None:
        with contextlib.suppress(RuntimeError):
            _store.set(ALL_IS_WELL, "")
            _store.add(SPOKEN, 1)


def ended_silently() -> bool:
    """Whether the first did."""
    try:
        return _store is not None and bool(_store.check([ALL_IS_WELL]))
    except RuntimeError:  # whoever held the store has ended
        return False


@contextlib.contextmanager
def among(ranks: Ranks) -> Iterator[None]:
    """Within: `here` is that. torch's own process group is there already where there are several."""
    global _here
    before, _here = _here, ranks
    try:
        yield
    finally:
        _here = before
