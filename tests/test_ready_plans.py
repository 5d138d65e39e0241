"""The plans of examples/plans, on stand-ins with the layout of the real sets."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import plan_data
import pytest
from conftest import script_at
from kills import ends_with

from clipfit import BenchmarkConfig, benchmark
from clipfit.config.plan import SetRow, read_plan
from clipfit.errors import DataError
from clipfit.plans.sets import LabelledSet

PLANS = Path(__file__).parents[1] / "examples" / "plans"
READY = sorted(path.stem for path in PLANS.glob("*.toml"))
ELEVEN = ("ImageNet", "Caltech101", "OxfordPets", "StanfordCars", "Flowers102", "Food101", "FGVCAircraft", "SUN397",
          "DTD", "EuroSAT", "UCF101")  # fmt: skip
# CUSTOM_TEMPLATES of CoOp's trainers/zsclip.py where they are not "a photo of a {}."
TEMPLATES = {
    "OxfordPets": "a photo of a {}, a type of pet.",
    "Flowers102": "a photo of a {}, a type of flower.",
    "FGVCAircraft": "a photo of a {}, a type of aircraft.",
    "DTD": "{} texture.",
    "Food101": "a photo of {}, a type of food.",
    "UCF101": "a photo of a person doing {}.",
}


def of_prepare() -> ModuleType:
    """examples/plans/prepare.py, which is no part of the package."""
    return script_at(PLANS / "prepare.py")


def prepare(*arguments: object) -> None:
    """The script, as one starts it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare.py", *map(str, arguments)])
        of_prepare().main()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All sets, prepared; never written to."""
    root = plan_data.eleven(tmp_path_factory.mktemp("data"))
    plan_data.cross_domain(root)
    prepare(root)
    return root


def rows_of(manifest: Path) -> list[dict[str, str]]:
    with manifest.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# ---- every plan


@pytest.mark.parametrize(
    ("plan", "cells"),
    [
        ("ablation", 1 + 5 * 3),
        ("bng", 11 * (1 + 3 * 3)),
        ("cdg", 10 * (1 + 3 * 3)),
        ("cross-domain-1-shot", 4 * 3 * 800),
        ("cross-domain-5-shot", 4 * 3 * 400),
        ("dg", 1 + 3 * 3),
        ("fsl", 11 * (1 + 3 * 5 * 3)),
    ],
)
def test_every_plan_finds_all_that_it_names(plan, cells, data, models, cli):
    result = cli("benchmark", PLANS / f"{plan}.toml", "--data", data, "--model", models["vit"], "--dry-run", "--json")
    assert result.code == 0, result.stderr
    assert (result.document["cells"], result.document["finished"]) == (cells, 0)
    assert not Path("benchmark").exists()


def test_no_plan_is_left_out_above():
    (mark,) = test_every_plan_finds_all_that_it_names.pytestmark
    assert sorted(plan for plan, _ in mark.args[1]) == READY


@pytest.mark.parametrize("name", READY)
def test_sets_have_the_templates_and_batches_of_the_papers(name):
    plan = read_plan(PLANS / f"{name}.toml")
    assert (plan.model, plan.pretrained) == ("ViT-B-16", "openai")
    coop = plan.protocol != "episodes"
    for set_name, row in [*plan.sets.items(), *plan.targets.items()]:
        usual = "a centered satellite photo of {}." if coop and set_name == "EuroSAT" else "a photo of a {}."
        assert row.templates == (TEMPLATES.get(set_name, usual),)
    sizes = {"ImageNet": {"batch_size": 64}, "EuroSAT": {"batch_size": 16}}
    for set_name, row in plan.sets.items():
        assert row.settings == (sizes.get(set_name, {}) if coop else {})
    assert set(plan.sets) == {
        "bng": set(ELEVEN), "fsl": set(ELEVEN), "cdg": set(ELEVEN) - {"ImageNet"}, "dg": {"ImageNet"},
        "ablation": {"ImageNet"},
    }.get(name, {"ISIC", "EuroSAT", "CropDiseases", "ChestX"})  # fmt: skip


@pytest.mark.parametrize("name", READY)
def test_published_figures_are_as_many_as_columns(name):
    plan = read_plan(PLANS / f"{name}.toml")
    columns = {"bng": 3, "cdg": 3, "dg": 1 + len(plan.targets), "episodes": 1}.get(plan.protocol, len(plan.shots))
    for called, table in plan.published.items():
        assert "arXiv 2" in table.source
        assert set(table.figures) <= {*plan.sets, "mean"}
        for values in table.figures.values():
            assert len(values) == columns, called
            assert all(math.isnan(value) or 0 < value < 100 for value in values)
            if columns == 3:  # whoever copies a figure wrongly has another harmonic mean
                base, new, hm = values
                assert math.isnan(base) or 2 * base * new / (base + new) == pytest.approx(hm, abs=0.011)


@pytest.mark.parametrize(
    ("plan", "name", "off"),
    [("bng", "zero-shot CLIP", 0.01), ("bng", "CLIP-CITE", 0.04), ("cross-domain-1-shot", "ATHA", 0.01),
     ("cross-domain-1-shot", "CLIP-LoRA", 0.01)],
)  # fmt: skip
def test_published_means_are_those_of_the_published_sets(plan, name, off):
    """CLIP-CITE's own is off: its sets' base accuracies have the mean 85.44, not 85.48."""
    figures = read_plan(PLANS / f"{plan}.toml").published[name].figures
    for column in range(min(2, len(figures["mean"]))):
        of_sets = [values[column] for key, values in figures.items() if key != "mean"]
        assert sum(of_sets) / len(of_sets) == pytest.approx(figures["mean"][column], abs=off)


# ---- prepare.py


def test_manifests_are_in_the_order_of_the_classes(data):
    rows = rows_of(data / "fgvc_aircraft" / "manifest.csv")
    for part, count in plan_data.COUNTS.items():
        labels = [row["label"] for row in rows if row["split"] == part]
        assert labels == [name for name in plan_data.VARIANTS for _ in range(count)]
    assert all((data / "fgvc_aircraft" / row["path"]).is_file() for row in rows)
    found = LabelledSet.read("a", SetRow(data / "fgvc_aircraft" / "manifest.csv"))
    assert found.classes == plan_data.VARIANTS
    assert found.base == plan_data.VARIANTS[:3]


def test_folders_of_imagenet_are_called_by_the_list_and_no_two_alike(data):
    names = ["tench", "goldfish", "missile", "projectile"]  # the list has missile twice
    for folder, there in (("imagenet", names), ("imagenetv2", names), ("imagenet-sketch", names),
                          ("imagenet-adversarial", names[:3]), ("imagenet-rendition", names[1:])):  # fmt: skip
        rows = rows_of(data / folder / "manifest.csv")
        assert list(dict.fromkeys(row["label"] for row in rows)) == there
        assert {row["split"] for row in rows} == ({"train", "test"} if folder == "imagenet" else {"test"})
    assert {row["path"].split("/")[1] for row in rows_of(data / "imagenetv2" / "manifest.csv")} == set("0123")


def test_manifests_of_the_far_sets_have_each_image_under_its_one_finding(data):
    rows = rows_of(data / "chestX" / "manifest.csv")
    assert len(rows) == 5 * plan_data.EPISODE
    assert {row["path"].split("/")[1][0] + row["label"] for row in rows} == {
        "0Atelectasis", "1Effusion", "2Mass", "3Nodule", "4Pneumothorax",
    }  # fmt: skip
    lesions = {row["path"].split("ISIC_")[1][0] + row["label"] for row in rows_of(data / "ISIC" / "manifest.csv")}
    assert lesions == {
        "0melanoma", "1melanocytic nevus", "2basal cell carcinoma", "3actinic keratosis", "4benign keratosis",
    }  # fmt: skip


def test_prepare_names_what_is_lacking(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        prepare(tmp_path, "imagnet")
    assert stop.value.code == 2
    assert "there is no set 'imagnet'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="holds none of fgvc_aircraft, imagenet"):
        prepare(tmp_path)
    (tmp_path / "imagenet" / "images" / "train" / "n01440764").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"error: .*classnames\.txt cannot be read: No such file"):
        prepare(tmp_path)
    (tmp_path / "imagenet" / "classnames.txt").write_text("n02 cat\n", "utf-8")
    plan_data.draw(tmp_path, ["imagenet/images/train/n01440764/a.JPEG"])
    with pytest.raises(SystemExit, match="'n01440764' among its images, but not in its list of names"):
        prepare(tmp_path)
    assert not (tmp_path / "imagenet" / "manifest.csv").exists()


# ---- splits and lists of shots, as their authors meant


@pytest.mark.parametrize("name", plan_data.SPLITS)
def test_classes_of_a_split_are_in_the_order_of_their_numbers(name, data):
    folder, split, _, _, names = plan_data.SPLITS[name]
    file = data / folder / split
    first = [entry[2] for entry in json.loads(file.read_text("utf-8"))["train"]]
    assert list(dict.fromkeys(first)) == names[::-1]  # as they appear
    found = LabelledSet.read(name, SetRow(file, image_root=Path("nowhere")))
    spaced = tuple(name.replace("_", " ") for name in names)
    half = math.ceil(len(names) / 2)
    assert (found.classes, found.base, found.new) == (spaced, spaced[:half], spaced[half:])
    base, new = found.halves()
    assert base.labels == [c for _ in range(3) for c in reversed(range(half))]
    assert new.labels == [c for _ in range(3) for c in reversed(range(len(names) - half))]


def few_shot(file: Path, images: list[tuple[str, str]]) -> Path:
    entries = [{"impath": f"./data/oxford_flowers/jpg/{path}", "label": 0, "classname": name} for path, name in images]
    file.write_text(json.dumps({"train": {"data": entries}, "val": {"data": []}}), "utf-8")
    return file


def test_a_published_draw_is_taken_by_its_names_and_kept_in_the_order_of_classes(data, tmp_path):
    folder, split, _, _, names = plan_data.SPLITS["Flowers102"]
    listed = [(f"{c}_train_2.jpg", names[c]) for c in (3, 1, 0, 4, 2)]
    few_shot(tmp_path / "shot_1-seed_7.json", listed)
    row = SetRow(data / folder / split, few_shot=str(tmp_path / "shot_{shots}-seed_{seed}.json"))
    found = LabelledSet.read("Flowers102", row)
    assert [s.source for s in found.shots(found.classes, 1, 7)] == [f"{c}_train_2.jpg" for c in range(5)]
    assert [s.label for s in found.shots(found.base, 1, 7)] == names[:3]
    with pytest.raises(DataError, match=r"shot_1-seed_8\.json does not exist"):
        found.shots(found.classes, 1, 8)
    few_shot(tmp_path / "shot_1-seed_7.json", [*listed[:4], ("2_test_0.jpg", names[2])])
    with pytest.raises(DataError, match=r"lists .*2_test_0\.jpg as 'canterbury bells', .* does not have it"):
        found.shots(found.classes, 1, 7)


# ---- end to end


def test_papers_figures_stand_beside_with_their_decimals(data, models, tmp_path):
    config = BenchmarkConfig(PLANS / "ablation.toml", data=data, model=models["vit"], output=tmp_path / "out",
                             methods=("zero-shot",))  # fmt: skip
    benchmark(config)
    lines = (tmp_path / "out" / "table.md").read_text("utf-8").splitlines()
    assert "| *all, CLIP-CITE* |  |  |  | 74.58 |" in lines
    assert "| *SCL, CLIP-CITE* |  |  |  | 74.20 |" in lines
    published = [row for row in rows_of(tmp_path / "out" / "table.csv") if row["published"]]
    assert [(row["figure"], row["published"]) for row in published][:2] == [("HM", "0.7022"), ("HM", "0.73")]


@pytest.mark.slow
def test_base_to_new_killed_and_shared_is_as_undisturbed(data, models, tmp_path):
    """The whole plan: killed at several cells, gone on with, the rest by two processes at once."""
    config = BenchmarkConfig(PLANS / "bng.toml", data=data, model=models["vit"], output=tmp_path / "whole")
    assert benchmark(config).finished == 110
    broken = BenchmarkConfig(config.plan, data=data, model=models["vit"], output=tmp_path / "broken")
    cells = tmp_path / "broken" / "cells"
    kept: dict[str, int] = {}
    for at in (1, 6, 19, 30):
        assert ends_with(lambda: benchmark(broken), at, "renames") == -9
        now = {file.name: file.stat().st_mtime_ns for file in cells.glob("*.safetensors")}
        assert kept.items() <= now.items()  # none is made again
        assert len(now) >= len(kept) + at - 1
        kept = now
    assert not (tmp_path / "broken" / "table.md").exists()
    command = [sys.executable, "-m", "clipfit", "benchmark", str(config.plan), "--data", str(data), "--model",
               models["vit"], "--output", str(tmp_path / "broken"), "--device", "cpu", "--json"]  # fmt: skip
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    found = [json.loads(process.communicate()[0]) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert max(result["finished"] for result in found) == 110
    assert sum(result["done"] for result in found) >= 110 - len(kept)
    assert kept.items() <= {file.name: file.stat().st_mtime_ns for file in cells.glob("*.safetensors")}.items()
    for name in ("results.jsonl", "table.md", "table.csv"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list(cells.glob("*.lock"))
    text = (tmp_path / "whole" / "table.md").read_text("utf-8")
    assert "## mean of 11 sets" in text
    assert {
        "| *zero-shot CLIP* |  | 69.34 | 74.22 | 71.70 |", "| *CLIP-CITE* |  | 85.48 | 77.08 | 81.06 |",
        "| *CLIP-CITE, α = 1* |  | 85.79 | 73.52 | 79.19 |", "| *CLIP-CITE* |  | 87.56 | 79.01 | 83.07 |",
    } <= set(text.splitlines())  # fmt: skip
