"""Pixel conventions: how files become bytes, bytes tensors, and tensors bytes.

uint8 images are (3, H, W) in 0..255; float images are (B, 3, H, W) in [-1, 1]. Colours are sRGB.
"""

import errno
import io
import math
import os
import time
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, PngImagePlugin, UnidentifiedImageError, features
from torch import Tensor

from kl_f8_train.errors import ImageError, SmallImageError
from kl_f8_train.files import beginning

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # by content; the suffix may lie
ISO_MEDIA = b"ftyp"  # bytes 4 to 7 of a file of one of these brands
BRANDS = {  # the format that Pillow calls so
    "AVIF": (b"avif", b"avis"),
    "HEIF": (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"),
}
REMEDY = {"AVIF": "pip install 'pillow>=11.3'", "HEIF": "pip install pillow-heif"}
MAX_PIXELS = 100_000_000  # of one image, as its header says
MAX_BYTES = 2**31  # of one encoded image
SMALL = 256  # pixels; below, images are resized by Pillow, which is exact there
ORIENTATION = 0x0112  # EXIF's tag
UPRIGHT: dict[int, Callable[[Tensor], Tensor]] = {  # EXIF's numbers; (3, H, W)
    2: lambda image: image.flip(-1),
    3: lambda image: image.flip(-2, -1),
    4: lambda image: image.flip(-2),
    5: lambda image: image.mT,
    6: lambda image: image.rot90(-1, (-2, -1)),
    7: lambda image: image.mT.flip(-2, -1),
    8: lambda image: image.rot90(1, (-2, -1)),
}
SPACES = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK", "LAB": "Lab "}  # mode -> ICC's name
SRGB_LEVELS = 2  # a profile that moves no colour further is sRGB
PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN)  # errors of a disk or server
PAUSES = (0.1, 1.0, 2.0)  # seconds between attempts; a hundred images in a row may fail
SUBFILE, BITS, PHOTOMETRIC, SAMPLE_FORMAT, DNG = 254, 258, 262, 339, 50706  # tags of TIFF


# Editors and ComfyUI keep whole workflows and profiles in PNGs: Pillow refuses an image for one of
# 1 MiB, although it allows 64 MiB of them together.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


Bytes = TypeVar("Bytes")  # or a file that holds them


class Picture(NamedTuple):
    """A decoded image."""

    pixels: Tensor  # (3, H, W) uint8, sRGB; not contiguous
    profile: str  # the colour profile it was converted from; empty if it was sRGB, or had none


def read_file(path: str | Path) -> bytes:
    """The bytes of an image file. Raises ImageError if it cannot be read."""

    def read() -> bytes:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                raise ImageError(f"too large: more than {MAX_BYTES / 2**30:g} GiB")
            return file.read()

    try:
        return patiently(read)
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}") from error


def patiently(read: Callable[[], Bytes]) -> Bytes:
    """What `read` returns; where a disk or its server fails, another attempt or three.

    A run would otherwise take another image for one that is well, and end otherwise.
    """
    for pause in PAUSES:
        try:
            return read()
        except OSError as error:
            if error.errno not in PASSING:
                raise
        time.sleep(pause)
    return read()


def decode(data: bytes, draft_side: int | None = None) -> Tensor:
    """The pixels of `picture`: encoded image -> uint8 (3, H, W)."""
    return picture(data, draft_side).pixels


def picture(data: bytes, draft_side: int | None = None) -> Picture:
    """Encoded image -> pixels in sRGB, turned upright by its EXIF orientation.

    An embedded ICC profile is applied (relative colorimetric). 16-bit grey is scaled, transparency
    is composited over white, animations contribute their first frame. `draft_side` lets a JPEG be
    decoded at 1/2, 1/4 or 1/8 of its size while both sides stay that long: faster for large
    photographs, but other pixels and so other targets of the training. Raises ImageError for
    anything broken, for values of unknown meaning (float, 32-bit, CMYK without a profile, raw),
    and for more than MAX_PIXELS.
    """
    try:
        formats = _formats(data) if data[4:8] == ISO_MEDIA else FORMATS
        with Image.open(io.BytesIO(data), formats=formats) as opened:
            size = opened.size
            if math.prod(size) > MAX_PIXELS:
                raise ImageError(f"too many pixels: {size[0]} x {size[1]}")
            if draft_side is not None:
                opened.draft(opened.mode, (draft_side, draft_side))
            fast = _decode_jpeg(data, opened) if opened.size == size else None
            image, name = fast or _decode_pil(opened)
            turn = UPRIGHT.get(opened.getexif().get(ORIENTATION, 1))
            return Picture(turn(image) if turn else image, name)
    except ImageError:
        raise
    except Exception as error:  # whatever a broken file makes its parser raise
        raise ImageError(_reason(error, data[:64])) from error


def _reason(error: Exception, head: bytes) -> str:
    """Why a file that begins with `head` cannot be decoded."""
    if isinstance(error, Image.DecompressionBombError):
        return f"too many pixels: {error}"
    if isinstance(error, UnidentifiedImageError):  # its message has an address, new in each process
        return f"not a readable image: {beginning(head) or 'of no known format'}"
    return f"not a readable image: {error or type(error).__name__}"


