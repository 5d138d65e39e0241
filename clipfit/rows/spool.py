"""The rows of an unfinished output, beside it: what a killed process leaves, and another one goes on from.

    .rows.csv.resume/
      job.json        what the rows are of: only the same job goes on with them
      rows.jsonl      a line a row, appended batch by batch
      vectors.f32     the rows' embeddings, float32, where they were asked for

A process that is killed leaves a whole beginning and perhaps a torn end; what is not a whole batch is cut off again.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipfit.errors import ModelError
from clipfit.runs import files

JOB, ROWS, VECTORS = "job.json", "rows.jsonl", "vectors.f32"


class Spool:
    """Appends rows, and vectors of `width` numbers where that is not None."""

    def __init__(self, folder: Path, width: int | None):
        self.folder, self._width = folder, width
        self.rows_file, self.vectors_file = folder / ROWS, folder / VECTORS

    @property
    def job(self) -> Mapping[str, Any] | None:
        """What the rows that lie there are of; None where there is no unfinished job."""
        return dict(files.read_json(self.folder / JOB)) if (self.folder / JOB).is_file() else None

    @property
    def has_rows(self) -> bool:
        """False where there is nothing, or where all rows have gone to their file already."""
        return self.rows_file.is_file()

    def start(self, job: Mapping[str, Any]) -> None:
        """Begin anew. Raises OutputError where nothing can be made there."""
        with files.writing(self.folder):
            (self.folder / JOB).unlink(missing_ok=True)  # first: without it the rest is nobody's
            shutil.rmtree(self.folder, ignore_errors=True)
            files.make_folder(self.folder)
            self.rows_file.touch()
            self.vectors_file.touch()
        files.write_json(self.folder / JOB, job)

    def go_on(self, batch: int) -> int:
        """Keep the whole batches of what is there, and the number of their rows. Raises OutputError, ModelError."""
        with files.writing(self.folder):
            count = sum(1 for _ in self._whole_lines())
            if self._width is not None:
                count = min(count, self.vectors_file.stat().st_size // (4 * self._width))
                os.truncate(self.vectors_file, count // batch * batch * 4 * self._width)
            count -= count % batch
            os.truncate(self.rows_file, sum(map(len, itertools.islice(self._whole_lines(), count))))
        return count

    def rows(self) -> Iterator[dict[str, Any]]:
        """What is kept, row by row. Raises ModelError for a line that is none of ours."""
        for number, line in enumerate(self._whole_lines(), 1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ModelError(
                    f"line {number} of {self.rows_file} is damaged: remove {self.folder} and start anew."
                ) from error

    def append(self, lines: Sequence[str], vectors: np.ndarray[Any, Any] | None) -> None:
        """A batch: lines without their ends, and a vector a line (n, width). Raises OutputError."""
        with files.writing(self.folder):
            if vectors is not None:
                _append(self.vectors_file, vectors.astype("<f4").tobytes())
            _append(self.rows_file, "".join(f"{line}\n" for line in lines).encode("ascii"))

    def remove(self) -> None:
        """It is no longer needed."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _whole_lines(self) -> Iterator[bytes]:
        with self.rows_file.open("rb") as file:
            yield from itertools.takewhile(lambda line: line.endswith(b"\n"), file)


def _append(file: Path, data: bytes) -> None:
    with file.open("ab") as opened:
        opened.write(data)
