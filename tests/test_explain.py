"""`explain`: the pictures show what the blocks really went by."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from clipfit import AdaptConfig, ExplainConfig, adapt, explain
from clipfit.model import loading
from clipfit.prompts import prompts
from clipfit.report import picture as drawing
from clipfit.runs.run import open_run
from clipfit.verbs.explain import Explanation

OPTIONS = {"head_ratio": 0.25, "tail_ratio": 0.125, "head_strength": 0.9, "tail_strength": 0.4, "strength_rate": 0.05}


@pytest.fixture(scope="module")
def atha_run(split, models, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "animals-atha"
    return adapt(AdaptConfig(split, "atha", models["vit"], alpha=1.0, output=output, method_options=OPTIONS)).run


@pytest.fixture
def image(split):
    return next((split / "test/elk").iterdir())


def found_by(run, image, **told) -> Explanation:
    kept: list[Explanation] = []

    def keep(explanation):
        kept.append(explanation)
        return drawing.picture(explanation)

    explain(ExplainConfig(run, (image,), **told), keep)
    return kept[0]


def test_what_is_drawn_is_what_the_blocks_went_by(atha_run, image, tmp_path):
    """m, its class, head and tail from the tokens that come to the blocks of a forward pass of its own."""
    found = found_by(atha_run, image, blocks=(0, 1), output=tmp_path / "out")
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
    assert (found.head, found.tail) == (tuple(model.edits.head.tolist()), tuple(model.edits.tail.tolist()))
    assert found.grid == (4, 4)
    for block, look in found.looks.items():
        s = torch.nn.functional.cosine_similarity(came[block][0, 1:, None], texts.class_tokens[None], dim=2)  # (16, 3)
        torch.testing.assert_close(look.similarity, s.amax(1), atol=1e-5, rtol=0)
        assert torch.equal(look.best, s.argmax(1))
        order = s.amax(1).argsort(descending=True)
        assert set(look.head.nonzero()[:, 0].tolist()) == set(order[:4].tolist())
        assert set(look.tail.nonzero()[:, 0].tolist()) == set(order[-2:].tolist())


def test_a_picture_shows_frames_and_bars_where_they_belong(atha_run, image, tmp_path):
    found = found_by(atha_run, image, blocks=(1,), output=tmp_path / "out")
    sheet = drawing.picture(found)
    panel = sheet.crop((2 * drawing.GAP + drawing.SIDE, drawing.GAP,
                        2 * drawing.GAP + 2 * drawing.SIDE, drawing.GAP + drawing.SIDE))  # fmt: skip
    cell = drawing.SIDE // 4
    for i in range(16):
        row, column = divmod(i, 4)
        corner = panel.getpixel((column * cell, row * cell))
        look = found.looks[1]
        assert (corner == drawing.HEAD) == bool(look.head[i])
        assert (corner == drawing.TAIL) == bool(look.tail[i])
    chart = sheet.crop((3 * drawing.GAP + 2 * drawing.SIDE, drawing.GAP, sheet.width, drawing.GAP + drawing.SIDE))
    colours = {colour for _, colour in chart.getcolors(1 << 16)}
    assert {drawing.HEAD, drawing.TAIL} <= colours
    above, below = (
        chart.crop((0, top, chart.width, top + drawing.SIDE // 2 - 2)) for top in (0, drawing.SIDE // 2 + 2)
    )
    of = lambda part, colour: sum(n for n, c in part.getcolors(1 << 16) if c == colour)  # noqa: E731
    assert of(above, drawing.HEAD) > 0
    assert of(below, drawing.TAIL) > 0
    assert of(above, drawing.TAIL) == 0  # b is positive here: its bars point down


def test_a_method_without_edits_shows_what_it_would_go_by(split_run, image, tmp_path):
    found = found_by(split_run, image, output=tmp_path / "out")
    assert found.head == found.tail == (0.0, 0.0)
    assert list(found.looks) == [0, 1]


def test_the_command_writes_a_picture_an_image(cli, atha_run, split, tmp_path):
    images = sorted(split.glob("test/cow/*.png"))[:2]
    done = cli("explain", atha_run, *images, "--blocks", "1", "--output", "pictures", "--json")
    assert done.code == 0, done.stderr
    document = done.document
    assert document["pictures"] == [f"pictures/{n:03d}-{image.stem}.png" for n, image in enumerate(images, 1)]
    assert all(Image.open(tmp_path / p).size[1] > drawing.SIDE for p in document["pictures"])
    assert [p["image"] for p in document["predictions"]] == [str(image) for image in images]
    assert {p["class"] for p in document["predictions"]} <= {"bee", "cow", "dog"}
    names = tmp_path / "names.txt"
    names.write_text("Ant Lion\n")
    more = json.loads(cli("explain", atha_run, images[0], "--new-classes", names, "--output", "p", "--json").stdout)
    assert more["alpha"] == 1.0


def test_a_listed_class_that_was_trained_on_is_one_candidate(atha_run, image, tmp_path):
    (tmp_path / "names.txt").write_text("Dog\nant lion\n")
    found = found_by(atha_run, image, new_classes=tmp_path / "names.txt", output=tmp_path / "out")
    assert found.classes == ("bee", "cow", "dog", "ant lion")


def test_what_it_cannot_do_is_said_in_one_sentence(cli, atha_run, image, split, models, tmp_path):
    cli("explain", atha_run, image, "--blocks", "2").fails(2, "0 to 1", "found 2")
    cli("explain", atha_run, image, "--blocks", "x").fails(2, "blocks must be", "'x'")
    cli("explain", atha_run, tmp_path / "no.png").fails(3, "no.png")
    (tmp_path / "bad.png").write_text("no image")
    assert "--skip-bad-images" not in cli("explain", atha_run, tmp_path / "bad.png").stderr
    made = cli("adapt", split, "--model", models["resnet"], "--json")
    cli("explain", made.document["run"], image).fails(4, "ModifiedResNet")
