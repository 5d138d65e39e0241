"""Figures against values worked by hand or published."""

from __future__ import annotations

import pytest

from clipfit.measure.metrics import accuracy, harmonic_mean, wilson_interval


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


def test_wilson_interval_by_hand():
    """5 of 10 at z = 2: centre (0.5 + 4/20) / 1.4 = 0.5; half 2/1.4 · √(0.025 + 0.01) = 0.26726."""
    assert wilson_interval(5, 10, z=2) == pytest.approx((0.5 - 0.267261, 0.5 + 0.267261), abs=1e-6)


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
    assert record["interval"] == pytest.approx(wilson_interval(2, 5))
    assert record["per_class"]["cat"] == {"accuracy": pytest.approx(2 / 3), "n": 3}


def test_accuracy_refuses_lists_of_different_lengths():
    with pytest.raises(ValueError, match="longer"):
        accuracy(["cat"], ["cat", "dog"])
