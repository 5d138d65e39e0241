"""A plan: what its cells are, that none is done twice, and the tables of them."""

from __future__ import annotations

import csv
import json
import math
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Cli, make_classes
from filelock import FileLock

from clipfit import AdaptConfig, BenchmarkConfig, EvaluateConfig, adapt, benchmark, evaluate
from clipfit.adaptation import Adaptation
from clipfit.config.plan import Plan, Published, SetRow
from clipfit.errors import DataError, UsageError
from clipfit.events import Silent
from clipfit.measure.metrics import estimate, paired_difference
from clipfit.methods import METHODS
from clipfit.plans import episodes, pages
from clipfit.plans.cells import Cell, Result
from clipfit.plans.contenders import Contender
from clipfit.plans.figures import Tables

LABELS = [name for name in ("ant", "bee", "cow", "dog") for _ in range(9)] + ["elk"] * 8
SET = {"x": SetRow(Path("x"))}
ROW = {"zero-shot": {}}


def plan(protocol: str = "episodes", **values) -> Plan:
    return Plan(protocol, **{"methods": ROW, "sets": SET, **values})


def drawn(**values) -> Plan:
    return plan(**{"way": 3, "shots": (1, 3), "query": 6, **values})


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Path:
    return make_classes(tmp_path_factory.mktemp("e") / "zoo", {"ant": 5, "bee": 4, "cow": 6, "dog": 4, "elk": 3})


@pytest.fixture(scope="module")
def halves(tmp_path_factory) -> Path:
    """Five classes, each with images to train on and to test."""
    root = tmp_path_factory.mktemp("h") / "farm"
    names = ("ant", "bee", "cow", "dog", "elk")
    make_classes(root / "train", dict.fromkeys(names, 3))
    make_classes(root / "test", {name: 4 + k for k, name in enumerate(names)}, seed=7)
    return root


class Said(Silent):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def say(self, text: str) -> None:
        self.texts.append(text)

    @property
    def cells(self) -> list[str]:
        return [text.partition(": ")[2] for text in self.texts if text.startswith("cell ")]


class Plans:
    """Writes plan files, carries them out, and knows what was said."""

    def __init__(self, folder: Path, model: str):
        self.folder, self.model = folder, model

    def file(self, text: str, name: str = "plan") -> Path:
        path = self.folder / f"{name}.toml"
        path.write_text(f"model = {json.dumps(self.model)}\n{text}", "utf-8")
        return path

    def run(self, text: str, name: str = "plan", **config):
        said = Said()
        config = {"output": self.folder / "out", **config}
        return benchmark(BenchmarkConfig(self.file(text, name), **config), said), said


@pytest.fixture
def plans(tmp_path, models) -> Plans:
    return Plans(tmp_path, models["vit"])


def rows(result, figure: str, **where) -> list[dict]:
    found = [row for row in result.as_json()["rows"] if row["figure"] == figure]
    return [row for row in found if all(row[key] == value for key, value in where.items())]


def text_of(*sets: tuple[str, Path], methods: str = "[methods.zero-shot]\n[methods.finetune]\n") -> str:
    return methods + "".join(f"[sets.{name}]\ndata = {json.dumps(str(place))}\n" for name, place in sets)


# ---- the protocols


def test_a_cell_is_what_adapt_and_evaluate_give(plans, split, models, tmp_path):
    """Base-to-new of a folder that keeps classes for the test alone."""
    methods = '[methods.zero-shot]\n[methods.soft]\nmethod = "atha"\ntail_strength = 0.3\n'
    result, _ = plans.run('protocol = "bng"\nseeds = [3]\nshots = [1]\n' + text_of(("s", split), methods=methods))
    run = adapt(AdaptConfig(split, "atha", models["vit"], shots_per_class=1, seed=3, output=tmp_path / "run",
                            method_options={"tail_strength": 0.3}))  # fmt: skip
    measured = evaluate(EvaluateConfig(run.run, alphas=(0.5, 1.0)))
    for found in measured.rows:
        method = "soft" if found.alpha else "zero-shot"
        for figure, expected in (("base", found.base), ("new", found.new)):
            [row] = rows(result, figure, method=method, alpha=found.alpha)
            assert row["mean"] == expected.value
            if found.alpha:
                difference = found.against_zero_shot[figure]
                assert (row["difference"], row["low"], row["high"]) == pytest.approx(
                    (difference.difference, difference.low, difference.high)
                )
        [row] = rows(result, "HM", method=method, alpha=found.alpha)
        assert row["mean"] == found.harmonic_mean


