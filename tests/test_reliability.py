"""What probabilities are worth: against loops, and against simulations of models that know their chances."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from conftest import Cli

from clipfit.measure.calibration import Temperature
from clipfit.measure.predictions import Predictions
from clipfit.measure.reliability import Reliability, certainty

NAMES = tuple(f"class {c}" for c in range(12))


def table(logits: torch.Tensor, labels: list[int | None], alpha: float = 0.5) -> Predictions:
    names = NAMES[: logits.shape[1]]
    known = tuple(None if c is None else names[c] for c in labels)
    return Predictions(tuple(map(str, range(len(labels)))), known, names, logits, alpha, "a {}")


def random_table(n: int, classes: int = 12, seed: int = 0, steps: float = 0.0) -> Predictions:
    """Logits whose classes are drawn by their own softmax: a model that knows its chances. steps: rounded, for ties."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=draw) * 2
    logits = (logits / steps).round() * steps if steps else logits
    labels = logits.double().softmax(1).multinomial(1, generator=draw).squeeze(1).tolist()
    return table(logits, labels)


def right_of(predictions: Predictions) -> list[bool]:
    return [name == label for name, label in zip(predictions.names, predictions.labels, strict=True)]


# ---- calibration


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("steps", [0.0, 1.0])
def test_the_calibration_error_is_that_of_the_loop(temperature, steps):
    made = random_table(90, steps=steps)
    for count in (1, 4, 15):
        expected = oracles.calibration_error(oracles.certain(made.logits, temperature), right_of(made), count)
        assert Reliability.of(made, temperature).calibration_error(count) == pytest.approx(expected)


def test_bins_are_what_a_reliability_diagram_shows():
    logits = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [9.0, 0.0]])
    bins = Reliability.of(table(logits, [0, 0, 0, 0])).bins(4)
    assert [(b.low, b.high, b.n, b.accuracy) for b in bins] == [(0.25, 0.5, 1, 1), (0.5, 0.75, 2, 0.5), (0.75, 1, 1, 1)]
    assert bins[0].confidence == 0.5
    assert bins[1].confidence == pytest.approx(1 / (1 + np.exp(-1)))


def test_of_probabilities_without_fault_the_error_goes_to_nothing():
    errors = [Reliability.of(random_table(n)).calibration_error() for n in (200, 2000, 100_000)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.005


def test_a_temperature_undoes_what_it_did():
    """Logits three times too large are too sure; at a temperature of 3 they are what they were."""
    made = random_table(5000)
    sure = replace(made, logits=3 * made.logits)
    plain = Reliability.of(made).calibration_error()
    assert Reliability.of(sure).calibration_error() > 0.2
    assert Reliability.of(sure, 3.0).calibration_error() == pytest.approx(plain, abs=1e-4)
    assert sum(b.n for b in Reliability.of(sure).bins()) == 5000
    assert all(b.accuracy < b.confidence for b in Reliability.of(sure).bins() if b.n > 100)


@pytest.mark.parametrize(("n", "scale"), [(40, 1.0), (150, 1.0), (150, 8.0), (1000, 2.0), (3, 20.0)])
def test_the_error_by_chance_is_the_mean_of_a_simulation(n, scale):
    made = random_table(n)
    sure = Reliability.of(replace(made, logits=scale * made.logits))
    draw = torch.Generator().manual_seed(1)
    errors = []
    for _ in range(500):
        right = (torch.rand(n, generator=draw, dtype=torch.float64) < sure.confidence).double()
        errors.append(Reliability(sure.confidence, right).calibration_error())
    assert sure.error_by_chance() == pytest.approx(np.mean(errors), rel=0.2)


# ---- coverage


@pytest.mark.parametrize("steps", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_accuracy_against_coverage_is_that_of_the_loop(steps, temperature):
    made = random_table(61, steps=steps)
    found = Reliability.of(made, temperature)
    assert (len(found.confidence.unique()) < 61) == bool(steps)
    confidence, right = found.confidence.tolist(), right_of(made)
    assert confidence == pytest.approx(oracles.certain(made.logits, temperature))
    for coverage, k in ((1.0, 61), (0.9, 55), (0.75, 46), (0.5, 31), (0.001, 1)):
        covered = found.at(coverage)
        assert covered.n == k
        assert covered.accuracy == pytest.approx(oracles.accuracy_of_most_certain(confidence, right, k))
        assert sum(p > covered.least_probability for p in confidence) < k
        assert sum(p >= covered.least_probability for p in confidence) >= k
    for point in found.curve():
        assert point.coverage == point.n / 61
        assert point.accuracy == pytest.approx(oracles.accuracy_of_most_certain(confidence, right, point.n))
        assert point.n == sum(p >= point.least_probability for p in confidence)


def test_whole_images_make_a_share():
    """0.9 of 10 and of 30 is 9 and 27, whatever floats say of the products; of what is no whole number the next."""
    for n, k in ((10, 9), (30, 27), (100, 90), (11, 10), (1, 1), (2, 2)):
        assert Reliability.of(random_table(n)).at(0.9).n == k
    assert 0.55 * 100 > 55
    assert Reliability.of(random_table(100)).at(0.55).n == 55


def test_of_equally_certain_images_each_counts_as_its_part():
    """Two certain ones, both right, and of five alike one: 6 of 7 are those two and 4/5 of that one."""
    logits = torch.tensor([[9.0, 0.0]] * 2 + [[1.0, 0.0]] * 5)
    found = Reliability.of(table(logits, [0, 0, 0, 1, 1, 1, 1]))
    assert found.at(6 / 7).accuracy == pytest.approx((2 + 4 / 5) / 6)
    assert [(c.n, c.accuracy) for c in found.curve()] == [(2, 1), (7, 3 / 7)]


def test_the_most_certain_are_told_apart_where_float32_is_one():
    logits = torch.tensor([[40.0, 0.0], [30.0, 0.0], [35.0, 0.0]])
    found = Reliability.of(table(logits, [0, 1, 0]))
    assert found.right.tolist() == [1, 0, 1]
    assert found.at(2 / 3).accuracy == 1
    assert len(found.curve()) == 3


def test_a_model_that_knows_its_chances_is_the_better_the_less_it_is_asked():
    covered = certainty(random_table(3000)).coverage
    assert [c.coverage for c in covered] == [1.0, 0.9, 0.75]
    assert covered[0].accuracy < covered[1].accuracy < covered[2].accuracy


# ---- both, for a table


@pytest.mark.parametrize("labels", [[0], [1], [0, 0, 0], [1, 1, 1]])
def test_few_images_all_right_or_all_wrong(labels):
    logits = torch.tensor([[50.0, -50.0]]).repeat(len(labels), 1)
    found = certainty(table(logits, labels))
    share = 1.0 - labels[0]
    assert [c.accuracy for c in found.coverage] == [share] * 3
    assert found.calibration_error == pytest.approx(1 - share)
    assert found.error_by_chance == pytest.approx(0)


def test_images_without_a_label_count_nowhere():
    logits = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0]])
    found = Reliability.of(table(logits, [0, None, 1]))
    assert (found.right.tolist(), found.at(1.0).n, sum(b.n for b in found.bins())) == ([1, 0], 2, 2)
    with pytest.raises(ValueError, match="no images"):
        Reliability.of(table(logits, [None, None, None]))
    with pytest.raises(ValueError, match="no images"):
        table(logits, [None, None, None]).top_accuracy(1)


