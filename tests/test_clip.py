"""Encoding as open_clip does, activations that follow the weights, and what happens when weights cannot be had."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from conftest import TEXT, VISION, make_model, picture
from families import FAMILIES, make_family
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from clipfit import ModelError, UsageError
from clipfit.model import clip, devices, loading, weights

SENTENCES = ["a photo of a cat", "a photo of a long haired dachshund", "a photo of an owl", "b"]


def test_pictures_need_not_be_square(tmp_path):
    wide = make_model(tmp_path / "wide", {**VISION, "image_size": [32, 48]})
    backbone = loading.load(f"local-dir:{wide}")
    assert backbone.image_size == (32, 48)
    assert backbone.geometry(picture(0)).shape == (3, 32, 48)


def transformer_lengths(backbone: clip.Clip) -> list[int]:
    """Filled with the length of every sequence that enters the text transformer."""
    seen: list[int] = []
    backbone.model.transformer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    return seen


def assert_same_as_open_clip(backbone: clip.Clip) -> list[int]:
    tokens = backbone.tokenize(SENTENCES)
    with torch.no_grad():
        expected = backbone.model.encode_text(tokens, normalize=True)
        seen = transformer_lengths(backbone)
        torch.testing.assert_close(backbone.encode_text(tokens), expected, atol=1e-5, rtol=0)
        # a text's features do not depend on what else is in the batch, and the batch's order does not matter
        torch.testing.assert_close(backbone.encode_text(tokens[[2]]), expected[[2]], atol=1e-5, rtol=0)
    assert (expected[0] - expected[1]).abs().max() > 1e-3  # so that the equality says something
    return seen


@pytest.mark.parametrize("name", ["vit", "eos"])
def test_causal_texts_are_cut_behind_the_longest_one_and_stay_the_same(models, name):
    seen = assert_same_as_open_clip(loading.load(models[name]))
    words = loading.load(models[name]).tokenize(SENTENCES).count_nonzero(1)
    assert seen == [int(words.max()), int(words[2])]
    assert max(seen) < TEXT["context_length"]


def test_texts_without_a_causal_mask_keep_the_full_context(models):
    backbone = loading.load(models["bidirectional"])
    assert assert_same_as_open_clip(backbone) == [TEXT["context_length"]] * 2


def test_a_text_that_fills_the_context(vit):
    tokens = vit.tokenize(["very " * 40 + "long", "short"])
    with torch.no_grad():
        torch.testing.assert_close(
            vit.encode_text(tokens), vit.model.encode_text(tokens, normalize=True), atol=1e-5, rtol=0
        )


def test_built_in_architecture_with_a_local_weight_file(tmp_path):
    """ViT-B-32 at full size, the only big model of the suite (600 MB, deleted at once)."""
    torch.manual_seed(0)
    file = tmp_path / "weights.safetensors"
    save_file(open_clip.create_model("ViT-B-32").state_dict(), file)
    try:
        backbone = loading.load("ViT-B-32", f"laion2b_s34b_b79k:{file}")
        assert max(assert_same_as_open_clip(backbone)) < 77
        assert backbone.source.pretrained == f"laion2b_s34b_b79k:{file}"
        assert backbone.embed_dim == 512
        assert backbone.image_size == (224, 224)
    finally:
        file.unlink()


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_images_are_encoded_as_open_clip_does(models, name):
    backbone = loading.load(models[name])
    x = torch.randn(3, 3, *backbone.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = backbone.model.encode_image(x, normalize=True)
        torch.testing.assert_close(backbone.encode_image(x), expected, atol=1e-6, rtol=0)


def test_preprocessing_is_open_clips_own(vit, models):
    preprocess = open_clip.create_model_and_transforms(models["vit"])[2]
    for size in ((40, 36), (31, 90), (32, 32)):
        image = picture(1, size)
        ours = vit.normalize(vit.geometry(image)[None])[0]
        torch.testing.assert_close(ours, preprocess(image), atol=1e-5, rtol=0)
        assert ours.shape == (3, 32, 32)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_the_model_is_in_evaluation_mode_and_its_scale_is_frozen(models, name):
    backbone = loading.load(models[name])
    assert not any(module.training for module in backbone.model.modules())
    moving = {n for n, p in backbone.model.named_parameters() if p.requires_grad}
    assert moving == {n for n, _ in backbone.model.named_parameters()} - {"logit_scale"}
    assert backbone.scale.item() == pytest.approx(backbone.model.logit_scale.exp().item())


def activations(model: torch.nn.Module) -> set[str]:
    return {type(m).__name__ for m in model.modules() if type(m).__name__ in ("GELU", "QuickGELU")}


def test_the_activation_of_a_model_folder_survives_rebuilding(models):
    backbone = loading.load(models["quick"])
    assert activations(backbone.model) == {"QuickGELU"}
    assert activations(loading.rebuild(backbone.source, backbone.state()).model) == {"QuickGELU"}
    assert activations(loading.reload(backbone.source).model) == {"QuickGELU"}
    assert activations(loading.load(models["vit"]).model) == {"GELU"}


@pytest.fixture
def little_architecture(monkeypatch) -> str:
    """A name of open_clip's whose configuration says GELU, as ViT-B-32's does; its tag `fast` is of QuickGELU."""
    config = {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT}
    tags = {name: {"url": "", "hf_hub": "nobody/nothing", "quick_gelu": name == "fast"} for name in ("fast", "slow")}
    monkeypatch.setattr(open_clip, "list_models", lambda: ["Little"])
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: copy.deepcopy(config))
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: tags.get(tag, {}))
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: list(tags))
    return "Little"


def test_the_activation_follows_the_weights_and_not_the_architectures_name(
    models, little_architecture, tmp_path, monkeypatch
):
    """open_clip #771: a tag's weights were trained with QuickGELU, the architecture's configuration says GELU."""
    weights = Path(models["quick"].removeprefix("local-dir:")) / "open_clip_model.safetensors"
    monkeypatch.setattr(open_clip, "download_pretrained", lambda *args, **kwargs: str(weights))
    fast, slow = loading.load(little_architecture, "fast"), loading.load("Little", "slow")
    assert activations(fast.model) == {"QuickGELU"}
    assert fast.source.model_cfg["quick_gelu"] is True
    assert activations(loading.rebuild(fast.source, fast.state()).model) == {"QuickGELU"}
    assert activations(slow.model) == {"GELU"}

    beside, alone = tmp_path / "beside", tmp_path / "alone"
    shutil.copytree(weights.parent, beside)
    alone.mkdir()
    shutil.copy(weights, alone)
    assert activations(loading.load(little_architecture, str(beside / weights.name)).model) == {"QuickGELU"}
    with pytest.raises(UsageError, match=r"the tags of Little differ in quick_gelu \(fast, or slow\)"):
        loading.load(little_architecture, str(alone / weights.name))


