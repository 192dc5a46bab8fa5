import io

import numpy as np
import pytest
import samples
import torch
from PIL import Image

from kl_f8_train import images
from kl_f8_train.errors import ImageError

PICTURE = samples.noise_picture(0, 40, 56)


def as_array(tensor: torch.Tensor) -> np.ndarray:
    assert tensor.dtype == torch.uint8
    assert tensor.is_contiguous()
    return tensor.permute(1, 2, 0).numpy()


def with_orientation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def exif_block(*entries: tuple[int, int, int, bytes]) -> bytes:
    """Raw Exif of (tag, type, count, four bytes of value) entries, little-endian."""
    body = b"".join(
        tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + count.to_bytes(4, "little") + value
        for tag, kind, count, value in entries
    )
    head = b"II*\0" + (8).to_bytes(4, "little") + len(entries).to_bytes(2, "little")
    return b"Exif\0\0" + head + body + bytes(4)


# --- decode ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {})]
)
def test_lossless_files_come_back_exactly(kind, options):
    decoded = images.decode(samples.encode(PICTURE, kind, **options))
    assert np.array_equal(as_array(decoded), PICTURE)


@pytest.mark.parametrize("options", [{"quality": 95}, {"quality": 95, "progressive": True}])
def test_jpeg(options):
    data = samples.encode(PICTURE, "JPEG", **options)
    assert np.array_equal(as_array(images.decode(data)), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_grey_becomes_three_equal_channels(kind):
    grey = PICTURE[..., 0]
    decoded = as_array(images.decode(samples.encode(grey, kind, quality=95)))
    assert decoded.shape == PICTURE.shape
    assert (decoded == decoded[..., :1]).all()
    assert np.abs(decoded[..., 0].astype(int) - grey).mean() < (1 if kind == "PNG" else 4)


def test_bilevel():
    image = Image.fromarray(PICTURE[..., 0] > 127)
    assert image.mode == "1"
    decoded = as_array(images.decode(samples.encode(image, "PNG")))
    assert np.array_equal(decoded[..., 1], (PICTURE[..., 0] > 127) * np.uint8(255))


def test_palette():
    image = Image.fromarray(PICTURE).quantize(16)
    assert image.mode == "P"
    decoded = as_array(images.decode(samples.encode(image, "PNG")))
    assert np.array_equal(decoded, np.asarray(image.convert("RGB")))


def test_palette_with_a_transparent_colour():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putpixel((0, 0), 0)
    decoded = as_array(images.decode(samples.encode(image, "PNG", transparency=0)))
    assert decoded[0, 0].tolist() == [255, 255, 255]
    assert decoded[1, 1].tolist() == [200, 0, 0]


@pytest.mark.parametrize(("alpha", "expected"), [(0, 255), (255, 40), (128, 147)])
def test_transparency_lies_on_white(alpha, expected):
    image = Image.new("RGBA", (8, 8), (40, 40, 40, alpha))
    decoded = as_array(images.decode(samples.encode(image, "PNG")))
    assert np.abs(decoded.astype(int) - expected).max() <= 1


def test_grey_with_transparency():
    decoded = as_array(images.decode(samples.encode(Image.new("LA", (8, 8), (0, 0)), "PNG")))
    assert (decoded == 255).all()


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)])
def test_cmyk_jpeg_is_not_inverted(colour):
    image = Image.new("RGB", (16, 16), colour).convert("CMYK")
    decoded = as_array(images.decode(samples.encode(image, "JPEG", quality=100)))
    assert np.abs(decoded.astype(int) - colour).max() <= 4


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(kind):
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    decoded = as_array(images.decode(samples.encode(levels * 257, kind)))
    assert np.array_equal(decoded, np.repeat(levels.astype(np.uint8)[..., None], 3, axis=2))


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, PICTURE),
        (2, PICTURE[:, ::-1]),
        (3, PICTURE[::-1, ::-1]),
        (4, PICTURE[::-1]),
        (5, PICTURE.transpose(1, 0, 2)),
        (6, np.rot90(PICTURE, -1)),
        (7, PICTURE[::-1, ::-1].transpose(1, 0, 2)),
        (8, np.rot90(PICTURE, 1)),
    ],
)
def test_exif_orientation(orientation, upright):
    data = samples.encode(PICTURE, "PNG", exif=with_orientation(orientation))
    assert np.array_equal(as_array(images.decode(data)), upright)


def test_exif_orientation_of_a_jpeg():
    data = samples.encode(PICTURE, "JPEG", exif=with_orientation(6))
    assert images.decode(data).shape == (3, 56, 40)


def jpeg_with_broken_exif() -> bytes:
    """A good JPEG, turned by 90 degrees, whose Exif block has text where a number belongs."""
    compression = (0x0103, 2, 4, b"abc\0")
    orientation = (0x0112, 3, 1, (6).to_bytes(4, "little"))
    return samples.encode(PICTURE, "JPEG", exif=exif_block(compression, orientation))


