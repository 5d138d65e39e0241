"""Text towers of the transformers library: laid out by a configuration in the hub's cache, or a sentence about it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from conftest import VISION
from hubs import cache, keep
from safetensors.torch import save_file
from test_tokenizing import tokenizer_files

from clipfit import ModelError
from clipfit.model import compat, loading

__all__ = ["cache"]  # a fixture
pytest.importorskip("transformers")
TOWER = "somebody/roberta"
LAYERS = {
    "model_type": "roberta", "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
CFG = {
    "embed_dim": 32,
    "vision_cfg": VISION,
    "text_cfg": {"hf_model_name": TOWER, "hf_tokenizer_name": "somebody/words", "hf_proj_type": "mlp",
                 "hf_pooler_type": "mean_pooler", "context_length": 16},
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path, cache: Path) -> Path:
    """A model folder with random weights and its tokenizer; the configuration of its text tower is in the cache."""
    keep(cache, TOWER, {"config.json": json.dumps(LAYERS).encode()})
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in tokenizer_files("tabby", "fish", "owl").items():
        (folder / name).write_bytes(content)
    torch.manual_seed(0)
    state = compat.build(CFG).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CFG}))
    return folder


def test_such_a_model_adapts_and_evaluates_without_a_network(cli, flat, model):
    assert cli("adapt", flat, "--model", model, "--shots", 2, "--epochs", 1, "--output", "run").code == 0
    assert cli("evaluate", "run", "--alphas", "0,1").code == 0


def test_the_configuration_that_is_missing_is_named(cache, model):
    for file in cache.rglob("config.json"):
        file.unlink()
    with pytest.raises(ModelError) as caught:
        loading.load(str(model))
    for words in (f"built from config.json of {TOWER}", f"Hugging Face cache ({cache})"):
        assert words in str(caught.value)


def test_without_the_transformers_library_the_extra_is_named(model, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else real(name))
    monkeypatch.setattr(compat, "build", lambda cfg: (_ for _ in ()).throw(RuntimeError("Please pip install")))
    with pytest.raises(ModelError, match=r"the text tower of .*which is not installed: pip install 'clipfit\[transfor"):
        loading.load(str(model))
