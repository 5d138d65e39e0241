"""Large photographs: training sees as much of them as crops can show, measuring sees every pixel, whatever is kept."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from clipfit import AdaptConfig, DataError, adapt
from clipfit.data.augment import Enough, crop_box
from clipfit.data.copies import fingerprint
from clipfit.data.images import ImageStore, Memory, decode, decoded
from clipfit.data.layout import Sample
from clipfit.data.shot_images import ShotImages
from clipfit.model import loading

USUAL = {"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3)}


def scene(seed: int, size: tuple[int, int] = (900, 600)) -> Image.Image:
    """What changes smoothly, as photographs do; every corner is another."""
    return picture(seed, (7, 5)).resize(size, Image.Resampling.BICUBIC)


def sample_of(path) -> Sample:
    return Sample(path, path.name, "x")


def geometry(image: Image.Image) -> torch.Tensor:
    return pil_to_tensor(image.resize((32, 32), Image.Resampling.BICUBIC))


# ---- how much is enough


@pytest.mark.parametrize("how", [USUAL, {"scale": (0.5, 0.7), "ratio": (0.5, 1.0)}, {"scale": (1, 1), "ratio": (1, 1)}])
@pytest.mark.parametrize(("width", "height"), [(4000, 3000), (3000, 4000), (3000, 3000), (9000, 600), (700, 12000)])
@pytest.mark.parametrize("size", [(32, 32), (64, 32)])
def test_no_crop_of_what_is_kept_is_enlarged_and_the_smallest_hardly_reduced(how, width, height, size):
    kept = Enough.of(size, **how).of_larger(width, height)
    assert kept is not None
    assert kept[0] / kept[1] == pytest.approx(width / height, rel=0.06)
    generator = torch.Generator().manual_seed(0)
    boxes = [crop_box(kept[1], kept[0], generator=generator, **how) for _ in range(3000)]
    _, _, heights, widths = zip(*boxes, strict=True)
    assert min(heights) >= size[0]
    assert min(widths) >= size[1]
    if how is USUAL and max(width, height) == 4000 and size == (32, 32):
        assert min(*heights, *widths) <= 1.15 * 32


@pytest.mark.parametrize(
    ("size", "how", "whole", "reduced"),
    [
        ((224, 224), USUAL, [(500, 375), (1280, 960), (2100, 1575)], {(4000, 3000): (1056, 792)}),
        ((64, 64), {"scale": (1, 1), "ratio": (1, 1)}, [(128, 128), (90, 128)], {(129, 129): (64, 64)}),
        ((224, 224), USUAL, [(9000, 300)], {(40000, 1000): (8960, 224)}),
    ],
)
def test_what_is_up_to_twice_as_wide_as_is_enough_stays_whole(size, how, whole, reduced):
    enough = Enough.of(size, **how)
    assert [enough.of_larger(*sides) for sides in whole] == [None] * len(whole)
    assert {sides: enough.of_larger(*sides) for sides in reduced} == reduced


# ---- reading


def differs_by(one: Image.Image, other: Image.Image) -> float:
    assert one.size == other.size
    assert one.mode == other.mode == "RGB"
    return float(np.abs(np.asarray(one, int) - np.asarray(other, int)).mean())


ENOUGH = Enough.of((32, 32), **USUAL)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "RGBA", "I;16"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_what_is_kept_is_the_whole_picture_made_smaller(tmp_path, mode, orientation):
    suffix = {"P": "png", "RGBA": "png", "I;16": "png"}.get(mode, "jpg")
    file = tmp_path / f"a.{suffix}"
    if mode == "I;16":
        image = Image.fromarray(np.asarray(scene(1).convert("L"), np.uint16) * 16)
    else:
        image = scene(1).convert(mode)
    if mode == "RGBA":
        image.putalpha(scene(2).convert("L"))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(file, exif=exif, **({"quality": 95} if suffix == "jpg" else {}))
    whole, kept = decode(file, 12), decode(file, 12, enough=ENOUGH)
    sides = ENOUGH.of_larger(*whole.size)
    assert sides is not None
    assert kept.size == sides
    assert differs_by(kept, whole.resize(sides, Image.Resampling.BICUBIC)) < 1


def test_jpegs_are_decoded_at_a_scale_of_their_own(tmp_path, monkeypatch):
    """Which is what makes them cheap: all that is beyond it is thrown away before it is a pixel."""
    scene(1, (1600, 1200)).save(tmp_path / "a.jpg")
    asked = []
    upright = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda im, *given: asked.append(im.size) or upright(im, *given))
    assert decode(tmp_path / "a.jpg", enough=ENOUGH).size == ENOUGH.of_larger(1600, 1200) == (151, 114)
    assert asked == [(200, 150)]  # an eighth


# ---- keeping


def test_a_large_photograph_is_kept_reduced_and_counted_so(tmp_path):
    for k in range(3):
        scene(k, (4000, 3000)).save(tmp_path / f"{k}.jpg")
    samples = [sample_of(tmp_path / f"{k}.jpg") for k in range(3)]
    sides = ENOUGH.of_larger(4000, 3000)
    assert sides == (151, 114)
    size, view = 3 * math.prod(sides), 3 * 32 * 32
    images = ShotImages(samples, Memory(2 * (size + view)), geometry, ENOUGH)
    assert [image.size for image in images.prints] == [(3000, 4000)] * 3
    expected = [pil_to_tensor(decode(sample.path, enough=ENOUGH)) for sample in samples]
    views = [geometry(decode(sample.path)) for sample in samples]
    for k in range(3):
        assert torch.equal(images[k], expected[k])
        assert torch.equal(images.views[k], views[k])
    without_views = ShotImages(samples[:1], Memory(size), geometry, ENOUGH)
    assert torch.equal(without_views.views[0], views[0])
    for sample in samples:
        sample.path.unlink()
    for k in range(2):
        assert torch.equal(images[k], expected[k])
        assert torch.equal(images.views[k], views[k])
    for of in (images, images.views):
        with pytest.raises(DataError, match=r"^image .*2\.jpg does not exist"):
            of[2]


def test_small_pictures_are_kept_as_they_are_and_nothing_beside_them(tmp_path):
    samples = []
    for k in range(2):
        picture(k).save(tmp_path / f"{k}.png")
        samples.append(sample_of(tmp_path / f"{k}.png"))
    for budget in (0, 2 * 3 * 40 * 36):
        images = ShotImages(samples, Memory(budget), geometry, ENOUGH)
        assert [torch.equal(images[k], pil_to_tensor(picture(k))) for k in range(2)] == [True, True]
        assert [torch.equal(images.views[k], geometry(picture(k))) for k in range(2)] == [True, True]
    for sample in samples:
        sample.path.unlink()
    assert torch.equal(images[1], pil_to_tensor(picture(1)))
    assert torch.equal(images.views[1], geometry(picture(1)))


def test_a_store_can_keep_what_is_enough(tmp_path):
    scene(0).save(tmp_path / "a.jpg")
    for budget in (0, 10**9):
        store = ImageStore([sample_of(tmp_path / "a.jpg")], Memory(budget), functools.partial(decoded, enough=ENOUGH))
        assert torch.equal(store[0], pil_to_tensor(decode(tmp_path / "a.jpg", enough=ENOUGH)))


# ---- adapting


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Two classes of four photographs that are reduced, one of them turned, and one that is not."""
    root = tmp_path_factory.mktemp("photographs")
    for c, name in enumerate(("bee", "cow")):
        (root / name).mkdir()
        for k in range(5):
            exif = Image.Exif()
            exif[0x0112] = 6 if k == 3 else 1
            size = (100, 80) if k == 4 else (900, 600)
            scene(10 * c + k, size).save(root / name / f"{k}.jpg", exif=exif)
    return root


