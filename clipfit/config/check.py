"""What `check` is given."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from clipfit.config import shared
from clipfit.config.options import Checked, argument, option


@dataclass(frozen=True)
class CheckConfig(Checked):
    """Everything `check` is given: the same places and models as `adapt`."""

    shots: Path = argument("Folder of class folders (or {train,test}/<class>), manifest, or CoOp split.")
    model: str = shared.model()
    _: KW_ONLY
    pretrained: str | None = shared.pretrained()
    classes: Path | None = shared.class_names()
    templates: Path | None = shared.templates("the model's own template")
    image_root: Path | None = shared.image_root()
    batch_size: int = option(64, "Images a forward pass.", low=1)
    device: str = shared.device()
