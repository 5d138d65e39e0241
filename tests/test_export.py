"""`export`: what its consumer reads is the run's model, or nothing is kept."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from conftest import make_classes, picture
from PIL import Image
from safetensors.torch import load_file, save_file

from clipfit import AdaptConfig, ExportConfig, adapt, export
from clipfit.config import outputs
from clipfit.config.edits import EditSettings
from clipfit.errors import ClipfitError
from clipfit.formats import FORMATS, consumer, subject
from clipfit.formats import open_clip as open_clip_format
from clipfit.formats.proof import pictures_of
from clipfit.formats.stored import Stored
from clipfit.formats.subject import in_effect
from clipfit.methods import METHODS
from clipfit.model import loading
from clipfit.model.named import Additions
from clipfit.runs.run import Run, open_run

WEIGHTS = "open_clip_model.safetensors"
SLOW = pytest.mark.slow


def logits(folder: Path, images: list[Path], names: list[str]) -> torch.Tensor:
    """open_clip's logits, with nothing of clipfit in between: (n, C)."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    pixels = torch.stack([preprocess(Image.open(image).convert("RGB")) for image in images])
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")([f"a photo of a {name}" for name in names])
    with torch.no_grad():
        return model.eval().get_logits(pixels, tokens)[0]


def test_the_command_line_knows_every_format():
    assert list(FORMATS) == list(outputs.FORMATS)


@pytest.mark.parametrize("format", [pytest.param(f, marks=SLOW if f in ("onnx", "torch") else ()) for f in FORMATS])
@pytest.mark.parametrize("method", METHODS)
def test_every_format_holds_a_run_of_every_method_or_says_why(cli, models, split, tmp_path, method, format):
    made = cli("adapt", split, "--method", method, "--model", models["vit"], "--output", "run")
    assert made.code == 0, made.stderr
    run = open_run(tmp_path / "run")
    refusal = FORMATS[format].holds(run, in_effect(run, run.alpha), outputs.FORMATS[format].default)
    if METHODS[method].edits(METHODS[method].configure({})) is None:
        assert refusal is None
    for alpha in (run.alpha, 0) if refusal is None else (0,):
        if FORMATS[format].holds(run, in_effect(run, alpha), outputs.FORMATS[format].default):
            continue  # a difference has every α in it
        done = cli("export", "run", "--format", format, "--alpha", alpha, "--json")
        assert done.code == 0, done.stderr
        assert done.document["proof"]["identical_pixels"]["same_labels"] == 6
        assert done.document["largest_difference"] < 1e-3
    if refusal is not None:
        plain = FORMATS[format].holds(run, Additions(), outputs.FORMATS[format].default) is None
        cli("export", "run", "--format", format).fails(
            2,
            f"{format} cannot hold {refusal}",
            "use the run itself, or --alpha 0." if plain else "use the run itself.",
        )


@pytest.mark.parametrize("model", ["vit", "resnet"])
def test_what_open_clip_loads_is_the_runs_model(cli, models, split, model, tmp_path):
    assert cli("adapt", split, "--model", models[model], "--alpha", 0.25, "--output", "run").code == 0
    run, images = open_run(tmp_path / "run"), sorted(split.glob("test/*/*.png"))
    for alpha in (0.0, 0.25, 1.0):
        folder = export(ExportConfig(run.path, alpha=alpha)).output
        written, ours = load_file(folder / WEIGHTS), loading.rebuild(run.source, run.state(alpha))
        assert written.keys() == ours.state().keys()
        assert all(torch.equal(t, ours.state()[name]) for name, t in written.items())
        x = torch.stack([ours.normalize(ours.geometry(Image.open(i).convert("RGB"))[None])[0] for i in images])
        names = ["bee", "cow", "dog", "elk"]
        with torch.no_grad():
            t = ours.encode_text(ours.tokenize([f"a photo of a {name}" for name in names]))
            mine = ours.scale * ours.encode_image(x) @ t.T
        torch.testing.assert_close(logits(folder, images, names), mine, atol=1e-3, rtol=0)


def test_it_goes_beside_the_runs_and_no_run_carries_it(cli, split_run, tmp_path):
    before = sorted(split_run.rglob("*"))
    done = cli("export", split_run, "--alpha", 1, "--json")
    assert done.document["output"] == "exports/animals-cite-open_clip-1"
    folder = tmp_path / done.document["output"]
    assert {p.name for p in folder.iterdir()} >= {WEIGHTS, "open_clip_config.json", "clipfit.json", "proof.json"}
    assert sorted(split_run.rglob("*")) == before
    assert json.loads((folder / "proof.json").read_text()) == done.document["proof"]
    assert json.loads((folder / "clipfit.json").read_text())["alpha"] == 1


