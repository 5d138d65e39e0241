"""Saved state: a training that goes on from it ends with the bytes of one that was never stopped."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from conftest import make_classes, task_of

from clipfit.config import Recipe
from clipfit.config.lora import LoraSettings
from clipfit.data import layout
from clipfit.data.images import ImageStore, Memory
from clipfit.errors import ModelError, UsageError
from clipfit.interrupts import Stopped
from clipfit.methods import METHODS
from clipfit.model import loading, lora
from clipfit.training import loop
from clipfit.training.input import Schedule
from clipfit.training.saving import Saving

RECIPE = Recipe(learning_rate=1e-3, epochs=3, batch_size=3)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageStore:
    found = layout.read(make_classes(tmp_path_factory.mktemp("shots"), {"ant": 3, "bee": 2, "cow": 3}))
    return ImageStore(found.train, Memory(10**9))


def train(models, images, method: str, tuning: str, saving: Saving | None = None, stop_after: int | None = None):
    """θ after training, and the reports of its steps."""
    task, objective = task_of(loading.load(models["vit"]), ["ant", "bee", "cow"], method)
    schedule = Schedule([0, 0, 0, 1, 1, 2, 2, 2], RECIPE, seed=5)

    def on_step(report) -> None:
        if report.step == stop_after:
            raise Stopped(15)

    adapters = lora.adapted(task.clip, LoraSettings(rank=2), 5) if tuning == "lora" else contextlib.nullcontext()
    with adapters:
        reports = loop.train(task.clip, objective, images, schedule, on_step, saving=saving)
    return task.clip.state(), reports


def stopped_after(step: int, *given) -> None:
    with pytest.raises(Stopped) as stopped:
        train(*given, stop_after=step)
    assert f"step {step} is kept in" in str(stopped.value)


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("method", METHODS)
def test_going_on_is_the_same_as_never_having_stopped(models, images, method, tuning, tmp_path):
    expected, losses = train(models, images, method, tuning)
    saving = Saving(tmp_path / "state", 4, {"method": method})
    stopped_after(5, models, images, method, tuning, saving)  # kept where it was stopped
    stopped_after(6, models, images, method, tuning, saving)
    found, again = train(models, images, method, tuning, saving)
    assert again == losses
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert len(losses) == 9


def test_only_every_so_many_steps_and_the_last_are_kept(models, images, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(Saving, "save", lambda self, trained, reports: kept.append(len(reports)))
    train(models, images, "finetune", "full", Saving(tmp_path, 4, {}))
    assert kept == [4, 8, 9]


@pytest.fixture
def stopped(models, images, tmp_path) -> Path:
    folder = tmp_path / "state"
    stopped_after(2, models, images, "cite", "full", Saving(folder, 1, {"recipe": {"epochs": 3}, "shots": ["a"]}))
    return folder


def test_the_state_of_another_training_is_refused_with_the_difference(models, images, stopped):
    other = Saving(stopped, 1, {"recipe": {"epochs": 4}, "shots": ["a", "b"]})
    with pytest.raises(UsageError, match=r"recipe.epochs was 3 and is 4, shots\[1\] was None and is 'b'"):
        train(models, images, "cite", "full", other)


def test_no_byte_of_a_saved_state_can_change_unnoticed(models, images, stopped):
    saving = Saving(stopped, 1, {"recipe": {"epochs": 3}, "shots": ["a"]})
    whole = saving.path.read_bytes()
    draw = torch.Generator().manual_seed(0)
    places = torch.randint(len(whole), (20,), generator=draw).tolist()
    header = whole.index(b"reports")
    for place in [0, header + 1, header + 80, len(whole) - 1, *places]:
        saving.path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises((ModelError, UsageError), match=r"damaged|cannot be read|other settings"):
            train(models, images, "cite", "full", saving)
    saving.path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError):
        train(models, images, "cite", "full", saving)
