"""Learnt context vectors: where they stand, and that a run carries them wherever its texts are read."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model
from PIL import Image
from safetensors.torch import load_file

from clipfit import AdaptConfig, EvaluateConfig, adapt, evaluate
from clipfit.adaptation import Adaptation
from clipfit.errors import ModelError
from clipfit.methods import METHODS
from clipfit.model import loading
from clipfit.model.named import Additions
from clipfit.prompts import prompts
from clipfit.runs.run import open_run
from clipfit.training import loop

WORDS = "a photo of a "
NAMES = ["bee", "red fox", "elk"]


@pytest.mark.parametrize("name", ["vit", "resnet", "eos", "bidirectional"])
@torch.no_grad()
def test_vectors_start_as_the_words_and_stand_in_their_place(models, name):
    backbone = loading.load(models[name])
    tokens = backbone.tokenize(prompts(NAMES, "a photo of a {}"))
    before = backbone.encode_text(tokens)
    backbone = backbone.with_additions(Additions(context=WORDS))
    assert backbone.context.shape == (4, 32)
    assert torch.equal(backbone.encode_text(tokens), before)

    backbone.context.copy_(torch.randn(4, 32, generator=torch.Generator().manual_seed(0)))
    m = copy.deepcopy(backbone.model)
    h = m.token_embedding(tokens)
    h[:, 1:5] = backbone.context
    h = m.transformer(h + m.positional_embedding, attn_mask=m.attn_mask)
    expected = F.normalize(m.ln_final(h)[torch.arange(3), tokens.argmax(1)] @ m.text_projection, dim=1)
    torch.testing.assert_close(backbone.encode_text(tokens), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(expected, before, atol=0.1)


def test_a_text_tower_that_pools_elsewhere_is_refused(tmp_path):
    """Where its texts end cannot be told, so neither can the number of words."""
    folder = make_model(tmp_path / "last", pool_type="last", no_causal_mask=True)
    with pytest.raises(ModelError, match="pools by 'last': leave --context out"):
        loading.load(f"local-dir:{folder}").with_additions(Additions(context=WORDS))


@pytest.fixture(params=[("finetune", "full"), ("atha", "lora")], ids="-".join)
def run(request, split, models, tmp_path):
    method, tuning = request.param
    config = AdaptConfig(split, method, models["vit"], alpha=0.25, tuning=tuning, context=True, output=tmp_path / "run",
                         recipe={"epochs": 20, "batch_size": 6})  # fmt: skip
    return adapt(config).run


def test_a_run_stores_and_interpolates_them(run, models):
    words = loading.load(models["vit"]).with_additions(Additions(context=WORDS)).context.detach()
    finetuned, ensemble = (load_file(run / f"{name}.safetensors")["clipfit.context"] for name in ("finetuned", "model"))
    assert (finetuned - words).abs().max() > 1e-5
    torch.testing.assert_close(ensemble, 0.75 * words + 0.25 * finetuned, atol=1e-6, rtol=1e-5)
    assert json.loads((run / "config.json").read_text())["context"] == WORDS
    assert torch.equal(open_run(run).state(0.0)["clipfit.context"], words)


def test_every_figure_is_measured_with_them(run, split):
    """Right answers with the vectors put into open_clip's own text tower by hand, where nothing is edited."""
    opened = open_run(run)
    classes, names = ["bee", "cow", "dog"], {"cow": "cow", "dog": "dog"}
    for row in evaluate(EvaluateConfig(run, alphas=(0.0, 0.25, 1.0))).rows:
        state = opened.state(row.alpha)
        model = loading.rebuild(opened.source, state, opened.additions)
        tokens = model.tokenize(prompts(classes, "a photo of a {}"))
        right = 0
        for folder, name in names.items():
            for file in (split / "test" / folder).iterdir():
                x = model.normalize(model.geometry(Image.open(file).convert("RGB"))[None])
                with torch.no_grad():
                    m, texts = model.model, model.read(tokens)
                    h = m.token_embedding(tokens)
                    h[:, 1:5] = state["clipfit.context"]
                    h = m.ln_final(m.transformer(h + m.positional_embedding, attn_mask=m.attn_mask))
                    t = F.normalize(h[torch.arange(3), tokens.argmax(1)] @ m.text_projection, dim=1)
                    u = model.encode_image(x, texts.class_tokens)
                right += classes[int((u @ t.T).argmax())] == name
        assert row.base.right == right


def test_an_open_clip_folder_cannot_hold_them(cli, split, models):
    made = cli("adapt", split, "--method", "finetune", "--model", models["vit"], "--context", "--json")
    assert made.code == 0, made.stderr
    cli("export").fails(2, "context vectors", "--alpha 0")
    assert cli("export", "--alpha", 0).code == 0


def test_without_words_before_the_name_there_is_nothing_to_learn(cli, split, models):
    command = ("adapt", split, "--method", "finetune", "--model", models["vit"], "--context", "--template")
    cli(*command, "{} in a photo").fails(2, "before the class name")
    cli(*command, "a super{}").fails(2, "run into the class name")  # tokens of the word and the name are merged


def test_they_are_trained_as_in_athas_code(split, models, monkeypatch):
    config = AdaptConfig(split, "atha", models["vit"], tuning="lora", context=True, recipe={"epochs": 1})
    seen = []
    monkeypatch.setattr(loop, "train", lambda *given: seen.extend(given[-2]))
    method = METHODS["atha"]
    adaptation = Adaptation.resolve(method, method.configure({}), config, {}, [2, 2, 2])
    model = loading.load(models["vit"]).with_additions(adaptation.additions)
    adaptation.run(model, NAMES, [], [])
    (context,) = seen
    assert context.parameters == {"clipfit.context": model.context}
    assert (context.learning_rate, context.momentum, context.weight_decay) == (2e-3, 0.9, 5e-4)
