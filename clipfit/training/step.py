"""The gradient of a step: of the whole batch at once or, where that does not fit the memory, exactly the same in parts.

Gradient caching: "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", arXiv 2101.06983. Losses
compare all images and texts of a batch with one another, but only by their embeddings, and each of these is a function
of its own image or text. So the gradient by the embeddings is that of the whole batch, and what the towers make of it
is a sum over parts of any size, each encoded a second time.

Over several processes (ranks.py) likewise: each encodes its share of the images and of the texts, all have all
embeddings, and so the losses of the whole batch. What these give to anything but embeddings is counted once; what the
images give to the texts' class tokens, and what the towers make of it all, is summed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from clipfit import ranks
from clipfit.errors import NonFiniteError, UsageError, first_line
from clipfit.methods import Embeddings, Objective, Seen, Term
from clipfit.methods.batch import Batch
from clipfit.model.clip import Texts
from clipfit.streams import Rows
from clipfit.training.graphs import Recorder

TOTAL = ""  # among losses by name
TEXTS = 4  # texts at once for every image at once: a class name costs an eighth of a small image, and less

Part = TypeVar("Part")
Columns = TypeVar("Columns", bound=tuple[Any, ...])


class Loss(NamedTuple):
    """What was minimised, and the losses it is the weighted sum of, by name."""

    total: float
    terms: dict[str, float]


class Pieces(Generic[Part, Columns]):
    """Columns of tensors, row by row functions of their own row: computed part by part, and so is their gradient.

    `columns` are their values, joined: leaves that gather the gradient. Of one part the graph is kept; each of several
    is computed again when its gradient is known. Where there are several processes, the parts are those of this one's
    rows, and the columns those of all.
    """

    def __init__(self, compute: Callable[[Part], Columns], parts: Sequence[Part], rows: int, size: int | None = None):
        """`compute` gives a named tuple of tensors of as many rows as its part has, or None, for every part alike.

        `rows`: of all processes; see Ranks.computed for those that `parts`, of at most `size`, must be.
        """
        self._compute, self._share = compute, ranks.here().share(rows)
        self._parts, self._real = in_step(parts, rows, size), len(parts) if self._share else 0
        self._graph = compute(parts[0]) if len(self._parts) == 1 else None
        found = [self._graph] if self._graph else [_without_graph(compute(part)) for part in self._parts]
        found = found[: len(parts)]
        self._sizes = [len(columns[0]) for columns in found]
        self.columns: Columns = type(found[0])(*(_leaf(column, rows) for column in zip(*found, strict=True)))

    @property
    def leaves(self) -> list[torch.Tensor]:
        """The columns that there are."""
        return [leaf for leaf in self.columns if leaf is not None]

    def backward(self) -> None:
        """Add what the leaves' gradients make of all that was computed with."""
        own = slice(self._share.start, self._share.stop)
        gradients = [
            None if leaf is None or leaf.grad is None else leaf.grad[own].split(self._sizes if self._real else 0)
            for leaf in self.columns
        ]
        for number, part in enumerate(self._parts):
            columns = self._graph or self._compute(part)
            known = [
                (c, g[number] if number < self._real else torch.zeros_like(c))
                for c, g in zip(columns, gradients, strict=True)
                if g is not None
            ]
            if known:
                torch.autograd.backward([column for column, _ in known], [gradient for _, gradient in known])


def in_step(parts: Sequence[Part], rows: int, size: int | None) -> list[Part]:
    """As many parts as the process has that has most: the first again, of no weight, where there are fewer.

    Blocks in shares (model/sharding.py) compute in all processes or in none.
    """
    most = 1 if size is None else math.ceil(ranks.here().most(rows) / size)
    return [*parts, *[parts[0]] * (most - len(parts))]


def _without_graph(columns: Columns) -> Columns:
    """The graph is made and dropped, part by part: without one, dropout would be off and other kernels be taken."""
    kept: list[Any] = [None if c is None else c.detach().requires_grad_(c.requires_grad) for c in columns]
    return type(columns)(*kept)


