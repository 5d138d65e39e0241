"""A folder reaches its place so that one whole folder exists at every instant, and nobody's files are lost."""

from __future__ import annotations

import ctypes
import errno
import functools
import itertools
import os
import shutil
import signal
import subprocess
import sys
import traceback
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


def test_everything_is_on_the_disk_before_it_is_moved(tmp_path, monkeypatch):
    flushed: set[int] = set()
    unflushed: list[str] = []
    fsync, rename = os.fsync, os.rename

    def moving(path: Path, to: Path) -> None:
        inside = [path, *path.rglob("*")] if path.name.endswith(".part") else []
        unflushed.extend(p.name for p in inside if p.stat().st_ino not in flushed)
        rename(path, to)
        flushed.discard(to.parent.stat().st_ino)

    monkeypatch.setattr(os, "fsync", lambda descriptor: (flushed.add(os.fstat(descriptor).st_ino), fsync(descriptor)))
    monkeypatch.setattr(os, "rename", moving)
    build(tmp_path / "x", "new")
    assert unflushed == []
    assert tmp_path.stat().st_ino in flushed  # and the new name too, when it is said to be done


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


def test_a_move_that_fails_puts_the_old_one_back(tmp_path, monkeypatch):
    build(tmp_path / "x", "old")
    rename = os.rename

    def failing(path, to):
        if str(path).endswith(".part"):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        rename(path, to)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OutputError, match="x cannot be written: Disk quota exceeded"):
        build(tmp_path / "x", "new")
    assert whole(tmp_path / "x") == "old"
    assert entries(tmp_path) == {"x", ".x.lock"}


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
    assert_nothing_more(top, content)
    return content


def assert_nothing_more(top: Path, content: str) -> None:
    """Below `top` are one folder that `build` made, notes, and the lock."""
    expected = ["config.json", "shots.jsonl", "timing.json", content, "files.json", "notes.txt", ".x.lock"]
    assert sorted(path.name for path in top.rglob("*") if path.is_file()) == sorted(expected)


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


@pytest.mark.slow
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


# ---- where a folder cannot be renamed


def as_a_mount_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "x")


