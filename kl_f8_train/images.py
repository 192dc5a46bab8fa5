"""Pixel conventions: how bytes become tensors and tensors become bytes.

uint8 images are (3, H, W) in 0..255; float images are (B, 3, H, W) in [-1, 1].
"""

import io
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from kl_f8_train.errors import ImageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def decode(data: bytes) -> Tensor:
    """Encoded image -> uint8 (3, H, W), turned upright by its EXIF orientation.

    16-bit grey is scaled, transparency is laid on white. Raises ImageError for anything broken.
    """
    try:
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
            return torch.from_numpy(np.array(_to_rgb(image))).permute(2, 0, 1).contiguous()
    except Image.DecompressionBombError as error:
        raise ImageError(f"too many pixels: {error}") from error
    except Exception as error:  # whatever a broken file makes its parser raise
        raise ImageError(f"not a readable image: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        levels = np.asarray(image).astype(np.float64) / 257.0
        return Image.fromarray(levels.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def resize_shorter(image: Tensor, side: int) -> Tensor:
    """Bicubic, antialiased, on 8-bit values; shorter side -> `side`.

    Under 1 % of the values differ from PIL's, by one level, very few by two.
    """
    height, width = image.shape[-2:]
    if min(height, width) == side:
        return image
    scale = side / min(height, width)
    size = (max(side, round(height * scale)), max(side, round(width * scale)))
    resized = F.interpolate(image[None], size=size, mode="bicubic", antialias=True)
    return resized[0].contiguous()


def crop(image: Tensor, side: int, top_share: float = 0.5, left_share: float = 0.5) -> Tensor:
    """Square crop; the shares in [0, 1] place it (0.5, 0.5: the centre).

    Raises ImageError if the image is smaller than the crop.
    """
    height, width = image.shape[-2:]
    if min(height, width) < side:
        raise ImageError(f"{width} x {height} pixels, smaller than the {side} x {side} crop")
    top = min(math.floor(top_share * (height - side + 1)), height - side)
    left = min(math.floor(left_share * (width - side + 1)), width - side)
    return image[..., top : top + side, left : left + side].contiguous()


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