def test_halves_and_all(plans, halves):
    """BNG: the first ⌈C/2⌉ classes are trained on, each half is tested within itself. FSL: all, among all."""
    plans.run('protocol = "bng"\nalphas = [1]\n' + text_of(("farm", halves)))
    plans.run('protocol = "fsl"\nshots = [1, 2]\nalphas = [1]\n' + text_of(("farm", halves)))
    lines = [json.loads(line) for line in (plans.folder / "out/results.jsonl").read_text().splitlines()]
    assert [(line["method"], line["shots"], line["images"]) for line in lines] == [
        ("zero-shot", None, 0), ("finetune", 1, 5), ("finetune", 2, 10)
    ]  # fmt: skip
    assert {line["accuracy"]["n"] for line in lines} == {4 + 5 + 6 + 7 + 8}
    [kept] = (plans.folder / "out/cells").glob("farm--finetune--all-shot*")
    result = Result.read(kept)
    assert (result.images, len(result.labels["base"]), len(result.labels["new"])) == (9, 4 + 5 + 6, 7 + 8)
    assert set(result.labels["base"].tolist()) == {0, 1, 2}
    assert set(result.predicted[1.0]["new"].tolist()) <= {0, 1}


def test_other_domains_and_other_sets(plans, halves, split):
    """DG: in domain, then each target within its own classes. CDG: trained on the base half, halves of the target."""
    target = f"[targets.animals]\ndata = {json.dumps(str(split))}\n"
    result, _ = plans.run('protocol = "dg"\nalphas = [1]\n' + text_of(("farm", halves)) + target)
    assert [row["figure"] for row in rows(result, "animals")] == ["animals"] * 2
    assert {row["figure"] for row in result.as_json()["rows"]} == {"farm", "animals"}
    [kept] = (plans.folder / "out/cells").glob("farm--finetune--*")
    assert {figure: len(values) for figure, values in Result.read(kept).labels.items()} == {"farm": 30, "animals": 9}

    output = plans.folder / "across"
    result, _ = plans.run('protocol = "cdg"\nalphas = [1]\n' + text_of(("farm", halves)) + target, output=output)
    assert list(dict.fromkeys(row["figure"] for row in result.as_json()["rows"])) == [
        "animals base", "animals new", "animals HM"
    ]  # fmt: skip
    [kept] = (output / "cells").glob("farm--finetune--*")
    found = Result.read(kept)
    assert found.images == 9
    assert {figure: len(values) for figure, values in found.labels.items()} == {"animals base": 5, "animals new": 4}


def test_a_set_has_its_own_words_and_settings(plans, halves, monkeypatch):
    seen = []
    usual = Adaptation.run

    def watched(self, *given):
        seen.append((self.recipe.template, self.templates, self.recipe.batch_size, self.recipe.epochs))
        return usual(self, *given)

    monkeypatch.setattr(Adaptation, "run", watched)
    text = text_of(methods='[methods.zero-shot]\n[methods.finetune]\n[methods.own]\nmethod = "finetune"\n'
                           'template = "my {}"\nbatch_size = 2\n')  # fmt: skip
    place = json.dumps(str(halves))
    text += f'[sets.one]\ndata = {place}\ntemplates = ["a {{}}", "the {{}}"]\n[sets.one.settings]\nbatch_size = 3\n'
    text += f"[sets.two]\ndata = {place}\n"
    plans.run('protocol = "bng"\n' + text)
    assert seen == [
        ("a {}", ("a {}", "the {}"), 3, 2),
        ("my {}", ("my {}",), 2, 2),
        ("a photo of a {}", ("a photo of a {}",), 4, 2),
        ("my {}", ("my {}",), 2, 2),
    ]
    kept = [next((plans.folder / "out/cells").glob(f"{name}--zero-shot*")).read_bytes() for name in ("one", "two")]
    assert kept[0] != kept[1]


