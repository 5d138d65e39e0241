"""The embedded model: small, loadable by open_clip alone, and real enough to gain something and to lose something."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import open_clip
import pytest
import torch

from clipfit import AdaptConfig, EvaluateConfig, adapt, evaluate
from clipfit.model.loading import load
from clipfit.model.sources import TINY_FOLDER
from clipfit.prompts import prompts

EXAMPLE = Path(__file__).parents[1] / "examples/shots"


def test_it_fits_into_25_million_bytes() -> None:
    assert sum(p.stat().st_size for p in TINY_FOLDER.glob("*.safetensors")) <= 25_000_000


def test_open_clip_loads_it_alone_and_gives_the_same_logits() -> None:
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{TINY_FOLDER}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{TINY_FOLDER}")
    texts = prompts(["guitar", "umbrella"], "a photo of a {}")
    backbone = load("clipfit-tiny")
    noise = torch.randint(256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = backbone.normalize(noise)
    assert list(preprocess.transforms[-1].mean) == list(backbone.source.preprocess_cfg["mean"])
    with torch.no_grad():
        u, t, scale = model.eval()(images, tokenizer(texts))[:3]
        ours = backbone.scale * backbone.encode_image(images) @ backbone.encode_text(backbone.tokenize(texts)).T
    torch.testing.assert_close(ours, scale * u @ t.T, atol=1e-4, rtol=1e-4)


def test_every_set_it_was_trained_on_is_acknowledged() -> None:
    notice = (TINY_FOLDER / "NOTICE").read_text("utf-8")
    entries = [line for line in notice.splitlines() if line.startswith("    ")]
    assert len(entries) > 100
    assert all(any(f"({spdx})" in line for spdx in ("MIT", "Apache-2.0", "ISC", "CC0-1.0", "CC-BY-4.0", "CC-BY-3.0"))
               for line in entries)  # fmt: skip


@dataclass(frozen=True)
class Adapted:
    """What adapting the example did: accuracy on the shots before and after, and (base, new) by α on test images."""

    shots: tuple[float, float]
    figures: dict[float, tuple[float, float]]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapted]:
    """With the model's own recipe, and at a rate far too high."""
    out = {}
    for name, method, recipe in (("own", "cite", {}), ("violent", "finetune", {"learning_rate": 1e-2})):
        run = tmp_path_factory.mktemp("tiny") / name
        result = adapt(AdaptConfig(EXAMPLE, method, "clipfit-tiny", recipe=recipe, output=run))
        rows = evaluate(EvaluateConfig(run, alphas=(0.0, 0.5, 1.0))).rows
        figures = {row.alpha: (row.base.value, row.new.value) for row in rows if row.base and row.new}
        out[name] = Adapted((result.on_shots.zero_shot_accuracy, result.on_shots.adapted_accuracy), figures)
    return out


def test_zero_shot_knows_the_example_far_beyond_chance(adapted: dict[str, Adapted]) -> None:
    base, new = adapted["own"].figures[0.0]
    assert base > 0.5  # chance: 1 / 12
    assert new > 0.5


def test_the_shots_are_learnt_and_the_ensemble_keeps_new_classes(adapted: dict[str, Adapted]) -> None:
    before, after = adapted["own"].shots
    assert after > before + 0.05
    assert adapted["own"].figures[0.5][1] > adapted["own"].figures[0.0][1] - 0.05


def test_what_it_knows_can_be_lost(adapted: dict[str, Adapted]) -> None:
    figures = adapted["violent"].figures
    assert figures[1.0][1] < figures[0.0][1] - 0.2
