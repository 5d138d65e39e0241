"""How a command ends: one sentence, the right exit code, one JSON document, whatever becomes of its streams."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_classes
from typer.testing import CliRunner

from clipfit.cli import application
from clipfit.runs.run import open_run
from clipfit.stdio import Forgiving

# a command whose body is the last argument, so that no ending needs a model
PROGRAM = """
import errno, os, signal, sys
from types import SimpleNamespace
from clipfit import cli
from clipfit.__main__ import main
from clipfit.cli.common import keeping, print_json
from clipfit.cli.options import Json
from clipfit.errors import DataError

body = sys.argv.pop()

def command(values, *, as_json: Json = False):
    "A command."
    exec(body)

cli.COMMANDS["toy"] = SimpleNamespace(options=list, command=command)
cli.app = cli.application()
main()
"""
CLOSED = ["sh", "-c", '"$@" >&-', "sh"]
FULL = ["sh", "-c", '"$@" >/dev/full', "sh"]
full_device = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")


def run(
    *arguments: str, body: str = "", into: tuple[str, ...] | list[str] = (), **options
) -> subprocess.CompletedProcess:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    command = [*into, sys.executable, "-c", PROGRAM, *arguments, body]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(command, text=True, env=buffered, **options)


# ---- under --json an error is a document too


def test_an_error_is_one_document_beside_its_sentence(cli, tmp_path):
    make_classes(tmp_path / "pets", {"cat": 1})
    for arguments, code, words in (
        (("adapt", "nowhere"), 3, "there is no nowhere"),
        (("adapt", "pets", "--alpha", 2), 2, "alpha must lie between"),
        (("adapt", "pets", "--alpha", "two"), 2, "alpha must be a ratio between 0 and 1, or auto"),
        (("adapt", "pets", "--alhpa", 1), 2, "--alhpa"),
        (("adapt",), 2, "Missing argument"),
        (("adpt",), 2, "adpt"),
    ):
        ended = cli(*arguments, "--json")
        assert ended.code == code, ended.stderr
        assert ended.document.keys() == {"error"}
        error = ended.document["error"]
        assert error["code"] == code
        assert words in error["message"]
        assert ended.stderr.splitlines()[-1] == f"error: {error['message']}"
        alone = cli(*arguments)
        assert (alone.code, alone.stdout, alone.stderr) == (code, "", ended.stderr)


def test_wrong_usage_says_where_help_is(cli):
    cli("adapt", "--alhpa", 1).fails(2, "--alhpa", "see clipfit adapt --help.")
    cli("adpt").fails(2, "adpt", "see clipfit --help.")


def test_what_a_user_names_never_steers_the_terminal(cli):
    for name in ("no\x1b[2Jwhere", "no\u202ewhere", "no\nerror: where"):
        ended = cli("adapt", name)
        assert ended.code == 3
        assert ended.stderr.count("\n") == 1
        assert not set(ended.stderr) & set("\x1b\u202e")
    assert r"no\x1b[2Jwhere" in cli("adapt", "no\x1b[2Jwhere").stderr


def test_faults_of_a_file_system_are_no_faults_of_ours():
    for number in ("EROFS", "ENOSPC", "EACCES", "EDQUOT"):
        ended = run("toy", "--json", body=f"raise OSError(errno.{number}, 'so it is', '/runs/x')")
        assert ended.returncode == 7
        assert ended.stderr == "error: /runs/x: so it is; make room, or choose another place.\n"
        assert json.loads(ended.stdout)["error"]["code"] == 7
    assert run("toy", body="raise OSError(errno.EINVAL, 'odd')").returncode == 1


# ---- a stdout that is closed, full, or read by nobody


def test_a_document_that_nobody_can_read_is_no_success():
    written = "print_json({'a': 1})"
    assert run("toy", body=written).stdout == '{"a": 1}\n'
    closed = run("toy", "--json", body="raise AssertionError('it was carried out')", into=CLOSED)
    assert (closed.returncode, closed.stderr) == (
        7, "error: standard output is closed, but --json writes to it: leave it open.\n"
    )  # fmt: skip
    read, write = os.pipe()
    os.close(read)
    unread = run("toy", "--json", body=written, stdout=write)
    os.close(write)
    assert (unread.returncode, unread.stderr) == (
        7, "error: standard output cannot be written: Broken pipe; the JSON document is lost.\n"
    )  # fmt: skip


@full_device
def test_a_full_disk_under_stdout():
    full = run("toy", "--json", body="print_json({'a': 1})", into=FULL)
    assert (full.returncode, full.stderr) == (
        7, "error: standard output cannot be written: No space left on device; the JSON document is lost.\n"
    )  # fmt: skip
    failed = run("toy", "--json", body="raise DataError('no images.')", into=FULL)
    assert (failed.returncode, failed.stderr) == (3, "error: no images.\n")
    for asked in (["--help"], ["--version"], ["toy", "--help"]):
        shown = run(*asked, into=FULL, body="")
        assert shown.returncode == 7
        assert shown.stderr.startswith("error: ")
        assert shown.stderr.count("\n") == 1


def test_help_and_version_survive_a_closed_stdout():
    for asked in (["--help"], ["--version"], ["adapt", "--help"]):
        shown = run(*asked, into=CLOSED)
        assert (shown.returncode, shown.stderr) == (0, "")


def test_no_file_takes_the_number_of_a_closed_stream():
    ended = run("toy", body="sys.exit(os.open(os.devnull, os.O_RDONLY) <= 2)", into=["sh", "-c", '"$@" <&- >&-', "sh"])
    assert (ended.returncode, ended.stderr) == (0, "")


def test_rows_into_a_closed_pipe_end_quietly():
    read, write = os.pipe()
    os.close(read)
    rows = run("toy", body="[print(n, flush=True) for n in range(3)]", stdout=write)
    waiting = run("toy", body="print('in the buffer')", stdout=write)
    os.close(write)
    for ended in (rows, waiting):
        assert (ended.returncode, ended.stderr) == (0, "")


# ---- a stderr that is read by nobody, or full

SHOW = """
from clipfit.report.console import Console
with Console() as console:
    for n in range(3):
        console.say(f"line {n}")
    os.write(1, b"done")