# ---- episodes


def test_episodes_are_seeded_and_more_shots_contain_fewer():
    one, three = (episodes.draw(LABELS, drawn(), shots, 4) for shots in (1, 3))
    assert one == episodes.draw(LABELS, drawn(), 1, 4)
    assert one.classes == three.classes
    assert one.query == three.query
    assert all(a == b[:1] for a, b in zip(one.support, three.support, strict=True))
    assert [len(at) for at in three.support] == [3, 3, 3]
    assert [len(at) for at in three.query] == [6, 6, 6]
    for name, support, query in zip(three.classes, three.support, three.query, strict=True):
        assert {LABELS[i] for i in (*support, *query)} == {name}
        assert not set(support) & set(query)
    found = [episodes.draw(LABELS, drawn(), 1, number) for number in range(30)]
    assert len({(e.classes, e.support, e.query) for e in found}) == 30
    assert {name for e in found for name in e.classes} == {"ant", "bee", "cow", "dog"}  # of elk there are too few
    assert episodes.draw(LABELS, drawn(seeds=(1,)), 1, 4) != one
    with pytest.raises(DataError, match=r"need 5 classes of at least 9 images .* there are 4"):
        episodes.draw(LABELS, drawn(way=5), 1, 0)


EPISODES = 'protocol = "episodes"\nway = 2\nquery = 2\n'


def test_methods_are_compared_over_the_same_episodes(plans, zoo):
    methods = '[methods.zero-shot]\n[methods.finetune]\n[methods."no head"]\nmethod = "atha"\ntuning = "lora"\n'
    text = EPISODES + "shots = [1, 2]\nepisodes = 3\n" + text_of(("zoo", zoo), methods=methods + "head_ratio = 0\n")
    result, said = plans.run(text)
    assert (result.cells, result.finished, result.done) == (3 * 5, 15, 15)  # zero-shot at any number of shots is one
    assert said.cells[:3] == ["zoo, zero-shot, seed 0", "zoo, finetune, 1-shot, seed 0", "zoo, no head, 1-shot, seed 0"]
    found = {(c.method, c.shots, c.seed): r for c, r in result.tables._results.items()}
    for number in range(3):
        labels = [found[m, k, number].labels["accuracy"] for m in ("finetune", "no head") for k in (1, 2)]
        assert all(torch.equal(labels[0], other) for other in labels)
    plain = [found["zero-shot", None, n].accuracy(0.0, "accuracy") for n in range(3)]
    tuned = [found["finetune", 2, n].accuracy(0.5, "accuracy") for n in range(3)]
    gains = [b - a for a, b in zip(plain, tuned, strict=True)]
    [row] = rows(result, "accuracy", method="finetune", shots=2, alpha=0.5)
    half = 4.302652729911275 * statistics.stdev(gains) / math.sqrt(3)  # Student's, 2 degrees of freedom
    assert row["mean"] == pytest.approx(statistics.mean(tuned))
    assert (row["low"], row["high"]) == pytest.approx((statistics.mean(gains) - half, statistics.mean(gains) + half))
    assert [row["mean"] for row in rows(result, "accuracy", method="zero-shot", shots=1)] == [statistics.mean(plain)]


