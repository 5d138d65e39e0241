"""The proof of an export that open_clip cannot load as it is: a script makes a folder of it that open_clip can."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from clipfit.errors import OutputError
from clipfit.formats import consumer
from clipfit.formats.consumer import Answer, Request

OPEN_CLIP = "_consume_open_clip.py"


def consume(script: str, arguments: Sequence[str], request: Request) -> Answer:
    """What open_clip makes of the folder that a consumer (a script beside this file) makes, in processes of their own.

    Args:
        arguments: of the script, before the folder.

    Raises:
        ClipfitError: one of them fails. OutputError: there is no room for the folder.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="clipfit-") as place:
            folder = Path(place) / "model"
            consumer.start(consumer.SCRIPTS / script, [*arguments, str(folder)], Path(place))
            return consumer.consume(OPEN_CLIP, folder, request)
    except OSError as error:
        raise OutputError(
            f"the export cannot be tried out in {tempfile.gettempdir()}: {error.strerror or error}."
        ) from error
