"""`clipfit.load`: a run, an export or a model as an object that names pictures."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image
from test_docs import IN_PAGES, ROOT, blocks
from test_predict import images

import clipfit
from clipfit import AdaptConfig, DataError, UsageError, adapt


@pytest.fixture(scope="module")
def atha_run(split: Path, models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Edits and learnt context; never written to."""
    output = tmp_path_factory.mktemp("runs") / "animals-atha"
    return adapt(AdaptConfig(split, method="atha", model=models["vit"], output=output, context=True)).run


def test_images_as_paths_pictures_and_arrays(split_run, tmp_path):
    images(tmp_path, 2)
    model = clipfit.load(split_run)
    paths = [tmp_path / "0.png", str(tmp_path / "1.png")]
    expected = model.logits(paths)
    assert (expected.shape, model.classes) == ((2, 3), ("bee", "cow", "dog"))
    torch.testing.assert_close(model.logits([picture(0), np.asarray(picture(1))]), expected, rtol=0, atol=0)
    first, second = model.predict(paths, top=1)
    assert (first.label, first.top) == (model.predict(paths[0])[0].label, ((first.label, first.probability),))
    assert second.probability == pytest.approx(expected[1].softmax(0).max().item(), rel=1e-6)
    u, t = model.embed_images(paths), model.embed_texts([f"a photo of a {name}" for name in model.classes])
    torch.testing.assert_close(model.clip.scale * u @ t.T, expected)
    torch.testing.assert_close(model.logits(paths, ["dog", "bee"]), expected[:, [2, 0]])
    with pytest.raises(DataError, match="uint8"):
        model.predict(np.zeros((4, 4, 3), np.float32))
    with pytest.raises(DataError, match=r"gone\.png"):
        model.predict(tmp_path / "gone.png")
    assert (model.predict([]), model.logits([]).shape) == ([], (0, 3))