def test_no_query_image_is_a_copy_of_a_shot(plans, zoo, tmp_path):
    """The episodes of a folder in which every image stands twice are those of the folder itself."""
    twice = Path(shutil.copytree(zoo, tmp_path / "twice"))
    for file in [*twice.rglob("*.png")]:
        shutil.copy(file, file.with_name(f"{file.stem}-copy.png"))  # after the first of it
    text = EPISODES + "shots = [1]\nepisodes = 4\n"
    one, said = plans.run(text + text_of(("zoo", twice)))
    other, _ = plans.run(text + text_of(("zoo", zoo)), output=tmp_path / "alone")
    assert "zoo: 22 images are copies of others and were left out" in said.texts
    assert [row["mean"] for row in one.as_json()["rows"]] == [row["mean"] for row in other.as_json()["rows"]]


def test_every_episode_has_a_seed_of_its_own_and_starts_from_the_pre_trained_model(plans, zoo, tmp_path, monkeypatch):
    seeds, usual = [], Adaptation.run

    def watched(self, *given):
        seeds.append(self.seed)
        return usual(self, *given)

    monkeypatch.setattr(Adaptation, "run", watched)
    hard = "[methods.zero-shot]\n[methods.atha]\nstrength_rate = 0.1\ntail_strength = 0.5\n[methods.finetune]\n"
    text = EPISODES + "shots = [1]\nepisodes = 2\nseeds = [40]\n"
    plans.run(text + text_of(("zoo", zoo), methods=hard))
    assert seeds == [40, 40, 41, 41]
    plans.run(text + text_of(("zoo", zoo)), output=tmp_path / "alone")
    kept = [{p.name: p.read_bytes() for p in (tmp_path / name / "cells").glob("zoo--finetune*")}
            for name in ("out", "alone")]  # fmt: skip
    assert len(kept[0]) == 2
    assert kept[0] == kept[1]


# ---- cells


def test_a_finished_cell_is_never_done_again_and_another_plan_has_others(plans, halves, models, tmp_path):
    head = 'protocol = "bng"\n'
    _, first = plans.run(head + "seeds = [0]\n" + text_of(("farm", halves)))
    assert first.cells == ["farm, zero-shot", "farm, finetune, seed 0"]
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/cells").iterdir()}
    _, more = plans.run(head + "seeds = [0, 1]\n" + text_of(("farm", halves)))
    assert more.cells == ["farm, finetune, seed 1"]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    whole = {name: (tmp_path / "out" / name).read_bytes() for name in ("results.jsonl", "table.md", "table.csv")}
    fresh, _ = plans.run(head + "seeds = [0, 1]\n" + text_of(("farm", halves)), output=tmp_path / "fresh")
    assert fresh.done == 3
    assert {name: (tmp_path / "fresh" / name).read_bytes() for name in whole} == whole

    def done(text: str, **config) -> list[str]:
        return plans.run(head + text, **config)[1].cells

    assert done("alphas = [1]\n" + text_of(("farm", halves))) == ["farm, finetune, seed 0"]
    slower = "[methods.zero-shot]\n[methods.finetune]\nlearning_rate = 1e-4\n"
    assert done(text_of(("farm", halves), methods=slower)) == ["farm, finetune, seed 0"]
    words = text_of(("farm", halves)) + 'templates = "a {}"\n'
    assert done(words) == ["farm, zero-shot", "farm, finetune, seed 0"]
    copy = Path(shutil.copytree(halves, tmp_path / "copy"))
    assert done(text_of(("farm", copy))) == []  # where the images are changes nothing
    shutil.copy(copy / "test/ant/0.png", copy / "test/ant/new.png")
    assert done(text_of(("farm", copy))) == ["farm, zero-shot", "farm, finetune, seed 0"]
    assert done(text_of(("farm", halves)), model=models["quick"]) == ["farm, zero-shot", "farm, finetune, seed 0"]
    assert done(text_of(("farm", halves)), methods=("zero-shot",)) == []


