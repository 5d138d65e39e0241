"""A folder reaches its place so that one whole folder exists at every instant, and nobody's files are lost."""

from __future__ import annotations

import functools
import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from clipfit.errors import ModelError, OutputError, UsageError
from clipfit.runs import manifest, place

BOUNDARIES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.copyfile")


def build(target: Path, content: str, overwrite: bool = True, say: Callable[[str], None] = print) -> None:
    """A little sealed folder of three files, one of them in a folder of its own."""
    with place.building(target, overwrite, say) as folder:
        (folder / "config.json").write_text(content)
        (folder / "shots.jsonl").write_text(content)
        (folder / "timing.json").write_text(content)
        (folder / "sub").mkdir()
        (folder / "sub" / content).write_text(content)


def whole(folder: Path) -> str | None:
    """The content of a whole folder that `build` made; None: it is none."""
    try:
        manifest.verify(folder)
    except ModelError:
        return None
    content = (folder / "config.json").read_text()
    assert (folder / "sub" / content).read_text() == content
    return content


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def killed_at(number: int, action: Callable[[], None]) -> bool:
    """Run it in a child that gets SIGKILL before its `number`-th change of the disk; False: there are fewer."""
    child = os.fork()
    if child == 0:
        left = number

        def count(event: str, _arguments: object) -> None:
            nonlocal left
            if event in BOUNDARIES:
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(count)
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


# ---- what appears, and what is left


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError()])
@pytest.mark.parametrize("old", [False, True], ids=["first", "over an old one"])
def test_a_folder_appears_only_when_it_is_complete(tmp_path, error, old):
    target = tmp_path / "runs" / "x"
    if old:
        build(target, "old")

    def half() -> None:
        with place.building(target, overwrite=True) as folder:
            (folder / "file").write_text("new")
            raise error

    with pytest.raises((OutputError, KeyboardInterrupt, ValueError)):
        half()
    if old:
        assert whole(target) == "old"
        assert entries(target.parent) == {"x", ".x.lock"}
    else:
        assert entries(tmp_path) == set()


def test_a_new_folder_replaces_the_old_one_and_leaves_nothing(tmp_path):
    target = tmp_path / "x"
    build(target, "old")
    build(target, "new")
    assert whole(target) == "new"
    assert entries(target) == {"config.json", "shots.jsonl", "timing.json", "sub", "files.json"}
    assert entries(tmp_path) == {"x", ".x.lock"}


def test_what_appears_meanwhile_is_only_replaced_when_asked(tmp_path):
    def meanwhile() -> None:
        with place.building(tmp_path / "x", overwrite=False):
            (tmp_path / "x").mkdir()
            (tmp_path / "x" / "file").write_text("theirs")

    with pytest.raises(UsageError, match="x was written by another process meanwhile"):
        meanwhile()
    assert (tmp_path / "x" / "file").read_text() == "theirs"
    assert entries(tmp_path) == {"x", ".x.lock"}


def test_an_empty_folder_can_be_an_output(tmp_path):
    (tmp_path / "x").mkdir()
    assert place.target_folder(tmp_path / "shots", "cite", tmp_path / "x", False, []) == tmp_path / "x"
    build(tmp_path / "x", "new", overwrite=False)
    assert whole(tmp_path / "x") == "new"
    with pytest.raises(UsageError, match="x exists already"):
        place.target_folder(tmp_path / "shots", "cite", tmp_path / "x", False, [])


