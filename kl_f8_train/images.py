"""Pixel conventions: how bytes become tensors and tensors become bytes.

uint8 images are (3, H, W) in 0..255; float images are (B, 3, H, W) in [-1, 1].
"""

import io
import math
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from kl_f8_train.errors import ImageError, MissingInputError, SmallImageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # by content; the suffix may lie
MAX_PIXELS = 100_000_000  # of one image, as its header says
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


def decode(data: bytes, draft_side: int | None = None) -> Tensor:
    """Encoded image -> uint8 (3, H, W), turned upright by its EXIF orientation; not contiguous.

    16-bit grey is scaled, transparency is laid on white, a film is its first frame. `draft_side`
    lets a JPEG be decoded at 1/2, 1/4 or 1/8 of its size while both sides stay that long: faster
    for large photographs, but other pixels and so other targets of the training.
    Raises ImageError for anything broken and for more than MAX_PIXELS.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            size = opened.size
            if math.prod(size) > MAX_PIXELS:
                raise ImageError(f"too many pixels: {size[0]} x {size[1]}")
            if draft_side is not None:
                opened.draft(opened.mode, (draft_side, draft_side))
            plain = opened.format == "JPEG" and opened.mode in ("RGB", "L") and opened.size == size
            image = _decode_jpeg(data, size) if plain else None
            if image is None:
                image = _decode_pil(opened)
            turn = UPRIGHT.get(opened.getexif().get(ORIENTATION, 1))
            return turn(image) if turn else image
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"too many pixels: {error}") from error
    except UnidentifiedImageError as error:  # its text has an address, new in each process
        raise ImageError("not a readable image: of no known format") from error
    except Exception as error:  # whatever a broken file makes its parser raise
        raise ImageError(f"not a readable image: {error}") from error


def _decode_jpeg(data: bytes, size: tuple[int, int]) -> Tensor | None:
    """A JPEG by torchvision: Pillow's values in three quarters of its time, by fewer copies.

    None if there is anything wrong: then Pillow decides.
    """
    decoder = _jpeg_decoder()
    if decoder is None:
        return None
    try:
        image = decoder(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    except Exception:
        return None
    return image if image.shape == (3, size[1], size[0]) else None


@lru_cache(maxsize=1)
def _jpeg_decoder() -> Callable[[Tensor], Tensor] | None:
    """torchvision's decoder, which takes 2 s to import; None once a release has dropped it."""
    try:
        from torchvision.io import (  # type: ignore[import-untyped]
            ImageReadMode,
            decode_jpeg,
        )
    except Exception:
        return None
    return partial(decode_jpeg, mode=ImageReadMode.RGB)


def _decode_pil(opened: Image.Image) -> Tensor:
    opened.load()
    image = _to_rgb(opened)
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.view(image.height, image.width, 3).permute(2, 0, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        levels = np.asarray(image).clip(0, 65535).astype(np.uint32)
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def resize_shorter(image: Tensor, side: int) -> Tensor:
    """Bicubic, antialiased, on 8-bit values; shorter side -> `side`.

    Under 1 % of the values differ from PIL's, by one level, very few by two. Three times as fast.
    Raises ImageError for more than MAX_PIXELS: a line of pixels would become a bomb.
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


def square(data: bytes, side: int) -> Tensor:
    """Encoded image -> its centre as uint8 (3, side, side), the shorter side resized to `side`.

    Raises ImageError as `decode` does.
    """
    return crop(resize_shorter(decode(data), side), side)


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
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def list_folder(folder: Path) -> list[Path]:
    """Image files below a folder, sorted."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())


def load_folder(
    folder: Path, side: int, count: int, report: Callable[[str], None] = print
) -> list[Tensor]:
    """The first `count` images below a folder as uint8 (3, side, side) centre squares.

    An unreadable image is named and left out. Raises MissingInputError if none is left.
    """
    loaded: list[Tensor] = []
    for file in list_folder(folder) if folder.is_dir() else []:
        if len(loaded) == count:
            break
        try:
            loaded.append(square(file.read_bytes(), side))
        except ImageError as error:
            report(f"{file}: {error}; left out")
    if not loaded:
        raise MissingInputError(f"no images in {folder}: expected a folder of .jpg, .png or .webp")
    return loaded