"""


def test_work_goes_on_where_nobody_reads_of_its_progress():
    read, write = os.pipe()
    os.close(read)
    for into in ([], ["sh", "-c", '"$@" 2>&-', "sh"]):
        ended = run("toy", body=SHOW, into=into, stderr=write)
        assert (ended.returncode, ended.stdout) == (0, "done")
    failed = run("toy", "--json", body=f"{SHOW}\nraise DataError('no images.')", stderr=write)
    assert (failed.returncode, failed.stdout[:4]) == (3, "done")
    assert json.loads(failed.stdout[4:])["error"]["message"] == "no images."
    os.close(write)


@full_device
def test_work_goes_on_where_the_disk_of_its_log_is_full():
    ended = run("toy", body=SHOW, into=["sh", "-c", '"$@" 2>/dev/full', "sh"])
    assert (ended.returncode, ended.stdout) == (0, "done")


def test_whoever_is_slow_to_read_loses_words_alone():
    read, write = os.pipe()
    os.set_blocking(write, False)
    full = os.write(write, bytes(2**20))
    with os.fdopen(read, "rb") as reader, os.fdopen(write, "w") as stream:
        shown = Forgiving(stream)
        shown.write("while nobody reads\n")
        shown.flush()
        reader.read(full)
        shown.write("now\n")
        shown.flush()
        os.set_blocking(read, False)
        assert b"now\n" in reader.read()


def test_a_run_is_written_although_nobody_reads_of_its_progress(models, flat, tmp_path):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "clipfit", "adapt", flat, "--model", models["vit"], "--output", "run", "--json"]
    ended = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=write, text=True)
    os.close(write)
    assert ended.returncode == 0
    assert json.loads(ended.stdout)["run"] == "run"
    assert open_run(tmp_path / "run").method == "cite"


# ---- signals


@pytest.mark.parametrize(
    ("name", "code", "label"),
    [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated"), ("SIGHUP", 129, "hung up")],
)
def test_a_signal_ends_a_command_with_one_sentence(name, code, label):
    kill = f"os.kill(os.getpid(), signal.{name})"
    ended = run("toy", "--json", body=kill)
    assert (ended.returncode, ended.stderr) == (code, f"{label}: nothing was written\n")
    assert json.loads(ended.stdout) == {"error": {"code": code, "message": f"{label}: nothing was written"}}
    ended = run("toy", body=f"with keeping('three rows are kept'): {kill}")
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "", f"{label}: three rows are kept\n")


def test_what_the_library_says_is_kept_goes_before_the_commands_words():
    ended = run("toy", body="with keeping('three rows'): raise KeyboardInterrupt('the state after step 4 is kept')")
    assert (ended.returncode, ended.stderr) == (130, "interrupted: the state after step 4 is kept\n")


TWICE = """
try:
    with keeping("three rows are kept"):
        os.kill(os.getpid(), signal.SIGINT)
