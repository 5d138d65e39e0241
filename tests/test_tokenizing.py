"""Tokenizers of the transformers library: from the model's folder, else from the hub's cache, else a sentence."""

from __future__ import annotations

import importlib.util
import json
import runpy
import shutil
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from conftest import make_model
from hubs import cache, keep

from clipfit import ModelError
from clipfit.formats import consumer
from clipfit.model import compat, loading

__all__ = ["cache"]  # a fixture
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("transformers")
WORDS = ["<pad>", "</s>", "<unk>", "a", "photo", "of", "cat", "dog"]
NAME = "somebody/words"


def tokenizer_files(*words: str) -> dict[str, bytes]:
    """A tokenizer of whole words in lower case, as the transformers library reads it; texts end with 1."""
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: n for n, word in enumerate([*WORDS, *words])}, unk_token="<unk>")
    )
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", 1)]
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>"}
    return {"tokenizer.json": made.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder whose texts are read by `somebody/words`, which it has not got."""
    options = {"hf_tokenizer_name": NAME, "tokenizer_kwargs": {"clean": "canonicalize"}}
    return make_model(tmp_path / "model", **options)


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


def read(model: Path) -> list[int]:
    tokens = loading.load(str(model)).tokenize(["A photo of a CAT!"])
    assert tokens.shape == (1, 16)
    return [int(token) for token in tokens[0, :7]]


def test_the_folder_of_the_model_has_its_tokenizer(cache, model):
    write(model, tokenizer_files())
    assert read(model) == [3, 4, 5, 3, 6, 1, 0]
    theirs = open_clip.get_tokenizer(f"local-dir:{model}")(["A photo of a CAT!"])
    assert torch.equal(loading.load(str(model)).tokenize(["A photo of a CAT!"]), theirs)


def test_else_it_is_found_by_its_name_in_the_cache(cache, model):
    keep(cache, NAME, tokenizer_files())
    assert read(model) == [3, 4, 5, 3, 6, 1, 0]
    write(model, tokenizer_files("more"))
    assert read(model) == [3, 4, 5, 3, 6, 1, 0]


def test_a_model_of_the_hub_has_the_tokenizer_that_it_names(cache, model):
    files = {name: (model / name).read_bytes() for name in ("open_clip_config.json", "open_clip_model.safetensors")}
    keep(cache, "somebody/little", files)
    keep(cache, NAME, tokenizer_files())
    assert loading.load("hf-hub:somebody/little").tokenize(["dog"])[0, :2].tolist() == [7, 1]


def test_an_export_takes_its_tokenizer_with_it(cli, flat, cache, model):
    keep(cache, NAME, tokenizer_files("tabby", "fish", "owl"))
    assert cli("adapt", flat, "--model", model, "--shots", 2, "--epochs", 1, "--output", "run").code == 0
    done = cli("export", "run", "--output", "exported")
    assert done.code == 0, done.stderr
    shutil.rmtree(cache)
    theirs = open_clip.get_tokenizer("local-dir:exported")(["a photo of an owl"])
    assert torch.equal(loading.load("exported").tokenize(["a photo of an owl"]), theirs)
    assert theirs[0, :6].tolist() == [3, 4, 5, 2, 10, 1]


@pytest.mark.parametrize(
    ("format", "given"), [("safetensors", "exported/model.safetensors"), ("difference", "exported")]
)
def test_a_small_export_takes_it_too(cli, flat, cache, model, monkeypatch, format, given):
    keep(cache, NAME, tokenizer_files("tabby", "fish", "owl"))
    assert cli("adapt", flat, "--model", model, "--shots", 2, "--epochs", 1, "--output", "run").code == 0
    done = cli("export", "run", "--format", format, "--output", "exported")
    assert done.code == 0, done.stderr
    shutil.rmtree(cache)
    monkeypatch.setattr(sys, "argv", ["", given, "made"])
    runpy.run_path(str(consumer.SCRIPTS / f"_consume_{format}.py"), run_name="__main__")
    tokens = open_clip.get_tokenizer("local-dir:made")(["a photo of an owl"])
    assert tokens[0, :6].tolist() == [3, 4, 5, 2, 10, 1]


def test_a_tokenizer_that_cannot_be_had_is_named_before_weights_are_read(cache, model):
    (model / "open_clip_model.safetensors").write_bytes(b"never read")
    with pytest.raises(ModelError) as caught:
        loading.load(str(model))
    for words in (f"{model} has no tokenizer.json", f"tokenizer.json of {NAME} is neither in the Hugging Face cache",
                  str(cache), f"from_pretrained({NAME!r}).save_pretrained('{model}')"):  # fmt: skip
        assert words in str(caught.value)


def test_a_tokenizer_that_is_damaged(cache, model):
    write(model, {**tokenizer_files(), "tokenizer.json": b"{"})
    with pytest.raises(ModelError, match=r"the tokenizer in .*model cannot be read .*: restore tokenizer.json there"):
        loading.load(str(model))


def test_without_the_transformers_library_the_extra_is_named(cache, model, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else real(name))
    with pytest.raises(ModelError, match=r"transformers library, which is not installed: pip install 'clipfit\[transf"):
        loading.load(str(model))


@pytest.mark.parametrize("more", [{}, {"clean": "whitespace"}])
def test_open_clips_own_vocabulary_is_read_once_and_stays_as_it_was(more):
    texts = ["A  Photo of the Ant-Lion &amp; co., 32", ""]
    both = [{"context_length": length, **more} for length in (16, 77)]
    for options, own in zip(both, [compat.plain_tokenizer(options) for options in both], strict=True):
        length = options["context_length"]
        assert torch.equal(own(texts), open_clip.SimpleTokenizer(**options)(texts))
        assert own(texts).shape == (2, length)
        assert own(texts, context_length=2 * length).shape == (2, 2 * length)
        assert (own.encoder is compat.plain_tokenizer({"context_length": 8}).encoder) == (not more)