def test_the_five_best_names():
    made = random_table(80, steps=2.0)
    for k in (1, 5, 12):
        ranks = [
            sum(x > row[c] or (x == row[c] and other < c) for other, x in enumerate(row))
            for row, c in zip(made.logits.tolist(), map(NAMES.index, made.labels), strict=True)
        ]
        assert made.top_accuracy(k) == sum(rank < k for rank in ranks) / 80
    assert made.top_accuracy(1) == made.accuracy().value
    assert certainty(made).top5 == made.top_accuracy(5)
    assert certainty(random_table(20, classes=10)).top5 is not None
    assert certainty(random_table(20, classes=9)).top5 is None


def test_a_temperature_holds_for_its_ratio_classes_and_template_alone():
    made = random_table(200)
    temperature = Temperature(2.5, 0.5, NAMES[::-1], "a {}")
    found = certainty(made, temperature)
    assert (found.calibrated, found.temperature) == (True, 2.5)
    assert found.calibration_error == Reliability.of(made, 2.5).calibration_error()
    assert found.coverage[1] == Reliability.of(made, 2.5).at(0.9)
    for other in (
        replace(made, alpha=1.0),
        replace(made, template="the {}"),
        replace(made, templates=("a {}", "b {}")),
        made.within(NAMES[:11]),
    ):
        assert (certainty(other, temperature).calibrated, certainty(other, temperature).temperature) == (False, 1.0)
        assert certainty(other, temperature) == certainty(other)


# ---- in `evaluate`


def test_evaluate_is_calibrated_where_the_runs_temperature_holds(cli: Cli, split_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(split_run, run, ignore=shutil.ignore_patterns("evaluations"))
    before = cli("evaluate", run, "--json").document["alphas"]
    base = json.loads((run / "classes.json").read_text("utf-8"))["base"]
    found = {"value": 3.0, "alpha": 0.5, "classes": base, "template": "a photo of a {}"}
    (run / "folds.json").write_text(json.dumps({"temperature": found}), "utf-8")
    ended = cli("evaluate", run, "--json")
    after = ended.document["alphas"]
    calibrated = {(row["alpha"], part) for row in after for part in ("base", "new", "union") if row[part]["calibrated"]}
    assert calibrated == {(0.5, "base")}
    assert (after[1]["base"]["temperature"], before[1]["base"]["temperature"]) == (3.0, 1.0)
    assert after[1]["base"]["calibration_error"] != before[1]["base"]["calibration_error"]
    assert after[0] == before[0]
    assert after[1]["new"] == before[1]["new"]
    assert "* at the temperature that adapt found" in ended.stderr
    (run / "folds.json").write_text(json.dumps({"temperature": {**found, "value": -1.0}}), "utf-8")
    cli("evaluate", run).fails(4, "folds.json", "temperature of -1.0")


def test_the_table_says_what_the_document_says(cli: Cli, split_run):
    ended = cli("evaluate", split_run, "--alpha", 1, "--json")
    at = ended.stderr.splitlines().index(next(line for line in ended.stderr.splitlines() if "90%  75%" in line))
    for line, row in zip(ended.stderr.splitlines()[at + 2 :], ended.document["alphas"], strict=False):
        shown = line.removeprefix("0 zero-shot").split()[-12:]
        expected = []
        for part in ("base", "new", "union"):
            expected += [f"{100 * covered['accuracy']:.0f}" for covered in row[part]["coverage"][1:]]
            expected += ["–", f"{100 * row[part]['calibration_error']:.1f}"]  # of fewer than ten classes no top-5
        assert shown == expected