def test_exporting_twice(cli, split_run, tmp_path):
    assert cli("export", split_run, "--output", "out").code == 0
    cli("export", split_run, "--output", "out").fails(2, "out exists already", "--overwrite")
    assert cli("export", split_run, "--output", "out", "--overwrite", "--alpha", 1).code == 0
    assert json.loads((tmp_path / "out" / "clipfit.json").read_text())["alpha"] == 1


def test_replacing_an_export_keeps_what_clipfit_did_not_write(cli, split_run, tmp_path):
    assert cli("export", split_run).code == 0
    (tmp_path / "exports" / "animals-cite-open_clip-0.5" / "mine.txt").write_text("notes")
    done = cli("export", split_run, "--overwrite")
    assert done.code == 0, done.stderr
    assert (tmp_path / "exports" / "animals-cite-open_clip-0.5.old-1" / "mine.txt").read_text() == "notes"
    assert "animals-cite-open_clip-0.5.old-1" in done.stderr


def test_an_export_can_be_adapted_again(cli, split_run, flat):
    assert cli("export", split_run, "--output", "out").code == 0
    made = cli("adapt", flat, "--model", "local-dir:out", "--json")
    assert made.code == 0, made.stderr
    assert made.document["steps"] == 6  # two epochs of twelve images, four a step: the recipe came along


def test_the_activation_survives_a_run_and_its_export(cli, models, flat):
    assert cli("adapt", flat, "--model", models["quick"]).code == 0
    assert cli("export", "--output", "out").code == 0
    model = open_clip.create_model_and_transforms("local-dir:out")[0]
    assert {type(m).__name__ for m in model.modules() if "GELU" in type(m).__name__} == {"QuickGELU"}


# --- the proof


