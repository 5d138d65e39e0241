"""Where models come from: names, folders and files, and the sentence for each of them that cannot be used."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import open_clip
import pytest
import torch
from conftest import PREPROCESS, RESNET, VISION, make_model
from hubs import list_little
from safetensors.torch import load_file, save_file

from clipfit import ModelError, UsageError
from clipfit.model import devices, loading, sources


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder `model` in the working directory, which a test may spoil."""
    monkeypatch.chdir(tmp_path)
    return make_model(tmp_path / "model")


@pytest.fixture(scope="session")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A little architecture among open_clip's, for weight files: it stays there, which disturbs nobody."""
    list_little(tmp_path_factory.mktemp("architectures"), "Little-ViT")
    return "Little-ViT"


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetched(*args, **kwargs):
        pytest.fail("fetched before refusing")

    monkeypatch.setattr(open_clip, "download_pretrained", fetched)


def spoil(folder: Path, **preprocess: object) -> None:
    """Write other preprocessing into the folder's configuration."""
    file = folder / "open_clip_config.json"
    record = json.loads(file.read_text())
    record["preprocess_cfg"] = {**PREPROCESS, **preprocess}
    file.write_text(json.dumps(record))


def refused(error: type[Exception], model: str, *words: str, pretrained: str | None = None) -> str:
    """Loading the model raises `error`, and its sentence holds the words."""
    with pytest.raises(error) as caught:
        loading.load(model, pretrained)
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


# ---- folders


@pytest.mark.parametrize("name", ["model", "./model", "model/", "local-dir:model"])
def test_a_plain_folder_is_a_model(folder, name):
    loaded = loading.load(name)
    assert loaded.source.model == "local-dir:model"
    assert loaded.source.pretrained is None
    expected = load_file(folder / "open_clip_model.safetensors")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state().items())
    again = loading.reload(loaded.source)
    assert again.source == loaded.source


def test_an_absolute_path_and_the_home_folder_are_folders(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    for name in (str(folder), "~/model", "local-dir:~/model"):
        assert sources.folder_of(name) == folder
        assert loading.load(name).embed_dim == 32


def test_an_architecture_wins_over_a_folder_of_its_name_unless_it_is_written_as_a_path(folder, no_download):
    for name in ("ViT-B-16", "clipfit-tiny"):
        shutil.copytree(folder, name)
        assert sources.folder_of(name) is None
        assert sources.find(name).model == name
        assert sources.find(f"./{name}").model == f"local-dir:{name}"
    Path("ViT-B").mkdir()
    shutil.copytree(folder, "ViT-B/32")
    assert sources.find("ViT-B/32").tag  # as open_clip reads it
    assert sources.find("./ViT-B/32").file == Path("ViT-B/32/open_clip_model.safetensors")


@pytest.mark.parametrize("name", ["./nowhere", "nowhere/", "/nowhere/at/all", "local-dir:nowhere"])
def test_a_folder_that_is_not_there(name):
    refused(ModelError, name, "nowhere", "is no model folder: it needs open_clip_config.json and weights",
            "open_clip_model.safetensors", "there is no such folder")  # fmt: skip


def test_folders_of_something_else(folder):
    Path("empty").mkdir()
    refused(ModelError, "empty", "empty is no model folder", "it has no open_clip_config.json")
    Path("transformers").mkdir()
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        Path("transformers", name).write_text("{}")
    refused(ModelError, "transformers", "is no model folder", "of the transformers library")
    Path("file").write_text("")
    refused(ModelError, "./file", "this is a file (weights alone go to --pretrained)")
    refused(UsageError, "file", "file is a file: pass it as --pretrained")


def test_a_folder_has_its_own_weights(folder):
    refused(UsageError, "./model", "leave --pretrained openai out", pretrained="openai")


def test_a_folder_without_weights(folder):
    (folder / "open_clip_model.safetensors").unlink()
    message = refused(ModelError, "model", "it needs open_clip_config.json and weights (open_clip_model.safetensors)",
                      "it has no weights")  # fmt: skip
    assert "without a network" not in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ("cannot be read as JSON", "restore it")),
        ("\xff", ("cannot be read as JSON",)),
        ("[]", ("must hold one JSON object; found list",)),
        ("{}", ("model_cfg.embed_dim must be a whole number; found None",)),
        ('{"model_cfg": {"embed_dim": 32, "vision_cfg": 3}}', ("model_cfg.vision_cfg must be an object; found 3",)),
        ('{"model_cfg": {"embed_dim": 32, "vision_cfg": {}}}', ("model_cfg.text_cfg must be an object",)),
        ('{"model_cfg": {"embed_dim": 32, "vision_cfg": {"wdth": 3}, "text_cfg": {}}}', ("cannot build", "wdth")),
    ],
)
def test_a_folder_whose_configuration_is_broken(folder, text, words):
    (folder / "open_clip_config.json").write_bytes(text.encode("latin-1"))
    refused(ModelError, "model", *words)


