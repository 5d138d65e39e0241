"""What steps are given: cut in threads beside the step, the same however many there are, and none left behind."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import make_classes, task_of

from clipfit import DataError, Recipe
from clipfit.data import ahead as threads
from clipfit.data import augment, layout
from clipfit.data.images import ImageStore, Memory
from clipfit.interrupts import Stopped
from clipfit.measure import scoring
from clipfit.model import loading
from clipfit.training import input, loop, step
from clipfit.training.input import Early, Schedule

RECIPE = Recipe(learning_rate=1e-3, epochs=3, batch_size=3)
SIZE = (32, 32)


@pytest.fixture
def shots(tmp_path) -> tuple[ImageStore, list[int], list[str]]:
    """Of which nothing is kept: every view is read again."""
    found = layout.read(make_classes(tmp_path / "shots", {"ant": 3, "bee": 2, "cow": 3}))
    names = list(found.names.values())
    return ImageStore(found.train, Memory(0)), [names.index(s.label) for s in found.train], names


@pytest.mark.parametrize("first", [0, 4])
@pytest.mark.parametrize("cores", [1, 5])
@pytest.mark.parametrize("ahead", [0, 1, 7])
def test_inputs_are_the_same_however_they_are_made(shots, monkeypatch, cores, ahead, first):
    images, labels, _ = shots
    schedule = Schedule(labels, RECIPE, 0, balance=True)
    monkeypatch.setattr(threads, "cores", lambda: cores)
    monkeypatch.setattr(input, "AHEAD", ahead)
    found = list(schedule.inputs(images, SIZE, first))
    assert [(step, epoch, list(views)) for step, epoch, views, *_ in found] == [
        (step, *batch) for step, batch in list(enumerate(schedule.batches()))[first:]
    ]
    for _, epoch, views, _, crops in found:
        assert torch.equal(crops, torch.stack([schedule.crop(images, epoch, view, SIZE) for view in views]))


class Watched:
    """Grey images, which say that they were asked for."""

    def __init__(self, count: int):
        self.asked = [threading.Event() for _ in range(count)]

    def __len__(self) -> int:
        return len(self.asked)

    def __getitem__(self, index: int) -> torch.Tensor:
        self.asked[index].set()
        return torch.full((3, 8, 8), 127, dtype=torch.uint8)


def test_the_next_batches_are_cut_while_a_step_is_taken():
    images = Watched(30)
    schedule = Schedule([0] * 30, Recipe(epochs=1, batch_size=3), 0)
    with contextlib.closing(schedule.inputs(images, SIZE)) as inputs:
        next(inputs)
        every = [views for _, views in schedule.batches()]
        coming = itertools.chain(*every[1:3])
        assert all(images.asked[view].wait(60) for view in coming)
        later = itertools.chain(*every[4:])
        assert not any(images.asked[view].is_set() for view in later)  # memory holds a few batches, not an epoch


def running() -> set[threading.Thread]:
    return set(threading.enumerate())


def test_an_image_that_vanishes_is_named_in_its_step_and_no_thread_stays(models, shots):
    images, labels, names = shots
    _, objective = task_of(loading.load(models["vit"]), names, "cite")
    schedule = Schedule(labels, RECIPE, 0)
    [*_, (_, last)] = schedule.batches()
    before, done = running(), []

    def on_step(report):
        done.append(report)
        images.samples[last[0]].path.unlink(missing_ok=True)

    with pytest.raises(DataError, match=r"^image .*\.png does not exist"):
        loop.train(objective.clip, objective, images, schedule, on_step)
    assert 1 <= len(done) < schedule.steps
    assert running() == before


@pytest.mark.parametrize("error", [Stopped(2), ValueError("a fault")])
def test_no_thread_stays_where_a_step_is_interrupted(models, shots, error):
    images, labels, names = shots
    _, objective = task_of(loading.load(models["vit"]), names, "cite")
    before = running()

    def on_step(_report):
        assert running() > before
        raise error

    with pytest.raises(type(error)):
        loop.train(objective.clip, objective, images, Schedule(labels, RECIPE, 0), on_step)
    assert running() == before


def test_threads_beside_the_caller_start_no_others_and_leave_the_callers_alone():
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        own = [found for _, found in threads.ahead(range(40), lambda _: torch.get_num_threads(), 8)]
        assert set(own) == {1}
        assert torch.get_num_threads() == 3
        born = []
        later = threading.Thread(target=lambda: born.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert born == [3]
    finally:
        torch.set_num_threads(usual)


def test_a_gpu_is_given_crops_and_resizes_them_to_the_same_views(shots, monkeypatch):
    """Up to how it rounds, which its own test shows."""
    images, labels, _ = shots
    schedule = Schedule(labels, RECIPE, 0, balance=True)

    def on_gpu(device, crops, size):
        assert device.type == "cuda"
        assert all(crop.is_contiguous() for crop in crops)  # of a thread's own making: views would be copied later
        return torch.stack([augment.resized(crop, size) for crop in crops])

    monkeypatch.setattr(augment, "resized_on", on_gpu)
    found = list(schedule.inputs(images, SIZE, device=torch.device("cuda")))
    monkeypatch.undo()
    for one, other in zip(found, schedule.inputs(images, SIZE), strict=True):
        assert one[:4] == other[:4]
        assert torch.equal(one.crops, other.crops)


def test_what_a_gpu_computes_of_a_crop_is_what_a_processor_does_but_for_rounding(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    crops = [torch.randint(256, (3, *sides), generator=draw, dtype=torch.uint8) for sides in ((90, 70), (24, 31), SIZE)]
    ours = augment.resized_on(torch.device("cpu"), crops, SIZE)
    assert (ours.shape, ours.dtype) == ((3, 3, *SIZE), torch.uint8)
    expected = torch.stack([augment.resized(crop, SIZE) for crop in crops])
    assert (ours.int() - expected.int()).abs().max() <= 1
    monkeypatch.setattr(augment, "AT_ONCE", crops[0].numel() + crops[1].numel())
    assert torch.equal(augment.resized_on(torch.device("cpu"), crops, SIZE), ours)
    monkeypatch.setattr(augment, "AT_ONCE", 1)
    assert torch.equal(augment.resized_on(torch.device("cpu"), crops, SIZE), ours)
    assert torch.equal(ours[2], crops[2])


class Met:
    """Pictures of noise, none of which can be read alone."""

    def __init__(self, count: int):
        self._pictures = torch.randint(0, 256, (count, 3, 32, 32), generator=torch.manual_seed(0), dtype=torch.uint8)
        self._met = threading.Barrier(2)

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> torch.Tensor:
        self._met.wait(60)
        return self._pictures[index]


def test_images_that_are_not_in_memory_are_read_by_several_threads_and_stay_in_order(models, monkeypatch):
    monkeypatch.setattr(threads, "cores", lambda: 2)
    clip, images = loading.load(models["vit"]), Met(8)
    chosen = [6, 1, 7, 0, 2, 4]
    found = scoring.image_embeddings(clip, images, chosen, 4)
    with torch.no_grad():
        for rows in (slice(0, 4), slice(4, 6)):
            expected = clip.encode_image(clip.normalize(images._pictures[chosen[rows]]))
            assert torch.equal(found[rows], expected)


def test_inputs_that_are_made_early_are_the_same_and_fail_in_their_turn():
    made: list[int] = []

    def inputs() -> Iterator[int]:
        for number in range(3):
            made.append(number)
            yield number
        raise DataError("the fourth is gone")

    early = Early(inputs())
    assert next(early) == 0
    early.prepare()
    early.prepare()
    assert made == [0, 1]
    assert next(early) == 1
    assert next(early) == 2
    early.prepare()
    with pytest.raises(DataError, match="the fourth is gone"):
        next(early)
    assert list(Early(iter([1, 2]))) == [1, 2]


def test_the_next_input_is_made_while_a_gpu_computes(models, shots, monkeypatch):
    """After the whole gradient was asked for, and before the losses are waited for."""
    images, labels, names = shots
    events: list[str] = []

    def noting(owner: Any, name: str) -> None:
        usual = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given: (events.append(name), usual(*given))[1])

    noting(Early, "prepare")
    noting(step, "gradient")
    noting(step, "read")
    clip = loading.load(models["vit"])
    _, objective = task_of(clip, names, "cite")
    loop.train(clip, objective, images, Schedule(labels, RECIPE, 0, balance=True))
    whole = ["prepare", "gradient", "prepare", "read"]
    assert events[: 2 * len(whole)] == [*whole, *whole]
    assert events.count("read") == Schedule(labels, RECIPE, 0, balance=True).steps