GOOD_JPEG = samples.encode(samples.noise_picture(0, 200, 200), "JPEG", quality=95)
BROKEN = {
    "empty": b"",
    "text": b"<html>404 Not Found</html>",
    "zeros": bytes(5000),
    "truncated JPEG": GOOD_JPEG[: len(GOOD_JPEG) // 2],
    "JPEG header alone": GOOD_JPEG[:20],
    "truncated PNG": samples.encode(PICTURE, "PNG")[:2000],
    "truncated WebP": samples.encode(PICTURE, "WEBP", lossless=True)[:2000],
    "PNG with broken data": samples.encode(PICTURE, "PNG").replace(b"IDAT", b"IDAT\xff\xff\xff", 1),
    "truncated TIFF": samples.encode(PICTURE, "TIFF")[:100],
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN.keys())
def test_broken_files(data):
    with pytest.raises(ImageError):
        images.decode(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_damage_is_an_image_error_or_nothing(kind):
    """A run of weeks must not end at one file: no other exception leaves decode."""
    random = np.random.RandomState(1)
    options = {} if kind in ("BMP", "GIF") else {"exif": with_orientation(6)}
    whole = samples.encode(samples.noise_picture(0, 24, 32), kind, **options)
    for _ in range(400):
        data = bytearray(whole)
        for place in random.randint(0, min(len(data), 300), 3):
            data[place] = random.randint(256)
        try:
            decoded = images.decode(bytes(data))
        except ImageError:
            continue
        assert decoded.dtype == torch.uint8
        assert decoded.shape[0] == 3


def test_broken_exif_is_an_image_error_or_nothing():
    try:
        decoded = images.decode(jpeg_with_broken_exif())
    except ImageError:
        return
    assert decoded.shape[0] == 3


def test_too_many_pixels(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="too many pixels"):
        images.decode(samples.encode(PICTURE, "PNG"))


# --- resize and crop ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["astronaut", "chelsea"])
@pytest.mark.parametrize("side", [64, 256, 384])
def test_resize_is_that_of_pil(name, side):
    """Equal in 99 % of the values, else a level apart; two at one pixel in 100,000."""
    picture = samples.photograph(name)
    height, width = picture.shape[:2]
    scale = side / min(height, width)
    size = (max(side, round(width * scale)), max(side, round(height * scale)))
    expected = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
    resized = as_array(images.resize_shorter(images.decode(samples.encode(picture, "PNG")), side))
    assert resized.shape == expected.shape
    assert min(resized.shape[:2]) == side
    difference = np.abs(resized.astype(int) - expected)
    assert (difference > 0).mean() < 0.01
    assert (difference > 1).mean() < 1e-5
    assert difference.max() <= 2


def test_resize_enlarges_too():
    assert images.resize_shorter(torch.zeros(3, 20, 30, dtype=torch.uint8), 40).shape == (3, 40, 60)


def test_resize_leaves_the_right_size_alone():
    image = torch.from_numpy(PICTURE.copy()).permute(2, 0, 1)
    assert torch.equal(images.resize_shorter(image, 40), image)


@pytest.mark.parametrize(
    ("shares", "corner"),
    [
        ((0.0, 0.0), (0, 0)),
        ((0.5, 0.5), (4, 12)),
        ((1.0, 1.0), (8, 24)),
        ((0.0, 1.0), (0, 24)),
        ((0.999999, 0.0), (8, 0)),
    ],
)
def test_crop_places(shares, corner):
    cropped = as_array(images.crop(torch.from_numpy(PICTURE.copy()).permute(2, 0, 1), 32, *shares))
    top, left = corner
    assert np.array_equal(cropped, PICTURE[top : top + 32, left : left + 32])


def test_every_place_is_equally_likely():
    image = torch.arange(8, dtype=torch.uint8).expand(3, 4, 8)
    shares = (torch.arange(1000) + 0.5) / 1000
    lefts = [int(images.crop(image, 4, 0.0, float(share))[0, 0, 0]) for share in shares]
    assert np.bincount(lefts).tolist() == [200] * 5


def test_crop_of_the_whole_image():
    image = torch.from_numpy(PICTURE[:, :40].copy()).permute(2, 0, 1)
    assert torch.equal(images.crop(image, 40, 1.0, 1.0), image)


@pytest.mark.parametrize("size", [(31, 100), (100, 31), (1, 1)])
def test_too_small_for_the_crop(size):
    with pytest.raises(ImageError, match="smaller than the 32 x 32 crop"):
        images.crop(torch.zeros(3, *size, dtype=torch.uint8), 32)


# --- values ---------------------------------------------------------------------------------


def test_all_levels_come_back():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(images.to_uint8(images.to_float(levels)), levels)


def test_float_range():
    floats = images.to_float(torch.arange(256, dtype=torch.uint8))
    assert floats.dtype == torch.float32
    assert floats[0] == -1.0
    assert floats[255] == 1.0
    assert floats[127] == pytest.approx(-0.5 / 127.5, abs=1e-7)


def test_floor_and_round():
    middle = torch.tensor([100.6, 100.4, 100.5 + 1e-3, 254.9]) / 127.5 - 1.0
    assert images.to_uint8(middle).tolist() == [101, 100, 101, 255]
    assert images.to_uint8(middle, "floor").tolist() == [100, 100, 100, 254]


@pytest.mark.parametrize("quantize", ["round", "floor"])
def test_values_outside_are_clamped(quantize):
    assert images.to_uint8(torch.tensor([-7.0, -1.0, 1.0, 7.0]), quantize).tolist() == [
        0,
        0,
        255,
        255,
    ]


def test_bfloat16_is_widened_first():
    value = torch.tensor([0.5], dtype=torch.bfloat16)
    assert images.to_uint8(value).tolist() == [191]


# --- strips and folders ---------------------------------------------------------------------


def test_strips():
    black = torch.zeros(3, 4, 5, dtype=torch.uint8)
    row = images.hstack([black, black], gap=2)
    assert row.shape == (3, 4, 12)
    assert row[0, 0].tolist() == [0] * 5 + [255] * 2 + [0] * 5
    assert images.vstack([row, row], gap=3).shape == (3, 11, 12)
    assert images.to_pil(row).size == (12, 4)


def test_list_folder(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("z.jpg", "b/A.PNG", "b/c.txt", "m.WebP", "folder.jpg/x.tif"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"")
    found = [str(p.relative_to(tmp_path)) for p in images.list_folder(tmp_path)]
    assert found == ["b/A.PNG", "folder.jpg/x.tif", "m.WebP", "z.jpg"]
