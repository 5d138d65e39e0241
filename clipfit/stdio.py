"""The standard streams: closed ones are opened, and what cannot be written to is let go of."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any, TextIO


def fill_closed_streams() -> None:
    """Open what was closed of stdin, stdout and stderr, so that no file of ours takes its number and others' words."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)


def flush(stream: TextIO | None) -> None:
    """Write out what waits in it; where that fails, let go of it, or Python would fail again when it ends.

    Raises:
        OSError: it cannot be written.
    """
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        _let_go(stream)
        raise


class Forgiving:
    """A stream to show progress on: once nobody reads it, or its disk is full, words are dropped and work goes on."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BlockingIOError:  # whoever reads it is slow, and there yet
            pass
        except OSError:
            _let_go(self._stream)


def _let_go(stream: TextIO) -> None:
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
