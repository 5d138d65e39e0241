"""Runs that people have load for ever: tests/golden has some of every format, and make.py there says how."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from clipfit import EvaluateConfig, evaluate
from clipfit.measure import evaluations
from clipfit.runs.run import open_run

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text("utf-8"))
RUNS = [f"{place}/{name}" for place, found in EXPECTED.items() for name in found]


@pytest.fixture
def golden(tmp_path, monkeypatch) -> Path:
    """A copy of the folder, as the current one: the runs name their model and images relative to it."""
    shutil.copytree(GOLDEN, tmp_path / "golden")
    monkeypatch.chdir(tmp_path / "golden")
    return tmp_path / "golden"


def expected(run: str) -> dict:
    place, name = run.split("/")
    return EXPECTED[place][name]


def digest(state: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode() + tensor.numpy().tobytes())
    return found.hexdigest()


@pytest.mark.usefixtures("golden")
@pytest.mark.parametrize("run", RUNS)
def test_the_stored_weights_are_read_to_the_bit(run):
    opened = open_run(Path(run))
    assert opened.alpha == 0.5
    assert opened.base == ("bee", "cow", "red fox")
    assert opened.method == ("cite" if run.endswith("cite") else "atha")
    assert {f"{alpha:g}": digest(opened.state(alpha)) for alpha in (0.5, 1.0)} == expected(run)["digests"]


@pytest.mark.usefixtures("golden")
@pytest.mark.parametrize("run", RUNS)
def test_images_are_judged_as_they_were(run):
    """Logits to 1e-5 at α = 0, 0.5 and 1; figures as the clipfit that made the run gave them."""
    result = evaluate(EvaluateConfig(Path(run), alphas=(0.0, 0.5, 1.0)))
    stored = evaluations.read(result.kept)
    for alpha, parts in expected(run)["logits"].items():
        tables = stored.tables(float(alpha))
        assert tables.keys() == parts.keys()
        for part, logits in parts.items():
            torch.testing.assert_close(tables[part].logits, torch.tensor(logits), atol=1e-5, rtol=1e-5)
    rows = {row["alpha"]: row for row in result.as_json()["alphas"]}
    for row in expected(run)["figures"]:
        for part in ("base", "new", "union"):
            found, then = rows[row["alpha"]][part], row[part]
            assert (found["accuracy"], found["n"]) == pytest.approx((then["accuracy"], then["n"]))
            assert {name: one["accuracy"] for name, one in found["per_class"].items()} == pytest.approx(
                {name: one["accuracy"] for name, one in then["per_class"].items()}
            )


@pytest.mark.parametrize("run", [run for run in RUNS if run.startswith("run-format-2/")])
def test_a_stored_evaluation_is_read_without_the_model(run):
    stored = evaluations.read(GOLDEN / run / "evaluations/held-out")
    assert stored.alphas == [0.0, 0.5, 1.0]
    for alpha, parts in expected(run)["logits"].items():
        for part, table in stored.tables(float(alpha)).items():
            torch.testing.assert_close(table.logits, torch.tensor(parts[part]), atol=1e-6, rtol=1e-6)
            assert len(table.ids) == len(parts[part])


@pytest.mark.usefixtures("golden")
@pytest.mark.parametrize("run", RUNS)
def test_only_format_1_is_of_unproven_files(run):
    notes = open_run(Path(run)).notes
    assert any("format 1" in note for note in notes) == run.startswith("run-format-1/")


def test_the_runs_are_small_and_of_every_format():
    assert {json.loads((GOLDEN / run / "config.json").read_text("utf-8"))["format"] for run in RUNS} == {1, 2}
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < 750_000


def test_they_name_no_machine():
    for run in RUNS:
        for file in (GOLDEN / run).rglob("*"):
            assert file.is_dir() or str(GOLDEN.parent).encode() not in file.read_bytes(), file
