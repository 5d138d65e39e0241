"""The loop: order and crops from the seed alone, parameter groups, the schedule, every image once an epoch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from conftest import make_classes, task_of

from clipfit import NonFiniteError, Recipe, streams
from clipfit.data import layout
from clipfit.data.augment import random_crop, resized
from clipfit.data.images import ImageStore, Memory
from clipfit.events import StepReport
from clipfit.methods import METHODS, Embeddings, Group, Seen, Term
from clipfit.methods.batch import Batch
from clipfit.model import clip, loading
from clipfit.streams import Rows
from clipfit.training import loop
from clipfit.training.input import Schedule
from clipfit.training.state import Trained

RECIPE = Recipe(learning_rate=1e-3, epochs=2, batch_size=3)


@pytest.fixture(scope="module")
def shots(tmp_path_factory) -> tuple[ImageStore, list[int], list[str]]:
    root = make_classes(tmp_path_factory.mktemp("shots"), {"ant": 3, "bee": 2, "cow": 3})
    found = layout.read(root)
    names = list(found.names.values())
    return ImageStore(found.train, Memory(10**9)), [names.index(s.label) for s in found.train], names


def run(model: str, shots, seed: int = 0, method: str = "cite", recipe: Recipe = RECIPE):
    """A trained backbone and the reports of its steps."""
    images, labels, names = shots
    task, objective = task_of(loading.load(model), names, method)
    backbone = task.clip
    reports: list[StepReport] = []
    loop.train(backbone, objective, images, Schedule(labels, recipe, seed), reports.append)
    return backbone, reports


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_alone_decides_the_run(models, shots, method):
    backbone, first = run(models["vit"], shots, method=method)
    torch.rand(17)  # the global generator has no say
    again, second = run(models["vit"], shots, method=method)
    assert first == second
    assert all(torch.equal(t, again.state()[name]) for name, t in backbone.state().items())
    assert [r.losses for r in run(models["vit"], shots, seed=1, method=method)[1]] != [r.losses for r in first]


def batches(labels: Sequence[int], seed: int = 3, **given) -> list[tuple[int, list[int]]]:
    schedule = Schedule(labels, RECIPE, seed, **given)
    return list(schedule.batches())


def test_every_image_once_an_epoch_in_an_order_of_its_own():
    drawn = batches([0] * 8)
    assert [epoch for epoch, _ in drawn] == [0, 0, 0, 1, 1, 1]
    epochs = [[i for e, batch in drawn if e == epoch for i in batch] for epoch in range(2)]
    assert [sorted(order) for order in epochs] == [list(range(8))] * 2
    assert epochs[0] != epochs[1]
    assert drawn == batches([0] * 8)
    assert drawn != batches([0] * 8, seed=4)


@pytest.mark.parametrize(
    ("count", "most", "sizes"), [(33, 32, [17, 16]), (32, 32, [32]), (8, 3, [3, 3, 2]), (10, 4, [4, 3, 3]), (2, 5, [2])]
)
def test_batches_are_of_even_size(count, most, sizes):
    """AdamW takes nearly a full step from a batch of one."""
    schedule = Schedule([0] * count, Recipe(epochs=1, batch_size=most), 0)
    assert [len(views) for _, views in schedule.batches()] == sizes


def test_balance_shows_as_many_of_every_class_as_the_largest_has():
    labels = [0] * 7 + [1] * 3 + [2]
    drawn = batches(labels, balance=True)
    epochs = [[view for e, batch in drawn if e == epoch for view in batch] for epoch in range(2)]
    for views in epochs:
        assert len(views) == len(set(views)) == 21  # every view once: repetitions of an image have crops of their own
        images = [view % 11 for view in views]
        assert Counter(labels[i] for i in images) == {0: 7, 1: 7, 2: 7}
        assert sorted(Counter(i for i in images if labels[i] == 1).values()) == [2, 2, 3]
    assert epochs[0] != epochs[1]
    once_more = {next(i for i in (7, 8, 9) if [v % 11 for v in views].count(i) == 3) for views in epochs}
    several = {
        next(i for i in (7, 8, 9) if [v % 11 for _, b in batches(labels, s, balance=True)[:7] for v in b].count(i) == 3)
        for s in range(12)
    }
    assert once_more <= several == {7, 8, 9}


def seen(images, chosen, seed: int = 0, epoch: int = 5, recipe: Recipe = RECIPE) -> torch.Tensor:
    schedule = Schedule([0] * len(images), recipe, seed)
    return torch.stack([schedule.crop(images, epoch, view, (32, 32)) for view in chosen])


def test_crops_follow_from_image_epoch_and_seed_alone(shots):
    """Whatever batch an image is in, so that any process can draw its share."""
    images = shots[0]
    both = seen(images, [0, 1])
    assert both.shape == (2, 3, 32, 32)
    assert both.dtype == torch.uint8
    assert torch.equal(seen(images, [4, 1, 0])[[2, 1]], both)
    assert not torch.equal(seen(images, [0], epoch=6)[0], both[0])
    assert not torch.equal(seen(images, [0], seed=1)[0], both[0])
    same = Same(images[0])
    assert not torch.equal(seen(same, [0])[0], seen(same, [1])[0])  # two images alike are cropped differently


class Same:
    """One image under every number."""

    def __init__(self, image: torch.Tensor):
        self.image = image

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.image


def test_crops_show_the_share_of_the_area_that_was_asked_for():
    """A picture of its own coordinates: how far a crop reaches tells its area."""
    y, x = torch.meshgrid(torch.arange(200.0), torch.arange(200.0), indexing="ij")
    ramp = Same(torch.stack([x, y, 0 * x]).to(torch.uint8))

    def shares(low: float, high: float) -> list[float]:
        views = seen(ramp, list(range(60)), recipe=Recipe(crop_scale=(low, high))).float().flatten(2)
        spans = (views.amax(2) - views.amin(2))[:, :2] / 199
        return (spans[:, 0] * spans[:, 1]).tolist()

    narrow, wide = shares(0.2, 0.3), shares(0.08, 1.0)
    assert min(narrow) > 0.17
    assert max(narrow) < 0.32
    assert min(wide) < 0.2
    assert max(wide) > 0.7


def test_the_order_and_the_crops_have_streams_of_their_own():
    seeds = {streams.stream_seed(0, purpose, 1, 2) for purpose in streams.PURPOSES}
    assert len(seeds) == len(streams.PURPOSES)
    assert streams.stream_seed(0, "crop", 1, 2) not in (
        streams.stream_seed(0, "crop", 2, 1),
        streams.stream_seed(1, "crop", 1, 2),
    )


def test_crops_are_drawn_from_the_stream_of_crops(shots):
    stream = streams.generator(0, "crop", 5, 1)
    expected = resized(random_crop(shots[0][1], RECIPE.crop_scale, RECIPE.crop_ratio, stream), (32, 32))
    assert torch.equal(seen(shots[0], [1])[0], expected)


def test_the_learning_rate_falls_along_a_cosine_to_nothing(models, shots):
    reports = run(models["vit"], shots, recipe=Recipe(learning_rate=1e-3, epochs=4, batch_size=4))[1]
    assert [r.step for r in reports] == list(range(1, 9))
    assert {r.steps for r in reports} == {8}
    assert [r.epoch for r in reports] == [1, 1, 2, 2, 3, 3, 4, 4]
    by_hand = [1e-3 * (1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]
    assert [r.learning_rate for r in reports] == pytest.approx(by_hand, rel=1e-12)
    assert reports[0].learning_rate == 1e-3
    assert reports[4].learning_rate == pytest.approx(5e-4)


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_what_torch_was_told_of_determinism_is_restored(mode):
    before = torch.get_deterministic_debug_mode()
    try:
        torch.set_deterministic_debug_mode(mode)
        with loop.deterministic(torch.device("cpu")):
            assert torch.get_deterministic_debug_mode() == 1
        assert torch.get_deterministic_debug_mode() == mode
        assert torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.set_deterministic_debug_mode(before)


@pytest.mark.parametrize("name", ["vit", "resnet"])
@pytest.mark.parametrize("method", METHODS)
def test_in_parts_it_ends_with_the_same_weights(models, shots, name, method):
    """But for rounding, which AdamW makes the most of: its first step is a sign."""
    if name == "resnet" and METHODS[method].edits(METHODS[method].configure({})):
        return
    whole, losses = run(models[name], shots, method=method)
    parts, others = run(models[name], shots, method=method, recipe=replace(RECIPE, micro_batch=2))
    start = loading.load(models[name]).state()
    after, found = ({n: t for n, t in clip.state().items() if t.is_floating_point()} for clip in (whole, parts))
    moved, off = (
        torch.cat([(one[n] - other[n]).flatten() for n in start if n in after and after[n].isfinite().all()]).norm()
        for one, other in ((after, start), (after, found))
    )
    assert [report.total for report in others] == pytest.approx([report.total for report in losses], rel=1e-3)
    assert off < 0.01 * moved


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_decay_is_for_matrices_only(models, name):
    """AdamW moves a parameter without gradient by its decay alone: θ·(1 − rate·decay)."""
    clip = loading.load(models[name])
    trained = Trained.of(clip, [], Recipe(learning_rate=0.1, weight_decay=0.2))
    before = {name: p.detach().clone() for name, p in trained.parameters.items()}
    for p in trained.parameters.values():
        p.grad = torch.zeros_like(p)
    trained.step(1.0)
    decayed = {n for n, p in trained.parameters.items() if torch.equal(p, before[n] * (1 - 0.1 * 0.2))}
    still = {n for n, p in trained.parameters.items() if torch.equal(p, before[n])}
    zeros = {n for n, p in before.items() if not p.any()}
    assert decayed | still == trained.parameters.keys() == dict(clip.model.named_parameters()).keys() - {"logit_scale"}
    kinds = {n: type(m) for n, m in clip.model.named_modules()}
    for n in decayed - zeros:
        assert not n.endswith("bias")
        assert "Norm" not in kinds[n.rpartition(".")[0]].__name__
    assert {"token_embedding.weight", "text_projection", "transformer.resblocks.0.mlp.c_fc.weight"} <= decayed - still
    assert {"ln_final.weight", "transformer.resblocks.0.attn.in_proj_bias"} <= still


def moved_by(group: Group, gradient: float, annealed: list[float]) -> float:
    """How far a parameter moves from 1 under a constant gradient, among groups of other rates."""
    (parameter,) = group.parameters.values()
    other = Group({"other": torch.nn.Parameter(torch.ones(()))})
    trained = Trained([other, group], usual_rate=0.5)
    for factor in annealed:
        parameter.grad = torch.tensor(gradient)
        trained.step(factor)
    return 1 - parameter.item()


def test_a_group_has_its_own_rate_and_every_rate_is_annealed():
    """By hand: AdamW's steps under a constant gradient are its rate; SGD's are rate · gradient."""

    def one(**how: float) -> Group:
        return Group({"it": torch.nn.Parameter(torch.ones(()))}, **how)

    assert moved_by(one(), 3.0, [1.0]) == pytest.approx(0.5, rel=1e-5)
    assert moved_by(one(learning_rate=0.01), 3.0, [1.0]) == pytest.approx(0.01, rel=1e-5)
    assert moved_by(one(learning_rate=0.01), 3.0, [1.0, 0.5]) == pytest.approx(0.015, rel=1e-4)
    assert moved_by(one(learning_rate=0.01, momentum=0.0), 3.0, [1.0]) == pytest.approx(0.03, rel=1e-5)
    assert moved_by(one(learning_rate=0.01, momentum=0.0), 3.0, [1.0, 0.5]) == pytest.approx(0.045, rel=1e-5)
    assert moved_by(one(momentum=0.0), 0.1, [1.0]) == pytest.approx(0.05, rel=1e-5)


def test_both_towers_and_nothing_frozen_move(models, shots):
    before = loading.load(models["vit"]).state()
    after = run(models["vit"], shots)[0]
    still = {name for name, t in after.state().items() if torch.equal(t, before[name])}
    assert still <= {"logit_scale", "attn_mask"}
    assert "logit_scale" in still
    assert not any(module.training for module in after.model.modules())


def test_batch_norm_statistics_stay_as_pre_trained(models, shots):
    before = loading.load(models["resnet"]).state()
    after = run(models["resnet"], shots, recipe=Recipe(learning_rate=1e-3, epochs=1, batch_size=4))[0].state()
    statistics = [name for name in before if "running_" in name or name.endswith("num_batches_tracked")]
    assert len(statistics) > 10
    assert all(torch.equal(before[name], after[name]) for name in statistics)
    assert not torch.equal(before["visual.bn1.weight"], after["visual.bn1.weight"])


class Scripted:
    """An objective whose total is written beforehand."""

    groups: tuple[Group, ...] = ()

    teacher = None

    def __init__(self, model: clip.Clip, factors: list[float]):
        self.weight, self.factors = model.model.ln_final.weight, iter(factors)
        self.clip, self.tokens = model, model.tokenize(["a", "b", "c"])

    def classes(self, batch: Batch) -> Rows:
        return batch.present_rows

    def embed(self, batch: Batch, texts: clip.Texts) -> Seen:
        return Seen(batch.images)

    def terms(self, e: Embeddings, batch: Batch) -> dict[str, Term]:
        value = self.weight.sum() * next(self.factors)
        return {"a": Term(2.0, value), "b": Term(0.5, value)}


def test_terms_are_weighted_and_reported_by_name(vit, shots):
    images, labels, _ = shots
    reports: list[StepReport] = []
    loop.train(vit, Scripted(vit, [1.0] * 6), images, Schedule(labels, RECIPE, 0), reports.append)
    first = reports[0]
    assert first.losses["a"] == first.losses["b"] == pytest.approx(32)
    assert first.total == pytest.approx(2.5 * 32)
    assert first.images == 3
    assert [r.images for r in reports] == [3, 3, 2] * 2
    assert reports[1].total < first.total


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_before_the_weights_are_ruined(vit, shots, bad):
    images, labels, _ = shots
    with pytest.raises(NonFiniteError, match=r"step 3: the loss is not finite .*--learning-rate"):
        loop.train(vit, Scripted(vit, [1.0, 1.0, bad]), images, Schedule(labels, RECIPE, 0))
    assert all(t.isfinite().all() for name, t in vit.state().items() if name != "attn_mask")