def test_the_consumer_is_a_process_of_its_own(split_run, consumers_run_here, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(consumer, "start", consumers_run_here)
    proof = export(ExportConfig(split_run)).proof
    assert proof.consumer == f"open_clip {open_clip.__version__}"
    assert proof.identical_pixels.images == proof.identical_pixels.same_labels == 6


def test_a_consumer_that_fails_is_one_sentence(consumers_run_here, tmp_path):
    script = tmp_path / "script" / "fails.py"
    script.parent.mkdir()
    script.write_text("print('noise')\nraise SystemExit('no such layer')\n")
    with pytest.raises(ClipfitError, match=r"cannot be read back \(no such layer\); it is not kept"):
        consumers_run_here(script, [], tmp_path)


@pytest.fixture
def before_reading(monkeypatch):
    """Do something to the exported folder after it is checked and before its consumer reads it."""
    start = consumer.start

    def doing(change) -> None:
        def changed(script, arguments, exchange):
            change(Path(arguments[0]))
            start(script, arguments, exchange)

        monkeypatch.setattr(consumer, "start", changed)

    return doing


def nothing_is_left(tmp_path: Path) -> bool:
    return not list(tmp_path.iterdir())


def test_another_model_is_not_kept(cli, split_run, before_reading, tmp_path):
    def damage(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        save_file({**state, "visual.proj": state["visual.proj"].roll(1, 0)}, folder / WEIGHTS)

    before_reading(damage)
    cli("export", split_run).fails(1, "reads another model", "logits differ by up to", "not kept")
    assert nothing_is_left(tmp_path)


def test_weights_that_are_no_number_are_not_kept(cli, split_run, before_reading, tmp_path):
    def damage(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        save_file({**state, "visual.proj": state["visual.proj"] * torch.nan}, folder / WEIGHTS)

    before_reading(damage)
    cli("export", split_run).fails(1, "reads another model")
    assert nothing_is_left(tmp_path)


@pytest.mark.parametrize(
    "change", [{"mean": [0.5, 0.5, 0.5]}, {"interpolation": "bilinear"}, {"resize_mode": "squash"}]
)
def test_another_preprocessing_is_not_kept(cli, split_run, before_reading, tmp_path, change):
    def damage(folder: Path) -> None:
        record = json.loads((folder / "open_clip_config.json").read_text())
        record["preprocess_cfg"].update(change)
        (folder / "open_clip_config.json").write_text(json.dumps(record))

    before_reading(damage)
    cli("export", split_run).fails(1, "preprocesses pictures in another way")
    assert nothing_is_left(tmp_path)


def test_what_no_logit_shows_is_compared_too(cli, split_run, tmp_path, monkeypatch):
    """The embedding of a word that no class text has; and the recorded ratio."""
    usual = open_clip_format.files.write_tensors

    def damaged(path, state, about):
        if "token_embedding.weight" in state:
            state = {**state, "token_embedding.weight": state["token_embedding.weight"].clone()}
            state["token_embedding.weight"][12345] += 1
        usual(path, state, about)

    with monkeypatch.context() as patch:
        patch.setattr(open_clip_format.files, "write_tensors", damaged)
        cli("export", split_run).fails(1, "other tensors than were written")
    describe = subject.describe
    monkeypatch.setattr(subject, "describe", lambda *told: {**describe(*told), "alpha": 0.9})
    cli("export", split_run).fails(1, "records α = 0.9, but 0.5 was asked for")
    assert nothing_is_left(tmp_path)


def stored_in_every_way(root: Path) -> Path:
    """Two classes of pictures that open_clip's own transform makes others of, and one it does not, in each."""
    for c, name in enumerate(("cat", "dog")):
        folder = root / name
        folder.mkdir(parents=True)
        images = [picture(100 * c + k, (48, 40)) for k in range(5)]
        images[0].save(folder / "plain.png")
        images[1].quantize(16).save(folder / "palette.png")
        half = Image.fromarray(np.tile(np.linspace(0, 255, 48).astype(np.uint8), (40, 1)))
        images[2].putalpha(half)
        images[2].save(folder / "transparent.png")
        exif = Image.Exif()
        exif[0x0112] = 6
        images[3].save(folder / "turned.jpg", exif=exif, quality=95)
        deep = np.asarray(images[4].convert("L")).astype(np.uint16) * 257
        Image.fromarray(deep).save(folder / "deep.png")
    return root


def test_files_that_open_clip_sees_otherwise_are_named_and_no_reason_to_refuse(cli, models, tmp_path):
    data = stored_in_every_way(tmp_path / "pets")
    assert cli("adapt", data, "--model", models["vit"], "--output", "run").code == 0
    done = cli("export", "run", "--json")
    assert done.code == 0, done.stderr
    proof = done.document["proof"]
    assert proof["pictures"] == "shots"
    assert proof["identical_pixels"]["images"] == proof["files"]["images"] == 10
    assert proof["identical_pixels"]["same_labels"] == 10
    assert proof["files"]["largest_difference"] > 1e-3
    found = {file["path"]: file for file in proof["seen_otherwise"]}
    assert set(found) == {f"pets/{c}/{n}" for c in ("cat", "dog")
                          for n in ("palette.png", "transparent.png", "turned.jpg", "deep.png")}  # fmt: skip
    for name, reason, advice in (
        ("palette.png", "palette", '.convert("RGB")'), ("transparent.png", "transparent", "on white"),
        ("turned.jpg", "EXIF", "exif_transpose"), ("deep.png", "more than 8 bits", "scale it to 8 bits"),
    ):  # fmt: skip
        assert reason in found[f"pets/cat/{name}"]["reason"]
        assert advice in found[f"pets/cat/{name}"]["advice"]
    note = next(line for line in done.stderr.splitlines() if "palette.png" in line)
    assert "and 1 more" in note
    assert '.convert("RGB")' in note


def test_a_file_that_only_clipfit_opens_is_named(cli, split_run, before_reading, split, monkeypatch):
    opened = Image.open

    def refusing(file, *rest, **named):
        if str(file).endswith("train/cow/1.png"):
            raise OSError("no decoder")
        return opened(file, *rest, **named)

    before_reading(lambda folder: monkeypatch.setattr(Image, "open", refusing))
    monkeypatch.setattr("clipfit.formats.proof.stored", lambda path: Stored("is odd", "do something"))
    done = cli("export", split_run, "--json")
    assert done.code == 0, done.stderr
    proof = done.document["proof"]
    assert proof["files"] == {**proof["files"], "images": 5, "same_labels": 5}
    assert proof["seen_otherwise"][0]["path"] == "train/cow/1.png"
    assert "cannot be opened there (OSError: no decoder)" in proof["seen_otherwise"][0]["reason"]


def test_without_the_shots_random_pictures_prove_it_and_that_is_said(cli, models, split, tmp_path):
    shutil.copytree(split, tmp_path / "animals")
    assert cli("adapt", "animals", "--model", models["vit"], "--output", "run").code == 0
    picture(4711).save(tmp_path / "animals" / "train" / "cow" / "0.png")  # another one by now
    proof = cli("export", "run", "--json").document["proof"]
    assert (proof["pictures"], proof["identical_pixels"]["images"]) == ("shots", 5)
    (tmp_path / "animals").rename(tmp_path / "elsewhere")
    done = cli("export", "run", "--overwrite", "--json")
    assert done.code == 0, done.stderr
    proof = done.document["proof"]
    assert (proof["pictures"], proof["files"], proof["seen_otherwise"]) == ("random", None, [])
    assert proof["identical_pixels"]["images"] == proof["identical_pixels"]["same_labels"] == 8
    assert "random pictures, for no shot is where it was" in done.stderr


def test_no_more_than_64_shots_are_taken_of_all_classes_alike(models, tmp_path):
    make_classes(tmp_path / "many", {"cat": 30, "dog": 30, "elk": 30, "yak": 3})
    run = open_run(adapt(AdaptConfig(tmp_path / "many", model=models["vit"], output=tmp_path / "run",
                                     recipe={"epochs": 1, "batch_size": 32})).run)  # fmt: skip
    shown = pictures_of(run, loading.rebuild(run.source, run.state(run.alpha)))
    assert len(shown.images) == len(shown.files) == 64
    counts = Counter(Path(name).parent.name for name in shown.names)
    assert counts["yak"] == 3
    assert sorted(counts.values()) == [3, 20, 20, 21]


# --- what a format cannot hold


@dataclass(frozen=True)
class Claimed(Run):
    """A run that says its fine-tuned tensors are these."""

    tensors: tuple[tuple[str, torch.Tensor], ...] = ()

    def finetuned(self) -> dict[str, torch.Tensor]:
        return dict(self.tensors)


def claimed(run: Run, additions: Additions, tensors: dict[str, torch.Tensor]) -> Run:
    class Added(Claimed):
        pass

    Added.additions = additions  # type: ignore[misc]
    facts = {name: getattr(run, name) for name in Run.__dataclass_fields__}
    return Added(**facts, tensors=tuple(tensors.items()))


def test_additions_count_where_they_make_a_difference(split_run):
    none, some = torch.zeros(2), torch.tensor([0.0, 0.5])

    def effect(alpha: float, settings: EditSettings, head: torch.Tensor, tail: torch.Tensor) -> Additions:
        tensors = {"clipfit.head": head, "clipfit.tail": tail}
        return in_effect(claimed(open_run(split_run), Additions(settings), tensors), alpha)

    both, tail_only = EditSettings(), EditSettings(head_ratio=0.0)
    assert effect(0.5, both, none, none) == Additions()
    assert effect(0.5, both, some, none) == effect(0.5, both, none, some) == Additions(both)
    assert effect(0.0, both, some, some) == Additions()
    assert effect(1.0, tail_only, some, none) == Additions()
    assert effect(1.0, tail_only, some, some) == Additions(tail_only)


def test_context_vectors_count_where_they_left_their_words(split_run):
    words, table = Additions(context="a photo of a "), torch.arange(49408.0)[:, None].repeat(1, 4)
    ids = open_clip.SimpleTokenizer(context_length=16)(["a photo of a"])[0, 1:5]

    def effect(context: torch.Tensor) -> Additions:
        tensors = {"clipfit.context": context, "token_embedding.weight": table}
        return in_effect(claimed(open_run(split_run), words, tensors), 0.5)

    assert effect(table[ids]) == Additions()
    assert effect(table[ids] + 1e-3) == words


def test_what_a_format_cannot_hold_is_refused_before_anything_is_computed(cli, split, models, tmp_path, monkeypatch):
    assert cli("adapt", split, "--method", "atha", "--model", models["vit"], "--output", "run").code == 0

    def computed(*_args, **_named):
        raise AssertionError("a model was built")

    monkeypatch.setattr(loading, "rebuild", computed)
    cli("export", "run").fails(2, "the format open_clip cannot hold edits of patch tokens", "use the run itself")
    assert not (tmp_path / "exports").exists()


def test_edits_of_no_patches_make_no_difference(cli, split, models):
    told = ("--head-ratio", 0, "--tail-ratio", 0)
    assert cli("adapt", split, "--method", "atha", "--model", models["vit"], *told, "--output", "run").code == 0
    done = cli("export", "run", "--json")
    assert done.code == 0, done.stderr
    assert done.document["proof"]["identical_pixels"]["same_labels"] == 6


def test_the_format_that_can_is_named(cli, split, models, monkeypatch):
    class Everything:
        name = "everything"

        def holds(self, run, additions, options):
            return None

    assert cli("adapt", split, "--method", "atha", "--model", models["vit"], "--output", "run").code == 0
    monkeypatch.setitem(FORMATS, "everything", Everything())
    monkeypatch.setitem(outputs.FORMATS, "everything", outputs.Takes("anything"))
    cli("export", "run").fails(2, "cannot hold edits of patch tokens", "--format everything can hold it")
