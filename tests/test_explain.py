"""`explain`: the pictures show what the model really went by, on the photograph, to people who know no patches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_classes, picture
from PIL import Image, ImageFont

from clipfit import AdaptConfig, ExplainConfig, adapt, explain
from clipfit.data.images import decode
from clipfit.measure import scoring
from clipfit.model import loading
from clipfit.model.named import Additions
from clipfit.model.patches import View, likeness, view_of
from clipfit.prompts import prompts
from clipfit.report import lettering
from clipfit.report import picture as drawing
from clipfit.runs.run import open_run
from clipfit.verbs import explain as verb
from clipfit.verbs.explain import Edits, Explanation

OPTIONS = {"head_ratio": 0.25, "tail_ratio": 0.125, "head_strength": 0.9, "tail_strength": 0.4, "strength_rate": 0.05}


@pytest.fixture(scope="module")
def atha_run(split, models, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "animals-atha"
    config = AdaptConfig(split, method="atha", model=models["vit"], alpha=1.0, output=output, method_options=OPTIONS)
    return adapt(config).run


@pytest.fixture
def image(split):
    return next((split / "test/elk").iterdir())


def found_by(run, image, output, **told) -> Explanation:
    kept: list[Explanation] = []

    def keep(explanation):
        kept.append(explanation)
        return drawing.picture(explanation)

    explain(ExplainConfig(run, (image,), output=output, **told), keep)
    return kept[0]


# --- what is found


def test_what_is_drawn_is_what_the_blocks_went_by(atha_run, image, tmp_path):
    """m, its class, head and tail from the tokens that come to the blocks of a forward pass of its own."""
    found = found_by(atha_run, image, tmp_path / "out", blocks=(0, 1))
    run = open_run(atha_run)
    model = loading.rebuild(run.source, run.state(1.0), run.additions)
    tokens = model.tokenize(prompts(run.base, run.template))
    x = model.normalize(model.geometry(Image.open(image).convert("RGB"))[None])
    came: list[torch.Tensor] = []
    for block in model.model.visual.transformer.resblocks:
        block.register_forward_pre_hook(lambda _module, args: came.append(args[0]))
    with torch.no_grad():
        texts = model.read(tokens)
        u = model.encode_image(x, texts.class_tokens)
    assert found.classes == ("bee", "cow", "dog")
    expected = (model.scale * u @ texts.embeddings.T).softmax(1)[0].tolist()
    assert found.probabilities == pytest.approx(expected, abs=1e-6)
    assert found.best == max(range(3), key=expected.__getitem__)
    assert (found.edits.head, found.edits.tail) == (tuple(model.edits.head.tolist()), tuple(model.edits.tail.tolist()))
    assert found.grid == (4, 4)
    for block, look in found.edits.looks.items():
        s = torch.nn.functional.cosine_similarity(came[block][0, 1:, None], texts.class_tokens[None], dim=2)  # (16, 3)
        torch.testing.assert_close(look.similarity, s.amax(1), atol=1e-5, rtol=0)
        assert torch.equal(look.best, s.argmax(1))
        order = s.amax(1).argsort(descending=True)
        assert set(look.head.nonzero()[:, 0].tolist()) == set(order[:4].tolist())
        assert set(look.tail.nonzero()[:, 0].tolist()) == set(order[-2:].tolist())


def test_likeness_is_that_of_the_final_features_to_the_predicted_text(split_run, image, tmp_path):
    """By open_clip's own access to intermediate features, and a loop."""
    found = found_by(split_run, image, tmp_path / "out")
    run = open_run(split_run)
    model = loading.rebuild(run.source, run.state(run.alpha))
    x = model.normalize(model.geometry(Image.open(image).convert("RGB"))[None])
    with torch.no_grad():
        last = model.model.visual.forward_intermediates(
            x, indices=1, normalize_intermediates=True, intermediates_only=True, output_fmt="NLC"
        )["image_intermediates"][-1][0]  # (16, V)
        text = model.encode_text(model.tokenize([f"a photo of a {run.base[found.best]}"]))[0]
        patches = last @ model.model.visual.proj
        expected = [float(patch @ text / patch.norm()) for patch in patches]
    assert found.likeness.tolist() == pytest.approx(expected, abs=1e-5)
    assert found.edits is None
    assert found.text_of(found.best) == f"a photo of a {run.base[found.best]}"


