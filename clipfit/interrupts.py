"""Ctrl-C, SIGTERM and SIGHUP: one exception for all three, and stretches of code that they wait for."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(KeyboardInterrupt):
    """The process was told to end. `exit_code` is what a shell expects: 128 and the signal's number."""

    def __init__(self, signum: int):
        super().__init__()
        self.signum = signum

    @property
    def exit_code(self) -> int:
        return 128 + self.signum


_heard: list[int] = []  # since `raising` began
_over = False


def _stop(signum: int, _frame: FrameType | None) -> None:
    if not _over:
        _heard.append(signum)
        raise Stopped(signum)


def over() -> None:
    """How it all ended has been said: until `raising` is left, no signal changes that."""
    global _over
    if threading.current_thread() is threading.main_thread():  # which alone hears them
        _over = True


def require_none() -> None:
    """After other people's code, which may have swallowed it: raises Stopped where a signal has come."""
    if _heard:
        raise Stopped(_heard[0])


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """Within: each of the signals raises Stopped, unless the process was started to ignore it (nohup).

    Outside the main thread, where Python delivers no signals, it does nothing.
    """
    global _over
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _heard.clear()
    _over = False
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _over = False


@contextlib.contextmanager
def keeping(what: Callable[[], str]) -> Iterator[None]:
    """Who is stopped within leaves something: `what` says so then, unless it was said already; "" for nothing."""
    try:
        yield
    except KeyboardInterrupt as stop:
        with contextlib.suppress(KeyboardInterrupt), waiting():  # a second signal: it ends already
            stop.args = (words,) if (words := said_of(stop) or what()) else ()
        raise


def said_of(stop: BaseException) -> str:
    """What is kept, in its own words or those of the one in whose middle it came: torchrun sends one after Ctrl-C."""
    before = stop.__context__
    return str(stop) or (said_of(before) if isinstance(before, KeyboardInterrupt) else "")


@contextlib.contextmanager
def waiting(most: int | None = None) -> Iterator[None]:
    """Within: the signals wait until the block has ended, so that what it changes is changed whole or not at all.

    They are delivered then even where the block raised. May be nested: the outermost block is waited for. Outside the
    main thread, where Python delivers no signals, it does nothing.

    Args:
        most: how many of them wait, where the block can be ended: the next one does so. None: all.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    ended = False
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    found = {number: handler for number, handler in handlers.items() if callable(handler)}

    def wait(number: int, frame: FrameType | None) -> None:
        if ended or len(arrived) == most:  # ended: a signal between the end and the last line that puts handlers back
            found[number](number, frame)
        else:
            arrived.append(number)

    try:
        for number in found:
            signal.signal(number, wait)
        yield
    finally:
        ended = True
        for number, handler in found.items():
            signal.signal(number, handler)
        if arrived:
            found[arrived[0]](arrived[0], None)
