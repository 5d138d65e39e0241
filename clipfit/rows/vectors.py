"""Embeddings of a spool as one array on disk, .npy or .safetensors: never whole in memory, whatever their number."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np

from clipfit.rows.spool import Spool
from clipfit.runs import files

NAME = "embeddings"


def publish(spool: Spool, width: int, target: Path) -> None:
    """Write (rows, width) float32, in the order of the rows; those of rows with an error are NaN. Raises OutputError.

    The spool keeps its own copy: what is cut short here is done again.
    """

    def write(part: Path) -> None:
        with part.open("wb") as file, spool.vectors_file.open("rb") as vectors:
            rows = spool.vectors_file.stat().st_size // (4 * width)
            file.write(_HEADERS[target.suffix.lower()](rows, width))
            shutil.copyfileobj(vectors, file, 2**20)

    files.atomically(target, write)


def _npy_header(rows: int, width: int) -> bytes:
    header = io.BytesIO()
    about = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
    np.lib.format.write_array_header_1_0(header, about)
    return header.getvalue()


def _safetensors_header(rows: int, width: int) -> bytes:
    """Its length in eight bytes, then JSON, padded so that the numbers start at a multiple of eight."""
    about = {NAME: {"dtype": "F32", "shape": [rows, width], "data_offsets": [0, 4 * rows * width]}}
    text = json.dumps(about).encode("ascii")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


_HEADERS = {".npy": _npy_header, ".safetensors": _safetensors_header}
