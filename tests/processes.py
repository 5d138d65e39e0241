"""Several processes that work together over gloo, forked, so that torch need not be imported again."""

from __future__ import annotations

import os
import signal
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from conftest import Result
from safetensors.torch import load_file, save_file
from torch import distributed

from clipfit import ranks
from clipfit.cli import app
from clipfit.ranks import Ranks

Found = Mapping[str, torch.Tensor]


def together(count: int, work: Callable[[], Found]) -> Sequence[Found]:
    """What each of so many processes finds, by rank. What one raises is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        children = [_forked(Path(folder), Ranks(rank, count), work) for rank in range(count)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        said = "\n".join(path.read_text() for path in sorted(Path(folder).glob("*.txt")))
        assert codes == [0] * count, said
        return [load_file(Path(folder) / f"{rank}.safetensors") for rank in range(count)]


def _forked(folder: Path, own: Ranks, work: Callable[[], Found]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        store = distributed.FileStore(str(folder / "store"), own.count)
        distributed.init_process_group("gloo", store=store, rank=own.rank, world_size=own.count)
        with ranks.among(own):
            found = work()
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / f"{own.rank}.safetensors")
        code = 0
    except BaseException:
        (folder / f"{own.rank}.txt").write_text(f"process {own.rank}:\n{traceback.format_exc()}")
    finally:
        os._exit(code)


def torchrun(folder: Path, count: int, *arguments: object) -> Sequence[Result]:
    """`torchrun --nproc-per-node COUNT -m clipfit …` from a folder: how each process ended, by rank.

    As torchrun does, it keeps a store for them, tells each by its environment who it is, and once one has failed ends
    the others by SIGTERM.
    """
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    told = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port,
            "TORCHELASTIC_USE_AGENT_STORE": True}  # fmt: skip
    running: dict[int, int] = {}
    with tempfile.TemporaryDirectory() as output:
        for rank in range(count):
            own = {name: str(value) for name, value in {**told, "RANK": rank, "LOCAL_RANK": rank}.items()}
            running[_started(folder, Path(output) / str(rank), own, [str(a) for a in arguments])] = rank
        codes = _ended(running)
        texts = {(rank, kind): (Path(output) / f"{rank}.{kind}").read_text() for rank in codes for kind in KINDS}
    return [Result(codes[rank], texts[rank, "out"], texts[rank, "err"]) for rank in range(count)]


KINDS = ("out", "err")


def _started(folder: Path, output: Path, told: Mapping[str, str], arguments: Sequence[str]) -> int:
    child = os.fork()
    if child:
        return child
    code: object = 70
    try:
        for number, kind in enumerate(KINDS, 1):
            file = os.open(f"{output}.{kind}", os.O_WRONLY | os.O_CREAT)
            os.dup2(file, number)
        os.environ.update(told)
        os.chdir(folder)
        with pytest.MonkeyPatch.context() as patch:
            for number, name in enumerate(("stdout", "stderr"), 1):
                patch.setattr("sys." + name, os.fdopen(os.dup(number), "w"))
            app(list(arguments))
    except SystemExit as ending:
        code = ending.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code if isinstance(code, int) else 1)


def _ended(running: dict[int, int]) -> dict[int, int]:
    """The exit codes by rank."""
    codes: dict[int, int] = {}
    while running:
        child, status = os.wait()
        if child in running:
            codes[running.pop(child)] = code = os.waitstatus_to_exitcode(status)
            for other in running if code else ():
                os.kill(other, signal.SIGTERM)
    return codes
