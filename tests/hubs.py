"""A Hugging Face cache as its library lays it out, all of the hub that is had offline; and a little architecture."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import pytest
from conftest import TEXT, VISION
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def keep(cache: Path, repository: str, files: Mapping[str, bytes]) -> Path:
    """Put files of "owner/name" into the cache: bytes under their hash, a link a name; gives the snapshot's folder."""
    root = cache / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    for folder in (root / "blobs", root / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text(COMMIT)
    for name, content in files.items():
        blob = root / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def list_little(folder: Path, name: str) -> dict[str, Any]:
    """An architecture of few layers among open_clip's, "Little-…", of whose weights it says nothing: it stays there."""
    cfg = {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT}
    (folder / f"{name}.json").write_text(json.dumps(cfg))
    open_clip.add_model_config(folder)
    return cfg


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, which is the one that is used."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder
