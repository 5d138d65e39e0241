"""`export --format transformers`: what CLIPModel and CLIPProcessor load is the run's model."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from conftest import VISION, make_classes, make_model, picture
from families import SIGLIP_TEXT, WORDS, family_cfg, make_family, save_model, words_tokenizer
from safetensors.torch import load_file, save_file

from clipfit import ExportConfig, export
from clipfit.formats import bpe, consumer
from clipfit.formats.transformers import unlike_clip
from clipfit.model import loading, sources
from clipfit.model.tokenizing import tokenizer_of
from clipfit.runs.run import open_run

transformers = pytest.importorskip("transformers")


def exported(run: Path, **options: object) -> Path:
    return export(ExportConfig(run, format="transformers", **options)).output  # type: ignore[arg-type]


@pytest.mark.parametrize("model", ["vit", "quick", "eos"])
def test_what_the_library_loads_is_the_runs_model(cli, models, split, model, tmp_path):
    """By its own way from files and texts to logits, with nothing of clipfit in between."""
    assert cli("adapt", split, "--model", models[model], "--output", "run").code == 0
    folder, run = exported(tmp_path / "run"), open_run(tmp_path / "run")
    ours = loading.rebuild(run.source, run.state(run.alpha))
    theirs = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.CLIPProcessor.from_pretrained(folder, backend="pil")
    images = [picture(k, (40, 34)) for k in range(4)]  # resized to 37 × 32
    names = ["a photo of a bee", "a drawing: cow, 3 of them!", "dog's dinner"]
    x = torch.stack([ours.normalize(ours.geometry(image)[None])[0] for image in images])
    asked = processor(images=images, text=names, return_tensors="pt", padding=True)
    torch.testing.assert_close(asked["pixel_values"], x, atol=1e-5, rtol=0)
    with torch.no_grad():
        mine = ours.scale * ours.encode_image(x) @ ours.encode_text(ours.tokenize(names)).T
        torch.testing.assert_close(theirs(**asked).logits_per_image, mine, atol=1e-4, rtol=0)
    assert theirs.config.text_config.hidden_act == ("quick_gelu" if model == "quick" else "gelu")


def test_no_tensor_is_lost_or_invented(split_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = exported(split_run)
    _, told = transformers.CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not [name for names in told.values() for name in names]
    size = sum(t.numel() for t in load_file(folder / "model.safetensors").values())
    run = open_run(split_run)
    assert size == sum(t.numel() for t in run.state(run.alpha).values())


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_reduced_types_halve_the_file_and_are_what_is_loaded(cli, split_run, tmp_path, dtype, torch_dtype):
    full = cli("export", split_run, "--format", "transformers", "--json").document
    half = cli("export", split_run, "--format", "transformers", "--dtype", dtype, "--json").document
    assert half["output"] == f"{full['output']}-{dtype}"
    sizes = [(tmp_path / told["output"] / "model.safetensors").stat().st_size for told in (full, half)]
    assert 0.48 < sizes[1] / sizes[0] < 0.52
    assert full["largest_difference"] < half["largest_difference"]
    assert transformers.AutoModel.from_pretrained(half["output"], dtype="auto").dtype == torch_dtype


@pytest.mark.parametrize(
    "text",
    ["a photo of a cat's naïve café", "a  photo\tof 12 dogs!?", "don't", "日本 и ЁЛКА", "x" * 200, "", "<end_of_text>",
     "a/b_c-d.e"],
)  # fmt: skip
def test_the_tokenizer_makes_open_clips_ids(split_run, tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    tokenizers = pytest.importorskip("tokenizers")
    source = open_run(split_run).source
    bpe.write_for_clip(tmp_path, source)
    expected = tokenizer_of(source)([text])[0].tolist()
    expected = expected[: expected.index(49407) + 1]
    alone = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)(text, truncation=True)["input_ids"]
    if text == "<end_of_text>":  # open_clip's own mark; theirs is written otherwise
        assert alone != expected
        return
    assert alone[: len(expected)] == theirs == expected
    assert len(alone) == 16
    assert set(alone[len(expected) :]) <= {49407}


def test_a_text_that_open_clip_repairs_is_named_with_what_to_write(cli, models, tmp_path):
    make_classes(tmp_path / "pets", {"cat": 2, "dog": 2})
    (tmp_path / "names.txt").write_text("cat\trock &amp; roll\ndog\tdog\n")
    told = ("--model", models["vit"], "--classes", "names.txt", "--output", "run")
    assert cli("adapt", "pets", *told).code == 0
    done = cli("export", "run", "--format", "transformers", "--json")
    assert done.code == 0, done.stderr
    assert done.document["proof"]["identical_pixels"]["same_labels"] == 4
    [text] = done.document["proof"]["read_otherwise"]
    assert (text["path"], text["advice"]) == ("a photo of a rock &amp; roll", "write 'a photo of a rock & roll'")
    assert "write 'a photo of a rock & roll'" in done.stderr


def test_the_fast_processors_difference_and_a_crop_that_lies_aside_are_said(cli, models, tmp_path):
    """Of 35 pixels, 1.5 lie above the middle 32: open_clip cuts behind two, the library behind one."""
    for c, name in enumerate(("cat", "dog")):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for k, size in enumerate([(36, 40), (36, 38)]):
            picture(9 * c + k, size).save(tmp_path / "pets" / name / f"{k}.png")
    assert cli("adapt", "pets", "--model", models["vit"], "--output", "run").code == 0
    done = cli("export", "run", "--format", "transformers", "--json")
    assert done.code == 0, done.stderr
    proof = done.document["proof"]
    assert {file["path"]: "pixel aside" in file["reason"] for file in proof["seen_otherwise"]} == {
        "pets/cat/0.png": True, "pets/dog/0.png": True,
    }  # fmt: skip
    assert proof["files"]["largest_difference"] > 1e-3
    assert 0 < proof["further_pixels"]["the fast image processor"] < 0.1
    assert proof["further"]["the fast image processor"]["images"] == 4
    assert "the fast image processor: pixels of noise within" in done.stderr


def test_the_consumer_is_a_process_of_its_own(split_run, consumers_run_here, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(consumer, "start", consumers_run_here)
    proof = export(ExportConfig(split_run, format="transformers")).proof
    assert proof.consumer == f"transformers {transformers.__version__}"
    assert proof.identical_pixels.images == proof.identical_pixels.same_labels == 6


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("config.json", {"projection_dim": 32, "text_config": {"hidden_act": "quick_gelu"}}, "reads another model"),
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}, "preprocesses pictures in another way"),
        ("preprocessor_config.json", {"resample": 2}, "preprocesses pictures in another way"),
    ],
)
def test_another_model_or_preprocessing_is_not_kept(cli, split_run, tmp_path, monkeypatch, file, change, words):
    start = consumer.start

    def changed(script, arguments, exchange):
        path = Path(arguments[0]) / file
        record = json.loads(path.read_text())
        for key, value in change.items():
            record[key] = {**record[key], **value} if isinstance(value, dict) else value
        path.write_text(json.dumps(record))
        start(script, arguments, exchange)

    monkeypatch.setattr(consumer, "start", changed)
    cli("export", split_run, "--format", "transformers").fails(1, words, "not kept")
    assert not list(tmp_path.iterdir())


def test_another_tokenizer_is_not_kept(cli, split_run, tmp_path, monkeypatch):
    usual = bpe._vocabulary
    monkeypatch.setattr(bpe, "_vocabulary", lambda source: (usual(source)[0], usual(source)[1][:1000], 16))
    cli("export", split_run, "--format", "transformers").fails(1, "makes other tokens of", "not kept")
    assert not list(tmp_path.iterdir())


# ---- SigLIP

SQUASH = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}


@pytest.mark.parametrize("kind", ["cropped", "squashed, by tanh", "a tokenizer of its own"])
def test_a_siglip_is_what_its_own_classes_load(cli, split, tmp_path, kind):
    """By its own way from files and texts to logits, the bias included, with nothing of clipfit in between."""
    if kind == "cropped":
        model = make_family("siglip", tmp_path / "model")
    else:
        cfg = family_cfg("siglip", tmp_path / "model")
        if kind == "a tokenizer of its own":
            words_tokenizer(tmp_path / "model")
            cfg["text_cfg"] |= {"hf_tokenizer_name": str(tmp_path / "model"), "vocab_size": len(WORDS)}
            cfg["text_cfg"]["tokenizer_kwargs"] = {"clean": "canonicalize"}
        else:
            cfg["text_cfg"]["act_kwargs"] = {"approximate": "tanh"}
        model = save_model(tmp_path / "model", cfg, SQUASH)
    made = cli("adapt", split, "--model", model, "--output", "run")
    assert made.code == 0, made.stderr
    done = cli("export", "run", "--format", "transformers", "--json")
    assert done.code == 0, done.stderr
    assert done.document["proof"]["identical_pixels"]["same_labels"] == 6
    folder, run = tmp_path / done.document["output"], open_run(tmp_path / "run")
    ours = loading.rebuild(run.source, run.state(run.alpha))
    # the one class for any tokenizer.json that transformers 4 knows too
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    theirs, told = transformers.SiglipModel.from_pretrained(folder, output_loading_info=True)
    assert not [name for names in told.values() for name in names]
    processor = transformers.SiglipProcessor.from_pretrained(folder, backend="pil")
    images = [picture(k, (40, 34)) for k in range(4)]
    names = ["a photo of a bee", "a drawing: cow!! 3 of them!", "dog's dinner", "x" * 200]
    x = torch.stack([ours.normalize(ours.geometry(image)[None])[0] for image in images])
    asked = processor(images=images, text=names, return_tensors="pt", padding="max_length", truncation=True)
    torch.testing.assert_close(asked["pixel_values"], x, atol=1e-5, rtol=0)
    if kind != "a tokenizer of its own":  # which open_clip gives texts without their punctuation
        assert torch.equal(asked["input_ids"], ours.tokenize(names))
    with torch.no_grad():
        mine = ours.logits(ours.encode_image(x), ours.encode_text(asked["input_ids"]))
        torch.testing.assert_close(theirs.eval()(**asked).logits_per_image, mine, atol=1e-4, rtol=0)
    assert theirs.config.text_config.hidden_act == ("gelu_pytorch_tanh" if kind.endswith("tanh") else "gelu")
    card = (folder / "README.md").read_text()
    assert "SiglipModel.from_pretrained" in card
    assert ("transformers 4 or 5" in card) == (kind == "a tokenizer of its own")  # of the others, see needs_5


@pytest.mark.parametrize(
    ("vision", "text", "words"),
    [
        ({}, {}, None),
        ({"timm_model_name": "vit_base_patch16_siglip_gap_224"}, {}, "no vision transformer of CLIP's"),
        ({"timm_pool": "avg"}, {}, "a projection or a pooling of another kind"),
        ({}, {"no_causal_mask": False}, "a text tower with no_causal_mask False beside"),
        ({}, {"hf_model_name": "x"}, "a text tower with hf_model_name 'x'"),
    ],
)
def test_it_says_what_of_a_siglip_it_cannot_hold(vision, text, words):
    image = {"image_size": 224, "timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map",
             "timm_proj": "none", **vision}  # fmt: skip
    cfg = {"embed_dim": 768, "custom_text": True, "vision_cfg": image, "text_cfg": {**SIGLIP_TEXT, **text}}
    reason = unlike_clip(sources.Source("m", None, "", cfg, {"size": 224, "resize_mode": "squash"}))
    assert reason is None if words is None else words in (reason or "")


# ---- what it cannot hold

CFG = {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": {"context_length": 16}}


@pytest.mark.parametrize(
    ("vision", "text", "preprocess", "words"),
    [
        ({}, {}, {}, None),
        ({"patch_dropout": 0.5}, {"eos_id": 49407, "pool_type": "eos"}, {"resize_mode": "squash"}, None),
        ({"layers": [1, 1, 1, 1]}, {}, {}, "no vision transformer of CLIP's (ResNet)"),
        ({"timm_model_name": "vit_small"}, {}, {}, "no vision transformer of CLIP's (vit_small)"),
        ({"pool_type": "avg"}, {}, {}, "an image tower with pool_type 'avg'"),
        ({"no_ln_pre": True}, {}, {}, "an image tower with no_ln_pre True"),
        ({"image_size": [32, 64]}, {}, {}, "images that are not square"),
        ({}, {"no_causal_mask": True}, {}, "a text tower with no_causal_mask True"),
        ({}, {"pool_type": "last"}, {}, "a text tower with pool_type 'last'"),
        ({}, {"pool_type": "eos", "eos_id": 2}, {}, "a text tower with pool_type 'eos'"),
        ({}, {"hf_tokenizer_name": "x"}, {}, "a text tower with hf_tokenizer_name 'x'"),
        ({}, {}, {"resize_mode": "longest"}, "a preprocessing with resize_mode 'longest'"),
    ],
)
def test_it_says_what_it_cannot_hold(vision, text, preprocess, words):
    cfg = {**CFG, "vision_cfg": {**VISION, **vision}, "text_cfg": {**CFG["text_cfg"], **text}}
    source = sources.Source("m", None, "", cfg, {"size": 32, "resize_mode": "shortest", **preprocess})
    reason = unlike_clip(source)
    assert reason is None if words is None else words in (reason or "")


def test_a_resnet_is_refused_before_anything_is_computed(cli, models, split, monkeypatch):
    assert cli("adapt", split, "--model", models["resnet"], "--output", "run").code == 0
    monkeypatch.setattr(loading, "rebuild", lambda *_, **__: pytest.fail("a model was built"))
    done = cli("export", "run", "--format", "transformers")
    done.fails(
        2,
        "the format transformers cannot hold an image tower that is no vision",
        "--format open_clip or --format safetensors",
    )


@pytest.mark.slow
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_a_vit_b_32_of_openais_shape(cli, split, tmp_path, quick_gelu):
    cfg = open_clip.get_model_config("ViT-B-32")
    model = make_model(tmp_path / "model", cfg["vision_cfg"], quick_gelu=quick_gelu, **cfg["text_cfg"])
    record = json.loads((model / "open_clip_config.json").read_text())
    assert record["model_cfg"]["text_cfg"]["width"] == 512
    made = cli("adapt", split, "--model", model, "--epochs", 1, "--output", "run")
    assert made.code == 0, made.stderr
    done = cli("export", "run", "--format", "transformers", "--json")
    assert done.code == 0, done.stderr
    assert done.document["proof"]["identical_pixels"]["same_labels"] == 6


def test_the_weights_are_what_its_consumer_reads(cli, split_run, tmp_path, monkeypatch):
    """A tensor of another value is caught, through the names that the library has."""
    start = consumer.start

    def changed(script, arguments, exchange):
        file = Path(arguments[0]) / "model.safetensors"
        state = load_file(file)
        name = "vision_model.encoder.layers.1.self_attn.q_proj.weight"
        save_file({**state, name: state[name] * 3}, file, {"format": "pt"})
        start(script, arguments, exchange)

    monkeypatch.setattr(consumer, "start", changed)
    cli("export", split_run, "--format", "transformers").fails(1, "reads another model")
