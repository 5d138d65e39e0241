"""The losses against loops over the equations: B × B, one text an image, float64."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss

from clipfit.losses import (
    batch_contrastive,
    similarity_distillation,
    supervised_contrastive,
    visual_text_alignment,
)

D = 7
BATCHES = {
    "repeated": [0, 1, 0, 2, 2, 0, 1, 0],
    "one repeated class among single ones": [3, 0, 1, 2, 2],
    "two classes": [1, 0, 1, 1],
    "all distinct": [2, 0, 1, 4, 3],
}
SCALE = 9.0


def embeddings(rows: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    values = torch.randn(rows, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(values, dim=1).to(dtype).requires_grad_()


def same(ours, naive, leaves, dtype):
    """Value and gradient by every leaf agree, relative to the naive gradient's norm."""
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    value, expected = ours(*leaves), naive(*doubles)
    assert value.item() == pytest.approx(expected.item(), rel=tolerance)
    for g, e in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, doubles), strict=True):
        assert e.norm() > 1e-6
        assert (g - e).norm() / e.norm() <= tolerance


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request) -> torch.dtype:
    return request.param


def scale(dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(SCALE, dtype=dtype)


@pytest.mark.parametrize("labels", BATCHES.values(), ids=BATCHES)
def test_dva(labels, dtype):
    u, classifier = embeddings(len(labels), 0, dtype), (3 * embeddings(5, 1, dtype)).detach().requires_grad_()
    same(
        lambda u, w: visual_text_alignment(u, w, torch.tensor(labels), scale(dtype)),
        lambda u, w: oracles.dva(u, w, labels, SCALE),
        [u, classifier],
        dtype,
    )


@pytest.mark.parametrize("literal", [False, True], ids=["default", "literal"])
@pytest.mark.parametrize("labels", BATCHES.values(), ids=BATCHES)
def test_scl(labels, literal, dtype):
    u, t = embeddings(len(labels), 0, dtype), embeddings(max(labels) + 1, 1, dtype)
    classes = torch.tensor(labels)
    same(
        lambda u, t: supervised_contrastive(u, t, classes, scale(dtype), positive_in_denominator=not literal),
        lambda u, t: oracles.scl(u, [t[c] for c in labels], labels, SCALE, literal),
        [u, t],
        dtype,
    )


@pytest.mark.parametrize("labels", BATCHES.values(), ids=BATCHES)
def test_vld(labels, dtype):
    classes = torch.tensor(labels)
    u, t = embeddings(len(labels), 0, dtype), embeddings(max(labels) + 1, 1, dtype)
    teacher_u, teacher_t = embeddings(len(u), 2, dtype).detach(), embeddings(len(t), 3, dtype).detach()
    same(
        lambda u, t: similarity_distillation(u, t, teacher_u, teacher_t, classes.bincount(), scale(dtype)),
        lambda u, t: oracles.vld(
            u, [t[c] for c in labels], teacher_u.double(), [teacher_t[c].double() for c in labels], SCALE
        ),
        [u, t],
        dtype,
    )


@pytest.mark.parametrize("labels", [*BATCHES.values(), [0, 0, 0]], ids=[*BATCHES, "one class"])
def test_flyp_is_clips_loss_over_a_text_for_every_image(labels, dtype):
    u, t = embeddings(len(labels), 0, dtype), embeddings(max(labels) + 1, 1, dtype)

    def ours(u, t):
        return batch_contrastive(u, t[labels], scale(dtype))

    same(ours, lambda u, t: oracles.contrastive(u, [t[c] for c in labels], SCALE), [u, t], dtype)
    assert ours(u, t).item() == pytest.approx(ClipLoss()(u, t[labels], scale(dtype)).item(), rel=1e-6)


def test_scl_of_distinct_classes_is_twice_open_clips_loss():
    labels = BATCHES["all distinct"]
    u, t = embeddings(5, 0, torch.float64), embeddings(5, 1, torch.float64)
    ours = supervised_contrastive(u, t, torch.tensor(labels), scale(torch.float64))
    assert ours.item() == pytest.approx(2 * ClipLoss()(u, t[labels], scale(torch.float64)).item(), rel=1e-12)


@pytest.mark.parametrize("literal", [False, True], ids=["default", "literal"])
def test_scl_of_one_class_is_exactly_zero_and_so_is_its_gradient(literal):
    u, t = embeddings(4, 0, torch.float32), embeddings(1, 1, torch.float32)
    value = supervised_contrastive(u, t, torch.zeros(4, dtype=torch.int64), scale(torch.float32), not literal)
    value.backward()
    assert value.item() == 0
    assert not u.grad.any()
    assert not t.grad.any()


def test_vld_of_the_teacher_itself_is_zero():
    u, t = embeddings(6, 0, torch.float64), embeddings(3, 1, torch.float64)
    value = similarity_distillation(u, t, u.detach(), t.detach(), torch.tensor([1, 2, 3]), scale(torch.float64))
    gradients = torch.autograd.grad(value, [u, t])
    assert value.item() == pytest.approx(0, abs=1e-14)
    assert max(g.abs().max() for g in gradients) < 1e-12


def test_vld_by_hand_has_the_student_first():
    """Two images' worth of texts, S = [log 3, 0] against [0, 0]: KL((¾, ¼) ‖ (½, ½)) = log 2 − H(¾, ¼)."""
    u, t = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    teacher_u = torch.tensor([[0.5**0.5, 0.5**0.5]])
    value = similarity_distillation(u, t, teacher_u, t, torch.tensor([1, 1]), torch.tensor(math.log(3)))
    assert value.item() == pytest.approx(math.log(2) - 0.5623351446, abs=1e-6)


def test_dva_ignores_the_length_of_the_classifiers_rows():
    u, w = embeddings(4, 0, torch.float64), embeddings(3, 1, torch.float64)
    y = torch.tensor([0, 1, 2, 1])
    lengths = torch.tensor([[0.1], [3.0], [20.0]])
    before, after = (visual_text_alignment(u, v, y, scale(torch.float64)) for v in (w, w * lengths))
    assert after.item() == pytest.approx(before.item(), rel=1e-12)


def test_renaming_the_classes_of_a_batch_changes_nothing():
    labels = torch.tensor(BATCHES["repeated"])
    u, t = embeddings(8, 0, torch.float64), embeddings(3, 1, torch.float64)
    tu, tt = embeddings(8, 2, torch.float64), embeddings(3, 3, torch.float64)
    order = torch.tensor([2, 0, 1])  # new place of each class
    back = order.argsort()
    s = scale(torch.float64)
    pairs = [
        (visual_text_alignment(u, t, labels, s), visual_text_alignment(u, t[back], order[labels], s)),
        (supervised_contrastive(u, t, labels, s), supervised_contrastive(u, t[back], order[labels], s)),
        (
            similarity_distillation(u, t, tu, tt, labels.bincount(), s),
            similarity_distillation(u, t[back], tu, tt[back], order[labels].bincount(), s),
        ),
    ]
    for before, after in pairs:
        assert after.item() == pytest.approx(before.item(), rel=1e-12)