def test_likeness_goes_by_the_edited_patches(atha_run, image):
    run = open_run(atha_run)
    edited = loading.rebuild(run.source, run.state(1.0), run.additions)
    plain = edited.with_additions(Additions())
    x = edited.normalize(edited.geometry(decode(image))[None])
    found = [likeness(model, x, scoring.texts(model, run.base, run.template)) for model in (edited, plain)]
    assert found[0].shape == (1, 16, 3)
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(300, 200), (200, 330), (256, 256), (40, 90)])
def test_the_part_that_a_model_sees_is_the_part_that_is_shown(models, mode, size):
    """A picture whose red and green say where a pixel was, through the model's own geometry."""
    made = loading.load(models["vit"])
    source = replace(made.source, preprocess_cfg={**made.source.preprocess_cfg, "resize_mode": mode})
    model = loading.rebuild(source, made.state())
    across, down = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    photo = Image.fromarray(np.stack([across, down, np.full_like(down, 255)], 2).astype(np.uint8))
    seen = model.geometry(photo).float()  # (3, 32, 32)
    view, count = view_of(source, *size), seen.shape[1]
    for channel, (start, end, length) in enumerate(
        ((view.left, view.right, size[0]), (view.top, view.bottom, size[1]))
    ):
        places = start + (torch.arange(count) + 0.5) * (end - start) / count  # in pixels of the photograph
        came = seen[channel].amax(channel) if mode == "longest" else seen[channel].mean(channel)
        inside = (places > 0.06 * length) & (places < 0.94 * length)
        assert inside.sum() >= 8
        torch.testing.assert_close(came[inside], 255 * (places[inside] - 0.5) / (length - 1), atol=5, rtol=0)


def test_patches_tile_the_part_that_is_seen():
    view = View(10, 0, 90, 40)
    assert view.patch(0, (2, 4)) == View(10, 0, 30, 20)
    assert view.patch(7, (2, 4)) == View(70, 20, 90, 40)


# --- what is drawn


def explanation(**changed) -> Explanation:
    """A photograph of 40 × 80 pixels, of which the model sees the middle square, as 4 × 4 patches."""
    return replace(
        Explanation(
            image=Path("cow.jpg"), model="a run", photo=Image.new("RGB", (40, 80), (90, 140, 90)),
            view=View(0, 20, 40, 60), classes=("bee", "cow", "dog"), template="a photo of a {}",
            probabilities=(0.1, 0.7, 0.2), grid=(4, 4), likeness=torch.arange(16.0), edits=None,
        ),
        **changed,
    )  # fmt: skip


