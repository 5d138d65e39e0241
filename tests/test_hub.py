"""Models of the Hugging Face hub, from its cache: `hf-hub:owner/name`, tags, and what is taken where none is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from conftest import make_model
from hubs import cache, keep, list_little
from safetensors.torch import load_file, save_file

from clipfit import ModelError, UsageError
from clipfit.model import hub, loading, sources

__all__ = ["cache"]  # a fixture
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
LITTLE = "hf-hub:somebody/little"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder, whose files a hub may have."""
    return make_model(tmp_path / "model")


def put(cache: Path, folder: Path, *names: str, repository: str = "somebody/little") -> Path:
    """Some of a folder's files into the cache."""
    return keep(cache, repository, {name: (folder / name).read_bytes() for name in names})


def refused(error: type[Exception], name: str, *words: str, pretrained: str | None = None) -> str:
    with pytest.raises(error) as caught:
        loading.load(name, pretrained)
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


# ---- hf-hub:


def test_a_model_of_the_hub_is_what_open_clip_reads(cache, model):
    put(cache, model, CONFIG, WEIGHTS)
    ours = loading.load(LITTLE)
    theirs = open_clip.create_model(LITTLE)
    assert ours.source.model == LITTLE
    assert ours.source.pretrained is None
    assert all(torch.equal(tensor, ours.state()[name]) for name, tensor in theirs.state_dict().items())
    assert ours.source.preprocess_cfg == json.loads(json.dumps(theirs.visual.preprocess_cfg))
    assert loading.reload(ours.source).source == ours.source


def test_weights_of_the_hub_may_be_an_older_state_dict(cache, model):
    torch.save(load_file(model / WEIGHTS), model / "open_clip_pytorch_model.bin")
    put(cache, model, CONFIG, "open_clip_pytorch_model.bin")
    assert loading.load(LITTLE).source.sha256 == loading.load(str(model)).source.sha256


def test_a_run_on_a_model_of_the_hub_from_end_to_end(cli, flat, cache, model):
    put(cache, model, CONFIG, WEIGHTS)
    done = cli("adapt", flat, "--model", LITTLE, "--epochs", 1, "--shots", 2, "--output", "run", "--json")
    assert done.document["model"] == LITTLE
    assert cli("evaluate", "run", "--alphas", "0,1").code == 0
    assert cli("export", "run", "--output", "exported").code == 0
    shutil.rmtree(cache)
    assert cli("export", "run", "--alpha", 1, "--output", "again").code == 0
    cli("evaluate", "run").fails(4, f"the weights of {LITTLE} cannot be fetched")


def test_a_model_of_the_hub_that_cannot_be_had(cache, model):
    refused(ModelError, LITTLE, f"{CONFIG} of {LITTLE} is neither in the Hugging Face cache ({cache})",
            "name a folder that holds its files")  # fmt: skip
    refused(ModelError, "hf-hub:openai/clip-vit-base-patch16", "the same weights are --model ViT-B-16 --pretrained op")
    put(cache, model, CONFIG)
    refused(ModelError, LITTLE, f"the weights of {LITTLE} cannot be fetched", str(cache), "clipfit-tiny")


def test_a_model_of_the_hub_has_its_own_weights(cache):
    refused(UsageError, LITTLE, f"{LITTLE} has its own weights: leave --pretrained openai out", pretrained="openai")


@pytest.mark.parametrize("name", ["hf-hub:", "hf-hub:a/b/c", "hf-hub:a b"])
def test_a_name_that_is_none_of_the_hubs(cache, name):
    refused(UsageError, name, f"{name} is not of the form hf-hub:owner/name")


def test_what_the_hub_has_is_checked_as_a_folder_is(cache, model):
    (model / CONFIG).write_text("{}")
    put(cache, model, CONFIG, WEIGHTS)
    refused(ModelError, LITTLE, CONFIG, "model_cfg.embed_dim must be a whole number; found None")


def test_a_captioner_is_refused_before_its_weights_are_looked_for(cache, model):
    record = json.loads((model / CONFIG).read_text())
    record["model_cfg"] |= {"custom_text": True, "multimodal_cfg": {}}
    (model / CONFIG).write_text(json.dumps(record))
    put(cache, model, CONFIG)
    refused(ModelError, LITTLE, f"{LITTLE} is a CoCa")
    refused(ModelError, "coca_ViT-B-32", "coca_ViT-B-32 is a CoCa")


# ---- tags, and the one that is taken


def test_what_the_cache_holds_of_a_tag(cache, model):
    assert hub.cached("somebody/little/") is None
    snapshot = put(cache, model, WEIGHTS)
    assert hub.cached("somebody/little/") == snapshot / WEIGHTS
    assert hub.cached("somebody/little/other.bin") is None
    (snapshot / "other.bin").write_bytes(b"")
    assert hub.cached("somebody/little/other.bin") == snapshot / "other.bin"


