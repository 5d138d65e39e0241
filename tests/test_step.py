"""The gradient of a step in parts is that of the whole: every method, tuning and size of part, in float64."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from conftest import plain_terms, task_of
from families import ADAPTED, EDITED, FAMILIES, make_family
from test_objectives import NAMES, perturb

from clipfit.config.lora import LoraSettings
from clipfit.errors import ModelError, NonFiniteError, UsageError
from clipfit.methods import METHODS, Objective, Term
from clipfit.methods.batch import Batch
from clipfit.model import checkpointing, loading, lora
from clipfit.model.clip import Clip
from clipfit.model.named import Additions
from clipfit.streams import Rows
from clipfit.training.loop import deterministic
from clipfit.training.step import TEXTS, Fitting, accumulate, ran_out_of_memory

LABELS = [4, 1, 3, 0, 2, 1, 4]
SIZES = [1, 2, 3, 6, 7, None]  # one each, even and uneven parts, the whole
LORA = LoraSettings(rank=2)

Trained = dict[str, torch.nn.Parameter]


@contextlib.contextmanager
def in_double(model: str, method: str, tuning: str, context: str | None = None) -> Iterator[tuple[Objective, Trained]]:
    """A method on a little model, away from its start; what is trained, by name, with adapters where it has them."""
    clip = loading.load(model)
    clip.model.double()
    if context:
        clip = clip.with_additions(Additions(context=context))
    task, objective = task_of(clip, NAMES, method)
    clip = task.clip
    if clip.edits:
        clip.edits.double()
    with lora.adapted(clip, LORA, 5) if tuning == "lora" else contextlib.nullcontext():
        trained = {name: p for name, p in clip.model.named_parameters() if p.requires_grad}
        for group in objective.groups:
            trained |= group.parameters
        if clip.context is not None:
            trained["context"] = clip.context
        perturb(trained.values())
        yield objective, trained


def a_batch(clip: Clip, labels: list[int] = LABELS) -> Batch:
    draw = torch.Generator().manual_seed(1)
    images = torch.rand(len(labels), 3, *clip.image_size, generator=draw, dtype=torch.float64) * 4 - 2
    return Batch.of(images, labels, Rows(3, tuple(range(40, 40 + len(labels)))))


def gradient_of(trained: Trained) -> torch.Tensor:
    """All of it, which is forgotten then; what got none counts as nothing."""
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained.values()]
    forget(trained)
    return torch.cat([g.flatten() for g in found])


def forget(trained: Trained) -> None:
    for p in trained.values():
        p.grad = None


def plainly(objective: Objective, batch: Batch, trained: Trained) -> torch.Tensor:
    sum(term.weight * term.value for term in plain_terms(objective, batch).values()).backward()
    return gradient_of(trained)


def require_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.norm() > 0
    assert ((found - expected).norm() / expected.norm()).item() <= 1e-12


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("checkpoint", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("context", [None, "a photo of a "], ids=["", "context"])
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("method", METHODS)
def test_parts_of_every_size_have_the_gradient_of_the_whole(models, method, tuning, context, checkpoint):
    assert len(NAMES) > TEXTS  # so that texts come in parts too
    with in_double(models["vit"], method, tuning, context) as (objective, trained):
        batch = a_batch(objective.clip)
        expected = plainly(objective, batch, trained)
        losses = {name: term.value.item() for name, term in plain_terms(objective, batch).items()}
        with checkpointing.checkpointed(objective.clip) if checkpoint else contextlib.nullcontext():
            for size in SIZES:
                loss = accumulate(objective, batch, size)
                assert loss.terms == pytest.approx(losses, rel=1e-12)
                require_same(gradient_of(trained), expected)


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("method", METHODS)
def test_what_has_no_gradient_in_the_whole_has_none_in_parts(models, method):
    """AdamW leaves such weights alone, and would decay those of a gradient of 0."""
    with in_double(models["vit"], method, "full") as (objective, trained):
        batch = a_batch(objective.clip, [2, 2, 2])  # no negatives
        sum(term.weight * term.value for term in plain_terms(objective, batch).values()).backward()
        without = {name for name, p in trained.items() if p.grad is None}
        expected = gradient_of(trained)
        accumulate(objective, batch, 2)
        assert {name for name, p in trained.items() if p.grad is None} == without
        require_same(gradient_of(trained), expected)


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.slow) if f in ("vitamin", "mobileclip-b") else f for f in ADAPTED]
)
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_every_family_of_transformers_has_it_too(tmp_path, family, tuning):
    """And with its blocks computed again."""
    method = "cite+atha" if family in EDITED else "cite"
    with in_double(make_family(family, tmp_path), method, tuning) as (objective, trained):
        batch = a_batch(objective.clip)
        expected = plainly(objective, batch, trained)
        with checkpointing.checkpointed(objective.clip):
            for size in (3, None):
                accumulate(objective, batch, size)
                require_same(gradient_of(trained), expected)


class Kept:
    """Numbers that wait for a backward pass, but for weights: how many there are now, and were at most."""

    now = most = 0

    def __init__(self, weights: Trained):
        self._weights = {p.untyped_storage().data_ptr() for p in weights.values()}

    def pack(self, tensor: torch.Tensor):
        if tensor.untyped_storage().data_ptr() in self._weights:
            return lambda: tensor
        self.now += tensor.numel()
        self.most = max(self.most, self.now)
        kept = tensor.detach()  # or it would keep the graph that keeps it

        def unpack() -> torch.Tensor:
            return kept

        weakref.finalize(unpack, self._less, tensor.numel())
        return unpack

    def _less(self, numbers: int) -> None:
        self.now -= numbers

    @classmethod
    def of(cls, work: Callable[[], object], weights: Trained) -> int:
        """The most while the work is done."""
        kept = cls(weights)
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda unpack: unpack()):
            work()
        return kept.most


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("method", METHODS)
def test_parts_of_a_batch_are_forgotten_one_by_one(models, method):
    with in_double(models["vit"], method, "full") as (objective, trained):
        batch = a_batch(objective.clip)
        most = {size: Kept.of(lambda size=size: accumulate(objective, batch, size), trained) for size in (1, 3, None)}
        assert most[1] < most[None] / 3
        assert most[3] < most[None] / 1.8


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("method", METHODS)
def test_checkpointed_blocks_forget_what_they_compute(models, method):
    with in_double(models["vit"], method, "lora") as (objective, trained):
        batch = a_batch(objective.clip)

        def work() -> None:
            plain_terms(objective, batch)

        before = Kept.of(work, trained)
        with checkpointing.checkpointed(objective.clip):
            inside = Kept.of(work, trained)
        assert inside < before / 2
        assert Kept.of(work, trained) == before


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ADAPTED])
def test_a_tower_without_blocks_cannot_be_checkpointed(tmp_path, family):
    with pytest.raises(ModelError, match=r"--gradient-checkpointing needs .* the image tower is a \w+: leave it out"):
        checkpointing.require_blocks(loading.load(make_family(family, tmp_path)).model)


# ---- out of memory


class Hungry:
    """An objective for which memory holds few images at a time."""

    def __init__(self, objective: Objective, holds: int, error: BaseException):
        self._objective, self._holds, self._error = objective, holds, error

    def __getattr__(self, name: str):
        return getattr(self._objective, name)

    def embed(self, batch: Batch, texts):
        if len(batch.labels) > self._holds:
            raise self._error
        return self._objective.embed(batch, texts)


OUT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError(
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"
    ),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    MemoryError(),
]


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("error", OUT, ids=lambda error: str(error)[:20])
def test_where_memory_runs_out_parts_are_halved_from_then_on(models, error):
    with in_double(models["vit"], "cite+atha", "full") as (objective, trained):
        batch, said, cleared = a_batch(objective.clip), [], []
        expected = plainly(objective, batch, trained)

        def clear() -> None:
            cleared.append(gradient_of(trained))

        fitting = Fitting(Hungry(objective, 2, error), None, said.append)
        fitting.accumulate(batch, clear)
        require_same(gradient_of(trained), expected)
        assert len(cleared) == 3  # 7, 4 and 2 at a time: nothing of a failed try is left in the gradient
        fitting.accumulate(batch, clear)
        require_same(gradient_of(trained), expected)
        assert len(cleared) == 4
        assert len(said) == 1
        assert "memory ran out: from step 4 on, images are encoded 2 at a time" in said[0]
        assert "--micro-batch 2" in said[0]


def test_one_image_that_does_not_fit_is_said(models):
    words = r"one image at a time does not fit .*Tried to allocate 2.00 GiB\): try"
    with in_double(models["vit"], "flyp", "full") as (objective, _), pytest.raises(UsageError, match=words):
        Fitting(Hungry(objective, 0, OUT[0]), 3).accumulate(a_batch(objective.clip), lambda: None)


def test_another_fault_is_none_of_memory(models):
    with in_double(models["vit"], "flyp", "full") as (objective, _), pytest.raises(RuntimeError, match="shapes"):
        Fitting(Hungry(objective, 0, RuntimeError("shapes")), None).accumulate(a_batch(objective.clip), print)


def test_what_torch_says_of_the_processors_memory_is_known():
    with pytest.raises(RuntimeError) as found:
        torch.empty(10**16)
    assert ran_out_of_memory(found.value)


NO_KERNEL = RuntimeError(
    "cumsum_cuda_kernel does not have a deterministic implementation, but you set "
    "'torch.use_deterministic_algorithms(True)'."
)


@pytest.mark.usefixtures("doubles")
def test_an_operation_that_has_no_deterministic_kernel_is_told_and_done_with_what_there_is(models):
    fused = torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.mem_efficient_sdp_enabled
    before = torch.get_deterministic_debug_mode(), [enabled() for enabled in fused]
    with in_double(models["vit"], "cite", "full") as (objective, trained):
        batch, said = a_batch(objective.clip), []
        expected, embed = plainly(objective, batch, trained), objective.embed
        refused = mock.Mock(side_effect=[NO_KERNEL, *[mock.DEFAULT] * 2], wraps=embed)
        with mock.patch.object(objective, "embed", refused), deterministic(torch.device("cuda")):
            assert torch.get_deterministic_debug_mode() == 2
            assert all(enabled() for enabled in fused)
            fitting = Fitting(objective, None, said.append)
            for _ in range(2):
                fitting.accumulate(batch, lambda: gradient_of(trained))
                require_same(gradient_of(trained), expected)
            assert torch.get_deterministic_debug_mode() == 1
            assert not any(enabled() for enabled in fused)
        assert len(said) == 1
        assert "no deterministic kernel for all of this model (cumsum_cuda_kernel does not" in said[0]
    assert (torch.get_deterministic_debug_mode(), [enabled() for enabled in fused]) == before


def test_where_nothing_strict_was_asked_for_such_an_error_is_a_fault(models):
    with in_double(models["vit"], "flyp", "full") as (objective, _), pytest.raises(RuntimeError, match="cumsum"):
        Fitting(Hungry(objective, 0, NO_KERNEL), None).accumulate(a_batch(objective.clip), lambda: None)


def test_a_loss_that_is_no_number_leaves_no_gradient(models):
    with in_double(models["vit"], "finetune", "full") as (objective, trained):
        objective.terms = lambda e, batch: {"ce": Term(1.0, e.seen.u.sum() * torch.nan)}
        with pytest.raises(NonFiniteError, match="step 4: the loss is not finite"):
            Fitting(objective, 2).accumulate(a_batch(objective.clip), lambda: forget(trained))
        assert not gradient_of(trained).any()
