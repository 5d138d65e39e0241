"""What a plan must not say, files that are not as they were left, and places that take nothing: a sentence each."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Cli, make_classes

from clipfit.runs import files

ROWS = "[methods.zero-shot]\n[methods.finetune]\nepochs = 1\n"


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes, to train on and to test; never written to."""
    root = tmp_path_factory.mktemp("farm") / "farm"
    make_classes(root / "train", dict.fromkeys(("bee", "cow", "dog", "eel"), 2))
    make_classes(root / "test", dict.fromkeys(("bee", "cow", "dog", "eel"), 2), seed=1)
    return root


@pytest.fixture
def run(cli: Cli, farm, models, tmp_path):
    """A plan of the farm under some name: its own text after the protocol and the rows."""

    def benchmark(text: str = "", name: str = "farm", protocol: str = "bng", rows: str = ROWS, extra=()):
        place = f'[sets."{name}"]\ndata = "{farm}"\n'
        head = f'protocol = "{protocol}"\nmodel = "{models["vit"]}"\n'
        (tmp_path / "plan.toml").write_text(head + rows + place + text, "utf-8")
        return cli("benchmark", "plan.toml", "--output", "out", *extra)

    return benchmark


@pytest.mark.parametrize("name", ["", " ", r"a\nb", r"x\u001b]0;t\u0007", r"a\u202eb"])
def test_names_are_a_line_that_can_be_read(run, name):
    run(name=name).fails(2, "a name must be one line that can be read")
    run(f'[published."{name}"]\nsource = "s"\n').fails(2, "a name must be one line that can be read")
    run(rows=f'{ROWS}[methods."{name}"]\nmethod = "flyp"\n').fails(2, "a name must be one line that can be read")


@pytest.mark.parametrize("name", ["a/../b", "..", "a|b", "a--b", "語" * 200])
def test_other_names_are_no_place_and_break_no_table(run, name, tmp_path):
    """Seeds of a long name are files of their own."""
    assert run(name=name, rows=f"seeds = [1, 2]\n{ROWS}", extra=("--json",)).document["finished"] == 3
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".lock") == [
        "cells", "results.jsonl", "table.csv", "table.md",
    ]  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"plan.toml", "out"}
    table = (tmp_path / "out" / "table.md").read_text("utf-8")
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert {line.replace(r"\|", "").count("|") for line in rows} == {6}


def test_no_set_is_called_as_the_table_of_all_is(run):
    run(name="mean").fails(2, "no set can be called mean")


def test_a_domain_is_called_otherwise_than_the_set(run, farm):
    run(f'[targets.farm]\ndata = "{farm}"\n', protocol="dg").fails(2, "no target is called like it", "farm")


@pytest.mark.parametrize("values", ['"123"', '["1", 2, 3]', "[true]", "[inf]", "3"])
def test_published_figures_are_lists_of_numbers(run, values):
    run(f'[published.x]\nsource = "s"\nfarm = {values}\n').fails(2, "[published.x]: farm must be a list of numbers")


def test_published_figures_are_of_sets_that_there_are(run):
    run('[published.x]\nsource = "s"\nfram = [1]\n').fails(2, "[published.x]", "did you mean farm?", "farm, mean")
    assert run('[published.x]\nsource = "s"\nfarm = [1]\nmean = [2]\n').code == 0


def test_settings_that_do_not_fit_are_named_by_set_and_row(run):
    run("settings = {scl_weight = 0.5}\n").fails(2, "set farm, row finetune: method finetune has no option")
    run("settings = {batch_sice = 3}\n").fails(2, "set farm, row finetune", "did you mean batch_size?")


def test_a_set_without_test_images(run, farm, tmp_path):
    text = f'[sets.flat]\ndata = "{farm / "train"}"\n'
    run(text, extra=("--set", "flat")).fails(3, "set flat has no test images of its base classes")
    run(text, protocol="fsl", extra=("--set", "flat")).fails(3, "set flat has no test images, so")
    (tmp_path / "empty").mkdir()
    run('[sets.void]\ndata = "empty"\n').fails(3, "set void: empty holds no labelled images")


def test_a_plan_is_a_file(cli: Cli, tmp_path):
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "folder.toml").mkdir()
    for name in ("pipe.toml", "folder.toml"):
        cli("benchmark", name).fails(2, f"the plan {name} is no file")
    cli("benchmark", "none.toml").fails(2, "the plan none.toml cannot be read: No such file")


def test_nothing_is_written_among_the_images(run, farm):
    before = sorted(farm.rglob("*"))
    for place in (farm, farm / "out", farm / "train" / "out"):
        run(extra=("--output", place)).fails(2, "would lie inside", "--output")
    assert sorted(farm.rglob("*")) == before


def test_a_list_of_shots_is_part_of_what_a_cell_is(run, farm, tmp_path):
    def listed(number: int) -> None:
        rows = [f'{{"impath": "train/{name}/{number}.png", "label": 0, "classname": "{name}"}}'
                for name in ("bee", "cow", "dog", "eel")]  # fmt: skip
        (tmp_path / "{x}1-1.json").write_text(f'{{"train": {{"data": [{", ".join(rows)}]}}}}', "utf-8")

    def plan() -> dict:
        rows = f"shots = [1]\nseeds = [1]\n{ROWS}"
        return run('few_shot = "{x}{shots}-{seed}.json"\n', rows=rows, extra=("--json",)).document

    listed(0)
    assert (plan()["done"], plan()["done"]) == (2, 0)
    listed(1)
    assert plan()["done"] == 1
    listed(0)
    assert plan()["done"] == 0


@pytest.mark.parametrize("damage", ["flipped", "short", "empty", "folder"])
def test_a_damaged_cell_is_noticed_and_named(run, tmp_path, damage):
    assert run().code == 0
    cells = sorted((tmp_path / "out" / "cells").iterdir())
    for cell in cells:
        data = cell.read_bytes()
        cell.unlink()
        if damage == "folder":
            cell.mkdir()
        else:
            flipped = data[:-1] + bytes([data[-1] ^ 1])
            cell.write_bytes({"flipped": flipped, "short": data[:-1], "empty": b""}[damage])
        run().fails(4, f"the cell out/cells/{cell.name} is damaged: delete it")
        cell.rmdir() if damage == "folder" else cell.unlink()
        assert run(extra=("--json",)).document["done"] == 1
        assert cell.read_bytes() == data


def test_a_full_disk_costs_the_cell_that_was_being_done(run, tmp_path, monkeypatch):
    full = [False]
    save = files.save_file

    def write(tensors, part, named):
        if full[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(tensors, part, named)
        full[0] = True

    monkeypatch.setattr(files, "save_file", write)
    run().fails(7, "cannot be written: No space left on device")
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 1
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert run(extra=("--json",)).document["done"] == 1


def test_a_closed_stdout_is_refused_before_anything_is_done(tmp_path):
    (tmp_path / "plan.toml").write_text("", "utf-8")
    command = f'"{sys.executable}" -m clipfit benchmark plan.toml --json >&-'
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 7
    assert "standard output is closed" in done.stderr


def test_an_output_that_is_a_file_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("mine", "utf-8")
    run(extra=("--output", "file")).fails(7, "file/cells cannot be created")
    assert (tmp_path / "file").read_text("utf-8") == "mine"