@pytest.mark.parametrize("name", open_clip.list_models())
def test_the_tag_that_is_taken_where_none_is_named(name):
    tags = open_clip.list_pretrained_tags_by_model(name)
    if "openai" in tags or len(tags) == 1:
        assert sources.default_tag(name) == ("openai" if "openai" in tags else tags[0])
        return
    words = f"{name} has {len(tags)} pre-trained weights: pass --pretrained, one of {', '.join(tags)}"
    with pytest.raises(UsageError) as caught:
        sources.default_tag(name)
    assert (words if tags else f"open_clip has no pre-trained weights of {name}: pass --pretrained FILE") in str(
        caught.value
    )


def test_a_name_alone_takes_its_only_tag(cache):
    origin = sources.find("ViT-L-14-CLIPA")
    assert origin.pretrained == "datacomp1b"
    assert origin.preprocess_cfg["resize_mode"] == "squash"
    refused(UsageError, "ViT-H-14", "ViT-H-14 has 4 pre-trained weights: pass --pretrained, one of laion2b_s32b_b79k, ")


# ---- a cache and nothing else, as a user has it


def offline(cache: Path, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`clipfit` in a process of its own, with the cache and no network."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "clipfit", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_little_model_in_a_process_of_its_own(cache, model, flat, tmp_path):
    put(cache, model, CONFIG, WEIGHTS)
    done = offline(cache, tmp_path, "adapt", flat, "--model", LITTLE, "--epochs", 1, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == LITTLE


@pytest.mark.slow
def test_the_default_model_from_a_cache_with_nothing_else_said(cache, flat, tmp_path):
    """ViT-B-16 / openai of random weights at its real size, under the name by which open_clip looks for it."""
    torch.manual_seed(0)
    file = tmp_path / WEIGHTS
    save_file(open_clip.create_model("ViT-B-16").state_dict(), file)
    entry = open_clip.get_pretrained_cfg("ViT-B-16", "openai")["hf_hub"]
    keep(cache, entry.rstrip("/"), {WEIGHTS: file.read_bytes()})
    file.unlink()
    done = offline(cache, tmp_path, "adapt", flat, "--model", "ViT-B-16", "--epochs", 1, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "ViT-B-16"
    record = json.loads((tmp_path / "runs" / "pets-cite" / "config.json").read_text())
    assert record["pretrained"]["pretrained"] == "openai"
    assert record["pretrained"]["model_cfg"]["quick_gelu"] is True


# ---- weights in a local file: how they were trained


@pytest.fixture(scope="session")
def little(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A little architecture among open_clip's, of whose weights it says nothing."""
    list_little(tmp_path_factory.mktemp("architectures"), "Little-Hub")
    return "Little-Hub"


def found(name: str, file: Path | str) -> tuple[bool, str, tuple[float, ...]]:
    """Activation, resize mode and mean that are taken for weights in a file."""
    origin = sources.find(name, str(file))
    cfg = origin.preprocess_cfg
    return origin.model_cfg["quick_gelu"], cfg["resize_mode"], tuple(cfg["mean"])


OPENAI, HALF = tuple(open_clip.OPENAI_DATASET_MEAN), (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("name", "file", "expected"),
    [
        ("ViT-B-16", "ViT-B-16-openai.safetensors", (True, "shortest", OPENAI)),
        ("ViT-B-16", "vit_b_16-laion400m_e32-55e67d44.pt", (False, "shortest", OPENAI)),
        ("ViT-B-16", "CLIP-ViT-B-16-laion2B-s34B-b88K.bin", (False, "shortest", OPENAI)),
        ("ViT-L-14", "vit-l-14.DFN2B.s39b.pt", (False, "shortest", OPENAI)),  # not dfn2b
        ("ViT-L-14", "dfn2b.pt", (True, "shortest", OPENAI)),
        ("ViT-L-14", "laion2b_s32b_b82k.pt", (False, "shortest", HALF)),
        ("ViT-H-14", "dfn5b.pt", (True, "squash", OPENAI)),
        ("ViT-B-16-quickgelu", "weights.pt", (True, "shortest", OPENAI)),  # all tags agree
        ("ViT-L-14-CLIPA", "weights.pt", (False, "squash", tuple(open_clip.constants.IMAGENET_MEAN))),
        ("ViT-S-16", "weights.pt", (False, "shortest", OPENAI)),  # no tags: as open_clip trains it
    ],
)
def test_a_file_of_published_weights_is_read_as_they_were_trained(tmp_path, name, file, expected):
    (tmp_path / file).write_bytes(b"")
    assert found(name, tmp_path / file) == expected


def test_a_file_that_is_called_as_it_was_published_is_that_tags(tmp_path, monkeypatch):
    """OpenAI's files have the names of the architectures alone."""
    tags = {"theirs": {"url": "https://example.org/abc/ViT-B-16.pt", "quick_gelu": True}, "other": {"url": ""}}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: tags.get(tag, {}))
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: list(tags))
    (tmp_path / "ViT-B-16.pt").write_bytes(b"")
    assert found("ViT-B-16", tmp_path / "ViT-B-16.pt")[0] is True


def test_a_file_in_the_cache_is_known_by_its_folder(cache):
    snapshot = keep(cache, "timm/vit_base_patch16_clip_224.openai", {WEIGHTS: b""})
    assert found("ViT-B-16", snapshot / WEIGHTS)[0] is True
    snapshot = keep(cache, "laion/CLIP-ViT-B-16-laion2B-s34B-b88K", {WEIGHTS: b""})
    assert found("ViT-B-16", snapshot / WEIGHTS)[0] is False


def test_a_configuration_beside_a_file_says_it(tmp_path, model):
    record = json.loads((model / CONFIG).read_text())
    record["model_cfg"]["quick_gelu"] = True
    record["preprocess_cfg"] = {"mean": [0.1, 0.2, 0.3], "resize_mode": "longest"}
    (model / CONFIG).write_text(json.dumps(record))
    (model / "laion400m_e31.pt").write_bytes(b"")
    assert found("ViT-B-16", model / "laion400m_e31.pt") == (True, "longest", (0.1, 0.2, 0.3))


def test_a_file_that_may_be_either_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("epoch_3.pt").write_bytes(b"")
    refused(UsageError, "ViT-B-16", "epoch_3.pt does not say how its weights were trained",
            "the tags of ViT-B-16 differ in quick_gelu (openai and 3 more, or laion400m_e31 and 10 more)",
            "--pretrained openai:epoch_3.pt", "open_clip_config.json beside it", pretrained="epoch_3.pt")  # fmt: skip
    refused(UsageError, "ViT-L-14", "differ in mean, quick_gelu, std", pretrained="epoch_3.pt")
    assert found("ViT-B-16", "openai:epoch_3.pt")[0] is True
    assert found("ViT-B-16", "laion400m_e31:epoch_3.pt")[0] is False
    assert found("ViT-L-14", "laion2b_s32b_b82k:epoch_3.pt") == (False, "shortest", HALF)
    refused(UsageError, "ViT-B-16", "'laion400m' is no pretrained tag of ViT-B-16; did you mean laion400m_e3",
            pretrained="laion400m:epoch_3.pt")  # fmt: skip
    refused(UsageError, "ViT-B-16", "'openai:epoch_4.pt' is neither a file nor a pretrained tag",
            pretrained="openai:epoch_4.pt")  # fmt: skip


def test_a_tag_and_a_file_are_one_name_from_end_to_end(cli, flat, model, little, monkeypatch):
    tags = {"smooth": {"quick_gelu": False}, "sharp": {"quick_gelu": True, "resize_mode": "squash"}}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: tags.get(tag, {}))
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: list(tags))
    shutil.copy(model / WEIGHTS, "mine.safetensors")
    options = ("--model", little, "--pretrained", "sharp:mine.safetensors", "--epochs", 1, "--output", "run")
    assert cli("adapt", flat, *options).code == 0
    record = json.loads(Path("run/config.json").read_text())["pretrained"]
    assert record["pretrained"] == "sharp:mine.safetensors"
    assert record["model_cfg"]["quick_gelu"] is True
    assert record["preprocess_cfg"]["resize_mode"] == "squash"
    assert cli("evaluate", "run", "--alphas", "0").code == 0
    assert cli("adapt", flat, *options, "--resume").code == 0
    Path("mine.safetensors").unlink()
    cli("evaluate", "run").fails(4, "mine.safetensors")


def test_a_published_checkpoint_with_more_than_weights_is_read(little, model, tmp_path):
    """As training scripts write it: the state of a wrapped model, half precision, an optimiser and numbers beside."""
    state = load_file(model / WEIGHTS)
    half = {f"module.{name}": tensor.half() for name, tensor in state.items()}
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    record = {"epoch": 3, "name": "ours", "state_dict": half, "optimizer": optimizer.state_dict()}
    torch.save(record, tmp_path / "epoch_3.pt")
    loaded = loading.load(little, str(tmp_path / "epoch_3.pt"))
    for name, tensor in state.items():
        torch.testing.assert_close(loaded.state()[name], tensor, atol=5e-3, rtol=1e-3)
        assert loaded.state()[name].dtype == torch.float32
