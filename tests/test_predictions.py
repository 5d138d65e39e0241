"""Predictions as data: what follows from a table, and evaluations as they lie in a run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_classes
from PIL import Image

from clipfit import AdaptConfig, EvaluateConfig, adapt, evaluate
from clipfit.errors import ModelError
from clipfit.measure import evaluations
from clipfit.measure.figures import figures, losses
from clipfit.measure.predictions import Predictions
from clipfit.runs import files, manifest

CAT, DOG, ELK = "cat", "dog", "elk"


def table(logits, labels, candidates=(CAT, DOG, ELK), alpha=1.0, ids=None) -> Predictions:
    ids = ids or tuple(f"{i}.png" for i in range(len(labels)))
    return Predictions(ids, tuple(labels), tuple(candidates), torch.tensor(logits), alpha, "a {}")


@pytest.fixture
def four() -> Predictions:
    """Taken for elk, dog, cat, dog."""
    return table([[2.0, 1, 3], [0, 2, 1], [5, 0, 4], [0, 1, 0]], [CAT, DOG, ELK, None])


def test_the_largest_logit_is_the_name_and_the_first_of_equals(four):
    assert four.names == [ELK, DOG, CAT, DOG]
    assert table([[1.0, 1.0, 0.0]], [CAT]).names == [CAT]


def test_probabilities_are_a_softmax_at_a_temperature(four):
    by_hand = torch.tensor([2.0, 1, 3]).div(2).exp()
    torch.testing.assert_close(four.probabilities(2.0)[0], by_hand / by_hand.sum())
    torch.testing.assert_close(four.probabilities().sum(1), torch.ones(4))


def test_images_without_a_label_are_not_judged(four):
    result = four.accuracy()
    assert (result.right, result.n) == (1, 3)
    assert four.confusion() == {(CAT, ELK): 1, (DOG, DOG): 1, (ELK, CAT): 1}


def test_a_subset_of_classes_takes_columns_and_rows(four):
    """Without elk, the cat is one; the elk is no image of these classes and is not asked about."""
    among = four.within({DOG, CAT})
    assert (among.ids, among.labels, among.candidates) == (("0.png", "1.png"), (CAT, DOG), (CAT, DOG))
    assert among.logits.tolist() == [[2, 1], [0, 2]]
    assert among.accuracy().value == 1


def test_gains_are_paired_by_image(four):
    right = table([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 0]], four.labels)
    assert right.gain_over(four).difference == pytest.approx(2 / 3)
    assert right.agreement_with(four) == 0.5
    for other in (table(four.logits.tolist(), [DOG, *four.labels[1:]]), four.within({CAT})):
        with pytest.raises(ValueError, match="the same images"):
            right.gain_over(other)


def test_a_table_is_read_back_as_it_was(four, tmp_path):
    surrogate = table(four.logits.tolist(), four.labels, ids=("a\udce9.png", "é.png", "\n.png", "d.png"), alpha=0.1)
    surrogate.save(tmp_path / "t.safetensors")
    again = Predictions.load(tmp_path / "t.safetensors")
    assert torch.equal(again.logits, surrogate.logits)
    for name in ("ids", "labels", "candidates", "alpha", "template", "features"):
        assert getattr(again, name) == getattr(surrogate, name)


def test_what_is_no_table_is_refused(four, split_run, tmp_path):
    with pytest.raises(ModelError, match=r"no table of predictions: it has no 'ids'"):
        Predictions.load(split_run / "model.safetensors")
    table([[1.0, 2, 3]], [CAT, DOG]).save(tmp_path / "t.safetensors")
    with pytest.raises(ModelError, match=r"2 images, 2 labels and 3 candidates, but logits \(1, 3\)"):
        Predictions.load(tmp_path / "t.safetensors")


def test_classes_that_lost_are_named_by_what_they_lost():
    labels = [CAT, CAT, DOG, DOG, ELK, ELK]
    zero = table(torch.eye(3)[[0, 0, 1, 1, 2, 0]].tolist(), labels, alpha=0.0)
    tuned = table(torch.eye(3)[[0, 1, 0, 0, 2, 2]].tolist(), labels)
    before, after = (figures({"union": t}, {"union": zero}, (CAT, DOG), (ELK,)) for t in (zero, tuned))
    assert [(loss.name, loss.before, loss.after) for loss in losses(after, before)] == [(DOG, 1, 0), (CAT, 1, 0.5)]
    assert losses(before, before) == []


ALPHAS = (0.0, 0.5, 1.0)


@pytest.fixture(scope="module")
def run(split_run, tmp_path_factory) -> Path:
    """A copy of the run that may be written to, with what it was made from at the same place."""
    copy = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(split_run, copy, ignore=shutil.ignore_patterns("evaluations"))
    return copy


def test_figures_follow_from_what_is_stored(run):
    measured = evaluate(EvaluateConfig(run, alphas=ALPHAS))
    assert measured.kept == run / "evaluations" / "held-out"
    stored = evaluations.read(measured.kept)
    assert stored.alphas == list(ALPHAS)
    zero_shot = stored.tables(0.0)
    for row in measured.rows:
        tables = stored.tables(row.alpha)
        assert set(tables) == {"union"}
        assert figures(tables, zero_shot, measured.base_classes, measured.new_classes) == row
        about = tables["union"]
        assert about.logits.dtype == torch.float32
        assert about.candidates == ("bee", "cow", "dog", "Ant Lion", "elk")
        assert about.ids[0] == "test/Ant-Lion/0.png"
        assert (about.alpha, about.template, about.features) == (row.alpha, "a photo of a {}", "fp32")
    document = measured.as_json()
    for row in document["alphas"]:
        row["tables"] = {"union": f"predictions-{row['alpha']:g}.safetensors"}
    del document["run"], document["model"], document["kept"]
    assert stored.document == {**document, "data": "held-out"}


def test_agreement_and_differences_are_with_zero_shot(run):
    """Of three ratios, none the one before: the example must tell the two apart."""
    measured = evaluate(EvaluateConfig(run, alphas=ALPHAS))
    stored = evaluations.read(measured.kept)
    taken = [stored.tables(alpha)["union"].names for alpha in ALPHAS]
    labels = stored.tables(0.0)["union"].labels

    def agreement(one, other):
        return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)

    assert agreement(taken[2], taken[0]) != agreement(taken[2], taken[1])
    assert [row.agreement for row in measured.rows] == [agreement(names, taken[0]) for names in taken]
    for names, row in zip(taken, measured.rows, strict=True):
        difference = agreement(names, labels) - agreement(taken[0], labels)
        assert row.against_zero_shot["union"].difference == pytest.approx(difference)
        for part in ("base", "new"):
            own, before = getattr(row, part).value, getattr(measured.rows[0], part).value
            assert row.against_zero_shot[part].difference == pytest.approx(own - before)
    none = measured.rows[0].against_zero_shot.values()
    assert {(d.difference, d.low, d.high) for d in none} == {(0.0, 0.0, 0.0)}


def test_the_page_reads_a_table_without_clipfit_or_torch(run):
    measured = evaluate(EvaluateConfig(run, alphas=(0.5,)))
    page = (Path(__file__).parents[1] / "docs" / "evaluate.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    code = code.replace("runs/my_shots-cite/evaluations/held-out", str(measured.kept))
    blocked = "import sys; sys.modules.update(torch=None, clipfit=None)\n"
    done = subprocess.run([sys.executable, "-c", blocked + code], capture_output=True, text=True, check=True)
    union = measured.rows[1].union
    lines = done.stdout.splitlines()
    assert lines[0] == f"{union.value:.1%} of 9 images among 5 classes"
    assert len(lines) == 1 + union.n - union.right
    for line in lines[1:]:
        assert re.fullmatch(r"test/\S+\.png is .+ and was taken for .+", line)


def test_the_page_names_every_key_and_column(run):
    document = evaluate(EvaluateConfig(run, alphas=(0.5,))).as_json()
    row = document["alphas"][0]
    page = (Path(__file__).parents[1] / "docs" / "evaluate.md").read_text("utf-8")
    keys = {*document, *row, *row["base"], *row["base"]["coverage"][0], *row["against_zero_shot"]["base"]}
    assert [key for key in sorted(keys) if f"`{key}`" not in page] == []


def test_a_run_that_edits_tokens_has_a_table_for_each_set_of_candidates(split, models, tmp_path):
    """Their logits differ by more than columns, so that none may be derived from another."""
    options = {"head_ratio": 0.25, "tail_ratio": 0.25, "head_strength": 0.9, "tail_strength": 0.4}
    made = adapt(AdaptConfig(split, "atha", models["vit"], output=tmp_path / "run", method_options=options))
    measured = evaluate(EvaluateConfig(made.run, alphas=(1.0,)))
    stored = evaluations.read(measured.kept)
    tables = stored.tables(1.0)
    base, new = measured.base_classes, measured.new_classes
    assert {part: (len(t.ids), t.candidates) for part, t in tables.items()} == {
        "union": (9, (*base, *new)),
        "base": (5, base),
        "new": (4, new),
    }
    for part, names in (("base", base), ("new", new)):
        derived = tables["union"].within(names)
        assert (derived.ids, derived.labels) == (tables[part].ids, tables[part].labels)
        assert not torch.allclose(derived.logits, tables[part].logits)
    assert figures(tables, stored.tables(0.0), base, new) == measured.rows[1]
    assert measured.rows[1].base.right == tables["base"].accuracy().right


def test_an_evaluation_is_named_by_its_data_and_replaced(cli, run, tmp_path):
    make_classes(tmp_path / "my pets!", {"dog": 2}, seed=7)
    make_classes(tmp_path / "held-out", {"dog": 1}, seed=8)
    kept = run / "evaluations"
    shutil.rmtree(kept, ignore_errors=True)
    assert cli("evaluate", run, "--alphas", "0:1:0.25").code == 0
    assert cli("evaluate", run, "--data", "my pets!").code == 0
    assert cli("evaluate", run, "--data", "held-out").code == 0
    assert sorted(p.name for p in kept.glob("[!.]*")) == ["held-out", "held-out-data", "my-pets"]
    first = {p.name: p.read_bytes() for p in (kept / "held-out").iterdir()}
    assert sum(name.startswith("predictions-") for name in first) == 5
    assert cli("evaluate", run, "--alpha", 1).code == 0
    assert sorted(p.name for p in (kept / "held-out").iterdir()) == [
        "evaluation.json", "files.json", "predictions-0.safetensors", "predictions-1.safetensors",
    ]  # fmt: skip
    assert cli("evaluate", run, "--alphas", "0:1:0.25").code == 0
    assert {p.name: p.read_bytes() for p in (kept / "held-out").iterdir()} == first
    assert str(tmp_path) not in "".join(p.read_text("utf-8") for p in kept.rglob("evaluation.json"))


def test_an_evaluation_that_is_not_whole_leaves_the_old_one(run, monkeypatch):
    before = evaluate(EvaluateConfig(run, alphas=ALPHAS))
    old = {p.name: p.read_bytes() for p in before.kept.iterdir()}
    usual, written = Predictions.save, []

    def interrupted(self, path):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        usual(self, path)

    monkeypatch.setattr(Predictions, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(EvaluateConfig(run, alphas=(0.25,)))
    assert written
    assert {p.name: p.read_bytes() for p in before.kept.iterdir()} == old
    assert all(p.suffix == ".lock" for p in before.kept.parent.glob(".*"))


def test_a_run_that_cannot_be_written_is_measured_and_a_note_says_that_nothing_was_kept(cli, run, tmp_path):
    sealed = tmp_path / "sealed"
    shutil.copytree(run, sealed, ignore=shutil.ignore_patterns("evaluations"))
    (sealed / "evaluations").write_text("a file stands where the folder would be")
    result = cli("evaluate", sealed, "--alpha", 1, "--json")
    assert result.code == 0, result.stderr
    record = result.document
    assert record["kept"] is None
    assert record["alphas"] == cli("evaluate", run, "--alpha", 1, "--json").document["alphas"]
    assert any(note.startswith("the predictions were not kept: ") for note in record["notes"])
    assert "note: the predictions were not kept: " in result.stderr


def test_two_at_once_measure_both_and_one_is_kept(run):
    kept = evaluate(EvaluateConfig(run, alphas=(0.5,))).kept
    fcntl = pytest.importorskip("fcntl")
    with (kept.parent / f".{kept.name}.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as another process does that writes this evaluation
        measured = evaluate(EvaluateConfig(run, alphas=(1.0,)))
    assert measured.kept is None
    assert f"the predictions were not kept: another process is writing {kept}." in measured.notes
    assert evaluations.read(kept).alphas == [0.0, 0.5]


def test_greys_have_the_depth_that_was_found_on_the_shots(run, tmp_path):
    """4000 of 65535 is nearly black; of 4095, as the shots use, nearly white."""
    data, deep = tmp_path / "data", tmp_path / "deep"
    (data / "dog").mkdir(parents=True)
    Image.fromarray(np.full((40, 40), 60000, np.uint16)).save(data / "dog" / "a.png")
    Image.fromarray(np.full((40, 40), 4000, np.uint16)).save(data / "dog" / "b.png")
    shutil.copytree(run, deep, ignore=shutil.ignore_patterns("evaluations"))
    config = json.loads((deep / "config.json").read_text("utf-8"))
    files.write_json(deep / "config.json", {**config, "grey_bits": 16})
    (deep / "files.json").unlink()
    manifest.seal(deep)
    own, recorded = (
        evaluations.read(evaluate(EvaluateConfig(place, data=data)).kept).tables(0.0)["union"].logits
        for place in (run, deep)
    )
    torch.testing.assert_close(own[0], recorded[0])
    assert (own[1] - recorded[1]).abs().max() > 0.01


def test_a_flipped_byte_is_refused(run, tmp_path):
    kept = evaluate(EvaluateConfig(run, alphas=(0.5,))).kept
    for name in ("predictions-0.5.safetensors", "evaluation.json"):
        copy = tmp_path / name
        shutil.copytree(kept, copy)
        damaged = bytearray((copy / name).read_bytes())
        damaged[-3] ^= 1
        (copy / name).write_bytes(damaged)
        with pytest.raises(ModelError, match=re.escape(name)):
            evaluations.read(copy).tables(0.5)
    (tmp_path / name / "files.json").unlink()
    with pytest.raises(ModelError, match=r"files\.json"):
        evaluations.read(tmp_path / name)


def test_measured_on_the_shots_it_is_not_called_held_out(models, flat, tmp_path):
    made = adapt(AdaptConfig(flat, model=models["vit"], output=tmp_path / "run"))
    measured = evaluate(EvaluateConfig(made.run))
    assert measured.kept.name == "shots"
    document = json.loads((measured.kept / "evaluation.json").read_text("utf-8"))
    assert document["held_out"] is False
    row = document["alphas"][0]
    assert row["new"] is row["union"] is row["against_zero_shot"]["new"] is row["against_zero_shot"]["union"] is None
    assert row["against_zero_shot"]["base"] == {"difference": 0.0, "low": 0.0, "high": 0.0, "mcnemar_p": 1.0}


def test_what_is_kept_names_no_place_of_this_machine(models, tmp_path):
    """Not even in the note that says where images of new classes could be put."""
    root = tmp_path / "pets"
    make_classes(root / "train", {"dog": 2, "owl": 2})
    make_classes(root / "test", {"dog": 1}, seed=1)
    made = adapt(AdaptConfig(root, model=models["vit"], output=tmp_path / "run"))
    measured = evaluate(EvaluateConfig(made.run))
    assert any(f"add images as {root}/test/<class>/" in note for note in measured.notes)
    document = json.loads((measured.kept / "evaluation.json").read_text("utf-8"))
    assert any("add images as held-out/test/<class>/" in note for note in document["notes"])
    assert str(tmp_path) not in json.dumps(document)
