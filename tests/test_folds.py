"""Folds, and what follows from them: pure functions of labels and logits."""

from __future__ import annotations

import math

import oracles
import pytest
import torch

from clipfit.measure.calibration import best_temperature
from clipfit.measure.choice import Curve, choose, curve_of
from clipfit.measure.folds import CLASSES, IMAGES, RATIOS, Scores, folds_of
from clipfit.measure.forecast import expected
from clipfit.measure.metrics import wilson_interval

EIGHT_OF_SIX = [c for c in range(6) for _ in range(8)]


def of_kind(labels, kind, seed=0, contents=None):
    return [fold for fold in folds_of(labels, contents or range(len(labels)), seed) if fold.kind == kind]


def test_every_image_is_left_out_once_and_every_class_is_always_trained_on():
    folds = of_kind(EIGHT_OF_SIX, IMAGES)
    assert sorted(i for fold in folds for i in fold.left) == list(range(48))
    for fold in folds:
        assert sorted(fold.trained + fold.left) == list(range(48))
        assert [sum(EIGHT_OF_SIX[i] == c for i in fold.trained) for c in range(6)] == [4] * 6
        assert fold.classes == fold.candidates == tuple(range(6))


def test_classes_that_are_left_out_are_scored_among_themselves_with_all_their_images():
    folds = of_kind(EIGHT_OF_SIX, CLASSES)
    assert sorted(c for fold in folds for c in fold.candidates) == list(range(6))
    for fold in folds:
        assert set(fold.classes).isdisjoint(fold.candidates)
        assert len(fold.classes) == 3
        assert list(fold.left) == [i for i, c in enumerate(EIGHT_OF_SIX) if c in fold.candidates]
        assert {EIGHT_OF_SIX[i] for i in fold.trained} == set(fold.classes)


@pytest.mark.parametrize("shots", [1, 2, 3, 5, 8, 16])
@pytest.mark.parametrize("classes", [4, 5, 12])
def test_all_folds_together_train_on_less_than_twice_the_shots(shots, classes):
    labels = [c for c in range(classes) for _ in range(shots)]
    folds = folds_of(labels, range(len(labels)), 0)
    assert sum(len(fold.trained) for fold in folds) < 2 * len(labels)
    assert all({labels[i] for i in fold.trained} == set(fold.classes) for fold in folds)


def test_what_too_few_shots_or_classes_do_not_allow():
    assert [fold.kind for fold in folds_of([0, 1, 2, 3], range(4), 0)] == [CLASSES] * 2
    assert [fold.kind for fold in folds_of([0, 0, 1, 1, 2, 2], range(6), 0)] == [IMAGES] * 2
    assert not folds_of([0, 1, 2], range(3), 0)


def test_an_only_image_is_never_left_out_and_copies_stay_together():
    labels = [0, 1, 1, 1, 1, 2, 2]
    folds = of_kind(labels, IMAGES, contents="abbbcde")
    assert all(0 in fold.trained for fold in folds)
    for fold in folds:
        assert len({i in fold.left for i in (1, 2, 3)}) == 1
    assert not of_kind([0, 0, 1, 1], IMAGES, contents="aabb")  # one picture a class, twice


def test_folds_go_by_the_seed_alone():
    assert folds_of(EIGHT_OF_SIX, range(48), 3) == folds_of(EIGHT_OF_SIX, range(48), 3)
    assert folds_of(EIGHT_OF_SIX, range(48), 3) != folds_of(EIGHT_OF_SIX, range(48), 4)


# ---- temperature


@pytest.mark.parametrize("true", [0.3, 1.0, 4.0])
def test_the_temperature_that_made_the_labels_is_found(true):
    draw = torch.Generator().manual_seed(0)
    tables = []
    for n, classes in ((3000, 5), (1000, 12)):
        logits = 3 * torch.randn(n, classes, generator=draw)
        tables.append((logits, torch.multinomial((logits / true).softmax(1), 1, generator=draw)[:, 0]))
    assert best_temperature(tables) == pytest.approx(true, rel=0.08)


def test_images_that_are_all_named_rightly_make_no_probability_certain():
    logits = torch.eye(4).repeat(5, 1)
    found = best_temperature([(logits, logits.argmax(1))])
    assert 0.05 < found < 1
    assert (logits / found).softmax(1).max() < 1


# ---- the ratio