def test_what_another_process_is_at_is_left_to_it(plans, halves, tmp_path):
    text = 'protocol = "bng"\n' + text_of(("farm", halves))
    plans.run(text, output=tmp_path / "done")
    names = sorted(path.name for path in (tmp_path / "done/cells").iterdir())
    (tmp_path / "out/cells").mkdir(parents=True)
    theirs = FileLock(tmp_path / "out/cells" / Path(names[0]).with_suffix(".lock"))
    with theirs:
        result, said = plans.run(text)
        assert said.cells == ["farm, zero-shot"]
        assert (result.cells, result.finished, result.done) == (2, 1, 1)
    result, said = plans.run(text)
    assert said.cells == ["farm, finetune, seed 0"]
    assert sorted(path.name for path in (tmp_path / "out/cells").iterdir()) == names  # no lock is left


def test_ctrl_c_says_what_is_kept(cli: Cli, plans, halves, monkeypatch):
    def interrupted(task, options):
        raise KeyboardInterrupt

    monkeypatch.setitem(METHODS, "stopped", replace(METHODS["finetune"], name="stopped", build=interrupted))
    methods = "[methods.zero-shot]\n[methods.stopped]\n"
    run = cli("benchmark", plans.file('protocol = "bng"\n' + text_of(("farm", halves), methods=methods)))
    assert run.code == 130
    assert run.stderr.splitlines()[-1] == (
        "interrupted: finished cells are kept in benchmark/plan; the same command goes on from there"
    )
    assert [path.name.split("--")[1] for path in Path("benchmark/plan/cells").iterdir()] == ["zero-shot"]


# ---- tables


def answers(*right: int, n: int = 40) -> Result:
    """Of base and new images the first so many are named rightly, at α = 1."""
    labels = {part: torch.zeros(n, dtype=torch.int32) for part in ("base", "new")}
    predicted = {part: (torch.arange(n) >= count).int() for part, count in zip(labels, right, strict=True)}
    return Result(8, labels, {1.0: predicted})


def two_sets(**values) -> Tables:
    rows = {"zero-shot": {}, "cite": {}}
    sets = {"x": SetRow(Path("x")), "y": SetRow(Path("y"))}
    told = Plan("bng", methods=rows, sets=sets, seeds=(0, 1, 2), **values)
    results = {Cell(name, "zero-shot", None, None): answers(10, 20) for name in sets}
    right = {"x": [(20, 22), (24, 22), (22, 19)], "y": [(30, 30), (20, 20), (34, 16)]}
    results |= {
        Cell(name, "cite", None, seed): answers(*pair) for name in sets for seed, pair in enumerate(right[name])
    }
    results = {cell: replace(r, predicted={0.0: r.predicted[1.0]}) if cell.method == "zero-shot" else r
               for cell, r in results.items()}  # fmt: skip
    return Tables(told, results)


def hm(b: float, n: float) -> float:
    return 2 * b * n / (b + n)


def test_means_are_the_papers():
    """Over sets HM is that of the mean B and the mean N; over seeds the mean of these."""
    found = {(f.set, f.method, f.figure): f for f in two_sets().figures()}
    seeds = [((20 + 30) / 80, (22 + 30) / 80), ((24 + 20) / 80, (22 + 20) / 80), ((22 + 34) / 80, (19 + 16) / 80)]
    mean = found["mean", "cite", "HM"]
    assert mean.found == estimate([hm(*pair) for pair in seeds])
    assert (mean.sets, mean.found.n) == (2, 3)
    assert mean.gain.difference == pytest.approx(statistics.mean(hm(*pair) - hm(0.25, 0.5) for pair in seeds))
    assert found["x", "cite", "base"].found == estimate([20 / 40, 24 / 40, 22 / 40])
    assert found["x", "zero-shot", "new"].found.mean == 0.5
    assert found["x", "zero-shot", "new"].gain is None