def bytes_of(run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.iterdir() if path.is_file() and path.name != "timing.json"}


def test_what_is_kept_decides_nothing_and_what_is_measured_is_the_whole(photographs, models, tmp_path):
    config = AdaptConfig(photographs, model=models["vit"], alpha=None)
    budgets = (10**5, 2**31)
    runs = [adapt(replace(config, output=tmp_path / str(cache), cache_bytes=cache)) for cache in budgets]
    assert bytes_of(runs[0].run) == bytes_of(runs[1].run)
    assert runs[0].on_shots == runs[1].on_shots
    lines = [json.loads(line) for line in (runs[0].run / "shots.jsonl").read_text("utf-8").splitlines()]
    assert sorted({tuple(line["size"]) for line in lines}) == [(80, 100), (600, 900)]
    for line in lines:
        path = photographs.parent / line["path"]
        assert line["pixels"] == fingerprint(sample_of(path), pil_to_tensor(decode(path))).pixels


def test_training_alone_sees_less(photographs, models, tmp_path, monkeypatch):
    """Where nothing is reduced, the losses are others, and all that is measured before them is the same."""
    usual = adapt(AdaptConfig(photographs, model=models["vit"], output=tmp_path / "usual"))
    monkeypatch.setattr(Enough, "of_larger", lambda self, width, height: None)
    whole = adapt(AdaptConfig(photographs, model=models["vit"], output=tmp_path / "whole"))
    assert bytes_of(usual.run)["shots.jsonl"] == bytes_of(whole.run)["shots.jsonl"]
    assert usual.on_shots.zero_shot_accuracy == whole.on_shots.zero_shot_accuracy
    assert usual.losses != whole.losses


def test_shots_are_measured_in_the_models_geometry(photographs, models):
    clip = loading.load(models["vit"])
    samples = [sample_of(photographs / "bee" / f"{k}.jpg") for k in range(5)]
    images = ShotImages(samples, Memory(10**9), clip.geometry, Enough.of(clip.image_size, **USUAL))
    assert [tuple(images[k].shape[1:]) for k in (0, 3, 4)] == [(107, 160), (160, 107), (80, 100)]
    for k, sample in enumerate(samples):
        assert torch.equal(images.views[k], clip.geometry(decode(sample.path)))


@pytest.mark.parametrize("side", [1050, 1066, 1078, 3000])
def test_what_is_enough_is_not_a_pixel_more_by_rounding(side):
    """Of whole pictures, as ATHA's recipe under LoRA has them: the size of the model itself."""
    assert min(Enough.of((224, 224), (1.0, 1.0), (1.0, 1.0)).of_larger(4000, side)) == 224
