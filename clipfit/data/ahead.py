"""Work done in threads beside the caller, in order, before it is asked for."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")
_starting = threading.Lock()


def ahead(items: Iterable[T], work: Callable[[T], R], most: int) -> Generator[tuple[T, R], None, None]:
    """Items with what becomes of them, in order; up to `most` are worked on, or wait, in threads beside the caller.

    What work raises is raised in its item's place. Close the generator where it may be left before its end: it waits
    for what is being worked on, and no thread outlives it.
    """
    pool = ThreadPoolExecutor(min(cores(), 16), initializer=on_one_core)  # decoders release the GIL
    waiting: deque[tuple[T, Future[R]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > most:
                first, done = waiting.popleft()
                yield first, done.result()
        while waiting:
            first, done = waiting.popleft()
            yield first, done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def on_one_core() -> None:
    """From now on torch's operations in this thread start no others, which would fight with the caller's.

    torch keeps the number of each thread, but also what new threads begin with, and sets both at once: hence the
    second thread, which puts the latter back.
    """
    with _starting:
        usual = torch.get_num_threads()
        torch.set_num_threads(1)
        other = threading.Thread(target=torch.set_num_threads, args=(usual,))
        other.start()
        other.join()