def test_behind_a_link_is_what_is_replaced(tmp_path):
    build(tmp_path / "disk" / "x", "old")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "x")
    build(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert whole(tmp_path / "disk" / "x") == "new"


def test_a_place_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file cannot be created: File exists"):
        build(tmp_path / "file" / "x", "new")


# ---- what clipfit did not write


def test_what_clipfit_did_not_write_moves_aside_and_is_named(tmp_path):
    target, said = tmp_path / "x", list[str]()
    build(target, "old")
    (target / "notes.txt").write_text("mine")
    (target / "sub" / "more.txt").write_text("mine too")
    build(target, "new", say=said.append)
    assert whole(target) == "new"
    assert not (target / "notes.txt").exists()
    aside = tmp_path / "x.old-1"
    assert sorted(str(p.relative_to(aside)) for p in aside.rglob("*")) == ["notes.txt", "sub", "sub/more.txt"]
    assert len(said) == 1
    assert "x.old-1 holds what clipfit had not written" in said[0]
    (target / "again.txt").write_text("mine")
    build(target, "newer")
    assert entries(tmp_path / "x.old-2") == {"again.txt"}
    assert entries(tmp_path) == {"x", "x.old-1", "x.old-2", ".x.lock"}


def test_evaluations_go_with_their_run_and_what_is_beside_them_does_not(tmp_path):
    run = tmp_path / "x"
    build(run, "old")
    for _ in range(2):
        with place.building(run / "evaluations" / "held-out", overwrite=True) as folder:
            (folder / "predictions.json").write_text("[]")
    assert manifest.verify(run / "evaluations" / "held-out").keys() == {"predictions.json"}
    assert whole(run) == "old"
    (run / "evaluations" / "thoughts.txt").write_text("mine")
    build(run, "new")
    assert not (run / "evaluations").exists()
    assert [str(p.relative_to(tmp_path)) for p in (tmp_path / "x.old-1").rglob("*") if p.is_file()] == [
        "x.old-1/evaluations/thoughts.txt"
    ]


def test_a_run_of_format_1_is_replaced_too(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").write_text('{"format": 1}')
    (tmp_path / "x" / "model.safetensors").write_text("weights")
    build(tmp_path / "x", "new")
    assert entries(tmp_path) == {"x", ".x.lock"}


def test_a_manifest_cannot_make_clipfit_delete_what_lies_elsewhere(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("…")
    for listed in ("../precious/thesis.txt", str(tmp_path / "precious" / "thesis.txt"), "link/thesis.txt"):
        build(tmp_path / "x", "old")
        (tmp_path / "x" / "link").symlink_to(tmp_path / "precious")
        (tmp_path / "x" / "files.json").write_text(f'{{\n  "{listed}": "0"\n}}\n')
        build(tmp_path / "x", "new")
        assert (tmp_path / "precious" / "thesis.txt").read_text() == "…"


# ---- killed


def check_after_a_kill(top: Path, target: Path, home: Path) -> str:
    """One whole folder exists; the next command leaves one, under its name; what a user put there is there."""
    hidden = [home / f".{target.name}.{kind}" for kind in ("old", "new", "moving")]
    assert any(whole(folder) for folder in (target, *hidden))
    place.recover(target)
    content = whole(target)
    assert content is not None
    assert {name for name in entries(home) if name.startswith(".x")} <= {".x.lock"}
    assert [path.read_text() for path in top.rglob("notes.txt")] == ["mine"]
    return content


def test_killed_at_every_change_of_the_disk(tmp_path):
    seen = []
    for number in itertools.count(1):
        target = tmp_path / str(number) / "x"
        build(target, "old")
        (target / "sub" / "notes.txt").write_text("mine")
        if not killed_at(number, functools.partial(build, target, "new")):
            break
        seen.append(check_after_a_kill(target.parent, target, target.parent))
    assert seen == sorted(seen, reverse=True)  # first all old, then all new
    assert set(seen) == {"old", "new"}
    print(f"\nkilled before each of {len(seen)} changes of the disk: one whole run each time")


@pytest.mark.parametrize("first", range(1, 17))
def test_killed_again_while_the_next_command_puts_it_right(tmp_path, first):
    for number in itertools.count(1):
        target = tmp_path / str(number) / "x"
        build(target, "old")
        (target / "notes.txt").write_text("mine")
        assert killed_at(first, functools.partial(build, target, "new"))
        if not killed_at(number, functools.partial(place.recover, target)):
            break
        check_after_a_kill(target.parent, target, target.parent)
