"""Few-shot episodes: what is drawn, what is compared, and that nothing finished is run again."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import make_classes

from clipfit import EpisodesConfig, episodes
from clipfit.adaptation import Adaptation
from clipfit.errors import DataError, UsageError
from clipfit.events import Silent
from clipfit.measure.metrics import estimate
from clipfit.methods import METHODS
from clipfit.verbs import episodes as module

LABELS = [name for name in ("ant", "bee", "cow", "dog") for _ in range(9)] + ["elk"] * 8
QUICK = ("--way", 3, "--shots", "1,2", "--query", 2, "--model")


def config(**values) -> EpisodesConfig:
    return EpisodesConfig(Path("x"), Path("y"), ("zero-shot",), way=3, shots=(1, 3), query=6, **values)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_classes(tmp_path_factory.mktemp("e") / "zoo", {"ant": 5, "bee": 4, "cow": 6, "dog": 4, "elk": 3})


def test_episodes_are_seeded_and_more_shots_contain_fewer():
    one, three = (module.draw(LABELS, config(), shots, 4) for shots in (1, 3))
    assert one == module.draw(LABELS, config(), 1, 4)
    assert one.classes == three.classes
    assert one.query == three.query
    assert all(a == b[:1] for a, b in zip(one.support, three.support, strict=True))
    assert [len(at) for at in three.support] == [3, 3, 3]
    assert [len(at) for at in three.query] == [6, 6, 6]
    for name, support, query in zip(three.classes, three.support, three.query, strict=True):
        assert {LABELS[i] for i in (*support, *query)} == {name}
        assert not set(support) & set(query)
    drawn = [module.draw(LABELS, config(), 1, number) for number in range(30)]
    assert len({(e.classes, e.support, e.query) for e in drawn}) == 30
    assert {name for e in drawn for name in e.classes} == {"ant", "bee", "cow", "dog"}  # of elk there are too few
    assert module.draw(LABELS, config(seed=1), 1, 4) != one
    alone = EpisodesConfig(Path("x"), Path("y"), ("zero-shot",), way=3, shots=(1,), most_shots=3, query=6)
    assert module.draw(LABELS, alone, 1, 4) == one


def test_too_few_classes_with_enough_images():
    with pytest.raises(DataError, match=r"need 5 classes of at least 9 images .* has 4"):
        module.draw(LABELS, EpisodesConfig(Path("x"), Path("y"), ("zero-shot",), shots=(1, 3), query=6), 1, 0)


def test_methods_are_compared_over_the_same_episodes(cli, models, place, tmp_path):
    methods = ("--method", "zero-shot", "--method", "finetune", "--method", "atha+lora:epochs=2,head_ratio=0")
    run = cli(
        "evaluate", "--episodes", 3, "--data", place, *QUICK, models["vit"], *methods, "--alphas", "0.5,1", "--json"
    )
    assert run.code == 0, run.stderr
    rows = run.document["rows"]
    found = [(row["method"], row["shots"], row["alpha"]) for row in rows]
    trained = [(m, a) for m in ("finetune", "atha+lora:epochs=2,head_ratio=0") for a in (0.5, 1.0)]
    assert found == [(m, k, a) for k in (1, 2) for m, a in [("zero-shot", 0.0), *trained]]

    files = {p.name: json.loads(p.read_text()) for p in (tmp_path / "episodes/zoo").glob("*shot*.json")}
    assert len(files) == 3 * 2 * 3
    of = lambda spec, shots: [files[f"{spec}--{shots}-shot--{n:05d}.json"] for n in range(3)]  # noqa: E731
    for shots in (1, 2):
        assert [f["classes"] for f in of("zero-shot", shots)] == [f["classes"] for f in of("finetune", shots)]
    plain, tuned = ([f["accuracy"][a] for f in of(m, 2)] for m, a in (("zero-shot", "0"), ("finetune", "0.5")))
    row = next(r for r in rows if (r["method"], r["shots"], r["alpha"]) == ("finetune", 2, 0.5))
    gains = [b - a for a, b in zip(plain, tuned, strict=True)]
    assert row["accuracy"]["mean"] == pytest.approx(statistics.mean(tuned))
    assert row["gain"]["mean"] == pytest.approx(statistics.mean(gains))
    t = 4.302652729911275  # of 2 degrees of freedom, 97.5%
    assert row["gain"]["half_width"] == pytest.approx(t * statistics.stdev(gains) / math.sqrt(3))
    assert row["gain"]["n"] == 3
    assert rows[0]["gain"] == {"mean": None, "half_width": None, "n": 0}


class Said(Silent):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def say(self, text: str) -> None:
        self.texts.append(text)


def test_a_finished_episode_is_never_run_again_and_processes_share_the_work(models, place, tmp_path):
    def go(said: Said, **values):
        told = {"episodes": 4, "way": 2, "shots": (1,), "query": 2, **values}
        config = EpisodesConfig(place, tmp_path / "out", ("zero-shot", "finetune"), models["vit"], **told)
        return episodes(config, said)

    def ran(*numbers: int) -> list[str]:
        return [f"episode {n} of 4, 1-shot, {method}" for n in numbers for method in ("zero-shot", "finetune")]

    second, rest, nothing = Said(), Said(), Said()
    assert [row.accuracy.n for row in go(second, part=(2, 2)).rows] == [2, 2, 2]
    assert second.texts == ran(2, 4)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*shot*.json")}
    whole = go(rest)
    assert rest.texts == ran(1, 3)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert [row.accuracy.n for row in whole.rows] == [4, 4, 4]
    assert go(nothing) == whole
    assert nothing.texts == []
    fresh = episodes(EpisodesConfig(place, tmp_path / "other", ("zero-shot", "finetune"), models["vit"], episodes=4,
                                    way=2, shots=(1,), query=2))  # fmt: skip
    assert fresh.rows == whole.rows


def test_ctrl_c_says_what_is_kept(cli, models, place, tmp_path, monkeypatch):
    def interrupted(task, options):
        raise KeyboardInterrupt

    monkeypatch.setitem(METHODS, "stopped", replace(METHODS["finetune"], name="stopped", build=interrupted))
    methods = ("--method", "zero-shot", "--method", "stopped")
    run = cli("evaluate", "--episodes", 2, "--data", place, *QUICK, models["vit"], *methods)
    assert run.code == 130
    assert run.stderr.splitlines()[-1] == (
        "interrupted: finished episodes are kept in episodes/zoo; the same command goes on from there"
    )
    assert len(list((tmp_path / "episodes/zoo").glob("*shot--*.json"))) == 1


def test_results_of_other_settings_are_not_mixed(cli, models, place):
    command = ("evaluate", "--episodes", 1, "--data", place, *QUICK, models["vit"], "--method", "zero-shot")
    assert cli(*command).code == 0
    assert cli(*command).code == 0
    cli(*command, "--seed", 1).fails(2, "episodes of other seed:", "--output")
    cli(*command, "--alphas", "0:1:0.25").fails(2, "episodes of other alphas:")
    assert cli(*command, "--seed", 1, "--output", "elsewhere").code == 0
    folder = Path(shutil.copytree(models["vit"].removeprefix("local-dir:"), "copy"))
    command = ("evaluate", "--episodes", 1, "--data", place, *QUICK, f"local-dir:{folder}", "--method", "zero-shot")
    assert cli(*command).code == 0
    (folder / "clipfit.json").write_text(json.dumps({"adapt": {"recipe": {"epochs": 7}}}))
    cli(*command).fails(2, "episodes of other adapt_defaults:")
    Path("episodes/zoo/episodes.json").unlink()
    cli(*command).fails(3, "episodes.json cannot be read")


def test_no_query_image_is_a_copy_of_a_shot(models, place, tmp_path, cli):
    """The episodes of a folder in which every image stands twice are those of the folder itself."""
    twice = Path(shutil.copytree(place, tmp_path / "twice"))
    for file in [*twice.rglob("*.png")]:
        shutil.copy(file, file.with_name(f"copy-{file.name}"))
    told = (*QUICK, models["vit"], "--method", "zero-shot", "--method", "finetune")
    doubled = cli("evaluate", "--episodes", 4, "--data", twice, *told, "--output", "doubled")
    assert doubled.code == 0, doubled.stderr
    assert "22 images have the very content of another and were left out" in doubled.stderr
    assert cli("evaluate", "--episodes", 4, "--data", place, *told, "--output", "alone").code == 0
    kept = [{p.name: p.read_bytes() for p in Path(name).glob("*shot*.json")} for name in ("doubled", "alone")]
    assert len(kept[0]) == 4 * 2 * 2
    assert kept[0] == kept[1]


def test_settings_of_what_is_compared():
    told = module.Contender.parse(
        "atha+lora:crop_scale=[0.5,1],lora_rank=4,soft_edits=true,template=an icon of a {}"
    ).config
    assert (told.method, told.tuning, told.lora) == ("atha", "lora", {"rank": 4})
    assert told.recipe == {"crop_scale": [0.5, 1], "template": "an icon of a {}"}
    assert told.method_options == {"soft_edits": True}
    assert not told.context
    assert module.Contender.parse("atha+lora:context=true").config.context
    names = [module.path_of(Path("y"), f"cite:template=a photo{mark}drawing of a {{}}", 1, 0).name for mark in "/-"]
    assert len(set(names)) == 2
    assert not set("/ {}:") & set("".join(names))
    for spec, expected in {
        "atha:soft_edits=no": "soft_edits must be of type bool; found 'no'",
        "atha:context=yes": "context must be of type bool; found 'yes'",
        "finetune:epochs": "epochs must be of type int; found ''",
        "finetune:lora_rank=3": "--tuning lora",
        "finetune+lora:lora_rank=x": "rank must be of type int",
        "atha+lora:lora_ranks=3": r"no option 'lora_ranks' \(did you mean lora_rank",
        "cite:seed=3": "seed is no setting of a method",
        "cite+atha:logit_scale=2": "model's own scale",
    }.items():
        with pytest.raises(UsageError, match=expected):
            module.Contender.parse(spec)


def test_every_episode_has_a_seed_of_its_own(models, place, tmp_path, monkeypatch):
    seeds, usual = [], Adaptation.run

    def watched(self, *given):
        seeds.append(self.seed)
        usual(self, *given)

    monkeypatch.setattr(Adaptation, "run", watched)
    told = {"model": models["vit"], "way": 2, "shots": (1,), "query": 2, "episodes": 3, "seed": 40}
    episodes(EpisodesConfig(place, tmp_path, ("finetune", "cite"), **told))
    assert seeds == [40, 40, 41, 41, 42, 42]


def test_every_episode_starts_from_the_pre_trained_model(models, place, tmp_path):
    """The second of two is what it is alone."""
    told = {"model": models["vit"], "way": 2, "shots": (1,), "query": 2, "episodes": 2, "alphas": (1.0,)}
    methods = ("atha:strength_rate=0.1,tail_strength=0.5", "finetune")
    episodes(EpisodesConfig(place, tmp_path / "both", methods, **told))
    episodes(EpisodesConfig(place, tmp_path / "second", methods[1:], part=(2, 2), **told))
    name = "finetune--1-shot--00001.json"
    assert (tmp_path / "both" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_what_it_cannot_do_is_said_in_one_sentence(cli, models, place, split_run):
    command = ("evaluate", "--episodes", 1, "--model", models["vit"])
    cli(*command).fails(2, "--data DIR")
    cli(*command[:1], split_run, *command[1:], "--data", place).fails(2, "a run has no effect")
    cli(*command, "--data", place, "--method", "athena").fails(2, "did you mean atha")
    cli(*command, "--data", place, "--method", "atha:rank=3").fails(2, "no option 'rank'")
    cli(*command, "--data", place, "--method", "finetune:epochs=0").fails(2, "epochs")
    cli(*command, "--data", place, "--shots", "one").fails(2, "'one'")
    cli(*command, "--data", place, "--precision", "fp16").fails(2, "auto, fp32, bf16", "'fp16'")
    cli(*command, "--data", place, "--part", "3/2").fails(2, "k/n")
    cli(*command, "--data", place).fails(3, "lower --way, --shots or --query")


def test_an_estimate_is_students():
    assert estimate([]) == module.Estimate(None, None, 0)
    assert estimate([0.5]) == module.Estimate(0.5, None, 1)
    found = estimate([1.0, 2.0, 3.0, 6.0])
    assert (found.mean, found.n) == (3.0, 4)
    assert found.half_width == pytest.approx(3.182446305284263 * statistics.stdev([1, 2, 3, 6]) / 2)