def scores_of(accuracies, n=400, classes=4, seed=0, sharpness=3.0):
    """Logits whose best is right for so many of n images, one share a ratio; the same images lose first."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=draw)
    noise, order = torch.rand(n, classes, generator=draw), torch.randperm(n, generator=draw)
    tables = []
    for accuracy in accuracies:
        says = labels.clone()
        wrong = order[round(accuracy * n) :]
        says[wrong] = (labels[wrong] + 1) % classes
        tables.append(noise + sharpness * torch.nn.functional.one_hot(says, classes))
    return Scores(torch.stack(tables), labels)


def test_a_curve_pools_folds_and_counts_what_a_loop_counts():
    folds = [scores_of([0.5, 0.9], 30, 4), scores_of([0.4, 0.8], 50, 3, seed=1)]
    curve = curve_of(folds, (0.0, 1.0))
    assert curve.images == 80
    for a in range(2):
        right, likely = oracles.pooled(folds, a, curve.temperatures[a])
        assert curve.right[a].tolist() == right
        assert curve.likely[a].tolist() == pytest.approx(likely, abs=1e-9)
        assert curve.temperatures[a] == best_temperature([(fold.logits[a], fold.labels) for fold in folds])


def test_the_ratio_is_the_best_of_one_curve_or_of_the_harmonic_mean_of_two():
    rising = curve_of([scores_of([0.5 + 0.04 * k for k in range(11)])], RATIOS)
    falling = curve_of([scores_of([0.9 - 0.04 * k for k in range(11)], seed=1)], RATIOS)
    assert choose([rising]) == 1.0
    assert choose([falling]) == pytest.approx(0.0, abs=0.1)
    assert 0.3 <= choose([rising, falling]) <= 0.7
    flat = curve_of([scores_of([0.25] * 11, sharpness=0.0)], RATIOS)
    assert choose([falling, flat]) == choose([falling])  # what nobody knows anything of has no say


def test_a_dozen_images_that_win_a_little_show_nothing():
    """All are named a little more surely up to 0.5, and alike beyond: the next image may lose all. Two hundred show it:
    then the highest ratio is taken, and else the one nearest to 1 − z²."""
    draw = torch.Generator().manual_seed(0)

    def curve(images: int) -> Curve:
        rise = 0.05 * torch.linspace(0, 2, 11, dtype=torch.float64).clamp(max=1)[:, None]
        likely = 0.6 + rise + 0.02 * torch.rand(11, images, generator=draw, dtype=torch.float64)
        return Curve(RATIOS, (1.0,) * 11, likely, torch.arange(images).expand(11, images) < 0.7 * images)

    assert 0.4 <= choose([curve(12)]) <= 0.6
    assert choose([curve(200)]) > 0.6


@pytest.mark.parametrize("seed", range(40))
def test_the_rule_is_that_of_a_loop(seed):
    draw = torch.Generator().manual_seed(seed)
    curves = []
    for n, level in ((60, 0.8), (40, 0.15)):
        place, height = torch.rand(2, generator=draw).tolist()
        peak = level - height * (torch.linspace(0, 1, 11, dtype=torch.float64) - place)[:, None] ** 2
        likely = (peak + 0.1 * torch.randn(11, n, generator=draw).cumsum(0) / 2).clamp(0.01, 0.99)
        curves.append(Curve(RATIOS, (1.0,) * 11, likely, likely > 0.5))
    assert choose(curves) == oracles.chosen_ratio(curves)
    assert choose(curves[:1]) == oracles.chosen_ratio(curves[:1])


def test_without_a_gain_that_is_shown_it_goes_by_what_zero_shot_leaves_to_win():
    """Of few images the same small gain shows nothing; of many the highest ratio that is as good is taken."""
    gain = [0.5 + 0.06 * (k / 10) for k in range(11)]
    assert choose([curve_of([scores_of(gain, 4000)], RATIOS)]) == 1.0
    for accuracy, ratio in ((1.0, 0.0), (0.9, 0.2), (0.7, 0.5), (0.6, 0.6), (0.0, 1.0)):  # 1 − z², where all are alike
        assert choose([curve_of([scores_of([accuracy] * 11, 40)], RATIOS)]) == ratio
    assert choose([curve_of([scores_of([0.0] + [1.0] * 10, 1)], RATIOS)]) == 1.0  # one image shows nothing
    worse = curve_of([scores_of([0.9 - 0.06 * k for k in range(11)], 400)], RATIOS)
    assert choose([worse]) == 0.0


# ---- the forecast


def test_the_forecast_is_the_left_out_accuracy_with_an_interval_half_as_wide_again_as_wilsons():
    curve = curve_of([scores_of([0.5] * 3 + [0.75] * 8, 88)], RATIOS)
    found = expected(curve, 0.3, 4)
    assert (found.accuracy, found.zero_shot, found.classes) == (0.75, 0.5, 4)
    low, high = wilson_interval(66, 88, 0.9)
    assert (found.accuracy - found.low) / (0.75 - low) == pytest.approx(1.5)
    assert (found.high - found.accuracy) / (high - 0.75) == pytest.approx(1.5)


def test_a_forecast_stays_a_share_and_holds_what_was_counted():
    for accuracy, n in ((0.0, 3), (0.025, 40), (0.975, 40), (1.0, 3)):
        found = expected(curve_of([scores_of([accuracy] * 11, n)], RATIOS), 0.5, 4)
        assert 0 <= found.low <= found.accuracy == accuracy <= found.high <= 1
        assert found.low < found.high


def test_a_curve_says_its_intervals():
    [row, *_] = curve_of([scores_of([0.75] * 11, 80)], RATIOS).as_json()
    assert (row["alpha"], row["n"], row["accuracy"]) == (0.0, 80, 0.75)
    assert (row["low"], row["high"]) == wilson_interval(60, 80)
    assert math.isfinite(row["temperature"])
