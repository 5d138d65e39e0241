"""Every architecture that open_clip lists: what docs/models.md says of it is what it does."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
from conftest import make_classes
from families import plain, save_model, shrunk_cfg, two_tower_models

from clipfit import AdaptConfig, EvaluateConfig, ExportConfig, adapt, evaluate, export
from clipfit.errors import ModelError
from clipfit.model import facts

# one of each family, in CI's time
A_FEW = ("ViT-B-16-SigLIP2", "nllb-clip-base", "roberta-ViT-B-32", "mt5-base-ViT-B-32")


ONE_STEP = {"epochs": 1, "batch_size": 2, "learning_rate": 1e-3}


def shots(root: Path) -> Path:
    make_classes(root / "train", {"bee": 1, "cow": 1})
    make_classes(root / "test", {"bee": 1, "elk": 1}, seed=1)
    return root


def does(name: str, root: Path) -> None:
    """One step of CITE, measured, exported and read back by open_clip; edits and adapters as its facts say."""
    folder = root / "model"
    cfg = shrunk_cfg(name, folder)
    model = save_model(folder, cfg, {"interpolation": "bicubic", "resize_mode": "squash"})
    found, data = facts.facts_of(cfg), shots(root / "animals")
    made = adapt(AdaptConfig(data, model=model, method="cite", output=root / "cite", recipe=ONE_STEP))
    assert made.steps == 1
    (row,) = evaluate(EvaluateConfig(made.run, alphas=(0.5,))).rows[1:]
    assert row.alpha == 0.5
    exported = export(ExportConfig(made.run, format="open_clip", output=root / "export"))
    assert exported.proof.identical_pixels.largest_difference < 1e-3
    assert (plain(f"local-dir:{exported.output}")[0].logit_bias is not None) == found.logit_bias
    for option, reason in (({"method": "atha"}, found.atha), ({"method": "flyp", "tuning": "lora"}, found.lora)):
        config = AdaptConfig(data, model=model, output=root / "further", overwrite=True, recipe=ONE_STEP, **option)
        if reason is None:
            assert adapt(config).steps == 1
        else:
            with pytest.raises(ModelError):
                adapt(config)


@pytest.mark.parametrize("name", A_FEW)
def test_a_family(name, tmp_path):
    does(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in two_tower_models() if name not in A_FEW])
def test_every_architecture(name, tmp_path):
    does(name, tmp_path)


def test_captioners_are_the_only_ones_left_out():
    left_out = set(open_clip.list_models()) - set(two_tower_models())
    assert {name for name in left_out if "vision_cfg" in open_clip.get_model_config(name)} == {
        name for name in open_clip.list_models() if name.startswith("coca_") or "genlip" in name
    }