def test_a_recipe_of_a_folder_that_is_broken(folder):
    (folder / "clipfit.json").write_text("[1]")
    refused(ModelError, "model", "clipfit.json must hold one JSON object; found list")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("std", [0, 0, 0], "three numbers above 0; found [0, 0, 0]"),
        ("std", [0.2, 0.2], "three numbers above 0; found [0.2, 0.2]"),
        ("std", [0.2, float("nan"), 0.2], "three numbers above 0; found [0.2, nan, 0.2]"),
        ("mean", [0.5], "three numbers; found [0.5]"),
        ("mean", "grey", "three numbers; found 'grey'"),
        ("mean", [True, 0, 0], "three numbers; found [True, 0, 0]"),
        ("interpolation", "nearest", "one of bicubic, bilinear, random; found 'nearest'"),
        ("interpolation", ["bicubic"], "one of bicubic, bilinear, random; found ['bicubic']"),
        ("resize_mode", "crop", "one of shortest, longest, squash; found 'crop'"),
        ("mode", "L", "'RGB'; found 'L'"),
        ("fill_color", 999, "a whole number from 0 to 255; found 999"),
    ],
)
def test_preprocessing_that_open_clip_cannot_do(folder, key, value, expected):
    spoil(folder, **{key: value})
    refused(ModelError, "model", f"open_clip_config.json: preprocess_cfg.{key} must be {expected}")


def test_preprocessing_that_is_not_given_is_open_clips_own(folder):
    file = folder / "open_clip_config.json"
    spoil(folder, mean=None, interpolation=None, unknown=3)
    theirs = open_clip.create_model("local-dir:model").visual.preprocess_cfg
    ours = loading.load("model").source.preprocess_cfg
    assert ours == json.loads(json.dumps(theirs))
    assert ours["mean"] == list(open_clip.OPENAI_DATASET_MEAN)
    record = json.loads(file.read_text())
    del record["preprocess_cfg"]
    file.write_text(json.dumps(record))
    theirs = open_clip.create_model("local-dir:model").visual.preprocess_cfg
    assert loading.load("model").source.preprocess_cfg == json.loads(json.dumps(theirs))


def test_a_configuration_may_say_that_the_text_tower_is_the_usual_one(folder):
    file = folder / "open_clip_config.json"
    record = json.loads(file.read_text())
    record["model_cfg"]["custom_text"] = False
    file.write_text(json.dumps(record))
    assert loading.load("model").embed_dim == 32


@pytest.mark.parametrize("size", [{"size": 7}, {"size": None}])
def test_the_size_is_that_of_the_model(folder, size):
    spoil(folder, **size)
    assert loading.load("model").source.preprocess_cfg["size"] == [32, 32]


# ---- weight files


def code(file: Path) -> None:
    """A pickle that would run a command when it is unpickled."""
    torch.save({"state_dict": Dangerous()}, file)


class Dangerous:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("executed"),))


def program(file: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(file))


def archive(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("hello", "you")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("w.safetensors", lambda f: f.write_bytes(b"no"), ("is damaged or holds no weights of Little-ViT",)),
        ("w.pt", lambda f: f.write_bytes(b"neither"), ("is damaged or holds no weights of Little-ViT", ".safetensors")),
        ("w.pt", lambda f: f.write_bytes(b""), ("is damaged or holds no weights",)),
        ("w.pt", archive, ("is damaged or holds no weights",)),
        ("w.npz", archive, ("is damaged or holds no weights",)),
        ("w.pt", lambda f: torch.save([1, 2], f), ("is damaged or holds no weights",)),
        ("w.pt", lambda f: torch.save({}, f), ("is damaged or holds no weights",)),
        ("w.pt", code, ("is a pickle that holds more than tensors and is not opened", ".safetensors")),
        ("w.pt", program, ("is a TorchScript program and is not run", "--pretrained openai")),
        ("w.safetensors", lambda f: save_file({"a": torch.zeros(2)}, f), ("does not hold the weights of Little-ViT",)),
    ],
    ids=lambda value: getattr(value, "__name__", value) if not isinstance(value, tuple) else value[0][:20],
)
def test_a_weight_file_that_cannot_be_used(architecture, tmp_path, monkeypatch, name, make, words):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / name)
    message = refused(ModelError, architecture, name, *words, pretrained=name)
    for advice in ("weights_only", "without a network", "trusted", "\n"):
        assert advice not in message
    assert not Path("executed").exists()