def test_an_unknown_model_gets_the_nearest_names():
    with pytest.raises(UsageError, match=r"unknown model 'ViT-B-61'; did you mean .*ViT-B-16"):
        loading.load("ViT-B-61")
    with pytest.raises(UsageError, match=r"unknown model 'clipfit-tony'; did you mean clipfit-tiny"):
        loading.load("clipfit-tony")


def test_an_unknown_tag_gets_the_nearest_ones():
    with pytest.raises(
        UsageError, match=r"'open-ai' is neither a file nor a pretrained tag of ViT-B-32; did you mean "
    ):
        loading.load("ViT-B-32", "open-ai")


def test_a_tag_without_a_network_names_what_works_offline(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("[Errno -3] Temporary failure in name resolution")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    with pytest.raises(ModelError) as caught:
        loading.load("ViT-B-32", "openai")
    for word in ("ViT-B-32 / openai", "name resolution", "clipfit-tiny", "--model FOLDER", "FILE.safetensors"):
        assert word in str(caught.value)


def test_a_captioner_is_refused(tmp_path):
    folder = make_model(tmp_path / "model")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"].update(custom_text=True, multimodal_cfg={})
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="is a CoCa, whose captioner would be lost"):
        loading.load(f"local-dir:{folder}")


def test_other_weights_in_the_same_place_are_noticed(tmp_path):
    folder = make_model(tmp_path / "model")
    source = loading.load(f"local-dir:{folder}").source
    loading.reload(source)
    file = folder / "open_clip_model.safetensors"
    state = load_file(file)
    state["logit_scale"] = torch.nextafter(state["logit_scale"], torch.tensor(9.0))  # one bit of one number
    save_file(state, file)
    with pytest.raises(ModelError, match=r"changed since the run was made: expected SHA-256 [0-9a-f]{16}…, found"):
        loading.reload(source)


def test_a_run_keeps_the_architecture_and_preprocessing_it_was_made_with(tmp_path):
    """Whatever the configuration beside the same weights says by now (open_clip #771)."""
    folder = make_model(tmp_path / "model", quick_gelu=True)
    before = loading.load(f"local-dir:{folder}")
    images = torch.randint(256, (2, 3, *before.image_size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"]["quick_gelu"] = False
    config["preprocess_cfg"]["mean"] = [2.0, 2.0, 2.0]
    file.write_text(json.dumps(config))
    again = loading.reload(before.source)
    with torch.no_grad():
        expected, found, other = (b.encode_image(b.normalize(images))
                                  for b in (before, again, loading.load(f"local-dir:{folder}")))  # fmt: skip
    assert torch.equal(found, expected)
    assert not torch.allclose(other, expected, atol=1e-2)


def test_the_hash_is_that_of_names_shapes_types_and_values():
    state = {"a": torch.arange(6.0), "b": torch.tensor(3)}
    known = weights.state_sha256(state)
    assert weights.state_sha256(dict(reversed(state.items()))) == known
    others = [
        {"a": torch.arange(6.0), "c": torch.tensor(3)},
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3)},
        {"a": torch.arange(6.0), "b": torch.tensor(3, dtype=torch.int32)},
        {"a": -torch.arange(6.0), "b": torch.tensor(3)},
    ]
    assert len({known, *map(weights.state_sha256, others)}) == 5


def test_states_of_another_shape_are_refused(vit):
    state = vit.state()
    state["ln_final.weight"] = torch.zeros(3)
    with pytest.raises(ModelError, match="do not fit"):
        vit.load_state(state)


def test_devices_and_precision():
    assert devices.resolve_device("cpu").type == "cpu"
    with pytest.raises(UsageError, match=r"device 'warp' cannot be used here .*--device cpu"):
        devices.resolve_device("warp")
    assert devices.resolve_precision("fp32", torch.device("cuda")) == "fp32"
    assert devices.resolve_precision("bf16", torch.device("cpu")) == "bf16"


@pytest.mark.parametrize("name", ["vit", *FAMILIES])
def test_weights_that_are_replaced_are_not_filled_with_random_numbers(models, name, tmp_path):
    """Which took most of the time."""
    model, seen = models.get(name) or make_family(name, tmp_path), []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Noting():
        made = loading.load(model)
        loading.rebuild(made.source, made.state())
    assert "copy_" in seen
    assert not {"normal_", "uniform_"} & set(seen)
