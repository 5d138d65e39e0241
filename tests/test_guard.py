"""The guard of `evaluate`: what it stops, what it lets pass, and what it cannot judge."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from conftest import Cli, picture

import clipfit
from clipfit import AdaptConfig, EvaluateConfig, GuardError, UsageError, adapt, evaluate
from clipfit.measure.figures import AlphaResult
from clipfit.measure.guard import objection
from clipfit.measure.metrics import Accuracy, Difference

BASE = ("bee", "cow", "dog")
WORSE, EQUAL, BETTER = Difference(-0.1, -0.2, -0.001), Difference(-0.1, -0.2, 0.0), Difference(0.1, 0.01, 0.2)


@pytest.fixture(scope="module")
def by_whom(split_run, models, tmp_path_factory) -> dict[str, Path]:
    """Images labelled by what zero-shot CLIP, or the run at α = 1, takes them for: there it is always right."""
    root = tmp_path_factory.mktemp("labelled")
    pictures = [root / f"{k}.png" for k in range(40)]
    for k, path in enumerate(pictures):
        picture(900 + k).save(path)
    found = {}
    for who, model in (("zero-shot", clipfit.load(models["vit"])), ("adapted", clipfit.load(split_run).at(1.0))):
        found[who] = root / f"{who}.csv"
        with found[who].open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["path", "label"])
            rows.writerows(
                [path.name, one.label]
                for path, one in zip(pictures, model.predict(pictures, classes=BASE), strict=True)
            )
    return found


def row(alpha: float, of_base: float | None = None, of_new: float | None = None, **against: Difference) -> AlphaResult:
    made = [share if share is None else Accuracy(round(20 * share), 20, {}) for share in (of_base, of_new)]
    union = made[0] if None not in made else None
    return AlphaResult(alpha, made[0], made[1], union, 1.0, against)


def guard(*rows: AlphaResult, held_out: bool = True, worse: bool = False, require: tuple[str, ...] = ()):
    """The exit code of what speaks against the rows, and its sentence."""
    found = objection(rows, held_out, EvaluateConfig(fail_if_worse=worse, require=require))
    return (found.exit_code, str(found)) if found else (0, "")


ZERO = row(0, 0.5, 0.6)


# ---- what is credibly worse


@pytest.mark.parametrize("part", ["base", "new", "union"])
def test_a_part_that_is_credibly_worse_stops_it(part):
    code, said = guard(ZERO, row(0.5, 0.4, 0.6, **{part: WORSE}), worse=True)
    assert code == 5
    assert f"at α = 0.5, {part} is credibly worse than zero-shot (-10.0 points, 95% interval -20.0 to -0.1)" in said
    assert guard(ZERO, row(0.5, 0.4, 0.6, **{part: WORSE}))[0] == 0  # nobody asked


def test_what_is_worse_by_chance_does_not_stop_it():
    assert guard(ZERO, row(0.5, 0.4, 0.6, base=EQUAL, new=BETTER, union=EQUAL), worse=True) == (0, "")


def test_every_ratio_that_was_asked_for_is_judged_and_all_are_named():
    rows = [ZERO, row(0.5, 0.5, 0.6, base=EQUAL), row(0.75, 0.4, 0.6, base=WORSE), row(1, 0.4, 0.6, new=WORSE)]
    code, said = guard(*rows, worse=True, require=("base:0.45",))
    assert code == 5
    for words in (
        "at α = 0.75, base is credibly",
        "at α = 1, new is credibly",
        "at α = 1, base is 0.4, below the 0.45",
    ):
        assert words in said
    assert "α = 0.5" not in said


def test_zero_shot_is_judged_only_where_nothing_else_was_asked_for():
    assert guard(ZERO, row(0.5, 0.6, 0.6), require=("base:0.55",))[0] == 0
    assert guard(ZERO, require=("base:0.55",))[0] == 5
    nothing = Difference(0.0, 0.0, 0.0)
    assert guard(row(0, 0.5, 0.6, base=nothing, new=nothing), worse=True)[0] == 0  # a run of --alpha 0


# ---- what is required


def test_the_accuracy_as_measured_meets_its_bound_or_not():
    adapted = row(0.5, 0.85, 0.85, base=BETTER)
    for bounds in (("base:0.85",), ("new:0.85", "union:0.85"), ("base:0.85,new:0.8,hm:0.85",), ("hm:0", "base:0")):
        assert guard(ZERO, adapted, require=bounds) == (0, "")
    for part in ("base", "new", "union", "hm"):
        code, said = guard(ZERO, adapted, require=(f"{part}:0.86",))
        assert code == 5
        assert f"at α = 0.5, {part} is 0.85, below the 0.86 required" in said


def test_the_harmonic_mean_of_two_equal_accuracies_meets_them():
    made = AlphaResult(0.5, Accuracy(84, 100, {}), Accuracy(84, 100, {}), None, 1.0, {})
    assert made.harmonic_mean < 0.84  # as floats have it
    assert guard(made, made, require=("hm:0.84",)) == (0, "")


@pytest.mark.parametrize(
    "wrong",
    ["base", "base:", "base:85", "base:85%", "base:nan", "base:-0.1", "all:0.5", "base:0.5,base:0.6", "", ",", ":0.5"],
)
def test_bounds_that_cannot_be_meant(wrong):
    with pytest.raises(UsageError, match=r"require must be a fraction of 1 for base, new, union, hm, each once"):
        EvaluateConfig(require=(wrong,))
    with pytest.raises(UsageError, match="require must be"):
        EvaluateConfig(require=("new:0.5", "new:0.5"))


# ---- what cannot be judged


@pytest.mark.parametrize("asked", [{"worse": True}, {"require": ("base:0",)}, {"require": ("new:0",)}])
def test_without_held_out_images_it_never_passes(asked):
    code, said = guard(row(0, 1.0), row(0.5, 1.0, base=BETTER), held_out=False, **asked)
    assert code == 3
    assert "no image was held out: adapt with --shots, add a test/ folder, or pass --data" in said


def test_base_accuracy_on_the_shots_is_no_evidence():
    """New classes are held out all the same: they are judged, and nothing else."""
    rows = row(0, 1.0, 0.5), row(0.5, 0.9, 0.5, base=WORSE, new=EQUAL, union=WORSE)
    assert guard(*rows, held_out=False, worse=True) == (0, "")
    assert guard(*rows, held_out=False, require=("new:0.5",))[0] == 0
    for part in ("base", "union", "hm"):
        code, said = guard(*rows, held_out=False, require=(f"{part}:0.1",))
        assert (code, f"--require {part} asks for what was not measured" in said) == (3, True)
    assert guard(row(0, 1.0, 0.5), row(0.5, 0.9, 0.3, new=WORSE), held_out=False, worse=True)[0] == 5


def test_a_part_that_was_not_measured_is_no_pass_whatever_the_rest_says():
    base_alone = row(0, 0.5), row(0.5, 0.4, base=WORSE)
    for part in ("new", "union", "hm"):
        code, said = guard(*base_alone, worse=True, require=(f"{part}:0", "base:0.9"))
        assert (code, f"--require {part}" in said, "base alone" in said) == (3, True, True)
    new_alone = row(0, None, 0.5), row(0.5, None, 0.6, new=BETTER)
    assert guard(*new_alone, worse=True, require=("new:0.6",))[0] == 0
    assert guard(*new_alone, require=("base:0.1",))[0] == 3


# ---- on the command line


def test_a_run_that_is_worse_is_measured_shown_kept_and_stopped(cli: Cli, split_run, by_whom):
    command = ("evaluate", split_run, "--alpha", 1, "--data", by_whom["zero-shot"])
    plain = cli(*command, "--json")
    ended = cli(*command, "--fail-if-worse", "--json")
    assert (plain.code, ended.code) == (0, 5)
    said = ended.document.pop("error")
    assert ended.document == {**plain.document, "error": said}
    assert said["code"] == 5
    assert "at α = 1, base is credibly worse than zero-shot" in said["message"]
    assert ended.stderr.splitlines()[-1] == f"error: {said['message']}"
    assert "− zero-shot" in ended.stderr
    kept = Path(ended.document["kept"], "evaluation.json")
    assert json.loads(kept.read_text("utf-8"))["alphas"][1]["against_zero_shot"]["base"]["high"] < 0
    without = cli(*command, "--fail-if-worse")
    assert (without.code, without.stdout, without.stderr) == (5, "", ended.stderr)
    with pytest.raises(GuardError) as stopped:
        evaluate(EvaluateConfig(split_run, alphas=(1.0,), data=by_whom["zero-shot"], fail_if_worse=True))
    assert stopped.value.found.as_json() == plain.document


def test_a_run_that_is_no_worse_passes(cli: Cli, split_run, by_whom):
    command = ("evaluate", split_run, "--data", by_whom["adapted"], "--fail-if-worse", "--require", "base:1", "--json")
    assert cli(*command, "--alpha", 1).code == 0
    assert cli(*command, "--alphas", "0,1").code == 0
    ended = cli(*command, "--alphas", "0,0.01,1")  # at 0.01 it is still zero-shot, which is right less often
    assert ended.code == 5
    assert "α = 0.01, base is" in ended.document["error"]["message"]
    assert "α = 1" not in ended.document["error"]["message"]


def test_several_bounds_in_one_option_or_several(cli: Cli, split_run):
    for bounds in (("--require", "new:0", "--require", "base:1"), ("--require", "new:0,base:1")):
        ended = cli("evaluate", split_run, *bounds)
        assert ended.code == 5
        assert "base is" in ended.stderr.splitlines()[-1]
    assert cli("evaluate", split_run, "--require", "new:0", "--require", "base:0").code == 0
    cli("evaluate", split_run, "--require", "base:85").fails(2, "found 'base:85'")


def test_nothing_held_out_is_measured_and_no_pass(cli: Cli, flat, models, tmp_path):
    run = adapt(AdaptConfig(flat, model=models["vit"], output=tmp_path / "run")).run
    for guarded in (("--fail-if-worse",), ("--require", "base:0")):
        ended = cli("evaluate", run, *guarded, "--json")
        assert ended.code == 3
        assert ended.document["error"]["code"] == 3
        assert ended.document["held_out"] is False
        assert ended.document["alphas"][1]["base"]["n"] == 12


def test_a_run_that_cannot_be_written_is_judged(cli: Cli, split_run, by_whom, tmp_path):
    sealed = tmp_path / "sealed"
    shutil.copytree(split_run, sealed, ignore=shutil.ignore_patterns("evaluations"))
    (sealed / "evaluations").write_text("a file stands where the folder would be")
    ended = cli("evaluate", sealed, "--alpha", 1, "--data", by_whom["zero-shot"], "--fail-if-worse", "--json")
    assert ended.code == 5
    assert ended.document["kept"] is None


def test_a_model_that_nobody_adapted_can_be_required_to_be_good(cli: Cli, models, by_whom):
    command = ("evaluate", "--model", models["vit"], "--data", by_whom["zero-shot"])
    assert cli(*command, "--require", "base:1").code == 0
    assert cli("evaluate", "--model", models["vit"], "--data", by_whom["adapted"], "--require", "base:1").code == 5
    missing = cli(*command, "--require", "new:0", "--json")
    assert (missing.code, missing.document["error"]["code"]) == (3, 3)
    cli(*command, "--fail-if-worse").fails(2, "--fail-if-worse compares a run with zero-shot CLIP")