def test_intervals_of_differences_hold_the_chance_of_seeds_and_of_images():
    """Squares of both are added; of sets and of base and new in an HM likewise."""
    found = {(f.set, f.method, f.figure): f.gain for f in two_sets().figures()}

    def sides(right: int, before: int) -> tuple[float, float]:
        d = paired_difference([i < right for i in range(40)], [i < before for i in range(40)])
        return d.difference - d.low, d.high - d.difference

    def of_seeds(values: list[float]) -> float:
        return 4.302652729911275 * statistics.stdev(values) / math.sqrt(3)

    x = [statistics.mean(sides(right, 10)[k] for right in (20, 24, 22)) for k in (0, 1)]
    gain = found["x", "cite", "base"]
    middle = statistics.mean([10, 14, 12]) / 40
    assert gain.low == pytest.approx(middle - math.hypot(of_seeds([10 / 40, 14 / 40, 12 / 40]), x[0]))
    assert gain.high == pytest.approx(middle + math.hypot(of_seeds([10 / 40, 14 / 40, 12 / 40]), x[1]))
    assert gain.verdict == "better"
    y = [statistics.mean(sides(right, 10)[k] for right in (30, 20, 34)) for k in (0, 1)]
    both = [30 / 80, 24 / 80, 36 / 80]
    gain = found["mean", "cite", "base"]
    assert gain.low == pytest.approx(statistics.mean(both) - math.hypot(of_seeds(both), x[0] / 2, y[0] / 2))
    new = [statistics.mean(sides(right, 20)[k] for right in (22, 22, 19)) for k in (0, 1)]
    b, n = (22 / 40 + 10 / 40) / 2, (21 / 40 + 20 / 40) / 2
    slopes = 2 * n * n / (b + n) ** 2, 2 * b * b / (b + n) ** 2
    pairs = [hm(p / 40, q / 40) - hm(0.25, 0.5) for p, q in ((20, 22), (24, 22), (22, 19))]
    gain = found["x", "cite", "HM"]
    assert gain.high == pytest.approx(
        statistics.mean(pairs) + math.hypot(of_seeds(pairs), slopes[0] * x[1], slopes[1] * new[1])
    )


def test_seeds_that_agree_prove_nothing():
    """Three seeds of one accuracy, two images of forty above zero-shot: no interval of width 0."""
    told = Plan("bng", methods={"zero-shot": {}, "cite": {}}, sets=SET, seeds=(0, 1, 2))
    plain = answers(10, 20)
    results = {Cell("x", "zero-shot", None, None): replace(plain, predicted={0.0: plain.predicted[1.0]})}
    results |= {Cell("x", "cite", None, seed): answers(12, 20) for seed in range(3)}
    gains = {f.figure: f.gain for f in Tables(told, results).figures() if f.method == "cite"}
    assert gains["base"].difference == pytest.approx(2 / 40)
    assert gains["base"].low <= 0 < gains["base"].high
    assert [gain.verdict for gain in gains.values()] == ["", "", ""]


def test_a_mean_is_of_the_sets_that_every_row_has():
    tables = two_sets()
    left = {cell: r for cell, r in tables._results.items() if (cell.set, cell.method) != ("y", "cite")}
    found = {(f.set, f.method): f.sets for f in Tables(tables.plan, left).figures()}
    assert found == {("mean", "zero-shot"): 1, ("mean", "cite"): 1, ("x", "zero-shot"): 1, ("x", "cite"): 1,
                     ("y", "zero-shot"): 1}  # fmt: skip


def test_pages_have_papers_figures_beside():
    papers = {"A | B": Published("a paper", {"mean": (50.0, 60.5, 55.0), "y": (70.25,)})}
    tables = two_sets(published=papers)
    text = pages.markdown(tables, "both", 8, 8)
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# both",
        "## mean of 2 sets",
        "## x",
        "## y",
    ]
    mean, x, y = text.split("## ")[1:]
    assert "| *A \\| B* |  | 50.00 | 60.50 | 55.00 |" in mean
    assert "A \\|" not in x
    assert "| *A \\| B* |  | 70.25 |  |  |" in y
    assert "| zero-shot | 0 | 25.0 | 50.0 | 33.3 |" in x
    assert "*A | B*: as published, a paper." in text
    lines = list(csv.DictReader(pages.csv_of(tables).splitlines()))
    assert [line["published"] for line in lines if line["published"]] == ["0.5", "0.605", "0.55", "0.7025"]
    [line] = [one for one in lines if (one["set"], one["method"], one["figure"]) == ("x", "cite", "new")]
    assert float(line["mean"]) == statistics.mean([22 / 40, 22 / 40, 19 / 40])