def _formats(data: bytes) -> tuple[str, ...]:
    """Pillow's name of what begins with `ftyp`. Raises ImageError for what it cannot read here."""
    kind = brand(data)
    if kind is None:
        name = data[8:12].decode("latin-1").strip()
        raise ImageError(f"not a photograph: a film or raw file of brand {name!r}")
    if not can_read(kind):
        raise ImageError(f"{kind} cannot be read here: {REMEDY[kind]}")
    return (kind,)


def brand(data: bytes) -> str | None:
    """The kind of BRANDS that a file's first bytes name; None if they name none."""
    if data[4:8] != ISO_MEDIA:
        return None
    length = min(int.from_bytes(data[:4], "big"), 256, len(data))
    names = {data[8:12], *(data[start : start + 4] for start in range(16, length - 3, 4))}
    return next((kind for kind, known in BRANDS.items() if names & set(known)), None)


@lru_cache(maxsize=2)
def can_read(kind: str) -> bool:
    """Whether this installation reads "AVIF" or "HEIF" files."""
    if kind == "AVIF":
        Image.init()
        return "avif" in features.get_supported()
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def _decode_jpeg(data: bytes, opened: Image.Image) -> Picture | None:
    """A JPEG by torchvision: Pillow's values in three quarters of its time, by fewer copies.

    None for another format, or if there is anything wrong: then Pillow decides.
    """
    decoder = _jpeg_decoder()
    if decoder is None or opened.format != "JPEG" or opened.mode not in ("RGB", "L"):
        return None
    try:
        image = decoder(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    except Exception:
        return None
    if image.shape != (3, opened.height, opened.width):
        return None
    profile = opened.info.get("icc_profile")
    transform, name = _conversion(profile, "RGB") if profile else AS_IT_IS
    return Picture(_to_tensor(_applied(transform, to_pil(image))) if transform else image, name)


def _decode_pil(opened: Image.Image) -> Picture:
    _check_range(opened)
    opened.load()
    image, name = _to_rgb(opened, opened.info.get("icc_profile"))
    return Picture(_to_tensor(image), name)


@lru_cache(maxsize=1)
def _jpeg_decoder() -> Callable[[Tensor], Tensor] | None:
    """torchvision's decoder, which takes 2 s to import; None once a release has dropped it."""
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except Exception:
        return None
    return partial(decode_jpeg, mode=ImageReadMode.RGB)


def _to_tensor(image: Image.Image) -> Tensor:
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.view(image.height, image.width, 3).permute(2, 0, 1)


def _check_range(opened: Image.Image) -> None:
    """Raises ImageError if black and white of the stored numbers are not known."""
    tags = getattr(opened, "tag_v2", {}) if opened.format == "TIFF" else {}
    bits = max(tags.get(BITS, (8,)))
    sampled = set(tags.get(SAMPLE_FORMAT, (1,)))
    photometric = tags.get(PHOTOMETRIC)
    wide = opened.mode.startswith("I;16")
    reasons = {
        "raw sensor data": DNG in tags or photometric in (32803, 34892),
        "a thumbnail of another image": bool(tags.get(SUBFILE, 0) & 1),
        "float values": opened.mode == "F" or 3 in sampled,
        "32-bit values": opened.mode == "I" and not (opened.format == "PNG" or 2 in sampled),
        "signed values": bool(sampled - {1, 3, 4}),
        f"{bits}-bit values": wide and bool(tags) and bits != 16,
        "16-bit values with white at 0": wide and photometric == 0,
        "CMYK without a colour profile": opened.mode == "CMYK"
        and not opened.info.get("icc_profile"),
    }
    for reason, applies in reasons.items():
        if applies:
            raise ImageError(f"colours are not known: {reason}; save it as 8-bit sRGB")


def _to_rgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, str]:
    """The image in sRGB, and the name of the profile it was converted from."""
    if image.mode.startswith("I;16") or image.mode == "I":
        levels = np.asarray(image).clip(0, 65535).astype(np.uint32)
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        rgb, name = _without_profile(rgba.convert("RGB"), profile)
        rgb.putalpha(rgba.getchannel("A"))
        white = Image.new("RGBA", rgb.size, "white")
        return Image.alpha_composite(white, rgb).convert("RGB"), name
    return _without_profile(image, profile)


def _without_profile(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, str]:
    """`image`, of any mode, as sRGB; a profile that does not fit it is ignored, but for CMYK."""
    if profile:
        modes = (image.mode, "RGB") if image.mode not in ("CMYK", "LAB") else (image.mode,)
        for mode in modes:
            found = _conversion(profile, mode) if mode in SPACES else None
            if found is not None and found.transform is not None:
                source = image if image.mode == mode else image.convert(mode)
                return _applied(found.transform, source), found.name
    if image.mode == "CMYK":
        raise ImageError("colours are not known: CMYK whose colour profile cannot be used")
    return (image if image.mode == "RGB" else image.convert("RGB")), ""


