"""Figures against values worked by hand or published."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom, binomtest, multinomial, sem, t

from clipfit.measure.metrics import accuracy, confusion, estimate, harmonic_mean, paired_difference, wilson_interval


def test_harmonic_mean():
    assert harmonic_mean(0.5, 1.0) == pytest.approx(2 / 3)
    assert harmonic_mean(0.8548, 0.7708) == pytest.approx(0.8106, abs=5e-5)  # CLIP-CITE's table: 85.48, 77.08 → 81.06
    assert harmonic_mean(0.6934, 0.7422) == pytest.approx(0.7170, abs=5e-5)
    assert harmonic_mean(0.0, 0.0) == 0
    assert harmonic_mean(0.0, 1.0) == 0


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        # Newcombe 1998 (Statistics in Medicine 17:857–872), table I, method 3: the score interval
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        # its mirror, and a single image: (1 + z²/2 ± z·√(z²/4)) / (1 + z²) = 1 / (1 + z²) … 1
        (20, 20, 1 - 0.1611, 1.0),
        (1, 1, 1 / (1 + 1.959963984540054**2), 1.0),
    ],
)
def test_wilson_interval(right, n, low, high):
    assert wilson_interval(right, n) == pytest.approx((low, high), abs=5.1e-5)


def test_wilson_interval_is_that_of_scipy():
    for n in (1, 2, 7, 60):
        for right in range(n + 1):
            theirs = binomtest(right, n).proportion_ci(0.9, method="wilson")
            assert wilson_interval(right, n, 0.9) == pytest.approx((theirs.low, theirs.high), abs=1e-15)


def test_wilson_interval_by_hand():
    """5 of 10 at z = 2: centre (0.5 + 4/20) / 1.4 = 0.5; half 2/1.4 · √(0.025 + 0.01) = 0.26726."""
    found = wilson_interval(5, 10, confidence=math.erf(math.sqrt(2)))
    assert found == pytest.approx((0.5 - 0.267261, 0.5 + 0.267261), abs=1e-6)


def test_wilson_interval_stays_inside_and_touches_the_ends():
    for n in (1, 3, 50):
        assert wilson_interval(0, n)[0] == 0
        assert wilson_interval(n, n)[1] == 1
        for right in range(n + 1):
            low, high = wilson_interval(right, n)
            assert 0 <= low <= right / n <= high <= 1


def test_accuracy_overall_and_by_class():
    result = accuracy(["cat", "dog", "cat", "owl", "cat"], ["cat", "cat", "cat", "dog", "owl"])
    assert (result.right, result.n, result.value) == (2, 5, 0.4)
    assert result.per_class == {"cat": (2, 3), "dog": (0, 1), "owl": (0, 1)}
    record = result.as_json()
    assert record["accuracy"] == 0.4
    assert record["n"] == 5
    assert (record["low"], record["high"]) == wilson_interval(2, 5)
    assert record["macro"] == pytest.approx((2 / 3 + 0 + 0) / 3)
    assert record["per_class"]["cat"] == {"accuracy": pytest.approx(2 / 3), "n": 3}


def test_a_large_class_hides_small_ones_in_micro_but_not_in_macro():
    result = accuracy(["cat"] * 11, ["cat"] * 9 + ["dog"] * 2)
    assert result.value == pytest.approx(9 / 11)
    assert result.macro == 0.5
    assert result.unbalanced
    assert not accuracy(["cat"] * 5, ["cat"] * 3 + ["dog"] * 2).unbalanced


def test_confusion_counts_what_each_class_was_taken_for():
    counts = confusion(["cat", "dog", "dog", "cat"], ["cat", "cat", "cat", "dog"])
    assert counts == {("cat", "cat"): 1, ("cat", "dog"): 2, ("dog", "cat"): 1}
    assert counts["dog", "dog"] == 0


def paired(both: int, ours: int, theirs: int, neither: int):
    mine = [True] * (both + ours) + [False] * (theirs + neither)
    return paired_difference(mine, [True] * both + [False] * ours + [True] * theirs + [False] * neither)


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        # Newcombe 1998 (Statistics in Medicine 17:2635–2650), table II, method 10
        ((36, 12, 2, 0), 0.0569, 0.3404),
        # Altman et al., Statistics with Confidence (2000), table 6.2; and two of Fagerland et al. 2014
        ((14, 5, 0, 22), 0.0115, 0.2265),
        ((59, 6, 16, 80), -0.1186, -0.0046),
        ((1, 1, 7, 12), -0.5069, -0.0256),
    ],
)
def test_paired_difference_against_published_intervals(counts, low, high):
    found = paired(*counts)
    assert found.difference == pytest.approx((counts[1] - counts[2]) / sum(counts))
    assert (found.low, found.high) == pytest.approx((low, high), abs=5.1e-5)


def test_paired_difference_by_hand():
    """One right against one wrong: φ = 0; Wilson of 1/1 is [1/(1 + z²), 1], of 0/1 its mirror; √2·z²/(1 + z²) below."""
    z2 = 1.959963984540054**2
    assert paired(0, 1, 0, 0).low == pytest.approx(1 - math.sqrt(2) * z2 / (1 + z2))
    assert paired(0, 1, 0, 0).high == 1


def test_paired_difference_turns_its_sign_with_the_sides():
    one, other = paired(20, 9, 3, 8), paired(20, 3, 9, 8)
    assert one.difference == -other.difference
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))


def test_where_no_image_changed_sides_the_interval_keeps_a_width():
    for counts in ((10, 0, 0, 10), (10, 0, 0, 0), (0, 0, 0, 10)):
        found = paired(*counts)
        assert found.difference == 0
        assert found.low < 0 < found.high
    assert paired(1000, 0, 0, 1000).high < paired(10, 0, 0, 10).high < 0.1  # of unpaired samples it would be 0.3


@pytest.mark.parametrize("shares", [(0.5, 0.2, 0.1, 0.2), (0.8, 0.1, 0.02, 0.08), (0.3, 0.05, 0.05, 0.6)])
def test_the_paired_interval_covers_the_true_difference(shares):
    """1500 draws of 60 images, standard error 0.006; without φ, as for two sets of images, it covers 0.98 to 1."""
    draws = np.random.default_rng(3).multinomial(60, shares, size=1500)
    truth, known = shares[1] - shares[2], {}
    for counts in map(tuple, draws.tolist()):
        if counts not in known:
            found = paired(*counts)
            known[counts] = found.low <= truth <= found.high
    covered = [known[counts] for counts in map(tuple, draws.tolist())]
    assert 0.94 <= np.mean(covered) <= 0.98


def test_a_mean_has_students_interval():
    values = [0.71, 0.74, 0.68, 0.75]
    found = estimate(values)
    low, high = t.interval(0.95, 3, np.mean(values), sem(values))
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high))


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("n", [10, 40, 167])
def test_wilsons_interval_covers_the_true_share(n, share):
    """Exactly, over all counts; for shares near 1 of few images a step of the counts costs some."""
    covered = sum(
        binom.pmf(right, n, share)
        for right in range(n + 1)
        if np.prod(np.subtract(wilson_interval(right, n), share)) <= 0
    )
    assert 0.91 <= covered <= 0.99


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 12])
@pytest.mark.parametrize("changed", [0.1, 0.4, 1.0])
def test_few_images_show_no_difference_where_there_is_none(n, changed):
    """Exactly, over all counts: both models are equally good, and a share of images changes sides. Newcombe's interval
    alone would leave 0 out every other time at n = 2 where all change."""
    covered = worse = 0.0
    for gained, lost in itertools.product(range(n + 1), repeat=2):
        if gained + lost <= n:
            same = (n - gained - lost + 1) // 2, (n - gained - lost) // 2
            found = paired(same[0], gained, lost, same[1])
            shares = [changed / 2, changed / 2, 1 - changed]
            chance = multinomial.pmf([gained, lost, sum(same)], n, shares)
            covered += chance * (found.low <= 0 <= found.high)
            worse += chance * (found.verdict == "worse")
    assert covered >= 0.92
    assert worse <= 0.04


def test_the_interval_leaves_no_doubt_only_where_the_mid_p_test_has_none():
    for gained, lost, same in itertools.product(range(12), range(12), (0, 1, 40)):
        found = paired(same + 1, gained, lost, same)
        changed = gained + lost
        exact = binomtest(gained, changed).pvalue if changed else 1.0
        assert found.mcnemar_p == pytest.approx(exact)
        if found.verdict:
            assert exact - binom.pmf(gained, changed, 0.5) <= 0.05
            assert changed >= 5
            assert found.verdict == ("better" if gained > lost else "worse")
            assert (found.low > 0 or found.high < 0) == bool(found.verdict)


def test_mcnemar_against_a_published_value():
    """Agresti, Categorical Data Analysis, table 10.1: 150 changes against 86; χ² = 17.36 is p = 3.1e-5, not exact."""
    found = paired(794, 150, 86, 570)
    assert 3.1e-5 < found.mcnemar_p < 4e-5
    assert found.verdict == "better"


def test_there_is_no_figure_of_no_images():
    with pytest.raises(ValueError, match="no images"):
        accuracy([], [])
    with pytest.raises(ValueError, match="no images"):
        paired_difference([], [])


def test_accuracy_refuses_lists_of_different_lengths():
    with pytest.raises(ValueError, match="longer"):
        accuracy(["cat"], ["cat", "dog"])