def test_the_command_shows_a_table_and_prints_a_document(cli: Cli, plans, halves, split):
    text = 'protocol = "bng"\n[published.P]\nsource = "q"\nmean = [1, 2, 3]\n'
    run = cli("benchmark", plans.file(text + text_of(("farm", halves), ("zoo", split))), "--json")
    assert run.code == 0, run.stderr
    assert set(run.document) == {"plan", "output", "cells", "finished", "done", "rows"}
    assert set(run.document["rows"][0]) == {"set", "sets", "method", "alpha", "shots", "figure", "mean", "half_width",
                                            "n", "difference", "low", "high"}  # fmt: skip
    assert (run.document["cells"], run.document["finished"], run.document["done"]) == (4, 4, 4)
    assert run.document["output"] == "benchmark/plan"
    lines = [line.split() for line in run.stderr.splitlines()]
    assert ["method", "α", "base", "new", "HM"] in lines
    assert ["P,", "published", "1", "2", "3"] in lines
    assert run.stderr.splitlines()[-1] == "all tables: benchmark/plan/table.md"
    again = cli("benchmark", plans.file(text + text_of(("farm", halves), ("zoo", split))), "--set", "zoo")
    assert again.code == 0, again.stderr
    assert "2 of 2 cells are finished" in again.stderr
    other = cli("benchmark", plans.file(text + text_of(("farm", halves))), "--reference", "finetune", "--json")
    assert other.document["done"] == 0
    assert {row["difference"] for row in other.document["rows"]} == {None}  # of zero-shot too: it has no such ratio


def test_a_dry_run_reads_all_and_does_nothing(cli: Cli, plans, halves, tmp_path):
    file = plans.file('protocol = "bng"\n' + text_of(("farm", halves)))
    run = cli("benchmark", file, "--dry-run")
    assert run.code == 0, run.stderr
    assert "0 of 2 cells are finished, 2 are left" in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["plan.toml"]


def test_what_a_plan_cannot_do_is_known_before_its_first_cell(cli: Cli, plans, halves, flat, tmp_path):
    text = 'protocol = "bng"\n' + text_of(("farm", halves))
    late = text.replace("[sets.farm]", "[methods.atha]\nhead_block = 99\n[sets.farm]")
    for asked in (("--dry-run",), ()):
        cli("benchmark", plans.file(late), *asked).fails(2, "set farm, row atha: head_block must lie between 0 and")
        lacking = text + f"[sets.pets]\ndata = {json.dumps(str(flat))}\n"
        cli("benchmark", plans.file(lacking), *asked).fails(3, "has no test images of its base classes")
    assert not list(tmp_path.rglob("*.safetensors"))


# ---- what is refused


