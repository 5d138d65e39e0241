"""A step never makes the processor wait for a GPU before its whole gradient was asked for; seen without one."""

from __future__ import annotations

import pytest
import torch
from test_step import LABELS, in_double
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from clipfit.methods import METHODS
from clipfit.methods.batch import Batch
from clipfit.model import text_tower
from clipfit.streams import Rows
from clipfit.training import step
from clipfit.training.loop import deterministic

READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "_unique2")


class Waits(TorchDispatchMode):
    """Notes what a processor waits for a GPU at: values that are read, shapes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name.startswith(("index", "_index")) and any(
            isinstance(found, torch.Tensor) and found.dtype in (torch.bool, torch.uint8)
            for given in args
            if isinstance(given, (list, tuple))
            for found in given
        )
        if by_mask or name in READS:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_what_waits_is_noted():
    x = torch.arange(4.0)
    with Waits() as waits:
        _ = x[x > 1], x.sum().item(), x.unique(), bool(x.any())
    assert {"index", "_local_scalar_dense", "_unique2"} <= set(waits.found)


@pytest.fixture
def cut_before(monkeypatch):
    """Tokens are on the CPU, whatever the device: reading them waits for nothing."""
    cut = text_tower.cut

    def unseen(model, tokens):
        with _disable_current_modes():
            return cut(model, tokens)

    monkeypatch.setattr(text_tower, "cut", unseen)


@pytest.mark.usefixtures("doubles", "cut_before")
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [None, 3])
def test_a_step_reads_nothing_before_all_of_its_gradient_is_asked_for(models, method, tuning, size, monkeypatch):
    with in_double(models["vit"], method, tuning) as (objective, trained), deterministic(torch.device("cpu")):
        asked, read = [], step.read
        monkeypatch.setattr(
            step, "read", lambda *given: asked.append(sum(p.grad is not None for p in trained.values())) or read(*given)
        )
        pixels = torch.randint(256, (len(LABELS), 3, *objective.clip.image_size), dtype=torch.uint8)
        with Waits() as waits:
            images = objective.clip.normalize(pixels).double()
            step.accumulate(objective, Batch.of(images, LABELS, Rows(3, tuple(range(len(LABELS))))), size)
        assert waits.found == []
        assert asked == [sum(p.grad is not None for p in trained.values())]
        assert asked[0]
