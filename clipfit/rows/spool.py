"""The rows of an unfinished output, beside it: what a killed process leaves, and another one goes on from.

    .rows.csv.resume/
      job.json        what the rows are of: only the same job goes on with them
      rows.jsonl      a line a row, appended batch by batch
      vectors.f32     the rows' embeddings, float32, where they were asked for
      batches.sha256  a line a batch: the SHA-256 of its rows and embeddings, hexadecimal

A process that is killed leaves a whole beginning and perhaps a torn end. What is not a whole batch, and what follows a
batch that is not as it was written, is cut off again, to be done anew.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipfit.runs import files

JOB, ROWS, VECTORS, DIGESTS = "job.json", "rows.jsonl", "vectors.f32", "batches.sha256"
DIGEST_LINE = 65  # bytes


class Spool:
    """Appends rows, and vectors of `width` numbers where that is not None."""

    def __init__(self, folder: Path, width: int | None):
        self.folder, self._width = folder, width
        self.rows_file, self.vectors_file, self.digests_file = folder / ROWS, folder / VECTORS, folder / DIGESTS

    @property
    def job(self) -> Mapping[str, Any] | None:
        """What the rows that lie there are of; None where there is no unfinished job."""
        return dict(files.read_json(self.folder / JOB)) if (self.folder / JOB).is_file() else None

    @property
    def has_rows(self) -> bool:
        """False where there is nothing, or where all rows have gone to their file already."""
        return self.rows_file.is_file()

    def claim(self) -> None:
        """Say that rows are to come here, from now on: has_rows. Raises OutputError where nothing can be made there."""
        with files.writing(self.folder):
            files.make_folder(self.folder)
            self.rows_file.touch()

    def start(self, job: Mapping[str, Any]) -> None:
        """Begin anew. Raises OutputError where nothing can be made there."""
        with files.writing(self.folder):
            (self.folder / JOB).unlink(missing_ok=True)  # first: without it the rest is nobody's
            files.make_folder(self.folder)
            for file in (self.rows_file, self.vectors_file, self.digests_file):
                file.write_bytes(b"")
        files.write_json(self.folder / JOB, job)

    def go_on(self, batch: int) -> int:
        """Keep the whole batches that are as they were written, and count their rows. Raises OutputError."""
        with files.writing(self.folder):
            self.digests_file.touch()
            kept = sizes = 0
            with self.rows_file.open("rb") as rows, self.vectors_file.open("rb") as vectors:
                for digest in self._digests():
                    lines = b"".join(itertools.islice(rows, batch))
                    numbers = vectors.read(batch * self._vector_bytes)
                    if lines.count(b"\n") != batch or _digest(lines, numbers) != digest:
                        break
                    kept, sizes = kept + 1, sizes + len(lines)
            os.truncate(self.rows_file, sizes)
            os.truncate(self.vectors_file, kept * batch * self._vector_bytes)
            os.truncate(self.digests_file, kept * DIGEST_LINE)
        return kept * batch

    def rows(self) -> Iterator[dict[str, Any]]:
        """What is kept, row by row."""
        with self.rows_file.open("rb") as file:
            yield from map(json.loads, file)

    def append(self, lines: Sequence[str], vectors: np.ndarray[Any, Any] | None) -> None:
        """A batch: lines without their ends, and a vector a line (n, width). Raises OutputError."""
        with files.writing(self.folder):
            rows = "".join(f"{line}\n" for line in lines).encode("ascii")
            numbers = b"" if vectors is None else vectors.astype("<f4").tobytes()
            _append(self.vectors_file, numbers)
            _append(self.rows_file, rows)
            _append(self.digests_file, _digest(rows, numbers))

    def remove(self) -> None:
        """It is no longer needed."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _vector_bytes(self) -> int:
        """Of a row."""
        return 4 * (self._width or 0)

    def _digests(self) -> Iterator[bytes]:
        with self.digests_file.open("rb") as file:
            while line := file.read(DIGEST_LINE):
                yield line


def _digest(rows: bytes, vectors: bytes) -> bytes:
    """Of a batch, as a line."""
    return hashlib.sha256(rows + vectors).hexdigest().encode() + b"\n"


def _append(file: Path, data: bytes) -> None:
    with file.open("ab") as opened:
        opened.write(data)