def test_settings_of_what_is_compared():
    row = {"method": "atha", "tuning": "lora", "crop_scale": [0.5, 1], "lora_rank": 4, "soft_edits": True}
    found = Contender.of("mine", row).resolved({}, {"epochs": 3}, ("an icon of a {}",), [2, 5], 7)
    assert (found.method.name, found.adapters.rank, found.recipe.crop_scale) == ("atha", 4, (0.5, 1.0))
    assert (found.recipe.template, found.recipe.epochs, found.seed) == ("an icon of a {}", 3, 7)
    assert found.options.soft_edits
    assert not found.learn_context
    assert Contender.of("atha", {"context": True}).resolved({}, {}, (), [1], 0).learn_context
    for name, table, expected in (
        ("atha", {"soft_edits": "no"}, "soft_edits must be of type bool; found 'no'"),
        ("finetune", {"epochs": 0}, "epochs must be at least 1; found 0"),
        ("finetune", {"lora_rank": 3}, "--tuning lora"),
        ("atha", {"tuning": "lora", "lora_ranks": 3}, r"no option 'lora_ranks' \(did you mean lora_rank"),
        ("cite", {"seed": 3}, "seed is no setting of a method"),
        ("athena", {}, "did you mean atha"),
        ("zero-shot", {"epochs": 3}, "has no settings"),
    ):
        with pytest.raises(UsageError, match=rf"\[methods.{name}\]: .*{expected}"):
            Contender.of(name, table)


def test_what_it_cannot_do_is_said_in_one_sentence(cli: Cli, plans, halves, flat, zoo, tmp_path):
    good = 'protocol = "bng"\n' + text_of(("farm", halves))
    for text, code, *words in (
        ('protocol = "bnng"', 2, "protocol must be one of fsl, bng"),
        ("protocol = ", 2, "is no TOML"),
        ('seed = [1]\nprotocol = "bng"', 2, "no option 'seed' (did you mean seeds"),
        ('protocol = "bng"\n[methods.cite]', 2, "needs a set, [sets.NAME]"),
        ('protocol = "bng"\nmethods = 3', 2, "methods must be tables"),
        (good + "image_roots = 3\n", 2, "[sets.farm]", "did you mean image_root"),
        (good.replace("bng", "dg"), 2, "protocol dg needs sets to test on"),
        (good + "[targets.x]\ndata = 'x'\n", 2, "protocol bng has no sets to test on"),
        (good + 'few_shot = "x"\n[published.x]\nfarm = "y"\n', 2, "[published.x]"),
        (good.replace("[methods.zero-shot]\n", ""), 2, "reference", "'zero-shot'"),
        ('protocol = "episodes"\n' + text_of(("zoo", zoo)), 2, "episodes need shots"),
        ('protocol = "episodes"\nshots = [1]\n' + text_of(("zoo", zoo)), 3, "lower way, shots or query"),
        (good + "[sets.farm.settings]\nepoch = 3\n", 2, "epoch"),
        (good + "[sets.none]\ndata = 'nowhere'\n", 3, "set none: there is no"),
        ('protocol = "bng"\n' + text_of(("pets", flat)), 3, "has no test images of its base classes"),
    ):
        cli("benchmark", plans.file(text)).fails(code, *words)
    cli("benchmark", tmp_path / "none.toml").fails(2, "the plan", "cannot be read")
    cli("benchmark", plans.file(good), "--set", "fram").fails(2, "--set", "did you mean farm")
    cli("benchmark", plans.file(good), "--output", halves / "x").fails(2, "inside")
    cli("benchmark", plans.file(good), "--precision", "fp16").fails(2, "auto, fp32, bf16", "'fp16'")


def test_a_broken_image_is_named_with_its_cell_and_no_option_that_there_is_not(cli: Cli, plans, halves, tmp_path):
    place = Path(shutil.copytree(halves, tmp_path / "copy"))
    (place / "train/ant/0.png").write_text("nonsense")
    run = cli("benchmark", plans.file('protocol = "bng"\n' + text_of(("farm", place))))
    run.fails(3, "farm, finetune, seed 0: image", "0.png cannot be read", ": replace it.")
    assert "--skip-bad-images" not in run.stderr


def test_an_estimate_is_students():
    assert estimate([]).mean is None
    assert (estimate([0.5]).mean, estimate([0.5]).half_width) == (0.5, None)
    found = estimate([1.0, 2.0, 3.0, 6.0])
    assert (found.mean, found.n) == (3.0, 4)
    assert found.half_width == pytest.approx(3.182446305284263 * statistics.stdev([1, 2, 3, 6]) / 2)