def test_an_export_of_which_a_byte_was_flipped_is_refused(cli, split, split_run, tmp_path):
    images(tmp_path, 1)
    folder = tmp_path / cli("export", split_run, "--json").document["output"]
    file = folder / "open_clip_model.safetensors"
    data = file.read_bytes()
    assert clipfit.load(folder).predict(tmp_path / "0.png")
    for at in (len(data) // 2, len(data) - 1):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        words = ("open_clip_model.safetensors is not as clipfit exported it: expected SHA-256", "copy the export again")
        cli("predict", folder, "0.png").fails(4, *words)
        cli("adapt", split, "--model", folder).fails(4, *words)
    file.write_bytes(data)
    assert clipfit.load(folder).predict(tmp_path / "0.png")


WHOLE = {"safetensors": "model.safetensors", "difference": "difference.safetensors"}


@pytest.mark.parametrize("format", WHOLE)
def test_an_export_in_one_file_predicts_as_its_run_does(cli, split_run, tmp_path, format):
    images(tmp_path, 4)
    paths = [tmp_path / f"{k}.png" for k in range(4)]
    folder = tmp_path / cli("export", split_run, "--format", format, "--json").document["output"]
    run, model = clipfit.load(split_run), clipfit.load(folder)
    assert (model.classes, model.template, model.alpha) == (run.classes, run.template, 0.5)
    torch.testing.assert_close(model.logits(paths), run.logits(paths), atol=1e-2, rtol=0)
    rows = [cli("predict", source, *paths).stdout.splitlines() for source in (folder, split_run)]
    assert [json.loads(line)["label"] for line in rows[0]] == [json.loads(line)["label"] for line in rows[1]]
    with pytest.raises(UsageError, match="has its own weights"):
        clipfit.load(folder, pretrained="openai")


def test_a_difference_is_taken_at_any_ratio(cli, split_run, tmp_path):
    images(tmp_path, 1)
    image = tmp_path / "0.png"
    folder = tmp_path / cli("export", split_run, "--format", "difference", "--json").document["output"]
    run, model = clipfit.load(split_run), clipfit.load(folder, classes=["a", "b"], template="my {}")
    for alpha in (0.0, 0.3, 1.0):
        other = model.at(alpha)
        assert (other.alpha, other.classes, other.template) == (alpha, ("a", "b"), "my {}")
        mine = clipfit.load(folder, alpha=alpha).logits(image)
        torch.testing.assert_close(mine, run.at(alpha).logits(image), atol=1e-2, rtol=0)
        torch.testing.assert_close(other.logits(image, run.classes), clipfit.load(folder, alpha=alpha,
                                   template="my {}").logits(image), atol=0, rtol=0)  # fmt: skip
    assert cli("predict", folder, image, "--alpha", 0.3).code == 0
    whole = tmp_path / cli("export", split_run, "--format", "safetensors", "--json").document["output"]
    cli("predict", whole, image, "--alpha", 0.3).fails(2, "neither a run nor an export in the format difference")


@pytest.mark.parametrize("format", WHOLE)
def test_a_byte_flipped_in_one_file_is_noticed_wherever_it_lies(cli, split_run, tmp_path, format):
    """In the header with the classes, in the tensors, in the list of digests; and where that list is gone."""
    images(tmp_path, 1)
    folder = tmp_path / cli("export", split_run, "--format", format, "--json").document["output"]
    for name in (WHOLE[format], "files.json"):
        data = (folder / name).read_bytes()
        for at in (len(data) // 100, data.find(b"cow" if name != "files.json" else WHOLE[format].encode()), -2):
            flipped = bytearray(data)
            flipped[at] ^= 1
            (folder / name).write_bytes(flipped)
            cli("predict", folder, "0.png").fails(4, name if name == "files.json" else f"{folder.name}/")
        (folder / name).write_bytes(data)
    assert cli("predict", folder, "0.png").code == 0
    (folder / "files.json").unlink()
    cli("predict", folder, "0.png").fails(4, "files.json")


@pytest.mark.parametrize("format", ["onnx", "torch", "transformers"])
def test_an_export_that_clipfit_does_not_read_is_named(cli, split_run, tmp_path, format):
    pytest.importorskip("onnxruntime" if format == "onnx" else "torch" if format == "torch" else "transformers")
    images(tmp_path, 1)
    part = () if format == "transformers" else ("--part", "text")
    folder = cli("export", split_run, "--format", format, *part, "--json").document["output"]
    cli("predict", folder, "0.png").fails(2, f"is an export in the format {format}", "safetensors or difference")


def test_at_another_ratio(split_run, models, tmp_path):
    images(tmp_path, 1)
    model = clipfit.load(split_run)
    assert model.alpha == 0.5
    assert model.at(0.5) is model
    zero = clipfit.load(models["vit"], classes=model.classes)
    torch.testing.assert_close(model.at(0).logits(tmp_path / "0.png"), zero.logits(tmp_path / "0.png"))
    with pytest.raises(UsageError, match="no other ratio"):
        zero.at(1)
    with pytest.raises(UsageError, match="no classes"):
        clipfit.load(models["vit"]).predict(tmp_path / "0.png")


NO_RATIO = {
    2: "lie between 0 and 1; found 2.0",
    -1: "lie between 0 and 1; found -1.0",
    float("nan"): "lie between 0 and 1; found nan",
    "auto": "be of type float; found 'auto'",
    "0.3": "be of type float; found '0.3'",
}


@pytest.mark.parametrize(("alpha", "words"), NO_RATIO.items())
def test_a_ratio_is_what_the_command_line_takes(split_run, alpha, words):
    model = clipfit.load(split_run)
    for take in (model.at, lambda given: clipfit.load(split_run, alpha=given)):
        with pytest.raises(UsageError, match=f"^alpha must {words}"):
            take(alpha)
    with pytest.raises(UsageError, match="found None"):
        model.at(None)
    assert model.at(np.float32(0.25)).alpha == 0.25


NO_CLASSES = {
    "one text": ("cat", r"must be a list of names, as \['cat', 'dog'\]; found 'cat'\.$"),
    "a file": (Path("classes.txt"), r"must be a list of names, .* found .*classes\.txt"),
    "none": ([], r"must be a list of names, .* found \[\]"),
    "numbers": ([1, 2], "must be a list of names, .* found 1, 2"),
    "one twice": (["cat", "dog", "cat"], "names 'cat' twice"),
    "two spellings": (["Cat", "cat"], "'Cat' and 'cat' are both called 'cat'"),
    "empty": (["cat", " "], "gives ' ' an empty name"),
    "no character": (["cat", "\ud800"], "a name that is no UTF-8"),
}


@pytest.mark.parametrize(("classes", "words"), NO_CLASSES.values(), ids=NO_CLASSES)
def test_classes_are_a_list_of_names_each_once(split_run, models, classes, words):
    """As a class file is; wherever they are given, and before a model is loaded."""
    model = clipfit.load(split_run)
    for take in (
        model.among,
        model.candidates,
        lambda given: model.logits(picture(0), given),
        lambda given: model.predict(picture(0), classes=given),
        lambda given: clipfit.load("nothing", classes=given),
    ):
        with pytest.raises(UsageError, match=words):
            take(classes)
    for names in (("cat", "dog"), ("cat", "\x1b[2J")):  # adapt takes a folder that is called so
        assert model.among(name for name in names).classes == names


def test_what_is_no_image_no_text_or_no_count_is_said(split_run):
    model = clipfit.load(split_run)
    for thing in (b"bytes", None, 3, torch.zeros(3, 8, 8), torch.tensor(3)):
        for given in (thing, [thing]):
            with pytest.raises(UsageError, match=f"a path, a PIL picture, or a uint8 .* found {type(thing).__name__}"):
                model.predict(given)
    for texts in (None, b"a cat", [3]):
        with pytest.raises(UsageError, match="one text or a list of them; found"):
            model.embed_texts(texts)
    assert model.embed_texts([]).shape == model.embed_images([]).shape == (0, 32)
    for top in (0, -1):
        with pytest.raises(UsageError, match=rf"^top must be at least 1; found {top}\.$"):
            model.predict(picture(0), top=top)
    assert len(model.predict(picture(0), top=np.int64(2))[0].top) == 2


WRONG = [
    ({"precision": "fp8"}, "precision must be one of auto, fp32, bf16; found 'fp8'"),
    ({"runtime": "jax"}, "runtime must be one of torch, onnxruntime, openvino; found 'jax'"),
    ({"device": None}, "device must be of type str; found None"),
    ({"template": "a cat"}, "templates must have {}"),
    ({"templates": [1]}, "templates must be at least one sentence with {} for the class name; found [1]"),
]


@pytest.mark.parametrize(("given", "words"), WRONG)
def test_options_of_load_are_what_the_command_line_takes(split_run, given, words):
    with pytest.raises(UsageError) as caught:
        clipfit.load(split_run, **given)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("runs/none", "there is no run, export or model 'runs/none'; a model of the .* hub is called hf-hub:runs/none"),
        ("my/runs/none", "there is no run, export or model 'my/runs/none'"),
        (None, "named by a path or a text; found NoneType"),
    ],
)
def test_what_is_no_model_is_said_in_words_of_python(source, words):
    with pytest.raises(UsageError, match=words) as caught:
        clipfit.load(source)
    assert "--" not in str(caught.value)