def as_another_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if `x` were mounted, but from the same disk: nothing tells until a rename fails."""
    rename, replace = os.rename, os.replace

    def is_x(path: Path) -> bool:
        return path.name == "x"

    def renaming(path: Path, to: Path) -> None:
        if is_x(path) or is_x(to):
            raise OSError(errno.EBUSY, "Device or resource busy")
        rename(path, to)

    def replacing(path: Path, to: Path) -> None:
        if set(filter(is_x, path.parents)) != set(filter(is_x, to.parents)):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(path, to)

    monkeypatch.setattr(os, "rename", renaming)
    monkeypatch.setattr(os, "replace", replacing)


FIXED = pytest.mark.parametrize("fixed", [as_a_mount_point, as_another_file_system])


def home_of(target: Path, fixed: object) -> Path:
    return target if fixed is as_a_mount_point else target.parent


@FIXED
def test_a_folder_that_cannot_be_renamed_is_filled_file_by_file(tmp_path, monkeypatch, fixed):
    fixed(monkeypatch)
    target = tmp_path / "x"
    target.mkdir()
    build(target, "first", overwrite=False)
    assert whole(target) == "first"
    (target / "notes.txt").write_text("mine")
    (target / "sub" / "second").write_text("mine, by a name that clipfit takes")
    said = list[str]()
    build(target, "second", say=said.append)
    assert whole(target) == "second"
    assert not (target / "sub" / "first").exists()
    assert (target / "notes.txt").read_text() == "mine"
    home = home_of(target, fixed)
    assert (home / "x.old-1" / "sub" / "second").read_text() == "mine, by a name that clipfit takes"
    assert len(said) == 1
    assert {path.name for path in tmp_path.rglob(".*")} == {".x.lock"}


@FIXED
def test_killed_at_every_change_where_it_cannot_be_renamed(tmp_path, monkeypatch, fixed):
    fixed(monkeypatch)
    seen = []
    for number in itertools.count(1):
        target = tmp_path / str(number) / "x"
        target.mkdir(parents=True)
        build(target, "old")
        (target / "notes.txt").write_text("mine")
        if not killed_at(number, functools.partial(build, target, "new")):
            break
        home = home_of(target, fixed)
        assert any(map(whole, (target, home / ".x.new"))) or (home / ".x.moving").is_dir()
        place.recover(target)
        assert whole(target) in ("old", "new")
        assert {name for name in entries(home) if name.startswith(".")} <= {".x.lock"}
        assert [path.read_text() for path in target.parent.rglob("notes.txt")] == ["mine"]
        seen.append(str(whole(target)))
        assert_nothing_more(target.parent, seen[-1])
    assert seen == sorted(seen, reverse=True)
    assert set(seen) == {"old", "new"}


@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_a_real_mount_point(tmp_path, kind):
    """In a child of its own that may mount; a bind mount has the device of the folder around it."""
    target = tmp_path / "x"
    target.mkdir()
    (tmp_path / "disk").mkdir()
    how = ["-t", "tmpfs", "none"] if kind == "tmpfs" else ["--bind", str(tmp_path / "disk")]

    def mounted() -> None:
        if ctypes.CDLL(None).unshare(0x00020000) != 0:  # mounts of our own
            os._exit(77)
        for command in (["mount", "--make-rprivate", "/"], ["mount", *how, str(target)]):
            if subprocess.run(command, capture_output=True).returncode != 0:
                os._exit(77)
        build(target, "first", overwrite=False)
        build(target, "second")
        assert whole(target) == "second"
        assert {path.name for path in tmp_path.rglob(".*")} == {".x.lock"}

    child = os.fork()
    if child == 0:
        try:
            mounted()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 77:
        pytest.skip("nothing can be mounted here")
    assert code == 0


# ---- the next command


def test_the_next_command_clears_what_dead_processes_left_and_nothing_else(tmp_path):
    target = tmp_path / "x"
    build(target, "old")
    (tmp_path / ".x.1.part").mkdir()  # number 1 lives, but does not hold the lock
    (tmp_path / ".x.1.part" / "half").write_text("half")
    place.resume_folder(target).mkdir()
    (tmp_path / ".x.mine").mkdir()
    (tmp_path / ".xy.7.part").mkdir()
    place.recover(target)
    assert entries(tmp_path) == {"x", ".x.lock", ".x.resume", ".x.mine", ".xy.7.part"}
    assert place.resume_folder(target) == tmp_path / ".x.resume"


def test_saved_state_goes_when_the_run_is_complete(tmp_path):
    place.resume_folder(tmp_path / "x").mkdir()
    build(tmp_path / "x", "new")
    assert entries(tmp_path) == {"x", ".x.lock"}


def test_a_run_that_is_missing_and_whole_as_old_is_put_back(tmp_path):
    build(tmp_path / "x", "old")
    for empty in (False, True):
        os.rename(tmp_path / "x", tmp_path / ".x.old")
        if empty:
            (tmp_path / "x").mkdir()
        assert place.target_folder(tmp_path / "shots", "cite", tmp_path / "x", True, []) == tmp_path / "x"
        assert whole(tmp_path / "x") == "old"
        assert entries(tmp_path) == {"x", ".x.lock"}


def test_a_whole_run_is_not_given_up_for_what_is_none(tmp_path):
    build(tmp_path / "x", "old")
    os.rename(tmp_path / "x", tmp_path / ".x.old")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "notes.txt").write_text("mine")
    for command in (functools.partial(place.recover, tmp_path / "x"), lambda: build(tmp_path / "x", "new")):
        with pytest.raises(UsageError, match=r"x is no run of clipfit's, but .*\.x\.old is one: move one of them"):
            command()
    assert whole(tmp_path / ".x.old") == "old"
    assert (tmp_path / "x" / "notes.txt").read_text() == "mine"


def test_every_run_of_a_folder_is_put_right(tmp_path):
    for name in ("a", "b"):
        build(tmp_path / name, "old")
        os.rename(tmp_path / name, tmp_path / f".{name}.old")
    place.recover_all(tmp_path)
    assert [whole(tmp_path / name) for name in ("a", "b")] == ["old", "old"]


# ---- two at once


def in_another_process(action: Callable[[], None]) -> type[BaseException] | None:
    """The kind of error it ends with there: UsageError, another one (as Exception), or none."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except UsageError:
            os._exit(2)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return {0: None, 1: Exception, 2: UsageError}[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]


def test_two_processes_never_build_the_same_folder_at_once(tmp_path):
    target = tmp_path / "x"
    build(target, "old")
    with place.locked(target), place.building(target, overwrite=True) as folder:  # taken twice by the one that has it
        (folder / "config.json").write_text("new")
        assert in_another_process(lambda: build(target, "theirs")) is UsageError
        assert in_another_process(lambda: place.recover(target)) is None  # the old one can still be read
        assert in_another_process(lambda: build(tmp_path / "y", "other")) is None
        place.recover(target)  # nor does a command within the builder take its part away
        assert folder.is_dir()
    assert in_another_process(lambda: build(target, "theirs")) is None
    assert whole(target) == "theirs"


def test_a_run_that_another_process_is_moving_is_not_said_to_be_missing(tmp_path):
    build(tmp_path / "x", "old")
    with place.locked(tmp_path / "x"):
        os.rename(tmp_path / "x", tmp_path / ".x.old")
        assert in_another_process(lambda: place.recover(tmp_path / "x")) is UsageError
    place.recover(tmp_path / "x")
    assert whole(tmp_path / "x") == "old"


def test_a_whole_run_can_be_read_where_nothing_can_be_cleared(tmp_path, monkeypatch):
    build(tmp_path / "x", "old")
    shutil.copytree(tmp_path / "x", tmp_path / ".x.old")

    def denied(*arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "rename", denied)
    place.recover(tmp_path / "x")
    assert whole(tmp_path / "x") == "old"
    shutil.rmtree(tmp_path / "x")
    with pytest.raises(OutputError, match="x cannot be written: Read-only file system"):
        place.recover(tmp_path / "x")