def _applied(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # None is for conversions in place
    return converted


class _Conversion(NamedTuple):
    transform: ImageCms.ImageCmsTransform | None  # None: nothing to convert, or not usable
    name: str


AS_IT_IS = _Conversion(None, "")


@lru_cache(maxsize=64)
def _conversion(profile: bytes, mode: str) -> _Conversion:
    """From an ICC profile to sRGB, for images of `mode`."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if opened.profile.xcolor_space != SPACES[mode]:
            return AS_IT_IS
        transform = ImageCms.buildTransform(
            opened,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
        )
        name = ImageCms.getProfileDescription(opened).strip() or "without a name"
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, AttributeError):
        return AS_IT_IS
    if mode in ("RGB", "L"):
        levels = np.arange(0, 256, 15, dtype=np.uint8)
        axes = np.meshgrid(*[levels] * len(mode), indexing="ij")
        before = Image.merge(mode, [Image.fromarray(axis.reshape(1, -1)) for axis in axes])
        after = np.asarray(_applied(transform, before)).astype(int)
        if np.abs(after - np.asarray(before.convert("RGB"))).max() <= SRGB_LEVELS:
            return AS_IT_IS
    return _Conversion(transform, name)


@lru_cache(maxsize=1)
def srgb_profile() -> bytes:
    """An ICC profile of sRGB, the same bytes each time: its date is taken out."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    data[24:36] = bytes.fromhex("07d000010001000000000000")  # 2000-01-01
    return bytes(data)


def resize_shorter(image: Tensor, side: int) -> Tensor:
    """Bicubic, antialiased, on 8-bit values; shorter side -> `side`.

    By torch, three times as fast as Pillow: under 1 % of the values differ, by one level, very few
    by two. By Pillow itself for small images, and for tall ones that shrink, whose two passes
    torch makes in the other order (up to 22 levels apart). Raises ImageError for more than
    MAX_PIXELS: a line of pixels would become a bomb.
    """
    height, width = image.shape[-2:]
    if min(height, width) == side:
        return image
    scale = side / min(height, width)
    size = (max(side, round(height * scale)), max(side, round(width * scale)))
    if math.prod(size) > MAX_PIXELS:
        raise ImageError(
            f"too many pixels: {size[1]} x {size[0]}, enlarged from {width} x {height}"
        )
    if min(side, height, width) < SMALL or (scale < 1 and height > 2 * width):
        resized = to_pil(image).resize(size[::-1], Image.Resampling.BICUBIC)
        return _to_tensor(resized)
    return F.interpolate(image[None], size=size, mode="bicubic", antialias=True)[0]


def flip(image: Tensor) -> Tensor:
    """The mirror image, left and right exchanged."""
    return image.flip(-1)


def crop(image: Tensor, side: int, top_share: float = 0.5, left_share: float = 0.5) -> Tensor:
    """Square crop; the shares in [0, 1] place it (0.5, 0.5: the centre).

    Raises SmallImageError if the image is smaller than the crop.
    """
    height, width = image.shape[-2:]
    if min(height, width) < side:
        raise SmallImageError(
            f"{width} x {height} pixels, smaller than the {side} x {side} crop", min(height, width)
        )
    top = min(math.floor(top_share * (height - side + 1)), height - side)
    left = min(math.floor(left_share * (width - side + 1)), width - side)
    return image[..., top : top + side, left : left + side].contiguous()


def squares(data: bytes, sides: Iterable[int]) -> list[Tensor]:
    """Encoded image -> its centre as uint8 (3, side, side) for each of `sides`, decoded once.

    The shorter side is resized to `side`. Raises ImageError as `decode` does.
    """
    whole = decode(data)
    return [crop(resize_shorter(whole, side), side) for side in sides]


def to_float(image: Tensor) -> Tensor:
    """uint8 0..255 -> float32 [-1, 1], x / 127.5 - 1."""
    return image.float() / 127.5 - 1.0


def to_uint8(image: Tensor, quantize: str = "round") -> Tensor:
    """Float [-1, 1] -> uint8, clamped; rounded, or floored as the authors' evaluator did."""
    levels = (image.float().clamp(-1.0, 1.0) + 1.0) * 127.5
    return (levels.floor() if quantize == "floor" else levels.round()).to(torch.uint8)


def hstack(pictures: list[Tensor], gap: int = 4) -> Tensor:
    """uint8 (3, H, W) pictures of one height side by side, with white gaps."""
    space = torch.full((3, pictures[0].shape[1], gap), 255, dtype=torch.uint8)
    return torch.cat([part for p in pictures for part in (p, space)][:-1], dim=2)


def vstack(rows: list[Tensor], gap: int = 4) -> Tensor:
    """uint8 (3, H, W) pictures of one width below each other, with white gaps."""
    space = torch.full((3, gap, rows[0].shape[2]), 255, dtype=torch.uint8)
    return torch.cat([part for r in rows for part in (r, space)][:-1], dim=1)


def to_pil(image: Tensor) -> Image.Image:
    """uint8 (3, H, W) -> PIL image."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
