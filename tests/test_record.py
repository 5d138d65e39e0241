"""One typed class writes config.json and reads it; what it does not know or cannot take is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clipfit.config import Recipe
from clipfit.config.edits import EditSettings
from clipfit.config.lora import LoraSettings
from clipfit.errors import ModelError
from clipfit.model.sources import Source
from clipfit.runs.record import Parent, RunRecord, Versions, describe

RECORD = RunRecord(
    clipfit="0.2", versions=Versions("3.12", "2.6", "0.21", "3.2"), shots="pets", method="atha",
    method_options={"head_ratio": 0.2}, recipe=Recipe(crop_scale=(0.2, 0.9)), alpha=0.3, seed=7, device="cpu",
    precision="fp32", threads=1, pretrained=Source("ViT-B-16", "openai", "ab", {"embed_dim": 8}, {"size": [1, 2]}),
    skipped=("a.png",), tuning="lora", lora=LoraSettings(rank=4), edits=EditSettings(head_block=1), context="a photo",
    grey_bits=12, balance=True, parent=Parent("cd", 0.5),
)  # fmt: skip
FILE = Path("run/config.json")


def written(record: RunRecord) -> Any:
    return json.loads(json.dumps(record.to_json()))


def test_what_is_written_is_read_as_the_same():
    document = written(RECORD)
    assert RunRecord.from_json(document, FILE) == RECORD
    assert document["recipe"]["crop_scale"] == [0.2, 0.9]
    assert document["parent"] == {"sha256": "cd", "alpha": 0.5}
    assert document["format"] == 2


def test_how_a_gradient_was_computed_is_written_where_it_was_asked_for():
    assert not {"micro_batch", "gradient_checkpointing"} & written(RECORD)["recipe"].keys()
    asked = replace(RECORD, recipe=Recipe(micro_batch=8, gradient_checkpointing=True))
    assert {key: written(asked)["recipe"][key] for key in ("micro_batch", "gradient_checkpointing")} == {
        "micro_batch": 8, "gradient_checkpointing": True,
    }  # fmt: skip
    assert RunRecord.from_json(written(asked), FILE) == asked


def test_a_record_of_before_has_the_defaults_and_one_of_later_is_read_as_far_as_it_is_known():
    later = ("grey_bits", "balance", "parent", "edits", "context", "tuning", "lora")
    document = {key: value for key, value in written(RECORD).items() if key not in later}
    found = RunRecord.from_json({**document, "format": 1, "colour": "blue"}, FILE)
    assert found == replace(
        RECORD, grey_bits=None, balance=False, parent=None, edits=None, context=None, tuning="full", lora=None, format=1
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"alpha": "0.3"},
            r"run/config\.json is not as clipfit wrote it: Expected `float`, got `str` - at `",
        ),
        ({"recipe": {"epochs": 0}}, "epochs must be at least 1"),
        ({"pretrained": {"model": "x"}}, "missing required field"),
        ({"format": 3}, "has run format 3; this clipfit reads 1 and 2"),
        ({"format": None}, "has run format None"),
    ],
)
def test_what_cannot_be_taken_is_said(change, words):
    with pytest.raises(ModelError, match=words):
        RunRecord.from_json({**written(RECORD), **change}, FILE)
    with pytest.raises(ModelError, match="has run format None"):
        RunRecord.from_json([], FILE)


def test_a_weight_file_says_what_it_is():
    about = describe(RECORD, ["cat", "dog"], 100.0, 1.0)
    assert about["alpha"] == 1.0
    assert about["classes"] == ["cat", "dog"]
    assert about["template"] == "a photo of a {}"
    assert Source(**about["pretrained"]) == RECORD.pretrained
    assert EditSettings(**about["edits"]) == RECORD.edits
    assert json.loads(json.dumps(about)) == about
