"""What every command shares: whatever ends it becomes one sentence and an exit code."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import typer
import typer.core

from clipfit import interrupts, ranks
from clipfit.errors import ClipfitError, OutputError, UsageError, first_line
from clipfit.stdio import flush
from clipfit.text import printable

UNWRITABLE = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, getattr(errno, "EDQUOT", errno.ENOSPC)}
STOPPED = {signal.SIGTERM: "terminated", getattr(signal, "SIGHUP", None): "hung up"}


@dataclass(frozen=True)
class Ending:
    """How a command ended: its exit code, and the sentence on stderr; nothing to say where that is empty."""

    code: int
    message: str = ""
    label: str = "error"
    found: Any = None  # see ClipfitError

    @property
    def document_text(self) -> str:
        """The message in a document that already says that it is an error."""
        return self.message if self.label == "error" else f"{self.label}: {self.message}"


class Commands(typer.core.TyperGroup):
    """All commands. Whatever ends one, an option that there is not among it, is shown in one form."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        arguments = sys.argv[1:] if args is None else list(args)
        as_json = "--json" in arguments

        def carry_out() -> None:
            if as_json and sys.stdout is None:
                raise OutputError("standard output is closed, but --json writes to it: leave it open.")
            with self.make_context(prog_name or "clipfit", arguments, **extra) as context:
                self.invoke(context)

        with interrupts.raising():
            code = ended(carry_out, as_json)
        sys.exit(code)


def ended(work: Callable[[], None], as_json: bool) -> int:
    """Do it, say how it ended where there is something to say, and return the exit code."""
    done = False
    try:
        work()
        done = True
        with showing():
            flush(sys.stdout)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        ending = ending_of(error)
        may_speak = bool(ending.message) and ranks.may_speak(error)
        with contextlib.suppress(KeyboardInterrupt), interrupts.waiting(most=1):  # a second signal: it ends already
            if ending.code == 0 and ranks.started().leads:
                ranks.end_silently()
            elif isinstance(error, ranks.Lost) and ranks.ended_silently():
                ending, may_speak = Ending(0), False
            if may_speak and ranks.speaks():
                _say(ending, as_json and not done)
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError):
                    flush(stream)
        return ending.code
    finally:
        interrupts.over()


def _say(ending: Ending, as_json: bool) -> None:
    if own := ranks.started().rank:
        ending = replace(ending, message=f"process {own}: {ending.message}")
    with contextlib.suppress(OSError):  # a terminal that hung up
        typer.echo(f"{ending.label}: {printable(ending.message)}", err=True)
    if as_json and sys.stdout is not None:
        with contextlib.suppress(OutputError):
            found = ending.found.as_json() if ending.found is not None else {}
            _print({**found, "error": {"code": ending.code, "message": ending.document_text}})


def ending_of(error: BaseException) -> Ending:
    """What an exception means to whoever called the command."""
    if isinstance(error, typer.Exit):
        return Ending(error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        code = error.exit_code if isinstance(error, interrupts.Stopped) else 130
        label = STOPPED.get(signal.Signals(code - 128), "interrupted")
        why = f" ({error.why})" if isinstance(error, ranks.Lost) else ""
        return Ending(code, (interrupts.said_of(error) or "nothing was written") + why, label)
    if isinstance(error, ClipfitError):
        return Ending(error.exit_code, str(error), found=error.found)
    if hasattr(error, "format_message"):  # the command line's own: an unknown option, a missing argument
        context = getattr(error, "ctx", None)
        where = context.command_path if context else "clipfit"
        return Ending(UsageError.exit_code, f"{error.format_message().rstrip('.')}; see {where} --help.")
    if isinstance(error, BrokenPipeError):  # … | head
        return Ending(0)
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        what = error.filename or "what was to be written"
        return Ending(OutputError.exit_code, f"{what}: {error.strerror}; make room, or choose another place.")
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return Ending(UsageError.exit_code, f"{str(error.filename)[:60]}… is too long to be the name of a file.")
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for --help
        return Ending(2, f"{first_line(error)}; make batches smaller (see --batch-size), or pass --device cpu.")
    if os.environ.get("CLIPFIT_DEBUG"):
        traceback.print_exception(error)
    return Ending(
        1,
        f"a fault of clipfit's own ({type(error).__name__}: {error}); "
        "please report it with the output of the same command under CLIPFIT_DEBUG=1.",
    )


@contextlib.contextmanager
def imports() -> Iterator[None]:
    """Within: the library is imported. Python looks for garbage among torch's half a million objects neither then nor
    later, and a signal is heard though a module that was being imported swallowed it."""
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
        interrupts.require_none()
    except Exception:
        interrupts.require_none()
        raise
    finally:
        gc.freeze()
        gc.enable()


def keeping(what: str) -> contextlib.AbstractContextManager[None]:
    """For a command that leaves something when it is interrupted: say what is kept, where nobody has said it yet."""
    return interrupts.keeping(lambda: what)


def showing() -> contextlib.AbstractContextManager[None]:
    """For what comes after the work of a command: who stops it then is told that it was done."""
    return keeping("all was done, but not all of it shown")


def print_json(document: Mapping[str, Any]) -> None:
    """Exactly one JSON document on stdout, in ASCII: whatever the terminal's encoding, it can be printed.

    Of several processes that torchrun started, the first one prints it.

    Raises:
        OutputError: it cannot be written, or nobody reads it.
    """
    if ranks.started().leads:
        with showing():
            _print(document)


def _print(document: Mapping[str, Any]) -> None:
    try:
        typer.echo(json.dumps(document))
        flush(sys.stdout)
    except OSError as error:
        with contextlib.suppress(OSError):
            flush(sys.stdout)
        raise OutputError(f"standard output cannot be written: {error.strerror}; the JSON document is lost.") from None