def test_a_model_says_what_it_is(split_run):
    assert repr(clipfit.load(split_run, device="cpu")) == f"Predictor({split_run}, α = 0.5, 3 classes, cpu)"
    assert repr(clipfit.load("clipfit-tiny", device="cpu")) == "Predictor(clipfit-tiny, 0 classes, cpu)"


def test_candidates_change_what_atha_sees(atha_run, split_run, tmp_path):
    """Embeddings depend on all classes of the comparison there, and on none elsewhere; learnt context fixes its
    template."""
    images(tmp_path, 1)
    edited, plain = clipfit.load(atha_run, alpha=1), clipfit.load(split_run)
    image, fewer = tmp_path / "0.png", ["bee", "cow"]
    assert not torch.equal(edited.logits(image)[:, :2], edited.logits(image, fewer))
    assert not torch.equal(edited.embed_images(image), edited.embed_images(image, fewer))
    torch.testing.assert_close(plain.logits(image)[:, :2], plain.logits(image, fewer))
    assert torch.equal(plain.embed_images(image), plain.embed_images(image, fewer))
    with pytest.raises(UsageError, match="were learnt"):
        edited.among(fewer, "a {}")


def test_threads_that_read_see_the_same(atha_run, tmp_path):
    images(tmp_path, 4)
    model = clipfit.load(atha_run, alpha=1)
    alone = [model.logits(tmp_path / f"{k % 4}.png", [["bee", "cow"], None][k % 2]) for k in range(16)]
    with ThreadPoolExecutor(8) as pool:
        shared = list(
            pool.map(lambda k: model.logits(tmp_path / f"{k % 4}.png", [["bee", "cow"], None][k % 2]), range(16))
        )
    assert all(map(torch.equal, alone, shared))


def test_threads_share_a_model_that_has_other_classes_too(atha_run, tmp_path):
    """Edits hang on the model while it encodes: those of one thread are none of another's."""
    images(tmp_path, 4)
    one = clipfit.load(atha_run, alpha=1)
    both = (one, one.among(["red car", "blue door", "tall tree"]))
    views = torch.stack([one.view(tmp_path / f"{k}.png") for k in range(4)])
    candidates = [model.candidates() for model in both]
    alone = [model.judged(views, them)[1] for model, them in zip(both, candidates, strict=True)]
    with ThreadPoolExecutor(8) as pool:
        shared = list(pool.map(lambda k: both[k % 2].judged(views, candidates[k % 2])[1], range(60)))
    assert [torch.equal(logits, alone[k % 2]) for k, logits in enumerate(shared)] == [True] * 60


def test_an_image_is_seen_as_in_training(split_run, tmp_path):
    """By the model's own geometry, of the upright picture."""
    model = clipfit.load(split_run)
    sideways = picture(5)
    exif = sideways.getexif()
    exif[0x0112] = 6
    sideways.save(tmp_path / "turned.png", exif=exif)
    upright = sideways.transpose(Image.Transpose.ROTATE_270)
    torch.testing.assert_close(model.view(tmp_path / "turned.png"), model.clip.geometry(upright), rtol=0, atol=0)


def test_the_python_of_the_page_runs(split_run, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (code,) = blocks(IN_PAGES["docs/predict.md"], "python")
    assert '"runs/example"' in code
    seen: dict = {}
    exec(compile(code.replace('"runs/example"', repr(str(split_run))), "docs/predict.md", "exec"), seen)
    assert capsys.readouterr().out.count("\n") == 2
    assert (seen["logits"].shape, seen["similarity"].shape, seen["zero_shot"].alpha) == ((1, 2), (1, 1), 0)
