"""Several processes that work together over gloo, forked, so that torch need not be imported again."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import distributed

from clipfit import ranks
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
