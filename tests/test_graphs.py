"""Recorded steps are steps: seen without a GPU, by a recording that is computed again; with one in test_gpu.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from test_objectives import NAMES
from test_step import in_double

from clipfit.errors import NonFiniteError
from clipfit.methods import METHODS, Objective
from clipfit.methods.batch import Batch
from clipfit.streams import Rows
from clipfit.training import graphs, step
from clipfit.training.graphs import Losses, Recorder, Replay
from clipfit.training.step import Fitting, Loss

# five classes, four with the long name, and four without it
LABELS = [
    [4, 1, 3, 0, 2, 1, 4],
    [0, 0, 1, 1, 2, 2, 3],
    [3, 2, 1, 0, 4, 4, 4],
    [4, 4, 1, 0, 2, 2, 1],
    [4, 3, 3, 0, 2, 2, 0],
]


SLOWER = "the same numbers, in more time"


def _both(*tell):
    return lambda text: [told(text) for told in tell]


class Again(Recorder):
    """In place of a graph: the work, done anew at every replay, into the tensors that were there first."""

    def __init__(self, *given) -> None:
        super().__init__(*given)
        self.works, self.replays = True, 0
        self.said: list[str] = []
        self._say = _both(self._say, self.said.append)

    def _leaves_room(self) -> bool:
        return True

    def _recording(self, work) -> tuple[Replay, Losses]:
        losses = {name: loss.clone() for name, loss in work().items()}

        def replay() -> None:
            self.replays += 1
            self._put_gradients()  # a graph knows where they lie
            for name, loss in work().items():
                losses[name].copy_(loss)

        return replay, losses


def batches(objective: Objective, count: int = 11) -> Iterator[Batch]:
    """Of three shapes, never the same."""
    draw = torch.Generator().manual_seed(1)
    for k in range(count):
        images = torch.rand(7, 3, *objective.clip.image_size, generator=draw, dtype=torch.float64) * 4 - 2
        yield Batch.of(images, LABELS[k % len(LABELS)], Rows(k, tuple(range(40, 47))))


def steps(model: str, method: str, recorded: bool, monkeypatch, count: int = 11) -> tuple[list[Loss], dict, Recorder]:
    monkeypatch.setattr(step, "Recorder", Again if recorded else Recorder)
    with in_double(model, method, "full") as (objective, trained):
        fitting, losses = Fitting(objective, None), []
        parameters = step.trained(objective)

        def forget() -> None:
            for parameter in parameters:
                parameter.grad = None

        for batch in batches(objective, count):
            losses.append(fitting.accumulate(batch, forget))
            with torch.no_grad():
                for parameter in parameters:
                    if parameter.grad is not None:
                        parameter -= 1e-3 * parameter.grad
        without = {name for name, p in trained.items() if p.grad is None}
        return losses, {n: p.detach().clone() for n, p in trained.items()} | {"": without}, fitting._recorder


def require_same(found: dict, expected: dict) -> None:
    assert found.pop("") == expected.pop("")
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        assert torch.equal(found[name], parameter), name


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("method", METHODS)
def test_recorded_steps_are_those_that_are_not(models, method, monkeypatch):
    losses, expected, _ = steps(models["vit"], method, False, monkeypatch)
    again, found, recorder = steps(models["vit"], method, True, monkeypatch)
    assert again == losses
    require_same(found, expected)
    assert recorder.replays == 11 - len(recorder._seen) >= 8  # a shape is computed as usual for the first time
    assert len({loss.total for loss in losses}) == len(losses)


@pytest.mark.usefixtures("doubles")
def test_more_shapes_than_are_recorded_are_computed_as_usual(models, monkeypatch):
    _, expected, _ = steps(models["vit"], "cite", False, monkeypatch)
    monkeypatch.setattr(graphs, "MOST", 1)
    _, found, recorder = steps(models["vit"], "cite", True, monkeypatch)
    require_same(found, expected)
    assert recorder.replays == 4


@pytest.mark.usefixtures("doubles")
def test_what_cannot_be_recorded_is_computed_as_usual(models, monkeypatch):
    _, expected, _ = steps(models["vit"], "cite", False, monkeypatch)
    tried = []

    def refuse(self, work) -> None:
        tried.append(work())
        raise RuntimeError("operation not permitted when stream is capturing\nSearch for it in CUDA's documentation.")

    with monkeypatch.context() as patched:
        patched.setattr(Again, "_recording", refuse)
        _, found, recorder = steps(models["vit"], "cite", True, monkeypatch)
    require_same(found, expected)
    assert len(tried) == 1
    assert not recorder.works
    reason = "operation not permitted when stream is capturing"
    assert recorder.said == [f"steps are no longer recorded as CUDA graphs ({reason}): {SLOWER}"]

    _, expected, _ = steps(models["vit"], "cite", False, monkeypatch)
    monkeypatch.setattr(Again, "_leaves_room", lambda self: False)
    _, found, recorder = steps(models["vit"], "cite", True, monkeypatch)
    require_same(found, expected)
    assert recorder.replays == 0
    reason = "less than 10% of the memory would be left"
    assert recorder.said == [f"steps are no longer recorded as CUDA graphs ({reason}): {SLOWER}"]


@pytest.mark.usefixtures("doubles")
def test_memory_that_a_recording_holds_is_given_back_before_a_batch_is_halved(models, monkeypatch):
    monkeypatch.setattr(step, "Recorder", Again)
    with in_double(models["vit"], "cite", "full") as (objective, _):
        said: list[str] = []
        fitting, usual = Fitting(objective, None, said.append), step.gradient
        first, *others = batches(objective, 5)
        fitting.accumulate(first, lambda: None)
        fitting.accumulate(others[1], lambda: None)
        assert fitting._recorder._recorded

        def full(*given, **more):
            if fitting._recorder._recorded:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return usual(*given, **more)

        expected = step.accumulate(objective, others[0])
        monkeypatch.setattr(step, "gradient", full)
        assert fitting.accumulate(others[0], lambda: None) == expected
        assert said == [f"steps are no longer recorded as CUDA graphs (memory ran out): {SLOWER}"]
        assert not fitting._recorder._recorded
        assert not fitting._recorder._gradients


@pytest.mark.usefixtures("doubles")
def test_a_recorded_loss_that_is_not_finite_is_an_error(models, monkeypatch):
    monkeypatch.setattr(step, "Recorder", Again)
    with in_double(models["vit"], "cite", "full") as (objective, _):
        fitting = Fitting(objective, None)
        whole = [batch for k, batch in enumerate(batches(objective)) if k in (0, 2, 5, 7)]
        for batch in whole[:3]:
            fitting.accumulate(batch, lambda: [p.__setattr__("grad", None) for p in step.trained(objective)])
        whole[3].images[0] = torch.nan
        with pytest.raises(NonFiniteError, match="step 8"):
            fitting.accumulate(whole[3], lambda: None)


@pytest.mark.usefixtures("doubles")
def test_nothing_is_recorded_where_there_is_no_gpu_or_dropout_is_drawn(models, monkeypatch):
    for tuning in ("full", "lora"):
        with in_double(models["vit"], "cite", tuning) as (objective, _):
            assert not Fitting(objective, None)._recorder.works
            objective.clip.device = torch.device("cuda")
            assert Fitting(objective, None)._recorder.works == (tuning == "full")
            monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
            for number in (0, 1):  # what is computed on another GPU than the current one would not be recorded
                objective.clip.device = torch.device("cuda", number)
                assert Fitting(objective, None)._recorder.works == (tuning == "full" and number == 0)
    assert len(NAMES) == 5
