"""Decoding every kind of picture, keeping what the budget allows, and the random crop."""

from __future__ import annotations

import functools
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import pil_to_tensor

from clipfit import DataError
from clipfit.data.augment import crop_box, random_crop, resized
from clipfit.data.images import ImageStore, Memory, Views, content_hash, decode, decoded, grey_bits
from clipfit.data.layout import Sample

RED, GREEN, WHITE = (255, 0, 0), (0, 128, 0), (255, 255, 255)


def pixels(path) -> np.ndarray:
    image = decode(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_rgb_is_left_alone(tmp_path):
    picture(0).save(tmp_path / "a.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), np.asarray(picture(0)))


@pytest.mark.parametrize(
    ("brightest", "shown"), [(100, 100), (255, 255), (256, 64), (1023, 255), (4095, 255), (5000, 78), (16383, 255),
                             (16384, 64), (65535, 255)]
)  # fmt: skip
def test_grey_of_any_depth_is_seen(tmp_path, brightest, shown):
    """12 bits of an X-ray in 16 are no black image."""
    Image.fromarray(np.array([[0, brightest]], np.uint16)).save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png").tolist() == [[[0] * 3, [shown] * 3]]


def greys(tmp_path, *values: object) -> list[Sample]:
    """One file each, of one pixel."""
    samples = []
    for k, value in enumerate(values):
        path = tmp_path / f"{k}.{'tif' if np.asarray(value).dtype == np.float32 else 'png'}"
        Image.fromarray(np.array([[value]], np.asarray(value).dtype)).save(path)
        samples.append(Sample(path, path.name, "x"))
    return samples


def test_one_depth_for_all_greys(tmp_path):
    """12 bits of one X-ray and 10 of a darker one: the same value is equally bright in both."""
    samples = greys(tmp_path, np.uint16(4000), np.uint16(1000), np.uint8(255))
    (tmp_path / "broken.png").write_bytes(b"")
    samples.append(Sample(tmp_path / "broken.png", "broken.png", "x"))
    assert grey_bits(samples) == 12
    assert grey_bits(samples[1:]) == 10
    assert grey_bits(samples[2:]) is None
    assert [decode(s.path, 12).getpixel((0, 0))[0] for s in samples[:3]] == [249, 62, 255]
    assert decode(samples[1].path).getpixel((0, 0))[0] == 249  # its own depth
    assert decode(samples[0].path, 10).getpixel((0, 0))[0] == 255  # brighter values clip
    for budget in (0, 10**6):
        store = ImageStore(samples[:3], Memory(budget), functools.partial(decoded, grey_bits=12))
        assert store[1].flatten().tolist() == [62, 62, 62]


def test_greys_that_are_shares_have_no_depth(tmp_path):
    samples = greys(tmp_path, np.float32(0.5), np.float32(900))
    assert grey_bits(samples[:1]) is None
    assert grey_bits(samples) == 10
    assert decode(samples[0].path, 10).getpixel((0, 0))[0] == 128


@pytest.mark.parametrize("bits", [None, 12])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_grey_that_is_no_number_is_no_image(tmp_path, value, bits):
    Image.fromarray(np.array([[0, value]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="cannot be read"):
        decode(tmp_path / "a.tif", bits)
    assert grey_bits([Sample(tmp_path / "a.tif", "a.tif", "x")]) is None


def test_black_and_white(tmp_path):
    Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert("1").save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png")[..., 1].tolist() == [[0, 255], [255, 0]]


def test_grey_without_and_with_transparency(tmp_path):
    grey = np.array([[10, 200]], np.uint8)
    Image.fromarray(grey).save(tmp_path / "l.png")
    assert pixels(tmp_path / "l.png").tolist() == [[[10] * 3, [200] * 3]]
    Image.merge("LA", [Image.fromarray(grey), Image.fromarray(np.array([[0, 255]], np.uint8))]).save(
        tmp_path / "la.png"
    )
    assert pixels(tmp_path / "la.png").tolist() == [[[255] * 3, [200] * 3]]


def test_colour_with_transparency_shows_white(tmp_path):
    image = Image.new("RGBA", (3, 1))
    image.putdata([(*RED, 255), (*RED, 0), (*RED, 128)])
    image.save(tmp_path / "a.png")
    full, none, half = pixels(tmp_path / "a.png")[0].tolist()
    assert (full, none) == ([*RED], [*WHITE])
    assert half == pytest.approx([255, 127, 127], abs=1)


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palettes_without_and_with_transparency(tmp_path, suffix):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putdata([0, 1])
    image.save(tmp_path / f"opaque.{suffix}")
    assert pixels(tmp_path / f"opaque.{suffix}").tolist() == [[[*RED], [*GREEN]]]
    image.save(tmp_path / f"clear.{suffix}", transparency=1)
    assert pixels(tmp_path / f"clear.{suffix}").tolist() == [[[*RED], [*WHITE]]]


def test_rgb_with_a_transparent_colour(tmp_path):
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), GREEN)
    image.save(tmp_path / "a.png", transparency=GREEN)
    assert pixels(tmp_path / "a.png").tolist() == [[[*RED], [*WHITE]]]


def test_cmyk(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.tif")
    assert pixels(tmp_path / "a.tif")[0, 0].tolist() == [*RED]
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(tmp_path / "a.jpg")
    assert pixels(tmp_path / "a.jpg")[0, 0].tolist() == [*WHITE]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_of_grey_are_scaled_to_eight(tmp_path, suffix):
    values = np.array([[0, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    assert pixels(tmp_path / f"a.{suffix}")[0, :, 0].tolist() == [0, 128, 255]


def test_big_endian_sixteen_bits(tmp_path):
    Image.fromarray(np.array([[0, 32768, 65535]], ">u2")).save(tmp_path / "a.tif")
    assert pixels(tmp_path / "a.tif")[0, :, 2].tolist() == [0, 128, 255]


def test_integers_and_floating_point_numbers(tmp_path):
    Image.fromarray(np.array([[0, 32768, 65535]], np.int32)).save(tmp_path / "i.tif")
    assert pixels(tmp_path / "i.tif")[0, :, 0].tolist() == [0, 128, 255]
    Image.fromarray(np.array([[0, 0.5, 1]], np.float32)).save(tmp_path / "share.tif")
    assert pixels(tmp_path / "share.tif")[0, :, 0].tolist() == [0, 128, 255]
    Image.fromarray(np.array([[-3, 7, 255]], np.float32)).save(tmp_path / "bytes.tif")
    assert pixels(tmp_path / "bytes.tif")[0, :, 0].tolist() == [0, 7, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(tmp_path, orientation):
    """The eight ways a camera can be held: what it stores, turned as its note says, is the same picture."""
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8] = 255  # one bright corner, top left
    turn = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, 1), 7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda a: np.rot90(a, -1),
    }  # fmt: skip
    image = Image.fromarray(np.ascontiguousarray(turn[orientation](upright)))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(pixels(tmp_path / "a.png"), upright)


def test_an_orientation_and_a_transparent_colour_together(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putdata([0, 1])
    exif = Image.Exif()
    exif[0x0112] = 3
    image.save(tmp_path / "a.png", transparency=1, exif=exif)
    assert pixels(tmp_path / "a.png").tolist() == [[[*WHITE], [*RED]]]


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "gif", "tif", "webp"])
def test_truncated_files_are_named(tmp_path, suffix):
    file = tmp_path / f"broken.{suffix}"
    picture(3, (90, 80)).save(file)
    whole = file.read_bytes()
    for kept in (0, 1, 10, len(whole) // 3, len(whole) // 2, len(whole) * 9 // 10):
        file.write_bytes(whole[:kept])
        with pytest.raises(DataError, match=f"image .*broken.{suffix} cannot be read"):
            decode(file)


def test_files_that_are_no_images_are_named(tmp_path):
    (tmp_path / "text.png").write_text("this is text")
    with pytest.raises(DataError, match=r"text\.png cannot be read"):
        decode(tmp_path / "text.png")
    with pytest.raises(DataError, match=r"image .*none\.png does not exist"):
        decode(tmp_path / "none.png")


def test_formats_that_are_not_listed_are_never_tried(tmp_path, monkeypatch):
    """PostScript called x.png would start Ghostscript."""
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **kwargs: pytest.fail("it was started"))
    with pytest.raises(DataError, match=r"x\.png cannot be read: it is none of JPEG, PNG, "):
        decode(tmp_path / "x.png")


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    with pytest.raises(DataError, match="image /dev/zero is a device: expected a regular file"):
        decode(Path("/dev/zero"))
    with pytest.raises(DataError, match="image /dev/zero is a device"):
        content_hash(Path("/dev/zero"))
    with pytest.raises(DataError, match="is a folder: expected a regular file"):
        decode(tmp_path)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"gone\.png is a broken link: .*nowhere\.png is not there"):
        decode(tmp_path / "gone.png")
    with pytest.raises(DataError, match="cannot be read"):
        decode(Path("null\0byte.png"))


def test_photographs_of_a_telephone(tmp_path, without_heif):
    """HEIC is read where pillow-heif is installed, under whatever name; else what to install is said."""
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(picture(3, (64, 48))).save(tmp_path / "a.heic", quality=95)
    shutil.copy(tmp_path / "a.heic", tmp_path / "renamed.jpg")
    for name in ("a.heic", "renamed.jpg"):
        difference = pixels(tmp_path / name).astype(int) - np.asarray(picture(3, (64, 48)))
        assert np.abs(difference).mean() < 20
    without_heif()
    with pytest.raises(DataError, match=r"renamed\.jpg cannot be read: it is HEIC inside; install clipfit\[heif\]"):
        decode(tmp_path / "renamed.jpg")


@pytest.mark.parametrize("error", [RuntimeError("avif"), SyntaxError("png"), ValueError("gif"), EOFError("tga")])
def test_whatever_a_decoder_raises_the_file_is_named(tmp_path, monkeypatch, error):
    """Found by decoding damaged files of every format; AVIF's decoder raises RuntimeError."""
    picture(0).save(tmp_path / "a.png")

    def damaged(image):
        raise error

    monkeypatch.setattr(Image.Image, "getexif", damaged)
    with pytest.raises(DataError, match=rf"a\.png cannot be read \({error}\)"):
        decode(tmp_path / "a.png")


def test_an_image_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    picture(0, (50, 50)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.raises(DataError, match=r"bomb\.png cannot be read"):
        decode(tmp_path / "bomb.png")


def stored(tmp_path, count: int) -> list[Sample]:
    for k in range(count):
        picture(k).save(tmp_path / f"{k}.png")
    return [Sample(tmp_path / f"{k}.png", f"{k}.png", "x") for k in range(count)]


def test_beyond_the_budget_images_are_decoded_again_to_the_same(tmp_path):
    samples = stored(tmp_path, 5)
    size = 3 * 40 * 36
    everything, some, nothing = (ImageStore(samples, Memory(b)) for b in (100 * size, 2 * size + 1, 0))
    for k in range(5):
        expected = pil_to_tensor(picture(k))
        assert torch.equal(everything[k], expected)
        assert torch.equal(some[k], expected)
        assert torch.equal(nothing[k], expected)
    for sample in samples:
        sample.path.unlink()
    assert len(everything) == len(some) == 5
    for k in range(5):
        everything[k]
    some[0], some[1]
    for store, index in ((some, 2), (some, 4), (nothing, 0)):
        with pytest.raises(DataError, match="does not exist"):
            store[index]


def test_a_store_keeps_what_its_transform_makes(tmp_path):
    views = Views(lambda picture: pil_to_tensor(picture.resize((8, 8))), None)
    store = ImageStore(stored(tmp_path, 2), Memory(2 * 3 * 8 * 8), views.read)
    for sample in store.samples:
        sample.path.unlink()
    assert store[0].shape == store[1].shape == (3, 8, 8)


def test_views_and_stores_share_one_memory(tmp_path):
    """What was decoded to tell copies apart is counted once, and given back where it is a copy."""
    samples, size = stored(tmp_path, 4), 3 * 8 * 8
    memory = Memory(3 * size)
    views = Views(lambda picture: pil_to_tensor(picture.resize((8, 8))), None, memory)
    for sample in samples:
        views.keep(sample, decode(sample.path))
    assert not memory.takes(torch.zeros(1))
    store = ImageStore(samples[:2], memory, views.read)
    assert not memory.takes(torch.zeros(1))  # the third view
    views.forget()
    assert [memory.takes(torch.zeros(size)), memory.takes(torch.zeros(1))] == [True, False]
    for sample in samples:
        sample.path.unlink()
    assert store[0].shape == store[1].shape == (3, 8, 8)


def test_bad_images_are_named_or_skipped_and_counted(tmp_path):
    samples = stored(tmp_path, 4)
    (tmp_path / "1.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"1\.png cannot be read"):
        ImageStore(samples, Memory(0))
    for budget in (0, 10**9):
        store = ImageStore(samples, Memory(budget), skip_bad=True)
        assert store.skipped == ["1.png"]
        assert [s.source for s in store.samples] == ["0.png", "2.png", "3.png"]
        assert torch.equal(store[1], pil_to_tensor(picture(2)))


def test_the_content_hash_is_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert content_hash(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# ---- the crop


@pytest.mark.parametrize(("height", "width"), [(60, 80), (224, 224), (37, 200), (11, 5)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.5, 0.5)])
def test_crops_are_distributed_as_torchvisions(height, width, scale):
    """Means and spreads of place, size and shape over many draws, within five standard errors."""
    draws, ratio = 3000, (3 / 4, 4 / 3)
    generator = torch.Generator().manual_seed(0)
    ours = torch.tensor([crop_box(height, width, scale, ratio, generator) for _ in range(draws)]).double()
    torch.manual_seed(1)
    blank = torch.zeros(1, height, width)
    theirs = torch.tensor([RandomResizedCrop.get_params(blank, scale, ratio) for _ in range(draws)]).double()

    def figures(boxes: torch.Tensor) -> torch.Tensor:
        top, left, h, w = boxes.T
        return torch.stack([top, left, h, w, h * w, (w / h).log(), top * h, left * w], 1)

    a, b = figures(ours), figures(theirs)
    a, b = torch.cat([a, (a - a.mean(0)) ** 2], 1), torch.cat([b, (b - b.mean(0)) ** 2], 1)
    error = ((a.var(0) + b.var(0)) / draws).sqrt()
    assert ((a.mean(0) - b.mean(0)).abs() <= 5 * error + 1e-9).all()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (500, 1), (2, 3), (1000, 30), (7, 7)])
def test_crops_lie_inside_the_image(height, width):
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        top, left, h, w = crop_box(height, width, (0.08, 1.0), (3 / 4, 4 / 3), generator)
        assert 0 <= top <= top + h <= height
        assert 0 <= left <= left + w <= width
        assert min(h, w) >= 1


def test_an_image_too_long_for_any_crop_gives_the_largest_centred_one():
    generator = torch.Generator().manual_seed(0)
    assert crop_box(30, 3000, (1.0, 1.0), (3 / 4, 4 / 3), generator) == (0, 1480, 30, 40)
    assert crop_box(3000, 30, (1.0, 1.0), (3 / 4, 4 / 3), generator) == (1480, 0, 40, 30)


def test_the_share_and_shape_of_crops_are_those_asked_for():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        _, _, h, w = crop_box(1000, 1000, (0.2, 0.3), (0.9, 1.1), generator)
        assert 0.195 <= h * w / 1e6 <= 0.305
        assert math.log(0.89) <= math.log(w / h) <= math.log(1.11)


def test_a_crop_is_that_box_resized(tmp_path):
    image = pil_to_tensor(picture(5, (90, 70)))
    box = crop_box(70, 90, (0.3, 0.6), (3 / 4, 4 / 3), torch.Generator().manual_seed(3))
    ours = resized(random_crop(image, (0.3, 0.6), (3 / 4, 4 / 3), torch.Generator().manual_seed(3)), (32, 24))
    top, left, h, w = box
    theirs = picture(5, (90, 70)).resize((24, 32), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
    assert ours.shape == (3, 32, 24)
    assert ours.dtype == torch.uint8
    # Pillow's filter may look across the box's edge, ours not: compare what lies inside
    difference = (ours.int() - pil_to_tensor(theirs).int())[:, 4:-4, 4:-4].abs()
    assert difference.max() <= 2