def test_the_photograph_is_tinted_where_the_model_sees_it_and_faded_elsewhere():
    found = explanation()
    panel = drawing.likeness_panel(found)
    assert panel.size == (drawing.PHOTO // 2, drawing.PHOTO)
    cell = panel.width / 4
    warmth = []
    for i in range(16):
        row, column = divmod(i, 4)
        red, _, blue = panel.getpixel((int((column + 0.5) * cell), int(panel.width / 2 + (row + 0.5) * cell)))
        warmth.append(red - blue)
    assert warmth == sorted(warmth)
    assert warmth[0] < 0 < warmth[-1]
    for y in (5, panel.height - 5):  # above and below the middle
        assert min(panel.getpixel((panel.width // 2, y))) > 180
    whole = drawing.likeness_panel(explanation(view=View(0, 0, 40, 80)))
    assert min(whole.getpixel((whole.width // 2, 5))) < 180


def test_frames_and_bars_stand_where_they_belong(atha_run, image, tmp_path):
    found = found_by(atha_run, image, tmp_path / "out", blocks=(1,))
    look = found.edits.looks[1]
    panel = drawing.block_panel(found, look)
    ratio = panel.width / found.photo.width
    for i in range(16):
        part = found.view.patch(i, found.grid)
        x, y = round(part.left * ratio) + 1, round((part.top + part.bottom) / 2 * ratio)
        assert (panel.getpixel((x, y)) == drawing.HEAD) == bool(look.head[i])
        assert (panel.getpixel((x, y)) == drawing.TAIL) == bool(look.tail[i])
    chart = drawing.strengths(Edits({}, head=(0.5, 0.1), tail=(0.2, 0.3)))
    middle = chart.height // 2
    above, below = (chart.crop((0, top, chart.width, top + middle - 2)) for top in (0, middle + 2))

    def count(part: Image.Image, colour: tuple[int, int, int]) -> int:
        return sum(n for n, c in part.getcolors(1 << 16) if c == colour)

    assert count(above, drawing.HEAD) > 0
    assert count(below, drawing.TAIL) > 0
    assert count(above, drawing.TAIL) == count(below, drawing.HEAD) == 0


def test_blocks_and_strengths_belong_to_atha(atha_run, split_run, image, tmp_path, cli):
    plain = found_by(split_run, image, tmp_path / "a")
    edited = found_by(atha_run, image, tmp_path / "b")
    assert plain.edits is None
    assert list(edited.edits.looks) == [0, 1]
    assert drawing.picture(edited).height > drawing.picture(plain).height + drawing.SMALL
    cli("explain", split_run, image, "--blocks", "0").fails(2, "--blocks belongs to runs that edit patches", "cite")


@pytest.fixture
def said(monkeypatch):
    """Every text that is drawn."""
    texts: list[str] = []
    usual = drawing.text

    def kept(words, *rest, **named):
        texts.append(words)
        return usual(words, *rest, **named)

    monkeypatch.setattr(drawing, "text", kept)
    return texts


def test_it_says_what_is_seen_in_words_for_anyone(said):
    drawing.picture(explanation())
    whole = " ".join(said)
    for words in ('cow.jpg: taken for "cow" (70.0%)', "20.0% dog", "faded part is cut off", '"a photo of a cow"',
                  "least", "most", "16", "not reasons"):  # fmt: skip
        assert words in whole.replace("4 x 4", "16")
    assert "ATHA" not in whole
    said.clear()
    drawing.picture(explanation(probabilities=(0.0, 0.99999, 0.00001), view=View(0, 0, 40, 80)))
    whole = " ".join(said)
    assert 'taken for "cow" (>99.9%)' in whole
    assert "<0.1% dog" in whole
    assert "cut off" not in whole


def test_of_many_classes_the_first_are_named_and_the_others_counted(said):
    names = tuple(f"class {c}" for c in range(30))
    drawing.picture(explanation(classes=names, probabilities=(0.1,) * 5 + (0.02,) * 25))
    assert [words for words in said if "% class " in words] == [f"10.0% class {c}" for c in range(5)]
    assert "25 other classes: 50.0% together" in said


def test_any_name_can_be_drawn_and_stays_within_the_picture():
    usual = drawing.picture(explanation())
    for name in ("w" * 500, "word " * 200, "\x1b[2J\n\u202e", "猫の写真", "кошка", "\ud83d", ""):
        sheet = drawing.picture(explanation(classes=(name, f"{name}a", "dog"), image=Path(f"{name}.png")))
        assert sheet.width == usual.width
        assert sheet.height < 1.5 * usual.height
        edge = sheet.crop((sheet.width - drawing.MARGIN, 0, sheet.width, sheet.height))
        assert edge.getcolors(1 << 16) == [(edge.width * edge.height, drawing.PAPER)]


# --- letters


@pytest.fixture(params=["the system's fonts", "none but Pillow's"])
def fonts(request, monkeypatch):
    if request.param != "the system's fonts":
        lettering._fonts.cache_clear()
        monkeypatch.setattr(lettering, "FONTS", ())
    yield
    lettering._fonts.cache_clear()


def test_letters_that_no_font_has_are_marked(fonts):
    font = lettering.font_for("cat \U0010fffd", 15)
    shown = lettering.drawable("cat \U0010fffd", font)
    assert shown in ("cat \ufffd", "cat ?")
    assert lettering.drawable("cat", font) == "cat"


def test_what_the_pictures_say_has_letters_in_every_font(fonts, said):
    looks = {0: drawing.Look(torch.rand(16), torch.zeros(16, dtype=torch.int64), torch.arange(16) < 2,
                             torch.arange(16) > 13)}  # fmt: skip
    drawing.picture(explanation(edits=Edits(looks, (0.5, 0.1), (0.2, 0.3))))
    font = lettering.font_for("cat", 15)
    for words in said:
        assert lettering.drawable(words, font) == words


def test_what_would_steer_a_terminal_is_drawn_as_it_is_spelt():
    assert lettering.text("a\x1b[2J\u202e", 300).tobytes() == lettering.text("a\\x1b[2J\\u202e", 300).tobytes()


def test_the_font_that_has_the_letters_is_taken():
    plain = ImageFont.load_default(15)
    greek = lettering.font_for("αλφα", 15)
    assert all(lettering.has(greek, char) for char in "αλφα") or greek == plain


def test_long_texts_are_wrapped_and_end_with_an_ellipsis():
    font = lettering.font_for("a", 15)
    rows = lettering.wrapped("some words that are longer than a line of this width " * 3, 200, font, 3)
    assert len(rows) == 3
    assert rows[-1].endswith("…") or rows[-1].endswith(("\ufffd", "?"))
    assert all(font.getlength(row) <= 200 for row in rows)
    rows = lettering.wrapped("x" * 100, 200, font, 99)
    assert "".join(rows) == "x" * 100
    assert all(font.getlength(row) <= 200 for row in rows)
    assert lettering.wrapped("short", 200, font, 3) == ["short"]


# --- the command


def test_the_command_writes_a_picture_an_image(cli, atha_run, split, tmp_path):
    images = sorted(split.glob("test/cow/*.png"))[:2]
    before = sorted(atha_run.rglob("*"))
    done = cli("explain", atha_run, *images, "--blocks", "1", "--json")
    assert done.code == 0, done.stderr
    document = done.document
    folder = "explanations/animals-atha-1"
    assert document["pictures"] == [f"{folder}/{n:03d}-{image.stem}.png" for n, image in enumerate(images, 1)]
    assert all(Image.open(tmp_path / p).size[1] > drawing.PHOTO for p in document["pictures"])
    assert [p["image"] for p in document["predictions"]] == [str(image) for image in images]
    for found in document["predictions"]:
        assert found["class"] == found["top"][0]["label"]
        assert {c["label"] for c in found["top"]} == {"bee", "cow", "dog"}
        assert sum(c["probability"] for c in found["top"]) == pytest.approx(1)
    assert sorted(atha_run.rglob("*")) == before
    names = tmp_path / "names.txt"
    names.write_text("Ant Lion\n")
    more = json.loads(cli("explain", atha_run, images[0], "--new-classes", names, "--output", "p", "--json").stdout)
    assert more["alpha"] == 1.0


def test_a_new_call_replaces_its_own_old_pictures_and_nothing_else(cli, split_run, split, tmp_path):
    cows, dogs = (sorted(split.glob(f"test/{name}/*.png")) for name in ("cow", "dog"))
    assert cli("explain", split_run, *cows, "--output", "seen").code == 0
    (tmp_path / "seen" / "mine.txt").write_text("notes")
    done = cli("explain", split_run, dogs[0], "--output", "seen", "--json")
    assert done.code == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "seen").glob("*.png")) == ["001-0.png"]
    (kept,) = (p for p in tmp_path.rglob("mine.txt"))
    assert kept.read_text() == "notes"


def test_a_call_that_fails_leaves_the_old_pictures(cli, split_run, image, tmp_path):
    assert cli("explain", split_run, image).code == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "explanations/animals-cite-0.5").iterdir()}
    cli("explain", split_run, image, tmp_path / "no.png").fails(3, "no.png does not exist")
    assert {p.name: p.read_bytes() for p in (tmp_path / "explanations/animals-cite-0.5").iterdir()} == before


def test_the_same_command_draws_the_same_bytes(cli, split_run, image, tmp_path):
    for name in ("a", "b"):
        assert cli("explain", split_run, image, "--output", name).code == 0
    (a, b) = (next((tmp_path / name).glob("*.png")).read_bytes() for name in ("a", "b"))
    assert a == b


def test_places_that_are_something_else_are_kept(cli, split_run, flat, tmp_path, image):
    data = make_classes(tmp_path / "pets", {"cat": 1, "dog": 1})
    cli("explain", split_run, image, "--output", data).fails(2, "something else than pictures of explain", "--output")
    cli("explain", split_run, image, "--output", split_run).fails(2, "something else than pictures of explain")
    assert len(list(data.rglob("*.png"))) == 2


def test_file_names_are_tamed(cli, split_run, tmp_path):
    hostile = tmp_path / ("\x1b[2J\n" + "long" * 50 + ".png")
    picture(5).save(hostile)
    done = cli("explain", split_run, hostile, "--json")
    assert done.code == 0, done.stderr
    name = Path(done.document["pictures"][0]).name
    assert name.isprintable()
    assert len(name) <= 70
    assert "\x1b" not in done.stderr


def test_a_full_disk_is_one_sentence(cli, split_run, image, tmp_path, monkeypatch):
    def full(self, *_rest, **_named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    cli("explain", split_run, image).fails(7, "cannot be written: No space left on device")
    assert not list((tmp_path / "explanations").glob("[!.]*"))


def test_a_listed_class_that_was_trained_on_is_one_candidate(atha_run, image, tmp_path):
    (tmp_path / "names.txt").write_text("Dog\nant lion\n")
    found = found_by(atha_run, image, tmp_path / "out", new_classes=tmp_path / "names.txt")
    assert found.classes == ("bee", "cow", "dog", "ant lion")


def test_a_model_without_patches_is_refused_before_anything_is_computed(cli, split, models, image, monkeypatch):
    made = cli("adapt", split, "--model", models["resnet"], "--json")

    def computed(*_args, **_named):
        raise AssertionError("a model was built")

    monkeypatch.setattr(verb.loading, "rebuild", computed)
    monkeypatch.setattr(verb, "decode", computed)
    cli("explain", made.document["run"], image).fails(4, "ModifiedResNet", "no sequence of patch tokens", "ViT-B-16")


def test_what_it_cannot_do_is_said_in_one_sentence(cli, atha_run, image, tmp_path):
    cli("explain", atha_run, image, "--blocks", "2").fails(2, "0 to 1", "found 2")
    cli("explain", atha_run, image, "--blocks", "x").fails(2, "blocks must be", "'x'")
    cli("explain", atha_run, tmp_path / "no.png").fails(3, "no.png")
    (tmp_path / "bad.png").write_text("no image")
    assert "--skip-bad-images" not in cli("explain", atha_run, tmp_path / "bad.png").stderr