finally:
    os.kill(os.getpid(), signal.SIGTERM)
"""
WHILE_IT_IS_SAID = """
from clipfit.cli import common

def disturbed(*given, say=common._say, os=os, signal=signal):
    os.kill(os.getpid(), signal.SIGTERM)
    say(*given)

common._say = disturbed
with keeping("three rows are kept"):
    os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.parametrize(
    ("body", "code", "label"),
    [(TWICE, 143, "terminated"), (WHILE_IT_IS_SAID, 130, "interrupted")],
    ids=["on its way", "while it is said"],
)
def test_a_second_signal_takes_nothing_from_the_sentence_of_the_first(body, code, label):
    ended = run("toy", "--json", body=body)
    assert (ended.returncode, ended.stderr) == (code, f"{label}: three rows are kept\n")
    assert json.loads(ended.stdout)["error"]["message"] == f"{label}: three rows are kept"


WHILE_IT_IS_SHOWN = """
from clipfit.cli import common

def disturbed(stream, usual=common.flush, said=[], os=os, signal=signal):
    usual(stream)
    if said:  # the document is printed before
        os.kill(os.getpid(), signal.SIGTERM)
    said.append(stream)

common.flush = disturbed
print_json({"run": "here"})
"""


def test_a_signal_after_the_document_makes_no_second_one_of_it():
    ended = run("toy", "--json", body=WHILE_IT_IS_SHOWN)
    assert (ended.returncode, ended.stdout) == (143, '{"run": "here"}\n')
    assert ended.stderr == "terminated: all was done, but not all of it shown\n"


def test_a_signal_after_the_work_is_told_that_it_was_done():
    ended = run(
        "toy", body="from clipfit.cli.common import showing\nwith showing(): os.kill(os.getpid(), signal.SIGINT)"
    )
    assert (ended.returncode, ended.stderr) == (130, "interrupted: all was done, but not all of it shown\n")


def test_ctrl_c_while_python_ends_is_no_traceback():
    ended = run("toy", body="import atexit; atexit.register(os.kill, os.getpid(), signal.SIGINT); print('done')")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")


def test_an_ignored_hang_up_stays_ignored():
    before = signal.getsignal(signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it to its child
    try:
        ended = run("toy", body="os.kill(os.getpid(), signal.SIGHUP); print('on')")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (ended.returncode, ended.stdout) == (0, "on\n")


def test_every_exit_code_stands_in_the_help():
    for arguments in (["--help"], ["adapt", "--help"], ["export", "--help"]):
        shown = " ".join(CliRunner().invoke(application(), arguments).stdout.split())
        for code in ("0 done", "1 a fault", "2 wrong", "3 the data", "4 the model", "5 the guard", "6 numbers",
                     "7 output", "129 hung up", "130 interrupted", "143 terminated"):  # fmt: skip
            assert code in shown


def test_the_pipeline_ends_with_clipfits_own_code_and_takes_any_name(tmp_path, models):
    """And a folder whose name begins with a dash is none of its options."""
    script = Path(__file__).parent.parent / "examples/pipeline.sh"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    usual = {"cwd": tmp_path, "env": {**os.environ, "PATH": path}, "capture_output": True, "text": True, "check": False}
    missing = subprocess.run(["bash", script, "nothere", "out"], **usual)
    assert (missing.returncode, "Traceback" in missing.stderr) == (3, False)
    assert "there is no nothere" in missing.stderr
    make_classes(tmp_path / "-shots" / "train", {"ant": 2, "bee": 2})
    make_classes(tmp_path / "-shots" / "test", {"ant": 2, "bee": 2}, seed=1)
    odd = ["bash", script, "-shots", "-out", "0", "--model", models["vit"], "--epochs", "1", "--learning-rate", "1e-9"]
    done = subprocess.run(odd, **usual)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "-out/labels.jsonl").read_text().splitlines()) == 8
