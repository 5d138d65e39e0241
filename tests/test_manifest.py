"""What clipfit wrote is known by its digest: damage is refused with exit code 4, or has no effect."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from clipfit.errors import ModelError, OutputError
from clipfit.runs import files, manifest
from clipfit.runs.run import Run, open_run


def folder_of(root: Path) -> Path:
    folder = root / "x"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.json").write_text("{}")
    (folder / "sub" / "b.bin").write_bytes(b"\0\1")
    (folder / "timing.json").write_text("{}")
    manifest.seal(folder)
    return folder


def test_every_file_is_listed_but_the_manifest_and_the_times(tmp_path):
    folder = folder_of(tmp_path)
    listed = json.loads((folder / "files.json").read_text())
    assert listed == {"a.json": hashlib.sha256(b"{}").hexdigest(), "sub/b.bin": hashlib.sha256(b"\0\1").hexdigest()}
    assert manifest.verify(folder) == listed
    (folder / "timing.json").write_text("another time")
    (folder / "mine.txt").write_text("a user's")
    assert manifest.verify(folder) == listed


def test_only_what_is_named_is_read_but_all_must_be_there(tmp_path):
    folder = folder_of(tmp_path)
    (folder / "sub" / "b.bin").write_bytes(b"\0\2")
    manifest.verify(folder, ["a.json"])
    with pytest.raises(
        ModelError, match=r"b\.bin is not as clipfit wrote it: expected SHA-256 b413f47d13ee2fe6…, found"
    ):
        manifest.verify(folder)
    (folder / "sub" / "b.bin").unlink()
    with pytest.raises(ModelError, match=r"b\.bin is missing, but files\.json lists it: restore it"):
        manifest.verify(folder, ["a.json"])
    with pytest.raises(ModelError, match=r"does not list c\.json"):
        manifest.verify(folder_of(tmp_path / "other"), ["c.json"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]\n",
        '{\n  "a.json": 1\n}\n',
        '{"a.json": "0"}\n',
        '{\n  "../a.json": "0"\n}\n',
        '{\n  "/a": "0"\n}\n',
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path, text):
    folder = folder_of(tmp_path)
    (folder / "files.json").write_text(text)
    with pytest.raises(ModelError, match=r"files\.json (cannot be read|is not as clipfit wrote it)"):
        manifest.verify(folder)


def test_names_that_are_no_utf_8(tmp_path):
    (tmp_path / "x").mkdir()
    name = os.fsdecode(b"caf\xe9.png")
    try:
        (tmp_path / "x" / name).write_bytes(b"1")
    except OSError:
        pytest.skip("this file system takes no such name")
    manifest.seal(tmp_path / "x")
    assert manifest.verify(tmp_path / "x").keys() == {name}


# ---- runs


@pytest.fixture
def run(split_run: Path, tmp_path: Path) -> Path:
    """The run as `adapt` left it: other tests evaluate the one that it is copied from."""
    return Path(shutil.copytree(split_run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluations")))


def seen(run: Run) -> tuple[object, ...]:
    """Everything of a run that a result could depend on."""
    states = [{name: t.numpy().tobytes() for name, t in run.state(alpha).items()} for alpha in (run.alpha, 1.0)]
    return run.record, run.base, run.names, run.shots, states


def complaint(run: Path) -> str | None:
    """What is said where the run is refused."""
    try:
        seen(open_run(run))
    except ModelError as error:
        return str(error)
    return None


def test_a_byte_flipped_in_any_file_is_refused_or_has_no_effect(run):
    whole, refused, harmless = seen(open_run(run)), 0, 0
    for file in sorted(run.iterdir()):
        data = file.read_bytes()
        for at in (0, 9, len(data) // 2, len(data) - 1):
            file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            said = complaint(run)
            if said is None:
                assert file.name == "timing.json"
                assert seen(open_run(run)) == whole
                harmless += 1
            else:
                assert file.name in said
                refused += 1
        file.write_bytes(data)
    assert seen(open_run(run)) == whole
    assert refused == 4 * 7
    print(f"\n{refused + harmless} flipped bytes: {refused} refused, {harmless} without effect, 0 silent")


def test_a_file_that_is_cut_short_or_gone_is_refused(run):
    for file in sorted(run.iterdir()):
        if file.name == "timing.json":
            continue
        data = file.read_bytes()
        for spoiled in (None, b"", data[:-1], data + b"\0"):
            file.unlink() if spoiled is None else file.write_bytes(spoiled)
            with pytest.raises(ModelError, match=file.name.replace(".", r"\.")):
                seen(open_run(run))
            file.write_bytes(data)


def test_a_model_that_is_cut_short_is_refused_before_it_is_read(run):
    data = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(ModelError, match="not as long as its header says"):
        open_run(run)


def test_other_weights_under_the_name_of_the_model_are_refused(cli, run):
    shutil.copy(run / "finetuned.safetensors", run / "model.safetensors")
    cli("export", run).fails(4, "model.safetensors does not belong to this run: its alpha is 1.0, that of the run 0.5")
    cli("evaluate", run).fails(4, "model.safetensors does not belong to this run")


def test_weights_that_were_changed_and_say_nothing_of_it_are_refused(cli, run):
    state, about = files.read_tensors(run / "model.safetensors")
    files.write_tensors(run / "model.safetensors", {name: t + 1 for name, t in state.items()}, about)
    cli("export", run).fails(4, "model.safetensors is not as clipfit wrote it: expected SHA-256")
    assert not Path("exports").exists()


def test_another_ratio_in_the_configuration_is_refused(cli, run):
    changed = (run / "config.json").read_text().replace('"alpha": 0.5', '"alpha": 0.9')
    (run / "config.json").write_text(changed)
    cli("evaluate", run).fails(4, "config.json is not as clipfit wrote it")
    manifest.seal(run)  # and whoever puts the digests right has still the weights against him
    cli("evaluate", run).fails(4, "its alpha is 0.5, that of the run 0.9")


def test_other_classes_than_the_weights_were_made_for_are_refused(run):
    classes = json.loads((run / "classes.json").read_text())
    files.write_json(run / "classes.json", {**classes, "base": list(reversed(classes["base"]))})
    manifest.seal(run)
    with pytest.raises(ModelError, match=r"model\.safetensors does not belong to this run: its classes is \['bee'"):
        open_run(run)


def test_a_run_without_its_manifest_is_refused(cli, run):
    (run / "files.json").unlink()
    cli("evaluate", run).fails(4, "run/files.json is missing: restore it")


def test_a_run_knows_when_another_has_taken_its_place(run):
    opened = open_run(run)
    opened.require_unchanged()
    shots = (run / "shots.jsonl").read_text()
    (run / "shots.jsonl").write_text(shots + "\n")
    manifest.seal(run)
    with pytest.raises(OutputError, match="run was replaced by another run meanwhile"):
        opened.require_unchanged()


def test_times_and_places_that_cannot_be_read_have_no_effect(run):
    for text in ("{", "[]", '{"inputs": 3}'):
        (run / "timing.json").write_text(text)
        opened = open_run(run)
        assert opened.inputs == {}
        assert opened.notes == (f"{run / 'timing.json'} is damaged and was not used",)


def as_format_1(run: Path) -> Path:
    """As version 0.1 wrote it: no digests, no fields that came later."""
    (run / "files.json").unlink()
    config = json.loads((run / "config.json").read_text())
    for later in ("grey_bits", "balance", "parent"):
        del config[later]
    files.write_json(run / "config.json", {**config, "format": 1})
    return run


def test_a_run_of_format_1_loads_with_a_note(run):
    new = open_run(run)
    old = open_run(as_format_1(run))
    assert not new.notes
    assert len(old.notes) == 1
    assert "run format 1" in old.notes[0]
    assert all(torch.equal(new.state(0.5)[name], tensor) for name, tensor in old.state(0.5).items())
    assert old.digest("model.safetensors") == new.digest("model.safetensors") == new.digests["model.safetensors"]


def test_what_a_run_of_format_1_says_of_itself_must_agree(run):
    as_format_1(run)
    config = (run / "config.json").read_text()
    (run / "config.json").write_text(config.replace('"alpha": 0.5', '"alpha": 0.9'))
    with pytest.raises(ModelError, match=r"its alpha is 0\.5, that of the run 0\.9"):
        open_run(run)
    (run / "config.json").write_text(config)
    shutil.copy(run / "model.safetensors", run / "finetuned.safetensors")
    with pytest.raises(ModelError, match=r"finetuned\.safetensors does not belong to this run: its alpha"):
        open_run(run).state(1.0)
