"""N processes are one process: the same gradient, the same run, the same figures, and one message where it fails."""

from __future__ import annotations

import pytest
import torch
from processes import Found, together
from test_objectives import NAMES
from test_step import LABELS, Hungry, a_batch, gradient_of, in_double, plainly

from clipfit import ranks
from clipfit.errors import UsageError
from clipfit.methods import METHODS
from clipfit.methods.batch import Batch
from clipfit.model.clip import Clip
from clipfit.ranks import Ranks
from clipfit.streams import Rows
from clipfit.training.step import TEXTS, Fitting, accumulate

SIZES = [1, 2, None]


def the_share_of(clip: Clip, labels: list[int] = LABELS) -> Batch:
    """What this process has of the batch that one process has."""
    whole = a_batch(clip, labels)
    own = ranks.here().computed(len(labels))
    return Batch.of(whole.images[own.start : own.stop], labels, whole.image_rows, own)


def without(trained) -> set[str]:
    return {name for name, p in trained.items() if p.grad is None}


def require_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.norm() > 0
    assert ((found - expected).norm() / expected.norm()).item() <= 1e-10


def gradients_together(count: int, models, method: str, tuning: str, context: str | None, labels) -> list[Found]:
    """By size of part; the same to the bit in all processes."""

    def work() -> Found:
        with in_double(models["vit"], method, tuning, context) as (objective, trained):
            found = {}
            for size in SIZES:
                loss = accumulate(objective, the_share_of(objective.clip, labels), size)
                found[f"{size} loss"] = torch.tensor(loss.total)
                lacking = without(trained)
                found[f"{size} without"] = torch.tensor([name in lacking for name in trained])
                found[f"{size} gradient"] = gradient_of(trained)
            return found

    first, *others = together(count, work)
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)
    return [{key.split()[1]: first[key] for key in first if key.startswith(f"{size} ")} for size in SIZES]


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("count", "tuning", "context"),
    [(2, "full", "a photo of a "), (2, "lora", None), (3, "full", None), (3, "lora", "a photo of a ")],
)
def test_processes_have_the_gradient_of_one(models, method, tuning, context, count):
    assert len(NAMES) > TEXTS  # so that texts come in parts too
    with in_double(models["vit"], method, tuning, context) as (objective, trained):
        batch = a_batch(objective.clip)
        loss = accumulate(objective, batch).total
        lacking = [name in without(trained) for name in trained]
        gradient_of(trained)
        expected = plainly(objective, batch, trained)
    for found in gradients_together(count, models, method, tuning, context, LABELS):
        require_same(found["gradient"], expected)
        assert found["loss"].item() == pytest.approx(loss, rel=1e-6)
        assert found["without"].tolist() == lacking


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_one_class_has_it_too(models, method):
    """Without negatives, and with fewer images and texts than processes."""
    labels = [2, 2, 2]
    with in_double(models["vit"], method, "full") as (objective, trained):
        accumulate(objective, a_batch(objective.clip, labels))
        lacking = [name in without(trained) for name in trained]
        expected = gradient_of(trained)
    for found in gradients_together(4, models, method, "full", None, labels):
        require_same(found["gradient"], expected)
        assert found["without"].tolist() == lacking


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("hungry", [0, 2])
def test_where_one_runs_out_of_memory_all_halve_their_parts(models, hungry):
    """Wherever it is in its step when another one does."""
    with in_double(models["vit"], "cite+atha", "full") as (objective, trained):
        expected = plainly(objective, a_batch(objective.clip), trained)

    def work() -> Found:
        with in_double(models["vit"], "cite+atha", "full") as (objective, trained):
            said: list[str] = []
            holds = 1 if ranks.here().rank == hungry else 100
            hungrily = Hungry(objective, holds, torch.OutOfMemoryError("CUDA out of memory."))
            fitting = Fitting(hungrily, None, said.append)
            for _ in range(2):
                fitting.accumulate(the_share_of(objective.clip), lambda: gradient_of(trained))
            assert len(said) == 1, said
            assert "images are encoded 1 at a time" in said[0]  # of 3 at most
            return {"gradient": gradient_of(trained)}

    for found in together(3, work):
        require_same(found["gradient"], expected)


def test_one_image_that_does_not_fit_one_process_is_said_by_all(models):
    def work() -> Found:
        with in_double(models["vit"], "flyp", "full") as (objective, _):
            holds = 0 if ranks.here().rank == 1 else 100
            hungrily = Hungry(objective, holds, MemoryError("no room"))
            with pytest.raises(UsageError, match="one image at a time does not fit the memory"):
                Fitting(hungrily, None).accumulate(the_share_of(objective.clip), lambda: None)
            return {}

    together(2, work)


def test_shares_are_all_rows_in_order():
    for count, rows in ((1, 5), (2, 5), (3, 2), (4, 4)):
        shares = [Ranks(rank, count).share(rows) for rank in range(count)]
        assert [row for share in shares for row in share] == list(range(rows))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert max(map(len, shares)) == Ranks(0, count).most(rows)


def test_gradients_of_any_size_and_type_are_summed(monkeypatch):
    """Large ones alone, small ones together, as many as there is room for; where there is none at all, none is made."""
    monkeypatch.setattr(ranks, "SMALL", 50)
    monkeypatch.setattr(ranks, "TOGETHER", 20)

    def work() -> Found:
        rank = ranks.here().rank
        shapes = [(3,), (60,), (2, 4), (15,), (70,), (), (30,), (1,)]
        parameters = [torch.nn.Parameter(torch.zeros(s, dtype=torch.float64 if len(s) == 2 else None)) for s in shapes]
        for k, parameter in enumerate(parameters[:-1]):
            if k != 2 or rank:
                parameter.grad = torch.full_like(parameter, 10**rank * (k + 1))
        ranks.here().sum_gradients(parameters)
        assert parameters[-1].grad is None
        return {str(k): p.grad.flatten() for k, p in enumerate(parameters[:-1])}

    for found in together(2, work):
        assert [set(tensor.tolist()) for _, tensor in sorted(found.items())] == [
            {11.0}, {22.0}, {30.0}, {44.0}, {55.0}, {66.0}, {77.0}
        ]  # fmt: skip


def test_rows_keep_their_numbers():
    assert Rows(3, (7, 8, 9)).of(range(1, 3)) == Rows(3, (8, 9))
