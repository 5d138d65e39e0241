"""Signals that wait: none is lost, and every handler is put back."""

from __future__ import annotations

import signal
import subprocess
import threading

import pytest
from conftest import of_python

from clipfit import interrupts


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in interrupts.SIGNALS]


def test_a_signal_waits_for_the_end_of_the_outermost_block():
    before, done = handlers(), []
    with interrupts.raising():
        with pytest.raises(interrupts.Stopped) as stopped, interrupts.waiting():  # noqa: PT012
            with interrupts.waiting():
                signal.raise_signal(signal.SIGTERM)
                done.append("inner")
            done.append("outer")
        assert stopped.value.signum == signal.SIGTERM
        assert all(handler not in before for handler in handlers())  # still those of `raising`
    assert done == ["inner", "outer"]
    assert handlers() == before


def test_a_signal_is_not_lost_where_the_block_raises():
    """Whoever catches the error would go on, although told to end."""
    with interrupts.raising(), pytest.raises(interrupts.Stopped), interrupts.waiting():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        raise OSError("the disk is full")


def test_nothing_is_raised_once_all_is_over_and_again_in_the_next_command():
    for _ in range(2):
        with interrupts.raising():
            with pytest.raises(interrupts.Stopped):
                signal.raise_signal(signal.SIGINT)
            interrupts.over()
            signal.raise_signal(signal.SIGINT)


def test_what_is_over_in_a_thread_is_not_over_in_the_main_one():
    with interrupts.raising():
        thread = threading.Thread(target=interrupts.over)
        thread.start()
        thread.join()
        with pytest.raises(interrupts.Stopped):
            signal.raise_signal(signal.SIGINT)


def test_what_can_be_blocked_is_ended_by_the_signal_after_those_that_wait():
    """As a write to a stderr that nobody reads: the first of a second Ctrl-C and torchrun's SIGTERM waits."""
    done = []
    with interrupts.raising(), pytest.raises(interrupts.Stopped) as stopped, interrupts.waiting(most=1):  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        done.append("one waits")
        signal.raise_signal(signal.SIGTERM)
        done.append("two wait")
    assert done == ["one waits"]
    assert isinstance(stopped.value.__context__, interrupts.Stopped)


@pytest.mark.parametrize("number", [interrupts.SIGNALS[0], interrupts.SIGNALS[-1]])
@pytest.mark.parametrize("at", range(2 * len(interrupts.SIGNALS)))
def test_a_signal_between_the_handlers_leaves_none_of_them_waiting(monkeypatch, at, number):
    """`at`: after which of the calls that set a handler the signal arrives."""
    with interrupts.raising():
        calls, set_handler = [], signal.signal

        def disturbed(which, handler):
            set_handler(which, handler)
            calls.append(which)
            if len(calls) == at + 1:
                signal.raise_signal(number)

        with monkeypatch.context() as patch:
            patch.setattr(signal, "signal", disturbed)
            with pytest.raises(interrupts.Stopped), interrupts.waiting():
                pass
        for which in interrupts.SIGNALS:
            with pytest.raises(interrupts.Stopped):
                signal.raise_signal(which)


def importing(number: str, answer: str) -> subprocess.CompletedProcess[str]:
    """A module that is sent a signal while it is imported, and what it makes of that."""
    return of_python(
        "import os, signal\n"
        "from clipfit import interrupts\n"
        "from clipfit.cli.common import imports\n"
        "with interrupts.raising(), imports():\n"
        "    try:\n"
        f"        os.kill(os.getpid(), signal.{number})\n"
        "    except BaseException:\n"
        f"        {answer}\n"
    )


def test_a_signal_that_imported_code_swallows_is_heard():
    done = importing("SIGTERM", "print('swallowed')")
    assert done.stdout == "swallowed\n"
    assert "interrupts.Stopped" in done.stderr


def test_a_signal_that_imported_code_makes_another_error_of_is_heard():
    done = importing("SIGINT", "raise ImportError('a module that was torn') from None")
    assert done.stderr.rstrip().splitlines()[-1] == "clipfit.interrupts.Stopped"


def test_ctrl_c_while_the_command_line_is_imported_is_a_sentence():
    done = of_python(
        "import signal, sys\n"
        "class Pressing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'typer':\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Pressing())\n"
        "from clipfit.__main__ import main\n"
        "main()\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted: nothing was written\n")