def _leaf(parts: Sequence[Any], rows: int) -> Any:
    if parts[0] is None:
        return None
    own = torch.cat([part.detach() for part in parts])
    return ranks.here().gather(own, rows).requires_grad_(parts[0].requires_grad)


def accumulate(objective: Objective, batch: Batch, size: int | None = None) -> Loss:
    """The losses of a batch, and their gradient added to all that is trained.

    Among several processes there must be no gradient before, and each has the sum then.

    Args:
        size: images at once in the towers; None: all.

    Raises:
        NonFiniteError: a loss is not a finite number; what was added is of no use then.
        MemoryElsewhereError: another process ran out of memory.
    """
    return read(batch.image_rows.step + 1, gradient(objective, batch, size))


def gradient(
    objective: Objective, batch: Batch, size: int | None = None, tokens: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """As `accumulate`, but the losses, of which TOTAL is what was minimised, are not read: a GPU is not waited for.

    Args:
        tokens: (n, length), those of the classes that the images are compared with, on the device; None: the
            objective's own.
    """
    here = ranks.here()
    texts, seen, e = embedded(objective, batch, size, tokens)
    terms = objective.terms(e, batch)
    total = weighted(terms)
    total.backward()
    if not here.leads:
        _forget([*texts.leaves, *trained(objective)])
    seen.backward()  # adds to the gradient of class tokens, part by part
    here.sum_gradients(texts.leaves)
    texts.backward()
    here.sum_gradients(trained(objective))
    return {TOTAL: total.detach()} | {name: term.value.detach() for name, term in terms.items()}


def embedded(
    objective: Objective, batch: Batch, size: int | None = None, given: torch.Tensor | None = None
) -> tuple[Pieces[Rows, Texts], Pieces[Batch, Seen], Embeddings]:
    """A batch through the towers: texts, images, and what losses are computed of."""
    clip, tokens, teacher, here = objective.clip, objective.tokens, objective.teacher, ranks.here()
    parts, classes = batch.split(size), objective.classes(batch)
    own_classes = classes.of(here.computed(len(classes.numbers)))

    def texts_of(rows: Rows) -> Texts:
        return clip.read(tokens[list(rows.numbers)] if given is None else given, rows)

    images, of_texts = len(batch.labels), size and TEXTS * size
    texts = Pieces(texts_of, own_classes.split(of_texts), len(classes.numbers), of_texts)
    seen = Pieces(lambda part: objective.embed(part, texts.columns), parts, images, size)
    taught = [teacher(part.images) for part in in_step(parts, images, size)][: len(parts)] if teacher else None
    teacher_u = _leaf(taught, images) if taught else None
    return texts, seen, Embeddings(seen.columns, texts.columns.embeddings, teacher_u)


def trained(objective: Objective) -> list[torch.nn.Parameter]:
    """All that an objective's gradient is added to, in an order that is the same in every process."""
    of_groups = [parameter for group in objective.groups for parameter in group.parameters.values()]
    found = {id(p): p for p in [*objective.clip.named_parameters().values(), *of_groups] if p.requires_grad}
    return list(found.values())


def _forget(tensors: Sequence[torch.Tensor]) -> None:
    """What the losses themselves give is that of the first process alone."""
    for tensor in tensors:
        tensor.grad = None


def weighted(terms: Mapping[str, Term]) -> torch.Tensor:
    """What is minimised: the sum of weight · value."""
    first, *more = (term.weight * term.value for term in terms.values())
    return sum(more, first)


def read(step: int, losses: Mapping[str, torch.Tensor]) -> Loss:
    """The losses as numbers: the one moment of a step in which the processor waits for a GPU, hence the last.

    Raises:
        NonFiniteError: their sum is no finite number.
    """
    terms = dict(zip(losses, torch.stack(list(losses.values())).tolist(), strict=True))
    loss = Loss(terms.pop(TOTAL), terms)
    if not math.isfinite(loss.total):
        raise NonFiniteError(f"step {step}: the loss is not finite ({loss.terms}); try a lower --learning-rate.")
    return loss


class Fitting:
    """Steps' gradients in parts that fit the memory: where it runs out, parts are halved from then on."""

    def __init__(self, objective: Objective, size: int | None, say: Callable[[str], None] = lambda text: None):
        """`size`: images at once to begin with; None: whole batches. `say` is told, once for all halvings of a step."""
        self._objective, self.size, self._say = objective, size, say
        self._recorder = Recorder(
            objective, trained(objective), lambda batch, tokens: gradient(objective, batch, None, tokens), say
        )

    def accumulate(
        self, batch: Batch, zero_grad: Callable[[], None], meanwhile: Callable[[], None] = lambda: None
    ) -> Loss:
        """As the function of that name, from no gradient on. `meanwhile` is done while a GPU is not waited for yet.

        Raises:
            NonFiniteError: a loss is not a finite number, and no gradient is left. UsageError: the memory does not
                hold one image.
        """
        given, size, most = self.size, self.size, ranks.here().most(len(batch.labels))
        while True:
            zero_grad()
            try:
                losses = self._recorder(batch) if size is None else None
                losses = losses or gradient(self._objective, batch, size)
                meanwhile()
                loss = read(batch.image_rows.step + 1, losses)
                break
            except NonFiniteError:
                zero_grad()
                raise
            except (RuntimeError, MemoryError) as error:
                if lacks_a_deterministic_kernel(error):
                    self._settle(error)
                elif ran_out_of_memory(error):
                    size = self._smaller(error, size, most)
                else:
                    raise
            if batch.images.is_cuda:
                torch.cuda.empty_cache()  # here, for the error held what it was raised from
        if size != given:
            self._say(
                f"memory ran out: from step {batch.image_rows.step + 1} on, images are encoded {size} at a time, with "
                f"the same gradient but for rounding; --micro-batch {size} does so from the start, and to the byte"
            )
            self.size = size
        return loss

    def _settle(self, error: BaseException) -> None:
        """For an operation that torch has no deterministic kernel of."""
        if self._in_shares():
            raise UsageError(
                f"torch has no deterministic kernel for all of this model ({first_line(error)}), and blocks in shares "
                "cannot begin a step anew: leave out --shard."
            ) from error
        settle_for_warnings()
        self._say(
            f"torch has no deterministic kernel for all of this model ({first_line(error)}): the same command need not "
            "give the same bytes again"
        )

    def _smaller(self, error: BaseException, size: int | None, most: int) -> int | None:
        """Images at once where memory ran out with so many, of `most`; as many, where other memory is given back."""
        if self._in_shares():  # others wait for this one in a block
            raise UsageError(
                f"the memory does not hold this many images beside the weights' shares ({first_line(error)}): "
                "give a smaller --micro-batch, or take more processes."
            ) from error
        if self._recorder.holds:
            self._recorder.stop("memory ran out")
            return size
        if not isinstance(error, ranks.MemoryElsewhereError):
            ranks.here().fail()  # so that all halve their parts
        at_once = min(size or most, most)
        if at_once == 1:
            raise UsageError(
                f"one image at a time does not fit the memory ({first_line(error)}): try "
                "--gradient-checkpointing or --tuning lora, or take a smaller --model or another --device."
            ) from error
        return math.ceil(at_once / 2)

    def _in_shares(self) -> bool:
        return any(map(ranks.in_shares, trained(self._objective)))


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether that is what an error of torch's, or of Python's, says."""
    words = ("can't allocate memory", "not enough memory", "out of memory", "_ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)


def lacks_a_deterministic_kernel(error: BaseException) -> bool:
    """Whether torch's strict mode refused an operation for that."""
    strict = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    return strict and "deterministic" in str(error)


def settle_for_warnings() -> None:
    """Deterministic kernels where torch has them, no longer an error where it has none.

    Then the fused kernels of attention add up in any order backward: the plain one takes their place.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    for enable in (torch.backends.cuda.enable_flash_sdp, torch.backends.cuda.enable_mem_efficient_sdp):
        enable(False)