def test_nothing_is_unpickled_even_where_torch_is_told_to(folder, monkeypatch):
    """A TypeError in the first attempt makes open_clip try again without saying weights_only."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    (folder / "open_clip_model.safetensors").unlink()
    code(folder / "model.pth")
    refused(ModelError, "model", "is not opened while TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set: unset it")
    assert not Path("executed").exists()


def test_a_state_dict_of_torch_is_read(folder):
    state = load_file(folder / "open_clip_model.safetensors")
    expected = loading.load("model").source.sha256
    (folder / "open_clip_model.safetensors").unlink()
    torch.save({"state_dict": state}, folder / "model.pth")
    assert loading.load("model").source.sha256 == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: s.update(text_projection=torch.zeros(3, 8)),
            "text_projection must have shape [32, 32], but has [3, 8];",
        ),
        (lambda s: s.pop("ln_final.bias"), "it lacks ln_final.bias;"),
        (lambda s: (s.pop("ln_final.bias"), s.pop("ln_final.weight")), "it lacks ln_final.weight and 1 more;"),
        (lambda s: s.update(more=torch.zeros(1)), "it holds more, which the architecture has not;"),
    ],
    ids=["shape", "missing", "two missing", "unexpected"],
)
def test_weights_of_another_architecture_are_named(folder, change, words):
    file = folder / "open_clip_model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)
    refused(ModelError, "model", "does not hold the weights of the model that open_clip_config.json describes", words)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pretrained_weights_that_are_no_numbers(folder, value):
    file = folder / "open_clip_model.safetensors"
    state = load_file(file)
    state["visual.ln_post.weight"][3] = value
    save_file(state, file)
    message = refused(ModelError, "model", "open_clip_model.safetensors", "visual.ln_post.weight", "not finite numbers")
    assert "learning-rate" not in message


def test_recorded_weights_that_are_gone(folder):
    source = loading.load("model").source
    (folder / "open_clip_model.safetensors").rename("elsewhere.safetensors")
    with pytest.raises(ModelError, match=r"model has no weights any more: restore open_clip_model.safetensors there"):
        loading.reload(source)


def test_recorded_weights_are_loaded_into_one_model(folder, monkeypatch):
    """The recorded architecture is built and filled; no other one is beside it in memory."""
    source, built = loading.load("model").source, []

    def counted(**model_cfg):
        built.append(model_cfg)
        return model(**model_cfg)

    model = open_clip.CLIP
    monkeypatch.setattr(open_clip, "CLIP", counted)
    assert loading.reload(source).source == source
    assert len(built) == 1


# ---- names


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("openai/clip-vit-base-patch32", "--model ViT-B-32 --pretrained openai"),
        ("openai/clip-vit-large-patch14-336", "--model ViT-L-14-336 --pretrained openai"),
        ("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "--model ViT-B-32 --pretrained laion2b_s34b_b79k"),
        ("nobody/nothing", "a model of the Hugging Face hub is called hf-hub:nobody/nothing"),
    ],
)
def test_a_name_of_a_model_hub_gets_open_clips_name(no_download, name, words):
    refused(UsageError, name, f"there is no run, export or model {name!r}", words)


def test_a_folder_for_a_weight_file(folder, no_download):
    refused(UsageError, "ViT-B-32", "model is a folder: pass it as --model, alone", pretrained="model")


# ---- decided before anything is fetched


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--model", "RN50", "--method", "atha"), "that of RN50 is a ModifiedResNet, which has no sequence"),
        (("--model", "RN50", "--tuning", "lora"), "--tuning lora needs two transformers"),
        (("--model", "coca_ViT-B-32", "--pretrained", "laion2b_s13b_b90k"), "coca_ViT-B-32 is a CoCa"),
        (("--model", "PE-Core-B-16", "--pretrained", "meta", "--method", "atha"), "pools its patches by attention"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_a_model_cannot_do_is_said_before_it_is_fetched(cli, flat, no_download, options, words):
    cli("adapt", flat, *options).fails(4, words)


def test_a_block_that_the_model_does_not_have_is_said_before_it_is_fetched(cli, flat, no_download):
    cli("adapt", flat, "--method", "atha", "--head-block", 12).fails(2, "head_block must lie between 0 and 11")


@pytest.mark.parametrize(
    ("vision", "options", "words"),
    [
        (RESNET, ("--tuning", "lora"), "--tuning lora needs two transformers with plain multi-head attention"),
        ({**VISION, "attentional_pool": True, "attn_pooler_heads": 2}, ("--method", "atha"),
         "pools its patches by attention"),
        ({**VISION, "qk_norm": True, "block_type": "custom"}, ("--tuning", "lora"), "--tuning lora needs"),
    ],
    ids=["resnet", "attention pool", "attention of another kind"],
)  # fmt: skip
def test_what_a_folders_model_cannot_do_is_said_before_its_weights_are_read(
    cli, flat, tmp_path, vision, options, words
):
    folder = make_model(tmp_path / "model", vision)
    (folder / "open_clip_model.safetensors").write_bytes(b"never read")
    cli("adapt", flat, "--model", folder, *options).fails(4, words)


# ---- where it runs


def test_a_device_that_computes_nothing_is_refused():
    with pytest.raises(UsageError, match=r"device 'meta' cannot be used here .*--device cpu"):
        devices.resolve_device("meta")
