"""`clipfit models`: what there is, what works on it, and what is on this machine; the table it reads is true."""

from __future__ import annotations

import json

import open_clip
import pytest
from hubs import cache, keep, list_little

from clipfit import UsageError, models
from clipfit.config.models import ModelsConfig
from clipfit.model import catalogue, compat
from clipfit.model.facts import facts_of
from clipfit.report.models import text

__all__ = ["cache"]  # a fixture
WEIGHTS = "open_clip_model.safetensors"
OF_THE_TABLE = pytest.mark.skipif(open_clip.__version__ != "3.3.0", reason="the table is of open_clip 3.3.0")
A_FAMILY_EACH = ("ViT-B-32", "RN50", "ViT-B-16-SigLIP2", "PE-Core-T-16-384", "MobileCLIP2-S0", "ViT-S-32-alt")


def entry(document: dict, name: str) -> dict:
    [found] = [model for model in document["models"] if model["name"] == name]
    return found


def test_every_model_with_weights_is_listed_and_one_is_the_default(cli, cache):
    document = cli("models", "--json").document
    listed = [model["name"] for model in document["models"]]
    assert set(listed) == {"clipfit-tiny"} | {
        name for name, _ in open_clip.list_pretrained() if not name.endswith("-quickgelu")
    }
    assert [model["name"] for model in document["models"] if model["default"]] == ["ViT-B-16"]
    assert document["cache"] == str(cache)
    vit = entry(document, "ViT-B-16")
    assert [tag["tag"] for tag in vit["tags"]] == open_clip.list_pretrained_tags_by_model("ViT-B-16")
    assert [tag["tag"] for tag in vit["tags"] if tag["default"]] == ["openai"]
    assert vit["image_size"] == [224, 224]
    assert vit["parameters"] == 149_620_737  # as published
    assert vit["methods"] == ["cite", "atha", "cite+atha", "finetune", "flyp"]
    assert vit["tunings"] == ["full", "lora"]
    assert vit["missing"] == {"atha": None, "lora": None}


def test_what_works_on_a_model_is_what_adapt_takes(cli, cache, flat):
    document = cli("models", "RN50", "--json").document
    resnet = entry(document, "RN50")
    assert resnet["methods"] == ["cite", "finetune", "flyp"]
    assert resnet["tunings"] == ["full"]
    assert "ResNet" in resnet["missing"]["atha"]
    cli("adapt", flat, "--model", "RN50", "--method", "atha").fails(4, "ResNet")
    cli("adapt", flat, "--model", "RN50", "--tuning", "lora").fails(4, "ResNet")
    coca = entry(cli("models", "coca_ViT-B-32", "--json").document, "coca_ViT-B-32")
    assert (coca["methods"], coca["tunings"], coca["parameters"]) == ([], [], None)
    assert "CoCa" in coca["refused"]


def test_what_is_on_this_machine_is_marked(cli, cache):
    keep(cache, "timm/vit_base_patch16_clip_224.openai", {WEIGHTS: b""})
    keep(cache, "laion/CLIP-ViT-B-16-laion2B-s34B-b88K", {"README.md": b""})
    tags = entry(cli("models", "ViT-B-16", "--json").document, "ViT-B-16")["tags"]
    assert [tag["tag"] for tag in tags if tag["cached"]] == ["openai"]
    shown = cli("models", "vit b 16").stdout
    assert "openai+*" in shown


@pytest.mark.parametrize(
    ("word", "expected"),
    [("siglip2", "ViT-B-16-SigLIP2"), ("PE core", "PE-Core-B-16"), ("dfndr2b", "MobileCLIP2-B"),
     ("ViT-S-16", "ViT-S-16"), ("quickgelu", "ViT-B-32-quickgelu"), ("TINY", "clipfit-tiny"),
     ("convnext_tiny", "convnext_tiny")],
)  # fmt: skip
def test_a_word_finds_names_and_tags(cache, word, expected):
    assert expected in [model.architecture.name for model in models(ModelsConfig(word)).models]


def test_a_word_that_nothing_has_gets_the_nearest_name(cli):
    with pytest.raises(UsageError, match=r"'ViT-B-61' is part of no model's name and no tag \(did you mean ViT-B-"):
        models(ModelsConfig("ViT-B-61"))
    cli("models", "nothing\x1bhere").fails(2, "is part of no model's name")


@pytest.mark.parametrize("word", [None, "ViT-B-32", "SigLIP", "ViT-H-14-worldwide-quickgelu", "coca", ""])
def test_the_table_has_80_columns_and_every_name_whole(monkeypatch, cache, word):
    monkeypatch.setenv("COLUMNS", "80")
    found = models(ModelsConfig(word))
    lines = text(found).splitlines()
    assert max(map(len, lines)) <= 80
    for model in found.models:
        assert any(line.split()[:1] == [model.architecture.name] for line in lines)
    words = {word.rstrip("+*,") for line in lines for word in line.split()}
    for architecture in (model.architecture for model in found.models if model.architecture.facts):
        shown = architecture.tags if found.whole else architecture.tags[:1]
        assert {tag.name for tag in shown} <= words or word == ""


def test_what_a_model_lacks_is_said(monkeypatch, cache):
    monkeypatch.setenv("COLUMNS", "300")
    shown = text(models(ModelsConfig("RN50x4")))
    assert "RN50x4 and 1 more without --method atha: the image tower is a ModifiedResNet" in shown
    assert "RN50x4 and 1 more without --tuning lora: " in shown
    assert "coca_ViT-B-32 is a CoCa" in text(models(ModelsConfig("coca_ViT-B-32")))
    assert "?" not in shown
    assert "\n? the text tower" in text(models(ModelsConfig("nllb-clip-base")))


def test_an_architecture_that_the_table_does_not_know_is_laid_out(tmp_path, cache):
    cfg = list_little(tmp_path, "Little-Listed")
    [found] = models(ModelsConfig("Little-Listed")).models
    assert found.architecture.facts.parameters == sum(p.numel() for p in open_clip.CLIP(**cfg).parameters())
    assert found.architecture.facts.image_size == (32, 32)
    assert found.architecture.tags == ()


# ---- the table


def known() -> dict[str, dict]:
    return json.loads(catalogue.KNOWN.read_text("utf-8"))


def require_true(name: str) -> None:
    cfg = open_clip.get_model_config(name)
    assert catalogue.digest(cfg) == known()[name]["config"], "python docs/architectures.py"
    assert catalogue.facts(name, cfg) == facts_of(cfg)


@OF_THE_TABLE
def test_the_table_has_every_architecture_of_two_towers():
    two = {name for name in open_clip.list_models() if not compat.lacks_towers(open_clip.get_model_config(name))}
    assert {name for name in two if not name.startswith("Little")} == set(known())


@OF_THE_TABLE
@pytest.mark.parametrize("name", A_FAMILY_EACH)
def test_the_table_is_true_for_a_family_each(name):
    require_true(name)


@pytest.mark.slow
@OF_THE_TABLE
@pytest.mark.parametrize("name", sorted(known()) if catalogue.KNOWN.is_file() else [])
def test_the_table_is_true(name):
    require_true(name)


def test_parameters_are_those_of_the_built_model():
    model = compat.build(open_clip.get_model_config("ViT-S-32-alt"))
    assert known()["ViT-S-32-alt"]["parameters"] == sum(p.numel() for p in model.parameters())
