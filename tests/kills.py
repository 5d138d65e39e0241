"""Processes that end themselves at a chosen moment, by SIGKILL or another signal.

They are forked, so that torch need not be imported again. A moment is the n-th call of a Python function, or the n-th
time that a file or folder gets another name; moments are counted, never timed, so that a failure can be repeated.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def hidden(folder: Path) -> set[str]:
    """What lies in a folder under a hidden name, but for locks, which may stay."""
    return {path.name for path in folder.iterdir() if path.name.startswith(".") and path.suffix != ".lock"}


def ends_with(action: Callable[[], object], at: int | None, moments: str, number: int = signal.SIGKILL) -> int:
    """Do it in a process of its own that sends itself a signal at moment `at`.

    Args:
        moments: "calls" or "renames". at: from 1; None: never.

    Returns:
        The number of moments where it ended well; minus the signal's number where that killed it; its exit code below
        that (−1000 − code) where it ended itself.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            count = _counting(at, moments, number)
            action()
            sys.setprofile(None)
            os.write(write, str(count()).encode())
            code = 0
        except KeyboardInterrupt as stop:
            code = getattr(stop, "exit_code", 130)
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as pipe:
        counted = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 0:
        return int(counted)
    return status if status < 0 else -1000 - status


def _counting(at: int | None, moments: str, number: int) -> Callable[[], int]:
    seen = 0

    def moment() -> None:
        nonlocal seen
        seen += 1
        if seen == at:
            os.kill(os.getpid(), number)

    if moments == "calls":

        def profile(_frame: Any, event: str, _arg: Any) -> None:
            if event == "call":
                moment()

        sys.setprofile(profile)
    else:
        for name in ("rename", "replace"):
            setattr(os, name, _before(moment, getattr(os, name)))
    return lambda: seen


def _before(moment: Callable[[], None], function: Callable[..., object]) -> Callable[..., object]:
    def watched(*args: Any, **kwargs: Any) -> object:
        moment()
        return function(*args, **kwargs)

    return watched
